"""A link: frames to and from one peer, over a connection for small frames and one for large ones.

Small frames go from and to the thread that waits at the inbox (connection.py). Large ones have a thread for each
direction, which copies from and to where they lie without the GIL, and hold up no small ones. Both ends always drain
both connections, so that no order of sends can deadlock. Frames of one connection keep their order.

Whatever is wrong with a link loses the link, with a reason, and nothing else. Another may be opened in its place. That
its peer is stopped is no such thing: who started the peer notices, and ends it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import socket
import threading
from typing import Any, Protocol

from torchways.link.connection import Connection, Frame
from torchways.link.frames import HEADER_BYTES, FrameError, Header, Limits, decode_header, encode_header
from torchways.link.inbox import Inbox
from torchways.link.opening import LinkError, Listener, open_channels

logger = logging.getLogger(__name__)

#: A frame with a larger payload is a large one.
SMALL_BYTES = 64 << 10
#: Once one connection has ended, how long what the peer sent before may be on its way on the other.
_LAST_FRAMES_SECONDS = 2.0


class Receiver(Protocol):
    """What takes a link's frames.

    Attributes:
        limits: what it takes.
    """

    limits: Limits

    def allocate(self, size: int) -> tuple[Any, memoryview]:
        """Returns memory for a large payload: what `on_frame` gets, and its bytes. Called on some thread."""

    def on_frame(self, peer: str, header: Header, payload: Any) -> None:
        """Takes a frame: a small one's payload as bytearray, on the inbox's thread; a large one's on another.

        Raises:
            FrameError: the payload is wrong, which loses the link.
        """

    def on_open(self, link: Link) -> None:
        """Notes that a link is open, on the inbox's thread."""

    def on_lost(self, link: Link, reason: str) -> None:
        """Notes that a link is lost, once. Called on some thread."""


class Link:
    """This end of a link. It opens in the background. Methods are for the thread that waits at the inbox.

    Args:
        listener: this process's.
        peer: id of the other process.
        address: host:port of its listener.
        inbox: where that thread waits; it must call the callables among its items.
        receiver: takes the frames.

    Attributes:
        number: what it was opened under; None before.
    """

    def __init__(self, listener: Listener, peer: str, address: str, inbox: Inbox[Any], receiver: Receiver) -> None:
        self.peer = peer
        self.address = address
        self.number: int | None = None
        self._listener = listener
        self._inbox = inbox
        self._receiver = receiver
        limits = {kind: min(limit, SMALL_BYTES) for kind, limit in receiver.limits.items()}
        self._prompt = Connection(inbox, limits, self._on_small, self.lose, self._end)
        self._bulk: socket.socket | None = None
        #: Why the link is lost.
        self._broken: str | None = None
        self._is_closed = False
        self._breaking = threading.Lock()
        #: Of its two connections, those on which nothing more comes.
        self._num_ended = 0
        #: Large frames; None: there will be no more.
        self._large: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_large, name=f"send to {peer}", daemon=True)
        try:
            threading.Thread(target=self._open, name=f"open link to {peer}", daemon=True).start()
        except RuntimeError as error:  # there are too many
            self.lose(f"no link could be opened: {error}")

    def send(self, frame: Frame) -> None:
        """Queues a frame; it goes out with `flush` at the latest, or fails then where the link is lost."""
        if len(frame.payload) > SMALL_BYTES and not self._is_closed:
            self._large.put(frame)
        else:
            self._prompt.add(frame)

    def flush(self) -> None:
        """Sends what is queued."""
        self._prompt.flush()

    # ---- opening and ending

    def _open(self) -> None:
        try:
            prompt, bulk, number = open_channels(self._listener, self.peer, self.address)
        except LinkError as error:
            self.lose(str(error))
            return
        except Exception as error:
            logger.exception("opening the link to %s failed", self.peer)
            self.lose(f"no link could be opened: {error}")
            return
        try:
            bulk.setblocking(True)
            self._bulk = bulk
            self._sender.start()
            threading.Thread(target=self._receive_large, name=f"receive from {self.peer}", daemon=True).start()
        except (OSError, RuntimeError) as error:
            prompt.close()
            self.lose(f"no link could be opened: {error}")
            return
        self._inbox.put(functools.partial(self._opened, prompt, number))

    def _opened(self, prompt: socket.socket, number: int) -> None:
        self.number = number
        self._prompt.open(prompt)
        if self._prompt.is_open:
            self._receiver.on_open(self)

    def _end(self, reason: str) -> None:
        """Notes that nothing more comes on a connection; what the peer sent before its end still counts."""
        with self._breaking:
            self._num_ended += 1
            is_over = self._num_ended > 1
        if is_over:
            self.lose(reason)
            return
        timer = threading.Timer(_LAST_FRAMES_SECONDS, self.lose, [reason])
        timer.daemon = True
        timer.start()

    def lose(self, reason: str) -> None:
        """Gives it up. Any thread; the first reason counts."""
        with self._breaking:
            if self._broken is not None:
                return
            self._broken = reason
            if self._bulk is not None:
                with contextlib.suppress(OSError):
                    self._bulk.shutdown(socket.SHUT_RDWR)  # ends the threads' waits
        # No more than that: peers end with their slices too, and what waits for this one fails with the reason.
        logger.info("link to %s: %s", self.peer, reason)
        self._receiver.on_lost(self, reason)
        self._inbox.put(lambda: self._close(reason))

    def _close(self, reason: str) -> None:
        self._is_closed = True
        self._large.put(None)
        if self._sender.ident is None:  # it was never open
            self._send_large()  # what is queued fails
        self._prompt.close(reason)

    # ---- small frames

    def _on_small(self, header: Header, payload: bytearray) -> None:
        self._receiver.on_frame(self.peer, header, payload)

    # ---- large frames

    def _send_large(self) -> None:
        while (frame := self._large.get()) is not None:
            if self._broken is None:
                assert self._bulk is not None
                try:
                    header = Header(frame.kind, frame.label, len(frame.payload))
                    self._bulk.sendall(encode_header(header), socket.MSG_MORE)
                    self._bulk.sendall(frame.payload)
                except OSError as error:
                    self.lose(f"sending failed: {error}")
            if frame.on_sent is not None:
                frame.on_sent(self._broken)
            del frame  # its memory may be needed

    def _receive_large(self) -> None:
        assert self._bulk is not None
        head = memoryview(bytearray(HEADER_BYTES))
        try:
            while _fill(self._bulk, head):
                header = decode_header(head, self._receiver.limits)
                if header.size <= SMALL_BYTES:
                    raise FrameError(f"it sent {header.size} bytes where only large frames go")
                payload, view = self._receiver.allocate(header.size)
                if not _fill(self._bulk, view):
                    break
                self._receiver.on_frame(self.peer, header, payload)
                del payload, view
            self._end("the connection was closed")
        except OSError as error:
            self._end(f"the connection broke: {error}")
        except FrameError as error:
            self.lose(str(error))
        except Exception as error:  # no memory for it, or a bug of ours: nobody else would notice
            logger.exception("receiving from %s failed", self.peer)
            self.lose(f"receiving failed: {error}")
        self._sender.join()
        self._bulk.close()


def _fill(connection: socket.socket, view: memoryview) -> bool:
    """Fills `view`; returns False if the connection ends before."""
    done = 0
    while done < len(view):
        size = connection.recv_into(view[done:], 0, socket.MSG_WAITALL)
        if not size:
            return False
        done += size
    return True
