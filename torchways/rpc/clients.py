"""The controller's ends of the services: plain values in and out, protobuf inside.

All methods run on the session's event loop, unless they say otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeAlias

import grpc
import grpc.aio

from torchways.errors import DeadlineExceeded, Failure, InfraError, TorchwaysError
from torchways.ids import BufferId, ClientId, IslandId, ProgramId, RunId, SliceId
from torchways.link.connection import LoopWaiter
from torchways.link.opening import LinkError
from torchways.link.stream import Stream
from torchways.mesh import Placements, VirtualSlice
from torchways.rpc import channel, convert
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.identity import IDENTITY_KEY, TOKEN_KEY, Caller, Role, metadata
from torchways.rpc.local_values import LocalExecutor, ValueFile
from torchways.rpc.programs import InlineValue, host_value
from torchways.rpc.reads import ReadStream
from torchways.rpc.spans import Span, collect, trace_responses
from torchways.rpc.streams import open_offered, parsing

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 4 << 20
_CALL_SECONDS = 30.0

#: Of a call.
Metadata: TypeAlias = tuple[tuple[str, str], ...]
Explain: TypeAlias = Callable[[str, grpc.aio.AioRpcError], Awaitable[TorchwaysError]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorAddress:
    """Where an executor is and what it can do. `budget_bytes` is the memory of a device; 0: no limit."""

    executor_id: str
    address: str
    data_address: str
    pid: int
    lowered_ops: frozenset[str]
    budget_bytes: int = 0
    local_address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceAddress:
    """Where a slice lives."""

    slice_id: SliceId
    island_id: IslandId
    scheduler_address: str
    executors: tuple[ExecutorAddress, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class IslandInfo:
    """One island of the cluster.

    Attributes:
        island: number of the island.
        platform: "cpu", "tpu" or "simulated".
        num_devices: number of devices, the most that a slice of the island can have.
    """

    island: IslandId
    platform: str
    num_devices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterInfo:
    """The islands and processes of a cluster.

    Attributes:
        islands: in the order of their numbers.
        processes: name and pid of every process of the cluster.
    """

    islands: tuple[IslandInfo, ...]
    processes: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorStatus:
    """The state of one executor.

    Attributes:
        executor_id: name of the executor.
        rss_bytes: resident memory of its process.
        num_buffers, buffer_bytes: logical buffers that clients hold, and their size.
        num_runs_in_flight: runs that have not finished.
        num_messages: commands received.
        fallback_counters: operators that torch-xla ran on the host, with their counts.
        waiting_for: what each run of this session in flight waits for, as text.
        budget_bytes, used_bytes: memory budget of a device (0 means no limit), and how much of it is used.
        client_bytes: bytes per device of the buffers of each client; a client is told of its own only.
        num_compiled, compile_seconds: functions compiled since the start, and the time it took.
        num_entries: size of each internal collection, to find leaks.
        stalls: runs of this session that have made no progress for `ClusterConfig.stall_warning`, and why.
    """

    executor_id: str
    rss_bytes: int
    num_buffers: int
    buffer_bytes: int
    num_runs_in_flight: int
    num_messages: int
    fallback_counters: dict[str, int]
    waiting_for: tuple[str, ...]
    budget_bytes: int
    used_bytes: int
    client_bytes: dict[int, int]
    num_compiled: int
    compile_seconds: float
    num_entries: dict[str, int]
    stalls: tuple[str, ...] = ()


class ManagerClient:
    """The resource manager, as the controller sees it."""

    def __init__(self, address: str, token: str) -> None:
        self._channel = channel.open_channel(address)
        self._stub = pb_grpc.ResourceManagerStub(self._channel)
        self._token = token
        #: Of calls: a newcomer's until this client is attached.
        self.metadata = metadata(token)
        self._address = address
        self.client_id = ClientId(0)
        #: Answers to the resource manager that are under way.
        self._answers: set[asyncio.Task[None]] = set()

    async def attach(
        self,
        name: str,
        share: tuple[float, int],
        on_executor_lost: Callable[[str, str], None],
        on_closing: Callable[[str], None],
        spans: Callable[[int], Sequence[Span]],
    ) -> asyncio.Task[None]:
        """Opens the stream that keeps this client's slices; returns the task that reads it.

        Args:
            name: of the client, for people.
            share: its weight and priority.
            on_executor_lost: called with an executor of its slices, and why it is lost.
            on_closing: called with the reason when the cluster ends the session, or cannot be reached.
            spans: returns this client's own spans since a time; an operator who traces the cluster gets them.
        """
        request = pb.AttachRequest(name=name, weight=share[0], priority=share[1])
        stream = self._stub.Attach(request, metadata=self.metadata)
        try:
            first = await asyncio.wait_for(stream.read(), _CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise channel.lost(f"the resource manager at {self._address}", error) from error
        except TimeoutError as error:
            raise DeadlineExceeded(f"the resource manager at {self._address} did not answer in 30 s") from error
        _raise_failure(first.attached)
        self.client_id = ClientId(first.attached.client_id)
        self.metadata = metadata(self._token, Caller(Role.CLIENT, self.client_id), first.attached.secret)

        async def read() -> None:
            try:
                while (event := await stream.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                    match event.WhichOneof("event"):
                        case "executor_lost":
                            on_executor_lost(event.executor_lost.executor_id, event.executor_lost.reason)
                        case "closing":
                            on_closing(event.closing.reason)
                        case "trace_wanted":
                            answering = asyncio.create_task(self._answer(event.trace_wanted, spans), name="trace")
                            self._answers.add(answering)
                            answering.add_done_callback(self._answers.discard)
                on_closing("the resource manager ended the session")
            except grpc.aio.AioRpcError as error:
                on_closing(f"the resource manager cannot be reached ({error.code().name})")

        return asyncio.create_task(read(), name="attach")

    async def _answer(self, wanted: pb.TraceWanted, spans: Callable[[int], Sequence[Span]]) -> None:
        """Sends the resource manager this client's spans, or its time."""
        responses = trace_responses(wanted.request, spans)
        answers = (pb.TraceAnswer(number=wanted.number, response=response) for response in responses)
        try:
            await self._stub.AnswerTrace(answers, metadata=self.metadata, timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:  # it waits no longer, or is gone, which `read` tells
            logger.info("this client's spans are not in a trace: %s", error.details())

    async def reserve_slice(
        self, shape: Sequence[int], axis_names: Sequence[str], island: int | None
    ) -> tuple[SliceId, IslandId]:
        """Asks for a slice; returns its id and island. Its executors may still be starting."""
        response = await self._call(
            self._stub.ReserveSlice,
            pb.ReserveSliceRequest(shape=shape, axis_names=axis_names, island_id=island),
        )
        if response.WhichOneof("result") == "failure":
            raise convert.failure_from_proto(response.failure).to_error()
        return SliceId(response.reservation.slice_id), IslandId(response.reservation.island_id)

    async def wait_slice(self, slice_id: SliceId, timeout: timedelta) -> SliceAddress:
        """Waits until a slice's executors are ready."""
        info = await self._call(self._stub.WaitSlice, pb.WaitSliceRequest(slice_id=slice_id), timeout.total_seconds())
        if info.HasField("failure"):
            raise convert.failure_from_proto(info.failure).to_error()
        executors = tuple(
            ExecutorAddress(
                executor_id=executor.executor_id,
                address=executor.address,
                data_address=executor.data_address,
                pid=executor.pid,
                lowered_ops=frozenset(executor.lowered_ops),
                budget_bytes=executor.budget_bytes,
                local_address=executor.local_address,
            )
            for executor in info.executors
        )
        return SliceAddress(
            slice_id=slice_id,
            island_id=IslandId(info.island_id),
            scheduler_address=info.scheduler_address,
            executors=executors,
        )

    async def release_slice(self, slice_id: SliceId, *, scheduler_knows: bool) -> None:
        """Gives a slice back; `scheduler_knows` from us (`close_message`), behind the slice's last run."""
        request = pb.ReleaseSliceRequest(slice_id=slice_id, scheduler_knows=scheduler_knows)
        await self._call(self._stub.ReleaseSlice, request)

    async def start_data_process(self, slice_id: SliceId) -> int:
        """Has a data process started beside a slice's executors; returns its number."""
        response = await self._call(self._stub.StartDataProcess, pb.StartDataProcessRequest(slice_id=slice_id))
        if response.WhichOneof("result") == "failure":
            raise convert.failure_from_proto(response.failure).to_error()
        return int(response.process_id)

    async def wait_data_process(self, process_id: int, timeout: timedelta) -> str:
        """Waits until a data process is ready; returns its address.

        Raises:
            DataProcessLost: it has ended.
        """
        request = pb.WaitDataProcessRequest(process_id=process_id)
        info = await self._call(self._stub.WaitDataProcess, request, timeout.total_seconds())
        if info.HasField("failure"):
            raise convert.failure_from_proto(info.failure).to_error()
        return str(info.address)

    async def end_data_process(self, process_id: int) -> None:
        """Ends a data process."""
        await self._call(self._stub.EndDataProcess, pb.EndDataProcessRequest(process_id=process_id))

    async def describe(self) -> ClusterInfo:
        """Returns what the cluster consists of."""
        info = await self._call(self._stub.DescribeCluster, pb.DescribeClusterRequest())
        return ClusterInfo(
            islands=tuple(
                IslandInfo(island=IslandId(i.island_id), platform=i.platform, num_devices=i.num_devices)
                for i in info.islands
            ),
            processes=tuple((process.name, process.pid) for process in info.processes),
        )

    async def _call(self, method, request, seconds: float = _CALL_SECONDS):  # type: ignore[no-untyped-def]
        try:
            return await method(request, metadata=self.metadata, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineExceeded(f"the resource manager did not answer {request!r} in {seconds:g} s") from error
            raise channel.lost(f"the resource manager at {self._address}", error) from error

    async def close(self) -> None:
        """Closes the channel, which ends the client's lease."""
        for answering in list(self._answers):
            answering.cancel()
        await self._channel.close(None)


class SchedulerClient:
    """One island's gang scheduler: an ordered stream of messages out, completions in.

    Args:
        address: of its calls.
        metadata: who calls.
        on_program_ready: called with a program that is compiled everywhere, or why it is not.
        on_run_finished: called with a run that is over, and its failure.
        on_lost: called once, with the reason, when the stream ends otherwise than by `close`.
    """

    def __init__(
        self,
        address: str,
        metadata: Metadata,
        on_program_ready: Callable[[ProgramId, Failure | None], None],
        on_run_finished: Callable[[RunId, Failure | None], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._channel = channel.open_channel(address)
        self._metadata = metadata
        self._stub = pb_grpc.SchedulerStub(self._channel)
        self._address = address
        self._on_program_ready = on_program_ready
        self._on_run_finished = on_run_finished
        self._on_lost = on_lost
        waiter = LoopWaiter(asyncio.get_running_loop())
        self._stream = Stream(waiter, parsing(pb.SchedulerMessage, self._take), self._lost)
        #: Messages sent so far, by kind; what a test counts.
        self.num_sent: dict[str, int] = {}

    def send(self, message: pb.ClientMessage) -> None:
        """Queues a message, which goes out with `flush`; order is kept. May be called on any thread."""
        kind = message.WhichOneof("message") or ""
        self.num_sent[kind] = self.num_sent.get(kind, 0) + 1
        self._stream.send(message.SerializeToString())

    def flush(self) -> None:
        """Sends what is queued. On the main thread it must not be interrupted by signals; see `Stream`."""
        self._stream.flush()

    async def connect(self) -> None:
        """Opens the stream. What is sent before goes out then."""
        try:
            connecting = self._stub.Connect(pb.OpenStream(), metadata=self._metadata)
            await open_offered(connecting, self._stream, _CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            self._lost(f"{error.code().name}: {error.details()}")
        except LinkError as error:
            self._lost(str(error))

    def _lost(self, reason: str) -> None:
        self._on_lost(f"the gang scheduler at {self._address} cannot be reached ({reason})")

    def _take(self, message: pb.SchedulerMessage) -> None:
        match message.WhichOneof("message"):
            case "run_finished":
                self._on_run_finished(RunId(message.run_finished.run_id), _failure(message.run_finished))
            case "program_ready":
                self._on_program_ready(ProgramId(message.program_ready.program_id), _failure(message.program_ready))

    async def trace(self, since_ns: int) -> list[Span]:
        """Returns the spans that ended after a time, by our clock."""
        return await _spans(self._stub, self._metadata, since_ns)

    async def close(self) -> None:
        """Ends the stream."""
        self._stream.close()
        await self._channel.close(None)


class ExecutorClient:
    """One executor: values in and out.

    Args:
        executor: which one.
        metadata: who asks.
        explain: returns the error of reads whose executor, by its id, cannot be reached.
    """

    def __init__(self, executor: ExecutorAddress, metadata: Metadata, explain: Explain) -> None:
        self.executor_id = executor.executor_id
        self._channel = channel.open_channel(executor.address)
        self._stub = pb_grpc.ExecutorStub(self._channel)
        self._metadata = metadata
        known = dict(metadata)
        self._local = LocalExecutor(executor.local_address, known[TOKEN_KEY], known[IDENTITY_KEY])
        #: For reads on any thread.
        self.reads = ReadStream(self._stub, metadata, functools.partial(explain, self.executor_id))

    async def put(
        self, buffer_id: BufferId, value: InlineValue, slice_id: SliceId, mesh: Sequence[int], *, for_run: bool
    ) -> None:
        """Stores a host value as a named buffer of a slice.

        Args:
            buffer_id: of the buffer.
            value: what it holds.
            slice_id: of its slice.
            mesh: the sizes of the slice's axes.
            for_run: one run takes it, and it needs no place on the devices before.

        Raises:
            TorchwaysError: the executor refuses it.
            grpc.aio.AioRpcError: the executor cannot be reached.
        """
        first = pb.PutChunk(
            buffer_id=buffer_id, slice_id=slice_id, mesh_shape=mesh, for_run=for_run, value=host_value(value)
        )
        file = value.data if isinstance(value.data, ValueFile) else None
        if self._local.is_here and isinstance(value.data, (bytes, ValueFile)):
            try:
                await asyncio.to_thread(self._local.put, first, file)
                return
            except InfraError as error:  # what keeps us from it, gRPC says; or it is no executor of ours at all
                logger.info("%s: values for it go by gRPC", error)
                self._local.is_here = False
        await self._stub.PutBuffer(_put_chunks(first, file), metadata=self._metadata)

    async def save(
        self, folder: str, prefix: str, buffers: Sequence[pb.NamedBuffer], settled: Callable[[], None]
    ) -> list[pb.SavedTensor]:
        """Has the executor write buffers to a file; returns where in it they are.

        Args:
            folder: where the file goes.
            prefix: of its name.
            buffers: their names in the checkpoint, ids and specs.
            settled: called once later computations do not change what is written.

        Raises:
            TorchwaysError: the file could not be written, or a buffer is poisoned.
            grpc.aio.AioRpcError: the executor cannot be reached.
        """
        request = pb.SaveRequest(folder=folder, prefix=prefix, buffers=buffers)
        written: list[pb.SavedTensor] = []
        async for response in self._stub.SaveBuffers(request, metadata=self._metadata):
            if response.HasField("failure"):
                raise convert.failure_from_proto(response.failure).to_error()
            settled()
            written.extend(response.tensors)
        return written

    async def load(self, slice_id: SliceId, mesh: Sequence[int], buffers: Sequence[pb.LoadedBuffer]) -> None:
        """Has the executor make buffers of what is in files.

        Raises:
            TorchwaysError: they could not be read.
            grpc.aio.AioRpcError: the executor cannot be reached.
        """
        request = pb.LoadRequest(slice_id=slice_id, mesh_shape=mesh, buffers=buffers)
        response = await self._stub.LoadBuffers(request, metadata=self._metadata)
        if response.HasField("failure"):
            raise convert.failure_from_proto(response.failure).to_error()

    async def status(self) -> ExecutorStatus:
        """Returns what the executor says of itself."""
        status = await self._stub.GetStatus(pb.StatusRequest(), metadata=self._metadata, timeout=_CALL_SECONDS)
        return ExecutorStatus(
            executor_id=status.executor_id,
            rss_bytes=status.rss_bytes,
            num_buffers=status.num_buffers,
            buffer_bytes=status.buffer_bytes,
            num_runs_in_flight=status.num_runs_in_flight,
            num_messages=status.num_messages,
            fallback_counters=dict(status.fallback_counters),
            waiting_for=tuple(status.waiting_for),
            budget_bytes=status.budget_bytes,
            used_bytes=status.used_bytes,
            client_bytes=dict(status.client_bytes),
            num_compiled=status.num_compiled,
            compile_seconds=status.compile_seconds,
            num_entries=dict(status.num_entries),
            stalls=tuple(status.stalls),
        )

    async def trace(self, since_ns: int) -> list[Span]:
        """Returns the spans that ended after a time, by our clock."""
        return await _spans(self._stub, self._metadata, since_ns)

    async def close(self, error: TorchwaysError) -> None:
        """Closes the channel; reads that wait raise an error."""
        self.reads.close(error)
        self._local.close()
        with contextlib.suppress(asyncio.CancelledError):
            await self._channel.close(None)


async def _put_chunks(first: pb.PutChunk, file: ValueFile | None) -> AsyncIterator[pb.PutChunk]:
    if file is not None:
        first.value.data = file.read(0, _CHUNK_BYTES)
    yield first
    for start in range(_CHUNK_BYTES, file.nbytes if file is not None else 0, _CHUNK_BYTES):
        yield pb.PutChunk(more=file.read(start, _CHUNK_BYTES))  # type: ignore[union-attr]


class TakenBatch(NamedTuple):
    """A batch that is on its slice.

    Attributes:
        structure: JSON of its containers and values (data/trees.py).
        tensors: dtype, shape and placements of each tensor.
        state: JSON of the loader's state behind it.
    """

    structure: str
    tensors: tuple[tuple[str, tuple[int, ...], Placements], ...]
    state: str


class DataProcessClient:
    """A data process. All calls raise `grpc.aio.AioRpcError` where it is gone, and the failures that it reports."""

    def __init__(self, address: str, metadata: Metadata) -> None:
        self._channel = channel.open_channel(address)
        self._stub = pb_grpc.DataProcessStub(self._channel)
        self._metadata = metadata

    async def open(self, spec: str) -> int | None:
        """Makes the dataset; returns the number of batches of a pass, if it is known."""
        response = await self._stub.OpenDataset(pb.OpenDatasetRequest(spec=spec), metadata=self._metadata)
        _raise_failure(response)
        return int(response.num_batches) if response.HasField("num_batches") else None

    async def begin(
        self, pass_number: int, position: str, slice_id: SliceId, mesh: VirtualSlice, local_addresses: Sequence[str]
    ) -> None:
        """Starts a pass at a position, for a slice."""
        request = pb.BeginPassRequest(
            pass_number=pass_number,
            position=position,
            slice_id=slice_id,
            mesh_shape=mesh.shape,
            axis_names=mesh.mesh_dim_names,
            local_addresses=local_addresses,
        )
        _raise_failure(await self._stub.BeginPass(request, metadata=self._metadata))

    async def take(self, pass_number: int, number: int, first_buffer_id: int) -> TakenBatch | None:
        """Waits until a batch is on the slice, as buffers from `first_buffer_id` on; None: there is no such batch."""
        request = pb.TakeBatchRequest(pass_number=pass_number, number=number, first_buffer_id=first_buffer_id)
        response = await self._stub.TakeBatch(request, metadata=self._metadata)
        match response.WhichOneof("result"):
            case "batch":
                batch = response.batch
                specs = [(spec.dtype, tuple(spec.shape), tuple(spec.placements)) for spec in batch.tensors]
                return TakenBatch(batch.structure, tuple(specs), batch.state)
            case "failure":
                _raise_failure(response)
        return None

    async def close(self) -> None:
        """Closes the channel."""
        with contextlib.suppress(asyncio.CancelledError):
            await self._channel.close(None)


async def _spans(stub: Any, metadata: Metadata, since_ns: int) -> list[Span]:
    return await collect(lambda request: stub.CollectTrace(request, metadata=metadata, timeout=_CALL_SECONDS), since_ns)


def _raise_failure(response: Any) -> None:
    if response.HasField("failure"):
        raise convert.failure_from_proto(response.failure).to_error()


def _failure(message: pb.ProgramReady | pb.RunFinished) -> Failure | None:
    return convert.failure_from_proto(message.failure) if message.HasField("failure") else None
