"""The buffers that the controller can name.

A read or a run may name a buffer before the run or the Put that makes it is here, since these come from different
streams; a buffer that is gone must not be taken for such a one. So ids of dropped buffers, slices and clients are
remembered, up to a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchways.errors import Failure
from torchways.executor.runs import Cell
from torchways.ids import BufferId, ClientId, SliceId, owner


class Names:
    """See the module's docstring.

    Args:
        failure: makes a failure of this executor, of a kind and a message.
        max_remembered: how many ids of dropped buffers, slices and clients are remembered.

    Attributes:
        cells: the named buffers.
    """

    def __init__(self, failure: Callable[[str, str], Failure], max_remembered: int) -> None:
        self.cells: dict[BufferId, Cell] = {}
        self._failure = failure
        self._max_remembered = max_remembered
        #: Cells without a name that runs or reads wait for, and whose value a Put still brings.
        self._expected: dict[BufferId, Cell] = {}
        #: Why buffers are gone, oldest first.
        self._gone: dict[BufferId, str] = {}
        self._gone_clients: dict[ClientId, None] = {}
        self._gone_slices: dict[SliceId, None] = {}

    def owner_of(self, cell: Cell) -> ClientId:
        """Returns the client that can name a cell; 0: none can."""
        named = (*self.cells.items(), *self._expected.items())
        return next((owner(buffer_id) for buffer_id, known in named if known is cell), ClientId(0))

    def is_gone(self, client_id: ClientId) -> bool:
        """Whether a client was dropped."""
        return client_id in self._gone_clients

    def client_gone(self) -> Failure:
        """Returns the failure of whatever waits for a client that was dropped."""
        return self._failure("SessionClosed", "the client is gone")

    def find(self, buffer_id: BufferId) -> Cell:
        """Returns the cell of a name: an empty one if nobody has made it yet, a poisoned one if it is gone."""
        cell = self.cells.get(buffer_id)
        if cell is None:
            if buffer_id in self._gone:
                reason = f"a program reads a buffer that {self._gone[buffer_id]}"
                return Cell(scheduled=True, failure=self._failure("UserError", reason))
            if owner(buffer_id) in self._gone_clients:
                return Cell(scheduled=True, failure=self.client_gone())
            cell = self.cells[buffer_id] = Cell(holders=1, names=1, awaits_put=True, client_id=owner(buffer_id))
        return cell

    def find_for_fetch(self, buffer_id: BufferId) -> Cell:
        """Returns the cell that a read is for: an empty one if nobody has made it yet, a poisoned one if it is gone."""
        if reason := self._gone.get(buffer_id):
            message = (
                f"the array's buffer {reason}; read an array before the program that replaces it runs, or keep what "
                "the program returns"
            )
            return Cell(scheduled=True, failure=self._failure("UserError", message))
        return self.find(buffer_id)

    def give(self, buffer_id: BufferId, cell: Cell) -> None:
        """Names a cell; reads that overtook the run that makes it wait for it from now on."""
        early = self.cells.get(buffer_id)
        if early is not None:
            cell.fetches += early.fetches
            cell.readers += early.readers
            cell.holders += early.holders - 1
        cell.holders += 1
        cell.names += 1
        self.cells[buffer_id] = cell

    def find_for_put(self, buffer_id: BufferId, slice_id: SliceId) -> Cell | None:
        """Returns the cell that a Put fills; None if nobody wants it any more, or the buffer has a value already."""
        cell = self._expected.pop(buffer_id, None)
        if cell is None:
            if slice_id in self._gone_slices:
                return None
            cell = self.find(buffer_id)
        if not cell.awaits_put:
            return None
        cell.awaits_put = False
        return cell

    def is_made(self, buffer_id: BufferId) -> bool:
        """Whether a name is given already: a run or a Put makes the buffer, or has."""
        cell = self.cells.get(buffer_id)
        return cell is not None and not cell.awaits_put

    def drop(self, buffer_id: BufferId, reason: str) -> Cell | None:
        """Takes a name away; returns the cell that had it."""
        cell = self.cells.pop(buffer_id, None)
        if cell is not None:
            cell.names -= 1
        if cell is not None and cell.awaits_put and (cell.readers or cell.waiters):
            self._expected[buffer_id] = cell
        remember(self._gone, buffer_id, reason, self._max_remembered)
        return cell

    def on_slice(self, slice_id: SliceId) -> list[BufferId]:
        """Returns the names of the buffers on a slice."""
        return [buffer_id for buffer_id, cell in self.cells.items() if cell.slice_id == slice_id]

    def of_client(self, client_id: ClientId) -> list[BufferId]:
        """Returns the names that a client gave."""
        return [buffer_id for buffer_id in self.cells if owner(buffer_id) == client_id]

    def forget_slice(self, slice_id: SliceId) -> None:
        """No Put for this slice is wanted from now on."""
        remember(self._gone_slices, slice_id, None, self._max_remembered)

    def forget_client(self, client_id: ClientId) -> None:
        """No name of this client means anything from now on."""
        remember(self._gone_clients, client_id, None, self._max_remembered)

    def give_up_expected(self, client_id: ClientId) -> list[Cell]:
        """Poisons the cells that a client's Puts would have filled; returns them."""
        cells = [self._expected.pop(key) for key in list(self._expected) if owner(key) == client_id]
        for cell in cells:
            cell.failure = self.client_gone()
        return cells

    def client_bytes(self) -> dict[ClientId, int]:
        """Returns the bytes, per device, of the named buffers that each client owns."""
        found: dict[ClientId, int] = {}
        for buffer_id, cell in self.cells.items():
            if cell.is_charged:
                found[owner(buffer_id)] = found.get(owner(buffer_id), 0) + cell.nbytes
        return found


def remember(gone: dict[Any, Any], key: Any, value: Any, max_remembered: int) -> None:
    """Adds an item; the oldest one is forgotten where there are too many."""
    gone[key] = value
    if len(gone) > max_remembered:
        del gone[next(iter(gone))]
