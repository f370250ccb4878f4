"""The gang scheduler process of one island: the shell around state.py, of calls and streams."""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import assert_never

import grpc
import grpc.aio

from torchways.errors import AccessDenied, Failure, failure_from
from torchways.ids import BufferId, ClientId, IslandId, PartId, ProgramId, RunId, RunPart, SliceId
from torchways.island import events as core
from torchways.island.admission import Lane, Usage
from torchways.island.order import OrderStream
from torchways.island.outline import Outlines, outline_of
from torchways.island.policy import PolicyFactory, Share, find_policy
from torchways.island.spans import RunSpans
from torchways.island.state import SchedulerState
from torchways.link.frames import FrameError
from torchways.link.handshake import HandshakeError
from torchways.link.opening import LinkError
from torchways.link.stream import LoopStream, StreamServer
from torchways.observability.process import die_with_parent, setup_process
from torchways.observability.text import printable_name
from torchways.rpc import channel, convert
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.identity import Caller, ClusterKey, Role, check_owner, metadata, take_cluster_key
from torchways.rpc.spans import Span, shown_to, trace_responses
from torchways.rpc.streams import offer, open_offered, parsing

logger = logging.getLogger(__name__)

#: What a client has not read yet: beyond this nothing more is taken from it.
_MAX_UNREAD_BYTES = 16 << 20
#: What a client's runs that are held may take: beyond this nothing more is taken from it.
_MAX_HELD_BYTES = 64 << 20
#: Programs that are listed for operators.
_MAX_PROGRAMS = 500
#: Programs that a client may have on an island. Controllers keep below (`Programs.limit`).
_MAX_PROGRAMS_OF_CLIENT = 16_384
#: For an executor's stream to open.
_OPEN_SECONDS = 30.0
_CALL_SECONDS = 30.0
#: How often executors are told whose runs are held.
_HELD_SECONDS = 5.0


class _ExecutorLink:
    """The Control stream to one executor."""

    def __init__(self, server: SchedulerServer, executor: pb.ExecutorInfo) -> None:
        self.executor_id = executor.executor_id
        self._server = server
        self.stream = LoopStream(parsing(pb.ExecutorEvent, self._take), self._lost)
        self._channel = channel.open_channel(executor.address)
        #: Why it is lost.
        self._broken = ""
        self._opening = asyncio.create_task(self._open(), name=f"executor {executor.executor_id}")

    async def _open(self) -> None:
        stub = pb_grpc.ExecutorStub(self._channel)
        try:
            opening = stub.Control(pb.OpenStream(), metadata=self._server.metadata)
            await open_offered(opening, self.stream, _OPEN_SECONDS)
        except grpc.aio.AioRpcError as error:
            self._lost(f"it cannot be reached ({error.code().name}: {error.details()})")
        except LinkError as error:
            self._lost(f"it cannot be reached ({error})")
        except Exception as error:
            logger.exception("the stream to executor %s could not be opened", self.executor_id)
            self._lost(f"it cannot be reached ({error})")

    async def opened(self) -> str:
        """Waits until the stream is open; returns why it is not to be had, or an empty text."""
        await asyncio.wait({self._opening})
        return self._broken

    def _take(self, event: pb.ExecutorEvent) -> None:
        self._server.on_executor_event(self.executor_id, event)

    def _lost(self, reason: str) -> None:
        logger.info("executor %s is gone: %s", self.executor_id, reason)
        self._broken = reason
        self._server.executor_lost(self, reason)

    async def close(self) -> None:
        """Ends the stream."""
        self._broken = self._broken or "it was removed"
        self.stream.close()  # nobody waits for room in it any more
        self._opening.cancel()
        await self._channel.close(None)


class _ClientEnd:
    """A client's stream."""

    def __init__(self, server: SchedulerServer, client_id: ClientId) -> None:
        self._server = server
        self._client_id = client_id
        self.stream = LoopStream(parsing(pb.ClientMessage, self._take), self._lost, max_unsent=_MAX_UNREAD_BYTES)
        #: Set while nothing more is taken from the client.
        self._waiting: asyncio.Task[None] | None = None

    def _take(self, message: pb.ClientMessage) -> None:
        self._server.take(self._client_id, message)
        if self._waiting is None and self._server.must_wait(self._client_id, self.stream):
            self.stream.pause()
            self._waiting = asyncio.create_task(self._wait(), name=f"client {self._client_id} waits")

    async def _wait(self) -> None:
        # What a client queues without end, or never reads, holds up that client alone.
        while self._server.must_wait(self._client_id, self.stream):
            await self._server.room_for(self._client_id, self.stream)
        self._waiting = None
        self.stream.resume()

    def _lost(self, reason: str) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._server.client_gone(self._client_id, reason)


class SchedulerServer(pb_grpc.SchedulerServicer):
    """See the module's docstring."""

    def __init__(
        self, token: str, key: ClusterKey, streams: StreamServer, policy: PolicyFactory, window: float
    ) -> None:
        self.core = SchedulerState(policy, window)
        self.spans = RunSpans()
        self._outlines = Outlines()
        #: Both are set before anything is served.
        self.order: OrderStream
        self.manager: pb_grpc.ResourceManagerStub
        self._key = key
        self._streams = streams
        self._loop = asyncio.get_running_loop()
        #: Wakes the core, if it wants to be.
        self._timer: asyncio.TimerHandle | None = None
        #: Of clients that must wait until less of theirs is held.
        self._held_room: dict[ClientId, asyncio.Event] = {}
        me = Caller(Role.SCHEDULER)
        self.metadata = metadata(token, me, key.secret_of(me))
        #: Those that are open, or being opened.
        self._links: dict[str, _ExecutorLink] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._clients: dict[ClientId, LoopStream] = {}

    def handle(self, event: core.Event) -> None:
        """Gives the core an event and carries out its commands."""
        now = self._loop.time()
        commands = self.core.handle(event, now)
        if isinstance(event, core.RunRequested):
            name = self.core.programs[event.program_id].name if event.program_id in self.core.programs else "a program"
            devices = dict.fromkeys(self.core.slices[s] for s in event.arguments if s in self.core.slices)
            self.spans.requested(event.run_id, name, tuple(devices), time.time_ns())
        elif isinstance(event, core.ClientGone):
            self.spans.client_gone(event.client_id, time.time_ns())
        self._carry_out(commands)
        if self._timer is not None:
            self._timer.cancel()
        wake = self.core.wake_time(now)
        self._timer = self._loop.call_at(wake, self.handle, core.TimePassed()) if wake is not None else None
        for client_id, room in self._held_room.items():
            if self.core.admission.held_bytes.get(client_id, 0) <= _MAX_HELD_BYTES:
                room.set()

    def _carry_out(self, commands: Iterable[core.Command]) -> None:
        for command in commands:
            match command:
                case core.SendEnqueue():
                    self.spans.admitted(command.run.run_id, command.held_for, time.time_ns())
                    self._send(command.executor_id, pb.ExecutorCommand(enqueue=_enqueue(command)))
                case core.SendLoad():
                    program_id = command.part_id.program_id
                    load = pb.LoadProgram(program_id=program_id, name=command.name, program=command.part)
                    self._send(command.executor_id, pb.ExecutorCommand(load_program=load))
                case core.SendDrop():
                    self._send(command.executor_id, _drop(command))
                case core.SendCancel():
                    failure = convert.failure_to_proto(command.failure)
                    cancel = pb.CancelRun(**command.run._asdict(), failure=failure)
                    self._send(command.executor_id, pb.ExecutorCommand(cancel_run=cancel))
                case core.AskOrder():
                    self.order.ask(command)
                case core.SendGrant():
                    grant = pb.Grant(**command.run._asdict(), unit=command.unit, held_for=command.held_for)
                    self._send(command.executor_id, pb.ExecutorCommand(grant=grant))
                case core.SendRefusal():
                    failure = convert.failure_to_proto(command.failure)
                    refusal = pb.Refusal(**command.run._asdict(), unit=command.unit, failure=failure)
                    self._send(command.executor_id, pb.ExecutorCommand(refusal=refusal))
                case core.SendGrantsNeeded():
                    needed = pb.SetGrantsNeeded(needed=command.needed, epoch=command.epoch)
                    self._send(command.executor_id, pb.ExecutorCommand(set_grants_needed=needed))
                case core.TellFinished():
                    self.spans.ended(command.run_id, time.time_ns())
                    finished = pb.RunFinished(run_id=command.run_id, failure=_optional(command.failure))
                    self._tell(command.client_id, pb.SchedulerMessage(run_finished=finished))
                case core.TellLoaded():
                    ready = pb.ProgramReady(program_id=command.program_id, failure=_optional(command.failure))
                    self._tell(command.client_id, pb.SchedulerMessage(program_ready=ready))
                case _:
                    assert_never(command)

    def _send(self, executor_id: str, command: pb.ExecutorCommand) -> None:
        link = self._links.get(executor_id)
        if link is not None:
            link.stream.send(command.SerializeToString())

    def _tell(self, client_id: ClientId, message: pb.SchedulerMessage) -> None:
        stream = self._clients.get(client_id)
        if stream is not None:
            stream.send(message.SerializeToString())

    def executor_lost(self, link: _ExecutorLink, reason: str) -> None:
        """Forgets an executor whose stream has ended, and has it ended: where it can, it ends itself."""
        if self._links.get(link.executor_id) is not link:
            return
        del self._links[link.executor_id]
        closing = asyncio.create_task(self._cut_off(link, reason), name=f"cutting off executor {link.executor_id}")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        self.handle(core.ExecutorRemoved(executor_id=link.executor_id, reason=reason))

    async def _cut_off(self, link: _ExecutorLink, reason: str) -> None:
        await link.close()
        request = pb.CutOffExecutorRequest(executor_id=link.executor_id, reason=reason)
        try:
            await self.manager.CutOffExecutor(request, metadata=self.metadata, timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:  # without a resource manager, the cluster ends
            logger.info("executor %s is cut off, and the resource manager does not know: %s", link.executor_id, error)

    def on_executor_event(self, executor_id: str, event: pb.ExecutorEvent) -> None:
        """Takes what an executor reports."""
        match event.WhichOneof("event"):
            case "run_ended":
                ended = event.run_ended
                self.handle(
                    core.RunEnded(
                        executor_id=executor_id,
                        run=_run_part(ended),
                        failure=_failure(ended),
                        device_seconds=ended.device_seconds,
                    )
                )
            case "unit_ready":
                ready = event.unit_ready
                self.handle(
                    core.UnitReady(
                        executor_id=executor_id, run=_run_part(ready), unit=ready.unit, failure=_failure(ready)
                    )
                )
            case "unit_passed":
                passed = event.unit_passed
                self.handle(core.UnitPassed(executor_id=executor_id, run=_run_part(passed), unit=passed.unit))
            case "idle":
                self.handle(core.ExecutorIdle(executor_id=executor_id, epoch=event.idle.epoch))
            case "program_loaded":
                loaded = event.program_loaded
                part = PartId(ProgramId(loaded.program_id), SliceId(loaded.slice_id))
                self.handle(core.ProgramLoaded(executor_id=executor_id, part=part, failure=_failure(loaded)))

    async def Connect(self, request: pb.OpenStream, context: grpc.aio.ServicerContext) -> None:
        """A client's stream."""
        client_id = channel.caller(context, self._key).client_id
        if client_id in self._clients:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"client {client_id} is connected already")
        await offer(context, self._streams, self._loop, functools.partial(self._connected, client_id))

    def _connected(self, client_id: ClientId) -> LoopStream:
        if client_id in self._clients:
            raise HandshakeError(f"client {client_id} is connected already")
        stream = self._clients[client_id] = _ClientEnd(self, client_id).stream
        logger.info("client %d connected; waiting for its programs", client_id)
        return stream

    def client_gone(self, client_id: ClientId, reason: str) -> None:
        """Forgets a client whose stream has ended."""
        del self._clients[client_id]
        self.handle(core.ClientGone(client_id=client_id))
        self.order.client_gone(client_id)
        self._outlines.forget(client_id)
        logger.info("client %d is gone: %s", client_id, reason)

    def must_wait(self, client_id: ClientId, stream: LoopStream) -> bool:
        """Whether nothing more is to be taken from a client for now."""
        if stream.is_full or self._holds_too_much(client_id):
            return True
        full = {name for name, link in self._links.items() if link.stream.is_full}
        return bool(full) and not full.isdisjoint(self.core.executors_of(client_id))

    async def room_for(self, client_id: ClientId, stream: LoopStream) -> None:
        """Waits until some of what a client must wait for is over."""
        if self._holds_too_much(client_id):
            room = self._held_room[client_id] = asyncio.Event()
            try:
                await room.wait()
            finally:
                del self._held_room[client_id]
        await stream.room()
        for name in self.core.executors_of(client_id):
            if name in self._links:
                await self._links[name].stream.room()

    def _holds_too_much(self, client_id: ClientId) -> bool:
        return self.core.admission.held_bytes.get(client_id, 0) > _MAX_HELD_BYTES

    async def tell_held(self) -> None:
        """Tells executors, for ever, whose runs are held."""
        told: dict[str, set[ClientId]] = {}
        while True:
            await asyncio.sleep(_HELD_SECONDS)
            held: dict[str, set[ClientId]] = {}
            for devices, lane in self.core.admission.lanes.items():
                for executor_id in devices:
                    held.setdefault(executor_id, set()).update(lane.queues)
            for executor_id, clients in held.items():
                if clients != told.get(executor_id, set()):
                    self._send(executor_id, pb.ExecutorCommand(held_runs=pb.HeldRuns(client_ids=clients)))
            told = held

    def take(self, client_id: ClientId, message: pb.ClientMessage) -> None:
        """Takes what a client says."""
        try:
            check_message(client_id, message, self.core.owners)
        except AccessDenied as error:
            logger.warning("client %d is refused: %s", client_id, error)
            self._refuse(client_id, message, convert.failure_to_proto(failure_from(error)))
            return
        if message.HasField("register_program"):
            if self.core.num_programs(client_id) >= _MAX_PROGRAMS_OF_CLIENT:
                raise FrameError(f"it registers more than {_MAX_PROGRAMS_OF_CLIENT:,} programs")
            message.register_program.name = printable_name(message.register_program.name)
        event = _client_event(client_id, message, self._outlines)
        if event is not None:
            self.handle(event)

    def _refuse(self, client_id: ClientId, message: pb.ClientMessage, failure: pb.Failure) -> None:
        """Answers a message that names what is another client's, where it is of a kind that is answered."""
        if message.HasField("run_program"):
            finished = pb.RunFinished(run_id=message.run_program.run_id, failure=failure)
            self._tell(client_id, pb.SchedulerMessage(run_finished=finished))
        elif message.HasField("register_program"):
            ready = pb.ProgramReady(program_id=message.register_program.program_id, failure=failure)
            self._tell(client_id, pb.SchedulerMessage(program_ready=ready))

    async def AddSlice(self, request: pb.AddSliceRequest, context: grpc.aio.ServicerContext) -> pb.AddSliceResponse:
        """Connects to a new slice's executors; fails where one of them cannot be reached."""
        slice_id, client_id = SliceId(request.slice_id), ClientId(request.client_id)
        ids = tuple(executor.executor_id for executor in request.executors)
        links: list[_ExecutorLink] = []
        for executor in request.executors:
            if executor.executor_id not in self._links:
                self._links[executor.executor_id] = _ExecutorLink(self, executor)
            links.append(self._links[executor.executor_id])
        devices = tuple(request.device_indices)
        share = Share(
            client_id=client_id, name=request.client_name, weight=request.weight or 1.0, priority=request.priority
        )
        self.handle(
            core.SliceAdded(
                slice_id=slice_id, client_id=client_id, executor_ids=ids, device_indices=devices, share=share
            )
        )
        logger.info("slice %d has executors %s", slice_id, ", ".join(ids))
        for link in links:
            if broken := await link.opened():
                await context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION, f"executor {link.executor_id} is gone: {broken}"
                )
        return pb.AddSliceResponse()

    async def RemoveSlice(
        self, request: pb.RemoveSliceRequest, context: grpc.aio.ServicerContext
    ) -> pb.RemoveSliceResponse:
        """Forgets a slice."""
        self.handle(core.SliceClosed(slice_id=SliceId(request.slice_id), reason=request.reason))
        logger.info("slice %d is gone: %s", request.slice_id, request.reason)
        return pb.RemoveSliceResponse()

    async def RemoveExecutor(
        self, request: pb.RemoveExecutorRequest, context: grpc.aio.ServicerContext
    ) -> pb.RemoveExecutorResponse:
        """Forgets an executor."""
        self.handle(core.ExecutorRemoved(executor_id=request.executor_id, reason=request.reason))
        link = self._links.pop(request.executor_id, None)
        if link is not None:
            await link.close()
        logger.info("executor %s is gone: %s", request.executor_id, request.reason)
        return pb.RemoveExecutorResponse()

    async def GetStatus(
        self, request: pb.SchedulerStatusRequest, context: grpc.aio.ServicerContext
    ) -> pb.SchedulerStatus:
        """Says what the sets of devices do, and for whom."""
        now = self._loop.time()
        used = [
            pb.DeviceSetStatus(
                executor_ids=lane.devices,
                device_indices=sorted(self.core.turns.devices[lane.devices]),
                busy_seconds=lane.totals.seconds,
                admitted_seconds=lane.unfinished_seconds(now),
                clients=[_client_share(usage, lane) for usage in lane.totals.usage.values()],
            )
            for lane in self.core.admission.lanes.values()
        ]
        unused = [
            pb.DeviceSetStatus(
                device_indices=sorted(device_indices),
                busy_seconds=totals.seconds,
                clients=[_client_share(usage) for usage in totals.usage.values()],
            )
            for device_indices, totals in self.core.totals.items()
        ]
        return pb.SchedulerStatus(device_sets=[*used, *unused], waits=self.core.waits(now))

    async def DescribePrograms(self, request: pb.ProgramsRequest, context: grpc.aio.ServicerContext) -> pb.Programs:
        """Says which programs there are, the newest last, or what some of them consist of."""
        programs = self.core.programs
        if request.program_ids:
            asked = map(ProgramId, request.program_ids)
            kept = [programs[key].outline.content for key in asked if key in programs]
            return pb.Programs(programs=[pb.ProgramOutline.FromString(content) for content in kept if content])
        return pb.Programs(
            programs=[
                pb.ProgramOutline(program_id=key, name=item.name, num_instructions=item.outline.num_instructions)
                for key, item in list(programs.items())[-_MAX_PROGRAMS:]
            ]
        )

    async def CollectTrace(
        self, request: pb.TraceRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.TraceResponse]:
        """Returns the spans of runs since a time."""
        caller = channel.caller(context, self._key)

        def spans(since_ns: int) -> list[Span]:
            found = self.spans.since(since_ns, time.time_ns())
            return shown_to(caller.client_id, found) if caller.role is Role.CLIENT else found

        for response in trace_responses(request, spans):
            yield response


def _client_share(usage: Usage, lane: Lane | None = None) -> pb.ClientShare:
    share = usage.share
    admitted = lane.admitted.get(share.client_id) if lane is not None else None
    return pb.ClientShare(
        client_id=share.client_id,
        name=share.name,
        weight=share.weight,
        priority=share.priority,
        busy_seconds=usage.seconds,
        num_held=lane.num_held(share.client_id) if lane is not None else 0,
        num_admitted=len(admitted.runs) if admitted is not None else 0,
        num_finished=usage.num_finished,
    )


def _run_part(message: pb.RunEnded | pb.UnitReady | pb.UnitPassed) -> RunPart:
    return RunPart(RunId(message.run_id), SliceId(message.slice_id))


def check_message(client_id: ClientId, message: pb.ClientMessage, owners: Mapping[SliceId, ClientId]) -> None:
    """Checks that a client owns all that its message names; what runs are bound to, executors check.

    Raises:
        AccessDenied: it does not.
    """
    ids: list[int] = []
    slices: list[int] = []
    match message.WhichOneof("message"):
        case "run_program":
            run = message.run_program
            ids = [run.program_id, run.run_id, run.first_buffer_id]
            slices = [part.slice_id for part in run.slices]
        case "cancel_runs":
            ids = list(message.cancel_runs.run_ids)
        case "release_buffers":
            ids, slices = list(message.release_buffers.buffer_ids), [message.release_buffers.slice_id]
        case "register_program":
            ids, slices = [message.register_program.program_id], [s.slice_id for s in message.register_program.slices]
        case "forget_program":
            ids = [message.forget_program.program_id]
        case "close_slice":
            slices = [message.close_slice.slice_id]
    check_owner(client_id, ids=[ProgramId(identity) for identity in ids], slices=map(SliceId, slices), owners=owners)


def _client_event(client_id: ClientId, message: pb.ClientMessage, outlines: Outlines) -> core.Event | None:
    match message.WhichOneof("message"):
        case "run_program":
            run = message.run_program
            return core.RunRequested(
                client_id=client_id,
                program_id=ProgramId(run.program_id),
                run_id=RunId(run.run_id),
                first_buffer_id=BufferId(run.first_buffer_id),
                arguments={SliceId(part.slice_id): part.arguments for part in run.slices},
                nbytes=sum(len(part.arguments) for part in run.slices),
                checks_values=run.checks_values,
            )
        case "cancel_runs":
            cancel = message.cancel_runs
            reason = f"the run that makes this array was cancelled: {cancel.reason or 'its client asked for it'}"
            failure = Failure(kind="RunCancelled", message=reason)
            return core.RunsCancelled(run_ids=[RunId(run_id) for run_id in cancel.run_ids], failure=failure)
        case "release_buffers":
            release = message.release_buffers
            return core.BuffersReleased(slice_id=SliceId(release.slice_id), buffer_ids=release.buffer_ids)
        case "register_program":
            program = message.register_program
            return core.ProgramRegistered(
                client_id=client_id,
                program_id=ProgramId(program.program_id),
                name=program.name,
                parts={SliceId(part.slice_id): part for part in program.slices},
                islands=tuple(map(IslandId, program.islands)),
                outline=outlines.keep(client_id, outline_of(program)),
            )
        case "forget_program":
            return core.ProgramForgotten(program_id=ProgramId(message.forget_program.program_id))
        case "close_slice":
            slice_id = SliceId(message.close_slice.slice_id)
            return core.SliceClosed(slice_id=slice_id, reason="it was closed", is_in_order=True)
    logger.warning("client %d sent a message of no known kind", client_id)
    return None


def _enqueue(command: core.SendEnqueue) -> pb.Enqueue:
    run = command.run
    return pb.Enqueue(
        sequence=command.sequence,
        program_id=run.program_id,
        run_id=run.run_id,
        slice_id=command.slice_id,
        first_buffer_id=run.first_buffer_id,
        arguments=command.arguments,
        failure=_optional(command.failure),
        checks_values=run.checks_values,
    )


def _drop(command: core.SendDrop) -> pb.ExecutorCommand:
    if command.client_id is not None:
        return pb.ExecutorCommand(drop_client=pb.DropClient(client_id=command.client_id))
    if command.slice_id is not None:
        return pb.ExecutorCommand(drop_slice=pb.DropSlice(slice_id=command.slice_id))
    if command.program_id is not None:
        return pb.ExecutorCommand(drop_program=pb.DropProgram(program_id=command.program_id))
    return pb.ExecutorCommand(drop_buffers=pb.DropBuffers(buffer_ids=command.buffer_ids))


def _failure(message: pb.RunEnded | pb.UnitReady | pb.ProgramLoaded) -> Failure | None:
    return convert.failure_from_proto(message.failure) if message.HasField("failure") else None


def _optional(failure: Failure | None) -> pb.Failure | None:
    return convert.failure_to_proto(failure) if failure is not None else None


async def serve(arguments: argparse.Namespace) -> None:
    """Runs the scheduler until it is told to end."""
    token = channel.cluster_token()
    key = take_cluster_key()
    server = channel.make_server(token, key)
    scheduler = SchedulerServer(
        token, key, StreamServer(arguments.host), find_policy(arguments.policy), arguments.window
    )
    scheduler.order = OrderStream(
        arguments.manager,
        scheduler.metadata,
        IslandId(arguments.island_id),
        lambda run_id: scheduler.handle(core.RunOrdered(run_id=run_id)),
    )
    scheduler.manager = pb_grpc.ResourceManagerStub(channel.open_channel(arguments.manager))
    # Before there are slices: from here on, no run that spans islands is ordered without this one.
    await scheduler.order.join()
    tasks = [asyncio.create_task(scheduler.tell_held(), name="held runs")]
    pb_grpc.add_SchedulerServicer_to_server(scheduler, server)
    address = await channel.start_server(server, arguments.host)
    with os.fdopen(arguments.ready_fd, "w") as pipe:
        pipe.write(json.dumps({"address": address}) + "\n")
    logger.info("ready at %s; waiting for slices of island %d", address, arguments.island_id)
    tasks.append(asyncio.create_task(server.wait_for_termination()))  # type: ignore[arg-type]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()  # our bug: to go on would leave somebody waiting for ever


def main() -> None:
    """Entry point of `python -m torchways.island`; started by a node agent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--island-id", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--manager", required=True, help="the resource manager's address")
    parser.add_argument("--policy", default="proportional_share", help="which client's run is next")
    parser.add_argument("--window", type=float, default=0.005, help="seconds of device time that are admitted ahead")
    parser.add_argument("--parent-pid", type=int, required=True)
    arguments = parser.parse_args()
    setup_process(f"scheduler i{arguments.island_id}")
    die_with_parent(arguments.parent_pid)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(serve(arguments))
