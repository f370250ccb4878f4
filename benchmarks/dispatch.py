"""Dispatch throughput, the paper's Figure 5: op-by-op, chained and fused, against JAX, Ray, Monarch and torch-xla.

How to read it: README.md beside this file. `python -m benchmarks.dispatch --help`.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import systems
from benchmarks.report import argument_parser, finish, machine, median, numbers, paired_ratio, print_table


def run(hosts: list[int], specs: list[systems.SystemSpec], repeats: int, seconds: float) -> dict[str, Any]:
    """Measures everything; returns the versions and one row for each cell of the table."""
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    together = [spec for spec in specs if not spec.is_alone]
    for count in hosts:
        mine: list[dict[str, Any]] = []
        for group in [together, *([spec] for spec in specs if spec.is_alone)]:
            with systems.running(group, count) as started:
                versions.update({system.spec.name: system.version for system in started})
                for mode, collective in _kinds(count):
                    request = {"mode": mode, "collective": collective, "chain": 128}
                    rates = systems.measure(started, request, repeats, seconds)
                    mine += _rows(count, mode, collective, rates, mine)
        mine.sort(key=lambda row: _kinds(count).index((row["mode"], row["collective"])))
        _print(mine)
        rows += mine
    return {"machine": machine(), "versions": versions, "rows": rows}


def _kinds(hosts: int) -> list[tuple[str, bool]]:
    return [(mode, collective) for collective in ((False, True) if hosts > 1 else (False,)) for mode in systems.MODES]


def _rows(
    hosts: int, mode: str, collective: bool, rates: dict[str, list[float]], before: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Returns a row for each system. What waits for each result is compared with ours that does."""
    known = {row["system"]: row["rates"] for row in before if (row["mode"], row["collective"]) == (mode, collective)}
    known |= rates
    rows = []
    for name, found in rates.items():
        ours = known.get((systems.OURS_WAITING if name.endswith("waiting") else systems.OURS).name, [])
        rows.append(
            {
                "hosts": hosts,
                "mode": mode,
                "collective": collective,
                "system": name,
                "computations_per_second": median(found),
                "min": min(found),
                "max": max(found),
                "ours_over_it": paired_ratio(ours, found),
                "rates": found,
            }
        )
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    header = ["hosts", "mode", "all-reduce", "system", "computations/s", "min", "max", "ours/it"]
    cells = [
        [row["hosts"], row["mode"], "yes" if row["collective"] else "no", row["system"]]
        + [row[key] for key in ("computations_per_second", "min", "max", "ours_over_it")]
        for row in rows
    ]
    print_table(header, cells)
    print(flush=True)


def draw(rows: list[dict[str, Any]]) -> Axes:
    """Returns one panel for each kind, computations a second by hosts."""
    _, panels = plt.subplots(2, 3, figsize=(13, 7), sharex=True)
    colors = {spec.name: f"C{number}" for number, spec in enumerate(systems.ALL)}
    for line, collective in enumerate((False, True)):
        for column, mode in enumerate(systems.MODES):
            axes = panels[line][column]
            shown = [row for row in rows if row["mode"] == mode and row["collective"] == collective]
            for name in dict.fromkeys(row["system"] for row in shown):
                points = [(row["hosts"], row["computations_per_second"]) for row in shown if row["system"] == name]
                width = 3 if name == systems.OURS.name else 1.5
                axes.plot(*zip(*points, strict=True), marker="o", label=name, color=colors[name], lw=width)
            axes.set_title(f"{mode}, {'with' if collective else 'without'} all-reduce")
            axes.set_yscale("log")
            axes.set_xscale("log", base=2)
            axes.grid(True, alpha=0.3)
            if shown:
                axes.legend(fontsize=7)
    for axes in panels[:, 0]:
        axes.set_ylabel("computations a second")
    for axes in panels[-1]:
        axes.set_xlabel("hosts (processes on one machine)")
    first: Axes = panels[0][0]
    return first


def main() -> None:
    """Entry point."""
    parser = argument_parser(__doc__)
    parser.add_argument("--hosts", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one measurement")
    names = [spec.name for spec in systems.ALL]
    parser.add_argument("--systems", nargs="*", choices=names, default=names)
    arguments = parser.parse_args()
    chosen = [spec for spec in systems.ALL if spec.name in arguments.systems]
    results = run(arguments.hosts, chosen, arguments.repeats, arguments.seconds)
    finish("dispatch", results, draw(results["rows"]), print_json=arguments.json)


if __name__ == "__main__":
    main()
