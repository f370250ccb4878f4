"""Every pair of conversions is inverse: what is written and read back is what it was."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchways.errors import Failure, UserError
from torchways.ir.part import (
    AllReduceInstruction,
    BodyInstruction,
    ComputeInstruction,
    LoopBody,
    LoopInstruction,
    ReceiveInstruction,
    SendInstruction,
    SlicePart,
)
from torchways.ir.program import Function, Value
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.convert import failure_from_proto, failure_to_proto, part_from_proto, part_to_proto
from torchways.schedules import Action, Kind, Repeat

number = st.integers(0, 2**32 - 1)
numbers = st.lists(number, max_size=4).map(tuple)
instruction = st.one_of(
    st.builds(ComputeInstruction, function_index=number, inputs=numbers, outputs=numbers, donated=numbers),
    st.builds(SendInstruction, slot=number, edge_id=number, peer=number),
    st.builds(ReceiveInstruction, slot=number, edge_id=number, peer=number),
    st.builds(AllReduceInstruction, input=number, output=number, edge_id=number, members=numbers),
)
actions = st.builds(Action, number, st.sampled_from(list(Kind)), number)
repeats = st.builds(Repeat, st.lists(actions, max_size=3).map(tuple), st.integers(1, 9), st.integers(-9, 9))
pairs = st.lists(st.tuples(number, number), max_size=3).map(tuple)
body_instruction = st.builds(BodyInstruction, stage=number, kind=st.sampled_from(list(Kind)), instruction=instruction)
function = st.builds(Function, name=st.text(), source=st.text(), graph=st.binary(), num_operators=number)


@st.composite
def parts(draw):
    slice_index = draw(st.integers(0, 1000))
    value = st.builds(
        Value,
        dtype=st.sampled_from(["float32", "bool", "int64"]),
        shape=st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
        slice_index=st.just(slice_index),
        placements=st.lists(st.sampled_from(["R", "S(0)", "S(1)"]), max_size=3).map(tuple),
    )
    values = st.lists(value, max_size=4).map(tuple)
    body = st.builds(
        LoopBody,
        slots=values,
        inputs=numbers,
        number_slots=numbers,
        instructions=st.lists(body_instruction, max_size=3).map(tuple),
        carried=pairs,
        last=numbers,
    )
    loop = st.builds(
        LoopInstruction,
        bodies=st.lists(body, max_size=2).map(tuple),
        num_turns=number,
        order=st.lists(repeats, max_size=3).map(tuple),
        outputs=numbers,
        donated=numbers,
        edge_stride=number,
        number=st.none() | number,
        schedule=st.text(),
    )
    return SlicePart(
        slice_index=slice_index,
        functions=draw(st.lists(function, max_size=2).map(tuple)),
        slots=draw(values),
        num_args=draw(number),
        instructions=draw(st.lists(instruction | loop, max_size=4).map(tuple)),
        results=draw(st.lists(st.tuples(number, number), max_size=3).map(tuple)),
    )


@settings(deadline=None)
@given(parts())
def test_a_part_that_is_written_and_read_back_is_the_same(part):
    message = pb.Part.FromString(part_to_proto(part).SerializeToString())
    assert part_from_proto(message) == part


def test_an_instruction_of_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="an instruction has no known kind"):
        part_from_proto(pb.Part(instructions=[pb.Instruction()]))


@given(
    st.builds(
        Failure,
        kind=st.text(),
        message=st.text(),
        function=st.text(),
        source=st.text(),
        traceback=st.text(),
        run_id=st.integers(0, 2**64 - 1),
        process=st.text(),
    )
)
def test_a_failure_that_is_written_and_read_back_is_the_same(failure):
    assert failure_from_proto(failure_to_proto(failure)) == failure
