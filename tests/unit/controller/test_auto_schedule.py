"""`schedule="auto"` and `program.report()` without processes: local_session.py runs the parts, and has their spans."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

import torchways as tw
from tests.local_session import LocalSession
from tests.unit.capture.models import Model, pipelined
from torchways.controller.auto_schedule import MEASURED_CALLS, WARM_UP_CALLS
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction
from torchways.errors import ResourceExhausted, UserError
from torchways.ir.loops import unrolled
from torchways.ir.program import Loop
from torchways.ir.stages import schedule_of
from torchways.parallel.pipeline import SplitPoint
from torchways.passes.preflight import peak_memory
from torchways.schedules import SCHEDULES, Costs, Kind, dry_run, find_schedule

SPLITS = ["layers.1", "layers.2", "head"]
BEFORE = WARM_UP_CALLS + MEASURED_CALLS
TIMES = {Kind.FORWARD: 100.0, Kind.INPUT: 150.0, Kind.WEIGHT: 40.0, Kind.BACKWARD: 190.0}


def time_of(action, slow_stage=1):
    return TIMES[action.kind] * (3 if action.stage == slow_stage else 1)


def placed_model(session, where, model):
    meshes = {letter: session.mesh() for letter in where}
    split = dict.fromkeys(SPLITS[: len(where) - 1], SplitPoint.BEGINNING)
    return pipelined(session, copy.deepcopy(model), split, [meshes[letter] for letter in where])


def make_step(model, count, schedule="auto"):
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)

    def forward_backward(x, y):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / count
        loss.backward()
        return loss

    def step(x, y):
        losses = tw.microbatch(forward_backward, x, y, n_microbatches=count, schedule=schedule)
        opt.step()
        opt.zero_grad()
        return losses

    return step


def losses_of(step, num_calls, batch=8):
    torch.manual_seed(1)
    data = [torch.randint(0, 17, (batch, 5)) for _ in range(num_calls)]
    return [step(x, x.roll(1, 1)).cpu() for x in data]


def loops_of(program):
    return [node for node in program._last.lowered.program.nodes if isinstance(node, Loop)]


@pytest.mark.parametrize("where", ["ab", "abc", "abcd", "abab", "abba", "aab", "aa"])
def test_it_measures_and_goes_on_by_the_best_schedule(where):
    torch.manual_seed(0)
    model, session = Model(), LocalSession(time_of=time_of)
    program = ProgramFunction(make_step(placed_model(session, where, model), 4), None, lambda: session)
    losses = losses_of(program, BEFORE)
    [before] = loops_of(program)
    assert before.is_automatic
    assert schedule_of(before).splits_backward
    assert not program.report().loops[0].is_settled
    losses_of(program, 3)
    assert program._times_traced == 1
    [after] = program.report().loops
    assert after.is_settled
    # The one that the search finds for these times; transfers take none here, but for what the loop of Python takes.
    homes = ["abcd".index(letter) for letter in where]
    costs = Costs(
        seconds={(stage, kind): TIMES[kind] * (3 if stage == 1 else 1) for stage in range(len(where)) for kind in Kind}
        | {(0, Kind.INPUT): 0.0, (0, Kind.BACKWARD): TIMES[Kind.WEIGHT]},
        transfer=after.transfer_us,
    )
    assert min(after.tried.values()) == pytest.approx(after.tried[after.schedule_name])
    named = {name for name in after.tried if name in SCHEDULES}
    found = find_schedule(homes, 4, costs)
    assert named == {name for name in found.tried if name in SCHEDULES}
    expected = losses_of(make_step(model, 4), BEFORE)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)


def test_the_report_names_the_schedule_that_stays_as_the_search_does():
    """With these times the schedule from before stays; another one, by the same rule for these times, is longer."""
    tenths = {Kind.FORWARD: (14, 14, 8, 14), Kind.INPUT: (0, 10, 2, 3), Kind.WEIGHT: (3, 3, 1, 10)}
    torch.manual_seed(0)
    session = LocalSession(time_of=lambda action: 1e5 * tenths[action.kind][action.stage])
    step = ProgramFunction(make_step(placed_model(session, "aabb", Model()), 3), None, lambda: session)
    losses_of(step, BEFORE)
    before = step.report().loops[0].schedule
    losses_of(step, 1)
    [loop] = step.report().loops
    assert loop.is_settled
    assert loop.schedule.rows == before.rows
    assert loop.schedule_name == f"{before.name}, of equal times"
    assert loop.tried[loop.schedule_name] == min(loop.tried.values()) < loop.tried[before.name]


def test_losses_are_the_same_over_the_switch():
    torch.manual_seed(0)
    model, session = Model(), LocalSession(time_of=functools.partial(time_of, slow_stage=0))
    step = ProgramFunction(make_step(placed_model(session, "abab", model), 8), None, lambda: session)
    losses = losses_of(step, BEFORE + 4)
    torch.testing.assert_close(losses, losses_of(make_step(model, 8), BEFORE + 4), rtol=1e-4, atol=1e-6)
    assert step.report().loops[0].is_settled
    assert len(session.registered) == 1  # what it ran by before is forgotten


@pytest.mark.parametrize("num_lost", [1, 3])
def test_if_the_trace_lacks_actions_further_calls_are_measured_but_not_for_ever(num_lost, caplog):
    torch.manual_seed(0)
    session = LocalSession(time_of=time_of)
    step = ProgramFunction(make_step(placed_model(session, "ab", Model()), 4), None, lambda: session)
    losses_of(step, WARM_UP_CALLS)
    with caplog.at_level("WARNING", "torchways"):
        for _ in range(num_lost):
            losses_of(step, MEASURED_CALLS)
            del session._spans[-5:]
        assert not step.report().loops[0].is_settled
        losses_of(step, 2 * MEASURED_CALLS)
    [loop] = step.report().loops
    assert loop.is_settled
    assert bool(loop.tried) is (num_lost == 1)
    assert ("the trace lacks actions of its microbatches" in caplog.text) is (num_lost == 3)


def test_two_loops_and_an_uneven_last_microbatch():
    torch.manual_seed(0)
    model, session = Model(), LocalSession(time_of=time_of)

    def make(model):
        opt = torch.optim.SGD(model.parameters(), lr=0.1)

        def forward_backward(x):
            loss = model(x).square().mean()
            loss.backward()
            return loss

        def step(x, y):
            losses = tw.microbatch(forward_backward, x, n_microbatches=4, schedule="auto")
            more = tw.microbatch(forward_backward, y, n_microbatches=3, schedule="auto")
            opt.step()
            opt.zero_grad()
            with torch.no_grad():
                return losses, more, tw.microbatch(model, x, n_microbatches=4, schedule="auto")

        return step

    step = ProgramFunction(make(placed_model(session, "ab", model)), None, lambda: session)
    expected = make(model)
    for turn in range(BEFORE + 3):
        torch.manual_seed(turn)
        x, y = torch.randint(0, 17, (7, 5)), torch.randint(0, 17, (6, 5))
        torch.testing.assert_close([value.cpu() for value in step(x, y)], list(expected(x, y)), rtol=1e-4, atol=1e-5)
    report = step.report()
    assert [loop.num_microbatches for loop in report.loops] == [4, 3, 4]
    assert all(loop.is_settled and loop.tried for loop in report.loops)
    assert not report.loops[2].schedule.has_backward
    assert all(stage.backward_us is None and not stage.held_bytes for stage in report.loops[2].stages)


def test_a_loop_that_is_dispatched_on_its_own():
    torch.manual_seed(0)
    model, session = Model(), LocalSession(time_of=time_of)
    step = ProgramFunction(
        make_step(placed_model(session, "ab", model), 4), None, lambda: session, dispatch="sequential"
    )
    losses = losses_of(step, BEFORE + 2)
    [loop] = step.report().loops
    assert loop.is_settled
    assert [stage.forward_us for stage in loop.stages] == pytest.approx([100, 300], rel=0.01)
    torch.testing.assert_close(losses, losses_of(make_step(model, 4), BEFORE + 2), rtol=1e-4, atol=1e-6)


def test_a_new_trace_is_compared_with_one_by_the_same_schedule(monkeypatch):
    monkeypatch.setenv("TORCHWAYS_CHECK_TRACES", "1")
    torch.manual_seed(0)
    session = LocalSession(time_of=time_of)
    step = ProgramFunction(make_step(placed_model(session, "aab", Model()), 4), None, lambda: session)
    losses_of(step, BEFORE + 2)
    assert step.report().loops[0].is_settled


def test_without_a_pipeline_microbatches_run_one_after_the_other():
    torch.manual_seed(0)
    model, session = Model(), LocalSession()
    ours = make_function(copy.deepcopy(model), session.mesh(), lambda: session)
    step = ProgramFunction(make_step(ours, 4), None, lambda: session)
    torch.testing.assert_close(
        losses_of(step, BEFORE + 2), losses_of(make_step(model, 4), BEFORE + 2), rtol=1e-4, atol=1e-6
    )
    [loop] = step.report().loops
    assert (loop.schedule_name, loop.schedule, loop.is_automatic) == ("one after the other", None, False)
    assert "schedule one after the other" in str(step.report())


# ---- memory


def peak_of(program):
    """Returns the bytes that each slice has at its peak, by the check before a run."""
    lowered = program._last.lowered
    return [peak_memory(unrolled(part), lowered.program.slices[part.slice_index]).nbytes for part in lowered.parts]


def test_memory_limits_are_kept_before_and_after_the_search():
    torch.manual_seed(0)
    model, batch, count = Model(), 16, 8

    def run(budget, schedule="auto", num_calls=1):
        session = LocalSession(budget_bytes=budget, time_of=time_of)
        step = ProgramFunction(make_step(placed_model(session, "ab", model), count, schedule), None, lambda: session)
        losses = losses_of(step, num_calls, batch)
        return step, losses

    most = max(peak_of(run(0, "GPipe")[0]))
    least = max(peak_of(run(0, "1F1B")[0]))
    assert least < most
    free, _ = run(0, num_calls=BEFORE + 1)
    assert max(peak_of(free)) > least
    budget = (least + max(peak_of(free))) // 2
    with pytest.raises(ResourceExhausted, match=f"a device's budget is {budget:,}"):
        run(budget, "GPipe")
    assert max(peak_of(run(budget)[0])) <= budget
    tight, losses = run(budget, num_calls=BEFORE + 2)
    assert max(peak_of(tight)) <= budget
    [loop] = tight.report().loops
    assert loop.is_settled
    assert loop.predicted_us == pytest.approx(dry_run(loop.schedule, costs_of(loop)).makespan)
    assert sum(stage.held_bytes for stage in loop.stages) < sum(
        stage.held_bytes for stage in free.report().loops[0].stages
    )
    torch.testing.assert_close(losses, losses_of(make_step(model, count), BEFORE + 2, batch), rtol=1e-4, atol=1e-6)
    with pytest.raises(ResourceExhausted):
        run(least // 4)


def costs_of(loop):
    seconds = {}
    for stage in loop.stages:
        seconds[stage.stage_index, Kind.FORWARD] = stage.forward_us
        seconds[stage.stage_index, Kind.BACKWARD] = stage.backward_us
        if stage.input_us is not None:
            seconds[stage.stage_index, Kind.INPUT] = stage.input_us
            seconds[stage.stage_index, Kind.WEIGHT] = stage.weight_us
    return Costs(seconds=seconds, transfer=loop.transfer_us)


# ---- report


def test_the_report_has_what_was_measured_and_what_is_held():
    torch.manual_seed(0)
    session = LocalSession(time_of=time_of)
    step = ProgramFunction(make_step(placed_model(session, "ab", Model()), 4, "1F1B"), None, lambda: session)
    with pytest.raises(UserError, match=r"step: not traced yet; call it once before report\(\)"):
        step.report()
    losses_of(step, 2)
    report = step.report()
    [loop] = report.loops
    assert (loop.schedule_name, loop.num_microbatches, loop.num_slices, loop.num_calls) == ("1F1B", 4, 2, 2)
    assert "test_auto_schedule.py" in loop.source
    assert sorted(stage.slice_index for stage in loop.stages) == [0, 1]
    assert [stage.forward_us for stage in loop.stages] == pytest.approx([100, 300], rel=0.01)
    assert [stage.backward_us for stage in loop.stages] == pytest.approx([190, 570], rel=0.01)
    assert [stage.input_us for stage in loop.stages] == [None, None]
    assert [stage.held_microbatches for stage in loop.stages] == [2, 1]
    # Of each stage, what autograd saved of 2 x 5 tokens of width 8, at the least its input.
    assert all(stage.held_bytes >= stage.held_microbatches * 2 * 5 * 8 * 4 for stage in loop.stages)
    assert loop.theoretical_bubble == pytest.approx(1 / 5)
    assert 0 < loop.predicted_bubble < 1
    assert loop.predicted_us == pytest.approx(dry_run(loop.schedule, costs_of(loop)).makespan)
    assert loop.measured_us > 0
    assert not loop.tried
    text = str(report)
    assert "\n4 microbatches at " in text
    assert "schedule 1F1B" in text
    assert "0.10 ms" in text
