"""The data plane: values between executors, over gloo pairs, without the controller.

A link is one gloo pair. What is small and ready at the same time goes in one frame; a large value follows its frame as
a message of its own, straight from where it lies. Sends are queued in the order in which values are ready and never
block; the receiver always drains its end, so that no order of sends can deadlock. gloo moves bytes with no GIL held.
"""

from __future__ import annotations

import collections
import json
import logging
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
from torchways.ids import RunId

logger = logging.getLogger(__name__)

#: Most bytes of a frame.
_FRAME_BYTES = 64 << 10
#: A larger value is a message of its own.
_INLINE_BYTES = 4096
_MAX_ENTRY_BYTES = 16 << 10
_COUNT = struct.Struct("<I")
_ENTRY = struct.Struct("<BBQQQ")  # kind, phase, run_id, edge_id, bytes
_VALUE, _FAILURE = 0, 1
_FRAME_TAG, _VALUE_TAG = 0, 1
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
    """This executor's end of all its links.

    Args:
        executor_id: this executor.
        host: address to listen on.
        on_arrived: called on a receiver thread for each value; `phase` is the sender's.
        on_lost: called with (peer, reason) when a link breaks.
    """

    def __init__(self, executor_id: str, host: str, on_arrived: OnArrived, on_lost: Callable[[str, str], None]) -> None:
        self.executor_id = executor_id
        self.host = host
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
        for link in list(self._links.values()):
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
        self._other = 1 if plane.executor_id < peer else 0
        self._group: Any = None
        self._broken: str | None = None
        #: What was not given to gloo yet.
        self._queued: collections.deque[Outgoing] = collections.deque()
        #: What gloo works on: its handle, the tensor it reads, and what to call behind it.
        self._under_way: collections.deque[tuple[Any, torch.Tensor, list[Outgoing]]] = collections.deque()
        self._sent = threading.Condition()
        #: The link is up, or broken.
        self._settled = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name=f"send to {peer}", daemon=True).start()

    # ---- sending

    def send(self, outgoing: Outgoing) -> None:
        """Queues a value."""
        self._queued.append(outgoing)

    def flush(self) -> None:
        """Gives what is queued to gloo, or fails it where the link is broken."""
        if not self._queued or not self._settled.is_set():
            return
        try:
            with self._lock:
                while self._queued and self._broken is None:
                    self._send_frame()
        except Exception as error:
            self._lose(f"sending failed: {error}")
        if self._broken is not None:
            self._fail_all()

    def _send_frame(self) -> None:
        frame = bytearray(_COUNT.size)
        inside: list[Outgoing] = []
        large: Outgoing | None = None
        while self._queued and large is None and len(frame) + _ENTRY.size + _MAX_ENTRY_BYTES <= _FRAME_BYTES:
            item = self._queued.popleft()
            data = b""
            if isinstance(item.value, Failure):
                kind, data = _FAILURE, _failure_bytes(item.value)
                size = len(data)
            else:
                kind, size = _VALUE, item.value.numel() * item.value.element_size()
                if size <= _INLINE_BYTES:
                    data = _as_bytes(item.value).numpy().tobytes()
                else:
                    large = item
            frame += _ENTRY.pack(kind, item.phase, item.run_id, item.edge_id, size)
            frame += data
            if item is not large:
                inside.append(item)
        _COUNT.pack_into(frame, 0, len(inside) + (large is not None))
        self._start(torch.frombuffer(frame, dtype=torch.uint8), _FRAME_TAG, inside)
        if large is not None:
            assert isinstance(large.value, torch.Tensor)
            self._start(_as_bytes(large.value), _VALUE_TAG, [large])

    def _start(self, data: torch.Tensor, tag: int, items: list[Outgoing]) -> None:
        with self._sent:
            self._under_way.append((self._group.send([data], self._other, tag), data, items))
            self._sent.notify()

    def _run(self) -> None:
        """Opens the link; then waits for what gloo sends, in order."""
        threading.Thread(target=self._try_open, name=f"connect to {self.peer}", daemon=True).start()
        # Neither the store nor gloo notices a peer that dies before the link is up: they retry until their timeout.
        while not self._settled.wait(timeout=1.0):
            if not _listens(self.address):
                self._lose("it is gone")
        self.flush()
        while True:
            with self._sent:
                while not self._under_way:
                    self._sent.wait()
                work, _, items = self._under_way[0]
            failure = None
            try:
                work.wait(_RECEIVE_TIMEOUT)
            except Exception as error:
                self._lose(f"sending failed: {str(error).splitlines()[0]}")
            if self._broken is not None:
                failure = self._failure()
            self._under_way.popleft()
            _tell(items, failure)

    def _fail_all(self) -> None:
        while self._queued:
            _tell([self._queued.popleft()], self._failure())

    def _failure(self) -> Failure:
        return Failure(kind="ExecutorLost", message=f"executor {self.peer} is lost ({self._broken})")

    # ---- opening and receiving

    def _try_open(self) -> None:
        try:
            self._group = self._open()
        except Exception as error:
            self._lose(f"no link could be opened: {str(error).splitlines()[0]}")
            return
        threading.Thread(target=self._receive_all, name=f"receive from {self.peer}", daemon=True).start()
        self._settled.set()

    def _open(self) -> Any:
        names = sorted((self.plane.executor_id, self.peer))
        store = PrefixStore(f"link/{names[0]}/{names[1]}", self.plane.store_for(self.peer, self.address))
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=self.plane.host)]
        options._timeout = _CONNECT_TIMEOUT
        return ProcessGroupGloo(store, 1 - self._other, 2, options)

    def _receive_all(self) -> None:
        frame = torch.zeros(_FRAME_BYTES, dtype=torch.uint8)
        view = memoryview(frame.numpy())  # type: ignore[arg-type]
        try:
            while True:
                self._group.recv([frame], self._other, _FRAME_TAG).wait(_RECEIVE_TIMEOUT)
                offset = _COUNT.size
                for _ in range(_COUNT.unpack_from(view)[0]):
                    kind, phase, run_id, edge_id, size = _ENTRY.unpack_from(view, offset)
                    offset += _ENTRY.size
                    if kind == _VALUE and size > _INLINE_BYTES:
                        value = torch.empty(size, dtype=torch.uint8)
                        self._group.recv([value], self._other, _VALUE_TAG).wait(_RECEIVE_TIMEOUT)
                        self.plane.on_arrived(self.peer, RunId(run_id), edge_id, phase, value)
                        continue
                    data = bytearray(view[offset : offset + size])
                    offset += size
                    self.plane.on_arrived(self.peer, RunId(run_id), edge_id, phase, _unpacked(kind, data))
        except Exception as error:
            self._lose(f"the connection broke: {str(error).splitlines()[0]}")

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self._broken is not None:
                return
            self._broken = reason
        self._settled.set()
        logger.warning("link to executor %s: %s", self.peer, reason)
        self.plane.on_lost(self.peer, reason)


def _unpacked(kind: int, data: bytearray) -> torch.Tensor | Failure:
    if kind == _FAILURE:
        return Failure(**json.loads(data))
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _failure_bytes(failure: Failure) -> bytes:
    data = json.dumps(asdict(failure)).encode()
    if len(data) > _MAX_ENTRY_BYTES:  # long texts: their beginning and their end say most
        short = replace(failure, message=failure.message[:2000], traceback=failure.traceback[-2000:])
        data = json.dumps(asdict(short)).encode()
    return data


def _tell(items: list[Outgoing], failure: Failure | None) -> None:
    for item in items:
        if item.on_sent is not None:
            item.on_sent(failure)


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
