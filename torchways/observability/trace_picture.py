"""A picture of a trace: a lane for each device, coloured by client, as the paper's Figures 9 and 11."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from torchways.errors import ConfigError

#: Of clients, in the order of their ids; the last for those that are not named.
COLORS = ("#4c78a8", "#f2a541", "#8cb369", "#e4632d", "#b5179e", "#5f4bb6", "#2a9d8f", "#9c6644")
_UNNAMED_COLOR = "#bbbbbb"
_LANE_HEIGHT = 0.8
#: Above this, lanes grow thinner, not the picture taller.
_MAX_INCHES = 40.0
_ON_ISLAND = re.compile(r"island \d+ device \d+")


def lanes_of(trace: Mapping[str, Any]) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """Returns what each device computed, by its name and by client: starts and durations in milliseconds.

    Devices that have their number on the island are one lane, whichever executors had them.
    """
    processes, tracks = {}, {}
    for event in trace["traceEvents"]:
        if event["ph"] == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event["ph"] == "M":
            tracks[event["pid"], event["tid"]] = event["args"]["name"].partition(" (")[0]
    found: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for event in trace["traceEvents"]:
        if event["ph"] == "X" and event.get("cat") == "compute":
            track = tracks[event["pid"], event["tid"]]
            lane = track if _ON_ISLAND.fullmatch(track) else f"{processes[event['pid']]} {track}"
            client = event["args"].get("client", 0)
            found[lane][client].append((event["ts"] / 1e3, event["dur"] / 1e3))
    return {lane: dict(found[lane]) for lane in sorted(found, key=_in_order)}


def _in_order(name: str) -> list[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def colors_of(clients: set[int]) -> dict[int, str]:
    """Returns a colour for each client."""
    named = sorted(clients - {0})
    colors = {client: COLORS[number % len(COLORS)] for number, client in enumerate(named)}
    return {**colors, 0: _UNNAMED_COLOR} if 0 in clients else colors


def draw_lanes(axes: Axes, trace: Mapping[str, Any]) -> None:
    """Draws a trace's lanes, and what the colours mean.

    Raises:
        ConfigError: nothing was computed.
    """
    lanes = lanes_of(trace)
    if not lanes:
        raise ConfigError("the trace has no computation to draw: trace while a client runs programs")
    colors = colors_of({client for of_lane in lanes.values() for client in of_lane})
    begin = min(start for of_lane in lanes.values() for bars in of_lane.values() for start, _ in bars)
    for number, of_lane in enumerate(lanes.values()):
        for client, bars in sorted(of_lane.items()):
            moved = [(start - begin, duration) for start, duration in bars]
            axes.broken_barh(moved, (number - _LANE_HEIGHT / 2, _LANE_HEIGHT), facecolors=colors[client], linewidth=0)
    axes.set_yticks(range(len(lanes)), list(lanes), fontsize=7)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds")
    names = trace.get("otherData", {}).get("clients", {})
    handles = [Patch(color=color, label=_label(client, names)) for client, color in colors.items()]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=7, frameon=False)


def _label(client: int, names: Mapping[str, str]) -> str:
    if not client:
        return "others"
    name = names.get(str(client), "")
    return f"client {client}: {name}" if name else f"client {client}"


def write_picture(path: Path, trace: Mapping[str, Any]) -> None:
    """Draws a trace into a PNG file.

    Raises:
        ConfigError: nothing was computed.
    """
    figure = Figure(figsize=(11, min(_MAX_INCHES, 1.3 + 0.3 * len(lanes_of(trace)))))
    FigureCanvasAgg(figure)
    draw_lanes(figure.add_subplot(), trace)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)
