"""The data plane: values between executors, over gloo pairs, without the controller.

A link is one gloo pair. Either end sends messages in the order in which its values are ready: a header of fixed size
(a small payload rides inside it), then the payload. The receiver always drains its end, so that no order of sends can
deadlock; it holds what arrived until the run that needs it is there. gloo moves bytes with no GIL held.
"""

from __future__ import annotations

import json
import logging
import queue
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore

from torchways.errors import Failure
from torchways.ids import RunId

logger = logging.getLogger(__name__)

#: Bytes of a header message; a payload that fits behind the fields rides inside.
_HEADER_BYTES = 4096
_FIELDS = struct.Struct("<BQQQ")  # kind, run_id, edge_id, payload bytes
_VALUE, _FAILURE = 0, 1
_HEADER_TAG, _PAYLOAD_TAG = 0, 1
#: Both ends load a program at about the same time; compiling happens elsewhere.
_CONNECT_TIMEOUT = timedelta(seconds=120)
#: A peer may compute for hours between messages; one that dies closes the connection, which ends the wait at once.
_RECEIVE_TIMEOUT = timedelta(days=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A value to send: `read` waits for it and returns it as a CPU tensor, or it is a failure."""

    run_id: RunId
    edge_id: int
    read: Callable[[], torch.Tensor] | None
    failure: Failure | None
    on_sent: Callable[[Failure | None], None]


class DataPlane:
    """This executor's end of all its links.

    Args:
        executor_id: this executor.
        host: address to listen on.
        on_arrived: called on a receiver thread with (run_id, edge_id, bytes or None, failure or None).
        on_lost: called with (peer, reason) when a link breaks.
    """

    def __init__(
        self,
        executor_id: str,
        host: str,
        on_arrived: Callable[[RunId, int, torch.Tensor | None, Failure | None], None],
        on_lost: Callable[[str, str], None],
    ) -> None:
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
        """Sends a value when the link is up and the value ready."""
        self._links[peer].outgoing.put(outgoing)

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
        self.outgoing: queue.SimpleQueue[Outgoing] = queue.SimpleQueue()
        self._rank = 0 if plane.executor_id < peer else 1
        self._group: Any = None
        self._broken: str | None = None
        #: The link is up, or broken.
        self._settled = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name=f"send to {peer}", daemon=True).start()

    def _run(self) -> None:
        threading.Thread(target=self._try_open, name=f"connect to {self.peer}", daemon=True).start()
        # Neither the store nor gloo notices a peer that dies before the link is up: they retry until their timeout.
        while not self._settled.wait(timeout=1.0):
            if not _listens(self.address):
                self._lose("it is gone")
        header = torch.zeros(_HEADER_BYTES, dtype=torch.uint8)
        while True:
            outgoing = self.outgoing.get()
            failure = None
            try:
                if self._broken is None:
                    self._send(outgoing, header)
            except Exception as error:
                self._lose(f"sending failed: {error}")
            if self._broken is not None:
                failure = Failure(kind="ExecutorLost", message=f"executor {self.peer} is lost ({self._broken})")
            outgoing.on_sent(failure)

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
        return ProcessGroupGloo(store, self._rank, 2, options)

    def _send(self, outgoing: Outgoing, header: torch.Tensor) -> None:
        kind, payload = _VALUE, torch.empty(0, dtype=torch.uint8)
        if outgoing.failure is not None:
            kind, payload = _FAILURE, _bytes_tensor(json.dumps(asdict(outgoing.failure)).encode())
        elif outgoing.read is not None:
            payload = outgoing.read().contiguous().reshape(-1).view(torch.uint8)
        size = payload.numel()
        fields = _FIELDS.pack(kind, outgoing.run_id, outgoing.edge_id, size)
        header[: len(fields)] = _bytes_tensor(fields)
        inside = size <= _HEADER_BYTES - len(fields)
        if inside and size:
            header[len(fields) : len(fields) + size] = payload
        other = 1 - self._rank
        self._group.send([header], other, _HEADER_TAG).wait(_RECEIVE_TIMEOUT)
        if not inside:
            self._group.send([payload], other, _PAYLOAD_TAG).wait(_RECEIVE_TIMEOUT)

    def _receive_all(self) -> None:
        header = torch.zeros(_HEADER_BYTES, dtype=torch.uint8)
        other = 1 - self._rank
        try:
            while True:
                self._group.recv([header], other, _HEADER_TAG).wait(_RECEIVE_TIMEOUT)
                raw = header.numpy().tobytes()
                kind, run_id, edge_id, size = _FIELDS.unpack_from(raw)
                payload = torch.empty(size, dtype=torch.uint8)
                if size <= _HEADER_BYTES - _FIELDS.size:
                    payload.copy_(header[_FIELDS.size : _FIELDS.size + size])
                else:
                    self._group.recv([payload], other, _PAYLOAD_TAG).wait(_RECEIVE_TIMEOUT)
                if kind == _FAILURE:
                    failure = Failure(**json.loads(payload.numpy().tobytes()))
                    self.plane.on_arrived(RunId(run_id), edge_id, None, failure)
                else:
                    self.plane.on_arrived(RunId(run_id), edge_id, payload, None)
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


def _listens(address: str) -> bool:
    """Whether something accepts connections there: an executor's store does from before it is announced."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
