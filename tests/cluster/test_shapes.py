"""New shapes on real executors: compilation beside runs of other programs."""

import pytest
import torch

import torchways as tw
from torchways import api


def deep(x):
    """Takes a second or so to compile."""
    for number in range(150):
        x = torch.tanh(x @ x) * 0.5 + torch.sin(x) / (number + 1)
    return x


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_program_compiles_beside_runs_of_others(cluster, num_devices):
    """Runs of a program that is compiled begin and end between begin and end of another one's compilation."""
    mesh = tw.init_device_mesh((num_devices,), mesh_dim_names=("dp",), island=0)
    double = tw.function(lambda x: x * 2, mesh=mesh)
    slow = tw.function(deep, mesh=mesh)
    x = torch.full((16, 16), 0.01)
    assert double(x).cpu()[0, 0] == x[0, 0] * 2
    before = sum(status.num_compiled for status in tw.executor_status())
    pending = slow(x)  # returns at once: it is traced, and compiled in the background
    values = []
    while not pending.done():
        values.append(double(x).cpu())
    assert all(torch.equal(value, x * 2) for value in values)
    torch.testing.assert_close(pending.cpu(), deep(x))
    spans = [span for spans in api._current().collect_spans(0).values() for span in spans]
    [compiled] = [span for span in spans if span.name == "compile deep"]
    ran = [span for span in spans if span.track == "device 0" and compiled.start_ns < span.start_ns]
    inside = [span for span in ran if span.end_ns < compiled.end_ns]
    assert len(inside) >= 3
    assert {span.name.split("/")[0] for span in inside} == {"<lambda>"}
    assert sum(status.num_compiled for status in tw.executor_status()) == before + 1
    assert all(status.compile_seconds > 0 for status in tw.executor_status() if status.num_compiled)
    mesh.close()
