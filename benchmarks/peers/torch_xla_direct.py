"""Plain torch-xla, one process and one host: the dispatch benchmark of Figure 5 without any layer above lazy tensors.

The protocol and what is measured: protocol.py. How the modes map:

    op       `x = x + 1` on a lazy tensor, then `torch_xla.sync()`, per call: trace, look up the compiled graph, run.
    chained  `chain` times that in one user-level call.
    fused    `chain` times `x = x + 1`, then one `torch_xla.sync()`: one graph of `chain` additions, traced per call.
             XLA folds them into one addition of `chain` (seen in its optimized HLO), as it does in every system that
             compiles with XLA: the rate is `chain` times that of one dispatch, less the tracing.
    work     `loops` products `m @ w` traced into the graph of `x + 1`. Tracing them costs host time per call, which
             overlaps with the running of the graph before.

With `--compiled`, the graph of a call is compiled by `torch.compile(backend="openxla")`, so that nothing is traced per
call: the fastest public way to run the same XLA computation.

`sync()` does not wait for the result; the clock stops when the last value was read back. More than one host and
collectives are unsupported: lazy tensors are multi-controller, and one process is one host here.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import protocol
from protocol import MATRIX, Kind, Unsupported

# Read when torch_xla is imported. NPROC: with XLA's default, client threads of a machine with few cores can starve.
os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="1", NPROC="8")
# One host computes on one thread, so that the work of a computation is the same on every machine.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import torch
import torch_xla


class LazyLoop:
    """The loop of every mode: `syncs` graphs per user-level call, each of `steps` additions and `loops` products."""

    def __init__(self, kind: Kind, is_compiled: bool) -> None:
        self._device = torch_xla.device()
        self._is_compiled = is_compiled
        self._compiled = torch.compile(self._next, backend="openxla")
        self._syncs = kind.chain if kind.mode == "chained" else 1
        self._steps = kind.chain if kind.mode == "fused" else 1
        self._loops = kind.loops
        self._ones = torch.ones(MATRIX, MATRIX, device=self._device)
        self._x = torch.zeros((), device=self._device)

    def start(self) -> None:
        self._x = torch.zeros((), device=self._device)
        torch_xla.sync(wait=True)

    def run(self, calls: int) -> None:
        for _ in range(calls):
            for _ in range(self._syncs):
                if self._is_compiled:
                    self._x = self._compiled(self._x, self._ones)
                else:
                    self._x = self._next(self._x, self._ones)
                    torch_xla.sync()
        self._x.item()

    def _next(self, x: torch.Tensor, ones: torch.Tensor) -> torch.Tensor:
        for _ in range(self._steps):
            x = x + self._product(ones) if self._loops else x + 1
        return x

    def _product(self, ones: torch.Tensor) -> torch.Tensor:
        """1, by way of the products: all-ones matrices over their side stay all ones."""
        m = ones
        for _ in range(self._loops):
            m = (m @ ones) * (1 / MATRIX)
        return m.max()

    def values(self) -> list[float]:
        return [self._x.item()]


class TorchXla:
    version = f"torch-xla {torch_xla.__version__}, torch {torch.__version__}"

    def __init__(self, hosts: int, is_compiled: bool) -> None:
        self.hosts = hosts
        self._is_compiled = is_compiled

    def prepare(self, kind: Kind) -> LazyLoop:
        if self.hosts != 1:
            raise Unsupported("one process drives one host")
        if kind.collective:
            raise Unsupported("no collective with one host")
        return LazyLoop(kind, self._is_compiled)


@contextmanager
def open_peer(hosts: int, is_compiled: bool) -> Iterator[TorchXla]:
    yield TorchXla(hosts, is_compiled)


if __name__ == "__main__":
    parser = protocol.argument_parser(__doc__)
    parser.add_argument("--compiled", action="store_true", help="by torch.compile")
    arguments = parser.parse_args()
    protocol.serve(lambda: open_peer(arguments.hosts, arguments.compiled))
