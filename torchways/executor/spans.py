"""An executor's part of the trace: what its devices, transfers and compilations did when."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from torchways.executor.memory import Taker
from torchways.executor.runs import Placing, Run, Task
from torchways.ids import ClientId, owner
from torchways.ir.part import LoopAction
from torchways.rpc.spans import Span, SpanLog

logger = logging.getLogger(__name__)


class Spans:
    """The newest spans. Methods are for the engine's thread, but for `note` and `note_compiled`; the log is for any."""

    def __init__(self) -> None:
        self.log = SpanLog()
        self._device_free_ns = 0
        #: Computations that were issued and have not ended, in order, and when that was.
        self._computing: dict[Task, int] = {}
        #: Waits for memory that are not over, by the identity of what waits.
        self._waits: dict[int, tuple[Taker, int]] = {}
        #: Computations that wait for their grant, and since when.
        self._asking: dict[Task, int] = {}

    def note(
        self,
        kind: str,
        name: str,
        start_ns: int,
        end_ns: int,
        run_id: int,
        *,
        edge_id: int | None = None,
        sent_bytes: int = 0,
    ) -> None:
        """Keeps a span of a run, on the track of its kind."""
        self.log.note(
            Span(name, kind, start_ns, end_ns, run_id, None, sent_bytes, kind, owner(run_id), edge_id=edge_id)
        )

    def note_compiled(self, name: str, program_id: int, start_ns: int, end_ns: int) -> None:
        """Keeps the span of a compilation; on the compiler's thread."""
        client = owner(program_id)
        self.log.note(Span(f"compile {name}", "compile", start_ns, end_ns, 0, kind="compile", client_id=client))

    def note_issued(self, task: Task, now_ns: int) -> None:
        """A computation has been given to the devices."""
        self._computing[task] = now_ns

    def unended_ns(self, runs: Iterable[Run], now_ns: int) -> dict[ClientId, int]:
        """Returns the device time, until now, of some clients' runs that have not ended.

        The devices are the oldest computation's, since it was issued or the one before it ended; see `note_computed`.
        """
        result: dict[ClientId, int] = defaultdict(int)
        for run in runs:
            result[run.client_id] += run.device_ns
        for task, issued_ns in self._computing.items():
            result[task.run.client_id] += max(0, now_ns - max(issued_ns, self._device_free_ns))
            break
        return result

    def note_ended(self, task: Task) -> None:
        """A computation that was issued has ended."""
        self._computing.pop(task, None)

    def note_computed(
        self,
        name: str,
        num_devices: int,
        issued_ns: int,
        ended_ns: int,
        run_id: int,
        part_of: LoopAction | None = None,
        awaited_since_ns: int = 0,
    ) -> int:
        """Keeps a computation's span for each device; returns its nanoseconds.

        It began when it was issued, or behind the one before it: what several share is counted once. If its inputs
        came late, and the devices had nothing to do meanwhile, there is a span of that wait, too; it could have begun
        at `awaited_since_ns` (0: its inputs were there).
        """
        free = self._device_free_ns
        started = max(issued_ns, free)
        ended_ns = self._device_free_ns = max(started, ended_ns)
        log = self.log
        if log.is_on:
            if awaited_since_ns and (since := max(awaited_since_ns, free)) < issued_ns:
                self.note("input", f"inputs of {name}", since, issued_ns, run_id)
            client = owner(run_id)
            for device in range(num_devices):
                log.note(Span(name, f"device {device}", started, ended_ns, run_id, part_of, 0, "compute", client))
        return ended_ns - started

    def note_waits(self, starved: Sequence[Taker]) -> None:
        """Keeps a span of every wait for memory that is over, given those that are not."""
        if not starved and not self._waits:
            return
        now = time.time_ns()
        waiting = {id(item) for item in starved}
        for item in starved:
            if id(item) not in self._waits:
                logger.info("%s waits for %d bytes of device memory", item, item.need_bytes)
                self._waits[id(item)] = (item, now)
        self._end_waits([key for key in self._waits if key not in waiting], now)

    def _end_waits(self, keys: Iterable[int], now: int) -> None:
        for key in keys:
            item, started = self._waits.pop(key)
            self.note("memory", f"waits for memory: {item}", started, now, _run_of(item))

    def note_asking(self, asking: Collection[Task]) -> None:
        """Takes note of the computations that wait for a grant; those that will not be issued wait no more."""
        if not asking and not self._asking:
            return
        now, waiting = time.time_ns(), set(asking)
        for task in waiting.difference(self._asking):
            self._asking[task] = now
        for task in [task for task in self._asking if task not in waiting]:
            self.note_granted(task, now)

    def note_granted(self, task: Task, now: int) -> None:
        """Keeps the span of a computation's wait for its grant, if it waited."""
        started = self._asking.pop(task, 0)
        if started:
            others = "the other hosts, or " if task.is_reported else ""
            reason = task.held_for or f"{others}its scheduler's answer"
            self.note("grant", f"waits for its grant: {task}: {reason}", started, now, task.run.run_id)


def _run_of(item: Taker) -> int:
    match item:
        case Task():
            return item.run.run_id
        case Placing() if item.cell.payer is not None:
            return item.cell.payer.run_id
    return 0
