"""Streams of protobuf messages: a call asks for one, its answer offers it, and link/stream.py carries it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from torchways.link.connection import Waiter
from torchways.link.frames import FrameError
from torchways.link.stream import Stream, StreamServer, Ticket, connect_stream
from torchways.rpc import torchways_pb2 as pb

_M = TypeVar("_M", bound=Message)


def offer(
    server: StreamServer, waiter: Waiter | asyncio.AbstractEventLoop, make: Callable[[], Stream]
) -> pb.StreamOffer:
    """Returns the answer to a call that asks for a stream; see `StreamServer.offer`."""
    return pb.StreamOffer(**server.offer(waiter, make)._asdict())


async def open_offered(call: Awaitable[pb.StreamOffer], stream: Stream) -> None:
    """Opens the stream that a call's answer offers; on the loop that it is for.

    Raises:
        grpc.aio.AioRpcError: the call failed.
        LinkError: there is no connection.
    """
    offered = await call
    ticket = Ticket(offered.address, offered.name, offered.secret)
    stream.open(await asyncio.to_thread(connect_stream, ticket))


def parsing(kind: type[_M], take: Callable[[_M], None]) -> Callable[[bytearray], None]:
    """Returns what takes a stream's messages as bytes, for what takes them as they are."""

    def receive(data: bytearray) -> None:
        try:
            message = kind.FromString(bytes(data))
        except DecodeError as error:
            raise FrameError(f"{len(data):,} bytes are no {kind.__name__}: {error}") from error
        take(message)

    return receive
