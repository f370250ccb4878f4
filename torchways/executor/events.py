"""The executor core's events and commands.

Events are facts that the shell (engine.py) gives the core (state.py). Commands are the core's answers, in the order in
which the shell carries them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torchways.errors import Failure
from torchways.executor.plan import LoadedProgram
from torchways.executor.runs import Cell, Task
from torchways.ids import BufferId, ClientId, PartId, ProgramId, RunId, RunPart, SliceId
from torchways.ir.part import AllReduceInstruction, Arguments, SendInstruction


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
    """The scheduler ordered a run. `arguments` is None if what the client sent cannot be read.

    `cancelled`: its client does not want it any more; its results are this failure. `checks_values`: a function that
    makes NaN or infinity fails. `time_ns`: when this was.
    """

    part: PartId
    run_id: RunId
    sequence: int
    first_buffer_id: BufferId
    arguments: Arguments[Any] | None
    cancelled: Failure | None = None
    checks_values: bool = False
    time_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCancelled:
    """A client does not want a run any more that is here; what is not issued of it is this failure."""

    run: RunPart
    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitGranted:
    """The scheduler lets a unit be issued. `held_for`: what it waited for, for people; "": for nothing."""

    run: RunPart
    unit: int
    held_for: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRefused:
    """A unit will not be granted, since a host of the gang cannot compute it: it fails on all."""

    run: RunPart
    unit: int
    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantsNeeded:
    """Whether another executor has devices of this one, so that computations wait for grants.

    `epoch` rises with each change.
    """

    needed: bool
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferPut:
    """The controller's value for a named buffer has come, for `spec`'s place on the devices.

    `for_run`: a run takes it, and it has no place before that run. `time_ns`: when it came.
    """

    buffer_id: BufferId
    data: Any
    spec: Any
    nbytes: int
    slice_id: SliceId
    form: str = ""
    for_run: bool = False
    time_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFinished:
    """A unit has ended: its computations on all devices, its sends, or (reductions) its value's exchange."""

    task: Task
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferArrived:
    """A peer sent a value (host data), or the failure that it would have had."""

    peer: str
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
    """The link to a peer broke: nothing more will come of the runs that are here."""

    peer: str
    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerReopened:
    """The link to a peer is there again. Nothing will come of runs up to `newest` of each client: it has lost them."""

    peer: str
    newest: Mapping[ClientId, RunId]
    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRequested:
    """The controller reads a buffer."""

    fetch_id: int
    buffer_id: BufferId


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchCancelled:
    """The controller reads a buffer no more; it may have been delivered already."""

    fetch_id: int


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
    """For `seconds`, something has waited for memory at any time."""

    seconds: float
    time_ns: int = 0


Event: TypeAlias = (
    ProgramArrived
    | ProgramCompiled
    | RunEnqueued
    | RunCancelled
    | UnitGranted
    | UnitRefused
    | GrantsNeeded
    | BufferPut
    | UnitFinished
    | TransferArrived
    | Reduced
    | PeerLost
    | PeerReopened
    | FetchRequested
    | FetchCancelled
    | FetchEnded
    | BuffersDropped
    | ProgramDropped
    | SliceDropped
    | ClientDropped
    | MemoryStalled
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload:
    """Forget a program's part: it was dropped, and its last run is over."""

    part: PartId


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
    """Tell the scheduler that a run is over, and the time that it had the devices."""

    run: RunPart
    failure: Failure | None
    device_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportReady:
    """Tell the scheduler that a unit waits for nothing but its grant; or, in a gang, that it has failed.

    `inputs`: in a gang, the cells that it reads. If one is poisoned when its turn comes, tell that it has failed in
    place of that it is ready, and answer with UnitRefused.
    """

    run: RunPart
    unit: int
    inputs: Sequence[Cell] = ()
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportPassed:
    """Tell the scheduler that a granted unit needs its turn no more.

    It is in the queues of devices that keep their order; or it has ended, on devices that do not.
    """

    run: RunPart
    unit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportIdle:
    """Tell the scheduler that what was issued before grants were needed, in `epoch`, has ended."""

    epoch: int


Command: TypeAlias = (
    Compile
    | Unload
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
