"""What recording spans costs: steps of about 5 ms, with spans and without, in turn.

How to read it: README.md beside this file. `python -m benchmarks.trace_overhead --help`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.report import argument_parser, machine, median, paired_ratio, print_table

_SPANS_VARIABLE = "TORCHWAYS_SPANS"


def serve(products: int) -> None:
    """Runs as many steps as each line of stdin says; answers with the seconds of a step."""
    import torch

    import torchways as tw

    with tw.init():
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        matrix = tw.distribute_tensor(torch.randn(128, 128) / 128**0.5, mesh)

        @tw.program
        def step(value: torch.Tensor) -> torch.Tensor:
            for _ in range(products):
                value = value @ matrix
            return value

        state = step(matrix)
        state.cpu()
        print("ready", flush=True)
        for line in sys.stdin:
            count = int(line)
            started = time.perf_counter()
            for _ in range(count):
                state = step(state)
            state.cpu()
            print((time.perf_counter() - started) / count, flush=True)


def _start(products: int, *, records: bool) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.trace_overhead", "--serve", str(products)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, _SPANS_VARIABLE: "1" if records else "0"},
    )


def _seconds(process: subprocess.Popen[str], steps: int) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def run(products: int, repeats: int, steps: int) -> dict[str, Any]:
    """Measures both in turn; returns the seconds of steps and their ratio."""
    processes = {name: _start(products, records=name == "on") for name in ("on", "off")}
    times: dict[str, list[float]] = {"on": [], "off": []}
    try:
        for process in processes.values():
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a client ended before it was ready; its error is above")
            _seconds(process, steps)  # warm-up
        for number in range(repeats):
            for name in ("on", "off") if number % 2 == 0 else ("off", "on"):
                times[name].append(_seconds(processes[name], steps))
    finally:
        for process in processes.values():
            process.communicate()  # the end of its stdin ends it
    return {
        "machine": machine(),
        "step_ms": {name: median(found) * 1e3 for name, found in times.items()},
        "on_over_off": paired_ratio(times["on"], times["off"]),
        "times": times,
    }


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--serve", type=int, metavar="PRODUCTS", help="be a client (internal)")
    parser.add_argument("--products", type=int, default=60, help="of 128x128 matrices, a step")
    parser.add_argument("--steps", type=int, default=100, help="in a measurement")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    found = run(arguments.products, arguments.repeats, arguments.steps)
    rows = [[f"spans {name}", found["step_ms"][name], min(found["times"][name]) * 1e3] for name in ("on", "off")]
    print_table(["", "ms a step", "least"], rows)
    print(f"on/off: {found['on_over_off']:.3f}")
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
