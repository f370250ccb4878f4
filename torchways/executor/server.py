"""The executor process: carries out what the core (state.py) commands, on the devices of one slice.

One asyncio loop alone touches the core. One thread owns the PJRT client (compile, place, enqueue, copy to the host what
is computed), and each link of the data plane has its own; all report back to the loop.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import logging
import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import psutil
import torch

from torchways.errors import CaptureError, Failure, failure_from
from torchways.executor import state as core
from torchways.executor.transfer import DataPlane, Outgoing
from torchways.ids import BufferId, ClientId, ProgramId, RunId, owner
from torchways.observability.process import die_with_parent, setup_process
from torchways.rpc import channel, convert
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.runtime.base import BufferSpec, Runtime

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 4 << 20
#: A fetch may overtake the run that makes its buffer; longer than this it waits only for a run that is known.
_UNKNOWN_BUFFER_SECONDS = 60.0
_MAX_SPANS = 50_000


class _Worker:
    """A thread that runs what it is given, in order."""

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Callable[[], None]) -> None:
        """Runs `work` after all that was submitted before."""
        self._queue.put(work)

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            try:
                work()
            except Exception:
                logger.exception("a task of the executor failed")


class _Program:
    """What the server keeps of a loaded program beside the core's view."""

    def __init__(self, message: pb.LoadProgram) -> None:
        self.message = message
        self.loaded = _loaded(message)
        self.slots = [_spec(slot) for slot in message.program.slots]
        #: By position of the instruction: two calls of one function may donate differently.
        self.executables: dict[int, Any] = {}


class ExecutorServer(pb_grpc.ExecutorServicer):
    """See the module's docstring."""

    def __init__(self, executor_id: str, runtime: Runtime, num_devices: int, host: str) -> None:
        self.executor_id = executor_id
        self.runtime = runtime
        self.num_devices = num_devices
        self.loop = asyncio.get_running_loop()
        self.core = core.ExecutorState(executor_id)
        self.data_plane = DataPlane(executor_id, host, self._on_arrived, self._on_lost)
        self._programs: dict[ProgramId, _Program] = {}
        #: Programs that were dropped but still have runs in flight.
        self._dropped: set[ProgramId] = set()
        self._devices = _Worker("pjrt")
        self._events: asyncio.Queue[pb.ExecutorEvent] | None = None
        self._unsent: list[pb.ExecutorEvent] = []
        self._fetches: dict[int, asyncio.Future[core.Cell]] = {}
        self._next_fetch = 0
        self._num_messages = 0
        self._spans: collections.deque[pb.Span] = collections.deque(maxlen=_MAX_SPANS)
        self._device_free_ns = 0

    # ---- the core

    def handle(self, event: core.Event) -> None:
        """Gives the core an event and carries out its commands. On the loop."""
        try:
            self._carry_out(self.core.handle(event))
        except Exception:
            # Our bug. To go on would leave somebody waiting for ever: a lost executor is an error that users see.
            logger.exception("the executor's core failed on %s; ending", type(event).__name__)
            os._exit(70)

    def _carry_out(self, commands: list[core.Command]) -> None:
        for command in commands:
            match command:
                case core.Execute():
                    self._devices.submit(lambda command=command: self._execute(command))  # type: ignore[misc]
                case core.Place():
                    self._devices.submit(lambda command=command: self._place(command))  # type: ignore[misc]
                case core.Send():
                    self._send(command)
                case core.Deliver():
                    future = self._fetches.pop(command.fetch_id, None)
                    if future is not None and not future.done():
                        future.set_result(command.cell)
                    else:
                        self.post(core.FetchEnded(fetch_id=command.fetch_id, cell=command.cell))
                case core.Compile():
                    self._devices.submit(lambda command=command: self._compile(command.program_id))  # type: ignore[misc]
                case core.ReportEnded():
                    self._report(pb.ExecutorEvent(run_ended=pb.RunEnded(run_id=command.run_id)), command.failure)
                    if self._dropped:
                        self._forget_dropped()
                case core.ReportLoaded():
                    loaded = pb.ProgramLoaded(program_id=command.program_id)
                    self._report(pb.ExecutorEvent(program_loaded=loaded), command.failure)

    def post(self, event: core.Event) -> None:
        """Gives the core an event, from any thread."""
        self.loop.call_soon_threadsafe(self.handle, event)

    def _report(self, event: pb.ExecutorEvent, failure: Failure | None) -> None:
        if failure is not None:
            part = event.run_ended if event.HasField("run_ended") else event.program_loaded
            part.failure.CopyFrom(convert.failure_to_proto(failure))
        if self._events is None:
            self._unsent.append(event)
        else:
            self._events.put_nowait(event)

    # ---- on the device thread

    def _compile(self, program_id: ProgramId) -> None:
        program = self._programs.get(program_id)
        if program is None:  # dropped before any run
            return
        name = program.message.name
        failure = None
        started = time.time_ns()
        try:
            for position, step in enumerate(program.loaded.instructions):
                if isinstance(step, core.ComputeInstruction) and failure is None:
                    failure = self._compile_step(program, position, step)
        except Exception as error:
            failure = self._failure("RemoteError", f"{name} could not be compiled: {error}", error)
        self._note(f"compile {name}", "host", started, time.time_ns(), 0)
        logger.info("compiled %s in %.2f s", name, (time.time_ns() - started) / 1e9)
        self.post(core.ProgramCompiled(program_id=program_id, failure=failure))

    def _compile_step(self, program: _Program, position: int, step: core.ComputeInstruction) -> Failure | None:
        function = program.message.program.functions[step.function_index]
        try:
            executable = self.runtime.compile(
                function.graph,
                [program.slots[slot] for slot in step.inputs],
                [program.slots[slot] for slot in step.outputs],
                step.donated,
            )
        except CaptureError as error:
            return failure_from(error, process=f"executor {self.executor_id}")
        except Exception as error:
            message = f"compiled function {function.name} could not be compiled: {error}"
            return self._failure("RemoteError", message, error, function.name, function.source)
        program.executables[position] = executable
        return None

    def _execute(self, command: core.Execute) -> None:
        program = self._programs[command.program_id]
        function = program.message.program.functions[command.function_index]
        run_id = command.step.run.run_id
        issued = time.time_ns()
        try:
            outputs = self.runtime.execute(program.executables[command.step.position], command.inputs)
        except Exception as error:
            message = f"compiled function {function.name} failed: {error}"
            failure = self._failure("RemoteError", message, error, function.name, function.source, run_id)
            self.post(core.ComputationEnqueued(step=command.step, outputs=(), failure=failure))
            return
        self.post(core.ComputationEnqueued(step=command.step, outputs=outputs))

        def finished() -> None:
            ended = time.time_ns()
            started = max(issued, self._device_free_ns)
            self._device_free_ns = ended
            for device in range(self.num_devices):
                self._note(function.name, f"device {device}", started, ended, run_id)
            self.post(core.ComputationFinished(step=command.step))

        self.runtime.on_ready(outputs, finished)

    def _place(self, command: core.Place) -> None:
        spec = self._programs[command.program_id].slots[command.slot]
        try:
            buffer = self._to_device(command.data, spec)
            self.post(core.CellFilled(cell=command.cell, buffer=buffer))
        except Exception as error:
            failure = self._failure("RemoteError", f"a value of shape {spec.shape} could not be placed: {error}", error)
            self.post(core.CellFilled(cell=command.cell, buffer=None, failure=failure))

    def _to_device(self, data: pb.HostValue | torch.Tensor, spec: BufferSpec) -> Any:
        if isinstance(data, torch.Tensor):  # bytes from a peer
            return self.runtime.put(_typed(data, spec), spec.placements)
        if data.WhichOneof("content") == "fill":
            return self.runtime.fill(spec, data.fill)
        return self.runtime.put(_typed(_byte_tensor(data.data), spec), spec.placements)

    # ---- transfers

    def _send(self, command: core.Send) -> None:
        buffer, run_id = command.buffer, command.run_id
        started = time.time_ns()

        def sent(failure: Failure | None) -> None:
            self._note(f"send edge {command.edge_id} to {command.peer}", "transfer", started, time.time_ns(), run_id)
            self.post(core.TransferSent(step=command.step, failure=failure))

        outgoing = Outgoing(
            run_id=run_id,
            edge_id=command.edge_id,
            read=None if command.failure is not None else lambda: host[0],
            failure=command.failure,
            on_sent=sent,
        )
        host: list[torch.Tensor] = []

        def copy_and_send() -> None:
            host.append(self.runtime.to_host(buffer))
            self.data_plane.send(command.peer, outgoing)

        if command.failure is not None:
            self.data_plane.send(command.peer, outgoing)
        else:  # copied when computed, so that what is ready first goes first
            self._when_computed(buffer, copy_and_send)

    def _when_computed(self, buffer: Any, work: Callable[[], None]) -> None:
        """Runs `work` on the device thread once a buffer is computed."""
        self._devices.submit(lambda: self.runtime.on_ready([buffer], lambda: self._devices.submit(work)))

    def _on_arrived(self, run_id: RunId, edge_id: int, data: torch.Tensor | None, failure: Failure | None) -> None:
        now = time.time_ns()
        self._note(f"receive edge {edge_id}", "transfer", now, now, run_id)
        self.post(core.TransferArrived(run_id=run_id, edge_id=edge_id, data=data, failure=failure))

    def _on_lost(self, peer: str, reason: str) -> None:
        failure = self._failure("ExecutorLost", f"executor {peer} is lost: {reason}")
        self.post(core.PeerLost(peer=peer, failure=failure))

    # ---- service

    async def Control(
        self, request_iterator: AsyncIterator[pb.ExecutorCommand], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ExecutorEvent]:
        """The scheduler's stream."""
        self._events = asyncio.Queue()
        for event in self._unsent:
            self._events.put_nowait(event)
        self._unsent.clear()
        reading = asyncio.create_task(self._read_commands(request_iterator), name="control")
        try:
            while True:
                getting = asyncio.create_task(self._events.get(), name="next event")
                await asyncio.wait({getting, reading}, return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    getting.cancel()
                    reading.result()
                    return
                yield getting.result()
        finally:
            reading.cancel()
            self._events = None

    async def _read_commands(self, commands: AsyncIterator[pb.ExecutorCommand]) -> None:
        async for command in commands:
            self._num_messages += 1
            match command.WhichOneof("command"):
                case "enqueue":
                    self._enqueue(command.enqueue)
                case "load_program":
                    self._load(command.load_program)
                case "drop_buffers":
                    ids = [BufferId(buffer_id) for buffer_id in command.drop_buffers.buffer_ids]
                    self.handle(core.BuffersDropped(buffer_ids=ids))
                case "drop_program":
                    self._dropped.add(ProgramId(command.drop_program.program_id))
                    self.handle(core.ProgramDropped(program_id=ProgramId(command.drop_program.program_id)))
                    self._forget_dropped()
                case "drop_client":
                    client_id = ClientId(command.drop_client.client_id)
                    self._dropped.update(key for key in self._programs if owner(key) == client_id)
                    self.handle(core.ClientDropped(client_id=client_id))
                    self._forget_dropped()

    def _forget_dropped(self) -> None:
        """Frees what was compiled for dropped programs once their last run is over."""
        for program_id in [key for key in self._dropped if not self.core.is_needed(key)]:
            self._dropped.discard(program_id)
            self._programs.pop(program_id, None)

    def _enqueue(self, message: pb.Enqueue) -> None:
        self.handle(
            core.RunEnqueued(
                program_id=ProgramId(message.program_id),
                run_id=RunId(message.run_id),
                sequence=message.sequence,
                first_buffer_id=BufferId(message.first_buffer_id),
                arguments=[
                    a.buffer_id if a.WhichOneof("source") == "buffer_id" else a.value for a in message.arguments
                ],
            )
        )

    def _load(self, message: pb.LoadProgram) -> None:
        program = _Program(message)
        self._programs[ProgramId(message.program_id)] = program
        for peer in message.program.peers:
            self.data_plane.connect(peer.executor_id, peer.data_address)
        self.handle(core.ProgramArrived(program=program.loaded))

    async def PutBuffer(
        self, request_iterator: AsyncIterator[pb.PutChunk], context: grpc.aio.ServicerContext
    ) -> pb.PutResponse:
        """Stores a host value as a named buffer; returns when it is on the device."""
        first: pb.PutChunk | None = None
        parts: list[bytes] = []
        async for chunk in request_iterator:
            if first is None:
                first = chunk
            else:
                parts.append(chunk.more)
        if first is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "PutBuffer without a chunk")
            raise AssertionError
        value = first.value
        if parts:
            value.data = b"".join([value.data, *parts])
        spec, buffer_id = _spec(value.spec), BufferId(first.buffer_id)
        done = self.loop.create_future()

        def place() -> None:
            failure, buffer = None, None
            try:
                buffer = self._to_device(value, spec)
            except Exception as error:
                failure = self._failure(
                    "RemoteError", f"a value of shape {spec.shape} could not be placed: {error}", error
                )
            self.post(core.BufferPut(buffer_id=buffer_id, buffer=buffer, failure=failure))
            self.loop.call_soon_threadsafe(done.set_result, None)

        self._devices.submit(place)
        await done
        return pb.PutResponse()

    async def FetchBuffer(
        self, request: pb.FetchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.FetchChunk]:
        """Waits for a buffer and streams it."""
        buffer_id = BufferId(request.buffer_id)
        if request.only_ready:
            yield pb.FetchChunk(ready=await self._is_computed(buffer_id))
            return
        cell = await self._settled_cell(buffer_id)
        if isinstance(cell, Failure):
            yield pb.FetchChunk(failure=convert.failure_to_proto(cell))
            return
        try:
            if cell.failure is not None:
                yield pb.FetchChunk(failure=convert.failure_to_proto(cell.failure))
                return
            host = await self._host_copy(cell.buffer)
        finally:
            self.handle(core.FetchEnded(fetch_id=-1, cell=cell))
        dtype = str(host.dtype).removeprefix("torch.")
        data = host.contiguous().reshape(-1).view(torch.uint8).numpy().data
        yield pb.FetchChunk(
            spec=pb.TensorSpec(dtype=dtype, shape=host.shape), ready=True, data=bytes(data[:_CHUNK_BYTES])
        )
        for start in range(_CHUNK_BYTES, len(data), _CHUNK_BYTES):
            yield pb.FetchChunk(data=bytes(data[start : start + _CHUNK_BYTES]))

    async def _settled_cell(self, buffer_id: BufferId) -> core.Cell | Failure:
        """Waits until a buffer is filled or poisoned; the core counts a read until FetchEnded."""
        self._next_fetch += 1
        fetch_id = self._next_fetch
        future: asyncio.Future[core.Cell] = self.loop.create_future()
        self._fetches[fetch_id] = future
        self.handle(core.FetchRequested(fetch_id=fetch_id, buffer_id=buffer_id))
        try:
            while True:
                done, _ = await asyncio.wait({future}, timeout=_UNKNOWN_BUFFER_SECONDS)
                if done:
                    return future.result()
                if not self.core.runs:
                    message = f"buffer {buffer_id} was awaited for {_UNKNOWN_BUFFER_SECONDS:g} s but no run makes it"
                    return self._failure("DeadlineExceeded", message)
                logger.info("a fetch of buffer %d waits; runs: %s", buffer_id, self.core.waiting_for()[:4])
        finally:
            self._fetches.pop(fetch_id, None)

    async def _host_copy(self, buffer: Any) -> torch.Tensor:
        future: asyncio.Future[torch.Tensor] = self.loop.create_future()

        def copy() -> None:
            try:
                host = self.runtime.to_host(buffer)
                self.loop.call_soon_threadsafe(_set_if_waiting, future, host, None)
            except Exception as error:
                self.loop.call_soon_threadsafe(_set_if_waiting, future, None, error)

        self._when_computed(buffer, copy)
        return await future

    async def _is_computed(self, buffer_id: BufferId) -> bool:
        cell = self.core.named.get(buffer_id)
        if cell is None or not cell.is_settled:
            return False
        if cell.failure is not None:
            return True
        event = asyncio.Event()

        def ready() -> None:
            self.loop.call_soon_threadsafe(event.set)

        self._when_computed(cell.buffer, ready)
        try:
            await asyncio.wait_for(event.wait(), 0.02)
        except TimeoutError:
            return False
        return True

    async def GetStatus(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext) -> pb.ExecutorStatus:
        """Says how this executor does."""
        buffers = [cell.buffer for cell in self.core.named.values() if cell.buffer is not None]
        return pb.ExecutorStatus(
            executor_id=self.executor_id,
            rss_bytes=psutil.Process().memory_info().rss,
            num_buffers=len(self.core.named),
            buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in buffers),
            num_runs_in_flight=len(self.core.runs),
            num_messages=self._num_messages,
            fallback_counters=self.runtime.fallback_counters(),
            waiting_for=self.core.waiting_for(),
        )

    async def CollectTrace(self, request: pb.TraceRequest, context: grpc.aio.ServicerContext) -> pb.TraceResponse:
        """Returns the spans since a time."""
        return pb.TraceResponse(spans=[span for span in list(self._spans) if span.end_ns >= request.since_ns])

    # ---- helpers

    def _note(self, name: str, track: str, start_ns: int, end_ns: int, run_id: int) -> None:
        self._spans.append(pb.Span(name=name, track=track, start_ns=start_ns, end_ns=end_ns, run_id=run_id))

    def _failure(
        self,
        kind: str,
        message: str,
        error: BaseException | None = None,
        function: str = "",
        source: str = "",
        run_id: int = 0,
    ) -> Failure:
        lines = "".join(traceback.format_exception(error)) if error is not None else ""
        return Failure(
            kind=kind,
            message=message,
            function=function,
            source=source,
            traceback=lines,
            run_id=run_id,
            process=f"executor {self.executor_id}",
        )


def _set_if_waiting(future: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


def _spec(message: pb.TensorSpec) -> BufferSpec:
    return BufferSpec(dtype=message.dtype, shape=tuple(message.shape), placements=tuple(message.placements))


def _byte_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _typed(data: torch.Tensor, spec: BufferSpec) -> torch.Tensor:
    return data.view(spec.torch_dtype).reshape(spec.shape)


def _loaded(message: pb.LoadProgram) -> core.LoadedProgram:
    part = message.program
    instructions: list[core.Instruction] = []
    for item in part.instructions:
        match item.WhichOneof("instruction"):
            case "compute":
                instructions.append(
                    core.ComputeInstruction(
                        function_index=item.compute.function_id,
                        inputs=tuple(item.compute.inputs),
                        outputs=tuple(item.compute.outputs),
                        donated=tuple(item.compute.donated),
                    )
                )
            case "send":
                send = item.send
                instructions.append(core.SendInstruction(slot=send.slot, edge_id=send.edge_id, peer=send.peer))
            case "receive":
                receive = item.receive
                instructions.append(
                    core.ReceiveInstruction(slot=receive.slot, edge_id=receive.edge_id, peer=receive.peer)
                )
            # "free" needs no instruction here: the core counts the reads that are left of each slot.
    return core.LoadedProgram(
        program_id=ProgramId(message.program_id),
        name=message.name,
        num_slots=len(part.slots),
        num_args=part.num_args,
        instructions=tuple(instructions),
        results=tuple((result.slot, result.result_index) for result in part.results),
    )


async def serve(arguments: argparse.Namespace) -> None:
    """Runs the executor until it is told to end."""
    from torchways.runtime.xla import XlaRuntime  # takes seconds: not before the arguments are known to be good

    shape = [int(size) for size in arguments.shape.split(",")]
    runtime = XlaRuntime(shape, arguments.axis_names.split(","))
    token = channel.cluster_token()
    server = channel.make_server(token)
    executor = ExecutorServer(arguments.executor_id, runtime, torch.Size(shape).numel(), arguments.host)
    pb_grpc.add_ExecutorServicer_to_server(executor, server)
    address = await channel.start_server(server, arguments.host)
    ready = {
        "executor_id": arguments.executor_id,
        "address": address,
        "data_address": executor.data_plane.address,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "num_devices": executor.num_devices,
        "lowered_ops": runtime.lowered_ops(),
        "platform": arguments.platform,
    }
    with os.fdopen(arguments.ready_fd, "w") as pipe:
        pipe.write(json.dumps(ready) + "\n")
    logger.info("ready at %s; waiting for the scheduler", address)
    await server.wait_for_termination()


def main() -> None:
    """Entry point of `python -m torchways.executor`; started by a node agent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--executor-id", required=True)
    parser.add_argument("--slice-id", type=int, required=True)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--axis-names", required=True)
    parser.add_argument("--platform", default="cpu")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--parent-pid", type=int, required=True)
    arguments = parser.parse_args()
    setup_process(f"executor {arguments.executor_id}")
    die_with_parent(arguments.parent_pid)
    # Device threads may be anywhere in native code; what this process holds dies with it.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    asyncio.run(serve(arguments))
