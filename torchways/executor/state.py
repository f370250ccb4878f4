"""The executor's core: which unit can be issued, what it waits for, and what a failure poisons.

Pure: events go in, commands come out; no clock, no socket, no device. Device buffers are opaque objects here: the
shell puts them into cells, and a buffer is freed when nothing refers to its cell any more.

A run is a list of units (plan.py) over cells. A unit is issued when all cells that it reads are *scheduled*: filled,
or to be filled by a command that was given before. The shell carries commands out in their order on one thread, so what
reads a computation's output is enqueued right behind it, long before it ends.

The computations of a run are issued in the program's order, the one that pre-flight proved (passes/preflight.py); sends
and receives are not held up by it. Of several runs, the older goes first where both could. Where devices are shared
with other executors, or with other hosts (`UnitGranted`), computations are issued only as the island's scheduler
grants them.

What a run allocates comes in the program's order too: memory for a value that is received is set aside when its turn
comes, whether it has arrived or not. With a memory budget, a run begins when the most that it will ever need is left
beside what older runs may still take: so none is stopped half way, and what pre-flight found to fit does fit. The
oldest always may.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, assert_never

from torchways.errors import Failure
from torchways.executor.plan import LoadedProgram, Unit
from torchways.ids import BufferId, ClientId, PartId, ProgramId, RunId, RunPart, SliceId, owner
from torchways.ir.part import AllReduceInstruction, ComputeInstruction, ReceiveInstruction, SendInstruction

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
        slice_id: whose it is; 0 while nobody has said.
        payer: the run that its bytes count for, while it is in flight.
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
    slice_id: SliceId = SliceId(0)
    payer: RunPart | None = None
    waiters: list[Task | _Placing] = field(default_factory=list)
    fetches: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Run:
    """One run of a program's part.

    Attributes:
        reads_left: for each slot, the units that have not finished reading it.
        in_order: its tasks that wait for each other, and how many of them are over with that.
        reserved_bytes: the most that it allocates at a time, bytes a device.
        own_bytes: what it has allocated now.
        admitted: `reserved_bytes` are kept for it.
    """

    program: LoadedProgram
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

    @property
    def part(self) -> RunPart:
        """Which it is."""
        return RunPart(self.run_id, self.program.part.slice_id)

    @property
    def unpaid_bytes(self) -> int:
        """What it may still allocate beside what it has."""
        return max(0, self.reserved_bytes - self.own_bytes)

    @property
    def most_unpaid_bytes(self) -> int:
        """What `unpaid_bytes` never exceeds."""
        return self.reserved_bytes + self.program.donated_bytes


@dataclass(eq=False, slots=True)
class Task:
    """One unit of one run.

    Attributes:
        issued: it is under way, or over.
        has_passed: it has its memory, or needs none: what comes behind it in its run need not wait for it.
        arrived: what it received, until it has passed.
        has_ended: it is over.
    """

    run: Run
    unit: Unit
    number: int
    issued: bool = False
    has_passed: bool = False
    arrived: Place | None = None
    has_ended: bool = False

    @property
    def need_bytes(self) -> int:
        """Device memory that it allocates, a device."""
        return self.unit.need_bytes

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

    part: PartId
    failure: Failure | None


@dataclass(slots=True, kw_only=True)
class RunEnqueued:
    """The scheduler ordered a run. `arguments` are buffer ids, or host values (anything that is not an int).

    They are what a client sent; None: they cannot be read.
    """

    part: PartId
    run_id: RunId
    sequence: int
    first_buffer_id: BufferId
    arguments: Sequence[Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitGranted:
    """The scheduler lets a unit be issued."""

    run: RunPart
    unit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantsNeeded:
    """Whether another executor has devices of this one, so that computations wait for grants."""

    needed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferPut:
    """The controller's value for a named buffer has come, for `spec`'s place on the devices."""

    buffer_id: BufferId
    data: Any
    spec: Any
    nbytes: int
    slice_id: SliceId
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
class SliceDropped:
    """A slice is given back: its buffers and programs can go."""

    slice_id: SliceId


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
    | GrantsNeeded
    | BufferPut
    | UnitFinished
    | TransferArrived
    | Reduced
    | PeerLost
    | FetchRequested
    | FetchEnded
    | BuffersDropped
    | ProgramDropped
    | SliceDropped
    | ClientDropped
    | MemoryStalled
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compile:
    """Compile a program's functions; answer with ProgramCompiled."""

    program: LoadedProgram


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
    part: PartId | None = None
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

    part: PartId
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportEnded:
    """Tell the scheduler that a run is over."""

    run: RunPart
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportReady:
    """Tell the scheduler that a unit has all that it needs."""

    run: RunPart
    unit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportPassed:
    """Tell the scheduler that a granted unit needs its turn no more.

    It is in the queues of devices that keep their order; or it has ended, on devices that do not.
    """

    run: RunPart
    unit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportIdle:
    """Tell the scheduler that what was issued before grants were needed has ended."""


Command: TypeAlias = (
    Compile
    | Execute
    | Place
    | Send
    | Reduce
    | Deliver
    | ReportLoaded
    | ReportEnded
    | ReportReady
    | ReportPassed
    | ReportIdle
)


class ExecutorState:
    """See the module's docstring.

    Args:
        executor_id: for messages.
        budget_bytes: device memory, bytes a device; 0: no limit.
        gang: "", or for one of several hosts that compute together "leader" (says when units are ready) or "member".
        max_remembered: ids of dropped buffers, slices and clients that are kept for what may still come about them.
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
        self.programs: dict[PartId, LoadedProgram] = {}
        #: Runs that are not over, in their order.
        self.runs: dict[RunPart, Run] = {}
        #: Runs that have not begun, in their order; the most that those that have may still allocate.
        self._unadmitted: deque[Run] = deque()
        self._promised_bytes = 0
        #: What waits for memory, oldest first.
        self.starved: list[Task | _Placing] = []
        self._gang = gang
        #: Computations are issued as granted: always in a gang, else while devices are shared with other executors.
        self._needs_grants = bool(gang)
        self._granted: deque[tuple[RunPart, int]] = deque()
        self._ungranted: dict[tuple[RunPart, int], Task] = {}
        #: Computations that have not ended; those of them that took no grant when grants became needed.
        self._computing: set[Task] = set()
        self._computing_freely: set[Task] = set()
        #: Computations and sends that have not ended; while there are some, memory may yet be freed.
        self._in_flight = 0
        self._compiled: dict[PartId, Failure | None] = {}
        #: Tasks whose program is still being compiled.
        self._uncompiled: dict[PartId, list[Task]] = {}
        #: The names that runs of these programs give up if it can be compiled: if not, nothing was donated.
        self._to_donate: dict[PartId, list[BufferId]] = {}
        self._arrived: dict[tuple[RunId, int], TransferArrived] = {}
        self._receiving: dict[tuple[RunId, int], Task] = {}
        #: Cells that have no name any more, but that runs or reads wait for, and whose value a Put still brings.
        self._expected: dict[BufferId, Cell] = {}
        self._lost_peers: dict[str, Failure] = {}
        self._gone: dict[BufferId, str] = {}
        self._gone_order: deque[BufferId] = deque()
        self._gone_clients: dict[ClientId, None] = {}
        self._gone_slices: dict[SliceId, None] = {}
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
                self._granted.append((event.run, event.unit))
                self._issue_granted()
            case GrantsNeeded():
                self._need_grants(event.needed)
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
                part = event.program.part
                self.programs[part] = event.program
                self._uncompiled[part] = []
                self._commands.append(Compile(program=event.program))
            case ProgramCompiled():
                self._program_compiled(event)
            case PeerLost():
                self._peer_lost(event)
            case ProgramDropped():
                for part in [part for part in self.programs if part.program_id == event.program_id]:
                    self._drop_program(part)
            case SliceDropped():
                self._drop_slice(event.slice_id)
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

    def is_needed(self, part: PartId) -> bool:
        """Whether runs of a program's part are in flight, or may come."""
        return part in self.programs or any(run.program.part == part for run in self.runs.values())

    def num_entries(self) -> dict[str, int]:
        """Returns how many entries each collection has: one that grows with the number of runs leaks."""
        return {
            name.strip("_"): len(value)
            for name, value in vars(self).items()
            if isinstance(value, dict | list | deque | set)
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
            if run.program.part in self._uncompiled:
                lines.append(f"run {run.run_id} of {run.program.name}: its compilation")
                continue
            empty = [slot for slot, cell in enumerate(run.cells) if cell is not None and not cell.scheduled]
            receives = [edge for run_id, edge in self._receiving if run_id == run.run_id]
            ungranted = [unit for part, unit in self._ungranted if part == run.part]
            lines.append(
                f"run {run.run_id} of {run.program.name}: {run.units_left} units left; empty slots {empty[:8]}; "
                f"receives edges {receives[:8]}" + (f"; grants of units {ungranted[:8]}" if ungranted else "")
            )
        return lines

    # ---- runs

    def _enqueue(self, event: RunEnqueued) -> None:
        program, part = self.programs.get(event.part), RunPart(event.run_id, event.part.slice_id)
        if program is None:
            failure = self._failure("InternalError", f"run {event.run_id} names {event.part}, which is not loaded")
            self._commands.append(ReportEnded(run=part, failure=failure))
            return
        if reason := _refusal(event, program):
            failure = self._failure("AccessDenied", f"run {event.run_id} of {program.name} is refused: {reason}")
            for _, number in program.results:
                buffer_id = BufferId(event.first_buffer_id + number)
                if owner(buffer_id) == owner(event.run_id):
                    self._name(buffer_id, Cell(scheduled=True, failure=failure, slice_id=part.slice_id))
            self._commands.append(ReportEnded(run=part, failure=failure))
            return
        arguments = event.arguments
        assert arguments is not None
        sizes = program.slot_bytes
        forms = program.slot_forms or [""] * len(sizes)
        slice_id = part.slice_id
        cells: list[Cell | None] = [None] * len(sizes)
        reserved = program.peak_bytes
        for unit in program.units:
            for slot in unit.writes:
                cells[slot] = Cell(sizes[slot], holders=1, form=forms[slot], slice_id=slice_id, payer=part)
        inline: list[_Placing] = []
        for slot, argument in enumerate(arguments):
            if isinstance(argument, int):
                cell = self._named_cell(BufferId(argument))
                cell.holders += 1
                if not cell.is_charged and not cell.scheduled and cell.payer is None:  # a Put that has no place yet
                    cell.payer = part
                    reserved += sizes[slot]
            else:
                cell = Cell(sizes[slot], holders=1, form=forms[slot], slice_id=slice_id, payer=part)
                inline.append(_Placing(cell, Place(cell=cell, part=event.part, slot=slot, data=argument)))
                reserved += sizes[slot]
            cells[slot] = cell
        for slot, number in program.results:
            result = cells[slot]
            assert result is not None
            self._name(BufferId(event.first_buffer_id + number), result)
        reads_left = dict(program.read_counts)
        run = Run(
            program,
            event.run_id,
            event.sequence,
            cells,
            reads_left,
            len(program.units),
            reserved_bytes=max(0, reserved),
        )
        self.runs[part] = run
        self._unadmitted.append(run)
        self._admit_runs()
        for item in inline:
            self._try_place(item)
        for slot, count in program.read_counts:
            cells[slot].readers += count  # type: ignore[union-attr]
        for slot in range(program.num_args):
            if slot not in reads_left:
                self._leave(run, slot)
        self._drop_donated(event.part, arguments, program)
        if not program.units:
            self._end_run(run)
            return
        run.tasks = [Task(run, unit, number) for number, unit in enumerate(program.units)]
        run.in_order = [task for task in run.tasks if _takes_memory(task)]
        if event.part in self._uncompiled:
            self._uncompiled[event.part].extend(run.tasks)
        else:
            self._ready.extend(run.tasks)

    @staticmethod
    def _is_next(task: Task) -> bool:
        run = task.run
        return run.num_passed < len(run.in_order) and run.in_order[run.num_passed] is task

    def _pass(self, task: Task) -> None:
        """What comes behind a task in its run need not wait for it any more."""
        run = task.run
        task.has_passed = True
        if not self._is_next(task):
            return
        while run.num_passed < len(run.in_order) and run.in_order[run.num_passed].has_passed:
            run.num_passed += 1
        if run.num_passed < len(run.in_order):
            self._ready.append(run.in_order[run.num_passed])

    def _drop_donated(self, part: PartId, arguments: Sequence[Any], program: LoadedProgram) -> None:
        """Gives up the names of what a run donates: now, or when its program is compiled; never if that failed."""
        donated = [
            BufferId(arguments[slot])
            for unit in program.units
            for slot in unit.donated
            if slot < program.num_args and isinstance(arguments[slot], int)
        ]
        if part in self._uncompiled:
            self._to_donate.setdefault(part, []).extend(donated)
        elif part not in self._compiled:
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
                batch.sort(key=self._priority)
            for item in batch:
                if isinstance(item, _Placing):
                    if not item.issued:
                        self._try_place(item)
                elif not item.issued:
                    self._try_issue(item)
                elif not item.has_passed:
                    self._try_take_memory(item)

    def _try_issue(self, task: Task) -> None:
        run, unit = task.run, task.unit
        cells = run.cells
        instruction = unit.instructions[0]
        if isinstance(instruction, ComputeInstruction) and not self._is_next(task):
            return  # looked at again when it is
        failure = self._compiled.get(run.program.part)
        misfit: Failure | None = None
        for slot in unit.reads:
            cell = cells[slot]
            if not cell.scheduled and failure is None:  # type: ignore[union-attr]
                cell.waiters.append(task)  # type: ignore[union-attr]
                return
        if failure is None:
            failure = misfit = self._misfit(task)
        if isinstance(instruction, ComputeInstruction):
            self._try_compute(task, failure)
            return
        task.issued = True
        if isinstance(instruction, ReceiveInstruction):
            self._issue_receive(task, instruction)
            self._try_take_memory(task)
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
            self._try_take_memory(task)

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
        if not self._may_allocate(task):
            return
        if self._needs_grants:
            key = (task.run.part, task.number)
            if key not in self._ungranted:
                self._ungranted[key] = task
                if self._gang != "member":
                    self._commands.append(ReportReady(run=task.run.part, unit=task.number))
            self._issue_granted()
        else:
            self._issue_compute(task)

    def _issue_granted(self) -> None:
        """Issues what is ready at the head of the granted order; a unit that failed here is passed over."""
        while self._granted:
            part, number = key = self._granted[0]
            run = self.runs.get(part)
            is_issued = False
            if run is not None and not run.tasks[number].issued:
                task = self._ungranted.get(key)
                if task is None or (not self._may_allocate(task) and not task.issued):
                    return
                if not task.issued:
                    self._issue_compute(task)
                    is_issued = True
            self._ungranted.pop(key, None)
            self._granted.popleft()
            if self._gang or not is_issued:
                self._commands.append(ReportPassed(run=part, unit=number))

    def _need_grants(self, needed: bool) -> None:
        if self._gang or needed == self._needs_grants:
            return
        self._needs_grants = needed
        if needed:
            self._computing_freely = set(self._computing)
            if not self._computing_freely:
                self._commands.append(ReportIdle())
        else:
            self._computing_freely = set()
            self._granted.clear()
            self._ready.extend(self._ungranted.values())
            self._ungranted.clear()

    def _issue_compute(self, task: Task) -> None:
        task.issued = True
        unit, run = task.unit, task.run
        self._in_flight += 1
        self._computing.add(task)
        reused = self._reused(task)
        taken = unit.need_bytes - sum(cell.nbytes for cell in reused)
        self.used_bytes += taken
        run.own_bytes += taken
        for cell in reused:
            cell.is_charged = False
        outputs = task.cells_of(unit.writes)
        self._commands.append(Execute(task=task, inputs=task.cells_of(unit.reads), outputs=outputs))
        for cell in outputs:
            cell.is_charged = True
            self._schedule(cell)
        for cell in task.cells_of(unit.reads):  # what is issued later runs later: a donation need not wait for it
            self._end_reader(cell)
        self._pass(task)

    def _issue_receive(self, task: Task, instruction: ReceiveInstruction) -> None:
        key = (task.run.run_id, instruction.edge_id)
        arrived = self._arrived.pop(key, None)
        if arrived is not None:
            self._receive(task, arrived)
        elif (sender := task.run.program.routes.senders[instruction.edge_id]) in self._lost_peers:
            self._fail_task(task, self._lost_peers[sender])
        elif owner(task.run.run_id) in self._gone_clients:
            self._fail_task(task, self._client_gone())
        else:
            self._receiving[key] = task

    def _receive(self, task: Task, arrived: TransferArrived) -> None:
        if task.has_ended:
            return
        if arrived.failure is not None:
            self._fail_task(task, arrived.failure)
        else:
            self._fill(task, arrived.data)

    def _fill(self, task: Task, data: Any) -> None:
        """Places a received value, at once or when it has memory."""
        [slot] = task.unit.writes or (None,)
        cell = task.run.cells[slot] if slot is not None else None
        if slot is None or cell is None:  # nobody reads it, or who would has failed already
            self._pass(task)
            self._end_unit(task, None)
            return
        task.arrived = Place(cell=cell, part=task.run.program.part, slot=slot, data=data)
        if task.has_passed:
            self._place_arrived(task)

    def _place_arrived(self, task: Task) -> None:
        assert task.arrived is not None
        self._commands.append(task.arrived)
        self._schedule(task.arrived.cell)
        task.arrived = None
        self._end_unit(task, None)

    def _try_take_memory(self, task: Task) -> None:
        """Sets memory aside for what a task receives, when its turn has come."""
        if not self._is_next(task) or task.has_ended:
            return
        cells: list[Cell | None] = [task.run.cells[slot] for slot in task.unit.writes]
        if any(cells) and not self._may_allocate(task):
            return
        for cell in cells:
            if cell is not None:  # else who would read it has failed already
                self._charge(cell)
        self._pass(task)
        if task.arrived is not None:
            self._place_arrived(task)

    def _reduced(self, event: Reduced) -> None:
        self._in_flight -= 1
        task = event.task
        if task.has_ended:
            return
        for cell in task.cells_of(task.unit.reads):
            self._end_reader(cell)
        if event.failure is not None:
            self._fail_task(task, event.failure, end_readers=False)
        else:
            self._fill(task, event.data)

    def _unit_finished(self, task: Task, failure: Failure | None) -> None:
        self._in_flight -= 1
        unit = task.unit
        if isinstance(unit.instructions[0], SendInstruction):
            for cell in task.cells_of(unit.reads):
                self._end_reader(cell)
        else:
            sizes = task.run.program.slot_bytes
            freed = unit.need_bytes - sum(sizes[slot] for slot in unit.writes)
            self.used_bytes -= freed
            task.run.own_bytes -= freed
            self._computing.discard(task)
            if task in self._computing_freely:
                self._computing_freely.discard(task)
                if not self._computing_freely:
                    self._commands.append(ReportIdle())
            elif self._needs_grants and not self._gang:
                self._commands.append(ReportPassed(run=task.run.part, unit=task.number))
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
        self._pass(task)
        self._end_unit(task, failure)

    def _end_unit(self, task: Task, failure: Failure | None) -> None:
        run, unit = task.run, task.unit
        task.has_ended = True
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
            self._end_run(run)
            self._forget_compilation(run.program.part)
        self._memory_freed()

    def _end_run(self, run: Run) -> None:
        del self.runs[run.part]
        if run.admitted:
            self._promised_bytes -= run.most_unpaid_bytes
        else:
            self._unadmitted.remove(run)
        self._commands.append(ReportEnded(run=run.part, failure=run.failure))

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
            payer = self._payer(cell)
            if payer is not None:
                payer.own_bytes -= cell.nbytes
            self._memory_freed()

    # ---- memory

    def _payer(self, cell: Cell) -> Run | None:
        return self.runs.get(cell.payer) if cell.payer is not None else None

    def _memory_freed(self) -> None:
        """Has looked at what waits for memory."""
        self._admit_runs()
        if self.starved:
            self._ready.extend(self.starved)
            self.starved = []

    def _admit_runs(self) -> None:
        """Admits runs, in their order, while what they may need is left beside what those before may still take."""
        while self._unadmitted:
            run = self._unadmitted[0]
            if self.budget_bytes and self.used_bytes + self._promised_bytes + run.reserved_bytes > self.budget_bytes:
                admitted = [other for other in self.runs.values() if other.admitted]
                kept = sum(other.unpaid_bytes for other in admitted)
                is_alone = all(other.run_id == run.run_id for other in admitted)
                if not is_alone and self.used_bytes + kept + run.reserved_bytes > self.budget_bytes:
                    return
            self._unadmitted.popleft()
            run.admitted = True
            self._promised_bytes += run.most_unpaid_bytes

    def _may_allocate(self, item: Task | _Placing) -> bool:
        """Whether an item fits into the budget; it waits (or fails) otherwise."""
        if not self.budget_bytes or item.need_bytes == 0:
            return True
        need, run = item.need_bytes, self._run_of(item)
        if isinstance(item, Task):
            need -= sum(cell.nbytes for cell in self._reused(item))
        if need > self.budget_bytes:
            self._refuse(item, f"it needs {need:,} bytes a device at once, and the whole budget is")
            return False
        if run is None or run.admitted:
            if self.used_bytes + need + self._promised_bytes <= self.budget_bytes:
                return True  # as most often: nobody need be asked
            kept = sum(other.unpaid_bytes for other in self.runs.values() if other.admitted and other is not run)
            if self.used_bytes + need + kept <= self.budget_bytes:
                return True
        self.starved.append(item)
        return False

    def _run_of(self, item: Task | _Placing) -> Run | None:
        """Returns the run that an item's memory counts for."""
        return item.run if isinstance(item, Task) else self._payer(item.cell)

    def _priority(self, item: Task | _Placing) -> tuple[int, int]:
        run = self._run_of(item)
        return (run.sequence if run is not None else 0, item.unit.position if isinstance(item, Task) else -1)

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
        item = min(self.starved, key=self._priority)
        self.starved.remove(item)
        held = ", ".join(f"client {client}: {size:,} bytes" for client, size in sorted(self.client_bytes().items()))
        self._refuse(
            item,
            f"it waited {seconds:g} s for {item.need_bytes:,} bytes a device while {self.used_bytes:,} were in use "
            f"(arrays that clients hold: {held or 'none'}); drop arrays that you no longer need. The budget is",
        )

    def _try_place(self, item: _Placing) -> None:
        if not self._may_allocate(item):
            return
        item.issued = True
        cell = item.cell
        self._charge(cell)
        self._commands.append(item.command)
        self._schedule(cell)
        if cell.holders == 0:  # released while it was on its way
            cell.holders = 1
            self._let_go(cell)

    def _charge(self, cell: Cell) -> None:
        self.used_bytes += cell.nbytes
        cell.is_charged = True
        payer = self._payer(cell)
        if payer is not None:
            payer.own_bytes += cell.nbytes

    def _put(self, event: BufferPut) -> None:
        cell = self._expected.pop(event.buffer_id, None)
        if cell is None:
            if event.slice_id in self._gone_slices:
                return
            cell = self._named_cell(event.buffer_id)
        cell.awaits_put = False
        cell.form = event.form
        cell.nbytes = event.nbytes
        cell.slice_id = event.slice_id
        self._try_place(_Placing(cell, Place(cell=cell, data=event.data, spec=event.spec)))

    # ---- programs, transfers, fetches, drops

    def _program_compiled(self, event: ProgramCompiled) -> None:
        # A program that was dropped meanwhile may still have runs that wait for this.
        donated = self._to_donate.pop(event.part, [])
        if event.failure is not None:
            self._compiled[event.part] = event.failure
        else:
            self._drop_all_donated(donated)
        self._ready.extend(self._uncompiled.pop(event.part, []))
        self._forget_compilation(event.part)
        self._commands.append(ReportLoaded(part=event.part, failure=event.failure))

    def _transfer_arrived(self, event: TransferArrived) -> None:
        task = self._receiving.pop((event.run_id, event.edge_id), None)
        if task is not None:
            self._receive(task, event)
        elif owner(event.run_id) not in self._gone_clients:
            self._arrived[(event.run_id, event.edge_id)] = event

    def _peer_lost(self, event: PeerLost) -> None:
        self._lost_peers[event.peer] = event.failure
        for key, task in list(self._receiving.items()):
            if task.run.program.routes.senders[key[1]] == event.peer:
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

    def _drop_program(self, part: PartId) -> None:
        self.programs.pop(part, None)
        self._forget_compilation(part)

    def _forget_compilation(self, part: PartId) -> None:
        if part in self._compiled and not self.is_needed(part):
            del self._compiled[part]

    def _drop_slice(self, slice_id: SliceId) -> None:
        """Frees what is on a slice; runs that are in flight on it go on."""
        self._remember(self._gone_slices, slice_id)
        for buffer_id in [buffer_id for buffer_id, cell in self.named.items() if cell.slice_id == slice_id]:
            self._drop(buffer_id, "was on a mesh that is closed")
        for part in [part for part in self.programs if part.slice_id == slice_id]:
            self._drop_program(part)

    def _remember(self, gone: dict[Any, None], key: Any) -> None:
        gone[key] = None
        if len(gone) > self._max_remembered:
            del gone[next(iter(gone))]

    def _drop_client(self, client_id: ClientId) -> None:
        self._remember(self._gone_clients, client_id)
        for buffer_id in [buffer_id for buffer_id in self.named if owner(buffer_id) == client_id]:
            self._drop(buffer_id, "belonged to a client that is gone")
        for part in [part for part in self.programs if owner(part.program_id) == client_id]:
            self._drop_program(part)
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


def _takes_memory(task: Task) -> bool:
    """Whether a task has a turn in its run's order."""
    return bool(task.unit.writes) or isinstance(task.unit.instructions[0], ComputeInstruction)


def _refusal(event: RunEnqueued, program: LoadedProgram) -> str:
    """Returns why a run cannot be, or is none of its client's; empty if all is well."""
    client, arguments = owner(event.run_id), event.arguments
    if arguments is None:
        return "its arguments cannot be read"
    named = [argument for argument in arguments if isinstance(argument, int)]
    named += [event.first_buffer_id + number for _, number in program.results]
    if owner(event.part.program_id) != client or any(owner(identity) != client for identity in named):
        return "it names what belongs to another client"
    if len(arguments) != program.num_args:
        return f"it has {len(arguments)} arguments, and its program takes {program.num_args}"
    return ""


def lowest(failures: Sequence[Failure | None]) -> Failure | None:
    """Returns the failure of the lowest run: of several, that came first."""
    real = [failure for failure in failures if failure is not None]
    return min(real, key=lambda failure: failure.run_id) if real else None
