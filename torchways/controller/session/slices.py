"""The slices of a session: reserved, connected to in the background, and given back."""

from __future__ import annotations

import concurrent.futures
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta

from torchways.controller.session.connections import CALL, Connections
from torchways.errors import ExecutorLost, Failure, PlacementError
from torchways.ids import IslandId, ProgramId, RunId, SliceId
from torchways.mesh import VirtualSlice
from torchways.rpc.clients import ExecutorClient, SliceAddress
from torchways.rpc.programs import close_message
from torchways.signals import result_of


@dataclass(slots=True)
class _Slice:
    """A slice, and its connections once they are up."""

    #: Weak: a slice that nobody refers to is given back.
    mesh: weakref.ref[VirtualSlice]
    island: IslandId
    ready: concurrent.futures.Future[None] = field(init=False)
    address: SliceAddress | None = None
    #: One for each host; every host has what the slice has.
    executors: tuple[ExecutorClient, ...] = ()


@dataclass(slots=True)
class Slices:
    """See the module's docstring. Methods are for the user's thread unless they say else.

    Attributes:
        start_timeout: for the executors of a slice to start.
        on_program_ready, on_run_finished: called, on the loop, with what the slices' islands say.
    """

    connections: Connections
    start_timeout: timedelta
    on_program_ready: Callable[[ProgramId, Failure | None], None]
    on_run_finished: Callable[[RunId, Failure | None], None]
    _slices: dict[SliceId, _Slice] = field(default_factory=dict)

    def reserve(self, shape: tuple[int, ...], names: tuple[str, ...], island: int | None) -> tuple[SliceId, IslandId]:
        """Asks the resource manager for devices; see `add`."""
        reserving = self.connections.manager.reserve_slice(shape, names, island)
        return self.connections.loop.run(reserving, CALL, "a slice")

    def add(self, mesh: VirtualSlice) -> None:
        """Connects to a slice that was reserved, in the background, where its executors start."""
        entry = self._slices[mesh.slice_id] = _Slice(weakref.ref(mesh), mesh.island)
        # Behind the entry: a slice of devices that are in use is there at once.
        entry.ready = self.connections.loop.start(self._open(mesh.slice_id, entry))

    async def _open(self, slice_id: SliceId, entry: _Slice) -> None:
        address = await self.connections.manager.wait_slice(slice_id, self.start_timeout)
        if self._slices.get(slice_id) is not entry:  # closed meanwhile
            return
        entry.executors = self.connections.connect(address, self.on_program_ready, self.on_run_finished)
        entry.address = address

    def address(self, mesh: VirtualSlice) -> SliceAddress:
        """Waits until a slice is ready; returns where it is."""
        self.connections.check()
        entry = self._slices.get(mesh.root.slice_id)
        if entry is None or entry.mesh() is not mesh.root:
            raise PlacementError(f"mesh {mesh} is closed or belongs to another session; make one with init_device_mesh")
        return self._wait(entry)

    def _wait(self, entry: _Slice) -> SliceAddress:
        result_of(entry.ready, self.start_timeout.total_seconds() + 5)
        assert entry.address is not None
        return entry.address

    def wait_for_all(self) -> None:
        """Waits until every slice is ready."""
        self.connections.check()
        for entry in list(self._slices.values()):
            self._wait(entry)

    def address_now(self, mesh: VirtualSlice) -> SliceAddress:
        """Returns where a slice is that was waited for before; on the loop, which must not wait."""
        entry = self._slices.get(mesh.slice_id)
        if entry is None or entry.address is None:
            raise PlacementError(f"mesh {mesh} is closed: make a new one with init_device_mesh")
        return entry.address

    def ready_island(self, slice_id: SliceId) -> IslandId | None:
        """Returns the island of a slice; None: the slice is not ready, or closed. Any thread, no waiting."""
        entry = self._slices.get(slice_id)
        return entry.island if entry is not None and entry.address is not None else None

    def island_of(self, slice_id: SliceId) -> IslandId:
        """Returns the island of a slice that is not closed."""
        return self._slices[slice_id].island

    def are_open(self, slice_ids: Iterable[SliceId]) -> bool:
        """Whether none of some slices is closed."""
        return all(slice_id in self._slices for slice_id in slice_ids)

    def executors(self, mesh: VirtualSlice) -> tuple[ExecutorClient, ...]:
        """Waits until a slice is ready; returns its executors, one for each host."""
        return self._slices[self.address(mesh).slice_id].executors

    def executors_now(self, slice_id: SliceId) -> tuple[ExecutorClient, ...]:
        """Returns a slice's executors; none: it is not ready, or closed. Any thread, no waiting."""
        entry = self._slices.get(slice_id)
        return entry.executors if entry is not None else ()

    def lost_executor_error(self, mesh: VirtualSlice) -> ExecutorLost | None:
        """Returns the error of the first executor of a slice that is known to be lost. Any thread."""
        return self.connections.lost_executor_error(self.executors_now(mesh.slice_id))

    def give_back(self, slice_id: SliceId) -> None:
        """Gives a slice back, if that was not done yet."""
        entry = self._slices.pop(slice_id, None)
        if entry is not None and self.connections.is_usable():
            self.connections.loop.run(self._give_back(slice_id, entry), CALL, "the slice to be released")

    async def give_back_unused(self, slice_id: SliceId) -> None:
        """Gives a slice back, on the loop."""
        entry = self._slices.pop(slice_id, None)
        if entry is not None and self.connections.is_usable():
            await self._give_back(slice_id, entry)

    async def _give_back(self, slice_id: SliceId, entry: _Slice) -> None:
        if entry.address is not None:
            self.connections.post(entry.address.island_id, close_message(slice_id))
        await self.connections.manager.release_slice(slice_id, scheduler_knows=entry.address is not None)
        in_use = {client.executor_id for item in self._slices.values() for client in item.executors}
        gone = PlacementError("the array's mesh was closed meanwhile: its buffers are gone")
        for client in entry.executors:
            if client.executor_id not in in_use:
                await self.connections.disconnect(client, gone)
