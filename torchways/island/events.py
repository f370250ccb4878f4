"""The gang scheduler core's events and commands.

Events are facts that the shell (server.py) gives the core (state.py). Commands are the core's answers, in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torchways.errors import Failure
from torchways.ids import BufferId, ClientId, IslandId, PartId, ProgramId, RunId, RunPart, SliceId
from torchways.island.policy import Share


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceAdded:
    """A slice's executors are ready. `client_id` owns it; `share` is what it has of devices, if it asked for one."""

    slice_id: SliceId
    client_id: ClientId
    executor_ids: tuple[str, ...]
    device_indices: tuple[int, ...] = ()
    share: Share | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceClosed:
    """A slice was given back, or its client is gone: no run of it will follow.

    `is_in_order`: its client says so, behind the runs that it has sent.
    """

    slice_id: SliceId
    reason: str
    is_in_order: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorRemoved:
    """An executor is gone; its slices with it."""

    executor_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramRegistered:
    """A client sent a program.

    Attributes:
        parts: opaque, by slice.
        islands: all that it has parts on, or none: this one.
        outline: opaque; what operators are shown of it.
    """

    client_id: ClientId
    program_id: ProgramId
    name: str
    parts: Mapping[SliceId, Any]
    islands: tuple[IslandId, ...] = ()
    outline: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequested:
    """A client asked for a run; `arguments` are opaque, by slice, and take `nbytes` while the run is held.

    `checks_values`: a function that makes NaN or infinity fails.
    """

    client_id: ClientId
    program_id: ProgramId
    run_id: RunId
    first_buffer_id: BufferId
    arguments: Mapping[SliceId, Any]
    nbytes: int = 0
    checks_values: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOrdered:
    """A run that spans islands has its place in their one order."""

    run_id: RunId


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsCancelled:
    """A client does not want what runs would make. `failure` is what it gets in its place."""

    run_ids: Sequence[RunId]
    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePassed:
    """The time that the core wanted to be woken at has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuffersReleased:
    """A client has no reference left."""

    slice_id: SliceId
    buffer_ids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramForgotten:
    """A client will not run a program again."""

    program_id: ProgramId


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientGone:
    """A client's stream ended."""

    client_id: ClientId


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramLoaded:
    """An executor has compiled a program, or could not."""

    executor_id: str
    part: PartId
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """An executor's part of a run is over, on one slice. It computed for `device_seconds`."""

    executor_id: str
    run: RunPart
    failure: Failure | None
    device_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitReady:
    """A computation waits for nothing but its grant; or, with a failure, a host of a gang cannot compute it."""

    executor_id: str
    run: RunPart
    unit: int
    failure: Failure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPassed:
    """A granted computation needs its turn no more: it is in a host's device queues (gang), or it has ended."""

    executor_id: str
    run: RunPart
    unit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorIdle:
    """What an executor computed before it needed grants has ended. `epoch` is that of what told it of the need."""

    executor_id: str
    epoch: int


Event: TypeAlias = (
    SliceAdded
    | UnitReady
    | UnitPassed
    | ExecutorIdle
    | SliceClosed
    | ExecutorRemoved
    | ProgramRegistered
    | RunRequested
    | RunOrdered
    | RunsCancelled
    | TimePassed
    | BuffersReleased
    | ProgramForgotten
    | ClientGone
    | ProgramLoaded
    | RunEnded
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SendLoad:
    """Send a program's part to an executor."""

    executor_id: str
    part_id: PartId
    name: str
    part: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SendEnqueue:
    """Send a run to an executor. With a failure, it is cancelled: that is what its results are.

    `held_for`: what it was held for, for people.
    """

    executor_id: str
    sequence: int
    run: RunRequested
    slice_id: SliceId
    arguments: Any
    failure: Failure | None = None
    held_for: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SendCancel:
    """Have an executor compute no more of a run's part than what is on the devices."""

    executor_id: str
    run: RunPart
    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class AskOrder:
    """Ask for a run's place in the order of all islands, or (`is_withdrawn`) say that it will not run here."""

    run_id: RunId
    client_id: ClientId
    islands: tuple[IslandId, ...]
    is_withdrawn: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SendDrop:
    """Tell an executor to drop buffers, a program, or all of a slice or client."""

    executor_id: str
    buffer_ids: Sequence[int] = ()
    program_id: ProgramId | None = None
    slice_id: SliceId | None = None
    client_id: ClientId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TellLoaded:
    """Tell a client that all executors of the island have compiled its program, or the first failure."""

    client_id: ClientId
    program_id: ProgramId
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TellFinished:
    """Tell a client that the island's part of its run is over."""

    client_id: ClientId
    run_id: RunId
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SendGrant:
    """Let an executor issue a computation. `held_for`: what it waited for, for people."""

    executor_id: str
    run: RunPart
    unit: int
    held_for: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SendRefusal:
    """Have a computation fail on a host of a gang, since another cannot compute it."""

    executor_id: str
    run: RunPart
    unit: int
    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class SendGrantsNeeded:
    """Tell an executor whether its computations wait for grants from here on. `epoch` rises with each change."""

    executor_id: str
    needed: bool
    epoch: int


Command: TypeAlias = (
    SendLoad
    | SendEnqueue
    | SendCancel
    | SendDrop
    | SendGrant
    | SendRefusal
    | SendGrantsNeeded
    | AskOrder
    | TellLoaded
    | TellFinished
)
