"""Ray actors: the dispatch benchmark of Figure 5 with one Ray actor per host.

The protocol and what is measured: protocol.py. A Python float stands for the device's scalar, so Ray is spared a
tensor library. Results travel between computations as object references. How the modes map:

    op       `actor.step.remote(...)` on every actor per computation, given the references of the previous computation;
             every call hands its result references to the user, nothing is waited for before the end. That is faster
             than `ray.get` after each call, which `--wait` measures.
    chained  `chain` such submissions in one user-level call, then one `ray.get` before the next call.
    fused    one actor method that does the `chain` steps; without collective only.

With collective, every actor takes the references of all actors' previous values and computes their mean: an all-to-all
of references. Ray has no all-reduce for CPU actors without a tensor library.

With `--held`, an actor keeps its value between calls, so that calls do not wait for references: the form of actor
program that pipelines best (and the only one that Monarch has); `op` and `chained` without collective only.

With `--compiled`, the same actors under Ray's compiled graphs (`experimental_compile`), where values travel through
preallocated channels:

    op       a graph of one step per actor, `execute` and `ray.get` per computation: an execution's result cannot be
             the input of another one without passing through the user's process.
    chained  a graph of `chain` steps per actor, each bound to the outputs of the step before.
    fused    a graph of one node per actor that does the `chain` steps; without collective only.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import protocol
from protocol import WARMUP_CALLS, Kind, Loop, Unsupported

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.dag import InputNode, MultiOutputNode

COMPILE_SECONDS = 120.0
Values = list[float]


@ray.remote(num_cpus=1)
class Host:
    """One host: computes what it is given, as values live in Ray's object references; or keeps a value (`--held`)."""

    def __init__(self) -> None:
        self._x = 0.0

    def hold(self, x: float) -> None:
        self._x = x

    def held_step(self) -> float:
        self._x = self._x + 1.0
        return self._x

    def step(self, x: float) -> float:
        return x + 1.0

    def reduce_step(self, *xs: float) -> float:
        return sum(xs) / len(xs) + 1.0

    def reduce_list_step(self, xs: Values) -> float:
        return sum(xs) / len(xs) + 1.0

    def pick_step(self, xs: Values, host: int) -> float:
        return xs[host] + 1.0

    def steps(self, x: float, times: int) -> float:
        for _ in range(times):
            x = x + 1.0
        return x

    def pick_steps(self, xs: Values, host: int, times: int) -> float:
        return self.steps(xs[host], times)


class TaskLoop:
    """A loop of plain actor calls."""

    def __init__(self, actors: Sequence[Any], kind: Kind, wait: bool) -> None:
        self._actors = actors
        self._submissions = kind.chain if kind.mode == "chained" else 1
        self._wait = wait or kind.mode == "chained"
        self._refs: list[Any] = []
        self._step = self._step_of(kind)

    def _step_of(self, kind: Kind) -> Callable[[list[Any]], list[Any]]:
        actors = self._actors
        if kind.mode == "fused":
            return lambda xs: [actor.steps.remote(x, kind.chain) for actor, x in zip(actors, xs, strict=True)]
        if kind.collective:
            return lambda xs: [actor.reduce_step.remote(*xs) for actor in actors]
        return lambda xs: [actor.step.remote(x) for actor, x in zip(actors, xs, strict=True)]

    def start(self) -> None:
        self._refs = [ray.put(float(host)) for host in range(len(self._actors))]

    def run(self, calls: int) -> None:
        refs = self._refs
        for _ in range(calls):
            for _ in range(self._submissions):
                refs = self._step(refs)
            if self._wait:
                ray.get(refs)
        ray.get(refs)
        self._refs = refs

    def values(self) -> Values:
        return ray.get(self._refs)


class HeldLoop:
    """A loop of plain actor calls that work on what the actor keeps."""

    def __init__(self, actors: Sequence[Any], kind: Kind) -> None:
        self._actors = actors
        self._kind = kind
        self._refs: list[Any] = []

    def start(self) -> None:
        ray.get([actor.hold.remote(float(host)) for host, actor in enumerate(self._actors)])

    def run(self, calls: int) -> None:
        for _ in range(calls):
            for _ in range(self._kind.chain):
                self._refs = [actor.held_step.remote() for actor in self._actors]
            if self._kind.mode == "chained":
                ray.get(self._refs)
        ray.get(self._refs)

    def values(self) -> Values:
        return ray.get(self._refs)


class CompiledLoop:
    """A loop of executions of one compiled graph; the list of all hosts' values goes in and out.

    An actor takes part in one compiled graph at a time and polls that graph's channels even when nothing is executed,
    so a graph is compiled when its turn comes (outside the clock) and torn down when another one's does.
    """

    _live: ClassVar["CompiledLoop | None"] = None

    def __init__(self, actors: Sequence[Any], kind: Kind) -> None:
        self._actors = actors
        self._kind = kind
        self._graph: Any = None
        self._values: Values = []

    def start(self) -> None:
        if CompiledLoop._live is not self:
            self._compile()
        self._values = [float(host) for host in range(len(self._actors))]

    def _compile(self) -> None:
        if CompiledLoop._live is not None:
            CompiledLoop._live._graph.teardown()
        CompiledLoop._live = self
        self._graph = bind_graph(self._actors, self._kind).experimental_compile(_submit_timeout=COMPILE_SECONDS)
        self._values = [0.0] * len(self._actors)
        for _ in range(WARMUP_CALLS):
            self.run(1)

    def run(self, calls: int) -> None:
        values = self._values
        for _ in range(calls):
            values = ray.get(self._graph.execute(values))
        self._values = values

    def values(self) -> Values:
        return self._values


def bind_graph(actors: Sequence[Any], kind: Kind) -> Any:
    with InputNode() as xs:
        if kind.mode == "fused":
            return MultiOutputNode([actor.pick_steps.bind(xs, host, kind.chain) for host, actor in enumerate(actors)])
        if kind.collective:
            nodes = [actor.reduce_list_step.bind(xs) for actor in actors]
        else:
            nodes = [actor.pick_step.bind(xs, host) for host, actor in enumerate(actors)]
        for _ in range(kind.chain - 1):
            if kind.collective:
                nodes = [actor.reduce_step.bind(*nodes) for actor in actors]
            else:
                nodes = [actor.step.bind(node) for actor, node in zip(actors, nodes, strict=True)]
        return MultiOutputNode(nodes)


class RayPeer:
    def __init__(self, hosts: int, style: str) -> None:
        self.hosts = hosts
        self.version = f"ray {ray.__version__}"
        self._style = style
        self._actors: list[Any] = [Host.remote() for _ in range(hosts)]
        ray.get([actor.step.remote(0.0) for actor in self._actors])

    def prepare(self, kind: Kind) -> Loop:
        if kind.mode == "work":
            raise Unsupported("no device work in Python actors")
        if kind.mode == "fused" and kind.collective:
            raise Unsupported("no CPU all-reduce inside an actor method")
        if self._style == "compiled":
            return CompiledLoop(self._actors, kind)
        if self._style == "held":
            if kind.mode == "fused" or kind.collective:
                raise Unsupported("measured without --held")
            return HeldLoop(self._actors, kind)
        return TaskLoop(self._actors, kind, self._style == "wait")


@contextmanager
def open_peer(hosts: int, style: str) -> Iterator[RayPeer]:
    ray.init(num_cpus=hosts + 1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield RayPeer(hosts, style)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    parser = protocol.argument_parser(__doc__)
    styles = parser.add_mutually_exclusive_group()
    for style in ("wait", "held", "compiled"):
        styles.add_argument(
            f"--{style}", action="store_const", const=style, dest="style", help="see the top of the file"
        )
    arguments = parser.parse_args()
    protocol.serve(lambda: open_peer(arguments.hosts, arguments.style or "references"))
