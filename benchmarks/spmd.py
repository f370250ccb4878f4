"""Training steps against plain torch-xla, eager PyTorch and DistributedDataParallel: the paper's Table 1, small.

How to read it: README.md beside this file. `python -m benchmarks.spmd --help`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks import systems
from benchmarks.report import argument_parser, finish, machine, median, paired_ratio, panel, print_table

DATA, FULL, TENSOR, BOTH = ((4, 1), "data"), ((4, 1), "full"), ((1, 4), "tensor"), ((2, 2), "full x tensor")
PAIR, ALONE = ((2, 1), "data"), ((1, 1), "data")
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
    ("llama", "tiny", 8, 128, PAIR),
    ("llama", "mini", 8, 128, PAIR),
    ("t5", "tiny", 8, 64, PAIR),
    ("llama", "tiny", 8, 128, ALONE),
    ("llama", "mini", 8, 128, ALONE),
    ("llama", "small", 8, 256, ALONE),
    ("t5", "tiny", 8, 64, ALONE),
)
QUICK = (("llama", "nano", 8, 16, BOTH), ("llama", "nano", 8, 16, PAIR), ("llama", "nano", 8, 16, ALONE))

TORCHWAYS, LAZY, COMPILED, EAGER, DDP = "torchways", "torch-xla", "torch-xla compiled", "eager", "DDP"
#: What a user of plain torch-xla may write; in `ours_over_plain`, the faster one.
PLAIN = (LAZY, COMPILED)
#: Scripts of peers/, and their flags.
SCRIPTS: dict[str, tuple[str, ...]] = {
    TORCHWAYS: ("torchways_spmd.py",),
    LAZY: ("torch_xla_spmd.py",),
    COMPILED: ("torch_xla_spmd.py", "--compiled"),
    EAGER: ("eager_training.py",),
    DDP: ("ddp_training.py",),
}
#: What a user of plain PyTorch would run on as many devices; on four, eager PyTorch in one process is shown for
#: information, by two steps.
PYTORCH = {1: EAGER, 2: DDP}

#: Ratio of tokens a second to each of the others'.
WANTED = 1.0
#: Losses of systems that compute the same differ by less: rounding, which grows with each of some hundred updates.
TOLERANCE = 5e-3
_FEWEST_STEPS = 3
_EAGER_STEPS = 2


def run(workloads: Sequence[Any], repeats: int, seconds: float) -> dict[str, Any]:
    """Measures every workload; returns the rows."""
    rows: list[dict[str, Any]] = []
    for devices, found in itertools.groupby(workloads, lambda workload: math.prod(workload[4][0])):
        names = (TORCHWAYS, *PLAIN, *([PYTORCH[devices]] if devices in PYTORCH else []))
        with contextlib.ExitStack() as stack:
            started = stack.enter_context(running({name: SCRIPTS[name] for name in names}, devices))
            shown = stack.enter_context(running({EAGER: SCRIPTS[EAGER]}, 1)) if devices == 4 else []
            for model, size, batch, length, (mesh, plan) in found:
                workload = {"model": model, "size": size, "batch": batch, "length": length, "mesh": mesh, "plan": plan}
                rows.append(_row(workload, started, shown, repeats, seconds))
                print(f"{len(rows)} of {len(workloads)}: {rows[-1]}", file=sys.stderr, flush=True)
    return {"machine": machine(), "rows": rows}


@contextlib.contextmanager
def running(scripts: Mapping[str, tuple[str, ...]], devices: int) -> Iterator[list[systems.System]]:
    """Starts scripts of peers/, given by name with their flags, on as many devices each, and ends them.

    Raises:
        SystemExit: one does not start.
    """
    specs = [
        systems.SystemSpec(name, script, flags=(*flags, "--devices", str(devices)))
        for name, (script, *flags) in scripts.items()
    ]
    with systems.running(specs, hosts=1) as started:
        if len(started) < len(specs):
            raise SystemExit("a system did not start; what it wrote last stands above")
        yield started


def _row(
    workload: dict[str, Any], started: list[systems.System], shown: list[systems.System], repeats: int, seconds: float
) -> dict[str, Any]:
    found, answers, rates = compare(workload, started, TORCHWAYS, repeats, seconds)
    tokens = answers[TORCHWAYS][0]["tokens"]
    plain = max(PLAIN, key=lambda name: median(rates[name]))
    return {
        **found,
        "mesh": "x".join(map(str, workload["mesh"])),
        "devices": math.prod(workload["mesh"]),
        "plan": workload["plan"],
        "computations": answers[TORCHWAYS][-1]["computations"],
        "shown_tokens_s": [_EAGER_STEPS * tokens / ask(system, workload, _EAGER_STEPS)["seconds"] for system in shown],
        "plain": plain,
        "plain_ms": 1e3 * tokens / median(rates[plain]),
        "ours_over_plain": paired_ratio(rates[TORCHWAYS], rates[plain]),
    }


def compare(
    workload: dict[str, Any], started: list[systems.System], ours: str, repeats: int, seconds: float
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], dict[str, list[float]]]:
    """Measures a workload on all systems.

    Returns:
        what every table of training steps has of it, with the system `ours` against each other one; and by the
        system's name its answers, of which the first is not counted, and tokens a second.
    """
    answers, rates, losses = measure(workload, started, repeats, seconds)
    first, others = answers[ours][0], [name for name in rates if name != ours]
    row = {
        "model": f"{workload['model']} {workload['size']}",
        "parameters": first["parameters"],
        "batch": f"{workload['batch']}x{workload['length']}",
        "tokens_s": {name: median(found) for name, found in rates.items()},
        "ours_ms": 1e3 * first["tokens"] / median(rates[ours]),
        "ours_over": {name: paired_ratio(rates[ours], rates[name]) for name in others},
        "loss_differences": {name: difference(losses[ours], losses[name]) for name in others},
    }
    return row, answers, rates


def measure(
    workload: dict[str, Any], started: list[systems.System], repeats: int, seconds: float
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[float]], dict[str, list[float]]]:
    """Asks all systems for as many steps, in turn.

    Returns:
        by the system's name: its answers, of which the first is not counted, tokens a second, and each step's loss.
    """
    first = [ask(system, workload, _FEWEST_STEPS) for system in started]
    steps = max(_FEWEST_STEPS, round(seconds * _FEWEST_STEPS / max(answer["seconds"] for answer in first)))
    answers = {system.spec.name: [answer] for system, answer in zip(started, first, strict=True)}
    for _ in range(repeats):
        for system in started:
            answers[system.spec.name].append(ask(system, workload, steps))
    tokens = first[0]["tokens"]
    rates = {name: [steps * tokens / answer["seconds"] for answer in found[1:]] for name, found in answers.items()}
    losses = {name: [loss for answer in found for loss in answer["losses"]] for name, found in answers.items()}
    return answers, rates, losses


def ask(system: systems.System, workload: dict[str, Any], steps: int) -> dict[str, Any]:
    """Asks a system for steps of a workload; ends the benchmark where that fails or compiles."""
    answer = system.ask({"workload": workload, "steps": steps})
    if "error" in answer:
        raise SystemExit(f"{system.spec.name}, {workload}: {answer['error']}")
    if answer.get("compilations"):
        raise SystemExit(f"{system.spec.name}, {workload}: it compiled within a measurement, which so tells nothing")
    return answer


def difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """Returns the largest relative difference, step by step."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Returns the header and the cells of what is printed."""
    header = ["model", "parameters", "batch", "mesh", "plan", *(f"{name}, tokens/s" for name in (TORCHWAYS, *PLAIN))]
    header += ["PyTorch", "ours, ms", *(f"ours/{name}" for name in PLAIN), "ours/PyTorch", "loss differs"]
    return header, [_cells(row) for row in rows]


def _cells(row: dict[str, Any]) -> list[Any]:
    pytorch = PYTORCH.get(row["devices"])
    rate = f"{row['tokens_s'][pytorch]:,.0f} ({pytorch})" if pytorch else "-"
    if row["shown_tokens_s"]:
        rate = f"({row['shown_tokens_s'][0]:,.0f})"
    return [
        *(row[key] for key in ("model", "parameters", "batch", "mesh", "plan")),
        *(round(row["tokens_s"][name]) for name in (TORCHWAYS, *PLAIN)),
        rate,
        row["ours_ms"],
        *(row["ours_over"][name] for name in PLAIN),
        row["ours_over"][pytorch] if pytorch else "-",
        max(row["loss_differences"].values()),
    ]


def draw(rows: Sequence[dict[str, Any]]) -> Axes:
    """Returns our tokens a second over the faster plain script's, by its step time; a line for each model."""
    axes = panel("milliseconds a step, by the faster of the plain torch-xla scripts", "our tokens a second over its")
    for color, model in enumerate(dict.fromkeys(row["model"].partition(" ")[0] for row in rows)):
        mine = [row for row in rows if row["model"].startswith(model) and row["devices"] == 4]
        points = sorted((row["plain_ms"], row["ours_over_plain"]) for row in mine if row["plan"] == "data")
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=f"C{color}", label=f"{model}, data parallel")
        others = [(row["plain_ms"], row["ours_over_plain"]) for row in mine if row["plan"] != "data"]
        if others:
            axes.plot(*zip(*others, strict=True), "x", color=f"C{color}", label=f"{model}, other plans")
    axes.axhline(WANTED, color="gray", ls="--", lw=1)
    axes.set_xscale("log")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return axes


def main_job(steps: int, repeats: int) -> dict[str, Any]:
    """Returns milliseconds a step of the recipe, as `make train` runs it and as plain PyTorch in one process."""
    recipe = str(Path(__file__).parents[1] / "recipes" / "train_lm.py")
    options = ["model=tiny", f"train.steps={steps}", f"train.eval_every={steps}"]
    launcher = [sys.executable, "-m", "torchways.run", "--islands", "2", "--devices-per-island", "2"]
    eager = {**os.environ, "TORCHWAYS_EAGER": "1"}
    ways: dict[str, Any] = {
        TORCHWAYS: ([*launcher, recipe, *options], dict(os.environ)),
        EAGER: ([sys.executable, recipe, *options], eager),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (command, environment) in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(
                    command, cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=600
                )
            match = re.search(r"\(([0-9.]+) ms/step\)", done.stdout)
            assert match is not None, done.stdout
            found[name].append(float(match[1]))
    return {
        "ms": {name: median(values) for name, values in found.items()},
        "ours_over_eager": paired_ratio(found[EAGER], found[TORCHWAYS]),
    }


def main() -> None:
    """Entry point."""
    parser = argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement, by the slowest system")
    parser.add_argument("--quick", action="store_true", help="three small workloads, without the recipe")
    parser.add_argument("--devices", type=int, nargs="+", default=(1, 2, 4), help="numbers of devices")
    parser.add_argument("--main-job-steps", type=int, default=100, help="of the recipe; 0 leaves it out")
    arguments = parser.parse_args()
    workloads = [
        item for item in (QUICK if arguments.quick else WORKLOADS) if math.prod(item[4][0]) in arguments.devices
    ]
    results = run(workloads, arguments.repeats, arguments.seconds)
    rows = results["rows"]
    print_table(*table(rows))
    for name in dict.fromkeys(name for row in rows for name in row["ours_over"]):
        of_it = [row for row in rows if name in row["ours_over"]]
        enough = sum(row["ours_over"][name] >= WANTED for row in of_it)
        print(f"at least {WANTED} of {name} in {enough} of {len(of_it)} rows")
    if arguments.main_job_steps and not arguments.quick:
        results["main_job"] = job = main_job(arguments.main_job_steps, arguments.repeats)
        times = ", ".join(f"{name} {value:.0f} ms a step" for name, value in job["ms"].items())
        print(f"the recipe (make train): {times}; ours/eager {job['ours_over_eager']:.2f}")
    finish_compared("spmd", results, draw(rows), print_json=arguments.json)


def finish_compared(name: str, results: dict[str, Any], axes: Axes, *, print_json: bool) -> None:
    """Finishes a benchmark of training steps; ends it in an error where the systems' losses differ."""
    worst = max((found for row in results["rows"] for found in row["loss_differences"].values()), default=0.0)
    if results["rows"]:
        print(f"largest relative difference of losses: {worst:.1e}")
    finish(name, results, axes, print_json=print_json)
    if worst > TOLERANCE:
        sys.exit(f"the systems do not compute the same: losses differ by {worst:.1e}, more than {TOLERANCE:g}")


if __name__ == "__main__":
    main()
