"""Virtual slices and placements: what users say about devices, and nothing about where these are.

A virtual slice is a mesh of virtual devices with named axes. The resource manager maps it to physical devices of one
island; programs only ever name the slice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torchways.errors import PlacementError
from torchways.ids import IslandId, SliceId

#: One placement for each mesh axis, in the form that crosses processes: "R" or "S(dim)".
Placements: TypeAlias = tuple[str, ...]

#: The mesh axis over which a program's host tensors are split along dimension 0 unless they say otherwise.
DATA_AXIS = "dp"

_PLACEMENT = re.compile(r"R|S\(\d+\)")


@dataclass(eq=False, slots=True, kw_only=True)
class VirtualSlice:
    """A mesh of virtual devices on one island, spelled as PyTorch's DeviceMesh. Made by `init_device_mesh`.

    Attributes:
        shape: size of each axis.
        mesh_dim_names: name of each axis.
        slice_id: the resource manager's name for it; -1 in eager mode.
        island: island that holds it; -1 in eager mode.
    """

    shape: tuple[int, ...]
    mesh_dim_names: tuple[str, ...]
    slice_id: SliceId = SliceId(-1)
    island: IslandId = IslandId(-1)
    #: The slice that this is a sub-mesh of.
    parent: VirtualSlice | None = field(default=None, repr=False)
    #: Called once by `close`; gives the devices back.
    release: Callable[[], None] | None = field(default=None, repr=False)
    #: Called by `remap` with an island.
    move: Callable[[int | None], None] | None = field(default=None, repr=False)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def size(self, mesh_dim: int | None = None) -> int:
        """Number of devices, or of one axis."""
        return math.prod(self.shape) if mesh_dim is None else self.shape[mesh_dim]

    def __getitem__(self, names: str | tuple[str, ...]) -> VirtualSlice:
        """Returns the sub-mesh of the named axes; it stands for the same devices."""
        names = (names,) if isinstance(names, str) else names
        for name in names:
            if name not in self.mesh_dim_names:
                raise PlacementError(f"mesh {self} has no axis {name!r}; its axes are {self.mesh_dim_names}")
        return VirtualSlice(
            shape=tuple(self.shape[self.mesh_dim_names.index(name)] for name in names),
            mesh_dim_names=names,
            slice_id=self.slice_id,
            island=self.island,
            parent=self.root,
        )

    @property
    def root(self) -> VirtualSlice:
        """The slice itself, where this is a sub-mesh."""
        return self if self.parent is None else self.parent

    def remap(self, island: int | None = None) -> None:
        """Moves the slice to other devices, of `island` or of an island that the resource manager chooses.

        Its arrays move with it. Programs are bound to the new devices at their next call, without being traced again.
        Waits for runs in flight.

        Raises:
            ResourceExhausted: there are not enough devices.
            PlacementError: there is no such island.
        """
        move = self.root.move
        if move is not None:
            move(island)

    def close(self) -> None:
        """Gives the devices back. Arrays on the slice can no longer be read. Idempotent."""
        release, self.release = self.release, None
        if release is not None:
            release()

    def __str__(self) -> str:
        return mesh_text(self.shape, self.mesh_dim_names)


def mesh_text(shape: Sequence[int], names: Sequence[str]) -> str:
    """Returns ``('dp'=2, 'tp'=4)``."""
    return "(" + ", ".join(f"{name!r}={size}" for name, size in zip(names, shape, strict=True)) + ")"


def check_mesh(shape: Sequence[int], names: Sequence[str] | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns shape and axis names as tuples.

    Raises:
        PlacementError: sizes and names do not fit each other, or a size is below 1.
    """
    shape = tuple(shape)
    names = tuple(names) if names is not None else tuple(f"dim_{index}" for index in range(len(shape)))
    if not shape or len(shape) != len(names) or len(set(names)) != len(names):
        raise PlacementError(
            f"init_device_mesh: shape {shape} and mesh_dim_names {names} must be of one length, not empty, and the "
            "names different from each other"
        )
    for size, name in zip(shape, names, strict=True):
        if not isinstance(size, int) or size < 1:
            raise PlacementError(f"init_device_mesh: axis {name!r} has size {size!r}; sizes are whole numbers from 1")
    return shape, names


def normalize_placements(placements: Sequence[Any] | None, mesh: VirtualSlice, shape: Sequence[int]) -> Placements:
    """Returns placements in their one internal form.

    Args:
        placements: torch.distributed.tensor placements (``Shard(0)``, ``Replicate()``) or "R"/"S(0)" strings, one an
            axis of `mesh`; None replicates.
        mesh: where the tensor is to live.
        shape: its logical shape.

    Raises:
        PlacementError: wrong number of placements, an unknown kind, or a dimension that does not exist or divide.
    """
    if placements is None:
        return ("R",) * mesh.ndim
    texts = tuple(_placement_text(placement) for placement in placements)
    if len(texts) != mesh.ndim:
        raise PlacementError(
            f"{len(texts)} placements {texts} for the {mesh.ndim} axes of mesh {mesh}: give one an axis"
        )
    axes_of: dict[int, list[int]] = {}
    for axis, text in enumerate(texts):
        if text != "R":
            axes_of.setdefault(int(text[2:-1]), []).append(axis)
    for dim, axes in axes_of.items():
        if dim >= len(shape):
            raise PlacementError(f"placement S({dim}) of a tensor of shape {tuple(shape)}: it has no dimension {dim}")
        names = " x ".join(mesh.mesh_dim_names[axis] for axis in axes)
        check_divides(names, math.prod(mesh.shape[axis] for axis in axes), dim, shape[dim])
    return texts


def check_divides(axis_name: str, axis_size: int, dim: int, dim_size: int, where: str = "") -> None:
    """Raises PlacementError unless `dim_size` can be split evenly over the axis."""
    if dim_size % axis_size:
        fits = [str(size) for size in range(1, dim_size + 1) if dim_size % size == 0][:6]
        raise PlacementError(
            f"mesh axis {axis_name!r} has size {axis_size} but dimension {dim} has {dim_size}"
            f"{f' ({where})' if where else ''}; pad it, replicate the tensor (tw.distribute_tensor(x, mesh, "
            f"[Replicate()])), or use an axis of size {' or '.join(fits)}"
        )


def data_placements(shape: Sequence[int], mesh_shape: Sequence[int], names: Sequence[str], where: str) -> Placements:
    """Returns how a program's host tensor is split by default: dimension 0 over the axis named "dp"."""
    texts = ["R"] * len(names)
    if DATA_AXIS in names and len(shape) > 0:
        axis = tuple(names).index(DATA_AXIS)
        check_divides(DATA_AXIS, mesh_shape[axis], 0, shape[0], where)
        texts[axis] = "S(0)"
    return tuple(texts)


def _placement_text(placement: Any) -> str:
    if isinstance(placement, str) and _PLACEMENT.fullmatch(placement):
        return placement
    # torch.distributed.tensor takes a second to import; its placements say what they are.
    if getattr(placement, "is_replicate", bool)():
        return "R"
    if getattr(placement, "is_shard", bool)() and placement.dim >= 0:
        return f"S({placement.dim})"
    raise PlacementError(
        f"unknown placement {placement!r}: use Shard(dim), with dim from 0, or Replicate() of torch.distributed.tensor"
    )
