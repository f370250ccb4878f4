"""The order in which the island's scheduler lets computations be issued.

Needed where an order across executors matters: always in a gang (several hosts that compute together), else while
another executor has devices of this one. In a gang a unit is granted when all hosts have reported it ready; if it fails
on one of them before, it is refused to the others. So all of them issue it, or none does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from torchways.executor.events import Command, ReportIdle, ReportPassed
from torchways.executor.runs import Task
from torchways.ids import RunPart


class Grants:
    """See the module's docstring.

    Args:
        is_gang: this executor is one of several hosts that compute together.

    Attributes:
        is_gang: see above.
        needed: computations are issued as granted.
        granted: the units that may be issued, in order.
    """

    def __init__(self, *, is_gang: bool) -> None:
        self.is_gang = self.needed = is_gang
        self.granted: deque[tuple[RunPart, int]] = deque()
        self._epoch = 0
        #: Tasks that are ready but for their grant.
        self._asking: dict[tuple[RunPart, int], Task] = {}
        #: Computations that have not ended; those of them that took no grant when grants became needed.
        self._computing: set[Task] = set()
        self._computing_freely: set[Task] = set()

    def ask(self, task: Task) -> bool:
        """Notes that a task waits for its grant; returns whether the scheduler must be told: not again."""
        key = (task.run.part, task.number)
        if key in self._asking:
            return False
        self._asking[key] = task
        return True

    def refuse(self, task: Task) -> None:
        """A task waits for its grant no more, if it does: there will be none."""
        self._asking.pop((task.run.part, task.number), None)

    def asking(self, key: tuple[RunPart, int]) -> Task | None:
        """Returns the task of a unit, if it waits for its grant."""
        return self._asking.get(key)

    @property
    def waiting(self) -> Collection[Task]:
        """The tasks that wait for their grant."""
        return self._asking.values()

    def units_of(self, run: RunPart) -> list[int]:
        """Returns the units of a run that wait for their grant."""
        return [unit for part, unit in self._asking if part == run]

    def take_first(self, *, is_issued: bool) -> list[Command]:
        """Takes the first grant, whose unit was issued or needs it no more; returns what to report."""
        part, number = key = self.granted.popleft()
        self._asking.pop(key, None)
        # On devices that are shared, a unit that was issued has passed when it has ended.
        return [ReportPassed(run=part, unit=number)] if self.is_gang or not is_issued else []

    def begin(self, task: Task) -> None:
        """A computation is issued."""
        self._computing.add(task)

    def end(self, task: Task) -> list[Command]:
        """A computation has ended; returns what to report."""
        self._computing.discard(task)
        if task in self._computing_freely:
            self._computing_freely.discard(task)
            return [] if self._computing_freely else [ReportIdle(epoch=self._epoch)]
        if self.needed and not self.is_gang:
            return [ReportPassed(run=task.run.part, unit=task.number)]
        return []

    def set_needed(self, needed: bool, epoch: int) -> tuple[list[Command], list[Task]]:
        """Grants are needed from here on, or not; returns what to report, and the tasks that can be issued freely."""
        if self.is_gang or needed == self.needed:
            return [], []
        self.needed, self._epoch = needed, epoch
        if needed:
            self._computing_freely = set(self._computing)
            return [] if self._computing_freely else [ReportIdle(epoch=epoch)], []
        freed = list(self._asking.values())
        self._computing_freely = set()
        self.granted.clear()
        self._asking.clear()
        return [], freed
