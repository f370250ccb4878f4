"""Runs a schedule without computing anything: does it end, how long does it take, and what does it hold meanwhile?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torchways.errors import ConfigError
from torchways.schedules.actions import Action, Kind, Schedule, grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """How long actions take, in any one unit of time.

    Attributes:
        seconds: of each (stage, kind), where it is known; a whole backward pass takes as long as its two parts.
        default: of kinds that `seconds` does not have.
        transfer: from one slice to another.
    """

    seconds: Mapping[tuple[int, Kind], float]
    default: float = 1.0
    transfer: float = 0.0

    def of(self, stage: int, kind: Kind) -> float:
        """Returns what an action takes."""
        if (stage, kind) in self.seconds:
            return self.seconds[stage, kind]
        return sum(self.seconds.get((stage, part), self.default) for part in kind.parts)


UNIT_COSTS = Costs(seconds={})
"""A forward pass takes 1, and a backward pass 2."""


@dataclass(frozen=True, slots=True)
class Span:
    """An action and when it runs."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A schedule as it runs.

    Attributes:
        rows: what each slice does, in order.
        held: for each slice, the most microbatches whose activations it holds at a time, over all of its stages: from
            the end of a forward pass to the end of its weight gradients. Without backward passes it holds none.
    """

    rows: tuple[tuple[Span, ...], ...]
    held: tuple[int, ...]

    @property
    def makespan(self) -> float:
        """When the last action ends."""
        return max((span.end for row in self.rows for span in row), default=0.0)

    @property
    def bubble(self) -> float:
        """The part of the time of all slices in which they wait, 0 to 1."""
        busy = sum(span.end - span.start for row in self.rows for span in row)
        return 1 - busy / (self.makespan * len(self.rows)) if self.makespan else 0.0


def dry_run(schedule: Schedule, costs: Costs = UNIT_COSTS) -> Timeline:
    """Returns when each action runs: once those before it on its slice, and those that it depends on, have ended.

    Raises:
        ConfigError: actions are missing or come twice, or slices wait for each other; the message has the grid.
    """
    _check_actions(schedule)
    homes, num_stages = schedule.slice_of_stage, schedule.num_stages
    ended: dict[tuple[int, Kind, int], float] = {}
    rows: list[list[Span]] = [[] for _ in schedule.rows]
    waiting = set(range(len(rows)))
    while waiting:
        moved = False
        for index in sorted(waiting):
            row = rows[index]
            while len(row) < len(schedule.rows[index]):
                action = schedule.rows[index][len(row)]
                needed = list(_needed(action, num_stages))
                if any(key not in ended for key in needed):
                    break
                arrivals = (ended[key] + costs.transfer * (homes[key[0]] != index) for key in needed)
                start = max((row[-1].end if row else 0.0, *arrivals))
                row.append(Span(action, start, start + costs.of(action.stage, action.kind)))
                for part in action.kind.parts:
                    ended[action.stage, part, action.microbatch] = row[-1].end
                moved = True
            else:
                waiting.discard(index)
        if not moved:
            raise ConfigError(_deadlock_text(schedule, rows, ended))
    return Timeline(rows=tuple(map(tuple, rows)), held=tuple(map(most_held, schedule.rows)))


def held_by_stage(schedule: Schedule) -> tuple[int, ...]:
    """Returns, for each stage, the most microbatches whose activations it holds at a time."""
    actions = [action for row in schedule.rows for action in row]
    return tuple(
        most_held(action for action in actions if action.stage == stage) for stage in range(schedule.num_stages)
    )


def _needed(action: Action, num_stages: int) -> Iterator[tuple[int, Kind, int]]:
    stage, number = action.stage, action.microbatch
    if action.kind is Kind.FORWARD:
        if stage:
            yield stage - 1, Kind.FORWARD, number
    elif action.kind is Kind.WEIGHT:
        yield stage, Kind.INPUT, number
    else:
        yield stage, Kind.FORWARD, number
        if stage < num_stages - 1:
            yield stage + 1, Kind.INPUT, number


def most_held(row: Iterable[Action]) -> int:
    """Returns the most microbatches whose activations are held at a time, of actions in their order."""
    held = most = 0
    row = list(row)
    if all(action.kind is Kind.FORWARD for action in row):
        return 0
    for action in row:
        held += action.kind is Kind.FORWARD
        most = max(most, held)
        held -= Kind.WEIGHT in action.kind.parts
    return most


def _check_actions(schedule: Schedule) -> None:
    counts: dict[tuple[int, Kind, int], int] = defaultdict(int)
    homes: dict[int, set[int]] = defaultdict(set)
    for index, row in enumerate(schedule.rows):
        for action in row:
            homes[action.stage].add(index)
            for part in action.kind.parts:
                counts[action.stage, part, action.microbatch] += 1
    kinds = (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT) if schedule.has_backward else (Kind.FORWARD,)
    num_microbatches = schedule.num_microbatches
    for stage in range(schedule.num_stages):
        if len(homes[stage]) > 1:
            raise ConfigError(f"schedule {schedule.name} has stage {stage} on slices {sorted(homes[stage])}: take one")
        for kind in kinds:
            for number in range(num_microbatches):
                if counts[stage, kind, number] != 1:
                    name = Action(stage, kind, number)
                    raise ConfigError(
                        f"schedule {schedule.name} has {name} {counts[stage, kind, number]} times, and must have it "
                        "once (a B is an I and a W)"
                    )


def _deadlock_text(schedule: Schedule, rows: list[list[Span]], ended: Mapping[tuple[int, Kind, int], float]) -> str:
    lines = []
    for index, row in enumerate(rows):
        if len(row) < len(schedule.rows[index]):
            action = schedule.rows[index][len(row)]
            missing = [str(Action(*key)) for key in _needed(action, schedule.num_stages) if key not in ended]
            lines.append(f"  slice {index} is at {action}, which needs {' and '.join(missing)}")
    reached = grid([schedule.rows[index][: len(row) + 1] for index, row in enumerate(rows)])
    return f"schedule {schedule.name} deadlocks:\n" + "\n".join(lines) + f"\nas far as it comes:\n{reached}"
