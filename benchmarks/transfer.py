"""Transfers between executors: bandwidth and latency by size, against raw gloo and raw TCP.

How to read it: README.md beside this file. `python -m benchmarks.transfer --help`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

import torchways as tw
from benchmarks.raw_pairs import RawPair
from benchmarks.report import argument_parser, finish, machine, median, numbers, paired_ratio, print_table

RAW = ("data plane", "gloo", "tcp")
KINDS = ("torchways", *RAW)
_STREAM_BYTES = 256 << 20
_HOPS = 256
_READ_TIMEOUT = timedelta(minutes=5)


class Ours:
    """Two islands of one CPU device; values go from the executor of one to that of the other."""

    def __init__(self) -> None:
        self._meshes = [tw.init_device_mesh((1,), mesh_dim_names=("x",), island=island) for island in (0, 1)]
        self._add = [tw.function(lambda x: x + 1, mesh=mesh) for mesh in self._meshes]
        self._streams: dict[tuple[int, int], Callable[[], None]] = {}
        self._chains: dict[tuple[int, bool], Callable[[], None]] = {}

    def bandwidth(self, size: int, count: int) -> float:
        """Returns bytes a second of `count` values of `size` bytes from one executor to the other.

        A program whose one computation on the second slice reads one element of each, so that what it costs to
        compute does not grow with the size.
        """
        key = (size, count)
        if key not in self._streams:
            self._streams[key] = self._stream(size, count)
            self._streams[key]()
        started = time.perf_counter()
        self._streams[key]()
        return size * count / (time.perf_counter() - started)

    def _stream(self, size: int, count: int) -> Callable[[], None]:
        value = torch.zeros(size // 4)
        values = [tw.distribute_tensor(value, self._meshes[0]) for _ in range(count)]
        first = tw.function(lambda *xs: sum(x[0] for x in xs), mesh=self._meshes[1])
        program = tw.program(lambda xs: first(*xs))
        return lambda: program(values).cpu(timeout=_READ_TIMEOUT)

    def latency(self, size: int) -> tuple[float, float]:
        """Returns seconds a hop of a chain of computations that go to and fro, and of the same chain on one slice."""
        return self._chain(size, crossing=True), self._chain(size, crossing=False)

    def _chain(self, size: int, *, crossing: bool) -> float:
        key = (size, crossing)
        if key not in self._chains:
            x = tw.distribute_tensor(torch.zeros(max(1, size // 4)), self._meshes[0])

            @tw.program
            def chain(x: torch.Tensor) -> torch.Tensor:
                for hop in range(_HOPS):
                    x = self._add[(hop + 1) % 2 if crossing else 0](x)
                return x

            self._chains[key] = lambda: chain(x).cpu(timeout=_READ_TIMEOUT)
            self._chains[key]()
        started = time.perf_counter()
        self._chains[key]()
        return (time.perf_counter() - started) / _HOPS


def run(sizes: list[int], repeats: int) -> dict[str, Any]:
    """Measures all sizes; returns the rows of both tables."""
    pair = RawPair()
    try:
        with tw.init(islands=2, devices_per_island=1):
            ours = Ours()
            latency = [_latency_row(ours, pair, size, repeats) for size in sizes if size <= 1 << 20]
            bandwidth = [_bandwidth_row(ours, pair, size, repeats) for size in sizes if size >= 1 << 12]
    finally:
        pair.close()
    return {"machine": machine(), "latency": latency, "bandwidth": bandwidth}


def _latency_row(ours: Ours, pair: RawPair, size: int, repeats: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {"hop": [], "compute": [], **{kind: [] for kind in RAW}}
    for _ in range(repeats + 1):
        hop, compute = ours.latency(size)
        found["hop"].append(hop)
        found["compute"].append(compute)
        for kind in RAW:
            found[kind].append(pair.latency(kind, size, 200))
    found = {kind: values[1:] for kind, values in found.items()}  # the first round warms up
    return {
        "bytes": size,
        **{f"{kind.replace(' ', '_')}_us": 1e6 * median(values) for kind, values in found.items()},
        "data_plane_over_gloo": paired_ratio(found["data plane"], found["gloo"]),
        "hop_over_gloo": paired_ratio(found["hop"], found["gloo"]),
    }


def _bandwidth_row(ours: Ours, pair: RawPair, size: int, repeats: int) -> dict[str, Any]:
    count = max(4, min(32, _STREAM_BYTES // size))
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(repeats + 1):
        found["torchways"].append(ours.bandwidth(size, count))
        for kind in RAW:
            found[kind].append(pair.bandwidth(kind, size, count))
    found = {kind: values[1:] for kind, values in found.items()}
    return {
        "bytes": size,
        **{f"{kind.replace(' ', '_')}_gb_per_s": median(values) / 1e9 for kind, values in found.items()},
        "ours_over_gloo": paired_ratio(found["torchways"], found["gloo"]),
        "ours_over_tcp": paired_ratio(found["torchways"], found["tcp"]),
    }


def draw(results: dict[str, Any]) -> Axes:
    """Returns two panels: latency and bandwidth by size."""
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    for key, label in (("hop", "torchways, a computation and its transfer"), *((kind, kind) for kind in RAW)):
        rows = results["latency"]
        left.plot([r["bytes"] for r in rows], [r[f"{key.replace(' ', '_')}_us"] for r in rows], "o-", label=label)
    for kind in KINDS:
        rows = results["bandwidth"]
        key = f"{kind.replace(' ', '_')}_gb_per_s"
        right.plot([r["bytes"] for r in rows], [r[key] for r in rows], "o-", label=kind)
    for axes, name, label in ((left, "latency", "microseconds, one way"), (right, "bandwidth", "GB/s")):
        if not results[name]:  # of these sizes
            axes.set_axis_off()
            continue
        axes.set_ylabel(label)
        axes.set_xlabel("bytes")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log" if axes is left else "linear")
        axes.grid(True, alpha=0.3)
        axes.legend()
    shown: Axes = left
    return shown


def main() -> None:
    """Entry point."""
    parser = argument_parser(__doc__)
    default = [4, 256, 4096, 65536, 1 << 20, 16 << 20, 64 << 20]
    parser.add_argument("--sizes", type=numbers, default=default, help="bytes, separated by commas")
    arguments = parser.parse_args()
    results = run(arguments.sizes, arguments.repeats)
    for name in ("latency", "bandwidth"):
        if results[name]:
            print_table(list(results[name][0]), [list(row.values()) for row in results[name]])
            print()
    finish("transfer", results, draw(results), print_json=arguments.json)


if __name__ == "__main__":
    main()
