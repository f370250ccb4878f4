"""Each pass, by the program's text before and after."""

import pytest

from torchways.errors import ConfigError, InternalError
from torchways.ir.program import Arg, Compute, Function, Program, Result, SliceSpec, Value, verify
from torchways.passes.donate import donate
from torchways.passes.insert_transfers import insert_transfers
from torchways.passes.lower import lower
from torchways.passes.split import ComputeStep, FreeStep, ReceiveStep, SendStep, split


def value(slice_index, *shape):
    return Value(dtype="float32", shape=shape, slice_index=slice_index, placements=("R",))


def function(name):
    return Function(name=name, source="train.py:3 in step", graph=b"", num_operators=1)


def two_stages(devices=2):
    """w@0, x@0, v@1: y = f(w, x) @0; z, v' = g(v, y) @1; w' = h(w, z) @0."""
    spec = SliceSpec(shape=(devices,), axis_names=("dp",))
    return Program(
        name="step",
        slices=(spec, spec),
        values=(value(0, 4), value(0, 4), value(1, 4), value(0, 4), value(1, 4), value(1, 4), value(0, 4)),
        functions=(function("f"), function("g"), function("h")),
        nodes=(
            Arg(output=0, label="state w", replaced=True),
            Arg(output=1, label="host x"),
            Arg(output=2, label="state v", replaced=True),
            Compute(function_index=0, inputs=(0, 1), outputs=(3,)),
            Compute(function_index=1, inputs=(2, 3), outputs=(4, 5)),
            Compute(function_index=2, inputs=(0, 4), outputs=(6,)),
            Result(inputs=(6, 5)),
        ),
    )


def body(program):
    return [line.strip() for line in str(program).splitlines() if " = " in line and " arg " not in line]


def test_transfers_stand_behind_what_makes_their_value():
    assert body(insert_transfers(two_stages())) == [
        "%3: float32[4][R] @0 = compute @0 f(%0, %1)",
        "%7: float32[4][R] @1 = transfer @0 -> @1 %3",
        "%4: float32[4][R] @1, %5: float32[4][R] @1 = compute @1 g(%2, %7)",
        "%8: float32[4][R] @0 = transfer @1 -> @0 %4",
        "%6: float32[4][R] @0 = compute @0 h(%0, %8)",
    ]


def test_only_the_last_reader_donates():
    assert body(donate(insert_transfers(two_stages()))) == [
        "%3: float32[4][R] @0 = compute @0 f(%0, %1)",
        "%7: float32[4][R] @1 = transfer @0 -> @1 %3",
        "%4: float32[4][R] @1, %5: float32[4][R] @1 = compute @1 g(donate %2, %7)",
        "%8: float32[4][R] @0 = transfer @1 -> @0 %4",
        "%6: float32[4][R] @0 = compute @0 h(donate %0, %8)",
    ]


def test_split_pairs_the_ends_of_transfers_and_frees():
    first, second = split(donate(insert_transfers(two_stages())))
    assert [type(step) for step in first.steps] == [ComputeStep, SendStep, FreeStep, ReceiveStep, ComputeStep, FreeStep]
    assert [type(step) for step in second.steps] == [ReceiveStep, ComputeStep, FreeStep, SendStep, FreeStep]
    assert first.steps[1] == SendStep(slot=2, edge_id=0, peer=1)
    assert second.steps[0] == ReceiveStep(slot=1, edge_id=0, peer=0)
    assert first.steps[-2].donated == (0,)
    assert (first.results, second.results) == ([(4, 0)], [(3, 1)])
    assert first.args == [0, 1]


def test_the_text_and_the_parts_do_not_grow_with_devices():
    small, large = two_stages(2), two_stages(2048)
    assert str(small).replace("'dp'=2", "'dp'=2048") == str(large)
    assert lower(small).parts == lower(large).parts


def test_print_after(capsys):
    lower(two_stages(), print_after="insert_transfers")
    printed = capsys.readouterr().out
    assert printed.index("--- before insert_transfers") < printed.index("--- after insert_transfers")
    assert printed.count("transfer @0 -> @1") == 1
    with pytest.raises(ConfigError, match=r"no pass is called 'place'; the passes are verify"):
        lower(two_stages(), print_after="place")


def test_verify_refuses_what_cannot_run():
    program = two_stages()
    nodes = program.nodes
    for broken, text in (
        ((*nodes[:3], nodes[4], nodes[3], *nodes[5:]), "%3 is read by node 3 before it is made"),
        ((*nodes[:4], *nodes[3:]), "%3 is made twice"),
        (nodes[:-1], "Result must be the last node"),
    ):
        with pytest.raises(InternalError, match=text):
            verify(Program(**{**{f: getattr(program, f) for f in Program.__slots__}, "nodes": broken}))
