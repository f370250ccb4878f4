"""The executor process: gRPC in front of its engine (engine.py).

The asyncio loop turns messages into events, which the engine handles on its own thread, and writes checkpoints.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import psutil
import torch

from torchways.errors import Failure, TorchwaysError, UserError, failure_from
from torchways.executor import checkpoint_files, events
from torchways.executor.checkpoint_writer import CheckpointWriter
from torchways.executor.engine import Engine
from torchways.executor.fetches import Fetched
from torchways.executor.host_values import checked_put, checked_spec, put_event
from torchways.executor.local_values import LocalValues
from torchways.executor.reads import Reads
from torchways.executor.stalls import waiting_for
from torchways.ids import BufferId, ClientId, PartId, ProgramId, RunId, RunPart, SliceId
from torchways.link.stream import Stream, StreamServer
from torchways.observability.process import die_with_parent, precise_timers, setup_process
from torchways.rpc import channel, convert
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.identity import ClusterKey, Role, check_owner, take_cluster_key
from torchways.rpc.programs import arguments_from_bytes
from torchways.rpc.spans import Span, shown_to, trace_responses
from torchways.rpc.streams import offer, parsing
from torchways.runtime.base import Runtime

logger = logging.getLogger(__name__)

#: Of the runs in flight, those that the status says what they wait for.
_MAX_WAITING_FOR = 1_000
#: After that time without its scheduler an executor ends. Where its scheduler or its cluster has ended, or it is to end
#: itself, somebody has told it to before.
_ALONE_SECONDS = 5.0


class ExecutorServer(pb_grpc.ExecutorServicer):
    """See the module's docstring."""

    def __init__(self, key: ClusterKey, streams: StreamServer) -> None:
        self.key = key
        self._streams = streams
        self.loop = asyncio.get_running_loop()
        self.engine: Engine
        #: For events, on the engine's thread.
        self._scheduler: Stream | None = None
        #: Why the scheduler's stream has ended; "" while it has not.
        self._alone_because = ""
        self._checkpoint_writer = CheckpointWriter()
        self._num_messages = 0
        self._reads = Reads(lambda: self.engine)

    def report(self, reported: list[pb.ExecutorEvent]) -> None:
        """Sends the scheduler events, which follow from its commands; on the engine's thread."""
        if self._scheduler is not None:
            for event in reported:
                self._scheduler.send(event.SerializeToString())
            self._scheduler.flush()

    # ---- service

    async def Control(self, request: pb.OpenStream, context: grpc.aio.ServicerContext) -> None:
        """The scheduler's stream."""
        if self._alone_because:
            reason = f"it is ending, since the scheduler's stream has ended: {self._alone_because}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
        await offer(context, self._streams, self.engine.inbox, self._controlled)

    def _controlled(self) -> Stream:
        def ended(reason: str) -> None:
            self._note_end(stream, reason)

        stream = Stream(self.engine.inbox, parsing(pb.ExecutorCommand, self._take_command), ended)
        self._scheduler = self._scheduler or stream  # the first; others may give commands
        return stream

    def _note_end(self, stream: Stream, reason: str) -> None:
        logger.info("the scheduler's stream has ended: %s", reason)
        if stream is self._scheduler:
            # What was sent on it is lost: whatever came next would be out of order, or wait for ever. As a process that
            # has ended, this one is an error that users see, and is replaced.
            self._alone_because = reason
            timer = threading.Timer(_ALONE_SECONDS, _end_alone, [reason])
            timer.daemon = True
            timer.start()

    def _take_command(self, command: pb.ExecutorCommand) -> None:
        engine = self.engine
        self._num_messages += 1
        match command.WhichOneof("command"):
            case "enqueue":
                engine.post(_run_enqueued(command.enqueue))
            case "cancel_run":
                cancel = command.cancel_run
                run = RunPart(RunId(cancel.run_id), SliceId(cancel.slice_id))
                failure = convert.failure_from_proto(cancel.failure)
                engine.post(events.RunCancelled(run=run, failure=failure))
            case "held_runs":
                engine.fetches.clients_with_held_runs = {ClientId(c) for c in command.held_runs.client_ids}
            case "grant":
                run = RunPart(RunId(command.grant.run_id), SliceId(command.grant.slice_id))
                held_for = command.grant.held_for
                engine.post(events.UnitGranted(run=run, unit=command.grant.unit, held_for=held_for))
            case "refusal":
                run = RunPart(RunId(command.refusal.run_id), SliceId(command.refusal.slice_id))
                failure = convert.failure_from_proto(command.refusal.failure)
                engine.post(events.UnitRefused(run=run, unit=command.refusal.unit, failure=failure))
            case "set_grants_needed":
                grants = command.set_grants_needed
                engine.post(events.GrantsNeeded(needed=grants.needed, epoch=grants.epoch))
            case "load_program":
                engine.load(command.load_program)
            case "drop_buffers":
                ids = [BufferId(buffer_id) for buffer_id in command.drop_buffers.buffer_ids]
                engine.post(events.BuffersDropped(buffer_ids=ids))
            case "drop_program":
                engine.post(events.ProgramDropped(program_id=ProgramId(command.drop_program.program_id)))
            case "drop_slice":
                engine.post(events.SliceDropped(slice_id=SliceId(command.drop_slice.slice_id)))
            case "drop_client":
                engine.drop_client(ClientId(command.drop_client.client_id))

    async def PutBuffer(
        self, request_iterator: AsyncIterator[pb.PutChunk], context: grpc.aio.ServicerContext
    ) -> pb.PutResponse:
        """Stores a host value as a named buffer; returns when it is here."""
        chunks = aiter(request_iterator)
        first = await anext(chunks, None)
        if first is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "PutBuffer without a chunk")
            raise AssertionError
        value = first.value
        parts = [value.data]
        try:
            spec = checked_put(first, channel.caller(context, self.key).client_id, self.engine.num_devices)
            left = spec.nbytes - len(value.data)
            async for chunk in chunks:
                left -= len(chunk.more)
                if left < 0:
                    raise UserError(f"more came than the {spec.nbytes:,} bytes of {spec.form}")
                parts.append(chunk.more)
        except TorchwaysError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise AssertionError from error
        if len(parts) > 1:
            value.data = b"".join(parts)
        buffer_id, slice_id = BufferId(first.buffer_id), SliceId(first.slice_id)
        self.engine.post(put_event(buffer_id, slice_id, value, spec, for_run=first.for_run))
        return pb.PutResponse()

    async def ReadBuffers(self, request: pb.OpenStream, context: grpc.aio.ServicerContext) -> None:
        """A client's stream of reads; see reads.py."""
        client_id = channel.caller(context, self.key).client_id
        await offer(context, self._streams, self.engine.inbox, functools.partial(self._reads.open, client_id))

    async def SaveBuffers(
        self, request: pb.SaveRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.SaveResponse]:
        """Writes buffers to a file; see the service's definition."""
        copies: dict[BufferId, asyncio.Future[Failure | None]] = {}
        try:
            buffers = {buffer.name: (BufferId(buffer.buffer_id), buffer.spec) for buffer in request.buffers}
            specs = dict(buffers.values())  # once for tied parameters
            check_owner(channel.caller(context, self.key).client_id, ids=specs)
            checkpoint_files.check_place(os.path.join(request.folder, request.prefix))
            if os.path.basename(request.prefix) != request.prefix:
                raise UserError(f"{request.prefix!r} does not begin a file's name")
            self._checkpoint_writer.start()
            snapshot = self._checkpoint_writer.snapshot(specs)
            for buffer_id in specs:
                copies[buffer_id] = self._copy(buffer_id, functools.partial(snapshot.keep, buffer_id))
            # The fetches are in the engine's queue: who would donate these buffers comes behind, and waits for copies.
            yield pb.SaveResponse()

            def wait_for(name: str) -> None:
                copy = copies[buffers[name][0]]
                if copy.done():  # as most are: asking the loop for each would hold up computations
                    failure = copy.result()
                else:
                    failure = asyncio.run_coroutine_threadsafe(_result(copy), self.loop).result()
                if failure is not None:
                    raise failure.to_error()

            written = await asyncio.to_thread(
                self._checkpoint_writer.write, request.folder, request.prefix, buffers, snapshot, wait_for
            )
            # Only now: a copy that is under way when a save fails must not meet the next one's values.
            self._checkpoint_writer.give_back(snapshot)
            yield pb.SaveResponse(tensors=written)
        except (OSError, TorchwaysError) as error:
            yield pb.SaveResponse(failure=convert.failure_to_proto(self._file_failure(error)))
        finally:
            for copy in copies.values():
                copy.cancel()

    def _copy(self, buffer_id: BufferId, keep: Callable[[torch.Tensor], None]) -> asyncio.Future[Failure | None]:
        """Has `keep` take a copy of a buffer's value, on the engine's thread: what comes next may donate the buffer."""
        future: asyncio.Future[Failure | None] = self.loop.create_future()

        def fetched(found: Fetched | Failure) -> None:
            value = found if isinstance(found, Failure) else found.read()
            failure = value if isinstance(value, Failure) else None
            try:
                if not isinstance(value, Failure):
                    keep(value)
            except TorchwaysError as error:
                failure = self._file_failure(error)
            finally:
                if not isinstance(found, Failure):
                    found.end()
            self.loop.call_soon_threadsafe(_set_if_waiting, future, failure)

        fetch_id = self.engine.fetch(buffer_id, fetched)

        def ended(future: asyncio.Future[Failure | None]) -> None:
            if future.cancelled():
                self.engine.cancel_fetch(fetch_id)

        future.add_done_callback(ended)
        return future

    async def LoadBuffers(self, request: pb.LoadRequest, context: grpc.aio.ServicerContext) -> pb.LoadResponse:
        """Makes buffers of what is in files; see the service's definition."""
        try:
            client_id = channel.caller(context, self.key).client_id
            check_owner(client_id, ids=[BufferId(buffer.buffer_id) for buffer in request.buffers])
            for buffer in request.buffers:
                spec = checked_spec(buffer.spec, request.mesh_shape, self.engine.num_devices)
                for piece in buffer.pieces:
                    checkpoint_files.check_place(piece.file)
                data = await asyncio.to_thread(checkpoint_files.read, spec, buffer.pieces)
                self.engine.post(put_event(BufferId(buffer.buffer_id), SliceId(request.slice_id), data, spec))
        except Exception as error:  # files may hold anything
            return pb.LoadResponse(failure=convert.failure_to_proto(self._file_failure(error)))
        return pb.LoadResponse()

    def _file_failure(self, error: Exception) -> Failure:
        process = f"executor {self.engine.executor_id}"
        if isinstance(error, TorchwaysError):
            return failure_from(error, process=process)
        reason = error if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        return Failure(kind="CheckpointError", message=str(reason), process=process)

    async def GetStatus(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext) -> pb.ExecutorStatus:
        """Says how this executor does."""
        client_id = channel.caller(context, self.key).client_id
        return await asyncio.wrap_future(self.engine.run(lambda: self._status(client_id)))

    def _status(self, asking: ClientId) -> pb.ExecutorStatus:
        """`asking`: a client, which is told what its own runs wait for; 0: the resource manager."""
        state = self.engine.core
        buffers = [cell.buffer for cell in state.names.cells.values() if cell.buffer is not None]
        return pb.ExecutorStatus(
            executor_id=self.engine.executor_id,
            rss_bytes=psutil.Process().memory_info().rss,
            num_buffers=len(state.names.cells),
            buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in buffers),
            num_runs_in_flight=len(state.runs),
            num_messages=self._num_messages,
            num_compiled=self.engine.compiler.num_compiled,
            compile_seconds=self.engine.compiler.seconds,
            fallback_counters=self.engine.runtime.fallback_counters(),
            waiting_for=waiting_for(state, asking)[:_MAX_WAITING_FOR],
            budget_bytes=state.memory.budget_bytes,
            used_bytes=state.memory.used_bytes,
            stalls=[line for client_id, line in self.engine.stalls.lines() if asking in (0, client_id)],
            num_entries=self.engine.num_entries(),
            unended_seconds={
                int(client): ns / 1e9
                for client, ns in self.engine.spans.unended_ns(state.runs.values(), time.time_ns()).items()
                if asking in (0, client)
            },
            client_bytes={
                int(client): size for client, size in state.names.client_bytes().items() if asking in (0, client)
            },
        )

    async def CollectTrace(
        self, request: pb.TraceRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.TraceResponse]:
        """Returns the spans since a time."""
        caller = channel.caller(context, self.key)

        def spans(since_ns: int) -> list[Span]:
            found = self.engine.spans.log.since(since_ns)
            return shown_to(caller.client_id, found) if caller.role is Role.CLIENT else found

        for response in trace_responses(request, spans):
            yield response


def _end_alone(reason: str) -> None:
    logger.error("the scheduler's stream has ended (%s), and nobody ended this executor: ending", reason)
    os._exit(71)


def _set_if_waiting(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


async def _result(future: asyncio.Future[Failure | None]) -> Failure | None:
    return await future


def _run_enqueued(message: pb.Enqueue) -> events.RunEnqueued:
    return events.RunEnqueued(
        part=PartId(ProgramId(message.program_id), SliceId(message.slice_id)),
        run_id=RunId(message.run_id),
        sequence=message.sequence,
        time_ns=time.time_ns(),
        first_buffer_id=BufferId(message.first_buffer_id),
        arguments=arguments_from_bytes(message.arguments),
        cancelled=convert.failure_from_proto(message.failure) if message.HasField("failure") else None,
        checks_values=message.checks_values,
    )


async def serve(arguments: argparse.Namespace) -> None:
    """Runs the executor until it is told to end."""
    devices = [int(device) for device in arguments.devices.split(",")]
    runtime = _runtime(arguments, devices)
    # The libraries' objects live for ever. Each full collection would look at all of them, which holds up computations
    # for 0.3 s; reading a graph to be compiled makes enough objects for several.
    gc.collect()
    gc.freeze()
    token = channel.cluster_token()
    key = take_cluster_key()
    server = channel.make_server(token, key)
    executor = ExecutorServer(key, StreamServer(arguments.host))
    executor.engine = Engine(
        arguments.executor_id,
        runtime,
        arguments.set_size,
        arguments.host,
        executor.report,
        link_key=executor.key.derive("links"),
        budget_bytes=arguments.budget_bytes,
        client_bytes=arguments.client_bytes,
        client_programs=arguments.client_programs,
        memory_wait=arguments.memory_wait,
        gang=arguments.gang,
        stall_warning=arguments.stall_warning,
        place=_place(arguments.executor_id, devices),
    )
    local_values = LocalValues(token, key, arguments.set_size, executor.engine.post)
    pb_grpc.add_ExecutorServicer_to_server(executor, server)
    address = await channel.start_server(server, arguments.host)
    ready = {
        "executor_id": arguments.executor_id,
        "address": address,
        "data_address": executor.engine.data_plane.signed_address,
        "local_address": local_values.address,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "num_devices": len(devices),
        "lowered_ops": runtime.lowered_ops(),
        "platform": arguments.platform,
        "budget_bytes": executor.engine.core.memory.limit_bytes,  # what a program may take
    }
    with os.fdopen(arguments.ready_fd, "w") as pipe:
        pipe.write(json.dumps(ready) + "\n")
    logger.info("ready at %s; waiting for the scheduler", address)
    await server.wait_for_termination()


def _place(executor_id: str, devices: list[int]) -> str:
    """Returns what an executor has, for people."""
    island = executor_id.partition(".")[0].removeprefix("i")
    return f"island {island} {'device' if len(devices) == 1 else 'devices'} {' '.join(map(str, devices))}"


def _runtime(arguments: argparse.Namespace, devices: list[int]) -> Runtime:
    if arguments.simulator:
        from torchways.runtime.simulated import SimulatedRuntime

        return SimulatedRuntime(arguments.simulator, arguments.set_name, devices, arguments.num_hosts)
    # The import takes seconds: not before the arguments are known to be good.
    from torchways.runtime.xla import XlaRuntime

    return XlaRuntime(len(devices))


def main() -> None:
    """Entry point of `python -m torchways.executor`; started by a node agent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--executor-id", required=True)
    parser.add_argument("--devices", required=True, help="the island's devices of this host, by number")
    parser.add_argument("--set-size", type=int, required=True, help="devices of the set, on all hosts")
    parser.add_argument("--platform", default="cpu")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--budget-bytes", type=int, default=0)
    parser.add_argument("--client-bytes", type=int, default=0)
    parser.add_argument("--client-programs", type=int, default=1 << 30)
    parser.add_argument("--memory-wait", type=float, default=60.0)
    parser.add_argument("--stall-warning", type=float, default=30.0)
    parser.add_argument("--gang", action="store_true", help="one of several hosts that compute together")
    parser.add_argument("--simulator", default="", help="address of the island's simulated devices")
    parser.add_argument("--set-name", default="", help="of the set of devices, for simulated devices")
    parser.add_argument("--num-hosts", type=int, default=1, help="of the set of devices, for simulated devices")
    parser.add_argument("--parent-pid", type=int, required=True)
    arguments = parser.parse_args()
    setup_process(f"executor {arguments.executor_id}")
    die_with_parent(arguments.parent_pid)
    precise_timers()
    # Device threads may be anywhere in native code; what this process holds dies with it.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    asyncio.run(serve(arguments))
