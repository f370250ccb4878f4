"""What the executor's core and its shell both hold in hand: cells, runs and their tasks, programs.

Mutable; only the core changes them, but for the buffer and the failure of a cell, and the device time of a run, which
the shell sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchways.errors import Failure
from torchways.executor.plan import LoadedProgram, Unit
from torchways.ids import BufferId, ClientId, RunId, RunPart, SliceId, owner
from torchways.ir.part import Slot

if TYPE_CHECKING:
    from torchways.executor.events import Place


@dataclass(eq=False, slots=True)
class Cell:
    """One logical buffer: empty, scheduled (a command that was given fills it), filled or poisoned.

    Attributes:
        nbytes: its size, bytes per device.
        scheduled: units that read it may be issued.
        buffer: the device buffer; set by the shell.
        failure: the reason why there is no buffer; set by the shell or the core.
        readers: units that will read it and host copies under way; a donation waits until its own unit is the last.
        holders: names, runs and copies that keep its memory.
        names: how many of these are names.
        is_charged: its bytes count as used.
        form: dtype and shape as text; "" if they are not known.
        awaits_put: the controller's Put fills it, not a run, if it has not come yet.
        kept: a value that has come for a run, until that run does.
        slice_id: the slice that it is on; 0 while that is not known.
        client_id: whose it is; 0 while that is not known.
        payer: the run that its bytes count for, while that run is in flight.
        waiters: tasks to look at again when something changes.
        fetches: reads of the controller that wait for it.
    """

    nbytes: int = 0
    scheduled: bool = False
    buffer: Any = None
    failure: Failure | None = None
    readers: int = 0
    holders: int = 0
    names: int = 0
    is_charged: bool = False
    form: str = ""
    awaits_put: bool = False
    kept: Placing | None = None
    slice_id: SliceId = SliceId(0)
    client_id: ClientId = ClientId(0)
    payer: RunPart | None = None
    waiters: list[Task | Placing] = field(default_factory=list)
    fetches: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class KnownProgram:
    """A program's part, from its arrival until it is dropped and its last run is over.

    Attributes:
        program: its plan.
        num_runs: its runs in flight.
        is_compiled: compilation has ended, well or not.
        failure: why it could not be compiled.
        is_dropped: no run will come.
        waiting: tasks of runs that came before it was compiled.
        to_donate: names that these runs give up if it can be compiled; if it cannot, nothing was donated.
        numbers: the cells of the slots that hold the same number in each run.
    """

    program: LoadedProgram
    num_runs: int = 0
    is_compiled: bool = False
    failure: Failure | None = None
    is_dropped: bool = False
    waiting: list[Task] = field(default_factory=list)
    to_donate: list[BufferId] = field(default_factory=list)
    numbers: dict[Slot, Cell] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Run:
    """One run of a program's part.

    Attributes:
        program: the plan of its part.
        known: its part.
        sequence: its place in the island's order.
        cells: by slot; None once the run has no use for the slot.
        reads_left: for each slot, the number of units that have not finished reading it.
        units_left: the number of units that are not over.
        in_order: the tasks that pass one after the other; see `Task.has_passed`.
        num_passed: how many of them have passed.
        reserved_bytes: the most that it allocates at a time, bytes per device.
        own_bytes: the bytes that it has allocated now.
        admitted: `reserved_bytes` are kept for it.
        failure: the lowest of its units' failures.
        cancelled: what units that are not issued fail with.
        device_ns: time that it had the devices.
        checks_values: a function that makes NaN or infinity fails.
        came_ns: when it came.
        client_id: whose it is.
    """

    program: LoadedProgram
    known: KnownProgram
    run_id: RunId
    sequence: int
    cells: list[Cell | None]
    reads_left: dict[int, int]
    units_left: int
    tasks: list[Task] = field(default_factory=list)
    in_order: list[Task] = field(default_factory=list)
    num_passed: int = 0
    reserved_bytes: int = 0
    own_bytes: int = 0
    admitted: bool = False
    failure: Failure | None = None
    cancelled: Failure | None = None
    device_ns: int = 0
    checks_values: bool = False
    came_ns: int = 0
    client_id: ClientId = field(init=False)

    def __post_init__(self) -> None:
        self.client_id = owner(self.run_id)

    @property
    def part(self) -> RunPart:
        """Its identity."""
        return RunPart(self.run_id, self.program.part.slice_id)

    @property
    def unpaid_bytes(self) -> int:
        """The bytes that it may still allocate beside those that it has."""
        return max(0, self.reserved_bytes - self.own_bytes)

    @property
    def most_unpaid_bytes(self) -> int:
        """A bound of `unpaid_bytes`."""
        return self.reserved_bytes + self.program.donated_bytes


@dataclass(eq=False, slots=True)
class Task:
    """One unit of one run.

    Attributes:
        issued: it is under way, or over.
        has_passed: it has its memory, or needs none; the tasks behind it in its run need not wait for it.
        arrived: the value that it received, until it has passed.
        has_ended: it is over.
        awaited_input: its turn came before its inputs did.
        held_for: what its grant waited for, for people; "": for nothing, or it has none.
        is_reported: in a gang, the scheduler knows that it is ready, or has failed.
        refusal: in a gang, why it will not be granted.
    """

    run: Run
    unit: Unit
    number: int
    issued: bool = False
    has_passed: bool = False
    arrived: Place | None = None
    has_ended: bool = False
    awaited_input: bool = False
    held_for: str = ""
    is_reported: bool = False
    refusal: Failure | None = None

    @property
    def is_promised(self) -> bool:
        """Whether the hosts of its gang rely on it: it may be granted at any moment, and must not fail here alone."""
        return self.is_reported and not self.issued and self.refusal is None

    @property
    def need_bytes(self) -> int:
        """Device memory that it allocates, bytes per device."""
        return self.unit.need_bytes

    def cells_of(self, slots: Sequence[Slot]) -> list[Cell]:
        """Returns the cells of its run in these slots."""
        cells = self.run.cells
        return [cells[slot] for slot in slots]  # type: ignore[misc]

    def __str__(self) -> str:
        return f"unit {self.number} of run {self.run.run_id} of {self.run.program.name}"


@dataclass(eq=False, slots=True)
class Placing:
    """A host value on its way to the devices. `came_ns`: when it came; 0: with its run."""

    cell: Cell
    command: Place
    issued: bool = False
    came_ns: int = 0

    @property
    def need_bytes(self) -> int:
        """Device memory that it takes, bytes per device."""
        return self.cell.nbytes

    def __str__(self) -> str:
        return "a value from a host"


def lowest(failures: Sequence[Failure | None]) -> Failure | None:
    """Returns the failure of the lowest run: of several, the one that came first."""
    real = [failure for failure in failures if failure is not None]
    return min(real, key=lambda failure: failure.run_id) if real else None
