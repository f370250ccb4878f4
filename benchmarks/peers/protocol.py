"""Protocol of the peer workers: the dispatch benchmark of Figure 5 of the Pathways paper, run on other systems.

What is measured
    Every host holds one float32 scalar `x` (systems without tensors: a Python float). One *computation* is one SPMD
    step of all hosts: `x = x + 1`, or, with collective, `x = mean of all hosts' x, + 1` (a scalar all-reduce, then an
    addition). The output of a computation is the input of the next. The paper plots computations a second, counted
    per SPMD step (not times the number of hosts), for three ways of asking for them:

    op       (OpByOp)   one user-level call per computation;
    chained  (Chained)  `chain` computations, each its own node, actor call or compiled call, in one user-level call;
    fused    (Fused)    `chain` computations inside one compiled function or one actor method.

    Calls are not waited for one by one where the system lets the user go on: the clock stops when the last result of
    the last call is there on all hosts. The mode `work` is op-by-op without collective, where each computation also
    does `loops` dependent products of 128 x 128 float32 matrices on one thread; it serves to find the smallest
    computation that a system runs at full speed.

Lines
    A worker is `python benchmarks/peers/NAME.py --hosts N`. It starts its hosts (processes on this machine) and says
    `{"ready": true, "version": "..."}`. Then it reads one JSON object a line from stdin and answers with one line:

    {"mode": "op" | "chained" | "fused", "collective": bool, "calls": K, "chain": 128}   or
    {"mode": "work", "loops": L, "calls": K}
        -> {"computations": n, "seconds": s}    n is K for `op` and `work`, else K * chain
        -> {"unsupported": "why"}               the system, or the worker, cannot do this
        -> {"error": "what went wrong"}         among others: a host's final value was not the expected one

    Compilation and warm-up happen at the first request of a kind, outside the clock. Every host's value is checked
    after the warm-up and after every measurement. At EOF the worker ends its hosts and exits with 0. Nothing but the
    protocol reaches stdout: file descriptor 1 is turned to stderr for the libraries and for child processes.

This module needs the standard library only, as it is imported in environments that share nothing else.
"""

import argparse
import ctypes
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

MODES = ("op", "chained", "fused", "work")
MATRIX = 128  # side of the matrices of mode `work`
PR_SET_PDEATHSIG = 1
WARMUP_OPS, WARMUP_CALLS = 16, 2  # computations op-by-op, calls of a whole chain


class Unsupported(Exception):
    """The system cannot do what was asked; the message says why in a few words."""


@dataclass(frozen=True)
class Kind:
    """What a request asks for, apart from how often: the things that are compiled once."""

    mode: str
    collective: bool = False
    chain: int = 1  # computations per user-level call
    loops: int = 0  # matrix products per computation, mode `work` only


class Loop(Protocol):
    """A compiled, ready kind of computation."""

    def start(self) -> None:
        """Set the value of host h to h, so that a missing or partial all-reduce shows in the values."""

    def run(self, calls: int) -> None:
        """Make this many user-level calls; return when the last result is there on all hosts."""

    def values(self) -> list[float]:
        """Value of every host."""


class Peer(Protocol):
    """A system under test with its hosts running."""

    version: str
    hosts: int

    def prepare(self, kind: Kind) -> Loop:
        """Build (compile) the computation of this kind, or raise `Unsupported`."""


def parse_kind(request: dict[str, Any]) -> Kind:
    mode = request["mode"]
    if mode not in MODES:
        raise Unsupported(f"no mode {mode}")
    if mode == "work":
        return Kind(mode, loops=int(request["loops"]))
    chain = 1 if mode == "op" else int(request.get("chain", 128))
    return Kind(mode, bool(request["collective"]), chain)


def expected_values(kind: Kind, hosts: int, computations: int) -> list[float]:
    """What the hosts hold after that many computations."""
    if kind.collective and computations:
        return [(hosts - 1) / 2 + computations] * hosts
    return [float(host + computations) for host in range(hosts)]


def as_expected(value: float, expected: float) -> bool:
    """Equal but for float32's rounding, which matters from some 2**22 computations on (`x + 1` ends at 2**24)."""
    return math.isclose(value, expected, rel_tol=1e-6)


def measure(loop: Loop, kind: Kind, hosts: int, calls: int) -> dict[str, Any]:
    computations = calls * kind.chain
    loop.start()
    begin = time.perf_counter()
    loop.run(calls)
    seconds = time.perf_counter() - begin
    values, expected = loop.values(), expected_values(kind, hosts, computations)
    if len(values) != hosts or not all(map(as_expected, values, expected)):
        raise ValueError(f"hosts hold {values} after {computations} computations in place of {expected}")
    return {"computations": computations, "seconds": seconds}


def answer(peer: Peer, loops: dict[Kind, Loop], request: dict[str, Any]) -> dict[str, Any]:
    try:
        kind = parse_kind(request)
        if kind not in loops:
            loop = peer.prepare(kind)
            measure(loop, kind, peer.hosts, WARMUP_OPS if kind.chain == 1 else WARMUP_CALLS)
            loops[kind] = loop
        return measure(loops[kind], kind, peer.hosts, int(request["calls"]))
    except Unsupported as reason:
        return {"unsupported": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def claim_stdout() -> TextIO:
    """The stdout of this process for the protocol alone: descriptor 1 leads to stderr from here on."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lines


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel kills this process when the thread that started it ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def watch_parent() -> None:
    """End this process when its parent is gone, also in the middle of a measurement, where EOF would go unread.

    Not `die_with_parent`: the parent's *thread* that started a worker may end before the worker should.
    """
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--hosts", type=int, default=1, help="number of hosts, one process each")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each, or processes of one thread")
    return parser


def num_devices() -> int:
    """Returns the argument `--devices`, which some workers need before they import anything else."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--devices", type=int, default=1)
    return int(parser.parse_known_args()[0].devices)


def converse(open_peer: Callable[[], AbstractContextManager[Any]], reply: Callable[[Any, dict[str, Any]], Any]) -> None:
    """Answer the requests on stdin, one a line, until EOF.

    `open_peer` starts what is asked, which has a `version`, and ends it when its context closes; `reply` is called with
    it and a request, and returns the answer.
    """
    watch_parent()
    lines = claim_stdout()

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=lines, flush=True)

    with open_peer() as peer:
        say({"ready": True, "version": peer.version})
        for line in sys.stdin:
            if line.strip():
                say(reply(peer, json.loads(line)))


def serve(open_peer: Callable[[], AbstractContextManager[Peer]]) -> None:
    """Run a worker until EOF; `open_peer` starts the hosts, and ends them when its context closes."""
    loops: dict[Kind, Loop] = {}
    converse(open_peer, lambda peer, request: answer(peer, loops, request))
