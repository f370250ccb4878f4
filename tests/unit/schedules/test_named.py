"""Schedules with names: the lists of torch.distributed.pipelining, its CSV, and what every schedule must keep."""

import csv
import io
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as library

from torchways.errors import ConfigError
from torchways.schedules import SCHEDULES, Action, Kind, Schedule, compact, expanded, make_schedule

SIZES = [
    *((name, size, size, count) for name in ("GPipe", "1F1B") for size in (1, 2, 4, 8) for count in (8, 13, 32)),
    *((name, 2 * size, size, count) for name in ("ZBVZeroBubble",) for size in (1, 2, 4) for count in (1, 3, 8, 16)),
    *(("DualPipeV", 2 * size, size, count) for size in (1, 2, 4, 5) for count in (10, 16, 17)),
    *(
        (name, turns * size, size, count)
        for name in ("LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble")
        for size in (1, 2, 4)
        for turns in (1, 2, 3)
        for count in (2, 4, 8, 16)
        if count % max(1, count // size) == 0
    ),
]


class _Stage:
    """As much of a stage as the library's schedules need; it notes what it is asked to compute."""

    submod = None
    device = "cpu"
    has_backward = True

    def __init__(self, index, num_stages, rank, size):
        self.stage_index, self.num_stages, self.group_rank, self.group_size = index, num_stages, rank, size
        self.is_first, self.is_last = index == 0, False
        self.computed = []

    def forward_one_chunk(self, number, *_):
        self.computed.append(f"{self.stage_index}F{number}")

    def backward_one_chunk(self, number, **_):
        self.computed.append(f"{self.stage_index}B{number}")

    def no_messages(self, *_):
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_messages

    def scale_grads(self, grad_scale_factor):
        pass


def library_rows(name, num_stages, num_slices, num_microbatches):
    """The library's own actions, without its idle steps; an overlapped pair as two."""
    kind = library.get_schedule_class(name)
    rows = []
    if name in ("GPipe", "1F1B"):  # what they do: of 1F1B, the list that the library prints is wrong for the last stage
        for index in range(num_stages):
            stage = _Stage(index, num_stages, index, num_slices)
            made = kind(stage, n_microbatches=num_microbatches, loss_fn=lambda *_: None)
            made._stage_forward_initialized = made._stage_initialized = made._stages_initialized = True
            made._step_microbatches([()] * num_microbatches, [{}] * num_microbatches)
            rows.append(stage.computed)
        return rows
    stages = [_Stage(index, num_stages, 0, num_slices) for index in range(0, num_stages, num_slices)]
    order = kind(stages, n_microbatches=num_microbatches, loss_fn=lambda *_: None).pipeline_order
    for rank in range(num_slices):
        actions = [action for action in order[rank] if action is not None]
        rows.append([str(part) for action in actions for part in action.sub_actions or (action,)])
    return rows


@pytest.mark.parametrize(("name", "num_stages", "num_slices", "num_microbatches"), SIZES)
def test_the_librarys_own_actions(name, num_stages, num_slices, num_microbatches):
    ours = make_schedule(name, num_stages, num_slices, num_microbatches)
    assert [[str(action) for action in row] for row in ours.rows] == library_rows(
        name, num_stages, num_slices, num_microbatches
    )


@pytest.mark.parametrize(("name", "num_stages", "num_slices", "num_microbatches"), SIZES)
def test_every_pass_of_every_microbatch_comes_once(name, num_stages, num_slices, num_microbatches):
    made = make_schedule(name, num_stages, num_slices, num_microbatches)
    counts = Counter((a.stage, kind, a.microbatch) for row in made.rows for a in row for kind in a.kind.parts)
    assert set(counts.values()) == {1}
    assert len(counts) == 3 * num_stages * num_microbatches
    assert (made.num_stages, made.num_microbatches) == (num_stages, num_microbatches)


@pytest.mark.parametrize(("name", "num_stages", "num_slices", "num_microbatches"), SIZES[::5])
def test_csv_both_ways_and_the_librarys(name, num_stages, num_slices, num_microbatches):
    made = make_schedule(name, num_stages, num_slices, num_microbatches)
    assert Schedule.from_csv(made.to_csv(), name) == made
    rows = [[library._Action.from_str(field) for field in row] for row in csv.reader(io.StringIO(made.to_csv()))]
    assert [list(map(str, row)) for row in rows] == [list(map(str, row)) for row in made.rows]


def test_csv_with_idle_steps_and_overlapped_passes():
    found = Schedule.from_csv("0F0,,0B0\n,1F0,(1F1;1B0)OVERLAP_F_B\n")
    assert [list(map(str, row)) for row in found.rows] == [["0F0", "0B0"], ["1F0", "1F1", "1B0"]]
    with pytest.raises(ConfigError, match="'0SEND_F1' is no action"):
        Schedule.from_csv("0F0,0SEND_F1\n")


def test_a_schedule_prints_as_a_grid():
    assert str(make_schedule("1F1B", 2, 2, 3)) == ("slice 0  0F0 0F1 0B0 0F2 0B1 0B2\nslice 1  1F0 1B0 1F1 1B1 1F2 1B2")


@pytest.mark.parametrize(
    ("name", "num_stages", "num_slices"),
    [(name, 8 if name in ("GPipe", "1F1B") else 16, 8) for name in SCHEDULES],
)
def test_rows_are_as_short_for_256_microbatches_as_for_64(name, num_stages, num_slices):
    short, long = (make_schedule(name, num_stages, num_slices, count) for count in (64, 256))
    for few, many in zip(short.rows, long.rows, strict=True):
        assert expanded(compact(many)) == list(many)
        assert sum(len(r.actions) for r in compact(many)) <= sum(len(r.actions) for r in compact(few))


@settings(deadline=None)
@given(st.lists(st.builds(Action, st.integers(0, 2), st.sampled_from(list(Kind)), st.integers(0, 4)), max_size=40))
def test_any_row_is_what_its_compact_form_expands_to(row):
    assert expanded(compact(row)) == row


def test_numbers_that_do_not_fit_are_refused():
    for arguments, why in {
        ("1F1B", 4, 2, 8): "one stage on each slice",
        ("LoopedBFS", 5, 2, 8): "make the number of stages a multiple",
        ("Interleaved1F1B", 8, 4, 10 + 3): "take 12 microbatches",
        ("ZBVZeroBubble", 6, 2, 8): "make 4 stages",
        ("DualPipeV", 4, 2, 3): "at least as many microbatches as stages, 4, not 3",
        ("gpype", 2, 2, 2): "there is no schedule 'gpype'; there are GPipe, 1F1B",
        ("GPipe", 2, 2, 0): "at least one stage, slice and microbatch, not 2, 2 and 0",
    }.items():
        with pytest.raises(ConfigError, match=why):
            make_schedule(*arguments)
    assert make_schedule("gpipe", 1, 1, 2) == make_schedule("GPipe", 1, 1, 2)


def test_what_a_schedule_knows_of_itself():
    made = Schedule("mine", ((Action(0, Kind.FORWARD, 0), Action(1, Kind.FORWARD, 0)), (Action(2, Kind.FORWARD, 0),)))
    assert made.slice_of_stage == {0: 0, 1: 0, 2: 1}
    assert SimpleNamespace(**{"stages": made.num_stages}).stages == 3
