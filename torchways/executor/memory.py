"""The device memory that an executor's runs and values take, against a budget.

A run reserves the most that it will ever need before it begins, and begins when that is left beside what older runs may
still take. So no run is stopped half way, and a program that pre-flight found to fit does fit. The oldest run may
always begin.

What one client's values and runs take may have a limit of its own. A client that has reached it holds up its own runs
and values only, until it gives something back.

Pure: it counts bytes, and says what has waited in vain. The core (state.py) decides what happens to such tasks, values
and runs.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torchways.executor.runs import Cell, Placing, Run, Task
from torchways.ids import ClientId, RunPart

#: Something that takes memory.
Taker: TypeAlias = Task | Placing


class Memory:
    """See the module's docstring.

    Args:
        budget_bytes: device memory, bytes per device; 0 means no limit.
        runs: the runs in flight; the core's.
        client_bytes: of it, what one client may have; 0 means no limit.

    Attributes:
        limit_bytes: the most that anything may ever take, bytes per device; 0: no limit.
        used_bytes: bytes per device that are in use.
        starved: tasks and values that wait for memory, oldest first.
    """

    def __init__(self, budget_bytes: int, runs: Mapping[RunPart, Run], client_bytes: int = 0) -> None:
        self.budget_bytes = budget_bytes
        self.client_bytes = client_bytes
        self.limit_bytes = min(filter(None, (budget_bytes, client_bytes)), default=0)
        self.used_bytes = 0
        #: Of each client, if there is a limit for one.
        self.used_by_client: Counter[ClientId] = Counter()
        self.starved: list[Taker] = []
        self._runs = runs
        #: Runs that have not begun, in their order.
        self._unadmitted: deque[Run] = deque()
        #: The most that the runs that have begun may still allocate.
        self._promised_bytes = 0

    # ---- runs

    def enqueue(self, run: Run) -> None:
        """Lets a run begin, now or when it has room."""
        self._unadmitted.append(run)
        self._admit()

    def end(self, run: Run) -> None:
        """Gives up the reservation of a run."""
        if run.admitted:
            self._promised_bytes -= run.most_unpaid_bytes
        else:
            self._unadmitted.remove(run)

    def _admit(self) -> None:
        """Lets runs begin, in their order, while there is room beside what those before may still take."""
        held_up: set[ClientId] = set()
        for run in list(self._unadmitted):
            if run.client_id in held_up or not self._client_has_room(run.client_id, run.reserved_bytes):
                held_up.add(run.client_id)
                continue
            if self.budget_bytes and self.used_bytes + self._promised_bytes + run.reserved_bytes > self.budget_bytes:
                admitted = [other for other in self._runs.values() if other.admitted]
                kept = sum(other.unpaid_bytes for other in admitted)
                is_alone = all(other.run_id == run.run_id for other in admitted)
                if not is_alone and self.used_bytes + kept + run.reserved_bytes > self.budget_bytes:
                    return
            self._unadmitted.remove(run)
            run.admitted = True
            self._promised_bytes += run.most_unpaid_bytes

    def _client_has_room(self, client_id: ClientId, nbytes: int) -> bool:
        """Whether a client may have so much more beside what its runs that have begun may still take."""
        if not self.client_bytes:
            return True
        kept = sum(run.unpaid_bytes for run in self._runs.values() if run.admitted and run.client_id == client_id)
        return self.used_by_client[client_id] + kept + nbytes <= self.client_bytes

    def waits_for_room(self, run: Run) -> bool:
        """Whether a run begins as soon as it has room: no other is before it."""
        return next((other for other in self._unadmitted if self._comes_before(other, run)), None) is run

    def _comes_before(self, other: Run, run: Run) -> bool:
        return not self.client_bytes or other.client_id == run.client_id or not self.is_at_limit(other)

    def is_at_limit(self, taker: Run | Taker) -> bool:
        """Whether something waits for what its own client gives back."""
        run = taker if isinstance(taker, Run) else self.run_of(taker)
        if run is None:
            assert isinstance(taker, Placing)
            return not self._client_has_room(taker.cell.client_id, taker.need_bytes)
        return not run.admitted and not self._client_has_room(run.client_id, run.reserved_bytes)

    def may_get_back(self, client_id: ClientId) -> bool:
        """Whether runs of a client have begun, which give back something when they end."""
        return any(run.admitted and run.client_id == client_id for run in self._runs.values())

    # ---- whoever takes memory

    def need_bytes(self, taker: Taker) -> int:
        """Returns what a task or value adds to the memory in use."""
        if isinstance(taker, Task):
            return taker.need_bytes - sum(cell.nbytes for cell in _reused(taker))
        return taker.need_bytes

    def has_room(self, taker: Taker) -> bool:
        """Whether a task or value fits into the budget, beside what other runs may still take."""
        if not self.limit_bytes or taker.need_bytes == 0:
            return True
        wanted, run = self.used_bytes + self.need_bytes(taker), self.run_of(taker)
        if run is not None and not run.admitted:
            return False
        if run is None and self.is_at_limit(taker):
            return False
        if not self.budget_bytes or wanted + self._promised_bytes <= self.budget_bytes:
            return True  # the usual case: no sum over runs is needed
        kept = sum(other.unpaid_bytes for other in self._runs.values() if other.admitted and other is not run)
        return wanted + kept <= self.budget_bytes

    def run_of(self, taker: Taker) -> Run | None:
        """Returns the run that a task's or value's memory counts for."""
        return taker.run if isinstance(taker, Task) else self._payer(taker.cell)

    def priority(self, taker: Taker) -> tuple[int, int]:
        """Returns a key that sorts by the order of runs, then by that of the program."""
        run = self.run_of(taker)
        return (run.sequence if run is not None else 0, taker.unit.position if isinstance(taker, Task) else -1)

    # ---- what waits in vain

    def why_never(self, taker: Taker) -> str:
        """Returns why a task or value will never have room; "" if it may."""
        need = self.need_bytes(taker)
        if need <= self.limit_bytes:
            return ""
        whose = "the whole budget" if self.limit_bytes == self.budget_bytes else "what one client may have"
        return f"it needs {need:,} bytes a device at once, and {whose} is {self.limit_bytes:,} bytes"

    def stalled_at_limits(self, seconds: float, now_ns: int) -> list[tuple[Run | Taker, str]]:
        """Returns what waits for its own client to give something back if that has long not happened, and why."""
        found: dict[Run | Taker, str] = {}
        for item in filter(self.is_at_limit, self.starved):
            run = self.run_of(item)
            client_id = item.cell.client_id if isinstance(item, Placing) else item.run.client_id
            if self.may_get_back(client_id) or (run is not None and now_ns - run.came_ns < seconds * 1e9):
                continue
            need = item.need_bytes if run is None else run.reserved_bytes
            found[item if run is None else run] = (
                f"it waited {seconds:g} s for {need:,} bytes a device while its client has "
                f"{self.used_by_client[client_id]:,} of the {self.client_bytes:,} that this cluster allows one client; "
                "drop arrays that you no longer need"
            )
        return list(found.items())

    def stalled(self, seconds: float, now_ns: int) -> list[Taker]:
        """Returns what to refuse when nothing runs that could make room, though it will not be too large for ever."""
        starved = [item for item in self.starved if not self.is_at_limit(item)]
        # All values of no run that have waited so long: to refuse one makes no room for another.
        values = [item for item in starved if isinstance(item, Placing) and self.run_of(item) is None]
        long: list[Taker] = [item for item in values if now_ns - item.came_ns >= seconds * 1e9]
        return long or ([min(starved, key=self.priority)] if starved else [])

    # ---- bytes in use

    def charge(self, cell: Cell) -> None:
        """Counts a cell's bytes as used."""
        self._use(cell.client_id, cell.nbytes)
        cell.is_charged = True
        payer = self._payer(cell)
        if payer is not None:
            payer.own_bytes += cell.nbytes

    def release(self, cell: Cell) -> None:
        """Gives back a cell's bytes."""
        cell.is_charged = False
        self._use(cell.client_id, -cell.nbytes)
        payer = self._payer(cell)
        if payer is not None:
            payer.own_bytes -= cell.nbytes

    def begin_compute(self, task: Task, outputs: Sequence[Cell]) -> None:
        """Counts all that a unit of computations allocates; its outputs take over what it reuses."""
        reused = _reused(task)
        taken = task.unit.need_bytes - sum(cell.nbytes for cell in reused)
        self._use(task.run.client_id, taken)
        task.run.own_bytes += taken
        for cell in reused:
            cell.is_charged = False
        for cell in outputs:
            cell.is_charged = True

    def end_compute(self, task: Task) -> None:
        """Gives back what a unit of computations allocated beside its outputs."""
        sizes = task.run.program.slot_bytes
        freed = task.unit.need_bytes - sum(sizes[slot] for slot in task.unit.writes)
        self._use(task.run.client_id, -freed)
        task.run.own_bytes -= freed

    def forget_value(self, cell: Cell) -> None:
        """Lets go of a value from a host that waits for memory and that nobody wants any more."""
        self.starved = [item for item in self.starved if not (isinstance(item, Placing) and item.cell is cell)]

    def freed(self) -> Sequence[Taker]:
        """Lets runs begin after memory was given back; returns what waited for it, to be looked at again."""
        if self._unadmitted:
            self._admit()
        if not self.starved:
            return ()
        starved, self.starved = self.starved, []
        return starved

    def _use(self, client_id: ClientId, nbytes: int) -> None:
        self.used_bytes += nbytes
        if self.client_bytes:
            self.used_by_client[client_id] += nbytes
            if not self.used_by_client[client_id]:
                del self.used_by_client[client_id]

    def _payer(self, cell: Cell) -> Run | None:
        return self._runs.get(cell.payer) if cell.payer is not None else None


def _reused(task: Task) -> list[Cell]:
    """Returns the inputs whose memory the outputs take over."""
    return [cell for cell in task.cells_of(task.unit.donated) if cell.holders == 1 and cell.is_charged]
