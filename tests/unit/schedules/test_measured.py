"""Costs and timelines from runs that were measured, and how many activations fit into memory."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.schedules.test_dry_run import pipelines
from torchways.errors import ConfigError
from torchways.schedules import (
    SCHEDULES,
    Costs,
    Kind,
    Schedule,
    dry_run,
    find_schedule,
    find_schedules,
    held_limits,
    make_schedule,
)
from torchways.schedules.actions import Action
from torchways.schedules.dry_run import Span, held_by_stage
from torchways.schedules.measured import MeasuredRun, measured_costs, measured_timeline


def test_costs_are_medians_over_microbatches_and_runs_and_parts_of_an_action_add_up():
    forward, weight = Action(0, Kind.FORWARD, 0), Action(0, Kind.WEIGHT, 0)
    runs = [
        MeasuredRun((Span(forward, 0, 1), Span(forward, 5, 7), Span(weight, 7, 8)), (0.5,)),
        MeasuredRun((Span(forward, 10, 14), Span(weight, 20, 29)), (0.7, 0.1)),
        MeasuredRun((Span(forward, 10, 110), Span(weight, 110, 112))),
    ]
    costs = measured_costs(runs)
    assert costs.of(0, Kind.FORWARD) == 4
    assert costs.of(0, Kind.BACKWARD) == costs.of(0, Kind.WEIGHT) == 2  # no input gradients are computed
    assert costs.transfer == 0.5


def test_without_spans_there_are_no_costs():
    with pytest.raises(ConfigError, match="no action of a schedule was measured"):
        measured_costs([MeasuredRun(())])


@settings(deadline=None, max_examples=100)
@given(pipelines())
def test_a_run_that_goes_as_predicted_is_measured_as_predicted(pipeline):
    homes, count, costs, limits = pipeline
    found = find_schedule(homes, count, costs, limits)
    spans = tuple(
        Span(span.action, 7 + span.start, 7 + span.end) for row in found.timeline.rows for span in reversed(row)
    )
    run = MeasuredRun(spans, (costs.transfer,))
    timeline = measured_timeline(run, dict(enumerate(homes)), 1 + max(homes))
    assert timeline.makespan == pytest.approx(found.timeline.makespan)
    assert timeline.bubble == pytest.approx(found.timeline.bubble)
    assert timeline.held == found.timeline.held
    measured = measured_costs([run])
    assert dry_run(found.schedule, measured).makespan == pytest.approx(found.timeline.makespan)


@settings(deadline=None, max_examples=100)
@given(pipelines(), st.booleans())
def test_all_that_is_found_fits_and_the_best_is_no_longer_than_any_named_one_that_fits(pipeline, apart):
    homes, count, costs, limits = pipeline
    found = find_schedules(homes, count, costs, limits, apart=apart)
    makespans = [item.timeline.makespan for item in found]
    assert makespans == pytest.approx(sorted(makespans))
    assert len({item.schedule.rows for item in found}) == len(found)
    for item in found:
        timeline = dry_run(item.schedule, costs)
        assert limits is None or all(held <= limit for held, limit in zip(timeline.held, limits, strict=True))
        assert item.schedule.splits_backward or not apart
    for name in SCHEDULES:
        try:
            named = make_schedule(name, len(homes), 1 + max(homes), count)
        except ConfigError:
            continue
        timeline = dry_run(named, costs)
        fits = limits is None or all(held <= limit for held, limit in zip(timeline.held, limits, strict=True))
        is_there = [named.slice_of_stage[stage] for stage in range(len(homes))] == homes
        if fits and is_there and (named.splits_backward or not apart):
            assert makespans[0] <= timeline.makespan + 1e-6


def test_a_schedule_of_ones_own_competes_with_the_others():
    costs = Costs(seconds={})
    best = find_schedule([0, 1], 4, costs)
    mine = Schedule("mine", make_schedule("GPipe", 2, 2, 4).rows)
    same = Schedule("the same", best.schedule.rows)
    found = find_schedules([0, 1], 4, costs, also=[mine, same])
    assert "the same" not in found[0].tried
    slow = Costs(seconds={}, transfer=100.0)  # all forward passes first is best where transfers are slow
    assert find_schedules([0, 1], 4, slow, [4, 4], also=[mine])[0].timeline.makespan <= dry_run(mine, slow).makespan


def test_how_many_microbatches_memory_holds():
    assert held_limits([1000, None, 50, -10], [300, 300, 300, 300], 16) == [3, 16, 0, 0]
    assert held_limits([1000, 10_000], [0, 100], 16) == [16, 16]


def test_held_activations_of_each_stage():
    assert held_by_stage(make_schedule("1F1B", 4, 4, 16)) == (4, 3, 2, 1)
    schedule = make_schedule("ZBVZeroBubble", 4, 2, 8)
    by_stage = held_by_stage(schedule)
    assert all(
        held <= sum(by_stage[stage] for stage, home in schedule.slice_of_stage.items() if home == row)
        for row, held in enumerate(dry_run(schedule).held)
    )


def test_a_schedule_without_backward_passes_holds_nothing():
    timeline = dry_run(make_schedule("GPipe", 2, 2, 3).forward())
    assert timeline.makespan == 4
    assert timeline.held == (0, 0)
