"""The smallest computation that we run at the peer's speed: the paper's Figure 6.

How to read it: README.md beside this file. `python -m benchmarks.smallest --help`.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from benchmarks import systems
from benchmarks.report import argument_parser, finish, machine, median, numbers, paired_ratio, panel, print_table

#: The first runs the same XLA; the others' XLA is another, or they trace each computation anew.
PEERS = tuple(spec.name for spec in (systems.TORCH_XLA_COMPILED, systems.TORCH_XLA, systems.JAX))
#: Of the peer's throughput.
ENOUGH = 0.95


def run(hosts: list[int], loops: list[int], peer: systems.SystemSpec, repeats: int, seconds: float) -> dict[str, Any]:
    """Measures every length at every number of hosts; returns the rows and the smallest that suffices."""
    rows: list[dict[str, Any]] = []
    smallest: dict[int, float | None] = {}
    for count in hosts:
        with systems.running([systems.OURS, peer], count) as started:
            if len(started) < 2:
                continue
            mine = [_row(count, number, started, peer, repeats, seconds) for number in loops]
        rows += mine
        smallest[count] = _smallest(mine)
    return {"machine": machine(), "peer": peer.name, "rows": rows, "smallest_us": smallest}


def _row(
    hosts: int, loops: int, started: list[systems.System], peer: systems.SystemSpec, repeats: int, seconds: float
) -> dict[str, Any]:
    rates = systems.measure(started, {"mode": "work", "loops": loops}, repeats, seconds)
    ours, theirs = rates[systems.OURS.name], rates[peer.name]
    return {
        "hosts": hosts,
        "matrix products": loops,
        "peer_us": 1e6 / median(theirs),
        "ours_us": 1e6 / median(ours),
        "ours_over_peer": paired_ratio(ours, theirs),
    }


def _smallest(rows: list[dict[str, Any]]) -> float | None:
    """Returns the peer's microseconds for the shortest computation from which on we are fast enough."""
    found = None
    for row in reversed(rows):
        if row["ours_over_peer"] < ENOUGH:
            break
        found = row["peer_us"]
    return found


def draw(rows: list[dict[str, Any]], peer: str) -> Axes:
    """Returns throughput over the peer's by length of the computation, a line for each number of hosts."""
    axes = panel(f"microseconds a computation, by {peer}", f"our throughput over {peer}'s")
    for hosts in dict.fromkeys(row["hosts"] for row in rows):
        points = [(row["peer_us"], row["ours_over_peer"]) for row in rows if row["hosts"] == hosts]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{hosts} hosts")
    axes.axhline(ENOUGH, color="gray", ls="--", lw=1)
    axes.set_xscale("log")
    axes.legend()
    return axes


def main() -> None:
    """Entry point."""
    parser = argument_parser(__doc__)
    parser.add_argument("--hosts", type=numbers, default=[1])
    parser.add_argument("--loops", type=numbers, default=[1, 2, 4, 8, 16, 32, 64, 128], help="matrix products")
    parser.add_argument("--peer", choices=PEERS, default=PEERS[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one measurement")
    arguments = parser.parse_args()
    peer = next(spec for spec in systems.ALL if spec.name == arguments.peer)
    results = run(arguments.hosts, arguments.loops, peer, arguments.repeats, arguments.seconds)
    rows = results["rows"]
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    for hosts, found in results["smallest_us"].items():
        what = f"{found:,.0f} us" if found is not None else "longer than all that were tried"
        print(f"{hosts} hosts: at least {ENOUGH:.0%} of {peer.name}'s throughput from a computation of {what}")
    finish(f"smallest_{peer.name.replace(' ', '_')}", results, draw(rows, peer.name), print_json=arguments.json)


if __name__ == "__main__":
    main()
