"""The order in which the island's scheduler lets computations be issued.

Needed where an order across executors matters: always in a gang (several hosts that compute together), else while
another executor has devices of this one.
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
        gang: "", or this host's role in a gang: "leader" (tells the scheduler when units are ready) or "member".

    Attributes:
        needed: computations are issued as granted.
        granted: the units that may be issued, in order.
    """

    def __init__(self, gang: str) -> None:
        self.needed = bool(gang)
        self.granted: deque[tuple[RunPart, int]] = deque()
        self._gang = gang
        self._epoch = 0
        #: Tasks that are ready but for their grant.
        self._asking: dict[tuple[RunPart, int], Task] = {}
        #: Computations that have not ended; those of them that took no grant when grants became needed.
        self._computing: set[Task] = set()
        self._computing_freely: set[Task] = set()

    def ask(self, task: Task) -> bool:
        """Notes that a task waits for its grant; returns whether the scheduler must be told."""
        key = (task.run.part, task.number)
        if key in self._asking:
            return False
        self._asking[key] = task
        return self._gang != "member"

    def asking(self, key: tuple[RunPart, int]) -> Task | None:
        """Returns the task of a unit, if it waits for its grant."""
        return self._asking.get(key)

    @property
    def is_gang(self) -> bool:
        """Whether several hosts compute together: what is granted is issued by all of them, or by none."""
        return bool(self._gang)

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
        return [ReportPassed(run=part, unit=number)] if self._gang or not is_issued else []

    def begin(self, task: Task) -> None:
        """A computation is issued."""
        self._computing.add(task)

    def end(self, task: Task) -> list[Command]:
        """A computation has ended; returns what to report."""
        self._computing.discard(task)
        if task in self._computing_freely:
            self._computing_freely.discard(task)
            return [] if self._computing_freely else [ReportIdle(epoch=self._epoch)]
        if self.needed and not self._gang:
            return [ReportPassed(run=task.run.part, unit=task.number)]
        return []

    def set_needed(self, needed: bool, epoch: int) -> tuple[list[Command], list[Task]]:
        """Grants are needed from here on, or not; returns what to report, and the tasks that can be issued freely."""
        if self._gang or needed == self.needed:
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
