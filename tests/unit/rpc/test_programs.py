"""Messages about programs: a run's arguments."""

from torchways.ids import BufferId
from torchways.ir.part import NO_BUFFER, Arguments
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.programs import InlineValue, arguments_from_bytes, arguments_to_bytes, host_value


def test_arguments_that_are_written_and_read_back_are_the_same():
    values = [
        InlineValue(dtype="float32", shape=(2,), placements=("S(0)",), data=bytes(8)),
        InlineValue(dtype="int64", shape=(), placements=("R",), data=7.0),
    ]
    buffer_ids = [BufferId(3), NO_BUFFER, BufferId(1 << 50), NO_BUFFER]
    found = arguments_from_bytes(arguments_to_bytes(Arguments(buffer_ids, values)))
    assert found is not None
    assert (found.buffer_ids, list(found.values)) == (buffer_ids, [host_value(value) for value in values])
    found = arguments_from_bytes(arguments_to_bytes(Arguments([BufferId(3)])))
    assert found is not None
    assert (found.buffer_ids, list(found.values)) == ([3], [])


def test_what_is_no_arguments_is_not_read():
    assert arguments_from_bytes(b"\xff\xff") is None
    assert arguments_from_bytes(pb.Arguments(buffer_ids=[0]).SerializeToString()) is None
    assert arguments_from_bytes(pb.Arguments(buffer_ids=[3], values=[pb.HostValue()]).SerializeToString()) is None
