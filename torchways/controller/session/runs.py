"""The runs of a session that are in flight: sent, one message an island, awaited, cancelled."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from torchways.controller.session.connections import Connections
from torchways.controller.session.programs import Programs, Registered
from torchways.controller.session.puts import Puts
from torchways.controller.session.slices import Slices
from torchways.controller.session.spans import ClientSpans
from torchways.controller.value_checks import checks_values
from torchways.errors import DeadlineExceeded, Failure, PlacementError
from torchways.ids import BufferId, IslandId, ProgramId, RunId, SliceId
from torchways.ir.part import Arguments
from torchways.rpc.programs import InlineValue, cancel_message, run_message

logger = logging.getLogger(__name__)

#: How long the runs of the calls that are made now may take, in seconds; None: as long as they take.
run_seconds: contextvars.ContextVar[float | None] = contextvars.ContextVar("run_seconds", default=None)


@dataclass(slots=True)
class _Run:
    name: str
    islands: tuple[IslandId, ...]
    islands_left: int
    #: Ids of the buffers that it makes.
    results: range
    #: The program, of its first run.
    first_of: Registered | None
    changes_state: bool
    #: Of values that were put for it, and ids of its arguments that were on their way when it was sent.
    put_bytes: int
    awaits: Collection[BufferId]
    #: Of its deadline, if it has one.
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class Runs:
    """See the module's docstring. Methods are for the user's thread unless they say else.

    Attributes:
        puts: values that runs read and that may be on their way.
        limit: of how many may be in flight; who wants more waits.
    """

    connections: Connections
    slices: Slices
    programs: Programs
    puts: Puts
    spans: ClientSpans
    limit: int
    _runs: dict[RunId, _Run] = field(default_factory=dict)
    #: The runs whose ends threads wait for, one entry for each thread.
    _awaited: list[RunId] = field(default_factory=list)
    #: Ids before which somebody waits for all runs.
    _awaited_before: list[int] = field(default_factory=list)

    # ---- sending

    def wait_for_room(self, name: str) -> None:
        """Waits while too many runs are in flight."""
        if len(self._runs) >= self.limit:
            with self.spans.waiting("room", f"{name} waits for room", self.connections.manager.client_id):
                who = f"dispatch of {name}, with {self.limit} runs in flight,"
                self.connections.wait(lambda: len(self._runs) < self.limit, who)
        self.connections.check()

    def send(
        self,
        program_id: ProgramId,
        name: str,
        results: range,
        arguments: Mapping[SliceId, Arguments[InlineValue]],
        *,
        changes_state: bool,
    ) -> RunId:
        """Sends a run: one message to each island that takes part; see `wait_for_room`. One step to signals, please.

        Args:
            program_id: what it runs.
            name: of the program, for people.
            results: ids of the buffers that it makes.
            arguments: of each slice.
            changes_state: some of its results are more than what its call returns.
        """
        started_ns = time.time_ns()
        if not self.slices.are_open(arguments):
            raise PlacementError(f"{name} runs on a mesh that is closed: its devices and arrays were given back")
        awaits = self.puts.awaited(buffer_id for bound in arguments.values() for buffer_id in bound.buffer_ids)
        put_bytes = self.puts.run_sent()
        run_id = RunId(self.connections.new_ids(1))
        by_island: dict[IslandId, list[tuple[SliceId, Arguments[InlineValue]]]] = defaultdict(list)
        for slice_id, bound in arguments.items():
            by_island[self.slices.island_of(slice_id)].append((slice_id, bound))
        first_of = self.programs.take_first_run(program_id)
        islands = tuple(by_island)
        self._runs[run_id] = _Run(name, islands, len(islands), results, first_of, changes_state, put_bytes, awaits)
        first = BufferId(results.start)
        for island, slices in by_island.items():
            scheduler = self.connections.schedulers[island]
            scheduler.send(run_message(program_id, run_id, first, slices, checks_values=checks_values()))
            scheduler.flush()  # at once: the loop may have to wait for this thread's next pause
        self._cancel_unless_arrived(run_id, awaits)  # one may have failed before the run was known
        if (seconds := run_seconds.get()) is not None:
            self.connections.loop.call(self._start_timer, run_id, seconds)
        self.spans.dispatched(name, run_id, started_ns)
        return run_id

    def _start_timer(self, run_id: RunId, seconds: float) -> None:
        """Has a run cancelled that is not over in time; on the loop."""
        if (run := self._runs.get(run_id)) is not None:
            reason = f"its deadline of {seconds:g} s has passed"
            run.timer = self.connections.loop.loop.call_later(seconds, self.cancel, [run_id], reason)

    # ---- waiting

    def wait_for(self, run_id: RunId) -> None:
        """Waits until a run is over, well or not."""
        self._awaited.append(run_id)
        try:
            self.connections.wait(lambda: run_id not in self._runs, f"who asked for run {run_id}")
        finally:
            self._awaited.remove(run_id)
        self.connections.check()

    def wait_for_those_before(self, first_id: int) -> None:
        """Waits until no run is in flight that was sent before an id was given out (`new_ids`)."""
        self._awaited_before.append(first_id)
        try:
            self.connections.wait(lambda: not self._is_any_before(first_id), "the data loader")
        finally:
            self._awaited_before.remove(first_id)
        self.connections.check()

    async def ended_before(self, first_id: int) -> None:
        """Does on the loop what `wait_for_those_before` does."""
        # A run ends, well or not, or the session is over.
        while self._is_any_before(first_id) and self.connections.is_usable():  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    def _is_any_before(self, first_id: int) -> bool:
        return any(run_id < first_id for run_id in tuple(self._runs))

    def wait_for_all(self, timeout: timedelta | None = None) -> None:
        """Waits until no run is in flight.

        Raises:
            DeadlineExceeded: some are after `timeout`; they go on.
        """
        deadline = float("inf") if timeout is None else time.monotonic() + timeout.total_seconds()
        self.connections.wait(lambda: not self._runs, "who waits for all runs", deadline)
        self.connections.check()
        if left := [run.name for run in list(self._runs.values())]:
            raise DeadlineExceeded(f"{len(left)} runs are not over after {timeout}, the first of {left[0]}")

    # ---- cancelling

    def cancel_makers(self, buffer_ids: Iterable[BufferId], reason: str = "", *, spare_state: bool = False) -> None:
        """Cancels the runs in flight that make some buffers; `spare_state`: not those that change state."""
        ids = list(buffer_ids)
        made = [item for item in list(self._runs.items()) if any(buffer_id in item[1].results for buffer_id in ids)]
        self.cancel([run_id for run_id, run in made if not (spare_state and run.changes_state)], reason)

    def cancel(self, run_ids: Sequence[RunId], reason: str) -> None:
        """Cancels those of some runs that are not over, if the session is not. Any thread, no waiting."""
        if not self.connections.is_usable():
            return
        by_island: dict[IslandId, list[RunId]] = defaultdict(list)
        for run_id in run_ids:
            if (run := self._runs.get(run_id)) is not None:
                for island in run.islands:
                    by_island[island].append(run_id)
        for island, cancelled in by_island.items():
            self.connections.post(island, cancel_message(cancelled, reason))

    def on_not_arrived(self, buffer_id: BufferId) -> None:
        """A value has not arrived: cancels the runs that read it. Any thread."""
        for run_id, run in list(self._runs.items()):
            if buffer_id in run.awaits:
                self._cancel_unless_arrived(run_id, run.awaits)

    def _cancel_unless_arrived(self, run_id: RunId, awaits: Collection[BufferId]) -> None:
        failed = next(filter(None, map(self.puts.error, awaits)), None)
        if failed is not None:
            self.cancel([run_id], f"a value that it reads did not arrive: {failed}")

    # ---- events

    def on_finished(self, run_id: RunId, failure: Failure | None) -> None:
        """An island's part of a run is over; on the loop."""
        run = self._runs.get(run_id)
        if run is None:
            return
        run.islands_left -= 1
        if run.islands_left == 0:
            del self._runs[run_id]
            if run.timer is not None:
                run.timer.cancel()
            self.puts.run_ended(run.put_bytes)
            if run.first_of is not None and failure is None:
                logger.info("%s", run.first_of.times_of_first_run())
            # Who waits is not woken for every single run.
            is_awaited = run_id in self._awaited or any(run_id < first_id for first_id in self._awaited_before)
            if not self._runs or is_awaited or len(self._runs) == self.limit * 3 // 4:
                self.connections.look_again()
        if failure is not None:
            logger.info("run %d of %s failed: %s", run_id, run.name, failure.message)
