"""A session: the controller's connection to a cluster, from `tw.init` to `tw.shutdown`.

It names buffers and runs, sends one message an island a run, bounds how far the controller runs ahead, and turns
lost processes into typed errors at the next read. It knows nothing of graphs.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import logging
import os
import sys
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import grpc
import grpc.aio
import torch

from torchways.capture.host_content import HostContent
from torchways.capture.source import user_line
from torchways.controller.buffers import HostBuffer, RemoteBuffer, check_open, tensor_from_bytes
from torchways.controller.loop import LoopThread, wait_for
from torchways.controller.puts import Puts
from torchways.controller.spans import ClientSpans
from torchways.controller.value_checks import checks_values
from torchways.errors import (
    CaptureError,
    ClusterLost,
    ExecutorLost,
    Failure,
    InfraError,
    PlacementError,
    ResourceExhausted,
    SessionClosed,
    TorchwaysError,
)
from torchways.ids import BufferId, IslandId, ProgramId, RunId, SliceId, client_range
from torchways.ir.part import Arguments, SlicePart
from torchways.ir.sizes import logical_bytes
from torchways.mesh import Placements, VirtualSlice, check_mesh
from torchways.observability.progress import progress
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.clients import (
    ClusterInfo,
    ExecutorClient,
    ExecutorStatus,
    ManagerClient,
    SchedulerClient,
    SliceAddress,
)
from torchways.rpc.programs import (
    HostAddress,
    InlineValue,
    cancel_message,
    close_message,
    forget_message,
    register_message,
    release_message,
    run_message,
)
from torchways.rpc.reads import ReadValue
from torchways.rpc.spans import Span
from torchways.signals import Waiting, if_interrupted, result_of

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: How long the runs of the calls that are made now may take, in seconds; None: as long as they take.
run_seconds: contextvars.ContextVar[float | None] = contextvars.ContextVar("run_seconds", default=None)

_CALL = timedelta(seconds=35)
#: For all the arrays of a slice to be read.
_MOVE_SECONDS = 600
#: After so many more releases of a slice's buffers the loop is told again that there are some.
_RELEASES = 64
#: How long a failed read waits for word of why the executor is gone.
_REASON_SECONDS = 3.0


@dataclass(slots=True)
class _Slice:
    """A slice of this session and its connections, once they are up."""

    #: Weak: a slice that nobody refers to is given back.
    mesh: weakref.ref[VirtualSlice]
    island: IslandId
    ready: concurrent.futures.Future[None] = field(init=False)
    address: SliceAddress | None = None
    #: One for each host; every host has what the slice has. Slices of the same devices share them.
    executors: tuple[ExecutorClient, ...] = ()


@dataclass(slots=True)
class _FirstRun:
    """A program's first run, for the log."""

    name: str
    num_functions: int
    traced_seconds: float
    #: When the program was sent, and when all executors had compiled it.
    sent: float
    compiled: float | None = None

    def __str__(self) -> str:
        now = time.monotonic()
        compiled = self.sent if self.compiled is None else self.compiled
        functions = "1 function" if self.num_functions == 1 else f"{self.num_functions} functions"
        traced = f"traced {self.traced_seconds:.1f} s, " if self.traced_seconds else ""
        compiling = f"compiled {compiled - self.sent:.1f} s ({functions})"
        return f"{self.name}: {traced}{compiling}, first run {now - compiled:.1f} s"


@dataclass(slots=True)
class _Run:
    name: str
    islands: tuple[IslandId, ...]
    islands_left: int
    sent_ns: int
    #: Ids of the buffers that it makes.
    results: range
    #: Of a program's first run.
    first: _FirstRun | None
    changes_state: bool
    #: Of values that were put for it, and ids of its arguments that were on their way when it was sent.
    put_bytes: int
    awaits: Collection[BufferId]


@dataclass(slots=True)
class Session:
    """See the module's docstring. Methods are for the user's thread unless they say else."""

    manager: ManagerClient
    loop: LoopThread
    start_timeout: timedelta
    #: Ends the embedded cluster; None where the cluster is not ours.
    end_cluster: Callable[[], None] | None
    #: Weight and priority, of its share of devices.
    share: tuple[float, int] = (1.0, 0)
    max_runs_in_flight: int = 64
    max_programs: int = 10_000
    #: Waits for what must end before the session does.
    before_close: list[Callable[[], None]] = field(default_factory=list)
    closed: bool = False
    pid: int = field(default_factory=os.getpid)
    #: Held while a call is bound, sent and its results are put in place: who holds it sees no array in between.
    lock: threading.RLock = field(default_factory=threading.RLock)
    #: The buffers that are referred to, by their ids.
    buffers: dict[BufferId, weakref.ref[RemoteBuffer]] = field(default_factory=dict)
    #: Set when the cluster is gone: every later call raises it.
    broken: TorchwaysError | None = None
    #: What this client does, for traces.
    spans: ClientSpans = field(default_factory=ClientSpans)
    _next_id: int = 0
    _slices: dict[SliceId, _Slice] = field(default_factory=dict)
    _schedulers: dict[IslandId, SchedulerClient] = field(default_factory=dict)
    _executors: dict[str, ExecutorClient] = field(default_factory=dict)
    #: Islands that each program is registered on.
    _islands_of: dict[ProgramId, tuple[IslandId, ...]] = field(default_factory=dict)
    _runs: dict[RunId, _Run] = field(default_factory=dict)
    #: The run whose end somebody waits for.
    _awaited: RunId | None = None
    #: Ids before which somebody waits for all runs.
    _awaited_before: list[int] = field(default_factory=list)
    _room: Waiting = field(default_factory=Waiting)
    _lost_executors: dict[str, str] = field(default_factory=dict)
    #: Islands that have not said yet that a program is compiled, and the failures of those that could not.
    _compiling: dict[ProgramId, int] = field(default_factory=dict)
    _not_compiled: dict[ProgramId, Failure] = field(default_factory=dict)
    #: Of programs that no run was sent of yet, and of those that are not compiled yet.
    _first_runs: dict[ProgramId, _FirstRun] = field(default_factory=dict)
    _waited_for: dict[ProgramId, _FirstRun] = field(default_factory=dict)
    #: Of compiled programs, from when they were sent until all executors had compiled them.
    _compile_seconds: dict[ProgramId, float] = field(default_factory=dict)
    _releases: dict[SliceId, list[BufferId]] = field(default_factory=lambda: defaultdict(list))
    #: Re-entrant: the garbage collector may call `release` while this thread holds it.
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _puts: Puts = field(init=False)

    # ---- life

    def __post_init__(self) -> None:
        self._puts = Puts(self.loop.start, self._wait, self._room.look_again, self._on_not_arrived)

    def start(self) -> None:
        """Attaches to the resource manager."""
        self.loop.run(self._attach(), _CALL, "the resource manager")
        first, _ = client_range(self.manager.client_id)
        self._next_id = first + 1

    async def _attach(self) -> None:
        name = f"{os.path.basename(sys.argv[0]) or 'python'} pid {os.getpid()}"
        reading = await self.manager.attach(
            name, self.share, self._on_executor_lost, self._on_cluster_lost, self.spans.since
        )
        self._tasks.add(reading)
        reading.add_done_callback(self._ended)

    def close(self) -> None:
        """Gives everything back and ends the embedded cluster. Idempotent; it waits for checkpoints only."""
        if self.closed:
            return
        if os.getpid() == self.pid and self.broken is None:
            for wait in self.before_close:
                wait()
        self.closed = True
        if os.getpid() != self.pid:  # forked: what it would end is the other process's
            return
        self._room.look_again()
        try:
            self.loop.run(self._close(), timedelta(seconds=5), "connections to close")
        except Exception:  # the cluster may be gone already; what matters is that it ends
            logger.info("while closing the session", exc_info=True)
        self.loop.close()
        if self.end_cluster is not None:
            self.end_cluster()

    async def _close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        over = SessionClosed("the session was closed meanwhile")
        closings = [client.close(over) for client in self._executors.values()]
        closings += [scheduler.close() for scheduler in self._schedulers.values()]
        closings.append(self.manager.close())
        await asyncio.gather(*closings, return_exceptions=True)

    def check(self) -> None:
        """Raises if the session is closed or the cluster gone."""
        check_open(self, "this call")
        if self.broken is not None:
            raise self.broken

    def is_usable(self) -> bool:
        """Whether there is still something to give back to, and this process may."""
        return not self.closed and self.broken is None and os.getpid() == self.pid

    # ---- slices

    def init_device_mesh(self, shape: Sequence[int], names: Sequence[str] | None, island: int | None) -> VirtualSlice:
        """Asks the resource manager for a slice; its executors start in the background."""
        self.check()
        shape, names = check_mesh(shape, names)
        slice_id, island_id = self.loop.run(self.manager.reserve_slice(shape, names, island), _CALL, "a slice")
        mesh = VirtualSlice(shape=shape, mesh_dim_names=names, slice_id=slice_id, island=island_id, owner=self)
        self._add_slice(mesh)
        return mesh

    def _add_slice(self, mesh: VirtualSlice) -> None:
        entry = self._slices[mesh.slice_id] = _Slice(weakref.ref(mesh), mesh.island)
        # Behind the entry: a slice of devices that are in use is there at once.
        entry.ready = self.loop.start(self._open_slice(mesh.slice_id, entry))

    async def _open_slice(self, slice_id: SliceId, entry: _Slice) -> None:
        address = await self.manager.wait_slice(slice_id, self.start_timeout)
        if self._slices.get(slice_id) is not entry:  # closed meanwhile
            return
        if address.island_id not in self._schedulers:
            scheduler = self._schedulers[address.island_id] = SchedulerClient(
                address.scheduler_address,
                self.manager.metadata,
                self._on_program_ready,
                self._on_run_finished,
                self._on_cluster_lost,
            )
            self._hold(scheduler.connect(), f"scheduler of island {address.island_id}")
        for executor in address.executors:
            if executor.executor_id not in self._executors:
                self._executors[executor.executor_id] = ExecutorClient(
                    executor, self.manager.metadata, self._executor_error
                )
        entry.executors = tuple(self._executors[executor.executor_id] for executor in address.executors)
        entry.address = address

    def slice_address(self, mesh: VirtualSlice) -> SliceAddress:
        """Waits until a slice is ready; returns where it is."""
        self.check()
        entry = self._slices.get(mesh.root.slice_id)
        if entry is None or entry.mesh() is not mesh.root:
            raise PlacementError(f"mesh {mesh} is closed or belongs to another session; make one with init_device_mesh")
        return self._wait_slice(entry)

    def slice_address_now(self, mesh: VirtualSlice) -> SliceAddress:
        """Returns where a slice is that was waited for before; on the loop, which must not wait."""
        entry = self._slices.get(mesh.slice_id)
        if entry is None or entry.address is None:
            raise PlacementError(f"mesh {mesh} is closed: make a new one with init_device_mesh")
        return entry.address

    def lost_executor_error(self, mesh: VirtualSlice) -> ExecutorLost | None:
        """Returns the error of the first executor of a slice that is known to be lost."""
        entry = self._slices.get(mesh.slice_id)
        clients = entry.executors if entry is not None else ()
        lost = [client.executor_id for client in clients if client.executor_id in self._lost_executors]
        return self._executor_lost(lost[0]) if lost else None

    def _wait_slice(self, entry: _Slice) -> SliceAddress:
        result_of(entry.ready, self.start_timeout.total_seconds() + 5)
        assert entry.address is not None
        return entry.address

    def move_slice(self, mesh: VirtualSlice, island: int | None) -> None:
        """Takes a slice, with all its arrays, to other devices; see `VirtualSlice.remap`."""
        old = mesh.slice_id
        self.slice_address(mesh)
        held = [buffer for reference in list(self.buffers.values()) if (buffer := reference()) is not None]
        buffers = [buffer for buffer in held if buffer.mesh is mesh and not buffer.consumed]
        reads = [(buffer, self.start_fetch(buffer)) for buffer in buffers]
        values = [(buffer, result_of(read, _MOVE_SECONDS)) for buffer, read in reads]
        reserving = self.manager.reserve_slice(mesh.shape, mesh.mesh_dim_names, island)
        mesh.slice_id, mesh.island = self.loop.run(reserving, _CALL, "a slice")
        self._add_slice(mesh)
        for buffer, value in values:
            content = HostContent(tuple(value.shape), value.dtype, value)
            placed = self.put(HostBuffer(content), mesh, buffer.placements)
            del self.buffers[buffer.buffer_id]
            buffer.buffer_id = placed.buffer_id
            placed.consumed = True  # it is `buffer` now that releases it
            del placed
            self.buffers[buffer.buffer_id] = weakref.ref(buffer)
        self._release_slice(old)

    def close_slice(self, mesh: VirtualSlice) -> None:
        """Gives a slice back."""
        self._release_slice(mesh.slice_id)

    def forget_slice(self, slice_id: SliceId) -> None:
        """Gives a slice back that nobody refers to any more. Called by the garbage collector: any thread, no wait."""
        if self.is_usable():
            self.loop.start(self._release_unused(slice_id))

    async def _release_unused(self, slice_id: SliceId) -> None:
        last_id = self._next_id
        # What is in flight may use it. A run ends, well or not, or the session is over.
        while any(run_id < last_id for run_id in list(self._runs)) and not self.closed:
            if self.broken is not None:
                return
            await asyncio.sleep(0.05)
        entry = self._slices.pop(slice_id, None)
        if entry is not None and not self.closed and self.broken is None:
            await self._give_back(slice_id, entry)

    def _release_slice(self, slice_id: SliceId) -> None:
        entry = self._slices.pop(slice_id, None)
        if entry is not None and self.is_usable():
            self.loop.run(self._give_back(slice_id, entry), _CALL, "the slice to be released")

    async def _give_back(self, slice_id: SliceId, entry: _Slice) -> None:
        if entry.address is not None:
            self._post(self._schedulers[entry.address.island_id], close_message(slice_id))
        await self.manager.release_slice(slice_id, scheduler_knows=entry.address is not None)
        in_use = {client.executor_id for item in self._slices.values() for client in item.executors}
        for client in entry.executors:
            if client.executor_id not in in_use and self._executors.pop(client.executor_id, None) is not None:
                await client.close(PlacementError("the array's mesh was closed meanwhile: its buffers are gone"))

    def cluster_info(self) -> ClusterInfo:
        """Returns what the cluster consists of."""
        self.check()
        return self.loop.run(self.manager.describe(), _CALL, "the resource manager")

    def executor_status(self) -> list[ExecutorStatus]:
        """Returns what the executors of this session's slices say of themselves."""
        return [status for _, status in self._ask_executors(lambda client: client.status())]

    def collect_spans(self, since_ns: int) -> dict[str, list[Span]]:
        """Returns the spans of every process since a time, by its name. A lost one has none.

        Schedulers and executors show what is this client's, and of others only that there was something.
        """

        async def ask(client: ExecutorClient | SchedulerClient) -> list[Span]:
            try:
                return await client.trace(since_ns)
            except grpc.aio.AioRpcError as error:
                logger.warning("no trace from a process: %s", error.details())
                return []

        spans = {f"executor {executor_id}": found for executor_id, found in self._ask_executors(ask)}
        for island, scheduler in self._schedulers.items():
            spans[f"scheduler i{island}"] = self.loop.run(ask(scheduler), _CALL, "a scheduler")
        spans["controller"] = self.spans.since(since_ns)
        return spans

    def _ask_executors(self, ask: Callable[[ExecutorClient], Coroutine[Any, Any, _T]]) -> list[tuple[str, _T]]:
        """Returns each executor's answer, with its id; one that is lost or given back meanwhile has none."""
        self.check()
        for entry in list(self._slices.values()):
            self._wait_slice(entry)
        answers = []
        for client in list(self._executors.values()):
            try:
                answers.append((client.executor_id, self.loop.run(ask(client), _CALL, client.executor_id)))
            except (grpc.aio.UsageError, concurrent.futures.CancelledError):
                if self._executors.get(client.executor_id) is client:
                    raise
            except grpc.aio.AioRpcError as error:
                explaining = self._executor_error(client.executor_id, error)
                explained = self.loop.run(explaining, _CALL, "word of an executor")
                if client.executor_id not in self._lost_executors:
                    raise explained from error
        return answers

    # ---- buffers

    def new_ids(self, count: int) -> int:
        """Returns the first of `count` consecutive ids that this client has not used."""
        with self._lock:
            first, self._next_id = self._next_id, self._next_id + count
        return first

    def put(self, value: HostBuffer, mesh: VirtualSlice, placements: Placements) -> RemoteBuffer:
        """Starts copying a host value to a slice."""
        return self._put(value, mesh, placements, for_run=False)

    def put_for_run(self, value: HostBuffer, mesh: VirtualSlice, placements: Placements) -> RemoteBuffer:
        """Starts copying a host value to a slice for the next run; waits while too much is on its way for others."""
        content = value.value.content
        self._puts.make_room_for_run(content.nbytes if isinstance(content, torch.Tensor) else 0)
        self.check()
        return self._put(value, mesh, placements, for_run=True)

    def _put(self, value: HostBuffer, mesh: VirtualSlice, placements: Placements, *, for_run: bool) -> RemoteBuffer:
        address = self.slice_address(mesh)
        clients = self._slices[address.slice_id].executors
        self._puts.make_room()
        self.check()
        buffer_id = BufferId(self.new_ids(1))
        buffer = RemoteBuffer(self, mesh.root, placements, buffer_id)
        buffer.origin = weakref.ref(value)
        copy = value.copied(placements)

        async def put_to_all() -> None:
            shape = mesh.root.shape
            puts = [client.put(buffer_id, copy, address.slice_id, shape, for_run=for_run) for client in clients]
            try:
                await asyncio.gather(*puts)
            except grpc.aio.AioRpcError as error:
                raise await self._executor_error(clients[0].executor_id, error) from error

        self._puts.add(buffer_id, put_to_all())
        return buffer

    def _on_not_arrived(self, buffer_id: BufferId) -> None:
        for run_id, run in list(self._runs.items()):
            if buffer_id in run.awaits:
                self._cancel_unless_arrived(run_id, run.awaits)
        if buffer_id not in self.buffers:
            self._puts.forget(buffer_id)

    def _cancel_unless_arrived(self, run_id: RunId, awaits: Collection[BufferId]) -> None:
        failed = next(filter(None, map(self._puts.error, awaits)), None)
        if failed is not None and self.is_usable():
            self._cancel([run_id], f"a value that it reads did not arrive: {failed}")

    def fetch(self, buffer: RemoteBuffer, timeout: timedelta | None) -> torch.Tensor:
        """Waits for a buffer's value."""
        check_open(self, "this array")
        reading = self.spans.waiting("read", "read an array", self.manager.client_id)
        with reading, if_interrupted(lambda: self.give_up(buffer)):
            return wait_for(self.start_fetch(buffer), timeout, "an array's value")

    def start_fetch(self, buffer: RemoteBuffer) -> concurrent.futures.Future[torch.Tensor]:
        """Starts waiting for a buffer's value."""
        check_open(self, "this array")
        entry = self._slices.get(buffer.mesh.slice_id)
        if entry is None or not entry.executors:
            raise PlacementError(f"the array's mesh {buffer.mesh} is closed: its buffers are gone")
        if self.broken is not None:
            raise self.broken
        executor = entry.executors[0]
        put = self._puts.under_way(buffer.buffer_id)
        if put is not None:
            return self.loop.start(self._fetch_put(put, executor, buffer.buffer_id))
        self._puts.check(buffer.buffer_id)
        return executor.reads.read(buffer.buffer_id, _tensor_of)

    def is_ready(self, buffer: RemoteBuffer) -> bool:
        """Whether a read would not wait for a computation."""
        check_open(self, "this array")
        entry = self._slices.get(buffer.mesh.slice_id)
        if entry is None or not entry.executors or self.broken is not None:
            return True  # a read raises at once
        asked = entry.executors[0].reads.read(buffer.buffer_id, lambda value: value.ready, only_ready=True)
        try:
            return wait_for(asked, _CALL, "an executor")
        except TorchwaysError:
            return True

    async def _fetch_put(
        self, put: concurrent.futures.Future[None], executor: ExecutorClient, buffer_id: BufferId
    ) -> torch.Tensor:
        """Waits for the value of a buffer that is on its way to its executor."""
        sent = asyncio.wrap_future(put)
        sent.add_done_callback(_forget_result)
        await asyncio.shield(sent)  # who gives up reading does not take the value back
        return await asyncio.wrap_future(executor.reads.read(buffer_id, _tensor_of))

    def save_buffers(
        self, folder: str, buffers: Mapping[str, tuple[RemoteBuffer, pb.TensorSpec]]
    ) -> list[concurrent.futures.Future[list[pb.SavedTensor]]]:
        """Starts writing buffers to files, each executor its own, and of several hosts each a part of their slice's.

        Runs that are sent from now on do not change them.

        Args:
            folder: where the files go; the executors must see it.
            buffers: with the form that each is said to have, by their names in the checkpoint.

        Returns:
            What will be written where, by each executor.
        """
        by_executor: dict[str, list[pb.NamedBuffer]] = defaultdict(list)
        writer_of: dict[BufferId, str] = {}  # the same for all names of tied parameters, which are written once
        bytes_of: Counter[str] = Counter()
        meshes = {buffer.mesh for buffer, _ in buffers.values()}
        hosts_of = {mesh: [executor.executor_id for executor in self._executors_of(mesh)] for mesh in meshes}
        for name, (buffer, spec) in buffers.items():
            if buffer.buffer_id not in writer_of:
                writer = writer_of[buffer.buffer_id] = min(hosts_of[buffer.mesh], key=bytes_of.__getitem__)
                bytes_of[writer] += logical_bytes(spec.dtype, spec.shape)
            message = pb.NamedBuffer(name=name, buffer_id=buffer.buffer_id, spec=spec)
            by_executor[writer_of[buffer.buffer_id]].append(message)
        settling: list[concurrent.futures.Future[None]] = []
        saving = []
        for executor_id, named in by_executor.items():
            settled: concurrent.futures.Future[None] = concurrent.futures.Future()
            saving.append(self.loop.start(self._save(executor_id, folder, named, settled)))
            settling.append(settled)
        for settled in settling:
            result_of(settled, _CALL.total_seconds())
        return saving

    async def _save(
        self,
        executor_id: str,
        folder: str,
        buffers: Sequence[pb.NamedBuffer],
        settled: concurrent.futures.Future[None],
    ) -> list[pb.SavedTensor]:
        def settle() -> None:
            if not settled.done():
                settled.set_result(None)

        try:
            return await self._executors[executor_id].save(folder, f"__{executor_id}_", buffers, settle)
        except grpc.aio.AioRpcError as error:
            raise await self._executor_error(executor_id, error) from error
        finally:
            settle()

    def load_buffers(
        self, mesh: VirtualSlice, values: Sequence[tuple[Placements, pb.LoadedBuffer]]
    ) -> concurrent.futures.Future[list[RemoteBuffer]]:
        """Starts making buffers on a slice of what is in files.

        Args:
            mesh: the slice, all of whose hosts must see the files.
            values: placements, and what to read; the ids are set here.
        """
        address, executors = self.slice_address(mesh), self._executors_of(mesh)
        buffers = [RemoteBuffer(self, mesh.root, texts, BufferId(self.new_ids(1))) for texts, _ in values]
        messages = [message for _, message in values]
        for buffer, message in zip(buffers, messages, strict=True):
            message.buffer_id = buffer.buffer_id

        async def load() -> list[RemoteBuffer]:
            loading = [client.load(address.slice_id, mesh.root.shape, messages) for client in executors]
            try:
                await asyncio.gather(*loading)
            except grpc.aio.AioRpcError as error:
                raise await self._executor_error(executors[0].executor_id, error) from error
            return buffers

        return self.loop.start(load())

    def _executors_of(self, mesh: VirtualSlice) -> tuple[ExecutorClient, ...]:
        return self._slices[self.slice_address(mesh).slice_id].executors

    async def _executor_error(self, executor_id: str, error: grpc.aio.AioRpcError) -> TorchwaysError:
        """Returns the typed error for an executor that cannot be reached, with the reason if word of it comes."""
        deadline = time.monotonic() + _REASON_SECONDS
        while executor_id not in self._lost_executors and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if executor_id in self._lost_executors:
            return self._executor_lost(executor_id)
        if self.broken is not None:
            return self.broken
        return ExecutorLost(f"executor {executor_id} cannot be reached ({error.code().name}: {error.details()})")

    def _executor_lost(self, executor_id: str) -> ExecutorLost:
        return ExecutorLost(
            f"executor {executor_id} is lost ({self._lost_executors[executor_id]}); the arrays on its slice are gone. "
            "Make a new mesh and load your state from a checkpoint"
        )

    def release(self, slice_id: SliceId, buffer_id: BufferId) -> None:
        """Gives one buffer back, batched with others. Called by the garbage collector: any thread, no waiting."""
        if not self.is_usable():
            return
        self._puts.forget(buffer_id)
        with self._lock:
            batch = self._releases[slice_id]
            batch.append(buffer_id)
            # Again every so often: an interrupt may have kept the first from asking.
            is_asked_for = len(batch) % _RELEASES == 1
        if is_asked_for:
            try:
                self.loop.call(self._flush_releases_soon)
            except RuntimeError:  # the loop is closed: the interpreter is shutting down
                pass

    def _hold(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Runs a coroutine on the loop, where this is called, until it ends or the session does."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.closed:
            logger.error("%s failed", task.get_name(), exc_info=error)

    def _flush_releases_soon(self) -> None:
        self.loop.loop.call_later(0.005, self._flush_releases)

    def _flush_releases(self) -> None:
        if self.closed:
            return
        with self._lock:
            batches, self._releases = self._releases, defaultdict(list)
        for slice_id, buffer_ids in batches.items():
            entry = self._slices.get(slice_id)
            if entry is None or entry.address is None:
                continue
            waiting = list(filter(None, map(self._puts.under_way, buffer_ids)))
            if waiting:  # a Put still under way would arrive after its release
                self._hold(self._release_after(waiting, slice_id, buffer_ids), "release of values under way")
            else:
                self._post(self._schedulers[entry.address.island_id], release_message(slice_id, buffer_ids))

    async def _release_after(
        self, puts: list[concurrent.futures.Future[None]], slice_id: SliceId, buffer_ids: list[BufferId]
    ) -> None:
        await asyncio.gather(*map(asyncio.wrap_future, puts), return_exceptions=True)
        entry = self._slices.get(slice_id)
        if entry is not None and entry.address is not None:
            self._post(self._schedulers[entry.address.island_id], release_message(slice_id, buffer_ids))

    # ---- programs

    def register_program(
        self, name: str, parts: Sequence[SlicePart], meshes: Sequence[VirtualSlice], traced_seconds: float = 0.0
    ) -> ProgramId:
        """Sends a program's parts to their islands; executors compile in the background.

        Args:
            name: the program's name, for people.
            parts: one per slice that takes part.
            meshes: the slices, by slice index.
            traced_seconds: the time that it took to trace the program, for the log.

        Raises:
            ResourceExhausted: this process keeps too many programs.
        """
        if len(self._islands_of) >= self.max_programs:
            raise ResourceExhausted(
                f"{name} at {user_line()} would be one of more than {self.max_programs:,} programs that this process "
                "keeps. Make a tw.program or tw.function once, outside of loops, and call it again and again; what "
                "nothing refers to any more is given back"
            )
        program_id = ProgramId(self.new_ids(1))
        addresses = [self.slice_address(mesh) for mesh in meshes]
        hosts = {
            index: [
                HostAddress(executor_id=executor.executor_id, data_address=executor.data_address)
                for executor in address.executors
            ]
            for index, address in enumerate(addresses)
        }
        by_island: dict[IslandId, list[tuple[SliceId, Sequence[int], SlicePart]]] = defaultdict(list)
        for part in parts:
            address = addresses[part.slice_index]
            by_island[address.island_id].append((address.slice_id, meshes[part.slice_index].root.shape, part))
        self._compiling[program_id] = len(by_island)
        num_functions = sum(len(part.functions) for part in parts)
        first = _FirstRun(name, num_functions, traced_seconds, time.monotonic())
        self._first_runs[program_id] = self._waited_for[program_id] = first
        for island, island_parts in by_island.items():
            self._post(
                self._schedulers[island], register_message(program_id, name, island_parts, hosts, list(by_island))
            )
        self._islands_of[program_id] = tuple(by_island)
        return program_id

    def forget_program(self, program_id: ProgramId) -> None:
        """Lets executors free a program once its last run is over. Called by the garbage collector: no waiting."""
        islands = self._islands_of.pop(program_id, ())
        self._compiling.pop(program_id, None)
        self._not_compiled.pop(program_id, None)
        self._first_runs.pop(program_id, None)
        self._waited_for.pop(program_id, None)
        self._compile_seconds.pop(program_id, None)
        if not self.is_usable():
            return
        try:
            for island in islands:
                self._post(self._schedulers[island], forget_message(program_id))
        except RuntimeError:  # the loop is closed: the interpreter is shutting down
            pass

    def run_program(
        self,
        program_id: ProgramId,
        name: str,
        results: range,
        arguments: Mapping[SliceId, Arguments[InlineValue]],
        *,
        changes_state: bool,
    ) -> RunId:
        """Sends a run: one message to each island that takes part; see `wait_for_room`. One step to signals, please.

        Args:
            program_id: what it runs.
            name: of the program, for people.
            results: ids of the buffers that it makes.
            arguments: of each slice.
            changes_state: some of its results are more than what its call returns.
        """
        started_ns = time.time_ns()
        if any(slice_id not in self._slices for slice_id in arguments):
            raise PlacementError(f"{name} runs on a mesh that is closed: its devices and arrays were given back")
        awaits = self._puts.awaited(buffer_id for bound in arguments.values() for buffer_id in bound.buffer_ids)
        put_bytes = self._puts.run_sent()
        run_id = RunId(self.new_ids(1))
        by_island: dict[IslandId, list[tuple[SliceId, Arguments[InlineValue]]]] = defaultdict(list)
        for slice_id, bound in arguments.items():
            by_island[self._slices[slice_id].island].append((slice_id, bound))
        first_run = self._first_runs.pop(program_id, None)
        self._runs[run_id] = _Run(
            name, tuple(by_island), len(by_island), started_ns, results, first_run, changes_state, put_bytes, awaits
        )
        for island, slices in by_island.items():
            first = BufferId(results.start)
            message = run_message(program_id, run_id, first, slices, checks_values=checks_values())
            self._schedulers[island].send(message)
            self._schedulers[island].flush()  # at once: the loop may have to wait for this thread's next pause
        self._cancel_unless_arrived(run_id, awaits)  # one may have failed before the run was known
        if (seconds := run_seconds.get()) is not None:
            reason = f"its deadline of {seconds:g} s has passed"
            self.loop.call(lambda: self.loop.loop.call_later(seconds, self._cancel, [run_id], reason))
        self.spans.dispatched(name, run_id, started_ns)
        return run_id

    def cancel(self, buffers: Sequence[RemoteBuffer]) -> None:
        """Cancels the runs that make buffers, as far as they are not over."""
        self._cancel(self._makers_of(buffers), "")

    def give_up(self, buffer: RemoteBuffer) -> None:
        """Cancels the run that makes a buffer for which nobody waits any more, unless that run changes state."""
        made = [(run_id, self._runs.get(run_id)) for run_id in self._makers_of([buffer])]
        runs = [run_id for run_id, run in made if run is not None and not run.changes_state]  # it may end meanwhile
        self._cancel(runs, "its reader was interrupted")

    def _makers_of(self, buffers: Sequence[RemoteBuffer]) -> list[RunId]:
        ids = [buffer.buffer_id for buffer in buffers]
        return [run_id for run_id, run in list(self._runs.items()) if any(number in run.results for number in ids)]

    def _cancel(self, run_ids: Sequence[RunId], reason: str) -> None:
        """Cancels those of some runs that are not over."""
        by_island: dict[IslandId, list[RunId]] = defaultdict(list)
        for run_id in run_ids:
            if (run := self._runs.get(run_id)) is not None:
                for island in run.islands:
                    by_island[island].append(run_id)
        for island, cancelled in by_island.items():
            self._post(self._schedulers[island], cancel_message(cancelled, reason))

    def _post(self, scheduler: SchedulerClient, message: Any) -> None:
        """Has the loop send a message, behind all that were sent before: runs, and the releases of what they read."""
        scheduler.send(message)
        self.loop.call(scheduler.flush)

    def wait_for_room(self, name: str) -> None:
        """Waits while too many runs are in flight."""
        if len(self._runs) >= self.max_runs_in_flight:
            with self.spans.waiting("room", f"{name} waits for room", self.manager.client_id):
                self._wait(lambda: len(self._runs) < self.max_runs_in_flight, f"dispatch of {name}")
        self.check()

    def wait_for_program(self, program_id: ProgramId, name: str) -> None:
        """Waits until a program is compiled everywhere: a run that gives up buffers must not meet one that is not.

        Raises:
            CaptureError: it cannot be compiled.
            InfraError: what should compile it is gone.
        """
        if program_id in self._compiling:
            with progress(f"{name}: compiling"):
                self._wait(lambda: program_id not in self._compiling, f"{name}, whose program is compiled,")
        self.check()
        failure = self._not_compiled.get(program_id)
        if failure is not None and isinstance(lost := failure.to_error(), InfraError):
            raise lost
        if failure is not None:
            raise CaptureError(
                f"{name} cannot be compiled: {failure.message}\n"
                "  all state is as it was; write it with other operators, or compute them outside the program"
            )

    def compile_seconds(self, program_id: ProgramId) -> float | None:
        """Returns what it took to send a program and compile it everywhere; None: that is not over."""
        return self._compile_seconds.get(program_id)

    def wait_for_run(self, run_id: RunId) -> None:
        """Waits until a run is over, well or not."""
        self._awaited = run_id
        self._wait(lambda: run_id not in self._runs, f"run {run_id}")
        self._awaited = None
        self.check()

    def wait_for_runs_before(self, first_id: int) -> None:
        """Waits until no run is in flight that was sent before an id was given out (`new_ids`)."""
        self._awaited_before.append(first_id)
        try:
            self._wait(lambda: not any(run_id < first_id for run_id in tuple(self._runs)), "the data loader")
        finally:
            self._awaited_before.remove(first_id)
        self.check()

    def wait_for_runs(self, timeout: timedelta) -> None:
        """Waits until no run is in flight."""
        self._wait(lambda: not self._runs, "the session", time.monotonic() + timeout.total_seconds())
        self.check()

    def _wait(self, holds: Callable[[], bool], who: str, deadline: float = float("inf")) -> None:
        """Waits until something holds, the session is over, or the deadline has passed."""

        def is_over() -> bool:
            return holds() or self.closed or self.broken is not None

        while (left := deadline - time.monotonic()) > 0 and not self._room.until(is_over, min(left, 10)):
            logger.info("%s waits: %d runs are in flight", who, len(self._runs))

    def num_messages(self) -> dict[IslandId, dict[str, int]]:
        """Returns how many messages of each kind went to each island's scheduler."""
        return {island: dict(client.num_sent) for island, client in self._schedulers.items()}

    # ---- events (on the loop)

    def _on_program_ready(self, program_id: ProgramId, failure: Failure | None) -> None:
        if failure is not None:
            logger.warning("program %d could not be compiled: %s", program_id, failure.message)
        if program_id not in self._compiling:
            return
        if failure is not None:
            self._not_compiled.setdefault(program_id, failure)
        self._compiling[program_id] -= 1
        if not self._compiling[program_id]:
            del self._compiling[program_id]
            if (first := self._waited_for.pop(program_id, None)) is not None:
                first.compiled = time.monotonic()
                self._compile_seconds[program_id] = first.compiled - first.sent
            self._room.look_again()

    def _on_run_finished(self, run_id: RunId, failure: Failure | None) -> None:
        run = self._runs.get(run_id)
        if run is None:
            return
        run.islands_left -= 1
        if run.islands_left == 0:
            del self._runs[run_id]
            self._puts.run_ended(run.put_bytes)
            if run.first is not None and failure is None:
                logger.info("%s", run.first)
            # Who waits is not woken for every single run.
            is_awaited = run_id == self._awaited or any(run_id < first_id for first_id in self._awaited_before)
            if not self._runs or is_awaited or len(self._runs) == self.max_runs_in_flight * 3 // 4:
                self._room.look_again()
        if failure is not None:
            logger.info("run %d of %s failed: %s", run_id, run.name, failure.message)

    def _on_executor_lost(self, executor_id: str, reason: str) -> None:
        if not self.closed:
            self._lost_executors[executor_id] = reason
            logger.warning("executor %s is lost: %s", executor_id, reason)
            if (client := self._executors.get(executor_id)) is not None:
                client.reads.close(self._executor_lost(executor_id))

    def _on_cluster_lost(self, reason: str) -> None:
        if self.closed or self.broken is not None:
            return
        self.broken = ClusterLost(f"{reason}; the session's arrays are gone. Start again with tw.init()")
        for client in self._executors.values():
            client.reads.close(self.broken)
        self._room.look_again()


def _tensor_of(value: ReadValue) -> torch.Tensor:
    return tensor_from_bytes(value.dtype, value.shape, value.data)


def _forget_result(task: asyncio.Future[Any]) -> None:
    """Takes note of how a task ended that nobody waits for."""
    if not task.cancelled():
        task.exception()
