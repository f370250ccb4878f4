"""Clients that share devices: throughput, shares, utilisation, latency. The paper's Figures 8, 9 and 11.

How to read it: README.md beside this file. `python -m benchmarks.tenancy --help`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from benchmarks.report import argument_parser, finish, machine, median, numbers, panel, print_table
from benchmarks.systems import System, SystemSpec
from torchways.config import ClusterConfig
from torchways.launch import state_file
from torchways.launch.embedded import start_cluster
from torchways.rpc.channel import TOKEN_VARIABLE
from torchways.rpc.operator import OperatorAccess, ask

JAX = SystemSpec("jax", "jax_tenant.py", "jax")
#: Device time of a computation, ms.
LENGTHS = (0.33, 2.0, 10.0)
#: The lane of the trace that figures are drawn from.
DEVICE = "island 0 device 0"
#: A window of Figure 9, and the time from one to the next.
WINDOW_SECONDS, STEP_SECONDS = 5.0, 0.5
#: Processes that start at a time.
_STARTING = 4
WEIGHTS = ((1, 1, 1, 1), (1, 2, 4, 8))
POLICIES = ("proportional_share", "first_come_first_served")
#: Another client on a cluster that is up: prints the seconds to its first result, without its imports.
_SECOND_CLIENT = """
import time, torch, torchways as tw
import torchways.api

started = time.perf_counter()
tw.init()
mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=0)
assert tw.function(lambda x: x + 1, mesh=mesh)(torch.ones(4)).sum().item() == 8
print(time.perf_counter() - started)
tw.shutdown()
"""


@contextlib.contextmanager
def cluster(policy: str = "proportional_share") -> Iterator[OperatorAccess]:
    """One island of one device, which computes on one thread, that clients join by the environment."""
    # The flag alone does not do: XLA's own kernels for products are spread over NPROC threads.
    os.environ.update(XLA_FLAGS="--xla_cpu_multi_thread_eigen=false", NPROC="1")
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.json"
        started = start_cluster(ClusterConfig(islands=1, devices_per_island=1, policy=policy), state=state)
        os.environ.update({"TORCHWAYS_ADDRESS": started.address, TOKEN_VARIABLE: started.token})
        try:
            yield OperatorAccess(started.address, started.token, state_file.read(state).operator_secret)
        finally:
            started.close()
            for name in ("TORCHWAYS_ADDRESS", TOKEN_VARIABLE, "XLA_FLAGS", "NPROC"):
                del os.environ[name]


def start(specs: Sequence[SystemSpec]) -> list[System]:
    """Starts systems, a few at a time."""
    with ThreadPoolExecutor(_STARTING) as pool:
        return list(pool.map(lambda spec: System(spec, 1), specs))


@contextlib.contextmanager
def clients(shares: Sequence[float]) -> Iterator[list[System]]:
    """Clients of these weights."""
    flags = [("--weight", str(weight)) for weight in shares]
    started = start([SystemSpec(f"client {n}", "tenant.py", flags=item) for n, item in enumerate(flags)])
    try:
        yield started
    finally:
        for client in started:
            client.close()


def ask_all(systems: Sequence[System], request: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what each answers to a request that all get at once."""
    with ThreadPoolExecutor(len(systems)) as pool:
        return list(pool.map(lambda system: system.ask(request), systems))


def throughput(answers: Sequence[dict[str, Any]]) -> float:
    """Returns the computations a second of clients that flooded at once."""
    seconds = max(answer["ended"] for answer in answers) - min(answer["began"] for answer in answers)
    return sum(answer["computations"] for answer in answers) / seconds


class Computed(NamedTuple):
    """A computation on the device, from the trace: Unix seconds, and whose it was."""

    start: float
    end: float
    client: int


def computed(access: OperatorAccess, since: float) -> list[Computed]:
    """Returns what the device lane of the trace shows since a time."""
    trace = ask(access, lambda operator: operator.trace(int(since * 1e9)))
    spans = [
        span for found in trace.spans.values() for span in found if span.track == DEVICE and span.kind == "compute"
    ]
    return sorted(Computed(span.start_ns / 1e9, span.end_ns / 1e9, span.client_id) for span in spans)


def time_by_client(spans: Sequence[Computed], began: float, ended: float) -> dict[int, float]:
    """Returns the device time of each client between two times, seconds."""
    found: dict[int, float] = {}
    for span in spans:
        found[span.client] = found.get(span.client, 0.0) + max(0.0, min(span.end, ended) - max(span.start, began))
    return {client: seconds for client, seconds in found.items() if seconds}


def products_per_ms(system: System) -> float:
    """Returns how many products take a millisecond."""
    return 0.1 / min(system.ask({"do": "prepare", "loops": 100})["seconds"] for _ in range(3))


def products(length: float, per_ms: float) -> int:
    """Returns how many products make a computation of so many ms."""
    return max(1, round(length * per_ms))


def figure_8_and_11(
    counts: Sequence[int], lengths: Sequence[float], seconds: float, repeats: int
) -> list[dict[str, Any]]:
    """Returns a row for each length and number of clients, ours and JAX's measured in turn."""
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        access = stack.enter_context(cluster())
        ours = stack.enter_context(clients([1.0] * max(counts)))
        theirs = start([JAX] * max(counts)) if JAX.python.exists() else []
        for system in theirs:
            stack.callback(system.close)
        per_ms = products_per_ms(ours[0])
        their_per_ms = products_per_ms(theirs[0]) if theirs else per_ms
        for length in lengths:
            loops, their_loops = products(length, per_ms), products(length, their_per_ms)
            ask_all(ours, {"do": "prepare", "loops": loops})
            if theirs:
                ask_all(theirs, {"do": "prepare", "loops": their_loops})
            found: dict[tuple[str, int], list[float]] = {}
            busy: dict[int, list[float]] = {}
            for _, count in itertools.product(range(repeats), counts):
                answers = ask_all(ours[:count], {"do": "flood", "loops": loops, "seconds": seconds})
                found.setdefault(("ours", count), []).append(throughput(answers))
                busy.setdefault(count, []).append(utilisation(access, answers))
                if theirs:
                    request = {"do": "flood", "loops": their_loops, "seconds": seconds}
                    found.setdefault(("jax", count), []).append(throughput(ask_all(theirs[:count], request)))
            rows += [_figure_8_row(length, count, counts, found, busy) for count in counts]
            print(f"{length} ms: done", file=sys.stderr, flush=True)
    return rows


def _figure_8_row(
    length: float,
    count: int,
    counts: Sequence[int],
    found: dict[tuple[str, int], list[float]],
    busy: dict[int, list[float]],
) -> dict[str, Any]:
    row = {"ms": length, "clients": count}
    for system in ("ours", "jax"):
        speeds = found.get((system, count), [])
        row[f"{system}_per_s"] = median(speeds)
        row[f"{system}_over_single"] = median(speeds) / median(found.get((system, counts[0]), []))
    return {**row, "device_busy": median(busy[count])}


def utilisation(access: OperatorAccess, answers: Sequence[dict[str, Any]]) -> float:
    """Returns the part of the time in which the device computed, while all clients flooded."""
    began, ended = max(a["began"] for a in answers), min(a["ended"] for a in answers)
    return sum(time_by_client(computed(access, began), began, ended).values()) / (ended - began)


def figure_9(seconds: float) -> list[dict[str, Any]]:
    """Returns a row for each set of weights: the largest difference from the ideal in any window."""
    rows = []
    for weights in WEIGHTS:
        with cluster() as access, clients(weights) as ours:
            loops = products(2.0, products_per_ms(ours[0]))
            ask_all(ours, {"do": "prepare", "loops": loops})
            answers = ask_all(ours, {"do": "flood", "loops": loops, "seconds": seconds})
            began, ended = max(a["began"] for a in answers) + 0.5, min(a["began"] for a in answers) + seconds
            found = windows(computed(access, began), began, ended)
            rows.append({"weights": ":".join(map(str, weights)), **_worst(found, weights)})
    return rows


def windows(spans: Sequence[Computed], began: float, ended: float) -> list[dict[int, float]]:
    """Returns each client's part of the device time in every window between two times."""
    found = []
    while began + WINDOW_SECONDS <= ended:
        used = time_by_client(spans, began, began + WINDOW_SECONDS)
        total = sum(used.values())
        found.append({client: seconds / total for client, seconds in used.items()})
        began += STEP_SECONDS
    return found


def _worst(found: Sequence[dict[int, float]], weights: Sequence[int]) -> dict[str, Any]:
    ideal = sorted(weight / sum(weights) for weight in weights)
    # Clients are told apart by their shares: the ideal ones rise, or are equal.
    shares = [sorted(window.values()) for window in found]
    differences = [abs(a - b) for window in shares for a, b in zip(window, ideal, strict=True)]
    last = [median([window[n] for window in shares]) for n in range(len(ideal))]
    return {
        "windows": len(found),
        "ideal": " ".join(f"{part:.3f}" for part in ideal),
        "median": " ".join(f"{part:.3f}" for part in last),
        "largest_difference": max(differences),
    }


def latency(seconds: float) -> list[dict[str, Any]]:
    """Returns, by policy, how long a client of 1 ms waits beside three that flood with 10 ms."""
    rows = []
    for policy in POLICIES:
        with cluster(policy), clients([1.0] * 4) as ours:
            per_ms = products_per_ms(ours[0])
            short, long = products(1.0, per_ms), products(10.0, per_ms)
            ask_all(ours[:3], {"do": "prepare", "loops": long})
            long_ms = ours[0].ask({"do": "prepare", "loops": long})["seconds"] * 1e3
            ours[3].ask({"do": "prepare", "loops": short})
            alone = ours[3].ask({"do": "probe", "loops": short, "seconds": 3, "pause": 0.02})["waits"]
            flooding = threading.Thread(
                target=ask_all, args=(ours[:3], {"do": "flood", "loops": long, "seconds": seconds + 2})
            )
            flooding.start()
            time.sleep(1)
            waits = ours[3].ask({"do": "probe", "loops": short, "seconds": seconds, "pause": 0.02})["waits"]
            flooding.join()
            rows.append(
                {
                    "policy": policy,
                    "calls": len(waits),
                    "alone_p50_ms": quantile(alone, 0.5) * 1e3,
                    "p50_ms": quantile(waits, 0.5) * 1e3,
                    "p99_ms": quantile(waits, 0.99) * 1e3,
                    "long_ms": long_ms,
                    "p99_in_long": quantile(waits, 0.99) * 1e3 / long_ms,
                }
            )
    return rows


def quantile(values: Sequence[float], part: float) -> float:
    """Returns the value that this part of the others does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def second_client(repeats: int) -> list[dict[str, Any]]:
    """Returns how long a second client takes to its first result on a cluster that has its devices in use."""
    with cluster(), clients([1.0]) as ours:
        ours[0].ask({"do": "prepare", "loops": 1})
        found = [
            float(subprocess.run([sys.executable, "-c", _SECOND_CLIENT], capture_output=True, text=True).stdout)
            for _ in range(repeats)
        ]
    return [{"tries": repeats, "median_s": median(found), "slowest_s": max(found)}]


def lengths(text: str) -> list[float]:
    """Parses "0.33,2"; for argparse."""
    return [float(item) for item in text.split(",")]


def draw(rows: Sequence[dict[str, Any]]) -> Axes:
    """Returns the throughput of all clients, over that of one."""
    axes = panel("clients", "throughput of all, over that of one")
    for length in sorted({row["ms"] for row in rows}):
        mine = [row for row in rows if row["ms"] == length]
        for system, style in (("ours", "o-"), ("jax", "x--")):
            counts = [row["clients"] for row in mine]
            axes.plot(counts, [row[f"{system}_over_single"] for row in mine], style, label=f"{system}, {length} ms")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    if rows:
        axes.legend()
    return axes


def main() -> None:
    """Entry point."""
    parser = argument_parser(__doc__)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "throughput": lambda: figure_8_and_11(given.clients, given.lengths, given.seconds, given.repeats),
        "shares": lambda: figure_9(given.share_seconds),
        "latency": lambda: latency(given.share_seconds),
        "start": lambda: second_client(given.repeats),
    }
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all if none is named")
    parser.add_argument("--clients", type=numbers, default=[1, 2, 4, 8, 16], help="numbers of clients")
    parser.add_argument("--lengths", type=lengths, default=LENGTHS, help="of computations, ms")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement of throughput")
    parser.add_argument("--share-seconds", type=float, default=20.0, help="of one measurement of shares, or latency")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(parts):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    results: dict[str, Any] = {"machine": machine()}
    for name in given.parts or parts:
        results[name] = parts[name]()
        print(f"\n{name}")
        print_table(list(results[name][0]), [list(row.values()) for row in results[name]])
    finish("tenancy", results, draw(results.get("throughput", [])), print_json=given.json)


if __name__ == "__main__":
    main()
