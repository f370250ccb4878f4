"""The pass that unrolls a loop, by the program's text after it."""

from tests.unit.passes.test_passes import body, function, value
from torchways.ir.part import ComputeInstruction, freed_slots
from torchways.ir.program import (
    UNPLACED,
    Arg,
    Compute,
    Program,
    Result,
    SliceSpec,
    TracedInput,
    Value,
    node_inputs,
    verify,
)
from torchways.passes.donate import donate
from torchways.passes.lower import lower
from torchways.passes.unroll import ScanLoop, unroll


def counter(*, replaced=False):
    """w@0, x: s', y = f(s, w, x); s is fed by s', each turn has an x of its own, and y is kept."""
    return Program(
        name="count",
        slices=(SliceSpec(shape=(2,), axis_names=("dp",)),),
        values=(
            value(0, 4),
            value(0, 4),
            Value(dtype="float32", shape=(4,), slice_index=UNPLACED, placements=()),
            Value(dtype="float32", shape=(4,), slice_index=0, placements=("S(0)",)),
            value(0, 4),
        ),
        functions=(function("f"),),
        nodes=(
            Arg(output=0, label="array s", source=TracedInput(0), replaced=replaced),
            Arg(output=1, label="state w", source=TracedInput(2)),
            Arg(output=2, label="host x", source=TracedInput(1), is_data=True),
            Compute(function_index=0, inputs=(0, 1, 2), outputs=(3, 4)),
            Result(inputs=(3, 4)),
        ),
    )


LOOP = ScanLoop(length=3, num_inputs=3, fed={0: 0}, own=frozenset({1}), kept=frozenset({1}))


def test_each_turn_reads_what_the_one_before_made_and_what_is_its_own():
    program = verify(unroll(counter(), LOOP))
    assert [node.label for node in program.nodes if isinstance(node, Arg)] == [
        "array s",
        "state w",
        "host x",
        "host x of turn 1",
        "host x of turn 2",
    ]
    assert [node.position for node in program.nodes if isinstance(node, Arg)] == [0, 2, 1, 1 + 3, 1 + 2 * 3]
    first, second, third = [node for node in program.nodes if isinstance(node, Compute)]
    assert {node.function_index for node in (first, second, third)} == {0}
    assert (second.inputs[0], third.inputs[0]) == (first.outputs[0], second.outputs[0])
    assert len({first.inputs[2], second.inputs[2], third.inputs[2]}) == 3
    assert {first.inputs[1], second.inputs[1], third.inputs[1]} == {1}
    results = node_inputs(program.nodes[-1])
    assert results == (first.outputs[1], second.outputs[1], third.outputs[0], third.outputs[1])
    assert LOOP.results(2) == [(0, 1), (1, 1), (2, 0), (2, 1)]


def test_what_is_fed_back_is_split_as_the_argument_and_donated():
    [first, *others] = [
        node for node in lower(unroll(counter(replaced=True), LOOP)).program.nodes if isinstance(node, Compute)
    ]
    assert [node.donated for node in (first, *others)] == [(0,), (0,), (0,)]
    program = unroll(counter(), LOOP)
    assert all(program.values[index].placements == ("R",) for index in node_inputs(program.nodes[-1]))
    first, *others = [node for node in donate(program).nodes if isinstance(node, Compute)]
    assert first.donated == ()  # its buffer is the user's
    assert [node.donated for node in others] == [(0,), (0,)]
    [part] = lower(program).parts
    assert [type(instruction) for instruction in part.instructions] == [ComputeInstruction] * 3
    assert freed_slots(part) == [(), (), ()]  # what is donated is not freed as well


def test_what_each_turn_keeps_no_turn_donates():
    """All turns are then the same call, also the first, whose argument could be donated."""
    program = unroll(
        counter(replaced=True), ScanLoop(length=2, num_inputs=3, fed={0: 0}, own=frozenset(), kept=frozenset({0}))
    )
    assert "donate" not in "\n".join(body(donate(program)))


def test_a_loop_of_one_turn_is_its_body():
    once = ScanLoop(length=1, num_inputs=3, fed={0: 0}, own=frozenset({1}), kept=frozenset({1}))
    program = unroll(counter(), once)
    assert len(program.nodes) == 5
    assert node_inputs(program.nodes[-1]) == (3, 4)
