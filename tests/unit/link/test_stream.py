"""Streams: order and content survive whatever the sizes are, queues have an end, and wrong bytes lose one stream."""

import asyncio
import contextlib
import functools
import queue
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.link.inboxes import serve
from torchways.link import stream as module
from torchways.link.connection import LoopWaiter
from torchways.link.frames import HEADER_BYTES, FrameError, Header, encode_header
from torchways.link.handshake import HandshakeError
from torchways.link.inbox import Inbox
from torchways.link.opening import LinkError
from torchways.link.stream import PART_BYTES, LoopStream, Stream, StreamServer, connect_stream

SIZES = (0, 1, 1000, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES)


def on_a_loop(test):
    """Runs a test's coroutine."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run


class End:
    """One end of a stream, and what came."""

    def __init__(self, refuse=None, **options):
        self.arrived, self.lost = asyncio.Queue(), asyncio.Queue()
        self.refuse = refuse
        self.stream = LoopStream(self.take, self.lost.put_nowait, **options)

    def take(self, message):
        if message == self.refuse:
            raise FrameError("it sent something bad")
        self.arrived.put_nowait(bytes(message))

    async def take_all(self, count):
        return [await self.arrived.get() for _ in range(count)]


def offer(server, end):
    return server.offer(asyncio.get_running_loop(), lambda: end.stream)


async def open_stream(ticket, end):
    end.stream.open(await asyncio.to_thread(connect_stream, ticket))


async def connected(server, **options):
    near, far = End(**options), End(**options)
    await open_stream(offer(server, far), near)
    return near, far


def end_of_a_pair(**options):
    """An open end, and a socket that is the other."""
    near, far = socket.socketpair()
    end = End(**options)
    end.stream.open(near)
    far.setblocking(False)
    return end, far


@pytest.fixture(scope="module")
def server():
    return StreamServer("127.0.0.1", stranger_seconds=1.0)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(SIZES), max_size=9), st.integers(1, 4))
def test_messages_of_any_size_arrive_whole_and_in_order_both_ways(server, sizes, times):
    async def run():
        near, far = await connected(server)
        messages = [bytes([index]) * size for index, size in enumerate(sizes)] * times
        for message in messages:
            near.stream.send(message)
            far.stream.send(message)
        assert await far.take_all(len(messages)) == messages
        assert await near.take_all(len(messages)) == messages
        assert near.stream.num_unsent == far.stream.num_unsent == 0
        near.stream.close()
        await far.lost.get()

    asyncio.run(asyncio.wait_for(run(), 60))


@on_a_loop
async def test_what_is_sent_before_it_is_open_goes_out_then(server):
    near, far = End(), End()
    near.stream.send(b"early")
    far.stream.send(b"early, too")
    await open_stream(offer(server, far), near)
    assert await far.arrived.get() == b"early"
    assert await near.arrived.get() == b"early, too"


@on_a_loop
async def test_messages_that_are_ready_together_go_out_together():
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # what is written at once is one packet
    end = End()
    end.stream.open(near)
    for _ in range(1000):
        end.stream.send(b"x")
    await asyncio.sleep(0.01)
    assert len(far.recv(1 << 20)) == 1000 * (HEADER_BYTES + 1)


def test_threads_send_on_one_stream(server):
    """Each thread's messages keep their order, and an inbox serves a stream as a loop does."""
    inbox, arrived, lost = Inbox(), queue.Queue(), queue.Queue()
    serve(inbox, lambda: None)
    ticket = server.offer(inbox, lambda: Stream(inbox, arrived.put, lost.put))

    async def run():
        loop = asyncio.get_running_loop()
        near = Stream(LoopWaiter(loop), lambda _: None, lambda _: None)
        near.open(await asyncio.to_thread(connect_stream, ticket))

        def send(name):
            for number in range(2000):
                near.send(b"%c %d" % (name, number) + bytes(300))
                near.flush()

        threads = [asyncio.to_thread(send, name) for name in b"abcd"]
        await asyncio.gather(*threads)
        found = [await asyncio.to_thread(arrived.get, timeout=30) for _ in range(8000)]
        for name in b"abcd":
            mine = [bytes(message).rstrip(b"\0") for message in found if message[0] == name]
            assert mine == [b"%c %d" % (name, number) for number in range(2000)]
        assert lost.empty()
        near.close()
        assert "clos" in await asyncio.to_thread(lost.get, timeout=30)

    asyncio.run(run())


@on_a_loop
async def test_who_fills_a_queue_waits_until_it_is_read(server):
    near, far = await connected(server, max_unsent=1000)
    near.stream.send(b"x")
    await far.arrived.get()
    far.stream.pause()
    message = bytes(1 << 20)
    while near.stream.num_unsent < 64 << 20:  # more than the system's buffers take
        near.stream.send(message)
        await asyncio.sleep(0)
    waiting = asyncio.create_task(near.stream.room())
    await asyncio.sleep(0.05)
    assert near.stream.is_full
    assert not waiting.done()
    far.stream.resume()
    await waiting
    assert near.stream.num_unsent <= 1000


@on_a_loop
async def test_the_end_of_one_is_told_to_the_other_only(server):
    near, far = await connected(server, max_unsent=10)
    near.stream.send(bytes(100))
    waiting = asyncio.create_task(near.stream.room())
    near.stream.close()
    await waiting
    assert "clos" in await far.lost.get()
    assert near.lost.empty()
    far.stream.send(b"to nobody")
    near.stream.send(b"from nobody")
    assert near.stream.num_unsent == far.stream.num_unsent == 0
    assert not near.stream.is_open


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (encode_header(Header(9, (0, 0, 0), 1)), "unknown kind 9"),
        (encode_header(Header(1, (0, 0, 0), PART_BYTES + 1)), "at most"),
        (
            encode_header(Header(0, (0, 0, 0), 6)) + b"123456" + encode_header(Header(1, (0, 0, 0), 5)) + b"78901",
            "more",
        ),
        (encode_header(Header(1, (0, 0, 0), 3)) + b"bad", "something bad"),
    ],
)
@on_a_loop
async def test_what_is_wrong_loses_the_stream(monkeypatch, data, why):
    monkeypatch.setattr(module, "MAX_MESSAGE_BYTES", 10)
    end, far = end_of_a_pair(refuse=b"bad")
    far.send(data + encode_header(Header(1, (0, 0, 0), 0)))
    assert why in await end.lost.get()
    assert far.recv(1) == b""
    await asyncio.sleep(0)
    assert end.lost.empty()
    assert end.arrived.empty()


@settings(deadline=None)
@given(st.lists(st.binary(max_size=100), max_size=10))
def test_arbitrary_bytes_raise_nothing(pieces):
    async def run():
        end, far = end_of_a_pair()
        for data in pieces:
            if end.stream.is_open:
                far.send(data)
            await asyncio.sleep(0)
        far.close()
        await end.lost.get()
        assert end.lost.empty()

    asyncio.run(asyncio.wait_for(run(), 60))


@on_a_loop
async def test_only_who_has_a_ticket_gets_a_stream_and_once(monkeypatch, server):
    monkeypatch.setattr(module, "_OPEN_SECONDS", 0.2)
    far = End()
    ticket = offer(server, far)
    for wrong, why in (
        (ticket._replace(secret=bytes(32)), "does not know the link's secret"),
        (ticket._replace(name="another"), "did not answer"),
    ):
        with pytest.raises(LinkError, match=why):
            await open_stream(wrong, End())
    await open_stream(ticket, End())  # still good
    with pytest.raises(LinkError, match="did not answer"):
        await open_stream(ticket, End())
    monkeypatch.setattr(module, "OFFER_SECONDS", 0.01)
    late = offer(server, End())
    await asyncio.sleep(0.05)
    with pytest.raises(LinkError, match="did not answer"):
        await open_stream(late, End())

    def refuse():
        raise HandshakeError("it has one")

    monkeypatch.setattr(module, "OFFER_SECONDS", 10)
    refused = End()
    await open_stream(server.offer(asyncio.get_running_loop(), refuse), refused)
    assert "clos" in await refused.lost.get()


@on_a_loop
async def test_strangers_keep_nobody_out(server):
    host, port = server.address.split(":")
    silent = [await asyncio.open_connection(host, port) for _ in range(80)]  # more than may wait
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    near, far = await connected(server)
    near.stream.send(b"x")
    assert await far.arrived.get() == b"x"
    for other, _ in [*silent, (reader, writer)]:  # some made room for others, the rest ran out of time
        with contextlib.suppress(ConnectionError):
            assert await other.read() == b""
    near.stream.send(b"y")
    assert await far.arrived.get() == b"y"


@on_a_loop
async def test_nobody_there_is_an_error(server):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(LinkError, match="it is gone"):
        await open_stream(offer(server, End())._replace(address=address), End())


@on_a_loop
async def test_another_that_listens_there_gets_nothing(server):
    got = []

    async def answer(reader, writer):
        got.append(await reader.read(100))
        writer.write(bytes(64))
        got.append(await reader.read(100))

    impostor = await asyncio.start_server(answer, "127.0.0.1", 0)
    address = f"127.0.0.1:{impostor.sockets[0].getsockname()[1]}"
    end = End()
    end.stream.send(b"secret")
    with pytest.raises(LinkError, match="does not know the link's secret"):
        await open_stream(offer(server, End())._replace(address=address), end)
    assert not end.stream.is_open
    assert b"secret" not in b"".join(got)
    impostor.close()
