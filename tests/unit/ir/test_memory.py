"""What a sequence of steps holds at a time."""

from torchways.ir.memory import InstructionStep, footprints, peak_bytes
from torchways.ir.part import ComputeInstruction, ReceiveInstruction, SendInstruction

#: A digit a slot: sums of sizes say which slots they are of.
SIZES = [1, 10, 100, 1000, 10_000]


def steps(*instructions):
    return [InstructionStep.of(instruction, SIZES) for instruction in instructions]


def compute(inputs, outputs, donated=()):
    return ComputeInstruction(function_index=0, inputs=inputs, outputs=outputs, donated=donated)


def held(instructions, **options):
    return [(nbytes, tuple(slots)) for nbytes, slots in footprints(steps(*instructions), SIZES, **options)]


def test_a_value_is_held_from_the_step_that_fills_it_to_its_last_reader():
    instructions = (
        compute((0,), (1,)),
        SendInstruction(slot=1, edge_id=0, peer=1),
        ReceiveInstruction(slot=2, edge_id=1, peer=1),
        compute((0, 2), (3,)),
        compute((3,), (4,)),
    )
    assert held(instructions, held=(0,), kept={0, 4}) == [
        (1, (0,)),
        (11, (0, 1)),
        (11, (0, 1)),
        (101, (0, 2)),
        (1101, (0, 2, 3)),
        (11_001, (0, 3, 4)),
    ]
    assert peak_bytes(steps(*instructions), SIZES, held=(0,), kept={0, 4}) == 11_001


def test_outputs_take_the_place_of_what_is_donated():
    instructions = (compute((0,), (1,), donated=(0,)), compute((1,), (2,), donated=(0,)))
    assert held(instructions, held=(0,), kept={0}) == [(1, (0,)), (10, (0, 1)), (100, (1, 2))]


def test_the_memory_of_others_is_not_counted():
    instructions = (compute((0,), (1,), donated=(0,)), compute((0, 1), (2,)))
    assert peak_bytes(steps(*instructions), SIZES, held=(), kept={2}) == 110


def test_an_output_that_nobody_reads_is_held_by_its_step_alone():
    assert held((compute((0,), (1,)), compute((0,), (2,))), held=(0,), kept={0, 2})[1:] == [
        (11, (0, 1)),
        (101, (0, 2)),
    ]
