"""Clients and slices that share devices: one executor for each set, and one computation at a time on each device."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import torchways as tw
from torchways.config import ClusterConfig
from torchways.errors import PlacementError
from torchways.launch.embedded import start_cluster
from torchways.rpc.channel import TOKEN_VARIABLE

#: Another client: computes with slices of the shape in its arguments, and prints its executor and what it found.
CLIENT = """
import json, sys, torch, torchways as tw
from torchways.api import _current as current_session
tw.init()
shape = tuple(map(int, sys.argv[1].split(",")))
mesh = tw.init_device_mesh(shape, mesh_dim_names=("dp", "tp")[: len(shape)])
array = tw.distribute_tensor(torch.arange(64.0), mesh)

@tw.program(mesh=mesh)
def step(x):
    return (x * 2 + 1).sum()

step(array).item()
print("ready", flush=True)
sys.stdin.readline()
values = [value.item() for value in [step(array) for _ in range(200)]]
spans = {
    name.removeprefix("executor "): [(span.start_ns, span.end_ns) for span in spans if span.track == "device 0"]
    for name, spans in current_session().collect_spans(0).items() if name.startswith("executor")
}
print(json.dumps({"values": values, "spans": spans}), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def environment(monkeypatch):
    """A cluster of one island of two devices, which this process and its children join."""
    cluster = start_cluster(ClusterConfig(islands=1, devices_per_island=2))
    tw.shutdown()
    monkeypatch.setenv("TORCHWAYS_ADDRESS", cluster.address)
    monkeypatch.setenv(TOKEN_VARIABLE, cluster.token)
    yield dict(os.environ)
    tw.shutdown()
    cluster.close()


def clients(environment, *shapes):
    """Runs a client for each shape, all at once; returns what each found."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, shape],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for shape in shapes
    ]
    try:
        for client in started:
            assert client.stdout.readline() == "ready\n"
        for client in started:
            client.stdin.write("go\n")
            client.stdin.flush()
        return [json.loads(client.stdout.readline()) for client in started]
    finally:
        for client in started:
            client.stdin.close()
            client.wait(30)


def num_overlapping(spans):
    """Returns how many of these (start, end) begin before one that began earlier has ended."""
    ordered = sorted(spans)
    return sum(later[0] < earlier[1] for earlier, later in itertools.pairwise(ordered))


def test_two_clients_with_the_same_devices_have_one_executor(environment):
    found = clients(environment, "2", "2,1")
    for client in found:
        assert client["values"] == [64.0 * 63 + 64] * 200
        assert list(client["spans"]) == ["i0.e1"]
    spans = found[-1]["spans"]["i0.e1"]
    assert len(spans) >= 202
    assert num_overlapping(spans) == 0


def test_executors_that_share_a_device_compute_one_at_a_time(environment):
    found = clients(environment, "2", "1")
    for client in found:
        assert client["values"] == [64.0 * 63 + 64] * 200
    spans = {name: item for client in found for name, item in client["spans"].items()}
    assert sorted(spans) == ["i0.e1", "i0.e2"]
    assert num_overlapping([span for item in spans.values() for span in item[-200:]]) == 0


def test_a_slice_of_devices_that_are_in_use_is_ready_at_once(environment):
    with tw.init():
        first = tw.init_device_mesh((2,), mesh_dim_names=("dp",))
        assert tw.distribute_tensor(torch.ones(4), first).sum().item() == 4
        pids = [pid for name, pid in tw.cluster_info().processes if name.startswith("executor")]
        second = tw.init_device_mesh((1, 2), mesh_dim_names=("x", "y"))
        moved = tw.distribute_tensor(torch.arange(8.0).reshape(2, 4), second, (Replicate(), Shard(1)))
        assert moved.tolist() == torch.arange(8.0).reshape(2, 4).tolist()
        assert pids == [pid for name, pid in tw.cluster_info().processes if name.startswith("executor")]
        second.close()
        assert tw.distribute_tensor(torch.ones(4), first).sum().item() == 4
        with pytest.raises(PlacementError, match="closed"):
            moved.tolist()


def test_a_pipeline_and_a_sum_over_slices_of_the_same_devices(environment):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    x = torch.randn(6, 4)
    expected = layers(x)
    expected.sum().backward()
    gradients = [parameter.grad.clone() for parameter in layers.parameters()]
    layers.zero_grad()
    with tw.init():
        meshes = [tw.init_device_mesh((2,), mesh_dim_names=("dp",)) for _ in range(2)]
        model = tw.pipeline(layers, split_spec={"1": tw.SplitPoint.BEGINNING}, meshes=meshes)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        @tw.program
        def step(x):
            out = model(x)
            out.sum().backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)  # a sum over the slices
            optimizer.step()
            optimizer.zero_grad()
            return out.detach(), norm

        before = [parameter.detach().cpu() for parameter in model.parameters()]
        for turn in range(3):
            out, norm = step(x)
            if turn == 0:
                torch.testing.assert_close(out.cpu(), expected.detach())
                torch.testing.assert_close(norm.cpu(), torch.cat([g.flatten() for g in gradients]).norm())
                after = [parameter.detach().cpu() for parameter in model.parameters()]
                for old, new, gradient in zip(before, after, gradients, strict=True):
                    torch.testing.assert_close(new, old - 0.1 * gradient)
        assert len(tw.executor_status()) == 1
