"""`schedule="auto"`: searches for the schedule with the shortest makespan that fits into memory.

Knowing what each action takes, a list scheduler runs the pipeline forward in time: whenever a slice is free, it takes
the action that is best by some rule among those that it could begin first. No rule is best everywhere, so several are
tried, together with the schedules that have names; `dry_run` decides between them.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torchways.errors import ConfigError
from torchways.schedules.actions import Action, Kind, Schedule
from torchways.schedules.dry_run import Costs, Timeline, dry_run
from torchways.schedules.named import SCHEDULES

#: The name under which users ask for it.
AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A schedule that fits, how it runs, and the makespans of all that were tried and fit, by name."""

    schedule: Schedule
    timeline: Timeline
    tried: Mapping[str, float]


def find_schedule(
    slice_of_stage: Sequence[int],
    num_microbatches: int,
    costs: Costs,
    max_held: Sequence[int] | None = None,
    *,
    apart: bool = False,
) -> Found:
    """Returns the schedule with the shortest makespan; the arguments are those of `find_schedules`."""
    return find_schedules(slice_of_stage, num_microbatches, costs, max_held, apart=apart)[0]


def find_schedules(
    slice_of_stage: Sequence[int],
    num_microbatches: int,
    costs: Costs,
    max_held: Sequence[int] | None = None,
    *,
    apart: bool = False,
    also: Sequence[Schedule] = (),
) -> list[Found]:
    """Returns schedules that fit, all different, the one with the shortest makespan first.

    Of schedules that take equally long, the one that holds fewer activations comes first.

    Args:
        slice_of_stage: the slice of each stage.
        num_microbatches: to run.
        costs: what each action takes.
        max_held: for each slice, the most microbatches whose activations it may hold at a time, over all its stages
            (see `Timeline.held`); None: any number.
        apart: whether to take only schedules that have input and weight gradients apart.
        also: schedules of the same stages, on the same slices, to try as well.

    Raises:
        ConfigError: no schedule fits: some slice may hold fewer than it has stages.
    """
    homes = tuple(slice_of_stage)
    num_slices = 1 + max(homes)
    limits = list(max_held) if max_held is not None else [len(homes) * num_microbatches] * num_slices
    for index, limit in enumerate(limits):
        if limit < homes.count(index):
            raise ConfigError(
                f"slice {index} has {homes.count(index)} stages and memory for the activations of "
                f"{limit} microbatches of a stage: take smaller microbatches, or checkpoint activations"
            )
    timelines: dict[tuple[tuple[Action, ...], ...], tuple[Schedule, Timeline]] = {}
    tried: dict[str, float] = {}
    for candidate in (*_candidates(homes, num_microbatches, costs, limits), *also):
        if candidate.rows in timelines or (apart and not candidate.splits_backward):
            continue
        timeline = dry_run(candidate, costs)
        if any(held > limit for held, limit in zip(timeline.held, limits, strict=True)):
            continue
        tried[candidate.name] = timeline.makespan
        timelines[candidate.rows] = candidate, timeline
    # One microbatch after the other always fits.
    ranked = sorted(timelines.values(), key=lambda item: (_rounded(item[1].makespan), sum(item[1].held)))
    return [Found(schedule=schedule, timeline=timeline, tried=tried) for schedule, timeline in ranked]


def _rounded(makespan: float) -> float:
    """Returns a makespan without what additions in another order make of it."""
    return float(f"{makespan:.9g}")


def held_limits(free_bytes: Sequence[int | None], bytes_held: Sequence[int], most: int) -> list[int]:
    """Returns how many microbatches' activations each slice may hold.

    Args:
        free_bytes: what each slice has for activations, bytes per device; None: no limit.
        bytes_held: what one microbatch holds on each slice from a stage's forward pass to its backward pass, bytes per
            device; of several stages the most.
        most: the answer where there is no limit.
    """
    return [
        most if free is None or not held else min(most, max(0, free) // held)
        for free, held in zip(free_bytes, bytes_held, strict=True)
    ]


def _candidates(
    slice_of_stage: tuple[int, ...], num_microbatches: int, costs: Costs, limits: Sequence[int]
) -> Iterator[Schedule]:
    num_stages, num_slices = len(slice_of_stage), 1 + max(slice_of_stage)
    for make in SCHEDULES.values():
        try:
            made = make(num_stages, num_slices, num_microbatches)
        except ConfigError:
            continue
        if [made.slice_of_stage[stage] for stage in range(num_stages)] == list(slice_of_stage):
            yield made
    for name, rule in _RULES.items():
        for splits in (True, False):
            listed = _list_schedule(slice_of_stage, num_microbatches, costs, limits, rule, splits=splits)
            yield Schedule(f"{name}{', weight gradients apart' if splits else ''}", listed)


_ORDER: Mapping[Kind, int] = {Kind.INPUT: 0, Kind.BACKWARD: 0, Kind.FORWARD: 1, Kind.WEIGHT: 2}
#: What orders the actions that a slice could begin at one time; the lowest is taken.
_Rule = Callable[[Action], tuple[int, ...]]

_RULES: Mapping[str, _Rule] = {
    # Backward passes first: they free memory, and other slices wait for them. Of several, the earliest microbatch.
    "backward first": lambda a: (_ORDER[a.kind], a.microbatch, -a.stage),
    # Of forward passes the latest stage: microbatches come to their backward pass as soon as they can.
    "deep first": lambda a: (_ORDER[a.kind], -a.stage, a.microbatch),
    # Of forward passes the earliest stage: the next slices have work as soon as they can.
    "wide first": lambda a: (_ORDER[a.kind], a.stage, a.microbatch),
    "forward first": lambda a: (a.kind is not Kind.FORWARD, _ORDER[a.kind], a.microbatch, -a.stage),
}


def _list_schedule(
    slice_of_stage: tuple[int, ...],
    num_microbatches: int,
    costs: Costs,
    limits: Sequence[int],
    rule: _Rule,
    *,
    splits: bool,
) -> tuple[tuple[Action, ...], ...]:
    """Returns the rows that taking the best action by a rule comes to."""
    num_stages, num_slices = len(slice_of_stage), 1 + max(slice_of_stage)
    #: Stages behind each one on its slice. So much room is left for them, or all of it might go to microbatches that
    #: then wait for each other.
    later_stages = [slice_of_stage[stage + 1 :].count(home) for stage, home in enumerate(slice_of_stage)]
    backward = Kind.INPUT if splits else Kind.BACKWARD
    rows: list[list[Action]] = [[] for _ in range(num_slices)]
    #: Of each slice: the microbatches of the actions that it can take, as a heap for each stage and kind: by any rule,
    #: of actions that differ in nothing else, the one of the earliest microbatch comes first.
    ready: list[dict[tuple[int, Kind], list[int]]] = [defaultdict(list) for _ in range(num_slices)]
    #: Of each slice: actions that it can take from a time on, as a heap.
    later: list[list[tuple[float, Action]]] = [[] for _ in range(num_slices)]
    free_at = [0.0] * num_slices
    held = [0] * num_slices
    ready[slice_of_stage[0]][0, Kind.FORWARD] = list(range(num_microbatches))
    #: When to look at which slice.
    events = [(0.0, index) for index in range(num_slices)]
    while events:
        time, index = heapq.heappop(events)
        if time < free_at[index]:
            continue
        while later[index] and later[index][0][0] <= time:
            _, action = heapq.heappop(later[index])
            heapq.heappush(ready[index][action.stage, action.kind], action.microbatch)
        now = [
            Action(stage, kind, numbers[0])
            for (stage, kind), numbers in ready[index].items()
            if numbers and (kind is not Kind.FORWARD or held[index] < limits[index] - later_stages[stage])
        ]
        if not now:
            continue
        action = min(now, key=rule)
        heapq.heappop(ready[index][action.stage, action.kind])
        rows[index].append(action)
        held[index] += (action.kind is Kind.FORWARD) - (Kind.WEIGHT in action.kind.parts)
        free_at[index] = done = time + costs.of(action.stage, action.kind)
        heapq.heappush(events, (done, index))
        for following in _following(action, num_stages, backward):
            home = slice_of_stage[following.stage]
            since = done + costs.transfer * (home != index)
            heapq.heappush(later[home], (since, following))
            heapq.heappush(events, (since, home))
    return tuple(map(tuple, rows))


def _following(action: Action, num_stages: int, backward: Kind) -> Iterator[Action]:
    """Yields the actions that can begin when one has ended, if nothing else is missing."""
    stage, number = action.stage, action.microbatch
    if action.kind is Kind.FORWARD:
        yield Action(stage + 1, Kind.FORWARD, number) if stage + 1 < num_stages else Action(stage, backward, number)
    elif action.kind is backward:
        if stage:
            yield Action(stage - 1, backward, number)
        if backward is Kind.INPUT:
            yield Action(stage, Kind.WEIGHT, number)
