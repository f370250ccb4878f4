"""Monarch actors: the dispatch benchmark of Figure 5 with one Monarch process and actor per host.

The protocol and what is measured: protocol.py. An actor keeps its value (a Python float) between calls, as results
cannot be passed on without passing through the user's process; Monarch keeps the order of one sender's messages, so
the output of a call is the input of the next. How the modes map:

    op       `endpoint.call()` on the whole mesh per computation; every call hands the user the future of all hosts'
             results. They are not waited for before the end, which is several times faster than waiting for each;
             `--wait` measures the latter.
    chained  `chain - 1` times `endpoint.broadcast()`, which returns nothing, and one `call()`, which is waited for
             before the next user-level call.
    fused    one endpoint that does the `chain` steps; calls as in `op`.

With collective, the endpoint does an all-reduce of PyTorch's gloo backend between the actors' processes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import protocol
import torch
import torch.distributed
from monarch.actor import Actor, ValueMesh, current_rank, endpoint, shutdown_context, this_host
from protocol import Kind, Unsupported

MESH_AXIS = "hosts"


class Host(Actor):
    """One host and its value. `instrument=False` spares each call a tracing span."""

    def __init__(self, hosts: int) -> None:
        self._hosts = hosts
        self._x = 0.0
        self._reduced = torch.zeros(())

    @endpoint
    def join(self, port: int) -> None:
        """Form the gloo group of all hosts."""
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", address, rank=current_rank().rank, world_size=self._hosts)

    @endpoint
    def start(self) -> None:
        self._x = float(current_rank().rank)

    @endpoint
    def value(self) -> float:
        return self._x

    @endpoint(instrument=False)
    def steps(self, times: int, collective: bool) -> float:
        for _ in range(times):
            self._x = (self._mean() if collective else self._x) + 1.0
        return self._x

    def _mean(self) -> float:
        self._reduced.fill_(self._x)
        torch.distributed.all_reduce(self._reduced)
        return self._reduced.item() / self._hosts


class MeshLoop:
    def __init__(self, actors: Host, kind: Kind, wait: bool) -> None:
        self._actors = actors
        self._messages = kind.chain if kind.mode == "chained" else 1
        self._arguments = (kind.chain if kind.mode == "fused" else 1, kind.collective)
        self._wait = wait or kind.mode == "chained"

    def start(self) -> None:
        self._actors.start.call().get()

    def run(self, calls: int) -> None:
        steps, arguments = self._actors.steps, self._arguments
        for _ in range(calls):
            for _ in range(self._messages - 1):
                steps.broadcast(*arguments)
            last = steps.call(*arguments)
            if self._wait:
                last.get()
        last.get()

    def values(self) -> list[float]:
        values: ValueMesh[float] = self._actors.value.call().get()
        return list(values.values())


class MonarchPeer:
    version = f"torchmonarch {version('torchmonarch')}, torch {torch.__version__}"

    def __init__(self, hosts: int, actors: Host, wait: bool) -> None:
        self.hosts = hosts
        self._actors = actors
        self._wait = wait
        actors.join.call(protocol.free_port()).get()

    def prepare(self, kind: Kind) -> MeshLoop:
        if kind.mode == "work":
            raise Unsupported("no device work in Python actors")
        return MeshLoop(self._actors, kind, self._wait)


@contextmanager
def open_peer(hosts: int, wait: bool) -> Iterator[MonarchPeer]:
    processes = this_host().spawn_procs(per_host={MESH_AXIS: hosts})
    try:
        yield MonarchPeer(hosts, processes.spawn("hosts", Host, hosts), wait)
    finally:
        processes.stop().get()
        shutdown_context().get()


if __name__ == "__main__":
    parser = protocol.argument_parser(__doc__)
    parser.add_argument("--wait", action="store_true", help="wait for the result of every call")
    arguments = parser.parse_args()
    protocol.serve(lambda: open_peer(arguments.hosts, arguments.wait))
