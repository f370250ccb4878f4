"""A run that waits for memory of another client is named, with real processes: in the log, in `status` and in `top`."""

import json
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import torchways as tw
from tests.cluster.test_cli import environment, running, torchways, write_script  # noqa: F401 (a fixture)

MEGABYTE = 1 << 20

#: Holds 60 MB until its stdin is closed.
HOLDER = """
import sys, torch, torchways as tw
tw.init(*sys.argv[1:])
mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=0)
array = tw.distribute_tensor(torch.ones(15, 1 << 20), mesh)
print(array.sum().item(), flush=True)
sys.stdin.read()
tw.shutdown()
"""
#: Needs more than is left, and prints what its executor says of it meanwhile.
WAITER = """
import sys, time, torch, torchways as tw
tw.init(*sys.argv[1:])
mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=0)

@tw.program(mesh=mesh)
def grow(x):
    return x + torch.ones(15, 1 << 20)

grown = grow(tw.distribute_tensor(torch.ones(1), mesh))
while not (found := [line for status in tw.executor_status() for line in status.stalls]):
    time.sleep(0.1)
print(found[0], flush=True)
print(grown.sum().item(), flush=True)
tw.shutdown()
"""


def start(folder, name, text, address):
    path = write_script(folder, text, name)
    command = [sys.executable, str(path), address]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("environment")
def test_a_run_that_waits_for_another_clients_memory_is_named(tmp_path):
    limits = ("--devices-per-island", "1", "--memory-budget", str(100 * MEGABYTE), "--stall-warning", "0.5")
    with running(*limits) as facts:
        holder = start(tmp_path, "holder.py", HOLDER, facts["address"])
        waiter = None
        try:
            assert float(holder.stdout.readline()) == 15 << 20
            waiter = start(tmp_path, "train.py", WAITER, facts["address"])
            line = waiter.stdout.readline().strip()
            held = r"6\d,\d{3},\d{3}"
            assert re.fullmatch(
                r"run \d+ of grow \(client 2\) waits \d+ s: "
                r"island 0 device 0 never enqueued grow/0 at .*train.py:8.*; "
                rf"it waits for {held} bytes of device memory held by client 1 \({held} bytes\).*; "
                r"6\d,\d{3},\d{3} of 104,857,600 bytes are used",
                line,
            ), line
            subject = line.split(" waits ")[0]
            assert subject in torchways("status")
            assert subject in json.loads(torchways("status", "--json"))["stalls"][0]
            assert subject in torchways("top", "--once", "--interval", "0.2", COLUMNS="300")
            holder.stdin.close()
            assert float(waiter.stdout.readline()) == 2 * (15 << 20)
            assert waiter.wait(30) == 0
            assert holder.wait(30) == 0
            log = Path(facts["log_dir"]) / "executor_i0.e1.log"
            deadline = time.monotonic() + 10
            while "without progress" not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.1)
            run = subject.split(" of ")[0]
            said = [text for text in log.read_text().splitlines() if f"{run} " in text]
            assert [("waits" in text, "without progress" in text) for text in said] == [(True, False), (False, True)]
        finally:
            for process in filter(None, (holder, waiter)):
                process.kill()
                process.wait()
                process.stdin.close()
                process.stdout.close()


class Slow(torch.nn.Module):
    """Computes for long."""

    def forward(self, x):
        y = x.detach().mT @ x.detach()
        for _ in range(60):
            y = torch.tanh(y @ y)
        return x + y.mean() * 0


def test_a_pipelines_action_is_named_with_its_schedule():
    with tw.init(islands=2, devices_per_island=1, stall_warning=timedelta(seconds=0.1)):
        meshes = [tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=island) for island in (0, 1)]
        layers = torch.nn.Sequential(torch.nn.Linear(512, 512), Slow(), torch.nn.Linear(512, 1))
        pipe = tw.pipeline(layers, split_spec={"2": tw.SplitPoint.BEGINNING}, meshes=meshes)

        def loss_of(part):
            loss = pipe(part).sum()
            loss.backward()
            return loss

        @tw.program
        def train_step(x):
            return tw.microbatch(loss_of, x, n_microbatches=4)

        x = torch.ones(512, 512)
        found = []
        deadline = time.monotonic() + 120
        while not found and time.monotonic() < deadline:
            loss = train_step(x)
            while not loss.done() and not found:
                lines = [line for status in tw.executor_status() for line in status.stalls]
                found = [line for line in lines if "microbatch" in line]
        assert loss.cpu().isfinite().all()
        assert re.search(
            r"stage\d\.\w \(1F1B, stage \d, (forward|backward), microbatch \d\) at .*test_stalls.py", found[0]
        )
