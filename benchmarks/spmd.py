"""Training steps on a slice against a plain torch-xla SPMD script: the paper's Table 1 at this machine's size.

How to read it: README.md beside this file. `python -m benchmarks.spmd --help`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from benchmarks import systems
from benchmarks.report import argument_parser, finish, machine, median, paired_ratio, panel, print_table

OURS = systems.SystemSpec("torchways", "torchways_spmd.py")
LAZY = systems.SystemSpec("torch-xla", "torch_xla_spmd.py")
COMPILED = systems.SystemSpec("torch-xla compiled", "torch_xla_spmd.py", flags=("--compiled",))
#: What a user of plain torch-xla may write; in `ours_over_plain`, the faster one.
PLAIN = (LAZY, COMPILED)
EAGER = systems.SystemSpec("eager", "eager_training.py")

DATA, FULL, TENSOR, BOTH = ((4, 1), "data"), ((4, 1), "full"), ((1, 4), "tensor"), ((2, 2), "full x tensor")
#: Model, size, batch, tokens in a sequence, mesh and plan: steps of a few milliseconds to several hundred.
WORKLOADS = (
    ("t5", "nano", 8, 32, DATA),
    ("t5", "micro", 8, 64, DATA),
    ("t5", "tiny", 8, 64, DATA),
    ("t5", "tiny", 8, 64, FULL),
    ("t5", "tiny", 8, 64, TENSOR),
    ("t5", "mini", 8, 64, BOTH),
    ("llama", "nano", 8, 32, DATA),
    ("llama", "micro", 8, 64, DATA),
    ("llama", "tiny", 8, 128, DATA),
    ("llama", "tiny", 8, 128, BOTH),
    ("llama", "mini", 8, 128, FULL),
)
QUICK = (("llama", "nano", 8, 16, BOTH),)

#: Ratio of tokens a second to the plain script's, and the step time from which on it is wanted.
WANTED, WANTED_FROM_MS = 0.98, 50.0
#: Losses of systems that compute the same differ by less: rounding, which grows with each of some hundred updates.
TOLERANCE = 5e-3
_FEWEST_STEPS = 3
_EAGER_STEPS = 2


def run(workloads: Sequence[Any], repeats: int, seconds: float, is_with_eager: bool) -> dict[str, Any]:
    """Measures every workload; returns the rows."""
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        started = stack.enter_context(systems.running([OURS, *PLAIN], hosts=1))
        if len(started) < 1 + len(PLAIN):
            raise SystemExit("a system did not start; what it wrote last stands above")
        eager = stack.enter_context(systems.running([EAGER], hosts=1)) if is_with_eager else []
        for model, size, batch, length, (mesh, plan) in workloads:
            workload = {"model": model, "size": size, "batch": batch, "length": length, "mesh": mesh, "plan": plan}
            rows.append(_row(workload, started, eager, repeats, seconds))
            print(f"{len(rows)} of {len(workloads)}: {rows[-1]}", file=sys.stderr, flush=True)
    return {"machine": machine(), "rows": rows}


def _row(
    workload: dict[str, Any], started: list[systems.System], eager: list[systems.System], repeats: int, seconds: float
) -> dict[str, Any]:
    first = [_ask(system, workload, _FEWEST_STEPS) for system in started]
    steps = max(_FEWEST_STEPS, round(seconds * _FEWEST_STEPS / max(answer["seconds"] for answer in first)))
    answers = {system.spec.name: [answer] for system, answer in zip(started, first, strict=True)}
    for _ in range(repeats):
        for system in started:
            answers[system.spec.name].append(_ask(system, workload, steps))
    tokens = first[0]["tokens"]
    rates = {name: [steps * tokens / answer["seconds"] for answer in found[1:]] for name, found in answers.items()}
    plain = max((spec.name for spec in PLAIN), key=lambda name: median(rates[name]))
    losses = {name: [loss for answer in found for loss in answer["losses"]] for name, found in answers.items()}
    ours = rates[OURS.name]
    return {
        "model": f"{workload['model']} {workload['size']}",
        "parameters": first[0]["parameters"],
        "batch": f"{workload['batch']}x{workload['length']}",
        "mesh": "x".join(map(str, workload["mesh"])),
        "plan": workload["plan"],
        "computations": answers[OURS.name][-1]["computations"],
        "tokens_s": {name: median(found) for name, found in rates.items()},
        "eager_tokens_s": [_EAGER_STEPS * tokens / _ask(system, workload, _EAGER_STEPS)["seconds"] for system in eager],
        "plain": plain,
        "plain_ms": 1e3 * tokens / median(rates[plain]),
        "ours_ms": 1e3 * tokens / median(ours),
        "ours_over": {name: paired_ratio(ours, found) for name, found in rates.items() if name != OURS.name},
        "ours_over_plain": paired_ratio(ours, rates[plain]),
        "loss_differences": {spec.name: _difference(losses[OURS.name], losses[spec.name]) for spec in PLAIN},
    }


def _ask(system: systems.System, workload: dict[str, Any], steps: int) -> dict[str, Any]:
    answer = system.ask({"workload": workload, "steps": steps})
    if "error" in answer:
        raise SystemExit(f"{system.spec.name}, {workload}: {answer['error']}")
    if answer.get("compilations"):
        raise SystemExit(f"{system.spec.name}, {workload}: it compiled within a measurement, which so tells nothing")
    return answer


def _difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """Returns the largest relative difference, step by step."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Returns the header and the cells of what is printed."""
    names = [OURS.name, *(spec.name for spec in PLAIN)]
    header = ["model", "parameters", "batch", "mesh", "plan", *(f"{name}, tokens/s" for name in names), "eager"]
    header += ["plain, ms", "ours, ms", *(f"ours/{spec.name}" for spec in PLAIN), "loss differs"]
    cells = [
        [
            *(row[key] for key in ("model", "parameters", "batch", "mesh", "plan")),
            *(round(row["tokens_s"][name]) for name in names),
            *([round(rate) for rate in row["eager_tokens_s"]] or ["-"]),
            *(row["plain_ms"], row["ours_ms"]),
            *(row["ours_over"][spec.name] for spec in PLAIN),
            max(row["loss_differences"].values()),
        ]
        for row in rows
    ]
    return header, cells


def draw(rows: Sequence[dict[str, Any]]) -> Axes:
    """Returns our tokens a second over the faster plain script's, by its step time; a line for each model."""
    axes = panel("milliseconds a step, by the faster of the plain torch-xla scripts", "our tokens a second over its")
    for color, model in enumerate(dict.fromkeys(row["model"].partition(" ")[0] for row in rows)):
        mine = [row for row in rows if row["model"].startswith(model)]
        points = sorted((row["plain_ms"], row["ours_over_plain"]) for row in mine if row["plan"] == "data")
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=f"C{color}", label=f"{model}, data parallel")
        others = [(row["plain_ms"], row["ours_over_plain"]) for row in mine if row["plan"] != "data"]
        if others:
            axes.plot(*zip(*others, strict=True), "x", color=f"C{color}", label=f"{model}, other plans")
    axes.axhline(WANTED, color="gray", ls="--", lw=1)
    axes.axvline(WANTED_FROM_MS, color="gray", ls=":", lw=1)
    axes.set_xscale("log")
    axes.legend()
    return axes


def main() -> None:
    """Entry point."""
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement, by the slowest system")
    parser.add_argument("--quick", action="store_true", help="one small workload, without eager PyTorch")
    arguments = parser.parse_args()
    workloads = QUICK if arguments.quick else WORKLOADS
    results = run(workloads, arguments.repeats, arguments.seconds, not arguments.quick)
    rows = results["rows"]
    print_table(*table(rows))
    long = [row for row in rows if row["plain_ms"] >= WANTED_FROM_MS]
    enough = sum(row["ours_over_plain"] >= WANTED for row in long)
    print(f"at least {WANTED} of the faster plain script in {enough} of {len(long)} rows over {WANTED_FROM_MS:g} ms")
    differences = {spec.name: max(row["loss_differences"][spec.name] for row in rows) for spec in PLAIN}
    for name, difference in differences.items():
        print(f"largest relative difference of our losses and {name}'s: {difference:.1e}")
    worst = max(differences.values())
    finish("spmd", results, draw(rows), print_json=arguments.json)
    if worst > TOLERANCE:
        sys.exit(f"the systems do not compute the same: losses differ by {worst:.1e}, more than {TOLERANCE:g}")


if __name__ == "__main__":
    main()
