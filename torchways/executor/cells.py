"""What happens to cells: who waits for one, who reads it, and when its memory is free."""

from __future__ import annotations

from torchways.errors import Failure
from torchways.executor.agenda import Agenda
from torchways.executor.events import Deliver, FetchRequested
from torchways.executor.memory import Memory
from torchways.executor.names import Names
from torchways.executor.runs import Cell, Placing, Run
from torchways.ids import BufferId, ClientId
from torchways.ir.part import Slot

#: What may be kept of a client's values that came before the runs that they are for; what is above has a place at once.
_MAX_KEPT_BYTES = 1 << 30


class Cells:
    """See the module's docstring."""

    def __init__(self, agenda: Agenda, memory: Memory, names: Names) -> None:
        self._agenda = agenda
        self._memory = memory
        self._names = names
        #: The cells that fetches wait for.
        self._fetching: dict[int, Cell] = {}
        #: Bytes of values that wait for the runs that they are for, by client.
        self._kept_bytes: dict[ClientId, int] = {}

    def schedule(self, cell: Cell) -> None:
        """What fills a cell was commanded, or it is poisoned: what reads it can follow."""
        cell.scheduled = True
        self._wake_waiters(cell)
        self._answer_fetches(cell)

    def poison(self, cell: Cell, failure: Failure) -> None:
        """Nothing will fill it."""
        cell.failure = failure
        self.schedule(cell)

    def end_reader(self, cell: Cell) -> None:
        """Somebody has read it."""
        cell.readers -= 1
        if cell.scheduled:  # a donation may have waited for this
            self._wake_waiters(cell)

    def let_go(self, cell: Cell) -> None:
        """Somebody holds it no longer."""
        cell.holders -= 1
        if cell.holders:
            return
        if cell.kept is not None:
            self.forget_kept(cell)
        if not cell.scheduled:
            self._memory.forget_value(cell)
        if cell.is_charged:
            self._memory.release(cell)
            self.memory_freed()

    def leave(self, run: Run, slot: Slot) -> None:
        """A run has no use for a slot any more."""
        cell = run.cells[slot]
        if cell is not None:
            run.cells[slot] = None
            self.let_go(cell)

    def memory_freed(self) -> None:
        """Looks again at whatever waits for memory."""
        self._agenda.ready += self._memory.freed()

    def _wake_waiters(self, cell: Cell) -> None:
        if cell.waiters:
            self._agenda.ready += cell.waiters
            cell.waiters = []

    # ---- names

    def name(self, buffer_id: BufferId, cell: Cell) -> None:
        """Names a cell for the controller."""
        self._names.give(buffer_id, cell)
        for fetch_id in cell.fetches:  # those that came earlier
            self._fetching[fetch_id] = cell
        if cell.scheduled:  # an argument: nothing else will schedule it
            self._answer_fetches(cell)

    def drop(self, buffer_id: BufferId, reason: str) -> None:
        """Takes a name away; `reason` ends the sentence "the buffer ..."."""
        cell = self._names.drop(buffer_id, reason)
        if cell is not None:
            self.let_go(cell)

    # ---- fetches

    def fetch(self, event: FetchRequested) -> None:
        """Delivers a buffer: now, or when it is scheduled."""
        cell = self._names.find_for_fetch(event.buffer_id)
        cell.readers += 1
        cell.holders += 1
        if cell.scheduled:
            self._agenda.commands.append(Deliver(fetch_id=event.fetch_id, cell=cell))
        else:
            cell.fetches.append(event.fetch_id)
            self._fetching[event.fetch_id] = cell

    def cancel_fetch(self, fetch_id: int) -> None:
        """Lets a fetch wait no longer, if it does."""
        cell = self._fetching.pop(fetch_id, None)
        if cell is not None:
            cell.fetches.remove(fetch_id)
            self.end_fetch(cell)

    def end_fetch(self, cell: Cell) -> None:
        """What was delivered is copied."""
        self.end_reader(cell)
        self.let_go(cell)

    def _answer_fetches(self, cell: Cell) -> None:
        fetches, cell.fetches = cell.fetches, []
        for fetch_id in fetches:
            del self._fetching[fetch_id]
            self._agenda.commands.append(Deliver(fetch_id=fetch_id, cell=cell))

    # ---- values that come before their runs

    def keep(self, placing: Placing) -> bool:
        """Keeps a value until its run is here, which says when it has a place; False: its client has too many."""
        cell = placing.cell
        kept_bytes = self._kept_bytes.get(cell.client_id, 0) + cell.nbytes
        if kept_bytes > _MAX_KEPT_BYTES:
            return False
        cell.kept = placing
        self._kept_bytes[cell.client_id] = kept_bytes
        return True

    def forget_kept(self, cell: Cell) -> None:
        """The run is here, or will not be."""
        cell.kept = None
        left = self._kept_bytes.pop(cell.client_id, 0) - cell.nbytes
        if left:
            self._kept_bytes[cell.client_id] = left
