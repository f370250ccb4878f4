"""Starts computations on the devices, in the order of the core's commands, as far as the devices take them."""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchways.errors import Failure
from torchways.executor import events
from torchways.executor.compiler import Call
from torchways.executor.failures import Failures
from torchways.executor.loading import PartCode
from torchways.executor.runs import Cell, Task, lowest
from torchways.executor.spans import Spans
from torchways.executor.stalls import action_text
from torchways.executor.value_checks import describe_bad, wait_computed
from torchways.ids import PartId
from torchways.ir.part import ComputeInstruction, Slot
from torchways.link.inbox import Inbox
from torchways.runtime.base import Runtime

#: Computations that are started before the engine looks at what else has come.
_BATCH = 16


class _Launch:
    """A unit's computations that are being started, one after the other.

    Attributes:
        command: the core's.
        issued: when the first was started, nanoseconds; 0: none is.
        next: the number of computations that are started, or failed.
        values: by slot.
        poisoned: failures, by slot.
        begun: computations that were started, each with what to wait for: nothing, where it passes values on.
        fills: what to do once its output cells are filled.
    """

    __slots__ = ("begun", "command", "fills", "issued", "next", "poisoned", "values")

    def __init__(self, command: events.Execute) -> None:
        self.command = command
        self.issued = 0
        self.next = 0
        self.values: dict[int, Any] = {}
        self.poisoned: dict[int, Failure] = {}
        self.begun: list[tuple[Call, Sequence[Any]]] = []
        self.fills: list[Callable[[], None]] = []


class Launches:
    """See the module's docstring. For the engine's thread.

    Args:
        runtime: the devices.
        num_devices: of the set, on all hosts.
        codes: what the parts of programs compute, by part.
        inbox: takes what is to be done on the engine's thread, once computations have ended.
        handle: gives the core an event, on that thread.
        spans: where computations are noted.
        failure: makes failures.
        is_gang: other hosts compute at the same time.
    """

    def __init__(
        self,
        runtime: Runtime,
        num_devices: int,
        codes: Mapping[PartId, PartCode],
        inbox: Inbox[events.Event | Callable[[], None]],
        handle: Callable[[events.Event], None],
        spans: Spans,
        failure: Failures,
        *,
        is_gang: bool,
    ) -> None:
        self._runtime = runtime
        self._num_devices = num_devices
        self._codes = codes
        self._inbox = inbox
        self._handle = handle
        self._spans = spans
        self._failure = failure
        self._is_gang = is_gang
        #: Units whose computations are not all started, for lack of room on the devices; in the order of the commands.
        self._waiting: collections.deque[_Launch] = collections.deque()
        #: Who fills an output cell of these, by the cell's id.
        self._filling: dict[int, _Launch] = {}

    def num_entries(self) -> dict[str, int]:
        """Returns how many entries each collection has."""
        return {"launches": len(self._waiting), "filling": len(self._filling)}

    def name_of(self, task: Task) -> tuple[str, ComputeInstruction]:
        """Returns the name of a unit of computations, and the first of them."""
        first = task.unit.instructions[0]
        assert isinstance(first, ComputeInstruction)
        name = self._codes[task.run.program.part].functions[first.function_index].name
        num_more = len(task.unit.instructions) - 1
        return f"{name} and {num_more} more" if num_more else name, first

    def describe(self, task: Task) -> str:
        """Returns what a unit is called, with what it is of a schedule, and its user's line; for people."""
        name, first = self.name_of(task)
        code = self._codes[task.run.program.part]
        source = code.functions[first.function_index].source
        name += action_text(task, code.schedules)
        return f"{name} at {source}" if source else name

    def start(self, command: events.Execute, *, is_granted: bool) -> None:
        """Starts a unit's computations: at once where the devices have room, behind those that wait for room.

        All hosts of a gang start what was granted, in that order, and say so; and so do executors that share a device.
        There nothing waits here, but in the runtime.
        """
        launch = _Launch(command)
        if self._is_gang or is_granted:
            while self._waiting:
                self._go_on(self._waiting[0], is_waiting=True)
                self._started()
            self._go_on(launch, is_waiting=True)
            self._fill_outputs(launch)
        elif not self._waiting and self._go_on(launch):
            self._fill_outputs(launch)
        else:
            self._waiting.append(launch)
            for cell in command.outputs:
                self._filling[id(cell)] = launch

    def go_on(self) -> bool:
        """Starts a few computations that waited for room; returns whether there is room for more that wait.

        Between them the engine does what else has come.
        """
        for _ in range(_BATCH):
            if not self._waiting or not self._go_on(self._waiting[0]):
                return False
            self._started()
        return bool(self._waiting)

    def when_computed(self, cell: Cell, work: Callable[[], None]) -> None:
        """Does something on the engine's thread once a scheduled cell is computed, or poisoned: that is in the cell."""

        def filled() -> None:
            if cell.failure is not None:
                work()
            else:
                self._runtime.on_ready([cell.buffer], lambda: self._inbox.put(work))

        launch = self._filling.get(id(cell)) if self._filling else None
        if launch is None:
            filled()
        else:
            launch.fills.append(filled)

    def _started(self) -> None:
        """All computations of the first unit that waited are started."""
        launch = self._waiting[0]
        self._fill_outputs(launch)
        self._waiting.popleft()
        for cell in launch.command.outputs:
            del self._filling[id(cell)]
        for work in launch.fills:
            work()

    def _go_on(self, launch: _Launch, *, is_waiting: bool = False) -> bool:
        """Starts a unit's next computations while the devices have room, or waits for it; returns whether all are."""
        command = launch.command
        task = command.task
        run = task.run
        calls = self._codes[run.program.part].calls[task.number]
        if not launch.issued:
            if not is_waiting and run.cancelled is None and not self._runtime.has_room(self._wake):
                return False
            launch.issued = time.time_ns()
            self._spans.note_granted(task, launch.issued)
            for slot, cell in zip(task.unit.reads, command.inputs, strict=True):
                launch.values[slot] = cell.buffer
                if cell.failure is not None:
                    launch.poisoned[slot] = cell.failure
        for number in range(launch.next, len(calls)):
            if number and not is_waiting and run.cancelled is None and not self._runtime.has_room(self._wake):
                launch.next = number
                return False
            self._compute(launch, number, calls[number])
        return True

    def _compute(self, launch: _Launch, number: int, call: Call) -> None:
        task, values, poisoned = launch.command.task, launch.values, launch.poisoned
        run, runtime = task.run, self._runtime
        failure = lowest([poisoned.get(slot) for slot in call.inputs]) if poisoned else None
        if failure is None and not self._is_gang:
            # Of several hosts, one that left something out would leave the others waiting for it.
            failure = run.cancelled
        if failure is None:
            try:
                inputs = [values[slot] for slot in call.inputs]
                key = f"{run.run_id}.{run.program.part.slice_id}.{task.number}.{number}"
                outputs, computed = runtime.execute(call.executable, inputs, key)
                # Of several hosts, one that stopped here would leave the others waiting for it.
                if run.checks_values and not self._is_gang:
                    wait_computed(runtime, computed)
                    failure = self._check_values(task, call, outputs)
                for slot, buffer in zip(call.outputs, outputs, strict=True):
                    values[slot] = buffer
                launch.begun.append((call, computed))
            except Exception as error:
                function = self._codes[run.program.part].functions[call.function_index]
                message = f"compiled function {function.name} failed: {error}"
                failure = self._failure("RemoteError", message, error, function.name, function.source, run.run_id)
        if failure is not None:
            for slot in call.outputs:
                poisoned[slot], values[slot] = failure, None
        for slot in call.dead:
            values.pop(slot, None)

    def _fill_outputs(self, launch: _Launch) -> None:
        task, poisoned = launch.command.task, launch.poisoned
        for slot, cell in zip(task.unit.writes, launch.command.outputs, strict=True):
            cell.buffer, cell.failure = launch.values[slot], poisoned.get(slot)
        failure = lowest(list(poisoned.values())) if poisoned else None
        self._await(task, _last_of(launch.begun), failure, launch.issued)

    def _wake(self) -> None:
        """There may be room for computations; on any thread."""
        self._inbox.put(_nothing)

    def _check_values(self, task: Task, call: Call, outputs: Sequence[Any]) -> Failure | None:
        """Returns the failure of a computation that made NaN or infinity; it has ended."""
        code = self._codes[task.run.program.part]
        bad = describe_bad(self._runtime, outputs, [code.slots[slot] for slot in call.outputs])
        if not bad:
            return None
        function = code.functions[call.function_index]
        action = action_text(task, code.schedules)
        message = (
            f"compiled function {function.name}{action} made a value that is not finite: {bad} (run {task.run.run_id} "
            f"of {task.run.program.name}, checked by tw.check_values). What it computed from was finite, unless the "
            "program's arguments were not"
        )
        return self._failure(
            "NonFiniteError", message, function=function.name, source=function.source, run_id=task.run.run_id
        )

    # ---- their ends

    def _await(self, task: Task, computed: list[Sequence[Any]], failure: Failure | None, issued: int) -> None:
        if not computed:
            self._inbox.put(events.UnitFinished(task=task, failure=failure))
            return
        self._spans.note_issued(task, issued)
        left, last = len(computed), 0

        def finished(ended: int) -> None:
            nonlocal left, last
            left, last = left - 1, max(last, ended)
            if left == 0:
                self._note_computed(task, issued, last)
                self._handle(events.UnitFinished(task=task, failure=failure))

        # Some call back on a thread of the runtime's, others at once: the inbox keeps the order of their ends.
        for buffers in computed:
            self._runtime.on_ready(buffers, lambda: self._inbox.put(functools.partial(finished, time.time_ns())))

    def _note_computed(self, task: Task, issued: int, ended: int) -> None:
        self._spans.note_ended(task)
        name, first = self.name_of(task)
        if first.part_of is not None:
            name += f" {first.part_of.action}"
        run = task.run
        compiled_ns = self._codes[run.program.part].compiled_ns
        awaited_since = max(run.came_ns, compiled_ns) if task.awaited_input else 0
        run.device_ns += self._spans.note_computed(
            name, self._num_devices, issued, ended, run.run_id, first.part_of, awaited_since
        )


def _last_of(begun: Sequence[tuple[Call, Sequence[Any]]]) -> list[Sequence[Any]]:
    """Returns what to wait for of the computations that no other one waits for: others may be left out, or fail."""
    read: set[Slot] = set()
    last = []
    for call, computed in reversed(begun):
        if computed and read.isdisjoint(call.outputs):
            last.append(computed)
        if computed or not read.isdisjoint(call.outputs):
            read.update(call.inputs)
    return last


def _nothing() -> None:
    """Only wakes."""
