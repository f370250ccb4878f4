"""The schedules that have names, those of torch.distributed.pipelining.

Each is a pure function of the numbers of stages, slices and microbatches. Where a slice has several stages, they are
placed around and around (slice r has stages r, r + R, ...), or in a V (slice r has stages r and S - 1 - r).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping

from torchways.errors import ConfigError
from torchways.schedules.actions import Action, Kind, Schedule

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT  # noqa: E741 (their names in the field)


class _Row:
    """The actions of one slice, as they are added: each stage's microbatches come in order."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._next: Counter[tuple[int, Kind]] = Counter()
        #: Input gradients whose weight gradients were not added yet.
        self._pending: deque[tuple[int, int]] = deque()

    def add(self, stage: int, kind: Kind) -> None:
        """Adds an action for the next microbatch that the stage has not had."""
        number = self._next[stage, kind.parts[0]]
        for part in kind.parts:
            self._next[stage, part] += 1
        self.actions.append(Action(stage, kind, number))
        if kind is I:
            self._pending.append((stage, number))

    def add_pending_weight(self) -> None:
        """Adds the weight gradients of the oldest input gradients that have none yet."""
        if self._pending:
            stage, number = self._pending.popleft()
            self._next[stage, W] += 1
            self.actions.append(Action(stage, W, number))


def gpipe(num_stages: int, num_slices: int, num_microbatches: int) -> Schedule:
    """All forward passes, then all backward passes (Huang et al., "GPipe", 2019)."""
    _one_stage_each("GPipe", num_stages, num_slices)
    rows = [[Action(s, kind, m) for kind in (F, B) for m in range(num_microbatches)] for s in range(num_stages)]
    return _schedule("GPipe", rows)


def one_forward_one_backward(num_stages: int, num_slices: int, num_microbatches: int) -> Schedule:
    """As many forward passes as stages follow, then one of each in turn (Narayanan et al., "PipeDream", 2019)."""
    _one_stage_each("1F1B", num_stages, num_slices)
    rows = []
    for stage in range(num_stages):
        row = _Row()
        ahead = min(num_stages - 1 - stage, num_microbatches)
        for _ in range(ahead):
            row.add(stage, F)
        for number in range(num_microbatches):
            if number + ahead < num_microbatches:
                row.add(stage, F)
            row.add(stage, B)
        rows.append(row.actions)
    return _schedule("1F1B", rows)


def looped_bfs(num_stages: int, num_slices: int, num_microbatches: int) -> Schedule:
    """All microbatches through a slice's first stage, then through its next (Lamy-Poirier, "Breadth-First", 2022)."""
    _whole_turns("LoopedBFS", num_stages, num_slices)
    rows = []
    for index in range(num_slices):
        stages = range(index, num_stages, num_slices)
        forward = [Action(stage, F, m) for stage in stages for m in range(num_microbatches)]
        backward = [Action(stage, B, m) for stage in reversed(stages) for m in reversed(range(num_microbatches))]
        rows.append(forward + backward)
    return _schedule("LoopedBFS", rows)


def interleaved_1f1b(num_stages: int, num_slices: int, num_microbatches: int) -> Schedule:
    """1F1B over several stages a slice, each in turn for a round of microbatches (Narayanan et al., 2021)."""
    return _interleaved("Interleaved1F1B", num_stages, num_slices, num_microbatches, zero_bubble=False)


def interleaved_zero_bubble(num_stages: int, num_slices: int, num_microbatches: int) -> Schedule:
    """Interleaved1F1B with weight gradients put off to where a slice would wait (Qi et al., "Zero Bubble", 2023)."""
    return _interleaved("InterleavedZeroBubble", num_stages, num_slices, num_microbatches, zero_bubble=True)


def _interleaved(name: str, num_stages: int, num_slices: int, num_microbatches: int, *, zero_bubble: bool) -> Schedule:
    _whole_turns(name, num_stages, num_slices)
    num_local = num_stages // num_slices
    num_rounds = max(1, num_microbatches // num_slices)
    if num_microbatches % num_rounds:
        raise ConfigError(
            f"{name} runs {num_microbatches} microbatches over {num_slices} slices in {num_rounds} rounds, which must "
            f"be equal: take {num_microbatches - num_microbatches % num_rounds} microbatches, or another multiple of "
            f"{num_slices}"
        )
    round_size = num_microbatches // num_rounds
    num_passes = num_local * num_microbatches
    rows = []
    for index in range(num_slices):
        row = _Row()
        hops = num_slices - 1 - index
        ahead = min((num_local - 1) * round_size + (hops if zero_bubble else 2 * hops), num_passes)
        for step in range(num_passes + ahead):
            if step < num_passes:
                row.add(step // round_size % num_local * num_slices + index, F)
            if step >= ahead:
                local = num_local - 1 - (step - ahead) // round_size % num_local
                row.add(local * num_slices + index, I if zero_bubble else B)
                if step >= ahead + index:
                    row.add_pending_weight()
        for _ in range(num_passes):
            row.add_pending_weight()
        rows.append(row.actions)
    return _schedule(name, rows)


def zbv_zero_bubble(num_stages: int, num_slices: int, num_microbatches: int) -> Schedule:
    """Two stages a slice, in a V, with weight gradients put off (Qi et al., "Zero Bubble", 2023, section 6)."""
    _two_stages_each("ZBVZeroBubble", num_stages, num_slices)
    # With fewer microbatches the pipeline never fills: the schedule of so many, without those that are not there.
    filling = max(2 * num_slices - 1, num_microbatches)
    rows = []
    for index in range(num_slices):
        row, down, up = _Row(), index, num_stages - 1 - index
        for _ in range(2 * (num_slices - index) - 1):
            row.add(down, F)
        for _ in range(index):
            row.add(up, F)
            row.add(down, F)
        for _ in range(num_slices - index):
            row.add(up, F)
            row.add(up, I)
            row.add_pending_weight()
        forwards = {down: 2 * (num_slices - index) - 1 + index, up: num_slices}
        while forwards[up] < filling:
            if forwards[down] < filling:
                row.add(down, F)
                forwards[down] += 1
            row.add(down, I)
            row.add_pending_weight()
            row.add(up, F)
            forwards[up] += 1
            row.add(up, I)
            row.add_pending_weight()
        for _ in range(index):
            row.add(down, I)
            row.add(up, I)
        # What is left: input gradients of the way down, each with weight gradients of that way; then all else.
        weights = {stage: sum(a.stage == stage and a.kind is W for a in row.actions) for stage in (down, up)}
        for _ in range(num_slices - index):
            row.add(down, I)
            row.actions.append(Action(down, W, weights[down]))
            weights[down] += 1
        row.actions += [Action(up, W, number) for number in range(weights[up], filling)]
        row.actions += [Action(down, W, number) for number in range(weights[down], filling)]
        rows.append([action for action in row.actions if action.microbatch < num_microbatches])
    return _schedule("ZBVZeroBubble", rows)


def dual_pipe_v(num_stages: int, num_slices: int, num_microbatches: int) -> Schedule:
    """Two stages a slice, in a V, a forward and a backward pass in turn (DeepSeek-AI, "DeepSeek-V3", 2024)."""
    _two_stages_each("DualPipeV", num_stages, num_slices)
    if num_microbatches < num_stages:
        raise ConfigError(
            f"DualPipeV needs at least as many microbatches as stages, {num_stages}, not {num_microbatches}"
        )
    rows = []
    for index in range(num_slices):
        row, down, up = _Row(), index, num_stages - 1 - index
        behind = num_slices - 1 - index
        for _ in range(2 * behind):
            row.add(down, F)
        for _ in range(index + 1):
            row.add(down, F)
            row.add(up, F)
        for _ in range(behind):
            row.add(up, I)
            row.add_pending_weight()
            row.add(up, F)
        for _ in range(num_microbatches - 2 * num_slices + index + 1):
            for forward, backward in ((down, up), (up, down)):
                row.add(forward, F)
                row.add(backward, B)
        for _ in range(behind):
            row.add(up, B)
            row.add(up, F)
            row.add(down, B)
        # From the middle on weight gradients are put off; odd slices begin with the way up.
        middle, split = (index + 1) // 2, False
        for number in range(index + 1):
            for stage, begins in ((up, index % 2 == 1), (down, index % 2 == 0)):
                split = split or (begins and number == middle)
                row.add(stage, I if split else B)
        for _ in range(behind):
            row.add_pending_weight()
            row.add(down, I if split else B)
        for _ in range(index + 1):
            row.add_pending_weight()
        rows.append(row.actions)
    return _schedule("DualPipeV", rows)


SCHEDULES: Mapping[str, Callable[[int, int, int], Schedule]] = {
    "GPipe": gpipe,
    "1F1B": one_forward_one_backward,
    "LoopedBFS": looped_bfs,
    "Interleaved1F1B": interleaved_1f1b,
    "InterleavedZeroBubble": interleaved_zero_bubble,
    "ZBVZeroBubble": zbv_zero_bubble,
    "DualPipeV": dual_pipe_v,
}


def make_schedule(name: str, num_stages: int, num_slices: int, num_microbatches: int) -> Schedule:
    """Returns the schedule of a name, with upper and lower case alike.

    Raises:
        ConfigError: there is none, or it does not fit these numbers.
    """
    known = {key.lower(): make for key, make in SCHEDULES.items()}
    if name.lower() not in known:
        raise ConfigError(f"there is no schedule {name!r}; there are {', '.join(SCHEDULES)}")
    if min(num_stages, num_slices, num_microbatches) < 1:
        raise ConfigError(
            f"a schedule needs at least one stage, slice and microbatch, not {num_stages}, {num_slices} and "
            f"{num_microbatches}"
        )
    return known[name.lower()](num_stages, num_slices, num_microbatches)


def _schedule(name: str, rows: list[list[Action]]) -> Schedule:
    return Schedule(name, tuple(map(tuple, rows)))


def _one_stage_each(name: str, num_stages: int, num_slices: int) -> None:
    if num_stages != num_slices:
        raise ConfigError(
            f"{name} has one stage on each slice, but there are {num_stages} stages and {num_slices} slices: take "
            "Interleaved1F1B or LoopedBFS"
        )


def _whole_turns(name: str, num_stages: int, num_slices: int) -> None:
    if num_stages % num_slices:
        raise ConfigError(
            f"{name} has the same number of stages on each slice, but there are {num_stages} stages and {num_slices} "
            "slices: make the number of stages a multiple"
        )


def _two_stages_each(name: str, num_stages: int, num_slices: int) -> None:
    if num_stages != 2 * num_slices:
        raise ConfigError(
            f"{name} has two stages on each slice, but there are {num_stages} stages and {num_slices} slices: make "
            f"{2 * num_slices} stages"
        )
