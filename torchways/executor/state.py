"""The executor's core: which instruction can run, what it waits for, and what a failure poisons.

Pure: events go in, commands come out; no clock, no socket, no device. Device buffers are opaque objects here: a buffer
is freed when nothing refers to its cell any more.

A run is a set of instructions over cells. An instruction is issued when all cells that it reads are filled; those
that become ready together are issued in (sequence, position) order. A computation counts as filling its outputs once
it is *enqueued* on the device: what reads them can be enqueued behind it, long before it ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, assert_never

from torchways.errors import Failure
from torchways.ids import BufferId, ClientId, ProgramId, RunId, owner

#: Ids of dropped buffers that are remembered, to tell "gone" from "not there yet".
_MAX_REMEMBERED = 200_000


# ---- programs


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeInstruction:
    """Run a compiled function: slots in, slots out; `donated` are positions in `inputs`."""

    function_index: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    donated: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SendInstruction:
    """Send a slot to a peer."""

    slot: int
    edge_id: int
    peer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveInstruction:
    """Fill a slot with what a peer sends."""

    slot: int
    edge_id: int
    peer: str


Instruction: TypeAlias = ComputeInstruction | SendInstruction | ReceiveInstruction


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedProgram:
    """A program's part on this executor's slice.

    Attributes:
        program_id, name: the program's.
        num_slots: values that it sees; the first `num_args` are bound by each run.
        instructions: in program order.
        results: (slot, result number) pairs.
        function_names, function_sources: for failures.
    """

    program_id: ProgramId
    name: str
    num_slots: int
    num_args: int
    instructions: tuple[Instruction, ...]
    results: tuple[tuple[int, int], ...]
    function_names: tuple[str, ...] = ()
    function_sources: tuple[str, ...] = ()


@dataclass(eq=False, slots=True)
class Cell:
    """One logical buffer: empty, filled or poisoned.

    Attributes:
        buffer: the device buffer, once filled.
        failure: why it will never be filled.
        reads: registered reads that are not over; a donation waits until its own is the last.
        waiters: instructions to look at again when something changes.
        fetches: reads of the controller that wait for it.
    """

    buffer: Any = None
    failure: Failure | None = None
    reads: int = 0
    waiters: list[_Step] = field(default_factory=list)
    fetches: list[int] = field(default_factory=list)

    @property
    def is_settled(self) -> bool:
        """Filled or poisoned."""
        return self.buffer is not None or self.failure is not None


@dataclass(eq=False, slots=True)
class Run:
    """One run of a program's part."""

    program: LoadedProgram
    run_id: RunId
    sequence: int
    cells: list[Cell | None]
    steps_left: int = 0
    #: Reads of each slot that are not over; at zero the run forgets the cell.
    reads_left: list[int] = field(default_factory=list)
    failure: Failure | None = None


@dataclass(eq=False, slots=True)
class _Step:
    """One instruction of one run."""

    run: Run
    position: int
    issued: bool = False

    @property
    def instruction(self) -> Instruction:
        return self.run.program.instructions[self.position]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnqueued:
    """The scheduler ordered a run. `arguments` are buffer ids, or host values (anything that is not an int)."""

    program_id: ProgramId
    run_id: RunId
    sequence: int
    first_buffer_id: BufferId
    arguments: Sequence[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferPut:
    """The controller's value for a named buffer is on the device."""

    buffer_id: BufferId
    buffer: Any
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CellFilled:
    """A `Place` command ended."""

    cell: Cell
    buffer: Any
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputationEnqueued:
    """An `Execute` command was carried out: its outputs exist, though they may not be computed yet."""

    step: _Step
    outputs: Sequence[Any]
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputationFinished:
    """A computation has ended on all devices."""

    step: _Step


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSent:
    """A `Send` command ended; the device buffer is no longer read."""

    step: _Step
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferArrived:
    """A peer sent a value (host data), or the failure that it would have had."""

    run_id: RunId
    edge_id: int
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

    fetch_id: int
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


Event: TypeAlias = (
    ProgramArrived
    | ProgramCompiled
    | RunEnqueued
    | BufferPut
    | CellFilled
    | ComputationEnqueued
    | ComputationFinished
    | TransferSent
    | TransferArrived
    | PeerLost
    | FetchRequested
    | FetchEnded
    | BuffersDropped
    | ProgramDropped
    | ClientDropped
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compile:
    """Compile a program's functions; answer with ProgramCompiled."""

    program_id: ProgramId


@dataclass(frozen=True, slots=True, kw_only=True)
class Execute:
    """Enqueue a computation; answer with ComputationEnqueued, later ComputationFinished."""

    step: _Step
    program_id: ProgramId
    function_index: int
    inputs: Sequence[Any]
    donates: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Copy a host value to the device as slot `slot` of a program; answer with CellFilled."""

    cell: Cell
    program_id: ProgramId
    slot: int
    data: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send a value, or a failure in its place; answer with TransferSent."""

    step: _Step
    peer: str
    run_id: RunId
    edge_id: int
    buffer: Any
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliver:
    """Answer a fetch with a cell that is settled; answer with FetchEnded."""

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


Command: TypeAlias = Compile | Execute | Place | Send | Deliver | ReportLoaded | ReportEnded


class ExecutorState:
    """See the module's docstring."""

    def __init__(self, executor_id: str) -> None:
        self._executor_id = executor_id
        #: Buffers that the controller can name.
        self.named: dict[BufferId, Cell] = {}
        self.programs: dict[ProgramId, LoadedProgram] = {}
        #: Runs that are not over.
        self.runs: dict[RunId, Run] = {}
        self._compiled: dict[ProgramId, Failure | None] = {}
        #: Steps whose program is still being compiled.
        self._uncompiled: dict[ProgramId, list[_Step]] = {}
        self._arrived: dict[tuple[RunId, int], TransferArrived] = {}
        self._receiving: dict[tuple[RunId, int], _Step] = {}
        #: Cells that have no name any more, but whose value a Put still brings.
        self._expected: dict[BufferId, Cell] = {}
        self._lost_peers: dict[str, Failure] = {}
        self._gone: dict[BufferId, str] = {}
        self._gone_order: deque[BufferId] = deque()
        self._commands: list[Command] = []
        self._ready: list[_Step] = []

    def handle(self, event: Event) -> list[Command]:
        """Takes an event; returns what to do."""
        match event:
            case RunEnqueued():
                self._enqueue(event)
            case ComputationEnqueued():
                self._computation_enqueued(event)
            case ComputationFinished():
                self._end_step(event.step)
            case CellFilled():
                self._settle(event.cell, event.buffer, event.failure)
            case TransferSent():
                self._transfer_sent(event)
            case TransferArrived():
                self._transfer_arrived(event)
            case FetchRequested():
                self._fetch(event)
            case FetchEnded():
                self._end_read(event.cell)
            case BufferPut():
                cell = self._expected.pop(event.buffer_id, None) or self._named_cell(event.buffer_id)
                self._settle(cell, event.buffer, event.failure)
            case BuffersDropped():
                for buffer_id in event.buffer_ids:
                    self._drop(buffer_id, "was released")
            case ProgramArrived():
                self.programs[event.program.program_id] = event.program
                self._uncompiled[event.program.program_id] = []
                self._commands.append(Compile(program_id=event.program.program_id))
            case ProgramCompiled():
                self._program_compiled(event)
            case PeerLost():
                self._peer_lost(event)
            case ProgramDropped():
                self._drop_program(event.program_id)
            case ClientDropped():
                self._drop_client(event.client_id)
            case _:
                assert_never(event)
        self._issue_ready()
        commands, self._commands = self._commands, []
        return commands

    def is_needed(self, program_id: ProgramId) -> bool:
        """Whether runs of a program are in flight, or may come."""
        return program_id in self.programs or any(run.program.program_id == program_id for run in self.runs.values())

    def waiting_for(self) -> list[str]:
        """Returns, for people, what each run in flight waits for."""
        lines = []
        for run in self.runs.values():
            if run.program.program_id in self._uncompiled:
                lines.append(f"run {run.run_id} of {run.program.name}: its compilation")
                continue
            empty = [slot for slot, cell in enumerate(run.cells) if cell is not None and not cell.is_settled]
            receives = [
                f"edge {edge} from {step.instruction.peer}"  # type: ignore[union-attr]
                for (run_id, edge), step in self._receiving.items()
                if run_id == run.run_id
            ]
            lines.append(
                f"run {run.run_id} of {run.program.name}: {run.steps_left} instructions left; empty slots {empty[:8]}; "
                f"receives {receives[:8]}"
            )
        return lines

    # ---- runs

    def _enqueue(self, event: RunEnqueued) -> None:
        program = self.programs.get(event.program_id)
        if program is None:
            failure = self._failure("InternalError", f"run {event.run_id} names program {event.program_id}: not loaded")
            self._commands.append(ReportEnded(run_id=event.run_id, failure=failure))
            return
        cells: list[Cell | None] = [Cell() for _ in range(program.num_slots)]
        run = Run(program, event.run_id, event.sequence, cells)
        for slot, argument in enumerate(event.arguments):
            if isinstance(argument, int):
                cells[slot] = self._named_cell(BufferId(argument))
            else:
                cell = cells[slot]
                assert cell is not None
                self._commands.append(Place(cell=cell, program_id=program.program_id, slot=slot, data=argument))
        for slot, number in program.results:
            result = cells[slot]
            assert result is not None
            self._name(BufferId(event.first_buffer_id + number), result)
        self._start(run, event)

    def _name(self, buffer_id: BufferId, cell: Cell) -> None:
        early = self.named.get(buffer_id)
        if early is not None:  # fetches that overtook the run wait for it already
            cell.fetches += early.fetches
            cell.reads += early.reads
        self.named[buffer_id] = cell

    def _start(self, run: Run, event: RunEnqueued) -> None:
        program = run.program
        run.reads_left = [0] * program.num_slots
        steps = [_Step(run, position) for position in range(len(program.instructions))]
        run.steps_left = len(steps)
        for step in steps:
            for slot in _reads(step.instruction):
                run.reads_left[slot] += 1
                cell = run.cells[slot]
                assert cell is not None
                cell.reads += 1
        for slot in range(program.num_slots):
            if run.reads_left[slot] == 0 and slot < program.num_args:
                run.cells[slot] = None
        for step in steps:
            instruction = step.instruction
            if isinstance(instruction, ComputeInstruction):
                for position in instruction.donated:
                    slot = instruction.inputs[position]
                    if slot < program.num_args and isinstance(event.arguments[slot], int):
                        self._drop(BufferId(event.arguments[slot]), "was donated to a later computation")
        if not steps:
            self._commands.append(ReportEnded(run_id=run.run_id, failure=None))
            return
        self.runs[run.run_id] = run
        if program.program_id in self._uncompiled:
            self._uncompiled[program.program_id].extend(steps)
        else:
            self._ready.extend(steps)

    def _issue_ready(self) -> None:
        """Issues every step that can be; a poisoned one poisons what it fills, at once."""
        while self._ready:
            batch, self._ready = self._ready, []
            batch.sort(key=lambda step: (step.run.sequence, step.position))
            for step in batch:
                if not step.issued:
                    self._try_issue(step)

    def _try_issue(self, step: _Step) -> None:
        run, instruction = step.run, step.instruction
        failure = self._compiled.get(run.program.program_id)
        cells: list[Cell] = []
        for slot in _reads(instruction):
            cell = run.cells[slot]
            assert cell is not None
            if not cell.is_settled and failure is None:
                cell.waiters.append(step)
                return
            cells.append(cell)
        failure = failure or _lowest([cell.failure for cell in cells])
        match instruction:
            case ComputeInstruction():
                self._issue_compute(step, instruction, cells, failure)
            case SendInstruction():
                step.issued = True
                self._commands.append(
                    Send(
                        step=step,
                        peer=instruction.peer,
                        run_id=run.run_id,
                        edge_id=instruction.edge_id,
                        buffer=cells[0].buffer,
                        failure=failure,
                    )
                )
            case ReceiveInstruction():
                self._issue_receive(step, instruction)

    def _issue_compute(
        self, step: _Step, instruction: ComputeInstruction, cells: list[Cell], failure: Failure | None
    ) -> None:
        if failure is not None:
            step.issued = True
            self._fail_step(step, failure)
            return
        for position in instruction.donated:
            if cells[position].reads > 1:  # somebody still reads what this would overwrite
                cells[position].waiters.append(step)
                return
        step.issued = True
        self._commands.append(
            Execute(
                step=step,
                program_id=step.run.program.program_id,
                function_index=instruction.function_index,
                inputs=[cell.buffer for cell in cells],
                donates=bool(instruction.donated),
            )
        )

    def _issue_receive(self, step: _Step, instruction: ReceiveInstruction) -> None:
        step.issued = True
        key = (step.run.run_id, instruction.edge_id)
        arrived = self._arrived.pop(key, None)
        if arrived is not None:
            self._receive(step, arrived)
        elif instruction.peer in self._lost_peers:
            self._fail_step(step, self._lost_peers[instruction.peer])
        else:
            self._receiving[key] = step

    def _receive(self, step: _Step, arrived: TransferArrived) -> None:
        if arrived.failure is not None:
            self._fail_step(step, arrived.failure)
            return
        instruction = step.instruction
        assert isinstance(instruction, ReceiveInstruction)
        cell = step.run.cells[instruction.slot]
        if cell is None:  # all that would read it has failed already
            self._end_step(step)
            return
        program_id = step.run.program.program_id
        self._commands.append(Place(cell=cell, program_id=program_id, slot=instruction.slot, data=arrived.data))
        self._end_step(step)

    def _computation_enqueued(self, event: ComputationEnqueued) -> None:
        step, instruction = event.step, event.step.instruction
        assert isinstance(instruction, ComputeInstruction)
        if event.failure is not None:
            self._fail_step(step, event.failure)
            return
        for slot, buffer in zip(instruction.outputs, event.outputs, strict=True):
            cell = step.run.cells[slot]
            assert cell is not None
            self._settle(cell, buffer, None)
            if step.run.reads_left[slot] == 0:
                step.run.cells[slot] = None
        self._end_reads(step)

    def _transfer_sent(self, event: TransferSent) -> None:
        self._end_reads(event.step)
        if event.failure is not None and event.step.run.failure is None:
            event.step.run.failure = event.failure
        self._end_step(event.step)

    def _fail_step(self, step: _Step, failure: Failure) -> None:
        """Poisons what a step would have filled, and ends it."""
        run = step.run
        run.failure = _lowest([run.failure, failure])
        for slot in _writes(step.instruction):
            cell = run.cells[slot]
            if cell is not None:  # else all that would read it has failed already
                self._settle(cell, None, failure)
        self._end_reads(step)
        self._end_step(step)

    def _settle(self, cell: Cell, buffer: Any, failure: Failure | None) -> None:
        if cell.is_settled:
            return
        cell.buffer, cell.failure = buffer, failure
        waiters, cell.waiters = cell.waiters, []
        self._ready.extend(waiters)
        fetches, cell.fetches = cell.fetches, []
        for fetch_id in fetches:
            self._commands.append(Deliver(fetch_id=fetch_id, cell=cell))

    def _end_reads(self, step: _Step) -> None:
        run = step.run
        for slot in _reads(step.instruction):
            cell = run.cells[slot]
            assert cell is not None
            run.reads_left[slot] -= 1
            if run.reads_left[slot] == 0:
                run.cells[slot] = None
            self._end_read(cell)

    def _end_read(self, cell: Cell) -> None:
        cell.reads -= 1
        if cell.waiters and cell.is_settled:  # a donation may have waited for this
            waiters, cell.waiters = cell.waiters, []
            self._ready.extend(waiters)

    def _end_step(self, step: _Step) -> None:
        run = step.run
        run.steps_left -= 1
        if run.steps_left == 0:
            del self.runs[run.run_id]
            self._commands.append(ReportEnded(run_id=run.run_id, failure=run.failure))

    # ---- programs, transfers, fetches, drops

    def _program_compiled(self, event: ProgramCompiled) -> None:
        # A program that was dropped meanwhile may still have runs that wait for this.
        if event.program_id in self.programs or event.failure is not None:
            self._compiled[event.program_id] = event.failure
        self._ready.extend(self._uncompiled.pop(event.program_id, []))
        self._commands.append(ReportLoaded(program_id=event.program_id, failure=event.failure))

    def _transfer_arrived(self, event: TransferArrived) -> None:
        step = self._receiving.pop((event.run_id, event.edge_id), None)
        if step is None:
            self._arrived[(event.run_id, event.edge_id)] = event
        else:
            self._receive(step, event)

    def _peer_lost(self, event: PeerLost) -> None:
        self._lost_peers[event.peer] = event.failure
        for key, step in list(self._receiving.items()):
            if step.instruction.peer == event.peer:  # type: ignore[union-attr]
                del self._receiving[key]
                self._fail_step(step, event.failure)

    def _fetch(self, event: FetchRequested) -> None:
        if event.buffer_id in self._gone:
            cell = Cell(
                failure=self._failure(
                    "UserError",
                    f"the array's buffer {self._gone[event.buffer_id]}; read an array before the program that "
                    "replaces it runs, or keep what the program returns",
                )
            )
        else:
            cell = self._named_cell(event.buffer_id)
        cell.reads += 1
        if cell.is_settled:
            self._commands.append(Deliver(fetch_id=event.fetch_id, cell=cell))
        else:
            cell.fetches.append(event.fetch_id)

    def _named_cell(self, buffer_id: BufferId) -> Cell:
        cell = self.named.get(buffer_id)
        if cell is None:
            if buffer_id in self._gone:
                reason = f"a program reads a buffer that {self._gone[buffer_id]}"
                return Cell(failure=self._failure("UserError", reason))
            cell = self.named[buffer_id] = Cell()
        return cell

    def _drop(self, buffer_id: BufferId, reason: str) -> None:
        cell = self.named.pop(buffer_id, None)
        if cell is not None and not cell.is_settled and (cell.reads or cell.waiters):
            self._expected[buffer_id] = cell  # a run reads it, but its value is still on the way
        self._gone[buffer_id] = reason
        self._gone_order.append(buffer_id)
        if len(self._gone_order) > _MAX_REMEMBERED:
            self._gone.pop(self._gone_order.popleft(), None)

    def _drop_program(self, program_id: ProgramId) -> None:
        self.programs.pop(program_id, None)
        self._compiled.pop(program_id, None)

    def _drop_client(self, client_id: ClientId) -> None:
        for buffer_id in [buffer_id for buffer_id in self.named if owner(buffer_id) == client_id]:
            self._drop(buffer_id, "belonged to a client that is gone")
        for program_id in [program_id for program_id in self.programs if owner(program_id) == client_id]:
            self._drop_program(program_id)
        for key in [key for key in self._arrived if owner(key[0]) == client_id]:
            del self._arrived[key]
        gone = self._failure("SessionClosed", "the client is gone")
        for key, step in list(self._receiving.items()):
            if owner(key[0]) == client_id:
                del self._receiving[key]
                self._fail_step(step, gone)

    def _failure(self, kind: str, message: str) -> Failure:
        return Failure(kind=kind, message=message, process=f"executor {self._executor_id}")


def _reads(instruction: Instruction) -> tuple[int, ...]:
    match instruction:
        case ComputeInstruction():
            return instruction.inputs
        case SendInstruction():
            return (instruction.slot,)
        case ReceiveInstruction():
            return ()


def _writes(instruction: Instruction) -> tuple[int, ...]:
    match instruction:
        case ComputeInstruction():
            return instruction.outputs
        case SendInstruction():
            return ()
        case ReceiveInstruction():
            return (instruction.slot,)


def _lowest(failures: Sequence[Failure | None]) -> Failure | None:
    """Returns the failure of the lowest run: of several, that came first."""
    real = [failure for failure in failures if failure is not None]
    return min(real, key=lambda failure: failure.run_id) if real else None
