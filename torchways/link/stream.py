"""A stream: messages both ways, in order, over one authenticated connection.

It is for messages that are small and many. A process offers a stream to who asks for one by a call; the answer is a
`Ticket`, and whoever connects with it in time is at the other end. Whatever is wrong with a stream loses it, with a
reason, and nothing else.

The connection tells that the other process has ended, or its machine is gone. It does not tell that the process is
stopped, whose kernel goes on acknowledging: the call that asked for the stream tells that (rpc/streams.py).

The same stream serves a thread that waits at an `Inbox` and an asyncio loop (`LoopStream`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from torchways.link.connection import Connection, Frame, LoopWaiter, Waiter
from torchways.link.frames import FrameError, Header
from torchways.link.handshake import Connecting, HandshakeError
from torchways.link.opening import Acceptor, connect

logger = logging.getLogger(__name__)

#: Kinds of frames: a part of a message that has more, and the last or only one.
_PART, _LAST = 0, 1
PART_BYTES = 1 << 20
#: The most that a message may come to: protobuf's own limit.
MAX_MESSAGE_BYTES = (1 << 31) - 1
_NOBODY = (0, 0, 0)

#: What an accepting end calls itself.
_ACCEPTING = "streams"
#: Which of the kinds of connections that shake hands this is; links have 0 and 1.
_CHANNEL = 2
#: How long an offer holds, and how long its taker tries.
OFFER_SECONDS = 60.0
_OPEN_SECONDS = 30.0


class Ticket(NamedTuple):
    """What a stream is opened with, once: the listener's host:port, the offer's name, and its secret."""

    address: str
    name: str
    secret: bytes


class Stream(Connection):
    """One end of a stream: a connection whose messages may have any size.

    Args:
        waiter: where the thread waits that its methods are for; see `Connection`.
        receive: takes each message that comes. It may raise FrameError: the message is wrong, which loses the stream.
        lost: called once, with the reason, when the stream ends otherwise than by `close`.
    """

    def __init__(self, waiter: Waiter, receive: Callable[[bytearray], None], lost: Callable[[str], None]) -> None:
        super().__init__(waiter, {_PART: PART_BYTES, _LAST: PART_BYTES}, self._on_frame, lost)
        self._take = receive
        #: The parts of the message that comes.
        self._joined = bytearray()
        self._when_closed: list[Callable[[], None]] = []

    def when_closed(self, callback: Callable[[], None]) -> None:
        """Has something called, on the waiting thread, when it is closed or lost; at once if it is."""
        self._when_closed.append(callback)
        if self.is_closed:
            self._tell_closed()

    def close(self, reason: str = "it is closed") -> None:
        """See `Connection`."""
        super().close(reason)
        self._tell_closed()

    def _tell_closed(self) -> None:
        while self._when_closed:
            self._when_closed.pop()()

    def send(self, message: bytes, on_sent: Callable[[str | None], None] | None = None) -> None:
        """Queues a message, which goes out with `flush`. One step to signals; may be called on any thread.

        Args:
            message: the message.
            on_sent: called once, on some thread, with None when all of it waits for the connection alone, or with why
                it was not sent. Not called where the stream is closed already.
        """
        if self.is_closed:
            return
        size = len(message)
        if size <= PART_BYTES:
            self.add(Frame(_LAST, _NOBODY, message, on_sent))
            return
        view = memoryview(message)
        frames = [Frame(_PART, _NOBODY, view[begin : begin + PART_BYTES]) for begin in range(0, size, PART_BYTES)]
        frames[-1] = frames[-1]._replace(kind=_LAST, on_sent=on_sent)
        self.add(*frames)

    def _on_frame(self, header: Header, payload: bytearray) -> None:
        if header.kind == _PART or self._joined:
            if len(self._joined) + len(payload) > MAX_MESSAGE_BYTES:
                raise FrameError(f"a message has more than {MAX_MESSAGE_BYTES:,} bytes")
            self._joined += payload
            if header.kind == _PART:
                return
            payload, self._joined = self._joined, bytearray()
        try:
            self._take(payload)
        except FrameError:
            raise
        except Exception as error:  # our bug: to go on would leave somebody waiting for ever
            logger.exception("what came on a stream could not be taken")
            self.lose(f"what it sent could not be taken: {error}")


class LoopStream(Stream):
    """A stream on the running asyncio loop.

    Args:
        max_unsent: bytes that may wait to be sent. `send` takes more all the same; whoever sends on behalf of another
            waits for `room` before it takes more from that other.

    Attributes:
        num_unsent: bytes that wait to be sent.
    """

    def __init__(
        self, receive: Callable[[bytearray], None], lost: Callable[[str], None], *, max_unsent: int = 256 << 20
    ) -> None:
        self._loop = asyncio.get_running_loop()
        super().__init__(LoopWaiter(self._loop), receive, lost)
        self.num_unsent = 0
        self._max_unsent = max_unsent
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._is_flushing = False

    def send(self, message: bytes) -> None:  # type: ignore[override]
        """Sends a message; on the loop. Those that are sent while it handles one event go out together."""
        if self.is_closed:
            return
        super().send(message, functools.partial(self._sent, len(message)))
        self.num_unsent += len(message)
        if self.num_unsent > self._max_unsent:
            self._has_room.clear()
        if not self._is_flushing:
            self._is_flushing = True
            self._loop.call_soon(self._flush)

    @property
    def is_full(self) -> bool:
        """Whether more waits to be sent than should."""
        return not self._has_room.is_set()

    async def room(self) -> None:
        """Waits until no more waits to be sent than should, or the stream has ended."""
        while self.is_full:  # others may wait for the same room
            await self._has_room.wait()

    def _flush(self) -> None:
        self._is_flushing = False
        self.flush()

    def _sent(self, size: int, _: str | None) -> None:
        self.num_unsent -= size
        if self.num_unsent <= self._max_unsent:
            self._has_room.set()


@dataclasses.dataclass(frozen=True, slots=True)
class _Offer:
    """`until`: monotonic seconds."""

    secret: bytes
    until: float
    waiter: Waiter
    make: Callable[[], Stream]


class StreamServer(Acceptor):
    """Where streams are offered."""

    def __init__(self, host: str, **options: Any) -> None:
        #: Changed by single steps only: on the acceptor's thread, too.
        self._offers: dict[str, _Offer] = {}
        super().__init__(_ACCEPTING, host, **options)

    def offer(self, waiter: Waiter | asyncio.AbstractEventLoop, make: Callable[[], Stream]) -> Ticket:
        """Returns a ticket for the stream that `make` returns when somebody connects with it.

        Args:
            waiter: of the thread on which `make` is called.
            make: may raise HandshakeError: the stream is not to be had any more.
        """
        now = time.monotonic()
        for name in [name for name, offer in [*self._offers.items()] if offer.until < now]:
            self._offers.pop(name, None)
        where = LoopWaiter(waiter) if isinstance(waiter, asyncio.AbstractEventLoop) else waiter
        name, secret = secrets.token_hex(8), secrets.token_bytes(32)
        self._offers[name] = _Offer(secret, now + OFFER_SECONDS, where, make)
        return Ticket(self.address, name, secret)

    def withdraw(self, ticket: Ticket) -> None:
        """Ends an offer that nobody has taken; of one that was taken, `make` may still be called. Any thread."""
        self._offers.pop(ticket.name, None)

    def key_of(self, peer: str) -> bytes:
        """See `Acceptor`."""
        offer = self._offers.get(peer)
        if offer is None or offer.until < time.monotonic():
            raise HandshakeError("nothing is offered to it")
        return offer.secret

    def admit(self, peer: str, channel: int, number: int) -> Callable[[socket.socket], None] | None:
        """See `Acceptor`."""
        offer = self._offers.pop(peer, None) if channel == _CHANNEL else None
        if offer is None:
            return None

        def open_at_once(connection: socket.socket) -> None:
            try:
                stream = offer.make()
            except HandshakeError as error:
                logger.warning("a stream is closed at once: %s", error)
                connection.close()
                return
            stream.open(connection)

        return lambda connection: offer.waiter.put(lambda: open_at_once(connection))


def connect_stream(ticket: Ticket) -> socket.socket:
    """Returns the connection of a stream that was offered, for `Stream.open`.

    Raises:
        LinkError: there is none.
    """

    def handshake() -> Connecting:
        return Connecting(ticket.name, _ACCEPTING, _CHANNEL, ticket.secret)

    return connect(handshake, ticket.address, time.monotonic() + _OPEN_SECONDS)
