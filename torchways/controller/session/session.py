"""A session: the controller's connection to a cluster, from `tw.init` to `tw.shutdown`.

It names buffers and runs, sends one message an island a run, bounds how far the controller runs ahead, and turns
lost processes into typed errors at the next read. It knows nothing of graphs.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta

import grpc
import grpc.aio

from torchways.capture.host_content import HostContent
from torchways.controller.buffers import HostBuffer, RemoteBuffer
from torchways.controller.session.connections import CALL, Connections
from torchways.controller.session.loop import LoopThread, wait_for
from torchways.controller.session.programs import Programs
from torchways.controller.session.puts import Puts
from torchways.controller.session.runs import Runs
from torchways.controller.session.slices import Slices
from torchways.controller.session.spans import ClientSpans
from torchways.controller.session.values import Values
from torchways.errors import Failure
from torchways.ids import BufferId, IslandId, ProgramId, RunId, SliceId
from torchways.mesh import VirtualSlice, check_mesh
from torchways.rpc.clients import (
    ClusterInfo,
    ExecutorClient,
    ExecutorStatus,
    ManagerClient,
    SchedulerClient,
)
from torchways.rpc.spans import Span
from torchways.signals import uninterrupted

logger = logging.getLogger(__name__)

#: For an array of a slice that moves to be read, or to arrive.
_MOVE = timedelta(minutes=10)
_MAX_RUNS_IN_FLIGHT = 64
_MAX_PROGRAMS = 10_000


class Session:
    """See the module's docstring. Methods are for the user's thread unless they say else.

    Args:
        manager: the resource manager, not attached yet.
        loop: where all that arrives is handled.
        start_timeout: for executors to start.
        end_cluster: ends the embedded cluster; None where the cluster is not ours.
        share: weight and priority, of its share of devices.

    Attributes:
        connections, slices, programs, runs, values: its parts; see the files of these names.
        lock: held while a call is bound, sent and its results are put in place: who holds it sees no array in between.
        buffers: those that are referred to, by their ids.
        before_close: wait for what must end before the session does.
    """

    def __init__(
        self,
        manager: ManagerClient,
        loop: LoopThread,
        start_timeout: timedelta,
        end_cluster: Callable[[], None] | None = None,
        share: tuple[float, int] = (1.0, 0),
    ) -> None:
        self.lock = threading.RLock()
        self.buffers: dict[BufferId, weakref.ref[RemoteBuffer]] = {}
        self.before_close: list[Callable[[], None]] = []
        self._share = share
        self._end_cluster = end_cluster
        self._spans = ClientSpans()
        self.connections = connections = Connections(manager, loop)
        self._puts = Puts(loop.start, connections.wait, connections.look_again, self._on_not_arrived)
        self.slices = Slices(connections, start_timeout, self._on_program_ready, self._on_run_finished)
        self.programs = Programs(connections, self.slices, _MAX_PROGRAMS)
        self.runs = Runs(connections, self.slices, self.programs, self._puts, self._spans, _MAX_RUNS_IN_FLIGHT)
        self.values = Values(self, connections, self.slices, self._puts, self.runs, self._spans)

    # ---- life

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.connections.closed

    @property
    def pid(self) -> int:
        """The process that it belongs to."""
        return self.connections.pid

    def start(self) -> None:
        """Attaches to the resource manager."""
        name = f"{os.path.basename(sys.argv[0]) or 'python'} pid {os.getpid()}"
        self.connections.attach(name, self._share, self._spans.since)

    def close(self) -> None:
        """Gives everything back and ends the embedded cluster; it waits for checkpoints only.

        Ctrl-C ends that wait; everything is closed all the same. Idempotent: if closing itself is interrupted, another
        call goes on with it.
        """
        is_ours = os.getpid() == self.pid
        try:
            if is_ours and not self.closed and self.connections.broken is None:
                for wait in self.before_close:
                    wait()
        finally:
            try:
                self.connections.close()
            finally:
                if is_ours and self._end_cluster is not None:
                    self._end_cluster()

    def check(self) -> None:
        """Raises if the session is closed or the cluster gone."""
        self.connections.check()

    def is_usable(self) -> bool:
        """Whether there is still something to give back to, and this process may."""
        return self.connections.is_usable()

    def new_ids(self, count: int) -> int:
        """Returns the first of `count` consecutive ids that this client has not used. Any thread."""
        return self.connections.new_ids(count)

    # ---- slices

    def init_device_mesh(self, shape: Sequence[int], names: Sequence[str] | None, island: int | None) -> VirtualSlice:
        """Asks the resource manager for a slice; its executors start in the background."""
        self.check()
        shape, names = check_mesh(shape, names)
        return self.slices.reserve(shape, names, island, self)

    def move_slice(self, mesh: VirtualSlice, island: int | None) -> None:
        """Takes a slice, with all its arrays, to other devices; see `VirtualSlice.remap`."""
        with self.lock:  # nothing is sent meanwhile that reads or makes arrays there
            self.slices.address(mesh)
            # Until all values have arrived there, the new devices are another mesh's; then the two change places. So
            # whatever ends this, `mesh` has all its arrays, and the other mesh, which is closed, what is left over.
            other = self.init_device_mesh(mesh.shape, mesh.mesh_dim_names, island)
            try:
                copies = self._copies_on(other, mesh)
                self.slices.address(mesh)  # raises where another thread has closed it
                with uninterrupted():
                    self._exchange(mesh, other, copies)
            finally:
                other.close()

    def _copies_on(self, other: VirtualSlice, mesh: VirtualSlice) -> list[tuple[RemoteBuffer, RemoteBuffer]]:
        """Returns the buffers on a slice, each with a copy that has arrived on another slice of the same shape."""
        held = [buffer for reference in list(self.buffers.values()) if (buffer := reference()) is not None]
        buffers = [buffer for buffer in held if buffer.mesh is mesh and not buffer.consumed]
        reads = [self.values.start_fetch(buffer) for buffer in buffers]
        try:
            values = [wait_for(read, _MOVE, "an array's value") for read in reads]
        finally:
            with uninterrupted():
                for read in reads:
                    read.cancel()
        contents = [HostContent(tuple(value.shape), value.dtype, value) for value in values]
        copies = [
            self.values.put(HostBuffer(content), other, buffer.placements)
            for buffer, content in zip(buffers, contents, strict=True)
        ]
        for copy in copies:
            self._puts.wait_for(copy.buffer_id, _MOVE)
        return list(zip(buffers, copies, strict=True))

    def _exchange(
        self, mesh: VirtualSlice, other: VirtualSlice, copies: Sequence[tuple[RemoteBuffer, RemoteBuffer]]
    ) -> None:
        """Has two meshes change places, and buffers with their copies on the other. One step to signals, please."""
        self.slices.exchange(mesh, other)
        for buffer, copy in copies:
            buffer.buffer_id, copy.buffer_id = copy.buffer_id, buffer.buffer_id
            for moved in (buffer, copy):
                self.buffers[moved.buffer_id] = weakref.ref(moved)

    def close_slice(self, mesh: VirtualSlice) -> None:
        """Gives a slice back."""
        self.slices.give_back(mesh.slice_id)

    def forget_slice(self, slice_id: SliceId) -> None:
        """Gives a slice back that nobody refers to any more. Called by the garbage collector: any thread, no wait."""
        if self.is_usable():
            self.connections.loop.start(self._release_unused(slice_id))

    async def _release_unused(self, slice_id: SliceId) -> None:
        await self.runs.ended_before(self.new_ids(1))  # what is in flight may use it
        await self.slices.give_back_unused(slice_id)

    # ---- what there is

    def cluster_info(self) -> ClusterInfo:
        """Returns what the cluster consists of."""
        self.check()
        return self.connections.loop.run(self.connections.manager.describe(), CALL, "the resource manager")

    def executor_status(self) -> list[ExecutorStatus]:
        """Returns what the executors of this session's slices say of themselves."""
        self.slices.wait_for_all()
        return [status for _, status in self.connections.ask_executors(lambda client: client.status())]

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

        self.slices.wait_for_all()
        spans = {f"executor {executor_id}": found for executor_id, found in self.connections.ask_executors(ask)}
        for island, scheduler in self.connections.schedulers.items():
            spans[f"scheduler i{island}"] = self.connections.loop.run(ask(scheduler), CALL, "a scheduler")
        spans["controller"] = self._spans.since(since_ns)
        return spans

    def num_messages(self) -> dict[IslandId, dict[str, int]]:
        """Returns how many messages of each kind went to each island's scheduler."""
        return {island: dict(client.num_sent) for island, client in self.connections.schedulers.items()}

    # ---- what becomes of what was sent (on the loop)

    def _on_not_arrived(self, buffer_id: BufferId) -> None:
        self.runs.on_not_arrived(buffer_id)
        if buffer_id not in self.buffers:
            self._puts.forget(buffer_id)

    def _on_program_ready(self, program_id: ProgramId, failure: Failure | None) -> None:
        self.programs.on_ready(program_id, failure)

    def _on_run_finished(self, run_id: RunId, failure: Failure | None) -> None:
        self.runs.on_finished(run_id, failure)
