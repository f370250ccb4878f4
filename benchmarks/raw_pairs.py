"""Two bare processes that exchange bytes over gloo, TCP, or an executor's data plane without an executor."""

from __future__ import annotations

import collections
import multiprocessing
import multiprocessing.connection
import socket
import time
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from torchways.errors import Failure
from torchways.executor.transfer import DataPlane, Outgoing
from torchways.ids import RunId
from torchways.link.inbox import Inbox

_TIMEOUT = timedelta(seconds=60)


class Pair(Protocol):
    """One end of a connection. Buffers are reused, so memory is touched for the first time before the clock runs."""

    def send(self, data: torch.Tensor) -> None:
        """Sends a flat uint8 tensor; returns when it may be changed."""

    def receive(self, data: torch.Tensor) -> None:
        """Fills a flat uint8 tensor."""


class GlooPair:
    """A two-rank gloo group."""

    def __init__(self, rank: int, port: int) -> None:
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=_TIMEOUT)
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = _TIMEOUT
        self._other = 1 - rank
        self._group = ProcessGroupGloo(PrefixStore("pair", store), rank, 2, options)

    def send(self, data: torch.Tensor) -> None:
        """See `Pair`."""
        self._group.send([data], self._other, 0).wait()

    def receive(self, data: torch.Tensor) -> None:
        """See `Pair`."""
        self._group.recv([data], self._other, 0).wait()


class TcpPair:
    """A TCP connection over loopback."""

    def __init__(self, rank: int, port: int) -> None:
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=_TIMEOUT)
        if rank == 0:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                store.set("tcp", str(listener.getsockname()[1]))
                self._socket, _ = listener.accept()
        else:
            self._socket = socket.create_connection(("127.0.0.1", int(store.get("tcp"))))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: torch.Tensor) -> None:
        """See `Pair`."""
        self._socket.sendall(memoryview(data.numpy()))

    def receive(self, data: torch.Tensor) -> None:
        """See `Pair`."""
        view = memoryview(data.numpy())
        done = 0
        while done < len(view):
            done += self._socket.recv_into(view[done:])


class DataPlanePair:
    """The ends of a link between two executors' data planes, driven by this thread as an engine drives them."""

    def __init__(self, rank: int, port: int) -> None:
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=_TIMEOUT)
        self._inbox: Inbox[Any] = Inbox()
        self._arrived: collections.deque[torch.Tensor] = collections.deque()
        self._plane = DataPlane(f"e{rank}", "127.0.0.1", bytes(32), self._inbox, self._on_arrived, self._on_lost)
        self._peer = f"e{1 - rank}"
        store.set(f"plane{rank}", self._plane.address)
        self._plane.connect(self._peer, store.get(f"plane{1 - rank}").decode())

    def _on_arrived(self, _peer: str, _run: RunId, _edge: int, _phase: int, value: torch.Tensor | Failure) -> None:
        assert isinstance(value, torch.Tensor)
        self._arrived.append(value)
        self._inbox.put(lambda: None)

    def _on_lost(self, peer: str, reason: str) -> None:
        raise RuntimeError(f"the link to {peer} is lost: {reason}")

    def send(self, data: torch.Tensor) -> None:
        """See `Pair`; returns when it is on its way, as a link never blocks."""
        self._plane.send(self._peer, Outgoing(run_id=RunId(1), edge_id=0, phase=0, value=data))
        self._plane.flush()

    def receive(self, data: torch.Tensor) -> None:
        """Takes the next value, into memory of its own: an executor gives that to the device."""
        deadline = time.monotonic() + _TIMEOUT.total_seconds()
        while not self._arrived:
            if time.monotonic() > deadline:
                raise TimeoutError("nothing came over the data plane")
            self._inbox.wait(1.0)
            while (item := self._inbox.take()) is not None:
                item()
        assert self._arrived.popleft().numel() == data.numel()


_KINDS: dict[str, type[Any]] = {"gloo": GlooPair, "tcp": TcpPair, "data plane": DataPlanePair}


class RawPair:
    """A process and this one, connected by gloo, by TCP and by a data plane."""

    def __init__(self) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_answer, args=(self._store.port, child), daemon=True)
        self._process.start()
        self._pairs: dict[str, Pair] = {kind: make(0, self._store.port) for kind, make in _KINDS.items()}

    def latency(self, kind: str, size: int, count: int) -> float:
        """Returns half of a round trip of `size` bytes, seconds, the mean over `count` trips."""
        pair, data = self._pairs[kind], torch.ones(size, dtype=torch.uint8)
        self._pipe.send((kind, "echo", size, count))
        started = time.perf_counter()
        for _ in range(count):
            pair.send(data)
            pair.receive(data)
        return (time.perf_counter() - started) / (2 * count)

    def bandwidth(self, kind: str, size: int, count: int) -> float:
        """Returns bytes a second of `count` messages of `size` bytes one way, until the last is acknowledged."""
        pair, data = self._pairs[kind], torch.ones(size, dtype=torch.uint8)
        self._pipe.send((kind, "sink", size, count))
        started = time.perf_counter()
        for _ in range(count):
            pair.send(data)
        pair.receive(torch.empty(1, dtype=torch.uint8))
        return size * count / (time.perf_counter() - started)

    def close(self) -> None:
        """Ends the other process."""
        self._pipe.send(None)
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()


def _answer(port: int, pipe: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    pairs: dict[str, Pair] = {kind: make(1, port) for kind, make in _KINDS.items()}
    while (order := pipe.recv()) is not None:
        kind, what, size, count = order
        pair, data = pairs[kind], torch.ones(size, dtype=torch.uint8)
        for _ in range(count):
            pair.receive(data)
            if what == "echo":
                pair.send(data)
        if what == "sink":
            pair.send(torch.ones(1, dtype=torch.uint8))
