"""Traces of a real cluster: what `tw.profile` writes."""

import json
import re
from collections import defaultdict

import torch

import torchways as tw


def test_a_profile_joins_dispatch_scheduler_executors_and_transfers(tmp_path):
    path = tmp_path / "trace.json"
    with tw.init(islands=2, devices_per_island=1):
        first, second = (tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=island) for island in (0, 1))

        @tw.program
        def step(x):
            return tw.redistribute(x * 2, second, ("dp",)) + 1

        x = tw.distribute_tensor(torch.ones(64), first)
        step(x).cpu()
        with tw.profile(path):
            assert step(x).cpu()[0].item() == 3
    events = json.loads(path.read_text())["traceEvents"]
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    roles = sorted(name.partition(" ")[0] for name in processes.values())
    assert roles == ["controller", "executor", "executor", "scheduler", "scheduler"]
    kinds = {event["cat"] for event in events if event["ph"] == "X"}
    assert {"dispatch", "held", "admitted", "compute", "send", "receive", "read"} <= kinds
    assert not {event["args"].get("client", 1) for event in events if event["ph"] == "X"} - {1}
    chains = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            chains[event["id"]].append(event)
    names = sorted((chain[0]["name"], *(event["ph"] for event in chain)) for chain in chains.values())
    assert names == [("run", "s", "t", "t", "f")] * 2 + [("transfer", "s", "f")]


def profiled(path, work):
    """Returns the spans of a trace while `work` runs, and the names of processes by pid."""
    with tw.profile(path):
        work()
    events = json.loads(path.read_text())["traceEvents"]
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    return [event for event in events if event["ph"] == "X"], processes


def heavy(x):
    for _ in range(20):
        x = x @ x / 64
    return x


def test_waits_for_inputs_and_for_room_are_shown_with_what_they_wait_for(tmp_path):
    with tw.init(islands=2, devices_per_island=1):
        first, second = (tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=island) for island in (0, 1))

        @tw.program
        def step(x):
            return tw.redistribute(heavy(x), second, ("dp",)) + 1

        alone = tw.program(heavy, mesh=first)
        x = tw.distribute_tensor(torch.ones(512, 512), first)
        step(x).cpu()
        alone(x).cpu()
        spans, processes = profiled(tmp_path / "inputs.json", lambda: step(x).cpu())
        # The second island computes only once the first has, on purpose for long.
        waits = [span for span in spans if span["cat"] == "input"]
        assert [processes[span["pid"]] for span in waits] == ["executor i1.e1"]
        assert waits[0]["name"].startswith("inputs of step/")
        [run_id] = {span["args"]["run_id"] for span in spans if span["cat"] == "dispatch"}
        assert waits[0]["args"]["run_id"] == run_id

        spans, _ = profiled(tmp_path / "held.json", lambda: [alone(x) for _ in range(40)][-1].cpu())
        held = [span["name"] for span in sorted(spans, key=lambda span: span["ts"]) if span["cat"] == "held"]
        assert len(held) == 40  # together they take longer than what a client alone is admitted at a time
        assert "heavy held: room on its devices" in held
        assert "heavy held: its client's earlier runs" in held


def test_waits_for_grants_name_who_shares_the_devices(tmp_path):
    with tw.init(islands=1, devices_per_island=2):
        whole = tw.init_device_mesh((2,), mesh_dim_names=("dp",))
        half = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        programs = [tw.program(heavy, mesh=mesh) for mesh in (whole, half)]
        inputs = [tw.distribute_tensor(torch.ones(256, 256), mesh, ("R",)) for mesh in (whole, half)]

        def both(order):
            made = [programs[i](inputs[i]) for _ in range(10) for i in order]
            return [array.cpu() for array in made]

        both((0, 1))
        # An executor that says first that its runs are ready, of all of them at once, waits for nobody: each is second.
        spans, processes = profiled(tmp_path / "grants.json", lambda: [both(order) for order in ((0, 1), (1, 0)) * 4])
    grants = [(processes[span["pid"]], span["name"]) for span in spans if span["cat"] == "grant"]
    assert all(re.match(r"waits for its grant: unit 0 of run \d+ of heavy: ", name) for _, name in grants)
    for mine, other in (("i0.e1", "i0.e2"), ("i0.e2", "i0.e1")):
        reasons = [name.rpartition(": ")[2] for process, name in grants if process == f"executor {mine}"]
        assert f"{other} on devices that they share" in reasons
