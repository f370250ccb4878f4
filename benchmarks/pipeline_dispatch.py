"""Parallel against sequential dispatch for chains of stages, one executor each: the paper's Figure 7.

How to read it: README.md beside this file. `python -m benchmarks.pipeline_dispatch --help`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from matplotlib.axes import Axes

import torchways as tw
from benchmarks.report import argument_parser, finish, machine, median, numbers, paired_ratio, panel, print_table

DISPATCHES = ("parallel", "sequential")
_READ_TIMEOUT = timedelta(minutes=5)


def run(stages: list[int], repeats: int, seconds: float) -> dict[str, Any]:
    """Measures a step of each length under both dispatches; returns the rows and the ratio of slopes."""
    with tw.init(islands=1, devices_per_island=max(stages)):
        meshes = [tw.init_device_mesh((1,), mesh_dim_names=("x",)) for _ in range(max(stages))]
        functions = [tw.function(lambda x: x + 1, mesh=mesh) for mesh in meshes]
        x = tw.distribute_tensor(torch.zeros(()), meshes[0])
        rows = [_row(functions[:count], x, repeats, seconds) for count in stages]
    slopes = {dispatch: _slope(rows, dispatch) for dispatch in DISPATCHES}
    return {
        "machine": machine(),
        "rows": rows,
        "us_per_stage": slopes,
        "slope_ratio": slopes["sequential"] / slopes["parallel"],
    }


def _row(functions: list[Any], x: Any, repeats: int, seconds: float) -> dict[str, Any]:
    steps = {dispatch: _step(functions, dispatch, x) for dispatch in DISPATCHES}
    counts = {dispatch: _count(step, seconds) for dispatch, step in steps.items()}
    found: dict[str, list[float]] = {dispatch: [] for dispatch in DISPATCHES}
    for _ in range(repeats):
        for dispatch, step in steps.items():
            found[dispatch].append(step(counts[dispatch]))
    return {
        "stages": len(functions),
        **{f"{dispatch}_us": 1e6 * median(values) for dispatch, values in found.items()},
        "sequential_over_parallel": paired_ratio(found["sequential"], found["parallel"]),
    }


def _step(functions: list[Any], dispatch: str, x: Any) -> Callable[[int], float]:
    """Returns a function that runs a number of steps, one behind the other, and returns the seconds of one."""

    @tw.program(dispatch=dispatch)
    def chain(x: torch.Tensor) -> torch.Tensor:
        for function in functions:
            x = function(x)
        return x

    def steps(count: int) -> float:
        started = time.perf_counter()
        results = [chain(x) for _ in range(count)]
        values = {result.cpu(timeout=_READ_TIMEOUT).item() for result in results[-1:]}
        assert values == {float(len(functions))}
        return (time.perf_counter() - started) / count

    steps(2)
    return steps


def _count(step: Callable[[int], float], seconds: float) -> int:
    return max(2, int(seconds / step(4)))


def _slope(rows: list[dict[str, Any]], dispatch: str) -> float:
    """Returns microseconds that a stage adds to a step: least squares over all lengths."""
    return statistics.linear_regression([r["stages"] for r in rows], [r[f"{dispatch}_us"] for r in rows]).slope


def draw(rows: list[dict[str, Any]]) -> Axes:
    """Returns step time by number of stages."""
    axes = panel("stages, one executor each", "microseconds a step")
    for dispatch in DISPATCHES:
        axes.plot([r["stages"] for r in rows], [r[f"{dispatch}_us"] for r in rows], "o-", label=dispatch)
    axes.legend()
    return axes


def main() -> None:
    """Entry point."""
    parser = argument_parser(__doc__)
    parser.add_argument("--stages", type=numbers, default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one measurement")
    arguments = parser.parse_args()
    results = run(arguments.stages, arguments.repeats, arguments.seconds)
    print_table(list(results["rows"][0]), [list(row.values()) for row in results["rows"]])
    for dispatch, slope in results["us_per_stage"].items():
        print(f"{dispatch}: a stage adds {slope:,.0f} us to a step")
    print(f"ratio of slopes, sequential over parallel: {results['slope_ratio']:.1f}")
    finish("pipeline_dispatch", results, draw(results["rows"]), print_json=arguments.json)


if __name__ == "__main__":
    main()
