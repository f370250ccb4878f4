"""The data plane: values between executors, without the controller.

A link is a socket and a gloo pair. Small values go through the socket, straight from and to the engine's thread: what
is ready at the same time goes in one write. A large value is announced there and follows over gloo, from where it lies
and with no GIL held. Values go in the order in which they are ready, and no send ever blocks; the receiver always
drains its end, so that no order of sends can deadlock.
"""

from __future__ import annotations

import collections
import json
import logging
import queue
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, TypeAlias

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore

from torchways.errors import Failure
from torchways.executor.inbox import Inbox
from torchways.ids import RunId

logger = logging.getLogger(__name__)

#: A larger value goes over gloo.
_INLINE_BYTES = 64 << 10
_MAX_FAILURE_BYTES = 16 << 10
_READ_BYTES = 256 << 10
_ENTRY = struct.Struct("<BBQQQ")  # kind, phase, run_id, edge_id, bytes
_VALUE, _LARGE_VALUE, _FAILURE = 0, 1, 2
#: Both ends load a program at about the same time; compiling happens elsewhere.
_CONNECT_TIMEOUT = timedelta(seconds=120)
#: A peer may compute for hours between messages; one that dies closes the connection, which ends the wait at once.
_RECEIVE_TIMEOUT = timedelta(days=30)

#: Called with (peer, run, edge, phase, bytes or failure).
OnArrived: TypeAlias = Callable[[str, RunId, int, int, "torch.Tensor | Failure"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A value to send: a CPU tensor that must not change until `on_sent` (called on some thread), or a failure."""

    run_id: RunId
    edge_id: int
    phase: int
    value: torch.Tensor | Failure
    on_sent: Callable[[Failure | None], None] | None = None


class DataPlane:
    """This executor's end of all its links. All methods are for the thread that waits at the inbox.

    Args:
        executor_id: this executor.
        host: address to listen on.
        inbox: where that thread waits; callables among its items are called.
        on_arrived: called for each value, of a large one on another thread; `phase` is the sender's.
        on_lost: called with (peer, reason), on some thread, when a link breaks.
    """

    def __init__(
        self,
        executor_id: str,
        host: str,
        inbox: Inbox[Any],
        on_arrived: OnArrived,
        on_lost: Callable[[str, str], None],
    ) -> None:
        self.executor_id = executor_id
        self.host = host
        self.inbox = inbox
        self.on_arrived = on_arrived
        self.on_lost = on_lost
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_CONNECT_TIMEOUT)
        self.address = f"{host}:{self._store.port}"
        self._links: dict[str, _Link] = {}

    def connect(self, peer: str, address: str) -> None:
        """Opens the link to a peer in the background, if there is none."""
        if peer not in self._links:
            self._links[peer] = _Link(self, peer, address)

    def send(self, peer: str, outgoing: Outgoing) -> None:
        """Queues a value; it goes out with `flush` at the latest."""
        self._links[peer].send(outgoing)

    def flush(self) -> None:
        """Sends what is queued, small values together."""
        for link in self._links.values():
            link.flush()

    def store_for(self, peer: str, address: str) -> Store:
        """Returns the store of the end that hosts the link's rendezvous: the lexicographically smaller id."""
        if self.executor_id < peer:
            return self._store
        host, _, port = address.rpartition(":")
        return TCPStore(host, int(port), is_master=False, timeout=_CONNECT_TIMEOUT)


class _Link:
    def __init__(self, plane: DataPlane, peer: str, address: str) -> None:
        self.plane = plane
        self.peer = peer
        self.address = address
        self._is_host = plane.executor_id < peer
        self._other = 1 if self._is_host else 0
        self._group: Any = None
        self._socket: socket.socket | None = None
        self._broken: str | None = None
        self._breaking = threading.Lock()
        #: The link is up, or broken.
        self._settled = threading.Event()
        #: What was not written yet: before the link is up, and bytes that the socket did not take.
        self._queued: collections.deque[Outgoing] = collections.deque()
        self._unwritten = bytearray()
        self._unread = bytearray()
        self._read_buffer = memoryview(bytearray(_READ_BYTES))
        #: What gloo works on: its handle, the tensor it reads, and what to call behind it.
        self._sending: queue.SimpleQueue[tuple[Any, torch.Tensor, Outgoing]] = queue.SimpleQueue()
        #: Large values that were announced.
        self._announced: queue.SimpleQueue[tuple[int, RunId, int, int]] = queue.SimpleQueue()
        threading.Thread(target=self._open, name=f"connect to {peer}", daemon=True).start()
        threading.Thread(target=self._guard_opening, name=f"await {peer}", daemon=True).start()

    # ---- opening and breaking

    def _open(self) -> None:
        try:
            names = sorted((self.plane.executor_id, self.peer))
            store = PrefixStore(f"link/{names[0]}/{names[1]}", self.plane.store_for(self.peer, self.address))
            self._socket = self._open_socket(store)
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [ProcessGroupGloo.create_device(hostname=self.plane.host)]
            options._timeout = _CONNECT_TIMEOUT
            self._group = ProcessGroupGloo(store, 1 - self._other, 2, options)
        except Exception as error:
            self._lose(f"no link could be opened: {str(error).splitlines()[0]}")
            return
        threading.Thread(target=self._wait_sent, name=f"send to {self.peer}", daemon=True).start()
        threading.Thread(target=self._receive_large, name=f"receive from {self.peer}", daemon=True).start()
        self._settled.set()
        self.plane.inbox.put(self._start)

    def _open_socket(self, store: Store) -> socket.socket:
        timeout = _CONNECT_TIMEOUT.total_seconds()
        if self._is_host:
            with socket.create_server((self.plane.host, 0)) as listener:
                listener.settimeout(timeout)
                store.set("port", str(listener.getsockname()[1]))
                opened, _ = listener.accept()
        else:
            host = self.address.rpartition(":")[0]
            opened = socket.create_connection((host, int(store.get("port"))), timeout)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.setblocking(False)
        return opened

    def _guard_opening(self) -> None:
        # Neither the store nor gloo notices a peer that dies before the link is up: they retry until their timeout.
        while not self._settled.wait(timeout=1.0):
            if not _listens(self.address):
                self._lose("it is gone")

    def _start(self) -> None:
        if self._broken is None:
            assert self._socket is not None
            self.plane.inbox.watch(self._socket, self._on_socket, selectors.EVENT_READ)
        self.flush()

    def _lose(self, reason: str) -> None:
        with self._breaking:
            if self._broken is not None:
                return
            self._broken = reason
        self._settled.set()
        # No more than that: peers end with their slices too, and what waits for this one fails with the reason.
        logger.info("link to executor %s: %s", self.peer, reason)
        self.plane.on_lost(self.peer, reason)
        self.plane.inbox.put(self._close)

    def _close(self) -> None:
        if self._socket is not None:
            self.plane.inbox.unwatch(self._socket)
            self._socket.close()
        self.flush()

    def _failure(self) -> Failure:
        return Failure(kind="ExecutorLost", message=f"executor {self.peer} is lost ({self._broken})")

    # ---- sending

    def send(self, outgoing: Outgoing) -> None:
        """Queues a value."""
        self._queued.append(outgoing)

    def flush(self) -> None:
        """Writes what is queued, or fails it where the link is broken."""
        if not self._queued or not self._settled.is_set():
            return
        had_unwritten = bool(self._unwritten)
        while self._queued:
            item = self._queued.popleft()
            if self._broken is None:
                self._append(item)
            elif item.on_sent is not None:
                item.on_sent(self._failure())
        if self._unwritten and not had_unwritten:
            self._write()

    def _append(self, item: Outgoing) -> None:
        value = item.value
        if isinstance(value, Failure):
            kind, data = _FAILURE, _failure_bytes(value)
        else:
            size = value.numel() * value.element_size()
            if size > _INLINE_BYTES:
                self._unwritten += _ENTRY.pack(_LARGE_VALUE, item.phase, item.run_id, item.edge_id, size)
                flat = _as_bytes(value)
                try:
                    self._sending.put((self._group.send([flat], self._other, 0), flat, item))
                except Exception as error:
                    self._lose(f"sending failed: {str(error).splitlines()[0]}")
                    if item.on_sent is not None:
                        item.on_sent(self._failure())
                return
            kind, data = _VALUE, _as_bytes(value).numpy().tobytes()
        self._unwritten += _ENTRY.pack(kind, item.phase, item.run_id, item.edge_id, len(data))
        self._unwritten += data
        if item.on_sent is not None:
            item.on_sent(None)  # this is a copy of it

    def _write(self) -> None:
        if self._socket is None or self._broken is not None:
            return
        try:
            written = self._socket.send(self._unwritten)
        except BlockingIOError:
            written = 0
        except OSError as error:
            self._lose(f"sending failed: {error}")
            return
        was_waiting = written < len(self._unwritten)
        del self._unwritten[:written]
        if was_waiting:
            self.plane.inbox.watch(self._socket, self._on_socket, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def _wait_sent(self) -> None:
        """Waits for what gloo sends, in order."""
        while True:
            work, _, item = self._sending.get()
            try:
                work.wait(_RECEIVE_TIMEOUT)
            except Exception as error:
                self._lose(f"sending failed: {str(error).splitlines()[0]}")
            if item.on_sent is not None:
                item.on_sent(self._failure() if self._broken is not None else None)
            del work, item

    # ---- receiving

    def _on_socket(self, events: int) -> None:
        assert self._socket is not None
        if events & selectors.EVENT_WRITE:
            self._write()
            if not self._unwritten and self._broken is None:
                self.plane.inbox.watch(self._socket, self._on_socket, selectors.EVENT_READ)
        if events & selectors.EVENT_READ and self._broken is None:
            try:
                size = self._socket.recv_into(self._read_buffer)
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(f"the connection broke: {error}")
                return
            if not size:
                self._lose("the connection was closed")
                return
            self._read(self._read_buffer[:size])

    def _read(self, data: memoryview) -> None:
        unread = self._unread
        unread += data
        offset = 0
        while len(unread) - offset >= _ENTRY.size:
            kind, phase, run_id, edge_id, size = _ENTRY.unpack_from(unread, offset)
            if kind == _LARGE_VALUE:
                offset += _ENTRY.size
                self._announced.put((phase, RunId(run_id), edge_id, size))
                continue
            if len(unread) - offset - _ENTRY.size < size:
                break
            offset += _ENTRY.size
            content = unread[offset : offset + size]
            offset += size
            self.plane.on_arrived(self.peer, RunId(run_id), edge_id, phase, _unpacked(kind, content))
        del unread[:offset]

    def _receive_large(self) -> None:
        try:
            while True:
                phase, run_id, edge_id, size = self._announced.get()
                value = torch.empty(size, dtype=torch.uint8)
                self._group.recv([value], self._other, 0).wait(_RECEIVE_TIMEOUT)
                self.plane.on_arrived(self.peer, run_id, edge_id, phase, value)
                del value
        except Exception as error:
            self._lose(f"the connection broke: {str(error).splitlines()[0]}")


def _unpacked(kind: int, data: bytearray) -> torch.Tensor | Failure:
    if kind == _FAILURE:
        return Failure(**json.loads(data))
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _failure_bytes(failure: Failure) -> bytes:
    data = json.dumps(asdict(failure)).encode()
    if len(data) > _MAX_FAILURE_BYTES:  # long texts: their beginning and their end say most
        short = replace(failure, message=failure.message[:2000], traceback=failure.traceback[-2000:])
        data = json.dumps(asdict(short)).encode()
    return data


def _as_bytes(value: torch.Tensor) -> torch.Tensor:
    flat = value.contiguous().reshape(-1)
    return flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)


def _listens(address: str) -> bool:
    """Whether something accepts connections there: an executor's store does from before it is announced."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True
