"""Streams of protobuf messages: a call asks for one, its first answer offers it, and link/stream.py carries it.

The call has no other answer, and stays open as long as the stream. So gRPC's pings, which its own threads send and
answer whatever Python does, tell each end when the other is stopped: the call ends, and the stream is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from torchways.link.connection import LoopWaiter, Waiter
from torchways.link.frames import FrameError
from torchways.link.handshake import HandshakeError
from torchways.link.opening import LinkError
from torchways.link.stream import OFFER_SECONDS, Stream, StreamServer, Ticket, connect_stream
from torchways.rpc import torchways_pb2 as pb

_M = TypeVar("_M", bound=Message)

#: Once the call has ended, how long what the other end sent before may be on its way. Where that end is gone, and not
#: stopped, the connection tells so by then.
_LAST_MESSAGES_SECONDS = 2.0


async def offer(
    context: grpc.aio.ServicerContext,
    server: StreamServer,
    waiter: Waiter | asyncio.AbstractEventLoop,
    make: Callable[[], Stream],
) -> None:
    """Answers a call that asks for a stream; returns when that has ended, or raises CancelledError with the call.

    Args:
        context: of the call.
        server, waiter, make: see `StreamServer.offer`.
    """
    where = LoopWaiter(waiter) if isinstance(waiter, asyncio.AbstractEventLoop) else waiter
    held = _Held(where, make)
    ticket = server.offer(where, held.make)
    try:
        await context.write(pb.StreamOffer(**ticket._asdict()))
        try:
            await asyncio.wait_for(held.taken.wait(), OFFER_SECONDS)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"nobody connected in {OFFER_SECONDS:g} s")
        await held.ended.wait()
    finally:
        server.withdraw(ticket)
        held.call_ended()


class _Held:
    """The offering end of a stream, and the call that holds it: each ends with the other. Made on the call's loop.

    Attributes:
        taken: set when somebody has connected.
        ended: set when the stream has ended, or is not to be had any more.
    """

    def __init__(self, waiter: Waiter, make: Callable[[], Stream]) -> None:
        self.taken = asyncio.Event()
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._waiter = waiter
        self._make = make
        #: The next two are for the waiting thread.
        self._stream: Stream | None = None
        self._is_over = False

    def make(self) -> Stream:
        """Returns the stream; on the waiting thread."""
        self._tell(self.taken)
        try:
            if self._is_over:
                raise HandshakeError("the call that asked for it has ended")
            self._stream = self._make()
        except HandshakeError:
            self._tell(self.ended)
            raise
        self._stream.when_closed(lambda: self._tell(self.ended))
        return self._stream

    def call_ended(self) -> None:
        """Ends the stream, too; on the loop."""
        if not self.ended.is_set():
            self._loop.call_later(_LAST_MESSAGES_SECONDS, self._waiter.put, self._end)

    def _end(self) -> None:
        self._is_over = True
        if self._stream is not None:
            self._stream.lose("it does not answer any more")

    def _tell(self, event: asyncio.Event) -> None:
        self._loop.call_soon_threadsafe(event.set)


async def open_offered(call: Any, stream: Stream, seconds: float | None = None) -> None:
    """Opens the stream that a call offers; from there on each ends with the other. On the loop that the stream is for.

    Args:
        call: a call that has been made. It has no deadline: it lasts as long as the stream.
        stream: not open yet.
        seconds: how long the offer may take; None: as long as the other end lives.

    Raises:
        grpc.aio.AioRpcError: the call failed.
        LinkError: there is no connection.
    """
    try:
        async with asyncio.timeout(seconds):
            offered = await call.read()
        if offered is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise LinkError("it offered no stream")
        ticket = Ticket(offered.address, offered.name, offered.secret)
        stream.open(await asyncio.to_thread(connect_stream, ticket))
    except BaseException as error:
        call.cancel()
        if isinstance(error, TimeoutError):
            raise LinkError(f"it did not answer in {seconds:g} s") from error
        raise
    watching = asyncio.create_task(_watch(call, stream), name="the call that holds a stream")

    def closed() -> None:
        watching.cancel()
        call.cancel()

    stream.when_closed(closed)


async def _watch(call: Any, stream: Stream) -> None:
    """Loses a stream when the call that holds it ends."""
    code, details = await call.code(), await call.details()
    reason = f"it does not answer any more: {details or code.name}"
    asyncio.get_running_loop().call_later(_LAST_MESSAGES_SECONDS, stream.lose, reason)


def parsing(kind: type[_M], take: Callable[[_M], None]) -> Callable[[bytearray], None]:
    """Returns what takes a stream's messages as bytes, for what takes them as they are."""

    def receive(data: bytearray) -> None:
        try:
            message = kind.FromString(bytes(data))
        except DecodeError as error:
            raise FrameError(f"{len(data):,} bytes are no {kind.__name__}: {error}") from error
        take(message)

    return receive
