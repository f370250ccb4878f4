"""Traces of a real cluster: what `tw.profile` writes."""

import json
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
