"""Simulated devices as a `Runtime`: values by plain PyTorch, time and order by the island's device simulator.

It shows what cannot be shown on one machine with CPU devices: computations that span several host processes, and
device queues that deadlock if hosts disagree on the order. Every host computes the whole value.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from torchways.addresses import host_and_port
from torchways.errors import InternalError
from torchways.graphs import deserialize_graph, run_graph
from torchways.runtime.base import BufferSpec, OnDevice
from torchways.runtime.device_simulator import SECRET_VARIABLE

#: How long each simulated computation takes at least, seconds.
SECONDS_VARIABLE = "TORCHWAYS_SIMULATED_SECONDS"
#: Floating-point operations of matrix products that a simulated device does in a second; those of a computation are
#: added to its time. Without it, products take no time.
FLOPS_VARIABLE = "TORCHWAYS_SIMULATED_FLOPS"
_ENQUEUE_SECONDS = 60.0


@dataclass(slots=True)
class _Computation:
    done: bool = False
    callbacks: list[Callable[[], None]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _Executable:
    """A graph, and how long its computation takes."""

    graph: torch.fx.Graph
    seconds: float


@dataclass(slots=True)
class _Buffer:
    value: torch.Tensor
    computation: _Computation | None = None

    def numel(self) -> int:
        return self.value.numel()

    def element_size(self) -> int:
        return self.value.element_size()


class SimulatedRuntime:
    """One host's part of a set of devices.

    Args:
        address: host:port of the island's device simulator.
        set_name: tells the computations of one set of devices from those of another.
        devices: this host's, by the island's numbers.
        num_hosts: hosts of the set.
    """

    shares_memory = True

    def __init__(self, address: str, set_name: str, devices: Sequence[int], num_hosts: int) -> None:
        self._socket = socket.create_connection(host_and_port(address))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(os.environ.pop(SECRET_VARIABLE).encode() + b"\n")
        self._set_name = set_name
        self._devices = list(devices)
        self._num_hosts = num_hosts
        self._seconds = float(os.environ.get(SECONDS_VARIABLE, "0"))
        self._flops = float(os.environ.get(FLOPS_VARIABLE, "inf")) * len(self._devices) * num_hosts
        self._acknowledged: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._computations: dict[str, _Computation] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._read, name="device simulator", daemon=True).start()

    def _read(self) -> None:
        with self._socket.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if "enqueued" in message:
                    self._acknowledged.put(message["enqueued"])
                    continue
                with self._lock:
                    computation = self._computations.pop(message["done"])
                    computation.done = True
                for callback in computation.callbacks:
                    callback()

    def put(self, host: torch.Tensor, spec: BufferSpec) -> _Buffer:
        """See `Runtime.put`."""
        return _Buffer(host.clone())

    def fill(self, spec: BufferSpec, value: float) -> _Buffer:
        """See `Runtime.fill`."""
        return _Buffer(torch.full(spec.shape, value, dtype=spec.torch_dtype))

    def compile(
        self,
        graph: bytes,
        inputs: Sequence[BufferSpec],
        outputs: Sequence[BufferSpec],
        donated: Sequence[int],
        on_device: OnDevice,
    ) -> _Executable:
        """See `Runtime.compile`."""
        read = deserialize_graph(graph)
        return _Executable(read, self._seconds + count_flops(read) / self._flops)

    def execute(
        self, executable: _Executable, inputs: Sequence[_Buffer], gang_key: str
    ) -> tuple[list[_Buffer], Sequence[_Buffer]]:
        """Puts a computation into the device queues; see `Runtime.execute`.

        Raises:
            InternalError: the simulator does not answer.
        """
        key = f"{self._set_name}:{gang_key}"
        computation = _Computation()
        with self._lock:
            self._computations[key] = computation
        message = {"enqueue": key, "devices": self._devices, "parts": self._num_hosts, "seconds": executable.seconds}
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        values = run_graph(executable.graph, *(buffer.value for buffer in inputs))
        try:
            self._acknowledged.get(timeout=_ENQUEUE_SECONDS)
        except queue.Empty:
            raise InternalError("the device simulator does not answer") from None
        outputs = [_Buffer(value, computation) for value in values]
        return outputs, outputs

    def has_room(self, wake: Callable[[], None]) -> bool:
        """See `Runtime.has_room`: its queues have no end."""
        return True

    def on_ready(self, buffers: Sequence[_Buffer], callback: Callable[[], None]) -> None:
        """See `Runtime.on_ready`."""
        computation = buffers[0].computation
        with self._lock:
            if computation is not None and not computation.done:
                computation.callbacks.append(callback)
                return
        callback()

    def progress(self) -> bool:
        """See `Runtime.progress`: the simulator calls back by itself."""
        return False

    def to_host(self, buffer: _Buffer) -> torch.Tensor:
        """See `Runtime.to_host`."""
        return buffer.value

    def fallback_counters(self) -> dict[str, int]:
        """See `Runtime.fallback_counters`: there is nothing to fall back from."""
        return {}

    def lowered_ops(self) -> list[str]:
        """See `Runtime.lowered_ops`: all."""
        names: list[Any] = torch._C._dispatch_get_all_op_names()
        return [str(name) for name in names]


def count_flops(graph: torch.fx.Graph) -> int:
    """Returns the floating-point operations of a graph, by the formulas of PyTorch's flop counter."""

    def value_of(node: torch.fx.Node) -> Any:
        return node.meta["val"]

    found = 0
    for node in graph.nodes:
        count = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if count is not None:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value_of)
            found += count(*args, **kwargs, out_val=node.meta["val"])
    return found
