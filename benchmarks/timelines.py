"""Pictures of pipelines as they ran, from the traces that `tw.profile` writes: the paper's Figure 11.

A lane is a slice. Bars are the actions of a schedule, with the number of their microbatch; lines from lane to lane are
transfers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from torchways.errors import ConfigError
from torchways.schedules.actions import Action, Kind, parse_action

COLORS: Mapping[Kind, str] = {
    Kind.FORWARD: "#4c78a8",
    Kind.BACKWARD: "#f2a541",
    Kind.INPUT: "#e4632d",
    Kind.WEIGHT: "#8cb369",
}
NAMES: Mapping[Kind, str] = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT: "backward, input gradients",
    Kind.WEIGHT: "backward, weight gradients",
}
TRANSFER_COLOR = "#b5179e"

_SEND, _RECEIVE = re.compile(r"send edge (\d+) to "), re.compile(r"receive edge (\d+)")
#: A lane's distance from the next is 1; shorter bars than so many milliseconds of a picture's width have no number.
_LANE_HEIGHT, _NARROW = 0.7, 1 / 120


@dataclass(frozen=True, slots=True)
class Bar:
    """An action in a lane; times in milliseconds."""

    lane: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Move:
    """A transfer from a lane to another; times in milliseconds."""

    from_lane: int
    to_lane: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class LaneTimes:
    """What each lane did in a run, from the start of its first action."""

    bars: tuple[Bar, ...]
    moves: tuple[Move, ...]

    @property
    def end(self) -> float:
        """When the last action ended."""
        return max(bar.end for bar in self.bars)


def lane_times(trace: Mapping[str, Any], slice_of_stage: Mapping[int, int]) -> LaneTimes:
    """Reads a trace of one call of a program whose one loop is a pipeline.

    Args:
        trace: what `tw.profile` wrote. Each slice has a process of its own.
        slice_of_stage: of the schedule.

    Raises:
        ConfigError: it has no action of a schedule.
    """
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    actions = [(event, found) for event in events if (found := _action_of(event["name"])) is not None]
    if not actions:
        raise ConfigError("the trace has no action of a schedule: trace a call of a program with tw.pipeline")
    begin, end = min(event["ts"] for event, _ in actions), max(_end(event) for event, _ in actions)
    lane_of = {event["pid"]: slice_of_stage[action.stage] for event, action in actions}
    bars = [
        Bar(lane_of[event["pid"]], action, (event["ts"] - begin) / 1e3, (_end(event) - begin) / 1e3)
        for event, action in actions
    ]
    sent = {found[1]: event for event in events if (found := _SEND.match(event["name"]))}
    moves = []
    for event in events:
        found = _RECEIVE.fullmatch(event["name"])
        source = sent.get(found[1]) if found else None
        # The loop's own: what it takes in comes before, and what it leaves goes after it.
        if source is not None and begin < source["ts"] <= _end(event) <= end:
            lanes = lane_of[source["pid"]], lane_of[event["pid"]]
            moves.append(Move(*lanes, (source["ts"] - begin) / 1e3, (_end(event) - begin) / 1e3))
    return LaneTimes(tuple(sorted(bars, key=lambda bar: bar.start)), tuple(moves))


def _end(event: Mapping[str, Any]) -> float:
    return event["ts"] + event["dur"]


def _action_of(name: str) -> Action | None:
    """Returns the action that the last word of a span's name is, "stage0/2 0F3"."""
    try:
        return parse_action(name.rpartition(" ")[2])
    except ConfigError:
        return None


def draw_lanes(axes: Axes, times: LaneTimes, title: str) -> None:
    """Draws a run; a stage that is not the first one of its slice is drawn lighter."""
    stages = {lane: sorted({bar.action.stage for bar in times.bars if bar.lane == lane}) for lane in _lanes(times)}
    for bar in times.bars:
        is_first = bar.action.stage == stages[bar.lane][0]
        width = bar.end - bar.start
        axes.barh(
            bar.lane,
            width,
            left=bar.start,
            height=_LANE_HEIGHT,
            color=COLORS[bar.action.kind],
            alpha=1.0 if is_first else 0.6,
            edgecolor="white",
            linewidth=0.4,
        )
        if width > times.end * _NARROW:
            axes.text(bar.start + width / 2, bar.lane, str(bar.action.microbatch), ha="center", va="center", fontsize=6)
    for move in times.moves:
        toward = _LANE_HEIGHT / 2 if move.to_lane > move.from_lane else -_LANE_HEIGHT / 2
        ends = [move.from_lane + toward, move.to_lane - toward]
        axes.plot([move.start, move.end], ends, color=TRANSFER_COLOR, linewidth=0.8, zorder=0)
    axes.set_yticks(_lanes(times), [f"slice {lane}" for lane in _lanes(times)])
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=9)


def _lanes(times: LaneTimes) -> list[int]:
    return sorted({bar.lane for bar in times.bars})


def figure_of_runs(runs: Sequence[tuple[str, LaneTimes]], title: str) -> Figure:
    """Returns a figure with a panel for each run, by its title, on one axis of time."""
    lanes = max(len(_lanes(times)) for _, times in runs)
    figure, panels = plt.subplots(
        len(runs), figsize=(11, len(runs) * (0.55 + 0.27 * lanes) + 1), sharex=True, squeeze=False
    )
    for axes, (name, times) in zip(panels[:, 0], runs, strict=True):
        draw_lanes(axes, times, name)
    panels[-1, 0].set_xlabel("milliseconds from the start of the first forward pass")
    panels[-1, 0].set_xlim(0, max(times.end for _, times in runs))
    kinds = {bar.action.kind for _, times in runs for bar in times.bars}
    handles: list[Any] = [Patch(color=COLORS[kind], label=NAMES[kind]) for kind in COLORS if kind in kinds]
    handles.append(Line2D([], [], color=TRANSFER_COLOR, label="transfer"))
    figure.suptitle(title, fontsize=10)
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure
