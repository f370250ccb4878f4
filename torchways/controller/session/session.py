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
from torchways.controller.session.loop import LoopThread
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
from torchways.signals import result_of

logger = logging.getLogger(__name__)

#: For all the arrays of a slice to be read.
_MOVE_SECONDS = 600
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
        """Gives everything back and ends the embedded cluster. Idempotent; it waits for checkpoints only."""
        if self.closed:
            return
        if os.getpid() == self.pid and self.connections.broken is None:
            for wait in self.before_close:
                wait()
        self.connections.close()
        if os.getpid() == self.pid and self._end_cluster is not None:
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
        slice_id, island_id = self.slices.reserve(shape, names, island)
        mesh = VirtualSlice(shape=shape, mesh_dim_names=names, slice_id=slice_id, island=island_id, owner=self)
        self.slices.add(mesh)
        return mesh

    def move_slice(self, mesh: VirtualSlice, island: int | None) -> None:
        """Takes a slice, with all its arrays, to other devices; see `VirtualSlice.remap`."""
        old = mesh.slice_id
        self.slices.address(mesh)
        held = [buffer for reference in list(self.buffers.values()) if (buffer := reference()) is not None]
        buffers = [buffer for buffer in held if buffer.mesh is mesh and not buffer.consumed]
        reads = [(buffer, self.values.start_fetch(buffer)) for buffer in buffers]
        values = [(buffer, result_of(read, _MOVE_SECONDS)) for buffer, read in reads]
        mesh.slice_id, mesh.island = self.slices.reserve(mesh.shape, mesh.mesh_dim_names, island)
        self.slices.add(mesh)
        for buffer, value in values:
            content = HostContent(tuple(value.shape), value.dtype, value)
            placed = self.values.put(HostBuffer(content), mesh, buffer.placements)
            del self.buffers[buffer.buffer_id]
            buffer.buffer_id = placed.buffer_id
            placed.consumed = True  # it is `buffer` now that releases it
            del placed
            self.buffers[buffer.buffer_id] = weakref.ref(buffer)
        self.slices.give_back(old)

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
