"""Streams as tests hold them: message by message, with whatever they want to say; and who offers some."""

import asyncio
import contextlib
import functools

from torchways.ids import ClientId
from torchways.link.handshake import HandshakeError
from torchways.link.stream import LoopStream, StreamServer
from torchways.rpc import channel, streams
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.identity import Caller, Role, metadata
from torchways.rpc.streams import open_offered, parsing


class Lost(Exception):
    """The stream has ended."""


class TestStream:
    """A stream that a call offered.

    Args:
        kind: of the messages that come.
    """

    __test__ = False

    def __init__(self, kind):
        self._came = asyncio.Queue()
        self._stream = LoopStream(
            parsing(kind, self._came.put_nowait), lambda reason: self._came.put_nowait(Lost(reason))
        )

    @classmethod
    async def opened(cls, call, kind):
        """Opens it; raises what the call raises."""
        stream = cls(kind)
        await open_offered(call, stream._stream)
        return stream

    def send(self, *messages):
        """Sends messages, or bytes that are none."""
        for message in messages:
            self._stream.send(message if isinstance(message, bytes) else message.SerializeToString())

    async def read(self):
        """Returns the next message.

        Raises:
            Lost: there is none any more.
        """
        found = await self._came.get()
        if isinstance(found, Lost):
            self._came.put_nowait(found)
            raise found
        return found

    def close(self):
        """Ends it."""
        self._stream.close()


class StreamEnd:
    """One end of a stream: the messages that come, as bytes, and why it was lost."""

    def __init__(self):
        self.arrived, self.lost = asyncio.Queue(), asyncio.Queue()
        self.stream = LoopStream(lambda message: self.arrived.put_nowait(bytes(message)), self.lost.put_nowait)


class Offering(pb_grpc.SchedulerServicer):
    """Offers streams to who calls `Connect`.

    Attributes:
        ends: its ends of the streams that were taken.
        num_calls: that are open.
        refuses: whether it changes its mind when somebody connects.
    """

    def __init__(self):
        self.server = StreamServer("127.0.0.1")
        self.ends = asyncio.Queue()
        self.num_calls = 0
        self.refuses = False

    async def Connect(self, request, context):
        self.num_calls += 1
        try:
            await streams.offer(context, self.server, asyncio.get_running_loop(), self._make)
        finally:
            self.num_calls -= 1

    def _make(self):
        if self.refuses:
            raise HandshakeError("not any more")
        end = StreamEnd()
        self.ends.put_nowait(end)
        return end.stream


@contextlib.asynccontextmanager
async def offering(key):
    """Yields an `Offering` and its address; `key`: the cluster's."""
    service, server = Offering(), channel.make_server("token", key)
    pb_grpc.add_SchedulerServicer_to_server(service, server)
    yield service, await channel.start_server(server, "127.0.0.1")
    await server.stop(None)


@contextlib.asynccontextmanager
async def calls_of(address, key):
    """Yields what calls `Connect` of an `Offering`."""
    me = Caller(Role.CLIENT, ClientId(1))
    mine = metadata("token", me, key.secret_of(me))
    async with channel.open_channel(address) as opened:
        yield functools.partial(pb_grpc.SchedulerStub(opened).Connect, pb.OpenStream(), metadata=mine)
