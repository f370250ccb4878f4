"""The slices of a session: reserved, connected to in the background, and given back."""

from __future__ import annotations

import concurrent.futures
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta

from torchways.controller.session.connections import CALL, Connections
from torchways.controller.session.loop import wait_for
from torchways.errors import ExecutorLost, Failure, PlacementError
from torchways.ids import IslandId, ProgramId, RunId, SliceId
from torchways.mesh import SliceOwner, VirtualSlice
from torchways.rpc.clients import ExecutorClient, SliceAddress
from torchways.rpc.programs import close_message
from torchways.signals import result_of, uninterrupted


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

    def reserve(
        self, shape: tuple[int, ...], names: tuple[str, ...], island: int | None, owner: SliceOwner
    ) -> VirtualSlice:
        """Asks the resource manager for a slice; connects to it in the background, where its executors start."""
        reserving = self.connections.loop.start(self._reserve(shape, names, island, owner))
        # It is not cancelled: a mesh that comes after an interrupt, and that nobody has, gives its slice back.
        return wait_for(reserving, CALL, "a slice", gives_up=False)

    async def _reserve(
        self, shape: tuple[int, ...], names: tuple[str, ...], island: int | None, owner: SliceOwner
    ) -> VirtualSlice:
        slice_id, island_id = await self.connections.manager.reserve_slice(shape, names, island)
        mesh = VirtualSlice(shape=shape, mesh_dim_names=names, slice_id=slice_id, island=island_id, owner=owner)
        entry = _Slice(weakref.ref(mesh), island_id)
        entry.ready = self.connections.loop.start(self._open(slice_id, entry))
        self._slices[slice_id] = entry
        return mesh

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

    def exchange(self, mesh: VirtualSlice, other: VirtualSlice) -> None:
        """Has two meshes of the same shape change places. One step to signals, please."""
        here, there = self._slices[mesh.slice_id], self._slices[other.slice_id]
        here.mesh, there.mesh = there.mesh, here.mesh
        mesh.slice_id, other.slice_id = other.slice_id, mesh.slice_id
        mesh.island, other.island = other.island, mesh.island

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
        """Gives a slice back, if that was not done yet: also where who waits for it is interrupted."""
        with uninterrupted():
            entry = self._slices.pop(slice_id, None)
            if entry is None or not self.connections.is_usable():
                return
            giving_back = self.connections.loop.start(self._give_back(slice_id, entry))
        wait_for(giving_back, CALL, "the slice to be released", gives_up=False)

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
