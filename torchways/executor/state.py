"""The executor's core: which unit can be issued, what it waits for, and what a failure poisons.

Pure: events go in, commands come out; no clock, no socket, no device. Device buffers are opaque objects here: the
shell puts them into cells, and a buffer is freed when nothing refers to its cell any more.

A run is a set of units (plan.py) over cells. A unit is issued when all cells that it reads are *scheduled*: filled, or
to be filled by a command that was given before. The shell carries commands out in their order on one thread, so what
reads a computation's output is enqueued right behind it, long before it ends. Units that become ready together are
issued in (sequence, position) order. A gang (an executor of several that compute together) issues computations only as
the island's scheduler grants them, in the order of grants. A computation that finds the memory budget spent waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, assert_never

from torchways.errors import Failure
from torchways.executor.plan import (
    AllReduceInstruction,
    ComputeInstruction,
    LoadedProgram,
    ReceiveInstruction,
    SendInstruction,
    Unit,
)
from torchways.ids import BufferId, ClientId, ProgramId, RunId, owner

#: Ids of dropped buffers that are remembered, to tell "gone" from "not there yet".
_MAX_REMEMBERED = 200_000


@dataclass(eq=False, slots=True)
class Cell:
    """One logical buffer: empty, scheduled (a command that was given fills it), filled or poisoned.

    Attributes:
        nbytes: its size, bytes a device.
        scheduled: what reads it may be issued.
        buffer: the device buffer; the shell's to set.
        failure: why there is none; the shell's to set, or the core's.
        readers: units that will read it and host copies under way; a donation waits until its own is the last.
        holders: names, runs and copies that keep its memory.
        is_charged: its bytes count as used.
        form: dtype and shape as text; "" where they are not known.
        awaits_put: no run fills it: the controller's Put will, if it has not come yet.
        waiters: tasks to look at again when something changes.
        fetches: reads of the controller that wait for it.
    """

    nbytes: int = 0
    scheduled: bool = False
    buffer: Any = None
    failure: Failure | None = None
    readers: int = 0
    holders: int = 0
    is_charged: bool = False
    form: str = ""
    awaits_put: bool = False
    waiters: list[Task | _Placing] = field(default_factory=list)
    fetches: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Run:
    """One run of a program's part. `reads_left` counts, for each slot, the units that have not finished reading it."""

    program: LoadedProgram
    run_id: RunId
    sequence: int
    cells: list[Cell | None]
    reads_left: dict[int, int]
    units_left: int
    tasks: list[Task] = field(default_factory=list)
    failure: Failure | None = None


@dataclass(eq=False, slots=True)
class Task:
    """One unit of one run."""

    run: Run
    unit: Unit
    number: int
    issued: bool = False

    @property
    def need_bytes(self) -> int:
        """Device memory that it allocates, a device."""
        return self.unit.need_bytes

    @property
    def sequence(self) -> int:
        """Its run's place in the island's order."""
        return self.run.sequence

    def cells_of(self, slots: Sequence[int]) -> list[Cell]:
        """Returns the cells of its run in these slots."""
        cells = self.run.cells
        return [cells[slot] for slot in slots]  # type: ignore[misc]

    def __str__(self) -> str:
        return f"unit {self.number} of run {self.run.run_id} of {self.run.program.name}"


@dataclass(eq=False, slots=True)
class _Placing:
    """A host value on its way to the devices."""

    cell: Cell
    command: Place
    sequence: int
    issued: bool = False

    @property
    def need_bytes(self) -> int:
        return self.cell.nbytes

    def __str__(self) -> str:
        return "a value from a host"


# ---- events and commands


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramArrived:
    """A program was sent; it must be compiled before its runs can start."""

    program: LoadedProgram


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramCompiled:
    """Compilation ended, well or not."""

    program_id: ProgramId
    failure: Failure | None


@dataclass(slots=True, kw_only=True)
class RunEnqueued:
    """The scheduler ordered a run. `arguments` are buffer ids, or host values (anything that is not an int)."""

    program_id: ProgramId
    run_id: RunId
    sequence: int
    first_buffer_id: BufferId
    arguments: Sequence[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitGranted:
    """The scheduler lets a gang issue a unit."""

    run_id: RunId
    unit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferPut:
    """The controller's value for a named buffer has come, for `spec`'s place on the devices."""

    buffer_id: BufferId
    data: Any
    spec: Any
    nbytes: int
    form: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFinished:
    """A unit has ended: its computations on all devices, its sends, or (reductions) its value's exchange."""

    task: Task
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferArrived:
    """A peer sent a value (host data), or the failure that it would have had."""

    run_id: RunId
    edge_id: int
    data: Any
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """The sum of a reduction is known (host data), or that there will be none."""

    task: Task
    data: Any
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLost:
    """Nothing more will come from a peer."""

    peer: str
    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRequested:
    """The controller reads a buffer."""

    fetch_id: int
    buffer_id: BufferId


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchEnded:
    """The read of a cell is over, or given up."""

    cell: Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class BuffersDropped:
    """The controller has no reference left."""

    buffer_ids: Sequence[BufferId]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramDropped:
    """No run of this program will come."""

    program_id: ProgramId


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientDropped:
    """All that a client owned can go."""

    client_id: ClientId


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStalled:
    """For a long time nothing ended that could free memory, and something waits for it."""

    seconds: float


Event: TypeAlias = (
    ProgramArrived
    | ProgramCompiled
    | RunEnqueued
    | UnitGranted
    | BufferPut
    | UnitFinished
    | TransferArrived
    | Reduced
    | PeerLost
    | FetchRequested
    | FetchEnded
    | BuffersDropped
    | ProgramDropped
    | ClientDropped
    | MemoryStalled
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compile:
    """Compile a program's functions; answer with ProgramCompiled."""

    program_id: ProgramId


@dataclass(slots=True, kw_only=True)
class Execute:
    """Enqueue a unit's computations; answer with UnitFinished when they have ended.

    `inputs` and `outputs` are the cells of the unit's `reads` and `writes`. An input that is poisoned when its turn
    comes poisons what depends on it.
    """

    task: Task
    inputs: list[Cell]
    outputs: list[Cell]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Copy a host value to the devices into a cell: as slot `slot` of a program, or as `spec` says."""

    cell: Cell
    data: Any
    program_id: ProgramId = ProgramId(0)
    slot: int = 0
    spec: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send a cell's value, or its failure, when computed; answer with UnitFinished."""

    task: Task
    instruction: SendInstruction
    cell: Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduce:
    """Add a cell's value, or its failure, to a reduction; answer with Reduced."""

    task: Task
    instruction: AllReduceInstruction
    cell: Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliver:
    """Answer a fetch with a cell that is scheduled; answer with FetchEnded."""

    fetch_id: int
    cell: Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportLoaded:
    """Tell the scheduler how a compilation ended."""

    program_id: ProgramId
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportEnded:
    """Tell the scheduler that a run is over."""

    run_id: RunId
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportReady:
    """Tell the scheduler that a gang's unit has all that it needs."""

    run_id: RunId
    unit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportEnqueued:
    """Tell the scheduler that a granted unit is in the device queues; behind its Execute."""

    run_id: RunId
    unit: int


Command: TypeAlias = (
    Compile | Execute | Place | Send | Reduce | Deliver | ReportLoaded | ReportEnded | ReportReady | ReportEnqueued
)


class ExecutorState:
    """See the module's docstring.

    Args:
        executor_id: for messages.
        budget_bytes: device memory, bytes a device; 0: no limit.
        gang: "" (no gang), "leader" (says when units are ready) or "member".
        max_remembered: ids of dropped buffers, and of clients, that are kept for what may still come about them.
    """

    def __init__(
        self, executor_id: str, *, budget_bytes: int = 0, gang: str = "", max_remembered: int = _MAX_REMEMBERED
    ) -> None:
        self._executor_id = executor_id
        self._max_remembered = max_remembered
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        #: Buffers that the controller can name.
        self.named: dict[BufferId, Cell] = {}
        self.programs: dict[ProgramId, LoadedProgram] = {}
        #: Runs that are not over.
        self.runs: dict[RunId, Run] = {}
        #: What waits for memory, oldest first.
        self.starved: list[Task | _Placing] = []
        self._gang = gang
        self._granted: deque[tuple[RunId, int]] = deque()
        self._gang_ready: dict[tuple[RunId, int], Task] = {}
        #: Computations and sends that have not ended; while there are some, memory may yet be freed.
        self._in_flight = 0
        self._compiled: dict[ProgramId, Failure | None] = {}
        #: Tasks whose program is still being compiled.
        self._uncompiled: dict[ProgramId, list[Task]] = {}
        #: The names that runs of these programs give up if it can be compiled: if not, nothing was donated.
        self._to_donate: dict[ProgramId, list[BufferId]] = {}
        self._arrived: dict[tuple[RunId, int], TransferArrived] = {}
        self._receiving: dict[tuple[RunId, int], Task] = {}
        #: Cells that have no name any more, but that runs or reads wait for, and whose value a Put still brings.
        self._expected: dict[BufferId, Cell] = {}
        self._lost_peers: dict[str, Failure] = {}
        self._gone: dict[BufferId, str] = {}
        self._gone_order: deque[BufferId] = deque()
        self._gone_clients: dict[ClientId, None] = {}
        self._commands: list[Command] = []
        self._ready: list[Task | _Placing] = []

    def handle(self, event: Event) -> list[Command]:
        """Takes an event; returns what to do, in order."""
        match event:
            case RunEnqueued():
                self._enqueue(event)
            case UnitFinished():
                self._unit_finished(event.task, event.failure)
            case TransferArrived():
                self._transfer_arrived(event)
            case Reduced():
                self._reduced(event)
            case UnitGranted():
                self._granted.append((event.run_id, event.unit))
                self._issue_granted()
            case FetchRequested():
                self._fetch(event)
            case FetchEnded():
                self._end_reader(event.cell)
                self._let_go(event.cell)
            case BufferPut():
                self._put(event)
            case BuffersDropped():
                for buffer_id in event.buffer_ids:
                    self._drop(buffer_id, "was released")
            case ProgramArrived():
                program_id = ProgramId(event.program.program_id)
                self.programs[program_id] = event.program
                self._uncompiled[program_id] = []
                self._commands.append(Compile(program_id=program_id))
            case ProgramCompiled():
                self._program_compiled(event)
            case PeerLost():
                self._peer_lost(event)
            case ProgramDropped():
                self._drop_program(event.program_id)
            case ClientDropped():
                self._drop_client(event.client_id)
            case MemoryStalled():
                self._memory_stalled(event.seconds)
            case _:
                assert_never(event)
        if self._ready:
            self._issue_ready()
        commands, self._commands = self._commands, []
        return commands

    def is_needed(self, program_id: ProgramId) -> bool:
        """Whether runs of a program are in flight, or may come."""
        return program_id in self.programs or any(run.program.program_id == program_id for run in self.runs.values())

    def num_entries(self) -> dict[str, int]:
        """Returns how many entries each collection has: one that grows with the number of runs leaks."""
        return {
            name.strip("_"): len(value) for name, value in vars(self).items() if isinstance(value, dict | list | deque)
        }

    def client_bytes(self) -> dict[ClientId, int]:
        """Returns the bytes, a device, of the named buffers that each client owns."""
        found: dict[ClientId, int] = {}
        for buffer_id, cell in self.named.items():
            if cell.is_charged:
                found[owner(buffer_id)] = found.get(owner(buffer_id), 0) + cell.nbytes
        return found

    def waiting_for(self) -> list[str]:
        """Returns, for people, what each run in flight waits for."""
        lines = [
            f"{item} waits for {item.need_bytes:,} bytes of device memory: {self.used_bytes:,} of "
            f"{self.budget_bytes:,} are used"
            for item in self.starved
        ]
        for run in self.runs.values():
            if run.program.program_id in self._uncompiled:
                lines.append(f"run {run.run_id} of {run.program.name}: its compilation")
                continue
            empty = [slot for slot, cell in enumerate(run.cells) if cell is not None and not cell.scheduled]
            receives = [edge for run_id, edge in self._receiving if run_id == run.run_id]
            ungranted = [unit for run_id, unit in self._gang_ready if run_id == run.run_id]
            lines.append(
                f"run {run.run_id} of {run.program.name}: {run.units_left} units left; empty slots {empty[:8]}; "
                f"receives edges {receives[:8]}" + (f"; grants of units {ungranted[:8]}" if ungranted else "")
            )
        return lines

    # ---- runs

    def _enqueue(self, event: RunEnqueued) -> None:
        program = self.programs.get(event.program_id)
        if program is None:
            failure = self._failure("InternalError", f"run {event.run_id} names program {event.program_id}: not loaded")
            self._commands.append(ReportEnded(run_id=event.run_id, failure=failure))
            return
        sizes = program.slot_bytes
        forms = program.slot_forms or [""] * len(sizes)
        cells: list[Cell | None] = [None] * len(sizes)
        for unit in program.units:
            for slot in unit.writes:
                cells[slot] = Cell(sizes[slot], holders=1, form=forms[slot])
        for slot, argument in enumerate(event.arguments):
            if isinstance(argument, int):
                cell = self._named_cell(BufferId(argument))
                cell.holders += 1
                cells[slot] = cell
            else:
                cell = cells[slot] = Cell(sizes[slot], holders=1, form=forms[slot])
                place = Place(cell=cell, program_id=event.program_id, slot=slot, data=argument)
                self._place(place, event.sequence)
        for slot, number in program.results:
            result = cells[slot]
            assert result is not None
            self._name(BufferId(event.first_buffer_id + number), result)
        reads_left = dict(program.read_counts)
        run = Run(program, event.run_id, event.sequence, cells, reads_left, len(program.units))
        for slot, count in program.read_counts:
            cells[slot].readers += count  # type: ignore[union-attr]
        for slot in range(program.num_args):
            if slot not in reads_left:
                self._leave(run, slot)
        self._drop_donated(event, program)
        if not program.units:
            self._commands.append(ReportEnded(run_id=run.run_id, failure=None))
            return
        self.runs[run.run_id] = run
        run.tasks = [Task(run, unit, number) for number, unit in enumerate(program.units)]
        if event.program_id in self._uncompiled:
            self._uncompiled[event.program_id].extend(run.tasks)
        else:
            self._ready.extend(run.tasks)

    def _drop_donated(self, event: RunEnqueued, program: LoadedProgram) -> None:
        """Gives up the names of what a run donates: now, or when its program is compiled; never if that failed."""
        donated = [
            BufferId(event.arguments[slot])
            for unit in program.units
            for slot in unit.donated
            if slot < program.num_args and isinstance(event.arguments[slot], int)
        ]
        if event.program_id in self._uncompiled:
            self._to_donate.setdefault(event.program_id, []).extend(donated)
        elif event.program_id not in self._compiled:
            self._drop_all_donated(donated)

    def _drop_all_donated(self, buffer_ids: list[BufferId]) -> None:
        for buffer_id in buffer_ids:
            self._drop(buffer_id, "was donated to a later computation")

    def _name(self, buffer_id: BufferId, cell: Cell) -> None:
        early = self.named.get(buffer_id)
        if early is not None:  # fetches and runs that overtook the one that makes it wait for it already
            cell.fetches += early.fetches
            cell.readers += early.readers
            cell.holders += early.holders - 1
        cell.holders += 1
        self.named[buffer_id] = cell
        if cell.scheduled:  # an argument: nothing else will schedule it
            self._answer_fetches(cell)

    def _issue_ready(self) -> None:
        """Issues every task that can be; a poisoned one poisons what it fills, at once."""
        while self._ready:
            batch, self._ready = self._ready, []
            if len(batch) > 1:
                batch.sort(key=_priority)
            for task in batch:
                if task.issued:
                    continue
                if isinstance(task, _Placing):
                    self._try_place(task)
                else:
                    self._try_issue(task)

    def _try_issue(self, task: Task) -> None:
        run, unit = task.run, task.unit
        cells = run.cells
        failure = self._compiled.get(ProgramId(run.program.program_id))
        misfit: Failure | None = None
        for slot in unit.reads:
            cell = cells[slot]
            if not cell.scheduled and failure is None:  # type: ignore[union-attr]
                cell.waiters.append(task)  # type: ignore[union-attr]
                return
        if failure is None:
            failure = misfit = self._misfit(task)
        instruction = unit.instructions[0]
        if isinstance(instruction, ComputeInstruction):
            self._try_compute(task, failure)
            return
        task.issued = True
        if isinstance(instruction, ReceiveInstruction):
            self._issue_receive(task, instruction)
            return
        self._in_flight += 1
        cell = cells[unit.reads[0]]
        assert cell is not None
        if failure is not None and (failure is misfit or not cell.scheduled):
            cell = Cell(scheduled=True, failure=failure)
        if isinstance(instruction, SendInstruction):
            self._commands.append(Send(task=task, instruction=instruction, cell=cell))
        else:
            self._commands.append(Reduce(task=task, instruction=instruction, cell=cell))

    def _misfit(self, task: Task) -> Failure | None:
        """Returns the failure of a task that would read an argument of another dtype or shape than it is made for."""
        program = task.run.program
        for slot in task.unit.reads:
            if slot < program.num_args and program.slot_forms:
                found, needed = task.run.cells[slot].form, program.slot_forms[slot]  # type: ignore[union-attr]
                if found and found != needed:
                    return self._failure(
                        "UserError",
                        f"argument {slot} of {task} is an array of {found}, and the program was traced for {needed}: "
                        "an array was given another dtype or shape; call the program again, to trace it anew",
                    )
        return None

    def _try_compute(self, task: Task, failure: Failure | None) -> None:
        unit, cells = task.unit, task.run.cells
        if failure is None:
            known = [cells[slot].failure for slot in unit.reads]  # type: ignore[union-attr]
            failures = [item for item in known if item is not None]
            # Of several computations, those that can run do: the shell sees to it.
            if failures and (len(unit.instructions) == 1 or len(failures) == len(known)):
                failure = lowest(failures)
        if failure is not None:
            task.issued = True
            self._fail_task(task, failure)
            return
        for slot in unit.donated:
            cell = cells[slot]
            if cell.readers > 1:  # type: ignore[union-attr]
                cell.waiters.append(task)  # type: ignore[union-attr]
                return
        if self._gang:
            key = (task.run.run_id, task.number)
            if self._gang_ready.get(key) is not task:
                self._gang_ready[key] = task
                if self._gang == "leader":
                    self._commands.append(ReportReady(run_id=task.run.run_id, unit=task.number))
            self._issue_granted()
            return
        if self._may_allocate(task):
            self._issue_compute(task)

    def _issue_granted(self) -> None:
        """Issues what is ready at the head of the granted order; a unit that failed here is passed over."""
        while self._granted:
            run_id, number = key = self._granted[0]
            run = self.runs.get(run_id)
            if run is not None and not run.tasks[number].issued:
                task = self._gang_ready.get(key)
                if task is None or (not self._may_allocate(task) and not task.issued):
                    return
                if not task.issued:
                    self._issue_compute(task)
            self._gang_ready.pop(key, None)
            self._granted.popleft()
            self._commands.append(ReportEnqueued(run_id=run_id, unit=number))

    def _issue_compute(self, task: Task) -> None:
        task.issued = True
        unit = task.unit
        self._in_flight += 1
        self.used_bytes += unit.need_bytes
        for cell in self._reused(task):
            cell.is_charged = False
            self.used_bytes -= cell.nbytes
        outputs = task.cells_of(unit.writes)
        self._commands.append(Execute(task=task, inputs=task.cells_of(unit.reads), outputs=outputs))
        for cell in outputs:
            cell.is_charged = True
            self._schedule(cell)
        for cell in task.cells_of(unit.reads):  # what is issued later runs later: a donation need not wait for it
            self._end_reader(cell)

    def _issue_receive(self, task: Task, instruction: ReceiveInstruction) -> None:
        key = (task.run.run_id, instruction.edge_id)
        arrived = self._arrived.pop(key, None)
        if arrived is not None:
            self._receive(task, arrived)
        elif instruction.peer in self._lost_peers:
            self._fail_task(task, self._lost_peers[instruction.peer])
        elif owner(task.run.run_id) in self._gone_clients:
            self._fail_task(task, self._client_gone())
        else:
            self._receiving[key] = task

    def _receive(self, task: Task, arrived: TransferArrived) -> None:
        if arrived.failure is not None:
            self._fail_task(task, arrived.failure)
        else:
            self._place_output(task, arrived.data)
            self._end_unit(task, None)

    def _place_output(self, task: Task, data: Any) -> None:
        [slot] = task.unit.writes or (None,)
        if slot is None:  # nobody reads it
            return
        cell = task.run.cells[slot]
        if cell is not None:
            program_id = ProgramId(task.run.program.program_id)
            self._place(Place(cell=cell, program_id=program_id, slot=slot, data=data), task.run.sequence)

    def _reduced(self, event: Reduced) -> None:
        self._in_flight -= 1
        task = event.task
        for cell in task.cells_of(task.unit.reads):
            self._end_reader(cell)
        if event.failure is not None:
            self._fail_task(task, event.failure, end_readers=False)
        else:
            self._place_output(task, event.data)
            self._end_unit(task, None)

    def _unit_finished(self, task: Task, failure: Failure | None) -> None:
        self._in_flight -= 1
        unit = task.unit
        if isinstance(unit.instructions[0], SendInstruction):
            for cell in task.cells_of(unit.reads):
                self._end_reader(cell)
        else:
            sizes = task.run.program.slot_bytes
            self.used_bytes -= unit.need_bytes - sum(sizes[slot] for slot in unit.writes)
        self._end_unit(task, failure)

    def _fail_task(self, task: Task, failure: Failure, *, end_readers: bool = True) -> None:
        """Poisons what a task would have filled, and ends it."""
        for slot in task.unit.writes:
            cell = task.run.cells[slot]
            if cell is not None:  # else all that would read it has failed already
                cell.failure = failure
                self._schedule(cell)
        if end_readers:
            for read in task.cells_of(task.unit.reads):
                self._end_reader(read)
        self._end_unit(task, failure)

    def _end_unit(self, task: Task, failure: Failure | None) -> None:
        run, unit = task.run, task.unit
        if failure is not None:
            run.failure = lowest([run.failure, failure])
        for slot in unit.reads:
            run.reads_left[slot] -= 1
            if run.reads_left[slot] == 0:
                self._leave(run, slot)
        for slot in unit.writes:
            if run.reads_left.get(slot, 0) == 0:
                self._leave(run, slot)
        run.units_left -= 1
        if run.units_left == 0:
            del self.runs[run.run_id]
            self._commands.append(ReportEnded(run_id=run.run_id, failure=run.failure))
            self._forget_compilation(ProgramId(run.program.program_id))
        if self.starved:
            self._ready.extend(self.starved)
            self.starved = []

    def _leave(self, run: Run, slot: int) -> None:
        cell = run.cells[slot]
        if cell is not None:
            run.cells[slot] = None
            self._let_go(cell)

    # ---- cells

    def _schedule(self, cell: Cell) -> None:
        """What fills a cell was commanded, or it is poisoned: what reads it can follow."""
        cell.scheduled = True
        if cell.waiters:
            self._ready.extend(cell.waiters)
            cell.waiters = []
        self._answer_fetches(cell)

    def _answer_fetches(self, cell: Cell) -> None:
        fetches, cell.fetches = cell.fetches, []
        for fetch_id in fetches:
            self._commands.append(Deliver(fetch_id=fetch_id, cell=cell))

    def _end_reader(self, cell: Cell) -> None:
        cell.readers -= 1
        if cell.waiters and cell.scheduled:  # a donation may have waited for this
            self._ready.extend(cell.waiters)
            cell.waiters = []

    def _let_go(self, cell: Cell) -> None:
        cell.holders -= 1
        if cell.holders == 0 and cell.is_charged:
            cell.is_charged = False
            self.used_bytes -= cell.nbytes
            if self.starved:
                self._ready.extend(self.starved)
                self.starved = []

    # ---- memory

    def _may_allocate(self, item: Task | _Placing) -> bool:
        """Whether an item fits into the budget; it waits (or fails) otherwise."""
        if not self.budget_bytes or item.need_bytes == 0:
            return True
        need, freed = item.need_bytes, 0
        if isinstance(item, Task):
            freed = sum(cell.nbytes for cell in self._reused(item))
        if need - freed > self.budget_bytes:
            self._refuse(item, f"it needs {need - freed:,} bytes a device at once, and the whole budget is")
            return False
        oldest = min((other.sequence for other in self.starved), default=item.sequence)
        # While memory may yet be freed, younger runs do not take it from older ones.
        in_turn = item.sequence <= oldest or not self._in_flight
        if in_turn and self.used_bytes + need - freed <= self.budget_bytes:
            return True
        self.starved.append(item)
        return False

    @staticmethod
    def _reused(task: Task) -> list[Cell]:
        """Returns the inputs whose memory the outputs take over."""
        return [cell for cell in task.cells_of(task.unit.donated) if cell.holders == 1 and cell.is_charged]

    def _refuse(self, item: Task | _Placing, reason: str) -> None:
        item.issued = True
        failure = self._failure(
            "ResourceExhausted",
            f"{item} is refused: {reason} {self.budget_bytes:,} bytes. Use a larger slice, or shard its values",
        )
        if isinstance(item, Task):
            self._fail_task(item, failure)
        else:
            item.cell.failure = failure
            self._schedule(item.cell)

    def _memory_stalled(self, seconds: float) -> None:
        if not self.starved or self._in_flight:
            return
        item = min(self.starved, key=_priority)
        self.starved.remove(item)
        held = ", ".join(f"client {client}: {size:,} bytes" for client, size in sorted(self.client_bytes().items()))
        self._refuse(
            item,
            f"it waited {seconds:g} s for {item.need_bytes:,} bytes a device while {self.used_bytes:,} were in use "
            f"(arrays that clients hold: {held or 'none'}); drop arrays that you no longer need. The budget is",
        )

    def _place(self, command: Place, sequence: int) -> None:
        self._try_place(_Placing(command.cell, command, sequence))

    def _try_place(self, item: _Placing) -> None:
        if not self._may_allocate(item):
            return
        item.issued = True
        cell = item.cell
        self.used_bytes += cell.nbytes
        cell.is_charged = True
        self._commands.append(item.command)
        self._schedule(cell)
        if cell.holders == 0:  # released while it was on its way
            cell.holders = 1
            self._let_go(cell)

    def _put(self, event: BufferPut) -> None:
        cell = self._expected.pop(event.buffer_id, None) or self._named_cell(event.buffer_id)
        cell.awaits_put = False
        cell.form = event.form
        cell.nbytes = event.nbytes
        self._place(Place(cell=cell, data=event.data, spec=event.spec), 0)

    # ---- programs, transfers, fetches, drops

    def _program_compiled(self, event: ProgramCompiled) -> None:
        # A program that was dropped meanwhile may still have runs that wait for this.
        donated = self._to_donate.pop(event.program_id, [])
        if event.failure is not None:
            self._compiled[event.program_id] = event.failure
        else:
            self._drop_all_donated(donated)
        self._ready.extend(self._uncompiled.pop(event.program_id, []))
        self._forget_compilation(event.program_id)
        self._commands.append(ReportLoaded(program_id=event.program_id, failure=event.failure))

    def _transfer_arrived(self, event: TransferArrived) -> None:
        task = self._receiving.pop((event.run_id, event.edge_id), None)
        if task is not None:
            self._receive(task, event)
        elif owner(event.run_id) not in self._gone_clients:
            self._arrived[(event.run_id, event.edge_id)] = event

    def _peer_lost(self, event: PeerLost) -> None:
        self._lost_peers[event.peer] = event.failure
        for key, task in list(self._receiving.items()):
            if task.unit.instructions[0].peer == event.peer:  # type: ignore[union-attr]
                del self._receiving[key]
                self._fail_task(task, event.failure)

    def _fetch(self, event: FetchRequested) -> None:
        if event.buffer_id in self._gone:
            cell = Cell(
                scheduled=True,
                failure=self._failure(
                    "UserError",
                    f"the array's buffer {self._gone[event.buffer_id]}; read an array before the program that "
                    "replaces it runs, or keep what the program returns",
                ),
            )
        else:
            cell = self._named_cell(event.buffer_id)
        cell.readers += 1
        cell.holders += 1
        if cell.scheduled:
            self._commands.append(Deliver(fetch_id=event.fetch_id, cell=cell))
        else:
            cell.fetches.append(event.fetch_id)

    def _named_cell(self, buffer_id: BufferId) -> Cell:
        cell = self.named.get(buffer_id)
        if cell is None:
            if buffer_id in self._gone:
                reason = f"a program reads a buffer that {self._gone[buffer_id]}"
                return Cell(scheduled=True, failure=self._failure("UserError", reason))
            if owner(buffer_id) in self._gone_clients:
                return Cell(scheduled=True, failure=self._client_gone())
            cell = self.named[buffer_id] = Cell(holders=1, awaits_put=True)
        return cell

    def _drop(self, buffer_id: BufferId, reason: str) -> None:
        cell = self.named.pop(buffer_id, None)
        if cell is not None:
            if cell.awaits_put and (cell.readers or cell.waiters):
                self._expected[buffer_id] = cell
            self._let_go(cell)
        if buffer_id not in self._gone:
            self._gone_order.append(buffer_id)
        self._gone[buffer_id] = reason
        if len(self._gone_order) > self._max_remembered:
            self._gone.pop(self._gone_order.popleft(), None)

    def _drop_program(self, program_id: ProgramId) -> None:
        self.programs.pop(program_id, None)
        self._forget_compilation(program_id)

    def _forget_compilation(self, program_id: ProgramId) -> None:
        if program_id in self._compiled and not self.is_needed(program_id):
            del self._compiled[program_id]

    def _drop_client(self, client_id: ClientId) -> None:
        self._gone_clients[client_id] = None
        if len(self._gone_clients) > self._max_remembered:
            del self._gone_clients[next(iter(self._gone_clients))]
        for buffer_id in [buffer_id for buffer_id in self.named if owner(buffer_id) == client_id]:
            self._drop(buffer_id, "belonged to a client that is gone")
        for program_id in [program_id for program_id in self.programs if owner(program_id) == client_id]:
            self._drop_program(program_id)
        for key in [key for key in self._arrived if owner(key[0]) == client_id]:
            del self._arrived[key]
        for buffer_id in [buffer_id for buffer_id in self._expected if owner(buffer_id) == client_id]:
            cell = self._expected.pop(buffer_id)
            cell.failure = self._client_gone()
            self._schedule(cell)
        for key, task in list(self._receiving.items()):
            if owner(key[0]) == client_id:
                del self._receiving[key]
                self._fail_task(task, self._client_gone())

    def _client_gone(self) -> Failure:
        return self._failure("SessionClosed", "the client is gone")

    def _failure(self, kind: str, message: str) -> Failure:
        return Failure(kind=kind, message=message, process=f"executor {self._executor_id}")


def _priority(item: Task | _Placing) -> tuple[int, int]:
    return (item.sequence, item.unit.position if isinstance(item, Task) else -1)


def lowest(failures: Sequence[Failure | None]) -> Failure | None:
    """Returns the failure of the lowest run: of several, that came first."""
    real = [failure for failure in failures if failure is not None]
    return min(real, key=lambda failure: failure.run_id) if real else None
