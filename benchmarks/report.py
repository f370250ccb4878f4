"""What every benchmark prints: machine and versions, a table, a figure, and one JSON line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

matplotlib.use("Agg")

OUTPUTS = Path("outputs/benchmarks")


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options that every benchmark has; `description` is its module's docstring."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="counted measurements of each system, interleaved")
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end")
    return parser


def numbers(text: str) -> list[int]:
    """Parses "1,2,4"; for argparse."""
    return [int(item) for item in text.split(",")]


def machine() -> dict[str, Any]:
    """Returns what the figures depend on: time, machine, versions and commit."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torch-xla", "grpcio")},
        "commit": found.stdout.strip(),
    }


def median(values: Sequence[float]) -> float:
    """Returns the median; nan of nothing."""
    return statistics.median(values) if values else float("nan")


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Returns the median of the ratios ours/theirs, measurement by measurement: the machine's speed drifts."""
    return median([a / b for a, b in zip(ours, theirs, strict=False)])


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows in columns; numbers to the right."""
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *texts, strict=True)]
    print("  ".join(name.ljust(width) for name, width in zip(header, widths, strict=True)))
    for row, cells in zip(rows, texts, strict=True):
        parts = [
            cell.rjust(width) if isinstance(value, (int, float)) else cell.ljust(width)
            for value, cell, width in zip(row, cells, widths, strict=True)
        ]
        print("  ".join(parts).rstrip(), flush=True)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def panel(x_label: str, y_label: str) -> Axes:
    """Returns the axes of a figure with one panel."""
    axes: Axes = plt.subplots(figsize=(7, 5))[1]
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, alpha=0.3)
    return axes


def finish(name: str, results: dict[str, Any], axes: Axes, *, print_json: bool) -> None:
    """Saves the figure and the results under `OUTPUTS`, and prints the JSON line last."""
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    figure = axes.get_figure()
    assert figure is not None
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    about = results["machine"]
    figure.text(0.01, 0.01, f"{about['machine']}, torch {about['torch']}, {about['date']}", fontsize=7, color="gray")
    figure.savefig(OUTPUTS / f"{name}.png", dpi=120)
    line = json.dumps({"benchmark": name, **results})
    (OUTPUTS / f"{name}.json").write_text(line + "\n")
    print(f"wrote {OUTPUTS / name}.png and .json")
    if print_json:
        print(line)
