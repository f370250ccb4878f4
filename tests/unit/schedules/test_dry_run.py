"""The dry run: the bubbles of theory, deadlocks before anything runs, held activations; and the automatic schedule."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchways.errors import ConfigError
from torchways.schedules import SCHEDULES, Costs, Kind, Schedule, dry_run, find_schedule, make_schedule


@pytest.mark.parametrize("name", ["GPipe", "1F1B"])
@pytest.mark.parametrize(("stages", "count"), [(2, 8), (4, 16), (8, 8)])
def test_the_bubble_is_that_of_theory(name, stages, count):
    timeline = dry_run(make_schedule(name, stages, stages, count))
    assert timeline.bubble == pytest.approx((stages - 1) / (count + stages - 1))
    assert timeline.makespan == 3 * (count + stages - 1)


def test_held_activations():
    assert dry_run(make_schedule("GPipe", 4, 4, 16)).held == (16, 16, 16, 16)
    assert dry_run(make_schedule("1F1B", 4, 4, 16)).held == (4, 3, 2, 1)


def test_interleaving_shortens_the_bubble_and_zero_bubble_ends_most_of_it():
    halves = Costs(seconds={(stage, kind): 0.5 for stage in range(8) for kind in Kind if kind is not Kind.BACKWARD})
    whole = dry_run(make_schedule("1F1B", 4, 4, 16))
    turns = dry_run(make_schedule("Interleaved1F1B", 8, 4, 16), halves)
    zero = dry_run(make_schedule("ZBVZeroBubble", 8, 4, 16), halves)
    assert turns.bubble == pytest.approx(3 / (2 * 16 + 3))
    assert zero.bubble < 0.06 < turns.bubble < whole.bubble


def test_transfers_take_time():
    assert dry_run(make_schedule("GPipe", 2, 2, 1), Costs(seconds={}, transfer=0.5)).makespan == 7


def test_a_deadlock_is_found_with_what_each_slice_waits_for():
    schedule = Schedule.from_csv("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", "mine")
    with pytest.raises(ConfigError) as raised:
        dry_run(schedule)
    assert str(raised.value) == (
        "schedule mine deadlocks:\n"
        "  slice 0 is at 0B0, which needs 1I0\n"
        "  slice 1 is at 1F1, which needs 0F1\n"
        "as far as it comes:\n"
        "slice 0  0F0 0B0\n"
        "slice 1  1F0 1F1"
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0F0,0I0\n", "has 0W0 0 times"),
        ("0F0,0B0,0W0\n", "has 0W0 2 times"),
        ("0F0,0B0,1F0\n1B0\n", r"stage 1 on slices \[0, 1\]"),
        ("0F0,0B0,2F0,2B0\n", "has 1F0 0 times"),
    ],
)
def test_incomplete_schedules_are_refused(text, why):
    with pytest.raises(ConfigError, match=why):
        dry_run(Schedule.from_csv(text))


@st.composite
def pipelines(draw):
    num_slices = draw(st.integers(1, 4))
    turns = draw(st.integers(1, 3))
    around = list(range(num_slices))
    is_v = draw(st.booleans())
    homes = [home for turn in range(turns) for home in (around[::-1] if is_v and turn % 2 else around)]
    times = st.floats(0.1, 3.0)
    kinds = (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT)
    seconds = {(stage, kind): draw(times) for stage in range(len(homes)) for kind in kinds}
    costs = Costs(seconds=seconds, transfer=draw(st.sampled_from([0.0, 0.2])))
    limits = [draw(st.integers(homes.count(index), 3 * homes.count(index) + 2)) for index in around]
    return homes, draw(st.integers(1, 9)), costs, draw(st.sampled_from([None, limits]))


@settings(deadline=None, max_examples=200)
@given(pipelines())
def test_the_automatic_schedule_fits_and_no_named_one_that_fits_is_shorter(pipeline):
    homes, count, costs, limits = pipeline
    found = find_schedule(homes, count, costs, limits)
    assert [found.schedule.slice_of_stage[stage] for stage in range(len(homes))] == homes
    assert found.schedule.num_microbatches == count
    timeline = dry_run(found.schedule, costs)
    assert timeline == found.timeline
    assert timeline.makespan == pytest.approx(min(found.tried.values()))
    if limits is not None:
        assert all(held <= limit for held, limit in zip(timeline.held, limits, strict=True))
    else:
        assert any(name in SCHEDULES for name in found.tried) or len(set(homes)) < len(homes)


def test_where_stages_differ_and_transfers_take_time_the_automatic_schedule_is_the_shortest():
    per_kind = {Kind.FORWARD: 1.0, Kind.INPUT: 1.2, Kind.WEIGHT: 0.8}
    seconds = {(stage, kind): cost * (1 + (stage == 1)) for stage in range(4) for kind, cost in per_kind.items()}
    found = find_schedule(range(4), 12, Costs(seconds=seconds, transfer=0.5), [6] * 4)
    named = {name: makespan for name, makespan in found.tried.items() if name in SCHEDULES}
    assert set(named) == {"1F1B", "InterleavedZeroBubble"}
    assert found.timeline.makespan < 0.97 * min(named.values())


def test_too_little_memory_for_any_schedule():
    with pytest.raises(ConfigError, match="slice 0 has 2 stages and memory for the activations of 1 microbatches"):
        find_schedule([0, 1, 0, 1], 4, Costs(seconds={}), [1, 2])
