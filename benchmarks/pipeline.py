"""Pipelines against one SPMD slice and torch.distributed.pipelining (the paper's Table 2, small), and their bubbles.

How to read it: README.md beside this file. `python -m benchmarks.pipeline --help`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import simulated_pipeline, systems
from benchmarks.report import argument_parser, machine, numbers, panel, print_table
from benchmarks.spmd import SCRIPTS, TORCHWAYS, compare, finish_compared, running
from benchmarks.timelines import figure_of_runs
from torchways.schedules import SCHEDULES

PIPELINE, PIPELINING = "pipeline", "torch.distributed.pipelining"
#: Size of a Llama, batch, tokens in a sequence, slices; four microbatches for each slice.
WORKLOADS = (
    ("micro", 16, 64, 2),
    ("tiny", 16, 128, 2),
    ("mini", 16, 128, 2),
    ("micro", 16, 64, 4),
    ("tiny", 16, 128, 4),
    ("mini", 16, 128, 4),
)
QUICK = (("nano", 8, 16, 2),)
#: Schedules that torch.distributed.pipelining 2.9.1 runs over gloo. ZBVZeroBubble ended in an error there; the others
#: with weight gradients apart were not tried.
COMPARED = ("GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B")

#: Ratio of tokens a second to each of the others'.
WANTED = 1.0
#: Bubbles on simulated devices, measured and by theory, differ by less.
WANTED_BUBBLE = 0.03

PARTS = ("training", "simulated")
SLICES, QUICK_SLICES = (2, 4, 8, 16), (2,)


def run(workloads: Sequence[Any], schedule: str, repeats: int, seconds: float) -> list[dict[str, Any]]:
    """Measures training steps of every workload; returns the rows."""
    rows: list[dict[str, Any]] = []
    for num_slices in dict.fromkeys(workload[3] for workload in workloads):
        scripts = {
            PIPELINE: ("torchways_pipeline.py",),
            TORCHWAYS: SCRIPTS[TORCHWAYS],
            PIPELINING: ("pipelining_training.py",),
        }
        with running(scripts, num_slices) as started:
            for size, batch, length, _ in (workload for workload in workloads if workload[3] == num_slices):
                workload = {
                    "model": "llama",
                    "size": size,
                    "batch": batch,
                    "length": length,
                    "mesh": (num_slices, 1),
                    "plan": "data",
                    "num_microbatches": simulated_pipeline.MICROBATCHES_EACH * num_slices,
                    "schedule": schedule,
                }
                rows.append(_row(workload, started, repeats, seconds))
                print(f"{len(rows)} of {len(workloads)}: {rows[-1]}", file=sys.stderr, flush=True)
    return rows


def _row(workload: dict[str, Any], started: list[systems.System], repeats: int, seconds: float) -> dict[str, Any]:
    row, answers, _ = compare(workload, started, PIPELINE, repeats, seconds)
    return {
        **row,
        "slices": workload["mesh"][0],
        "stages": answers[PIPELINE][0]["stages"],
        "microbatches": workload["num_microbatches"],
        "schedule": workload["schedule"],
    }


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Returns the header and the cells of the training steps."""
    header = ["model", "parameters", "batch", "slices", "microbatches", "schedule", "pipeline, tokens/s"]
    header += ["one SPMD slice, tokens/s", f"{PIPELINING}, tokens/s", "pipeline, ms", "over SPMD", "over pipelining"]
    return [*header, "loss differs"], [
        [
            *(row[key] for key in ("model", "parameters", "batch", "slices", "microbatches", "schedule")),
            *(round(row["tokens_s"][name]) for name in (PIPELINE, TORCHWAYS, PIPELINING)),
            row["ours_ms"],
            *(row["ours_over"][name] for name in (TORCHWAYS, PIPELINING)),
            max(row["loss_differences"].values()),
        ]
        for row in rows
    ]


def bubble_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Returns the header and the cells of the schedules on simulated devices."""
    header = ["simulated: schedule", "slices", "stages", "microbatches", "predicted, ms", "measured, ms"]
    header += ["theory, bubble", "predicted, bubble", "measured, bubble", "measured - theory", "transfer, ms"]
    return header, [
        [
            *(row[key] for key in ("schedule", "slices", "stages", "microbatches")),
            *(f"{row[key]:,.0f}" for key in ("predicted_ms", "measured_ms")),
            *(f"{row[f'{name}_bubble']:.1%}" for name in ("theoretical", "predicted", "measured")),
            f"{100 * excess(row):+.1f} points",
            f"{row['transfer_ms']:.2f}",
        ]
        for row in rows
    ]


def excess(row: dict[str, Any]) -> float:
    """Returns by how much a measured bubble is larger than in theory; both are between 0 and 1."""
    return row["measured_bubble"] - row["theoretical_bubble"]


def draw(rows: Sequence[dict[str, Any]], simulated: Sequence[dict[str, Any]]) -> Axes:
    """Returns bubbles on simulated devices by schedule; without these, tokens a second over the others'."""
    if simulated:
        axes = panel("slices of one simulated device each", "bubble, % of the slices' time (simulated)")
        for color, name in enumerate(dict.fromkeys(row["schedule"] for row in simulated)):
            mine = [row for row in simulated if row["schedule"] == name]
            slices = [row["slices"] for row in mine]
            axes.plot(slices, [100 * row["measured_bubble"] for row in mine], "o-", color=f"C{color}", label=name)
            axes.plot(slices, [100 * row["theoretical_bubble"] for row in mine], "--", color=f"C{color}", lw=1)
        axes.plot([], [], "--", color="gray", lw=1, label="theory")
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1))
    else:
        axes = panel("milliseconds a step of the pipeline", "its tokens a second over the other's")
        for name in (TORCHWAYS, PIPELINING):
            points = sorted((row["ours_ms"], row["ours_over"][name]) for row in rows)
            label = "one SPMD slice" if name == TORCHWAYS else name
            axes.plot(*zip(*points, strict=True), "o", label=label)
        axes.axhline(WANTED, color="gray", ls="--", lw=1)
        axes.legend()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    return axes


def draw_schedules(path: Path, num_slices: int, num_microbatches: int, pass_seconds: float) -> None:
    """Runs each schedule on simulated devices, and writes a picture of all of them."""
    runs = simulated_pipeline.trace_schedules(list(SCHEDULES), num_slices, num_microbatches, pass_seconds)
    title = (
        f"{num_microbatches} microbatches on {num_slices} slices of one simulated device each; lighter: second stage"
    )
    figure_of_runs(runs, title).savefig(path, dpi=110)
    plt.close("all")
    print(f"wrote {path}")


def main() -> None:
    """Entry point."""
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement, by the slowest system")
    parser.add_argument("--quick", action="store_true", help="one small workload, and two simulated slices")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--schedule", choices=COMPARED, default="1F1B", help="of the training steps")
    parser.add_argument("--slices", type=numbers, help='of simulated devices, "2,4"')
    parser.add_argument("--calls", type=int, default=2, help="measured calls of a schedule on simulated devices")
    parser.add_argument("--pass-seconds", type=float, default=0.05, help="a simulated forward pass of a slice")
    parser.add_argument("--pictures", type=Path, help="draw the schedules into this file, on four slices, and end")
    arguments = parser.parse_args()
    if arguments.pictures is not None:
        draw_schedules(arguments.pictures, 4, 8, arguments.pass_seconds)
        return
    results: dict[str, Any] = {"machine": machine(), "rows": [], "simulated": []}
    if "training" in arguments.parts:
        workloads = QUICK if arguments.quick else WORKLOADS
        results["rows"] = run(workloads, arguments.schedule, arguments.repeats, arguments.seconds)
    if "simulated" in arguments.parts:
        counts = arguments.slices or (QUICK_SLICES if arguments.quick else SLICES)
        results["simulated"] = simulated_pipeline.measure(
            list(SCHEDULES), counts, arguments.calls, arguments.pass_seconds
        )
    rows, simulated = results["rows"], results["simulated"]
    if rows:
        print_table(*table(rows))
        for name in (TORCHWAYS, PIPELINING):
            of_it = [row["ours_over"][name] for row in rows]
            label = "one SPMD slice" if name == TORCHWAYS else name
            print(f"at least {WANTED} of {label} in {sum(ratio >= WANTED for ratio in of_it)} of {len(of_it)} rows")
    if simulated:
        print_table(*bubble_table(simulated))
        near = sum(abs(excess(row)) <= WANTED_BUBBLE for row in simulated)
        print(f"simulated: bubble within {100 * WANTED_BUBBLE:.0f} points of theory in {near} of {len(simulated)} rows")
    finish_compared("pipeline", results, draw(rows, simulated), print_json=arguments.json)


if __name__ == "__main__":
    main()
