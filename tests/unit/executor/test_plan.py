"""Units: what is grouped, what they share, and what they allocate."""

import pytest

from torchways.executor.plan import load_program
from torchways.ids import PartId, ProgramId, SliceId
from torchways.ir.part import AllReduceInstruction, ComputeInstruction, ReceiveInstruction, SendInstruction

PART = PartId(ProgramId(1), SliceId(1))


def compute(inputs, outputs, donated=()):
    return ComputeInstruction(function_index=0, inputs=inputs, outputs=outputs, donated=donated)


def test_a_chain_is_one_unit_that_shares_only_its_ends():
    chain = [compute((i,), (i + 1,), (0,) if i == 0 else ()) for i in range(5)]
    [unit] = load_program(PART, "chain", 1, [8] * 6, chain, [(5, 0)]).units
    assert (unit.reads, unit.writes, unit.donated) == ((0,), (5,), (0,))
    assert unit.need_bytes == 16  # a value and the one before it; the argument exists already


def test_what_is_sent_does_not_wait_for_what_follows():
    items = [compute((0,), (1,)), SendInstruction(slot=1, edge_id=0, peer=1), compute((1,), (2,))]
    units = load_program(PART, "sends", 1, [8] * 3, items, [(2, 0)]).units
    assert [unit.position for unit in units] == [0, 1, 2]
    assert units[0].writes == (1,)


def test_what_waits_for_a_transfer_does_not_delay_what_does_not():
    items = [
        ReceiveInstruction(slot=1, edge_id=0, peer=1),
        compute((0,), (2,)),
        compute((2,), (3,)),
        compute((1, 3), (4,)),
        compute((4,), (5,)),
    ]
    units = load_program(PART, "mixed", 1, [8] * 6, items, [(5, 0)]).units
    assert [len(unit.instructions) for unit in units] == [1, 2, 2]
    assert units[2].reads == (1, 3)


def test_a_reduction_stands_between_computations():
    items = [
        compute((0,), (1,)),
        AllReduceInstruction(input=1, output=2, edge_id=0, members=(0, 1)),
        compute((2,), (3,)),
    ]
    program = load_program(PART, "sum", 1, [8] * 4, items, [(3, 0)])
    assert [unit.reads for unit in program.units] == [(0,), (1,), (2,)]
    assert program.read_counts == ((0, 1), (1, 1), (2, 1))


def test_a_plan_whose_waits_cannot_be_noted_is_refused(monkeypatch):
    monkeypatch.setattr("torchways.executor.plan._MAX_WAIT_BITS", 1000)
    parts = []
    for turn in range(100):
        parts.append(ReceiveInstruction(slot=2 * turn, edge_id=turn, peer=1))
        before = (2 * turn - 1,) if turn else ()
        parts.append(compute((2 * turn, *before), (2 * turn + 1,)))
    with pytest.raises(ValueError, match="too many transfers"):
        load_program(PART, "loop", 0, [1] * 200, parts, [(199, 0)])
    assert len(load_program(PART, "loop", 0, [1] * 20, parts[:20], [(19, 0)]).units) == 20


def test_memory_counts_values_that_live_at_the_same_time():
    items = [compute((0,), (1,)), compute((0,), (2,)), compute((1, 2), (3,))]
    [unit] = load_program(PART, "join", 1, [8, 100, 10, 1], items, [(3, 0)]).units
    assert unit.need_bytes == 111
