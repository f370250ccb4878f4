"""`schedule="auto"` where executors have a memory budget: on clusters of its own."""

import copy

import pytest
import torch

import torchways as tw
from tests.cluster.test_auto_schedule import BEFORE, placed_step
from tests.cluster.test_microbatches import Model, losses_of, make_step
from torchways.errors import ResourceExhausted
from torchways.ir.loops import unrolled
from torchways.passes.preflight import peak_memory


def test_executors_with_a_budget_get_a_schedule_that_fits():
    torch.manual_seed(0)
    model, count = Model(), 8

    def run(schedule, num_calls):
        slices = [tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=island) for island in (0, 1)]
        step = placed_step(model, slices, "ab", count, schedule)
        losses = losses_of(step, num_calls, batch=32)
        lowered = step.lower()
        peaks = [peak_memory(unrolled(part), lowered.program.slices[part.slice_index]).nbytes for part in lowered.parts]
        return losses, max(peaks), step.report().loops[0]

    with tw.init(islands=2, devices_per_island=1):
        least, most = (run(schedule, 1)[1] for schedule in ("1F1B", "GPipe"))
    budget = (least + most) // 2
    with tw.init(islands=2, devices_per_island=1, memory_budget=budget):
        with pytest.raises(ResourceExhausted):
            run("GPipe", 1)
        losses, peak, loop = run("auto", BEFORE + 2)
    assert loop.is_settled
    assert peak <= budget
    expected = losses_of(make_step(copy.deepcopy(model), count, "GPipe"), BEFORE + 2, batch=32)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
