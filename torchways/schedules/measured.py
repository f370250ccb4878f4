"""Schedules as they ran: what actions took, and how long slices waited."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torchways.errors import ConfigError
from torchways.schedules.actions import Action, Kind
from torchways.schedules.dry_run import Costs, Span, Timeline, most_held


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """A run of a schedule.

    Attributes:
        spans: when each action computed, in any order and any one unit of time. An action of several computations has
            several spans, and one without any has none.
        transfers: how long values took from the end of the action that made them to their arrival on another slice.
    """

    spans: tuple[Span, ...]
    transfers: tuple[float, ...] = ()


def measured_costs(runs: Sequence[MeasuredRun]) -> Costs:
    """Returns the medians, over microbatches and runs, of what each stage's actions and a transfer took.

    An action that computes nothing (input gradients of the first stage) takes no time.

    Raises:
        ConfigError: no run has a span.
    """
    if not any(run.spans for run in runs):
        raise ConfigError("no action of a schedule was measured")
    taken: dict[tuple[int, Kind], list[float]] = defaultdict(list)
    for run in runs:
        busy: dict[Action, float] = defaultdict(float)
        for span in run.spans:
            busy[span.action] += span.end - span.start
        for action, seconds in busy.items():
            taken[action.stage, action.kind].append(seconds)
    transfers = [seconds for run in runs for seconds in run.transfers]
    return Costs(
        seconds={key: statistics.median(found) for key, found in taken.items()},
        default=0.0,
        transfer=statistics.median(transfers) if transfers else 0.0,
    )


def measured_timeline(run: MeasuredRun, slice_of_stage: Mapping[int, int], num_slices: int) -> Timeline:
    """Returns how a run went on, from the start of its first action.

    Args:
        run: it.
        slice_of_stage: the slice of each stage.
        num_slices: rows of the timeline.
    """
    begin = min((span.start for span in run.spans), default=0.0)
    rows: list[list[Span]] = [[] for _ in range(num_slices)]
    for span in sorted(run.spans, key=lambda span: span.start):
        rows[slice_of_stage[span.action.stage]].append(Span(span.action, span.start - begin, span.end - begin))
    held = tuple(most_held(_once(span.action for span in row)) for row in rows)
    return Timeline(rows=tuple(map(tuple, rows)), held=held)


def _once(actions: Iterable[Action]) -> list[Action]:
    return list(dict.fromkeys(actions))
