"""Messages of a stream: order and content survive batching and chunks, whatever their sizes; queues have an end."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchways.errors import InternalError
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.channel import MAX_MESSAGE_BYTES
from torchways.rpc.streams import CHUNK_BYTES, Joiner, Outbox

SIZES = (0, 1, 1000, CHUNK_BYTES - 10, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES)


def program(size):
    return pb.ClientMessage(register_program=pb.RegisterProgram(name="g" * size))


async def carried(messages):
    """What comes out at the other end, and the sizes of what went over the wire."""
    outbox, joiner, sizes, out = Outbox(pb.ClientMessage), Joiner(pb.ClientMessage), [], []
    for message in messages:
        outbox.put(message)
    outbox.close()
    async for batch in outbox.batches():
        wire = pb.ClientMessages(messages=batch).SerializeToString()
        sizes.append(len(wire))
        out += [whole for item in pb.ClientMessages.FromString(wire).messages if (whole := joiner.join(item))]
    assert outbox.num_bytes == 0
    return out, sizes


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.sampled_from([0, 1, 1000, CHUNK_BYTES - 10, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES]), max_size=9)
)
def test_messages_of_any_size_arrive_whole_and_in_order(lengths):
    messages = [program(length) for length in lengths]
    out, sizes = asyncio.run(carried(messages))
    assert out == messages
    assert max(sizes, default=0) < MAX_MESSAGE_BYTES


def test_small_messages_share_batches():
    out, sizes = asyncio.run(carried([pb.ClientMessage(hello=pb.ClientHello()) for _ in range(1000)]))
    assert len(out) == 1000
    assert len(sizes) == 4


def test_who_fills_a_queue_waits_until_it_is_read():
    async def fill():
        outbox = Outbox(pb.ClientMessage, max_bytes=1000)
        outbox.put(program(2000))
        assert outbox.is_full
        waiting = asyncio.create_task(outbox.room())
        await asyncio.sleep(0)
        assert not waiting.done()
        batches = outbox.batches()
        await anext(batches)
        await asyncio.wait_for(waiting, 10)

    asyncio.run(fill())


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([pb.Chunk(data=b"\xff\xff\xff", is_last=True)], "are no message"),
        ([pb.Chunk(data=b"x"), None], "between the chunks"),
        ([pb.Chunk(data=pb.ClientMessage(chunk=pb.Chunk()).SerializeToString(), is_last=True)], "a chunk holds chunks"),
    ],
)
def test_what_is_no_message_ends_the_stream(messages, why):
    hello = pb.ClientMessage(hello=pb.ClientHello())
    sent = [pb.ClientMessage(chunk=chunk) if chunk else hello for chunk in messages]
    with pytest.raises(InternalError, match=why):
        list(map(Joiner(pb.ClientMessage).join, sent))


def test_more_chunks_than_any_message_has_end_the_stream(monkeypatch):
    monkeypatch.setattr("torchways.rpc.streams.MAX_JOINED_BYTES", 10)
    joiner = Joiner(pb.ClientMessage)
    assert joiner.join(pb.ClientMessage(chunk=pb.Chunk(data=b"x" * 10))) is None
    with pytest.raises(InternalError, match="more than 10 bytes"):
        joiner.join(pb.ClientMessage(chunk=pb.Chunk(data=b"x")))
