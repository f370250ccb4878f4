"""The gang scheduler's core: one order of computations for all devices of an island.

Pure: events in, commands out; no clock, no socket. Every run gets a sequence number of the island and is sent to all
executors that take part before any later run is, so that executors of one slice see one order whatever the order in
which clients' messages arrived elsewhere. The order itself is the policy's (policy.py).

Computations of a slice of several hosts (a gang) are enqueued on the devices only as granted. Every host of the slice
gets its grants in one order; one that shares a device with another slice's is granted when all hosts have enqueued
the other's. So all device queues of the island agree on the order, and no two computations can wait for each other.

What names a slice that is not here fails for who sent it; the slices that are here run their parts. An event that
cannot follow what came before it raises `InternalError` with the history of what it is about. Reports about what was
dropped meanwhile are no errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, assert_never

from torchways.errors import Failure, InternalError
from torchways.ids import BufferId, ClientId, ProgramId, RunId, SliceId
from torchways.island.policy import FirstComeFirstServed, PendingRun

#: Slices that are gone and are remembered, for messages about them.
_MAX_GONE_SLICES = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceAdded:
    """A slice's executors are ready."""

    slice_id: SliceId
    executor_ids: tuple[str, ...]
    device_indices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceRemoved:
    """A slice is gone: released, or an executor of it was lost."""

    slice_id: SliceId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramRegistered:
    """A client sent a program; `parts` are opaque, by slice."""

    client_id: ClientId
    program_id: ProgramId
    name: str
    parts: Mapping[SliceId, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequested:
    """A client asked for a run; `arguments` are opaque, by slice."""

    client_id: ClientId
    program_id: ProgramId
    run_id: RunId
    first_buffer_id: BufferId
    arguments: Mapping[SliceId, Any]


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
    program_id: ProgramId
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """An executor's part of a run is over."""

    executor_id: str
    run_id: RunId
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitReady:
    """The leader of a gang has all that a computation needs."""

    executor_id: str
    run_id: RunId
    unit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitEnqueued:
    """A host has a granted computation in its device queues."""

    executor_id: str
    run_id: RunId
    unit: int


Event: TypeAlias = (
    SliceAdded
    | UnitReady
    | UnitEnqueued
    | SliceRemoved
    | ProgramRegistered
    | RunRequested
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
    program_id: ProgramId
    name: str
    part: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SendEnqueue:
    """Send a run to an executor."""

    executor_id: str
    sequence: int
    run: RunRequested
    arguments: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SendDrop:
    """Tell an executor to drop buffers, a program, or all of a client."""

    executor_id: str
    buffer_ids: Sequence[int] = ()
    program_id: ProgramId | None = None
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
    """Let an executor of a gang enqueue a computation."""

    executor_id: str
    run_id: RunId
    unit: int


Command: TypeAlias = SendLoad | SendEnqueue | SendDrop | SendGrant | TellLoaded | TellFinished


@dataclass(slots=True)
class _GangUnit:
    """A computation of a gang that is ready; `left` are the hosts that have not enqueued it, once it is granted."""

    slice_id: SliceId
    run_id: RunId
    unit: int
    left: set[str]


@dataclass(slots=True)
class _Program:
    client_id: ClientId
    name: str
    slices: tuple[SliceId, ...]
    #: Executors that have not answered yet.
    loading: set[str]
    failure: Failure | None = None


@dataclass(slots=True)
class _Run:
    client_id: ClientId
    sequence: int
    #: Executors whose part is not over.
    running: set[str]
    #: Executors that have reported, in order.
    ended: list[str] = field(default_factory=list)
    failure: Failure | None = None

    def history(self) -> str:
        """What happened to the run, for error messages."""
        return f"enqueued as sequence {self.sequence}, ended on {self.ended}, running on {sorted(self.running)}"


@dataclass(slots=True)
class SchedulerState:
    """See the module's docstring."""

    policy: FirstComeFirstServed = field(default_factory=FirstComeFirstServed)
    max_gone_slices: int = _MAX_GONE_SLICES
    slices: dict[SliceId, tuple[str, ...]] = field(default_factory=dict)
    programs: dict[ProgramId, _Program] = field(default_factory=dict)
    runs: dict[RunId, _Run] = field(default_factory=dict)
    _gone_slices: dict[SliceId, str] = field(default_factory=dict)
    _sequence: int = 0
    _devices: dict[SliceId, frozenset[int]] = field(default_factory=dict)
    _slice_of: dict[str, SliceId] = field(default_factory=dict)
    #: Ready and not granted, oldest first.
    _waiting: list[_GangUnit] = field(default_factory=list)
    #: Granted, and not enqueued by all hosts.
    _granted: dict[tuple[RunId, int, SliceId], _GangUnit] = field(default_factory=dict)

    def handle(self, event: Event) -> list[Command]:
        """Takes an event; returns what to do, in order."""
        match event:
            case RunRequested():
                return self._request(event)
            case RunEnded():
                return self._end(event)
            case BuffersReleased():
                return [
                    SendDrop(executor_id=executor_id, buffer_ids=event.buffer_ids)
                    for executor_id in self.slices.get(event.slice_id, ())
                ]
            case ProgramRegistered():
                return self._register(event)
            case UnitReady():
                return self._unit_ready(event)
            case UnitEnqueued():
                return self._unit_enqueued(event)
            case ProgramLoaded():
                return self._loaded(event.executor_id, event.program_id, event.failure)
            case ProgramForgotten():
                return self._forget(event.program_id)
            case SliceAdded():
                self._add_slice(event)
                return []
            case SliceRemoved():
                return self._remove_slice(event)
            case ClientGone():
                return self._drop_client(event.client_id)
            case _:
                assert_never(event)

    def _add_slice(self, event: SliceAdded) -> None:
        if event.slice_id in self.slices:
            raise InternalError(f"slice {event.slice_id} was added twice; it has {self.slices[event.slice_id]}")
        if event.slice_id in self._gone_slices:
            reason = self._gone_slices[event.slice_id]
            raise InternalError(f"slice {event.slice_id} was added again after it was removed: {reason}")
        self.slices[event.slice_id] = event.executor_ids
        self._devices[event.slice_id] = frozenset(event.device_indices)
        self._slice_of.update(dict.fromkeys(event.executor_ids, event.slice_id))

    def _register(self, event: ProgramRegistered) -> list[Command]:
        if event.program_id in self.programs:
            known = self.programs[event.program_id]
            raise InternalError(
                f"program {event.program_id} ({event.name}) was registered twice; it was registered as {known.name} by "
                f"client {known.client_id}, {len(known.loading)} executors still load it"
            )
        failure = self._missing(event.parts)
        executors = [(e, part) for s, part in event.parts.items() for e in self.slices.get(s, ())]
        self.programs[event.program_id] = _Program(
            event.client_id, event.name, tuple(event.parts), {executor_id for executor_id, _ in executors}, failure
        )
        if not executors:
            return [TellLoaded(client_id=event.client_id, program_id=event.program_id, failure=failure)]
        return [
            SendLoad(executor_id=executor_id, program_id=event.program_id, name=event.name, part=part)
            for executor_id, part in executors
        ]

    def _loaded(self, executor_id: str, program_id: ProgramId, failure: Failure | None) -> list[Command]:
        program = self.programs.get(program_id)
        if program is None or executor_id not in program.loading:
            return []
        program.loading.discard(executor_id)
        program.failure = program.failure or failure
        if program.loading:
            return []
        return [TellLoaded(client_id=program.client_id, program_id=program_id, failure=program.failure)]

    def _request(self, event: RunRequested) -> list[Command]:
        if event.run_id in self.runs:
            raise InternalError(f"run {event.run_id} was requested twice; {self.runs[event.run_id].history()}")
        self.policy.add(PendingRun(client_id=event.client_id, request=event))
        commands: list[Command] = []
        while (pending := self.policy.next()) is not None:
            commands += self._enqueue(pending.request)
        return commands

    def _enqueue(self, request: RunRequested) -> list[Command]:
        if request.program_id not in self.programs:
            raise InternalError(f"run {request.run_id} names program {request.program_id}, which is not registered")
        # Slices that are left run their parts all the same: what they wait for from those that are gone fails there,
        # and poisons what depends on it. Were the run dropped, they would wait for its results for ever.
        failure = self._missing(request.arguments)
        targets = [(e, arguments) for s, arguments in request.arguments.items() for e in self.slices.get(s, ())]
        if not targets:
            return [TellFinished(client_id=request.client_id, run_id=request.run_id, failure=failure)]
        self._sequence += 1
        executors = {executor_id for executor_id, _ in targets}
        self.runs[request.run_id] = _Run(request.client_id, self._sequence, executors, failure=failure)
        return [
            SendEnqueue(executor_id=executor_id, sequence=self._sequence, run=request, arguments=arguments)
            for executor_id, arguments in targets
        ]

    def _end(self, event: RunEnded) -> list[Command]:
        run = self.runs.get(event.run_id)
        if run is None:
            return []  # its client is gone
        if event.executor_id not in run.running:
            raise InternalError(f"run {event.run_id} ended on {event.executor_id}, not running it; {run.history()}")
        return self._end_part(run, event.executor_id, event.run_id, event.failure)

    def _end_part(self, run: _Run, executor_id: str, run_id: RunId, failure: Failure | None) -> list[Command]:
        run.running.discard(executor_id)
        run.ended.append(executor_id)
        if failure is not None and (run.failure is None or _cause(failure, run_id) < _cause(run.failure, run_id)):
            run.failure = failure
        if run.running:
            return []
        del self.runs[run_id]
        return [TellFinished(client_id=run.client_id, run_id=run_id, failure=run.failure)]

    def _forget(self, program_id: ProgramId) -> list[Command]:
        program = self.programs.pop(program_id, None)
        slices = program.slices if program is not None else ()
        return [SendDrop(executor_id=e, program_id=program_id) for s in slices for e in self.slices.get(s, ())]

    def _unit_ready(self, event: UnitReady) -> list[Command]:
        slice_id = self._slice_of.get(event.executor_id)
        if slice_id is None:
            return []  # its slice is gone
        self._waiting.append(_GangUnit(slice_id, event.run_id, event.unit, set(self.slices[slice_id])))
        return self._grant()

    def _unit_enqueued(self, event: UnitEnqueued) -> list[Command]:
        slice_id = self._slice_of.get(event.executor_id)
        if slice_id is None:
            return []
        key = (event.run_id, event.unit, slice_id)
        item = self._granted.get(key)
        if item is None or event.executor_id not in item.left:
            raise InternalError(
                f"executor {event.executor_id} enqueued unit {event.unit} of run {event.run_id}, "
                f"which was not granted to it"
            )
        item.left.discard(event.executor_id)
        if item.left:
            return []
        del self._granted[key]
        return self._grant()

    def _grant(self) -> list[Command]:
        """Grants all that no other slice's computation, granted or older, is in the way of."""
        commands: list[Command] = []
        waiting: list[_GangUnit] = []
        taken = {item.slice_id for item in self._granted.values()}
        for item in self._waiting:
            mine = self._devices[item.slice_id]
            if any(other != item.slice_id and self._devices[other] & mine for other in taken):
                waiting.append(item)
            else:
                self._granted[item.run_id, item.unit, item.slice_id] = item
                commands += [
                    SendGrant(executor_id=executor_id, run_id=item.run_id, unit=item.unit)
                    for executor_id in self.slices[item.slice_id]
                ]
            taken.add(item.slice_id)
        self._waiting = waiting
        return commands

    def _forget_gang(self, slice_id: SliceId) -> None:
        self._waiting = [item for item in self._waiting if item.slice_id != slice_id]
        self._granted = {key: item for key, item in self._granted.items() if item.slice_id != slice_id}
        self._devices.pop(slice_id, None)
        for executor_id in [key for key, value in self._slice_of.items() if value == slice_id]:
            del self._slice_of[executor_id]

    def _remove_slice(self, event: SliceRemoved) -> list[Command]:
        commands: list[Command] = []
        self._forget_gang(event.slice_id)
        self._gone_slices[event.slice_id] = event.reason
        if len(self._gone_slices) > self.max_gone_slices:
            del self._gone_slices[next(iter(self._gone_slices))]
        for executor_id in self.slices.pop(event.slice_id, ()):
            failure = Failure(kind="ExecutorLost", message=f"executor {executor_id} is lost: {event.reason}")
            for program_id in list(self.programs):
                commands += self._loaded(executor_id, program_id, failure)
            for run_id, run in list(self.runs.items()):
                if executor_id in run.running:
                    commands += self._end_part(run, executor_id, run_id, failure)
        return [*commands, *self._grant()]

    def _drop_client(self, client_id: ClientId) -> list[Command]:
        self.policy.drop_client(client_id)
        for program_id in [key for key, program in self.programs.items() if program.client_id == client_id]:
            del self.programs[program_id]
        for run_id in [key for key, run in self.runs.items() if run.client_id == client_id]:
            del self.runs[run_id]
        executors = [executor_id for members in self.slices.values() for executor_id in members]
        return [SendDrop(executor_id=executor_id, client_id=client_id) for executor_id in executors]

    def _missing(self, slices: Mapping[SliceId, Any]) -> Failure | None:
        if not slices:
            return Failure(kind="InternalError", message="a program's part on an island must have a slice")
        for slice_id in slices:
            if slice_id not in self.slices:
                reason = self._gone_slices.get(slice_id, "it was never added")
                kind = "ExecutorLost" if slice_id in self._gone_slices else "InternalError"
                return Failure(kind=kind, message=f"slice {slice_id} is not on this island: {reason}")
        return None


def _cause(failure: Failure, run_id: RunId) -> int:
    """Returns the run in which a failure of run `run_id` began: this one, unless it is inherited from an earlier."""
    return failure.run_id or run_id
