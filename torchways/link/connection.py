"""One connection that carries small frames both ways, for a thread that waits at an `Inbox` or an asyncio loop.

Frames that are ready at the same time go out in one write. No send ever blocks, and what comes is always taken, so that
no order of sends can deadlock.
"""

from __future__ import annotations

import asyncio
import collections
import selectors
import socket
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from torchways.link.frames import FrameError, FrameReader, Header, Label, Limits, encode_header

#: Frames that are ready at the same time go out together, about so many bytes.
_WRITE_BYTES = 256 << 10
_READ_BYTES = 256 << 10


class Frame(NamedTuple):
    """A frame to send.

    Attributes:
        kind, label: see `Header`.
        payload: bytes that must not change until `on_sent`.
        on_sent: called once, on some thread, with None or why it was not sent.
    """

    kind: int
    label: Label
    payload: bytes | memoryview
    on_sent: Callable[[str | None], None] | None = None


class Waiter(Protocol):
    """Where a thread waits for sockets and for work; as `Inbox`."""

    def put(self, item: Callable[[], None], /) -> None:
        """Has the waiting thread call something; may be called on any thread."""

    def watch(self, watched: socket.socket, callback: Callable[[int], None], events: int) -> None:
        """Calls back with the events that happen, of selectors.EVENT_READ and EVENT_WRITE, until `unwatch`."""

    def unwatch(self, watched: socket.socket) -> None:
        """Ends `watch`."""


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


class Connection:
    """This end of a connection. Methods are for the waiting thread unless they say otherwise.

    What is sent before it is open goes out then.

    Args:
        waiter: where that thread waits.
        limits: what it takes.
        receive: takes each frame that comes. It may raise FrameError: the frame is wrong, which loses the connection.
        lost: called once, with the reason, when it ends otherwise than by `close`.
        ended: called once, with the reason, when nothing more comes; what was sent may still go out. None: it is lost.
    """

    def __init__(
        self,
        waiter: Waiter,
        limits: Limits,
        receive: Callable[[Header, bytearray], None],
        lost: Callable[[str], None],
        ended: Callable[[str], None] | None = None,
    ) -> None:
        self._waiter = waiter
        self._receive = receive
        self._lost = lost
        self._ended = ended or self.lose
        self._socket: socket.socket | None = None
        self._reader = FrameReader(limits)
        self._read_buffer = memoryview(bytearray(_READ_BYTES))
        self._is_paused = self._has_ended = False
        #: What was sent; whoever takes from it holds the lock.
        self._unsent: collections.deque[Frame] = collections.deque()
        self._writing = threading.Lock()
        #: Frames as bytes.
        self._unwritten = bytearray()
        self._watches_room = False
        #: Why it is closed.
        self._closed: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether it has been opened, and is not closed or lost."""
        return self._socket is not None and self._closed is None

    @property
    def is_closed(self) -> bool:
        """Whether it is closed or lost. May be asked on any thread."""
        return self._closed is not None

    def open(self, connected: socket.socket) -> None:
        """Takes its socket."""
        if self._closed is not None:  # before anybody came
            connected.close()
            return
        connected.setblocking(False)
        self._socket = connected
        self._watch()
        self.flush()

    def add(self, *frames: Frame) -> None:
        """Queues frames, which go out with `flush`. One step to signals; may be called on any thread."""
        self._unsent.extend(frames)

    def flush(self) -> None:
        """Sends what is queued, as far as the connection takes it; the rest follows. May be called on any thread.

        Once it is closed, what is queued fails. On the main thread it must not be interrupted by signals.
        """
        if self._socket is None and self._closed is None:
            return
        told: list[Frame] = []  # without the lock: they may send more
        failed = ""
        with self._writing:
            closed = self._closed
            if closed is not None:
                told += self._unsent
                self._unsent.clear()
            elif not self._watches_room:
                try:
                    self._write(told)
                except OSError as error:
                    failed = f"sending failed: {error}"
                if self._unwritten and not failed:
                    self._watches_room = True
                    self._waiter.put(self._watch)
        for frame in told:
            if frame.on_sent is not None:
                frame.on_sent(closed)
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

    def close(self, reason: str = "it is closed") -> None:
        """Ends it; what waits to be sent is not."""
        with self._writing:
            if self._closed is not None:
                return
            self._closed = reason
            self._unwritten.clear()
        if self._socket is not None:
            self._waiter.unwatch(self._socket)
            self._socket.close()
        self.flush()

    def lose(self, reason: str) -> None:
        """Ends it, and tells so."""
        if self._closed is None:
            self.close(reason)
            self._lost(reason)

    # ---- the socket

    def _watch(self) -> None:
        if self._socket is None or self._closed is not None:
            return
        events = 0 if self._is_paused or self._has_ended else selectors.EVENT_READ
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
            size, reason = 0, f"the connection broke: {error}"
        else:
            reason = "the connection was closed"
        if not size:
            self._has_ended = True
            self._watch()
            self._ended(reason)
            return
        try:
            for header, payload in self._reader.feed(self._read_buffer[:size]):
                if self._closed is not None:
                    return
                self._receive(header, payload)
        except FrameError as error:
            self.lose(f"it did not keep to the protocol: {error}")

    def _write(self, told: list[Frame]) -> None:
        assert self._socket is not None
        while self._unwritten or self._unsent:
            while self._unsent and len(self._unwritten) < _WRITE_BYTES:
                frame = self._unsent.popleft()
                self._unwritten += encode_header(Header(frame.kind, frame.label, len(frame.payload)))
                self._unwritten += frame.payload
                if frame.on_sent is not None:
                    told.append(frame)
            try:
                written = self._socket.send(self._unwritten)
            except BlockingIOError:
                return
            del self._unwritten[:written]
