"""Seconds to the first loss of a training step: capture, compile and run, against torch-xla and torch.compile.

How to read it: README.md beside this file. `python -m benchmarks.first_step --help`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from benchmarks import systems
from benchmarks.report import argument_parser, finish, machine, median, paired_ratio, panel, print_table

NAMES = ("torchways", "lazy", "compiled", "inductor", "eager")
SPECS = {name: systems.SystemSpec(name, "first_step.py", flags=("--system", name)) for name in NAMES}
#: What a user of plain torch-xla may write.
PLAIN = ("lazy", "compiled")
MODELS = ("4", "12", "24", "resnet18")
WANTED = 1.2
_PHASES = ("traced", "compiled", "first run")
_TURNS = 4


def run(names: Sequence[str], models: Sequence[str], repeats: int) -> dict[str, Any]:
    """Measures every model by every system, each time in a new process; returns the rows."""
    rows: list[dict[str, Any]] = []
    for model in models:
        seconds: dict[str, list[list[float]]] = {name: [] for name in names}
        phases: list[dict[str, float]] = []
        for _ in range(repeats):
            for name in names:
                with contextlib.closing(systems.System(SPECS[name], hosts=1)) as system:
                    answer = system.ask({"model": model, "turns": _TURNS})
                if "error" in answer:
                    print(f"{name}, {model}: {answer['error']}", file=sys.stderr)
                    continue
                seconds[name].append(answer["seconds"])
                phases.extend([answer["phases"]] if "phases" in answer else [])
        rows.append(_row(model, {name: found for name, found in seconds.items() if found}, phases))
        print(rows[-1], file=sys.stderr, flush=True)
    return {"machine": machine(), "rows": rows}


def _row(model: str, seconds: dict[str, list[list[float]]], phases: list[dict[str, float]]) -> dict[str, Any]:
    first = {name: [turns[0] for turns in found] for name, found in seconds.items()}
    all_turns = {name: [sum(turns) for turns in found] for name, found in seconds.items()}
    later = {name: median([turns[-1] for turns in found]) for name, found in seconds.items()}
    peers = [name for name in PLAIN if name in first]
    fastest = min(peers, key=lambda name: median(first[name])) if peers else ""
    return {
        "model": f"decoder, {model} layers" if model.isdecimal() else model,
        "first_s": {name: median(found) for name, found in first.items()},
        "later_s": later,
        "all_s": {name: median(found) for name, found in all_turns.items()},
        "phases_s": {name: median([found[name] for found in phases]) for name in (phases[0] if phases else ())},
        "plain": fastest,
        "ours_over_plain": paired_ratio(first["torchways"], first[fastest]) if fastest else float("nan"),
        "all_over_plain": (
            max(paired_ratio(all_turns["torchways"], all_turns[name]) for name in peers) if peers else float("nan")
        ),
    }


def table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    """Returns the header and the cells of what is printed."""
    header = ["model", *(f"{name}, s" for name in names), "ours/faster torch-xla", f"of {_TURNS} steps"]
    header += [f"ours: {name}" for name in _PHASES]
    return header, [
        [
            row["model"],
            *(row["first_s"].get(name, "-") for name in names),
            *(row["ours_over_plain"], row["all_over_plain"]),
            *(row["phases_s"].get(name, "-") for name in _PHASES),
        ]
        for row in rows
    ]


def draw(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Axes:
    """Returns seconds to the first loss by model; a line for each system."""
    axes = panel("", "seconds to the first loss")
    for name in names:
        points = [(row["model"], row["first_s"][name]) for row in rows if name in row["first_s"]]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.legend()
    return axes


def main() -> None:
    """Entry point."""
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="numbers of layers, or resnet18")
    parser.add_argument("--systems", nargs="+", default=NAMES, choices=NAMES)
    arguments = parser.parse_args()
    models = list(arguments.models)
    if "resnet18" in models and importlib.util.find_spec("torchvision") is None:
        print("resnet18: torchvision is not installed; run pip install -e '.[models]'", file=sys.stderr)
        models.remove("resnet18")
    results = run(arguments.systems, models, arguments.repeats)
    rows = results["rows"]
    print_table(*table(rows, arguments.systems))
    enough = sum(row["ours_over_plain"] <= WANTED for row in rows)
    print(f"within {WANTED} times of the faster of torch-xla's two ways in {enough} of {len(rows)} rows")
    finish("first_step", results, draw(rows, arguments.systems), print_json=arguments.json)


if __name__ == "__main__":
    main()
