"""The gang scheduler's core: one order of computations for all devices of an island.

Pure: events in, commands out; no clock, no socket. Every run gets a sequence number of the island and is sent to all
executors that take part before any later run is, so that executors of one slice see one order whatever the order in
which clients' messages arrived elsewhere. The order itself is the policy's (policy.py).

Executors belong to sets of devices, one on each host of a set; slices of the same devices share them. Computations of
a set of several hosts (a gang) are enqueued on the devices only as granted. Every host gets its grants in one order;
one that shares a device with another set's is granted when all hosts have enqueued the other's. So all device queues
of the island agree on the order, and no two computations can wait for each other. Where two sets of one host each
share a device, they compute as granted too, while both have slices: one at a time, each until it has ended.

What names a slice that is not here fails for who sent it; the slices that are here run their parts. An event that
cannot follow what came before it raises `InternalError` with the history of what it is about. Reports about what was
dropped meanwhile are no errors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, assert_never

from torchways.errors import Failure, InternalError
from torchways.ids import BufferId, ClientId, PartId, ProgramId, RunId, RunPart, SliceId
from torchways.island.policy import FirstComeFirstServed, PendingRun

#: Slices that are gone and are remembered, for messages about them.
_MAX_GONE_SLICES = 1_000
#: Runs of a client that may be in flight on an island. Controllers keep far below (`Session.max_runs_in_flight`).
_MAX_RUNS_OF_CLIENT = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceAdded:
    """A slice's executors are ready. `client_id` owns it."""

    slice_id: SliceId
    client_id: ClientId
    executor_ids: tuple[str, ...]
    device_indices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceClosed:
    """A slice was given back, or its client is gone: no run of it will follow."""

    slice_id: SliceId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorRemoved:
    """An executor is gone; its slices with it."""

    executor_id: str
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
    part: PartId
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """An executor's part of a run is over, on one slice."""

    executor_id: str
    run: RunPart
    failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitReady:
    """The leader of a gang, or an executor alone, has all that a computation needs."""

    executor_id: str
    run: RunPart
    unit: int


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
    """Send a run to an executor."""

    executor_id: str
    sequence: int
    run: RunRequested
    slice_id: SliceId
    arguments: Any


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
    """Let an executor issue a computation."""

    executor_id: str
    run: RunPart
    unit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SendGrantsNeeded:
    """Tell an executor whether its computations wait for grants from here on. `epoch` rises with each change."""

    executor_id: str
    needed: bool
    epoch: int


Command: TypeAlias = SendLoad | SendEnqueue | SendDrop | SendGrant | SendGrantsNeeded | TellLoaded | TellFinished


#: Its executors, one a host.
_DeviceSet: TypeAlias = tuple[str, ...]


@dataclass(slots=True)
class _Turn:
    """A computation that waits for its turn on devices, or has it; `left` are the hosts that have not passed it."""

    devices: _DeviceSet
    run: RunPart
    unit: int
    left: set[str]


@dataclass(slots=True)
class _Program:
    client_id: ClientId
    name: str
    slices: tuple[SliceId, ...]
    #: Executors that have not answered yet, with the slice.
    loading: set[tuple[str, SliceId]]
    failure: Failure | None = None


@dataclass(slots=True)
class _Run:
    client_id: ClientId
    sequence: int
    #: Executors whose part is not over, with the slice.
    running: set[tuple[str, SliceId]]
    #: Those that have reported, in order.
    ended: list[tuple[str, SliceId]] = field(default_factory=list)
    failure: Failure | None = None

    def history(self) -> str:
        """What happened to the run, for error messages."""
        return f"enqueued as sequence {self.sequence}, ended on {self.ended}, running on {sorted(self.running)}"


@dataclass(slots=True)
class SchedulerState:
    """See the module's docstring."""

    policy: FirstComeFirstServed = field(default_factory=FirstComeFirstServed)
    max_gone_slices: int = _MAX_GONE_SLICES
    max_runs_of_client: int = _MAX_RUNS_OF_CLIENT
    slices: dict[SliceId, _DeviceSet] = field(default_factory=dict)
    #: Of each slice: its client.
    owners: dict[SliceId, ClientId] = field(default_factory=dict)
    programs: dict[ProgramId, _Program] = field(default_factory=dict)
    runs: dict[RunId, _Run] = field(default_factory=dict)
    #: Of those in flight, by client.
    _num_runs: Counter[ClientId] = field(default_factory=Counter)
    _gone_slices: dict[SliceId, str] = field(default_factory=dict)
    _sequence: int = 0
    #: Of sets that have slices: the island's devices, and whether computations there need grants.
    _devices: dict[_DeviceSet, frozenset[int]] = field(default_factory=dict)
    _needs_grants: set[_DeviceSet] = field(default_factory=set)
    #: Waiting for their turn, oldest first.
    _waiting: list[_Turn] = field(default_factory=list)
    #: Granted, and not passed by all hosts.
    _granted: dict[tuple[RunPart, int], _Turn] = field(default_factory=dict)
    #: Sets whose executor still computes what it issued before it needed grants, with the epoch of the need.
    _not_idle: dict[_DeviceSet, int] = field(default_factory=dict)
    #: Changes of who needs grants.
    _epoch: int = 0
    #: Some set has no slice any more, but computes still.
    _some_unused: bool = False

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
            case UnitPassed():
                return self._unit_passed(event)
            case ExecutorIdle():
                devices = self._set_of(event.executor_id)
                if devices is not None and self._not_idle.get(devices) == event.epoch:
                    del self._not_idle[devices]
                return self._grant()
            case ProgramLoaded():
                return self._loaded(event.executor_id, event.part, event.failure)
            case ProgramForgotten():
                return self._forget(event.program_id)
            case SliceAdded():
                return self._add_slice(event)
            case SliceClosed():
                return self._close_slice(event.slice_id, event.reason)
            case ExecutorRemoved():
                return self._remove_executor(event)
            case ClientGone():
                return self._drop_client(event.client_id)
            case _:
                assert_never(event)

    def _add_slice(self, event: SliceAdded) -> list[Command]:
        if event.slice_id in self.slices:
            raise InternalError(f"slice {event.slice_id} was added twice; it has {self.slices[event.slice_id]}")
        if event.slice_id in self._gone_slices:
            reason = self._gone_slices[event.slice_id]
            raise InternalError(f"slice {event.slice_id} was added again after it was removed: {reason}")
        self.slices[event.slice_id] = event.executor_ids
        self.owners[event.slice_id] = event.client_id
        self._devices[event.executor_ids] = frozenset(event.device_indices)
        return self._share_devices()

    def _share_devices(self) -> list[Command]:
        """Has the executors of sets that share a device with another wait for grants, and no others."""
        commands: list[Command] = []
        alone = [devices for devices in self._devices if len(devices) == 1]
        for devices in alone:
            mine = self._devices[devices]
            needed = any(mine & self._devices[other] for other in self._devices if other != devices)
            if needed != (devices in self._needs_grants):
                self._epoch += 1
                commands.append(SendGrantsNeeded(executor_id=devices[0], needed=needed, epoch=self._epoch))
                if needed:
                    self._needs_grants.add(devices)
                    self._not_idle[devices] = self._epoch
                else:
                    self._forget_turns(devices)
        return commands

    def _forget_turns(self, devices: _DeviceSet) -> None:
        self._needs_grants.discard(devices)
        self._not_idle.pop(devices, None)
        self._waiting = [item for item in self._waiting if item.devices != devices]
        self._granted = {key: item for key, item in self._granted.items() if item.devices != devices}

    def _register(self, event: ProgramRegistered) -> list[Command]:
        if event.program_id in self.programs:
            known = self.programs[event.program_id]
            raise InternalError(
                f"program {event.program_id} ({event.name}) was registered twice; it was registered as {known.name} by "
                f"client {known.client_id}, {len(known.loading)} executors still load it"
            )
        failure = self._missing(event.parts)
        loading = [(e, s) for s in event.parts for e in self.slices.get(s, ())]
        self.programs[event.program_id] = _Program(
            event.client_id, event.name, tuple(event.parts), set(loading), failure
        )
        if not loading:
            return [TellLoaded(client_id=event.client_id, program_id=event.program_id, failure=failure)]
        return [
            SendLoad(executor_id=e, part_id=PartId(event.program_id, s), name=event.name, part=event.parts[s])
            for e, s in loading
        ]

    def _loaded(self, executor_id: str, part: PartId, failure: Failure | None) -> list[Command]:
        program = self.programs.get(part.program_id)
        if program is None or (executor_id, part.slice_id) not in program.loading:
            return []
        program.loading.discard((executor_id, part.slice_id))
        program.failure = program.failure or failure
        if program.loading:
            return []
        return [TellLoaded(client_id=program.client_id, program_id=part.program_id, failure=program.failure)]

    def _request(self, event: RunRequested) -> list[Command]:
        if event.run_id in self.runs:
            raise InternalError(f"run {event.run_id} was requested twice; {self.runs[event.run_id].history()}")
        if self._num_runs[event.client_id] >= self.max_runs_of_client:
            message = f"{self.max_runs_of_client} runs of this client are in flight already; wait for some to end"
            failure = Failure(kind="ResourceExhausted", message=message)
            return [TellFinished(client_id=event.client_id, run_id=event.run_id, failure=failure)]
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
        targets = [(e, s) for s in request.arguments for e in self.slices.get(s, ())]
        if not targets:
            return [TellFinished(client_id=request.client_id, run_id=request.run_id, failure=failure)]
        self._sequence += 1
        self.runs[request.run_id] = _Run(request.client_id, self._sequence, set(targets), failure=failure)
        self._num_runs[request.client_id] += 1
        return [
            SendEnqueue(executor_id=e, sequence=self._sequence, run=request, slice_id=s, arguments=request.arguments[s])
            for e, s in targets
        ]

    def _end(self, event: RunEnded) -> list[Command]:
        run_id, slice_id = event.run
        run = self.runs.get(run_id)
        if run is None:
            raise InternalError(f"run {run_id} ended on {event.executor_id}, but is not in flight")
        if (event.executor_id, slice_id) not in run.running:
            raise InternalError(
                f"run {run_id} ended for slice {slice_id} on {event.executor_id}, not running it; {run.history()}"
            )
        commands = self._end_part(run, (event.executor_id, slice_id), run_id, event.failure)
        return [*commands, *self._forget_unused()] if self._some_unused else commands

    def _end_part(self, run: _Run, part: tuple[str, SliceId], run_id: RunId, failure: Failure | None) -> list[Command]:
        run.running.discard(part)
        run.ended.append(part)
        if failure is not None and (run.failure is None or _cause(failure, run_id) < _cause(run.failure, run_id)):
            run.failure = failure
        if run.running:
            return []
        del self.runs[run_id]
        self._num_runs[run.client_id] -= 1
        if not self._num_runs[run.client_id]:
            del self._num_runs[run.client_id]
        return [TellFinished(client_id=run.client_id, run_id=run_id, failure=run.failure)]

    def _forget(self, program_id: ProgramId) -> list[Command]:
        program = self.programs.pop(program_id, None)
        slices = program.slices if program is not None else ()
        executors = dict.fromkeys(e for s in slices for e in self.slices.get(s, ()))
        return [SendDrop(executor_id=executor_id, program_id=program_id) for executor_id in executors]

    def _unit_ready(self, event: UnitReady) -> list[Command]:
        devices = self._set_of(event.executor_id)
        if devices is None or (len(devices) == 1 and devices not in self._needs_grants):
            return []  # it is gone, or was told meanwhile that it needs no grants
        self._waiting.append(_Turn(devices, event.run, event.unit, set(devices)))
        return self._grant()

    def _unit_passed(self, event: UnitPassed) -> list[Command]:
        devices = self._set_of(event.executor_id)
        if devices is None or (len(devices) == 1 and devices not in self._needs_grants):
            return []
        key = (event.run, event.unit)
        item = self._granted.get(key)
        if item is None and len(devices) == 1:
            return []  # granted before grants were not needed for a while
        if item is None or event.executor_id not in item.left:
            raise InternalError(
                f"executor {event.executor_id} passed unit {event.unit} of run {event.run.run_id}, "
                f"which was not granted to it"
            )
        item.left.discard(event.executor_id)
        if item.left:
            return []
        del self._granted[key]
        return self._grant()

    def _set_of(self, executor_id: str) -> _DeviceSet | None:
        return next((devices for devices in self._devices if executor_id in devices), None)

    def _grant(self) -> list[Command]:
        """Grants all that no other set's computation, granted or older, is in the way of."""
        commands: list[Command] = []
        waiting: list[_Turn] = []
        #: Who computes on a device, or waits for it; None: several sets do.
        users: dict[int, _DeviceSet | None] = {}
        for devices in (*dict.fromkeys(item.devices for item in self._granted.values()), *self._not_idle):
            self._use(users, devices)
        for item in self._waiting:
            if self._use(users, item.devices):
                self._granted[item.run, item.unit] = item
                commands += [SendGrant(executor_id=e, run=item.run, unit=item.unit) for e in item.devices]
            else:
                waiting.append(item)
        self._waiting = waiting
        return commands

    def _use(self, users: dict[int, _DeviceSet | None], devices: _DeviceSet) -> bool:
        """Adds a set to the users of its devices; returns whether it is the only one on all of them."""
        is_alone = True
        for number in self._devices[devices]:
            if users.setdefault(number, devices) != devices:
                users[number] = None
                is_alone = False
        return is_alone

    def _close_slice(self, slice_id: SliceId, reason: str) -> list[Command]:
        """Lets what is in flight on a slice end, and has all else that is on it freed."""
        devices = self.slices.pop(slice_id, None)
        self.owners.pop(slice_id, None)
        self._remember(slice_id, reason)
        if devices is None:
            return []
        drops: list[Command] = [SendDrop(executor_id=executor_id, slice_id=slice_id) for executor_id in devices]
        for program_id in list(self.programs):  # what loads there is not wanted any more
            for executor_id in devices:
                drops += self._loaded(executor_id, PartId(program_id, slice_id), self._missing([slice_id]))
        return [*drops, *self._forget_unused()]

    def _forget_unused(self) -> list[Command]:
        """Devices of which no slice is left are nobody's, once what is in flight there has ended."""
        unused = self._devices.keys() - set(self.slices.values())
        busy = {executor_id for run in self.runs.values() for executor_id, _ in run.running}
        commands: list[Command] = []
        for devices in [devices for devices in unused if not busy.intersection(devices)]:
            if devices in self._needs_grants:
                self._epoch += 1
                commands.append(SendGrantsNeeded(executor_id=devices[0], needed=False, epoch=self._epoch))
            del self._devices[devices]
            self._forget_turns(devices)
            unused.discard(devices)
        self._some_unused = bool(unused)
        return [*commands, *self._share_devices(), *self._grant()]

    def _remember(self, slice_id: SliceId, reason: str) -> None:
        self._gone_slices[slice_id] = reason
        if len(self._gone_slices) > self.max_gone_slices:
            del self._gone_slices[next(iter(self._gone_slices))]

    def _remove_executor(self, event: ExecutorRemoved) -> list[Command]:
        commands: list[Command] = []
        gone = event.executor_id
        for slice_id in [slice_id for slice_id, devices in self.slices.items() if gone in devices]:
            del self.slices[slice_id], self.owners[slice_id]
            self._remember(slice_id, event.reason)
        devices = self._set_of(gone)
        lost = devices or (gone,)  # computations of the other hosts cannot end without it
        for executor_id in lost:
            failure = Failure(kind="ExecutorLost", message=f"executor {gone} is lost: {event.reason}")
            for program_id, program in list(self.programs.items()):
                for loading in [part for part in program.loading if part[0] == executor_id]:
                    commands += self._loaded(executor_id, PartId(program_id, loading[1]), failure)
            for run_id, run in list(self.runs.items()):
                for part in [part for part in run.running if part[0] == executor_id]:
                    commands += self._end_part(run, part, run_id, failure)
        if devices is not None:
            del self._devices[devices]
            self._forget_turns(devices)
        return [*commands, *self._forget_unused()]

    def _drop_client(self, client_id: ClientId) -> list[Command]:
        self.policy.drop_client(client_id)
        for program_id in [key for key, program in self.programs.items() if program.client_id == client_id]:
            del self.programs[program_id]
        # Its runs end by themselves, and have devices until then.
        executors = dict.fromkeys(executor_id for devices in self._devices for executor_id in devices)
        return [SendDrop(executor_id=executor_id, client_id=client_id) for executor_id in executors]

    def executors_of(self, client_id: ClientId) -> set[str]:
        """Returns the executors that a client has slices of."""
        return {e for slice_id, devices in self.slices.items() if self.owners[slice_id] == client_id for e in devices}

    def _missing(self, slices: Collection[SliceId]) -> Failure | None:
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
