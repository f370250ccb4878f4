"""A stream: messages both ways, in order, over one authenticated connection.

It is for messages that are small and many. A process offers a stream to who asks for one by a call; the answer is a
`Ticket`, and whoever connects with it in time is at the other end. Whatever is wrong with a stream loses it, with a
reason, and nothing else.

The same stream serves a thread that waits at an `Inbox` and an asyncio loop (`LoopStream`).
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torchways.link.frames import FrameError, FrameReader, Header, encode_header
from torchways.link.handshake import Connecting, HandshakeError
from torchways.link.opening import Acceptor, connect

logger = logging.getLogger(__name__)

#: Kinds of frames: a part of a message that has more, and the last or only one.
_PART, _LAST = 0, 1
PART_BYTES = 1 << 20
#: The most that a message may come to: protobuf's own limit.
MAX_MESSAGE_BYTES = (1 << 31) - 1
#: Frames that are ready at the same time go out together, about so many bytes.
_WRITE_BYTES = 256 << 10
_READ_BYTES = 256 << 10

#: What an accepting end calls itself.
_ACCEPTING = "streams"
#: Which of the kinds of connections that shake hands this is; links have 0 and 1.
_CHANNEL = 2
#: How long an offer holds, and how long its taker tries.
_OFFER_SECONDS = 60.0
_OPEN_SECONDS = 30.0


class Ticket(NamedTuple):
    """What a stream is opened with, once: the listener's host:port, the offer's name, and its secret."""

    address: str
    name: str
    secret: bytes


class Waiter(Protocol):
    """Where a thread waits for sockets and for work; as `Inbox`."""

    def put(self, item: Callable[[], None], /) -> None:
        """Has the waiting thread call something; may be called on any thread."""

    def watch(self, watched: socket.socket, callback: Callable[[int], None], events: int) -> None:
        """Calls back with the events that happen, of selectors.EVENT_READ and EVENT_WRITE, until `unwatch`."""

    def unwatch(self, watched: socket.socket) -> None:
        """Ends `watch`."""


class Stream:
    """One end of a stream. Methods are for the waiting thread unless they say otherwise.

    What is sent before the stream is open goes out then.

    Args:
        waiter: where that thread waits.
        receive: takes each message that comes. It may raise FrameError: the message is wrong, which loses the stream.
        lost: called once, with the reason, when the stream ends otherwise than by `close`.
    """

    def __init__(self, waiter: Waiter, receive: Callable[[bytearray], None], lost: Callable[[str], None]) -> None:
        self._waiter = waiter
        self._receive = receive
        self._lost = lost
        self._socket: socket.socket | None = None
        self._reader = FrameReader({_PART: PART_BYTES, _LAST: PART_BYTES})
        self._read_buffer = memoryview(bytearray(_READ_BYTES))
        #: The parts of the message that comes.
        self._joined = bytearray()
        self._is_paused = False
        #: What was sent; whoever takes from it holds the lock.
        self._unsent: collections.deque[bytes] = collections.deque()
        self._writing = threading.Lock()
        #: Bytes of the first message that are in frames already, and frames that are not written.
        self._num_begun = 0
        self._unwritten = bytearray()
        self._watches_room = False
        self._has_ended = False

    @property
    def is_open(self) -> bool:
        """Whether it has been opened, and has not ended."""
        return self._socket is not None and not self._has_ended

    def open(self, connection: socket.socket) -> None:
        """Takes its connection."""
        if self._has_ended:  # before anybody came
            connection.close()
            return
        connection.setblocking(False)
        self._socket = connection
        self._watch()
        self.flush()

    def send(self, message: bytes) -> None:
        """Queues a message, which goes out with `flush`. One step to signals; may be called on any thread."""
        if not self._has_ended:
            self._unsent.append(message)

    def flush(self) -> None:
        """Sends what is queued, as far as the connection takes it; the rest follows. May be called on any thread.

        On the main thread it must not be interrupted by signals.
        """
        if self._socket is None:
            return
        failed = ""
        with self._writing:
            if self._has_ended or self._watches_room:
                return
            try:
                self._write()
            except OSError as error:
                failed = f"its connection broke ({error})"
            if self._unwritten and not failed:
                self._watches_room = True
                self._waiter.put(self._watch)
        if failed:
            self._waiter.put(lambda: self.lose(failed))

    def pause(self) -> None:
        """Takes nothing more from the other end until `resume`, but for what is here."""
        self._is_paused = True
        self._watch()

    def resume(self) -> None:
        """Ends `pause`."""
        self._is_paused = False
        self._watch()

    def close(self) -> None:
        """Ends the stream; what waits to be sent is not."""
        with self._writing:
            self._has_ended = True
        if self._socket is not None:
            self._waiter.unwatch(self._socket)
            self._socket.close()
        self._unsent.clear()
        self._unwritten.clear()

    def lose(self, reason: str) -> None:
        """Ends the stream, and tells so."""
        if not self._has_ended:
            self.close()
            self._lost(reason)

    # ---- the connection

    def _watch(self) -> None:
        if self._socket is None or self._has_ended:
            return
        events = 0 if self._is_paused else selectors.EVENT_READ
        if self._watches_room:
            events |= selectors.EVENT_WRITE
        if events:
            self._waiter.watch(self._socket, self._on_socket, events)
        else:
            self._waiter.unwatch(self._socket)

    def _on_socket(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._watches_room = False
            self.flush()
            self._watch()
        if events & selectors.EVENT_READ and self.is_open and not self._is_paused:
            self._read()

    def _read(self) -> None:
        assert self._socket is not None
        try:
            size = self._socket.recv_into(self._read_buffer)
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(f"its connection broke ({error})")
            return
        if not size:
            self.lose("it closed the connection")
            return
        try:
            for header, payload in self._reader.feed(self._read_buffer[:size]):
                if self._has_ended:
                    return
                if header.kind == _PART or self._joined:
                    if len(self._joined) + len(payload) > MAX_MESSAGE_BYTES:
                        raise FrameError(f"a message has more than {MAX_MESSAGE_BYTES:,} bytes")
                    self._joined += payload
                    if header.kind == _PART:
                        continue
                    payload, self._joined = self._joined, bytearray()
                self._receive(payload)
        except FrameError as error:
            self.lose(f"it did not keep to the protocol: {error}")
        except Exception as error:  # our bug: to go on would leave somebody waiting for ever
            logger.exception("what came on a stream could not be taken")
            self.lose(f"what it sent could not be taken: {error}")

    def _write(self) -> None:
        assert self._socket is not None
        while self._unwritten or self._unsent:
            while self._unsent and len(self._unwritten) < _WRITE_BYTES:
                self._add_frame()
            try:
                written = self._socket.send(self._unwritten)
            except BlockingIOError:
                return
            del self._unwritten[:written]

    def _add_frame(self) -> None:
        message, begun = self._unsent[0], self._num_begun
        size = min(len(message) - begun, PART_BYTES)
        is_last = begun + size == len(message)
        self._unwritten += encode_header(Header(_LAST if is_last else _PART, (0, 0, 0), size))
        self._unwritten += message if not begun and is_last else memoryview(message)[begun : begun + size]
        self._num_begun = 0 if is_last else begun + size
        if is_last:
            self._unsent.popleft()
            self._sent(len(message))

    def _sent(self, size: int) -> None:
        """A message of this size waits no more, but for the connection."""


class LoopWaiter:
    """An asyncio loop as a `Waiter`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def put(self, item: Callable[[], None], /) -> None:
        self._loop.call_soon_threadsafe(item)

    def watch(self, watched: socket.socket, callback: Callable[[int], None], events: int) -> None:
        loop = self._loop
        if events & selectors.EVENT_READ:
            loop.add_reader(watched, callback, selectors.EVENT_READ)
        else:
            loop.remove_reader(watched)
        if events & selectors.EVENT_WRITE:
            loop.add_writer(watched, callback, selectors.EVENT_WRITE)
        else:
            loop.remove_writer(watched)

    def unwatch(self, watched: socket.socket) -> None:
        self._loop.remove_reader(watched)
        self._loop.remove_writer(watched)


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

    def send(self, message: bytes) -> None:
        """Sends a message; on the loop. Those that are sent while it handles one event go out together."""
        if self._has_ended:
            return
        super().send(message)
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

    def close(self) -> None:
        """See `Stream`."""
        super().close()
        self.num_unsent = 0
        self._has_room.set()

    def _flush(self) -> None:
        self._is_flushing = False
        self.flush()

    def _sent(self, size: int) -> None:
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
        self._offers[name] = _Offer(secret, now + _OFFER_SECONDS, where, make)
        return Ticket(self.address, name, secret)

    def key_of(self, peer: str) -> bytes:
        """See `Acceptor`."""
        offer = self._offers.get(peer)
        if offer is None or offer.until < time.monotonic():
            raise HandshakeError("nothing is offered to it")
        return offer.secret

    def admit(self, peer: str, channel: int) -> Callable[[socket.socket], None] | None:
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
