"""What a pipeline schedule is: a list of actions for each slice, in the order in which the slice carries them out.

Actions are written as torch.distributed.pipelining writes them: stage, kind, microbatch. ``2F0`` is the forward pass of
stage 2 for microbatch 0. A schedule is read from and written as the same CSV: a line for each slice, a field for each
action, empty fields for steps in which the slice is idle.
"""

from __future__ import annotations

import csv
import enum
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torchways.errors import ConfigError


class Kind(enum.StrEnum):
    """What an action computes."""

    FORWARD = "F"
    BACKWARD = "B"
    """The whole backward pass: input gradients, then weight gradients."""
    INPUT = "I"
    """Gradients of the stage's inputs, which the stage before waits for."""
    WEIGHT = "W"
    """Gradients of the stage's parameters, which nobody waits for."""

    @property
    def parts(self) -> tuple[Kind, ...]:
        """The kinds that it consists of: INPUT and WEIGHT for BACKWARD."""
        return (Kind.INPUT, Kind.WEIGHT) if self is Kind.BACKWARD else (self,)


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """A stage's computation of one kind for one microbatch."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")
#: A forward and a backward pass at once: `(0F4;3B0)OVERLAP_F_B`. Here they are two actions.
_OVERLAPPED = re.compile(r"\((.*)\)OVERLAP_F_B")


def parse_action(text: str) -> Action:
    """Returns the action that a text, ``2F0``, describes.

    Raises:
        ConfigError: it describes none.
    """
    found = _ACTION.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"{text!r} is no action of a schedule: write stage, kind (F, B, I or W) and microbatch, like 2F0. "
            "Communication is not scheduled here: leave out SEND, RECV, UNSHARD and RESHARD"
        )
    return Action(int(found[1]), Kind(found[2]), int(found[3]))


def parse_actions(text: str) -> list[Action]:
    """Returns the actions of one field, ``2F0``; none for an empty one.

    Raises:
        ConfigError: it is no action.
    """
    text = text.strip()
    if overlapped := _OVERLAPPED.fullmatch(text):
        return [action for part in overlapped[1].split(";") for action in parse_actions(part)]
    return [parse_action(text)] if text else []


@dataclass(frozen=True, slots=True)
class Schedule:
    """A list of actions for each slice.

    Attributes:
        name: "1F1B"; for messages.
        rows: the actions of each slice, in order.
    """

    name: str
    rows: tuple[tuple[Action, ...], ...]

    @property
    def has_backward(self) -> bool:
        """Whether it has backward passes; one that does not is that of an evaluation."""
        return any(action.kind is not Kind.FORWARD for row in self.rows for action in row)

    @property
    def splits_backward(self) -> bool:
        """Whether it has input and weight gradients apart."""
        return any(action.kind in (Kind.INPUT, Kind.WEIGHT) for row in self.rows for action in row)

    def forward(self) -> Schedule:
        """Returns it without backward passes."""
        return Schedule(self.name, tuple(tuple(a for a in row if a.kind is Kind.FORWARD) for row in self.rows))

    @property
    def num_stages(self) -> int:
        """Stages of all slices."""
        return 1 + max((action.stage for row in self.rows for action in row), default=-1)

    @property
    def num_microbatches(self) -> int:
        """Microbatches that it runs."""
        return 1 + max((action.microbatch for row in self.rows for action in row), default=-1)

    @property
    def slice_of_stage(self) -> dict[int, int]:
        """The row of each stage."""
        return {action.stage: index for index, row in enumerate(self.rows) for action in row}

    @staticmethod
    def from_csv(text: str, name: str = "from CSV") -> Schedule:
        """Returns the schedule that a text in the CSV form of torch.distributed.pipelining describes.

        Raises:
            ConfigError: it describes none.
        """
        rows = [[action for field in row for action in parse_actions(field)] for row in csv.reader(io.StringIO(text))]
        return Schedule(name, tuple(map(tuple, rows)))

    def to_csv(self) -> str:
        """Returns it in the CSV form of torch.distributed.pipelining."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([map(str, row) for row in self.rows])
        return text.getvalue()

    def __str__(self) -> str:
        return grid(self.rows)


def grid(rows: Sequence[Iterable[Action | None]]) -> str:
    """Returns rows of actions as text: a line for each slice, a column for each step."""
    texts = [[str(action) if action is not None else "" for action in row] for row in rows]
    widths = [
        max(len(row[step]) for row in texts if step < len(row)) for step in range(max(map(len, texts), default=0))
    ]
    label = len(f"slice {len(texts) - 1}")
    return "\n".join(
        f"{f'slice {index}':<{label}}  " + " ".join(map(str.ljust, row, widths)).rstrip()
        for index, row in enumerate(texts)
    )


@dataclass(frozen=True, slots=True)
class Repeat:
    """Actions that come `times` times; each time their microbatches are `step` further."""

    actions: tuple[Action, ...]
    times: int = 1
    step: int = 1


def compact(row: Sequence[Action]) -> list[Repeat]:
    """Returns a slice's actions as repeats: for schedules that have names, no more of them for more microbatches."""
    found: list[Repeat] = []
    position = 0
    while position < len(row):
        best = Repeat((row[position],))
        for period in range(1, min(_MAX_PERIOD, (len(row) - position) // 2) + 1):
            step = row[position + period].microbatch - row[position].microbatch
            times = _times(row, position, period, step)
            if times > 1 and times * period > best.times * len(best.actions):
                best = Repeat(tuple(row[position : position + period]), times, step)
        found.append(best)
        position += best.times * len(best.actions)
    return found


def expanded(repeats: Iterable[Repeat]) -> list[Action]:
    """Returns the actions that `compact` was given."""
    return [
        Action(action.stage, action.kind, action.microbatch + time * repeat.step)
        for repeat in repeats
        for time in range(repeat.times)
        for action in repeat.actions
    ]


#: Actions of the longest pattern that `compact` looks for: a round of microbatches through all of a slice's stages.
_MAX_PERIOD = 128


def _times(row: Sequence[Action], start: int, period: int, step: int) -> int:
    """Returns how often the pattern of `period` actions at `start` comes, each time `step` further."""
    end = start + period
    while end < len(row):
        one, before = row[end], row[end - period]
        if one != Action(before.stage, before.kind, before.microbatch + step):
            break
        end += 1
    return (end - start) // period
