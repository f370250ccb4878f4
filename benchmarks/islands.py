"""A model on two islands against one of as many devices, and DistributedDataParallel: the paper's Figure 12, small.

How to read it: README.md beside this file. `python -m benchmarks.islands --help`.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from benchmarks import systems
from benchmarks.report import argument_parser, machine, panel, print_table
from benchmarks.spmd import DDP, SCRIPTS, TORCHWAYS, compare, finish_compared, running

ISLANDS = "two islands"
#: Model, size, batch, tokens in a sequence, mesh over all devices.
WORKLOADS = (
    ("llama", "micro", 8, 64, (2, 1)),
    ("llama", "tiny", 8, 128, (2, 1)),
    ("llama", "mini", 8, 128, (2, 1)),
    ("t5", "tiny", 8, 64, (2, 1)),
    ("llama", "tiny", 8, 128, (4, 1)),
)
QUICK = (("llama", "nano", 8, 16, (2, 1)),)
#: Tokens a second, to one island's and to DDP's; bytes that an island sends, to those of its gradients.
WANTED = {TORCHWAYS: 0.98, DDP: 1.0}
WANTED_TRAFFIC = 1.05


def run(workloads: Sequence[Any], repeats: int, seconds: float) -> dict[str, Any]:
    """Measures every workload; returns the rows."""
    rows: list[dict[str, Any]] = []
    for devices, found in itertools.groupby(workloads, lambda workload: math.prod(workload[4])):
        scripts = {ISLANDS: ("torchways_islands.py",), TORCHWAYS: SCRIPTS[TORCHWAYS]}
        if devices == 2:
            scripts[DDP] = SCRIPTS[DDP]
        with running(scripts, devices) as started:
            for model, size, batch, length, mesh in found:
                workload = {
                    "model": model,
                    "size": size,
                    "batch": batch,
                    "length": length,
                    "mesh": mesh,
                    "plan": "data",
                }
                rows.append(_row(workload, started, repeats, seconds))
                print(f"{len(rows)} of {len(workloads)}: {rows[-1]}", file=sys.stderr, flush=True)
    return {"machine": machine(), "rows": rows}


def _row(workload: dict[str, Any], started: list[systems.System], repeats: int, seconds: float) -> dict[str, Any]:
    row, answers, _ = compare(workload, started, ISLANDS, repeats, seconds)
    return {**row, "devices": math.prod(workload["mesh"]), "traffic": answers[ISLANDS][-1]["traffic"]}


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Returns the header and the cells of what is printed."""
    header = ["model", "parameters", "batch", "devices", "two islands, tokens/s", "one island, tokens/s"]
    header += ["DDP, tokens/s", "two islands, ms", "over one", "over DDP", "traffic", "loss differs"]
    return header, [
        [
            *(row[key] for key in ("model", "parameters", "batch", "devices")),
            *(round(row["tokens_s"][name]) if name in row["tokens_s"] else "-" for name in (ISLANDS, TORCHWAYS, DDP)),
            row["ours_ms"],
            *(row["ours_over"].get(name, "-") for name in (TORCHWAYS, DDP)),
            row["traffic"],
            max(row["loss_differences"].values()),
        ]
        for row in rows
    ]


def draw(rows: Sequence[dict[str, Any]]) -> Axes:
    """Returns tokens a second over one island's and DDP's, by the step's time."""
    axes = panel("milliseconds a step on two islands", "tokens a second over the other's")
    for name, wanted in WANTED.items():
        points = sorted((row["ours_ms"], row["ours_over"][name]) for row in rows if name in row["ours_over"])
        label = "one island of as many devices" if name == TORCHWAYS else name
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.axhline(wanted, color="gray", ls="--", lw=1)
    axes.set_xscale("log")
    axes.legend()
    return axes


def main() -> None:
    """Entry point."""
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement, by the slowest system")
    parser.add_argument("--quick", action="store_true", help="one small workload")
    arguments = parser.parse_args()
    results = run(QUICK if arguments.quick else WORKLOADS, arguments.repeats, arguments.seconds)
    rows = results["rows"]
    print_table(*table(rows))
    for name, wanted in WANTED.items():
        of_it = [row["ours_over"][name] for row in rows if name in row["ours_over"]]
        print(f"at least {wanted} of {name} in {sum(ratio >= wanted for ratio in of_it)} of {len(of_it)} rows")
    print(f"most bytes that an island sends, over its gradients': {max(row['traffic'] for row in rows):.3f}")
    finish_compared("islands", results, draw(rows), print_json=arguments.json)


if __name__ == "__main__":
    main()
