"""JAX multi-controller: the dispatch benchmark of Figure 5 with one JAX process per host, as in the paper's baseline.

The protocol and what is measured: protocol.py. Every host is a process with one CPU device, `x` is a global array of
one float32 per device, collectives are gloo's, and every process runs the same Python loop. How the modes map:

    op       one call of the jitted step (`shard_map` of `x + 1`, or of `pmean(x) + 1`) per computation; dispatch is
             asynchronous, JAX returns before the result is there.
    chained  `chain` such calls in one user-level Python function: for a multi-controller the same work as `op`.
    fused    one jitted function with `chain` steps unrolled. Without collective, XLA folds the `chain` additions into
             one: the rate is `chain` times that of one dispatch.
    work     `fori_loop` of `loops` products `m @ w` inside the jitted step.

The parent is host 0: it starts the other hosts, passes each request on to them and answers for all. Its clock runs
from its first call until every host, itself included, has its last result.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import protocol
from protocol import MATRIX, Kind

os.environ["JAX_PLATFORMS"] = "cpu"
# One host computes on one thread, so that the work of a computation is the same on every machine.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

AXIS = "hosts"
EXIT_SECONDS = 30.0  # leaving a JAX cluster takes a barrier of all hosts

Step = Callable[[jax.Array, jax.Array], jax.Array]


def connect(rank: int, hosts: int, port: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=hosts, process_id=rank)


def product(ones: jax.Array, loops: int) -> jax.Array:
    """1, by way of the products: all-ones matrices over their side stay all ones."""
    return jax.lax.fori_loop(0, loops, lambda _, m: (m @ ones) * (1 / MATRIX), ones).max()


def one_step(kind: Kind) -> Step:
    def step(x: jax.Array, ones: jax.Array) -> jax.Array:
        if kind.collective:
            x = jax.lax.pmean(x, AXIS)
        return x + product(ones, kind.loops) if kind.loops else x + 1

    return step


def unrolled(step: Step, times: int) -> Step:
    def steps(x: jax.Array, ones: jax.Array) -> jax.Array:
        for _ in range(times):
            x = step(x, ones)
        return x

    return steps


class Host:
    """The loops of one process; every host makes the same calls in the same order."""

    def __init__(self, rank: int, hosts: int) -> None:
        self._rank = rank
        self._hosts = hosts
        self._mesh = jax.make_mesh((hosts,), (AXIS,))
        self._sharded = NamedSharding(self._mesh, PartitionSpec(AXIS))
        replicated = NamedSharding(self._mesh, PartitionSpec())
        self._ones = jax.device_put(jnp.ones((MATRIX, MATRIX), jnp.float32), replicated)
        self._compiled: dict[Kind, Callable[[jax.Array], jax.Array]] = {}
        self._x: jax.Array | None = None

    def prepare(self, kind: Kind) -> None:
        step = one_step(kind)
        if kind.mode == "fused":
            step = unrolled(step, kind.chain)
        self._compiled[kind] = self._jit(step, kind)

    def _jit(self, step: Step, kind: Kind) -> Callable[[jax.Array], jax.Array]:
        shard, whole = PartitionSpec(AXIS), PartitionSpec()
        if kind.mode == "work":
            both = jax.jit(jax.shard_map(step, mesh=self._mesh, in_specs=(shard, whole), out_specs=shard))
            return lambda x: both(x, self._ones)
        # The other modes pass the scalar alone, as an argument that is not used would cost time at every call.
        alone = jax.shard_map(lambda x: step(x, x), mesh=self._mesh, in_specs=shard, out_specs=shard)
        return jax.jit(alone)

    def start(self) -> None:
        mine = np.array([self._rank], np.float32)
        self._x = jax.make_array_from_process_local_data(self._sharded, mine, (self._hosts,))
        jax.block_until_ready(self._x)

    def run(self, kind: Kind, calls: int) -> None:
        step, x = self._compiled[kind], self._x
        steps = kind.chain if kind.mode == "chained" else 1
        for _ in range(calls):
            for _ in range(steps):
                x = step(x)
        self._x = jax.block_until_ready(x)

    def value(self) -> float:
        return float(np.asarray(self._x.addressable_data(0))[0])

    def do(self, order: dict[str, Any]) -> float | None:
        """An order as it travels from host 0 to the others: the name of a method, and its arguments."""
        arguments = [Kind(**order["kind"])] if "kind" in order else []
        arguments += [order["calls"]] if "calls" in order else []
        return getattr(self, order["do"])(*arguments)


class Cluster:
    """All hosts, as seen from host 0."""

    version = f"jax {jax.__version__}"

    def __init__(self, hosts: int, followers: list[subprocess.Popen[str]]) -> None:
        self.hosts = hosts
        self._followers = followers
        self._host = Host(0, hosts)

    def everywhere(self, **order: Any) -> list[Any]:
        """Run an order on every host at once, this one included; return when all are done, with what each returned."""
        line = json.dumps(order) + "\n"
        for follower in self._followers:
            follower.stdin.write(line)
            follower.stdin.flush()
        mine = self._host.do(order)
        return [mine, *(json.loads(follower.stdout.readline()) for follower in self._followers)]

    def prepare(self, kind: Kind) -> "ClusterLoop":
        self.everywhere(do="prepare", kind=asdict(kind))
        return ClusterLoop(self, kind)


class ClusterLoop:
    def __init__(self, cluster: Cluster, kind: Kind) -> None:
        self._cluster = cluster
        self._kind = asdict(kind)

    def start(self) -> None:
        self._cluster.everywhere(do="start")

    def run(self, calls: int) -> None:
        self._cluster.everywhere(do="run", kind=self._kind, calls=calls)

    def values(self) -> list[float]:
        return self._cluster.everywhere(do="value")


def start_follower(rank: int, hosts: int, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--hosts", str(hosts), "--rank", str(rank), "--port", str(port)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=protocol.die_with_parent,
    )


@contextmanager
def open_cluster(hosts: int) -> Iterator[Cluster]:
    port = protocol.free_port()
    followers = [start_follower(rank, hosts, port) for rank in range(1, hosts)]
    try:
        connect(0, hosts, port)
        yield Cluster(hosts, followers)
        for follower in followers:
            follower.stdin.close()
        jax.distributed.shutdown()
        for follower in followers:
            follower.wait(EXIT_SECONDS)
    finally:
        for follower in followers:
            follower.kill()
            follower.wait()


def follow(rank: int, hosts: int, port: int) -> None:
    """A host other than 0: do what host 0 says until EOF."""
    lines = protocol.claim_stdout()
    connect(rank, hosts, port)
    host = Host(rank, hosts)
    for line in sys.stdin:
        print(json.dumps(host.do(json.loads(line))), file=lines, flush=True)
    jax.distributed.shutdown()


def main() -> None:
    parser = protocol.argument_parser(__doc__)
    parser.add_argument("--rank", type=int, default=0, help="of a host that host 0 started; not for users")
    parser.add_argument("--port", type=int, default=0, help="of host 0's coordinator; not for users")
    arguments = parser.parse_args()
    if arguments.rank:
        follow(arguments.rank, arguments.hosts, arguments.port)
    else:
        protocol.serve(lambda: open_cluster(arguments.hosts))


if __name__ == "__main__":
    main()
