"""`schedule="auto"` and `program.report()` on real executors."""

import copy
import json
import re

import pytest
import torch

import torchways as tw
from tests.cluster.test_microbatches import Model, losses_of, make_step
from torchways.controller.auto_schedule import MEASURED_CALLS, WARM_UP_CALLS

BEFORE = WARM_UP_CALLS + MEASURED_CALLS
PLACES = {"ab": 4, "abba": 4, "aabb": 3, "abab": 5}


@pytest.fixture(scope="module")
def slices(cluster):
    """One device of each island."""
    return [tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=island) for island in (0, 1)]


def placed_step(model, slices, where, count, schedule):
    split = {f"layers.{4 * stage // len(where)}": tw.SplitPoint.BEGINNING for stage in range(1, len(where))}
    ours = tw.pipeline(copy.deepcopy(model), split_spec=split, meshes=[slices["ab".index(item)] for item in where])
    return tw.program(make_step(ours, count, schedule))


def actions_in_trace(path):
    """Returns the actions of a trace, a set for each device."""
    lanes = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event.get("cat") == "compute" and (found := re.search(r" (\d+[FBIW]\d+)$", event["name"])):
            lanes.setdefault((event["pid"], event["tid"]), set()).add(found[1])
    return list(lanes.values())


@pytest.mark.parametrize(
    "where", [pytest.param(w, marks=[pytest.mark.slow] * (w not in ("ab", "abba"))) for w in PLACES]
)
def test_losses_are_those_of_gradient_accumulation_over_the_switch(slices, where, tmp_path):
    torch.manual_seed(0)
    model, count = Model(), PLACES[where]
    step = placed_step(model, slices, where, count, "auto")
    found = losses_of(step, BEFORE + 4)  # nothing is read between the calls
    torch.testing.assert_close(found, losses_of(make_step(model, count, "auto"), BEFORE + 4), rtol=1e-4, atol=0)
    assert step.num_traces == 1
    [loop] = step.report().loops
    assert loop.is_settled
    assert loop.is_automatic
    assert loop.tried[loop.schedule_name] == pytest.approx(min(loop.tried.values()))
    # What runs is that schedule: its actions, all but the input gradients of stage 0, which nobody waits for.
    with tw.profile(tmp_path / "trace.json"):
        losses_of(step, 1)
    found = actions_in_trace(tmp_path / "trace.json")
    wanted = [{str(action) for action in row if str(action)[:2] != "0I"} for row in loop.schedule.rows]
    assert sorted(map(sorted, found)) == sorted(map(sorted, wanted))


def test_the_report_of_a_real_run(slices):
    torch.manual_seed(0)
    step = placed_step(Model(), slices, "abab", 4, "Interleaved1F1B")
    losses_of(step, 4)
    [loop] = step.report().loops
    assert loop.num_calls == 4
    assert loop.schedule_name == "Interleaved1F1B"
    assert [stage.stage_index for stage in loop.stages] == [0, 1, 2, 3]
    assert all(stage.forward_us > 0 and stage.backward_us > 0 for stage in loop.stages)
    assert all(stage.held_bytes > 0 for stage in loop.stages)
    # What a slice computes cannot be less than its part of the makespan.
    busy = sum(stage.forward_us + stage.backward_us for stage in loop.stages) * loop.num_microbatches
    assert loop.predicted_us >= busy / 2 * 0.999
    assert loop.predicted_bubble == pytest.approx(1 - busy / 2 / loop.predicted_us, abs=1e-6)
    assert 0 <= loop.measured_bubble < 1
    assert loop.measured_us > 0
    assert 0 < loop.theoretical_bubble < 0.5
    assert loop.transfer_us >= 0
    assert "Interleaved1F1B" in str(step.report())
