"""Each pass, by the program's text before and after."""

from dataclasses import replace

import pytest

from torchways.errors import ConfigError, InternalError, PlacementError, ResourceExhausted
from torchways.ir.part import ComputeInstruction, ReceiveInstruction, SendInstruction, freed_slots
from torchways.ir.program import (
    UNPLACED,
    Arg,
    Compute,
    Function,
    MadeValue,
    Program,
    Result,
    SliceSpec,
    TracedInput,
    Transfer,
    Value,
    node_inputs,
    verify,
)
from torchways.passes.donate import donate
from torchways.passes.insert_transfers import insert_transfers
from torchways.passes.lower import lower
from torchways.passes.place import place
from torchways.passes.preflight import check_memory, check_order, peak_memory
from torchways.passes.sequential import FinalResult, sequential
from torchways.passes.split import edges_of, slice_args, split


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
            Arg(output=0, label="state w", source=TracedInput(0), replaced=True),
            Arg(output=1, label="host x", source=TracedInput(1)),
            Arg(output=2, label="state v", source=TracedInput(2), replaced=True),
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
        "%3: fp32[4][R] @0 = compute @0 f(%0, %1)",
        "%7: fp32[4][R] @1 = transfer @0 -> @1 %3",
        "%4: fp32[4][R] @1, %5: fp32[4][R] @1 = compute @1 g(%2, %7)",
        "%8: fp32[4][R] @0 = transfer @1 -> @0 %4",
        "%6: fp32[4][R] @0 = compute @0 h(%0, %8)",
    ]


def test_only_the_last_reader_donates():
    assert body(donate(insert_transfers(two_stages()))) == [
        "%3: fp32[4][R] @0 = compute @0 f(%0, %1)",
        "%7: fp32[4][R] @1 = transfer @0 -> @1 %3",
        "%4: fp32[4][R] @1, %5: fp32[4][R] @1 = compute @1 g(donate %2, %7)",
        "%8: fp32[4][R] @0 = transfer @1 -> @0 %4",
        "%6: fp32[4][R] @0 = compute @0 h(donate %0, %8)",
    ]


def test_split_pairs_the_ends_of_transfers():
    program = donate(insert_transfers(two_stages()))
    first, second = split(program)
    assert first.instructions == (
        ComputeInstruction(function_index=0, inputs=(0, 1), outputs=(2,)),
        SendInstruction(slot=2, edge_id=0, peer=1),
        ReceiveInstruction(slot=3, edge_id=1, peer=1),
        ComputeInstruction(function_index=1, inputs=(0, 3), outputs=(4,), donated=(0,)),
    )
    assert second.instructions == (
        ReceiveInstruction(slot=1, edge_id=0, peer=0),
        ComputeInstruction(function_index=0, inputs=(0, 1), outputs=(2, 3), donated=(0,)),
        SendInstruction(slot=2, edge_id=1, peer=0),
    )
    assert [function.name for function in (*first.functions, *second.functions)] == ["f", "h", "g"]
    assert (first.results, second.results) == (((4, 0),), ((3, 1),))
    assert (first.num_args, second.num_args) == (2, 1)
    assert slice_args(program) == [[0, 1], [2]]


def test_each_transfer_knows_its_edge_in_the_parts():
    program = insert_transfers(two_stages())
    assert [(edges.node, list(edges.edge_ids)) for edges in edges_of(program)] == [
        (Transfer(input=3, output=7), [0]),
        (Transfer(input=4, output=8), [1]),
    ]


def test_what_nothing_reads_any_more_is_freed():
    first, second = split(donate(insert_transfers(two_stages())))
    assert freed_slots(first) == [(), (2,), (), (3,)]  # w, slot 0, is donated; x, slot 1, is an argument
    assert freed_slots(second) == [(), (1,), (2,)]


def test_the_text_and_the_parts_do_not_grow_with_devices():
    small, large = two_stages(2), two_stages(2048)
    assert str(small).replace("'dp'=2", "'dp'=2048") == str(large)
    assert lower(small).parts == lower(large).parts


def test_print_after(capsys):
    lower(two_stages(), print_after="insert_transfers")
    printed = capsys.readouterr().out
    assert printed.index("--- before insert_transfers") < printed.index("--- after insert_transfers")
    assert printed.count("transfer @0 -> @1") == 1
    lower(two_stages(), print_after="split")
    assert "send $2 to @1 over edge 0" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"no pass is called 'fuse'; the passes are verify, place"):
        lower(two_stages(), print_after="fuse")


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


def one_host_argument(rows=4):
    """x unplaced: y = f(x) @0; z = g(x) @1, on two slices of 2 and 4 devices."""
    return Program(
        name="step",
        slices=(SliceSpec(shape=(2,), axis_names=("dp",)), SliceSpec(shape=(2, 2), axis_names=("dp", "tp"))),
        values=(
            Value(dtype="float32", shape=(rows, 3), slice_index=UNPLACED, placements=()),
            Value(dtype="float32", shape=(), slice_index=UNPLACED, placements=()),
            value(0, 4),
            replace(value(1, 4), placements=("R", "R")),
        ),
        functions=(function("f"), function("g")),
        nodes=(
            Arg(output=0, label="host 0", source=TracedInput(0), is_data=True),
            Arg(output=1, label="learning rate", source=TracedInput(1)),
            Compute(function_index=0, inputs=(0, 1), outputs=(2,)),
            Compute(function_index=1, inputs=(0,), outputs=(3,)),
            Result(inputs=(2, 3)),
        ),
    )


def test_place_gives_every_reading_slice_an_argument_of_its_own():
    placed = place(one_host_argument())
    args = [line.strip() for line in str(placed).splitlines() if " arg " in line]
    assert args == [
        "%4: fp32[4,3][S(0)] @0 = arg host 0",
        "%6: fp32[4,3][S(0)] @1 = arg host 0",
        "%5: fp32[][R] @0 = arg learning rate",
    ]
    assert [node.position for node in placed.nodes if isinstance(node, Arg)] == [0, 0, 1]
    assert body(placed)[0] == "%2: fp32[4][R] @0 = compute @0 f(%4, %5)"
    with pytest.raises(PlacementError, match=r"axis 'dp' has size 2 but dimension 0 has 5 \(host 0 of step\)"):
        place(one_host_argument(rows=5))


def test_sequential_pieces_are_programs_of_one_computation():
    pieces = sequential(two_stages())
    texts = [body(insert_transfers(piece.program)) for piece in pieces]
    assert texts == [
        ["%3: fp32[4][R] @0 = compute @0 f(%0, %1)"],
        [
            "%7: fp32[4][R] @1 = transfer @0 -> @1 %3",
            "%4: fp32[4][R] @1, %5: fp32[4][R] @1 = compute @1 g(%2, %7)",
        ],
        ["%7: fp32[4][R] @0 = transfer @1 -> @0 %4", "%6: fp32[4][R] @0 = compute @0 h(%0, %7)"],
    ]
    assert [piece.results for piece in pieces] == [
        (MadeValue(3),),
        (MadeValue(4), FinalResult(1)),
        (FinalResult(0),),
    ]
    # w is read by f and replaced by h: only the last of them may donate it.
    donated = [[node.donated for node in donate(piece.program).nodes if isinstance(node, Compute)] for piece in pieces]
    assert donated == [[()], [(0, 1)], [(0, 1)]]
    for piece in pieces:
        lower(piece.program)


def test_sequential_keeps_arguments_that_are_results():
    program = replace(two_stages(), nodes=(Arg(output=0, label="w", source=TracedInput(0)), Result(inputs=(0, 0))))
    [piece] = sequential(program)
    assert (piece.results, node_inputs(piece.program.nodes[-1])) == (
        (FinalResult(0), FinalResult(1)),
        (0, 0),
    )


def test_a_program_that_waits_for_itself_is_refused():
    first, second = lower(two_stages()).parts
    check_order((first, second))
    compute, send, receive, last = first.instructions
    crossed = replace(first, instructions=(receive, compute, send, last))
    with pytest.raises(InternalError, match=r"slice 0 at instruction 0: Receive.*slice 1 at instruction 0: Receive"):
        check_order((crossed, second))
    silent = replace(second, instructions=second.instructions[1:2])
    with pytest.raises(InternalError, match="edge 0 to slice 1 is never received"):
        check_order((replace(first, instructions=(compute, send)), silent))


def test_peak_memory_follows_the_schedule():
    parts = lower(two_stages()).parts
    spec = SliceSpec(shape=(2,), axis_names=("dp",))
    # Slice 0: w, x, y (sent and freed), then z received; w' takes w's memory.
    first, second = (peak_memory(part, spec) for part in parts)
    assert (first.nbytes, first.function) == (3 * 16, "f")
    # Slice 1: v, y, z; v' takes v's memory.
    assert (second.nbytes, second.function) == (3 * 16, "g")


def test_a_program_that_cannot_fit_is_refused_with_the_smallest_fix():
    program = two_stages()
    big = Value(dtype="float32", shape=(1024, 10), slice_index=0, placements=("R",))
    program = replace(program, values=(big, *program.values[1:6], big))
    parts = lower(program).parts
    check_memory("step", parts, program.slices, {0: 50_000, 1: 50_000})
    with pytest.raises(ResourceExhausted) as caught:
        check_memory("step", parts, program.slices, {0: 30_000})
    assert "step needs 40,992 bytes on each device of slice ('dp'=2) at step" not in str(caught.value)
    assert "step needs 40,992 bytes on each device of slice ('dp'=2) at f (train.py:3 in step)" in str(caught.value)
    assert "budget is 30,000; the largest value is fp32[1024,10][R] with 40,960 bytes" in str(caught.value)
    assert "shard it, Shard(0) on axis 'dp' would do" in str(caught.value)
    with pytest.raises(ResourceExhausted, match="a slice of 9 devices, all of it sharded, would do"):
        check_memory("step", parts, program.slices, {0: 10_000})
