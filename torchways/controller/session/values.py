"""What a session has on its slices: values are put, read, written to files, read from files, and given back."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc.aio
import torch

from torchways.controller.buffers import BufferHome, HostBuffer, RemoteBuffer, check_open, tensor_from_bytes
from torchways.controller.session.connections import CALL, Connections
from torchways.controller.session.loop import wait_for
from torchways.controller.session.puts import Puts
from torchways.controller.session.runs import Runs
from torchways.controller.session.slices import Slices
from torchways.controller.session.spans import ClientSpans
from torchways.errors import PlacementError, TorchwaysError
from torchways.ids import BufferId, SliceId
from torchways.ir.sizes import logical_bytes
from torchways.mesh import Placements, VirtualSlice
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.clients import ExecutorClient
from torchways.rpc.programs import release_message
from torchways.rpc.reads import ReadValue
from torchways.signals import if_interrupted, result_of

#: After so many more releases of a slice's buffers the loop is told again that there are some.
_RELEASES = 64


@dataclass(slots=True)
class Values:
    """See the module's docstring. Methods are for the user's thread unless they say else.

    Attributes:
        home: what the buffers that it makes belong to.
        puts: what is on its way.
        runs: that make what is read.
    """

    home: BufferHome
    connections: Connections
    slices: Slices
    puts: Puts
    runs: Runs
    spans: ClientSpans
    _releases: dict[SliceId, list[BufferId]] = field(default_factory=lambda: defaultdict(list))
    #: Re-entrant: the garbage collector may call `release` while this thread holds it.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    # ---- to slices

    def put(self, value: HostBuffer, mesh: VirtualSlice, placements: Placements) -> RemoteBuffer:
        """Starts copying a host value to a slice."""
        self.slices.address(mesh)  # it may have to start: others need not wait for that
        with self.home.lock:  # the slice does not move meanwhile
            return self._put(value, mesh, placements, for_run=False)

    def put_for_run(self, value: HostBuffer, mesh: VirtualSlice, placements: Placements) -> RemoteBuffer:
        """Starts copying a host value to a slice for the next run; waits while too much is on its way for others."""
        content = value.value.content
        self.puts.make_room_for_run(content.nbytes if isinstance(content, torch.Tensor) else 0)
        self.connections.check()
        return self._put(value, mesh, placements, for_run=True)

    def _put(self, value: HostBuffer, mesh: VirtualSlice, placements: Placements, *, for_run: bool) -> RemoteBuffer:
        clients = self.slices.executors(mesh)
        slice_id, shape = mesh.root.slice_id, mesh.root.shape
        self.puts.make_room()
        self.connections.check()
        buffer = self._new_buffer(mesh, placements)
        buffer.origin = weakref.ref(value)
        copy = value.copied(placements)
        buffer_id = buffer.buffer_id

        async def put_to_all() -> None:  # it does not hold the buffer, which may be dropped meanwhile
            puts = [client.put(buffer_id, copy, slice_id, shape, for_run=for_run) for client in clients]
            try:
                await asyncio.gather(*puts)
            except grpc.aio.AioRpcError as error:
                raise await self.connections.executor_error(clients[0].executor_id, error) from error

        self.puts.add(buffer_id, put_to_all())
        return buffer

    def _new_buffer(self, mesh: VirtualSlice, placements: Placements) -> RemoteBuffer:
        return RemoteBuffer(self.home, mesh.root, placements, BufferId(self.connections.new_ids(1)))

    def load(
        self, mesh: VirtualSlice, values: Sequence[tuple[Placements, pb.LoadedBuffer]]
    ) -> concurrent.futures.Future[list[RemoteBuffer]]:
        """Starts making buffers on a slice of what is in files.

        Args:
            mesh: the slice, all of whose hosts must see the files.
            values: placements, and what to read; the ids are set here.
        """
        self.slices.address(mesh)
        with self.home.lock:  # as `put`
            return self._load(mesh, values)

    def _load(
        self, mesh: VirtualSlice, values: Sequence[tuple[Placements, pb.LoadedBuffer]]
    ) -> concurrent.futures.Future[list[RemoteBuffer]]:
        executors = self.slices.executors(mesh)
        slice_id, shape = mesh.root.slice_id, mesh.root.shape
        buffers = [self._new_buffer(mesh, placements) for placements, _ in values]
        messages = [message for _, message in values]
        for buffer, message in zip(buffers, messages, strict=True):
            message.buffer_id = buffer.buffer_id

        async def load_on_all() -> list[RemoteBuffer]:
            loading = [client.load(slice_id, shape, messages) for client in executors]
            try:
                await asyncio.gather(*loading)
            except grpc.aio.AioRpcError as error:
                raise await self.connections.executor_error(executors[0].executor_id, error) from error
            return buffers

        return self.connections.loop.start(load_on_all())

    # ---- from slices

    def fetch(self, buffer: RemoteBuffer, timeout: timedelta | None) -> torch.Tensor:
        """Waits for a buffer's value."""
        check_open(self.home, "this array")
        reading = self.spans.waiting("read", "read an array", self.connections.manager.client_id)
        with reading, if_interrupted(lambda: self.give_up(buffer)):
            return wait_for(self.start_fetch(buffer), timeout, "an array's value")

    def start_fetch(self, buffer: RemoteBuffer) -> concurrent.futures.Future[torch.Tensor]:
        """Starts waiting for a buffer's value."""
        check_open(self.home, "this array")
        executors = self.slices.executors_now(buffer.mesh.slice_id)
        if not executors:
            raise PlacementError(f"the array's mesh {buffer.mesh} is closed: its buffers are gone")
        if self.connections.broken is not None:
            raise self.connections.broken
        put = self.puts.under_way(buffer.buffer_id)
        if put is not None:
            return self.connections.loop.start(_fetch_put(put, executors[0], buffer.buffer_id))
        self.puts.check(buffer.buffer_id)
        return executors[0].reads.read(buffer.buffer_id, _tensor_of)

    def is_ready(self, buffer: RemoteBuffer) -> bool:
        """Whether a read would not wait for a computation."""
        check_open(self.home, "this array")
        executors = self.slices.executors_now(buffer.mesh.slice_id)
        if not executors or self.connections.broken is not None:
            return True  # a read raises at once
        asked = executors[0].reads.read(buffer.buffer_id, lambda value: value.ready, only_ready=True)
        try:
            return wait_for(asked, CALL, "an executor")
        except TorchwaysError:
            return True

    def give_up(self, buffer: RemoteBuffer) -> None:
        """Cancels the run that makes a buffer for which nobody waits any more, unless that run changes state."""
        self.runs.cancel_makers([buffer.buffer_id], "its reader was interrupted", spare_state=True)

    def save(
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
        hosts_of = {mesh: [executor.executor_id for executor in self.slices.executors(mesh)] for mesh in meshes}
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
            saving.append(self.connections.loop.start(self._save(executor_id, folder, named, settled)))
            settling.append(settled)
        for settled in settling:
            result_of(settled, CALL.total_seconds())
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
            return await self.connections.executors[executor_id].save(folder, f"__{executor_id}_", buffers, settle)
        except grpc.aio.AioRpcError as error:
            raise await self.connections.executor_error(executor_id, error) from error
        finally:
            settle()

    # ---- given back

    def release(self, slice_id: SliceId, buffer_id: BufferId) -> None:
        """Gives one buffer back, batched with others. Called by the garbage collector: any thread, no waiting."""
        if not self.connections.is_usable():
            return
        self.puts.forget(buffer_id)
        with self._lock:
            batch = self._releases[slice_id]
            batch.append(buffer_id)
            # Again every so often: an interrupt may have kept the first from asking.
            is_asked_for = len(batch) % _RELEASES == 1
        if is_asked_for:
            try:
                self.connections.loop.call(self._flush_releases_soon)
            except RuntimeError:  # the loop is closed: the interpreter is shutting down
                pass

    def _flush_releases_soon(self) -> None:
        self.connections.loop.loop.call_later(0.005, self._flush_releases)

    def _flush_releases(self) -> None:
        if self.connections.closed:
            return
        with self._lock:
            batches, self._releases = self._releases, defaultdict(list)
        for slice_id, buffer_ids in batches.items():
            waiting = list(filter(None, map(self.puts.under_way, buffer_ids)))
            if waiting:  # a Put still under way would arrive after its release
                releasing = self._release_after(waiting, slice_id, buffer_ids)
                self.connections.hold(releasing, "release of values under way")
            else:
                self._release(slice_id, buffer_ids)

    async def _release_after(
        self, puts: list[concurrent.futures.Future[None]], slice_id: SliceId, buffer_ids: list[BufferId]
    ) -> None:
        await asyncio.gather(*map(asyncio.wrap_future, puts), return_exceptions=True)
        self._release(slice_id, buffer_ids)

    def _release(self, slice_id: SliceId, buffer_ids: list[BufferId]) -> None:
        island = self.slices.ready_island(slice_id)
        if island is not None:
            self.connections.post(island, release_message(slice_id, buffer_ids))


async def _fetch_put(
    put: concurrent.futures.Future[None], executor: ExecutorClient, buffer_id: BufferId
) -> torch.Tensor:
    """Waits for the value of a buffer that is on its way to its executor."""
    sent = asyncio.wrap_future(put)
    sent.add_done_callback(_forget_result)
    await asyncio.shield(sent)  # who gives up reading does not take the value back
    return await asyncio.wrap_future(executor.reads.read(buffer_id, _tensor_of))


def _tensor_of(value: ReadValue) -> torch.Tensor:
    return tensor_from_bytes(value.dtype, value.shape, value.data)


def _forget_result(task: asyncio.Future[Any]) -> None:
    """Takes note of how a task ended that nobody waits for."""
    if not task.cancelled():
        task.exception()
