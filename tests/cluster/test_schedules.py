"""Every schedule on real executors: losses over 20 steps are those of the model that no pipeline splits."""

import copy
import functools

import pytest
import torch

import torchways as tw
from tests.cluster.conftest import cluster_processes
from tests.cluster.test_microbatches import Model, losses_of, make_step

STEPS = 20

#: The slice of each stage, for S stages.
PLACES = {
    "GPipe": lambda num_stages: range(num_stages),
    "1F1B": lambda num_stages: range(num_stages),
    "LoopedBFS": lambda num_stages: [*range(num_stages // 2)] * 2,
    "Interleaved1F1B": lambda num_stages: [*range(num_stages // 2)] * 2,
    "InterleavedZeroBubble": lambda num_stages: [*range(num_stages // 2)] * 2,
    "ZBVZeroBubble": lambda num_stages: [*range(num_stages // 2), *reversed(range(num_stages // 2))],
    "DualPipeV": lambda num_stages: [*range(num_stages // 2), *reversed(range(num_stages // 2))],
    "auto": lambda num_stages: [*range(num_stages // 2), *range(num_stages // 2)],
}


@pytest.fixture(scope="module")
def slice_of():
    """A function that returns a slice of one device by its number; up to eight of them on two islands."""
    with tw.init(islands=2, devices_per_island=4):
        yield functools.cache(lambda index: tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=index % 2))
    assert cluster_processes() == []


@functools.cache
def model_and_losses(num_layers, count):
    """A model, and its losses where it is whole: gradients are accumulated in eager PyTorch."""
    torch.manual_seed(0)
    model = Model(num_layers)
    return model, losses_of(make_step(copy.deepcopy(model), count, "GPipe"), STEPS, batch=2 * count)


def check(schedule, num_stages, count, slice_of):
    model, expected = model_and_losses(num_stages, count)
    ours = tw.pipeline(
        copy.deepcopy(model),
        split_spec={f"layers.{stage}": tw.SplitPoint.BEGINNING for stage in range(1, num_stages)},
        meshes=[slice_of(index) for index in PLACES[schedule](num_stages)],
    )
    step = tw.program(make_step(ours, count, schedule))
    torch.testing.assert_close(losses_of(step, STEPS, batch=2 * count), expected, rtol=1e-4, atol=0)
    [loop] = step.report().loops
    assert (len(loop.stages), loop.num_microbatches) == (num_stages, count)
    assert loop.schedule_name == schedule or loop.is_automatic


@pytest.mark.parametrize(
    "schedule",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("1F1B", "auto"))) for name in PLACES],
)
def test_two_stages(slice_of, schedule):
    check(schedule, 2, 8, slice_of)


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 16])
@pytest.mark.parametrize("schedule", PLACES)
def test_four_stages(slice_of, schedule, count):
    check(schedule, 4, count, slice_of)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", PLACES)
def test_eight_stages(slice_of, schedule):
    check(schedule, 8, 32, slice_of)
