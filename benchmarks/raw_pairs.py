"""Two bare processes that exchange bytes over gloo or TCP: what the transfer benchmark compares with."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import socket
import time
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

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


_KINDS: dict[str, type[Any]] = {"gloo": GlooPair, "tcp": TcpPair}


class RawPair:
    """A process and this one, connected both by gloo and by TCP."""

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
