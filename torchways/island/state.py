"""The gang scheduler's core: one order of runs for all devices of an island.

Pure: events in, commands out (events.py); no clock, no socket: the time comes with each event. Which runs are admitted
to the devices, and when, admission.py decides, under a policy (policy.py). An admitted run gets a sequence number of
the island and is sent to all executors that take part before any later run is, so that executors of one slice see one
order whatever the order in which clients' messages arrived elsewhere. Where an order of single computations matters,
turns.py keeps it.

Executors belong to sets of devices, one on each host of a set; slices of the same devices share them.

What names a slice that is not here fails for who sent it; the slices that are here run their parts. An event that
cannot follow what came before it raises `InternalError` with the history of what it is about. Reports about what was
dropped meanwhile are no errors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, assert_never

from torchways.errors import Failure, InternalError
from torchways.ids import ClientId, IslandId, PartId, ProgramId, RunId, RunPart, SliceId
from torchways.island.admission import (
    Admission,
    Admit,
    Ask,
    Cancel,
    Decision,
    DeviceSet,
    HeldRun,
    ProgramTimes,
    Release,
    Totals,
)
from torchways.island.events import (
    AskOrder,
    BuffersReleased,
    ClientGone,
    Command,
    Event,
    ExecutorIdle,
    ExecutorRemoved,
    ProgramForgotten,
    ProgramLoaded,
    ProgramRegistered,
    RunEnded,
    RunOrdered,
    RunRequested,
    RunsCancelled,
    SendCancel,
    SendDrop,
    SendEnqueue,
    SendLoad,
    SliceAdded,
    SliceClosed,
    TellFinished,
    TellLoaded,
    TimePassed,
    UnitPassed,
    UnitReady,
)
from torchways.island.policy import PolicyFactory, ProportionalShare, Share
from torchways.island.turns import Turns

#: Slices that are gone and are remembered, for messages about them.
_MAX_GONE_SLICES = 1_000
#: Runs of a client that may be in flight on an island. Controllers keep far below (`Runs.limit`).
_MAX_RUNS_OF_CLIENT = 4_096


@dataclass(slots=True)
class _Program:
    client_id: ClientId
    name: str
    slices: tuple[SliceId, ...]
    islands: tuple[IslandId, ...]
    #: Executors that have not answered yet, with the slice.
    loading: set[tuple[str, SliceId]]
    failure: Failure | None = None
    #: Opaque; for operators.
    outline: Any = None
    times: ProgramTimes = field(default_factory=ProgramTimes)
    #: Its runs that are held, and whether it goes with the last of them.
    num_held: int = 0
    is_forgotten: bool = False


@dataclass(slots=True)
class _Run:
    client_id: ClientId
    sequence: int
    #: Executors whose part is not over, with the slice: their sets.
    running: dict[tuple[str, SliceId], DeviceSet]
    #: Those that have reported, in order.
    ended: list[tuple[str, SliceId]] = field(default_factory=list)
    #: Device time, by executor.
    seconds: dict[str, float] = field(default_factory=dict)
    failure: Failure | None = None

    def history(self) -> str:
        """What happened to the run, for error messages."""
        return f"enqueued as sequence {self.sequence}, ended on {self.ended}, running on {sorted(self.running)}"


class SchedulerState:
    """See the module's docstring.

    Args:
        policy: makes the policy of each set of devices.
        window: seconds of device time that are admitted ahead.
        max_gone_slices: see `_MAX_GONE_SLICES`.
        max_runs_of_client: see `_MAX_RUNS_OF_CLIENT`.
    """

    def __init__(
        self,
        policy: PolicyFactory = ProportionalShare,
        window: float = math.inf,
        *,
        max_gone_slices: int = _MAX_GONE_SLICES,
        max_runs_of_client: int = _MAX_RUNS_OF_CLIENT,
    ) -> None:
        self.max_gone_slices = max_gone_slices
        self.max_runs_of_client = max_runs_of_client
        self.slices: dict[SliceId, DeviceSet] = {}
        #: Of each slice: its client.
        self.owners: dict[SliceId, ClientId] = {}
        self.programs: dict[ProgramId, _Program] = {}
        #: Those that are admitted.
        self.runs: dict[RunId, _Run] = {}
        self.admission = Admission(window)
        self.turns = Turns()
        #: Of devices that have no slice, what the clients that are there have had of them.
        self.totals: dict[frozenset[int], Totals] = {}
        self._policy = policy
        #: Of clients that have slices.
        self._shares: dict[ClientId, Share] = {}
        self._num_programs: Counter[ClientId] = Counter()
        #: Runs that are held or admitted, by client.
        self._num_runs: Counter[ClientId] = Counter()
        self._gone_slices: dict[SliceId, str] = {}
        self._sequence = 0
        #: Some set has no slice any more, but computes still.
        self._some_unused = False

    def handle(self, event: Event, now: float = 0.0) -> list[Command]:
        """Takes an event; returns what to do, in order. `now`: a time in seconds, which never falls."""
        commands = self._handle(event, now)
        # What is carried out may make room for more, and nothing might come that asks again.
        while decisions := self.admission.decisions(now):
            commands += self._carry_out(decisions, now)
        return commands

    def wake_time(self, now: float) -> float | None:
        """Returns when to send `TimePassed`, if nothing comes before."""
        return self.admission.wake_time(now)

    def waits(self, now: float) -> list[str]:
        """Returns, for people, what the next run of each client waits for."""
        return self.admission.waits(now)

    def _handle(self, event: Event, now: float) -> list[Command]:
        match event:
            case RunRequested():
                return self._request(event, now)
            case RunEnded():
                return self._end(event, now)
            case BuffersReleased():
                return self._when_admitted(event)
            case ProgramRegistered():
                return self._register(event)
            case RunOrdered():
                return self._carry_out(self.admission.ordered(event.run_id, now), now)
            case RunsCancelled():
                return [command for run_id in event.run_ids for command in self._cancel(run_id, event.failure)]
            case TimePassed():
                return []
            case UnitReady():
                return self.turns.ready(event.executor_id, event.run, event.unit, event.failure)
            case UnitPassed():
                return self.turns.passed(event.executor_id, event.run, event.unit)
            case ExecutorIdle():
                return self.turns.idle(event.executor_id, event.epoch)
            case ProgramLoaded():
                return self._loaded(event.executor_id, event.part, event.failure)
            case ProgramForgotten():
                return self._forget(event.program_id)
            case SliceAdded():
                return self._add_slice(event)
            case SliceClosed():
                # A client closes a slice behind the runs that it has sent.
                return self._when_admitted(event) if event.is_in_order else self._release(event)
            case ExecutorRemoved():
                return self._remove_executor(event, now)
            case ClientGone():
                return self._drop_client(event.client_id)
            case _:
                assert_never(event)

    def _carry_out(self, decisions: Iterable[Decision], now: float) -> list[Command]:
        commands: list[Command] = []
        for decision in decisions:
            match decision:
                case Admit():
                    commands += self._enqueue(decision.run, now)
                case Cancel():
                    commands += self._enqueue(decision.run, now, decision.run.cancelled)
                case Ask():
                    commands.append(self._ask(decision.run))
                case Release():
                    commands += self._release(decision.request)
                case _:
                    assert_never(decision)
        return commands

    def _when_admitted(self, event: BuffersReleased | SliceClosed) -> list[Command]:
        """Gives something back once what its client sent before is admitted."""
        devices = self.slices.get(event.slice_id)
        if devices is None or self.admission.release(self.owners[event.slice_id], devices, event):
            return self._release(event)
        return []

    def _release(self, event: BuffersReleased | SliceClosed) -> list[Command]:
        if isinstance(event, SliceClosed):
            return self._close_slice(event.slice_id, event.reason)
        executors = self.slices.get(event.slice_id, ())
        return [SendDrop(executor_id=executor_id, buffer_ids=event.buffer_ids) for executor_id in executors]

    def _add_slice(self, event: SliceAdded) -> list[Command]:
        if event.slice_id in self.slices:
            raise InternalError(f"slice {event.slice_id} was added twice; it has {self.slices[event.slice_id]}")
        if event.slice_id in self._gone_slices:
            reason = self._gone_slices[event.slice_id]
            raise InternalError(f"slice {event.slice_id} was added again after it was removed: {reason}")
        self.slices[event.slice_id] = event.executor_ids
        self.owners[event.slice_id] = event.client_id
        self._shares[event.client_id] = event.share or Share(client_id=event.client_id)
        if event.executor_ids not in self.admission.lanes:
            totals = self.totals.pop(frozenset(event.device_indices), Totals())
            self.admission.add_lane(event.executor_ids, self._policy, totals)
        commands = self.turns.add(event.executor_ids, frozenset(event.device_indices))
        self._note_users()
        return commands

    def _register(self, event: ProgramRegistered) -> list[Command]:
        if event.program_id in self.programs:
            known = self.programs[event.program_id]
            raise InternalError(
                f"program {event.program_id} ({event.name}) was registered twice; it was registered as {known.name} by "
                f"client {known.client_id}, {len(known.loading)} executors still load it"
            )
        failure = self._missing(event.parts)
        loading = [(e, s) for s in event.parts for e in self.slices.get(s, ())]
        self._num_programs[event.client_id] += 1
        self.programs[event.program_id] = _Program(
            event.client_id, event.name, tuple(event.parts), event.islands, set(loading), failure, event.outline
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

    # ---- runs

    def _request(self, event: RunRequested, now: float) -> list[Command]:
        run_id, client_id = event.run_id, event.client_id
        if run_id in self.runs or run_id in self.admission.runs:
            history = self.runs[run_id].history() if run_id in self.runs else "it is held"
            raise InternalError(f"run {run_id} was requested twice; {history}")
        program = self.programs.get(event.program_id)
        if program is None or program.is_forgotten:
            raise InternalError(f"run {run_id} names program {event.program_id}, which is not registered")
        if self._num_runs[client_id] >= self.max_runs_of_client:
            message = f"{self.max_runs_of_client} runs of this client are in flight already; wait for some to end"
            failure = Failure(kind="ResourceExhausted", message=message)
            return [TellFinished(client_id=client_id, run_id=run_id, failure=failure)]
        self._num_runs[client_id] += 1
        program.num_held += 1
        devices = dict.fromkeys(self.slices[s] for s in event.arguments if s in self.slices)
        self.admission.hold(
            HeldRun(
                run_id=run_id,
                share=self._shares.get(client_id) or Share(client_id=client_id),
                request=event,
                program=program.times,
                lanes=[self.admission.lanes[key] for key in devices],
                arrived=now,
                spans=len(program.islands) > 1,
                nbytes=event.nbytes,
            )
        )
        return []

    def _ask(self, run: HeldRun, *, is_withdrawn: bool = False) -> AskOrder:
        program = self.programs.get(run.request.program_id)
        islands = program.islands if program is not None else ()
        return AskOrder(run_id=run.run_id, client_id=run.share.client_id, islands=islands, is_withdrawn=is_withdrawn)

    def _enqueue(self, run: HeldRun, now: float, cancelled: Failure | None = None) -> list[Command]:
        request: RunRequested = run.request
        program = self.programs[request.program_id]
        program.num_held -= 1
        # Slices that are left run their parts all the same: what they wait for from those that are gone fails there,
        # and poisons what depends on it. Were the run dropped, they would wait for its results for ever.
        failure = self._missing(request.arguments)
        targets = {(e, s): self.slices[s] for s in request.arguments if s in self.slices for e in self.slices[s]}
        used = set(targets.values())
        for lane in run.lanes:
            if lane.devices not in used:  # its slices there went while it was held: no executor will say that it ended
                self.admission.ended(run.run_id, request.client_id, lane.devices, 0.0, now)
        commands: list[Command] = []
        if targets:
            self._sequence += 1
            self.runs[request.run_id] = _Run(request.client_id, self._sequence, targets, failure=failure)
            commands += [
                SendEnqueue(
                    executor_id=e,
                    sequence=self._sequence,
                    run=request,
                    slice_id=s,
                    arguments=request.arguments[s],
                    failure=cancelled,
                    held_for=run.held_for,
                )
                for e, s in targets
            ]
        else:
            self._count_ended(request.client_id)
            finished = TellFinished(client_id=request.client_id, run_id=request.run_id, failure=cancelled or failure)
            commands.append(finished)
        if program.is_forgotten and not program.num_held:
            commands += self._forget(request.program_id)
        return commands

    def _cancel(self, run_id: RunId, failure: Failure) -> list[Command]:
        held = self.admission.cancel(run_id, failure)
        if held is not None:
            # It takes no devices, and needs no order: its results are failures, also those that it sends. One that is
            # asked for has its place, or will, which is passed over.
            return [self._ask(held, is_withdrawn=True)] if held.spans and not held.is_asked else []
        run = self.runs.get(run_id)
        parts = run.running if run is not None else ()
        return [SendCancel(executor_id=e, run=RunPart(run_id, s), failure=failure) for e, s in parts]

    def _end(self, event: RunEnded, now: float) -> list[Command]:
        run_id, slice_id = event.run
        run = self.runs.get(run_id)
        is_running = run is not None and (event.executor_id, slice_id) in run.running
        if not is_running and self.turns.set_of(event.executor_id) is None:
            return []  # its set lost another host, with which all of its runs ended here
        if run is None:
            raise InternalError(f"run {run_id} ended on {event.executor_id}, but is not in flight")
        if not is_running:
            raise InternalError(
                f"run {run_id} ended for slice {slice_id} on {event.executor_id}, not running it; {run.history()}"
            )
        run.seconds[event.executor_id] = run.seconds.get(event.executor_id, 0.0) + event.device_seconds
        part = (event.executor_id, slice_id)
        is_gang = len(run.running[part]) > 1
        commands = self.turns.ended(event.executor_id, event.run, event.failure) if is_gang else []
        commands += self._end_part(run, part, run_id, event.failure, now)
        return [*commands, *self._forget_unused()] if self._some_unused else commands

    def _end_part(
        self, run: _Run, part: tuple[str, SliceId], run_id: RunId, failure: Failure | None, now: float
    ) -> list[Command]:
        devices = run.running.pop(part)
        run.ended.append(part)
        if failure is not None and (run.failure is None or _cause(failure, run_id) < _cause(run.failure, run_id)):
            run.failure = failure
        if devices not in run.running.values():
            seconds = max(run.seconds.get(executor_id, 0.0) for executor_id in devices)
            is_typical = run.failure is None
            self.admission.ended(run_id, run.client_id, devices, seconds, now, is_typical=is_typical)
        if run.running:
            return []
        del self.runs[run_id]
        self._count_ended(run.client_id)
        return [TellFinished(client_id=run.client_id, run_id=run_id, failure=run.failure)]

    def _count_ended(self, client_id: ClientId) -> None:
        self._num_runs[client_id] -= 1
        if not self._num_runs[client_id]:
            del self._num_runs[client_id]

    # ---- what goes

    def _forget(self, program_id: ProgramId) -> list[Command]:
        program = self.programs.get(program_id)
        if program is None:
            return []
        program.is_forgotten = True
        if program.num_held:
            return []  # it goes with the last of them
        del self.programs[program_id]
        self._num_programs[program.client_id] -= 1
        if not self._num_programs[program.client_id]:
            del self._num_programs[program.client_id]
        executors = dict.fromkeys(e for s in program.slices for e in self.slices.get(s, ()))
        return [SendDrop(executor_id=executor_id, program_id=program_id) for executor_id in executors]

    def _close_slice(self, slice_id: SliceId, reason: str) -> list[Command]:
        """Lets what is in flight on a slice end, and has all else that is on it freed."""
        devices = self.slices.get(slice_id)
        if devices is None:
            self._remember(slice_id, reason)
            return []
        self._remove_slice(slice_id, reason)
        drops: list[Command] = [SendDrop(executor_id=executor_id, slice_id=slice_id) for executor_id in devices]
        for program_id in list(self.programs):  # what loads there is not wanted any more
            for executor_id in devices:
                drops += self._loaded(executor_id, PartId(program_id, slice_id), self._missing([slice_id]))
        return [*drops, *self._forget_unused()]

    def _remove_slice(self, slice_id: SliceId, reason: str) -> None:
        del self.slices[slice_id]
        client_id = self.owners.pop(slice_id)
        if client_id not in self.owners.values():
            self._shares.pop(client_id, None)
        self._remember(slice_id, reason)

    def _forget_unused(self) -> list[Command]:
        """Devices of which no slice is left are nobody's, once what is in flight there has ended."""
        unused = self.turns.devices.keys() - set(self.slices.values())
        busy = {devices for run in self.runs.values() for devices in run.running.values()}
        commands: list[Command] = []
        for devices in unused - busy:
            commands += self._remove_set(devices)
        self._some_unused = bool(unused & busy)
        self._note_users()
        return [*commands, *self.turns.share(), *self.turns.grant()]

    def _note_users(self) -> None:
        """Tells each lane who has slices of its devices, and whether another has some of them."""
        sets = self.turns.devices
        for devices, lane in self.admission.lanes.items():
            lane.owners = {self.owners[slice_id] for slice_id, other in self.slices.items() if other == devices}
            lane.overlaps = any(other != devices and sets[devices] & sets[other] for other in sets)

    def _remove_set(self, devices: DeviceSet, *, is_lost: bool = False) -> list[Command]:
        device_indices = self.turns.devices[devices]
        totals = self.admission.remove_lane(devices)
        if totals.seconds:
            self.totals[device_indices] = totals
        return self.turns.remove(devices, is_lost=is_lost)

    def _remember(self, slice_id: SliceId, reason: str) -> None:
        self._gone_slices[slice_id] = reason
        if len(self._gone_slices) > self.max_gone_slices:
            del self._gone_slices[next(iter(self._gone_slices))]

    def _remove_executor(self, event: ExecutorRemoved, now: float) -> list[Command]:
        commands: list[Command] = []
        gone = event.executor_id
        for slice_id in [slice_id for slice_id, devices in self.slices.items() if gone in devices]:
            self._remove_slice(slice_id, event.reason)
        devices = self.turns.set_of(gone)
        lost = devices or (gone,)  # computations of the other hosts cannot end without it
        for executor_id in lost:
            failure = Failure(kind="ExecutorLost", message=f"executor {gone} is lost: {event.reason}")
            for program_id, program in list(self.programs.items()):
                for loading in [part for part in program.loading if part[0] == executor_id]:
                    commands += self._loaded(executor_id, PartId(program_id, loading[1]), failure)
            for run_id, run in list(self.runs.items()):
                for part in [part for part in run.running if part[0] == executor_id]:
                    commands += self._end_part(run, part, run_id, failure, now)
        if devices is not None:
            self._remove_set(devices, is_lost=True)
        return [*commands, *self._forget_unused()]

    def _drop_client(self, client_id: ClientId) -> list[Command]:
        for _ in self.admission.drop_client(client_id):  # the shell says that nothing of it will be asked for
            self._count_ended(client_id)
        for totals in self.totals.values():
            totals.usage.pop(client_id, None)
        for program_id in [key for key, program in self.programs.items() if program.client_id == client_id]:
            del self.programs[program_id]
        self._num_programs.pop(client_id, None)
        # Its runs end by themselves, and have devices until then. A slice that it closed behind runs that were held is
        # closed by nobody else; the resource manager's word about the others then changes nothing.
        executors = dict.fromkeys(executor_id for devices in self.turns.devices for executor_id in devices)
        drops: list[Command] = [SendDrop(executor_id=executor_id, client_id=client_id) for executor_id in executors]
        for slice_id in [key for key, owner in self.owners.items() if owner == client_id]:
            drops += self._close_slice(slice_id, "its client is gone")
        return drops

    def num_programs(self, client_id: ClientId) -> int:
        """Returns how many programs a client has."""
        return self._num_programs[client_id]

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
