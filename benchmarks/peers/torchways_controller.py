"""torchways, one controller: the dispatch benchmark of Figure 5 of the Pathways paper.

The protocol and what is measured: protocol.py. A host is an island of one CPU device: on CPU no XLA computation spans
processes, so what is one SPMD computation on a TPU island is here one compiled function on each island, and the
all-reduce is an edge of the dataflow program between islands (`tw.all_reduce`). How the modes map:

    op       one call of a `tw.program` of one compiled function a host; calls are not waited for, unless `--wait` has
             every result read before the next call.
    chained  one call of a program of `chain` compiled functions a host.
    fused    one call of a program of one compiled function a host, of `chain` additions. With a collective it is
             unsupported: an all-reduce between islands is an edge and cannot be inside a compiled function.
    work     as op, with `loops` matrix products in each function.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import protocol
from protocol import MATRIX, Kind, Unsupported

# For the executors: one host computes on one thread, as the other systems' hosts do.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import torch

import torchways as tw

_READ_TIMEOUT = timedelta(minutes=5)


def _add_many(count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def add(x: torch.Tensor) -> torch.Tensor:
        for _ in range(count):
            x = x + 1
        return x

    return add


def _work(loops: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def work(x: torch.Tensor, ones: torch.Tensor) -> torch.Tensor:
        """Adds 1, by way of the products: all-ones matrices over their side stay all ones."""
        m = ones
        for _ in range(loops):
            m = (m @ ones) * (1 / MATRIX)
        return x + m.max()

    return work


class ProgramLoop:
    """The loop of every mode: one call of a program for each user-level call."""

    def __init__(self, program: Callable[..., Any], meshes: list[Any], extra: list[Any], is_waiting: bool) -> None:
        self._program = program
        self._is_waiting = is_waiting
        self._meshes = meshes
        self._extra = extra
        self._xs: list[Any] = []

    def start(self) -> None:
        self._xs = [tw.distribute_tensor(torch.tensor(float(h)), mesh) for h, mesh in enumerate(self._meshes)]
        self.values()

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self._xs = self._program(self._xs, *self._extra)
            if self._is_waiting:
                self.values()
        self.values()

    def values(self) -> list[float]:
        return [x.item() for x in tw.get(self._xs, timeout=_READ_TIMEOUT)]


class Torchways:
    version = f"torchways {tw.__version__}"

    def __init__(self, hosts: int, is_waiting: bool) -> None:
        self.hosts = hosts
        self._is_waiting = is_waiting
        names = ("host",)
        self._meshes = [tw.init_device_mesh((1,), mesh_dim_names=names, island=h) for h in range(hosts)]

    def prepare(self, kind: Kind) -> ProgramLoop:
        if kind.mode == "work":
            return self._prepare_work(kind)
        if kind.collective and kind.mode == "fused":
            raise Unsupported("an all-reduce between islands is an edge of the program, not part of a function")
        if kind.collective and self.hosts == 1:
            raise Unsupported("no collective with one host")
        nodes, adds = (1, kind.chain) if kind.mode == "fused" else (kind.chain, 1)
        adders = [tw.function(_add_many(adds), mesh=mesh) for mesh in self._meshes]
        means = [tw.function(lambda x: x / self.hosts + 1, mesh=mesh) for mesh in self._meshes]

        @tw.program
        def chain(xs: list[torch.Tensor]) -> list[torch.Tensor]:
            for _ in range(nodes):
                if kind.collective:
                    xs = [mean(total) for mean, total in zip(means, tw.all_reduce(xs), strict=True)]
                else:
                    xs = [add(x) for add, x in zip(adders, xs, strict=True)]
            return xs

        return ProgramLoop(chain, self._meshes, [], self._is_waiting)

    def _prepare_work(self, kind: Kind) -> ProgramLoop:
        functions = [tw.function(_work(kind.loops), mesh=mesh) for mesh in self._meshes]

        @tw.program
        def step(xs: list[torch.Tensor], ones: list[torch.Tensor]) -> list[torch.Tensor]:
            return [function(x, m) for function, x, m in zip(functions, xs, ones, strict=True)]

        ones = [tw.distribute_tensor(torch.ones(MATRIX, MATRIX), mesh) for mesh in self._meshes]
        return ProgramLoop(step, self._meshes, [ones], False)


@contextmanager
def open_peer(hosts: int, is_waiting: bool) -> Iterator[Torchways]:
    with tw.init(islands=hosts, devices_per_island=1):
        yield Torchways(hosts, is_waiting)


if __name__ == "__main__":
    parser = protocol.argument_parser(__doc__)
    parser.add_argument("--wait", action="store_true", help="read every result before the next call")
    arguments = parser.parse_args()
    protocol.serve(lambda: open_peer(arguments.hosts, arguments.wait))
