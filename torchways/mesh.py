"""Virtual slices and placements: how users describe devices, without naming physical ones.

A virtual slice is a mesh of virtual devices with named axes. The resource manager maps it to physical devices of one
island; programs refer only to the slice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from torchways.errors import PlacementError
from torchways.ids import IslandId, SliceId

#: One placement for each mesh axis, in the form that crosses processes: "R" or "S(dim)".
Placements: TypeAlias = tuple[str, ...]

#: The mesh axis over which a program's host tensors are split along dimension 0 by default.
DATA_AXIS = "dp"

#: A tensor of more dimensions cannot be split: torch-xla's shardings have no more.
MAX_SPLIT_DIMS = 5

_SHORT_DTYPES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

_PLACEMENT = re.compile(r"R|S\(\d+\)")


class SliceOwner(Protocol):
    """The part of a session that its slices call."""

    def close_slice(self, mesh: VirtualSlice) -> None:
        """Gives the devices back."""

    def forget_slice(self, slice_id: SliceId) -> None:
        """Gives back the devices of a slice that nothing refers to any more. Never waits; safe from any thread."""

    def move_slice(self, mesh: VirtualSlice, island: int | None) -> None:
        """Moves a slice to other devices."""


@dataclass(eq=False, slots=True, kw_only=True, weakref_slot=True)
class VirtualSlice:
    """A mesh of virtual devices on one island, with the interface of PyTorch's DeviceMesh. Made by `init_device_mesh`.

    The devices are released by `close`, or when no variable, array, module or program refers to the slice any more.

    Attributes:
        shape: size of each axis.
        mesh_dim_names: name of each axis.
        slice_id: identifier that the resource manager gave the slice; -1 in eager mode.
        island: island that holds the slice; in eager mode the one that was asked for, or 0.
    """

    shape: tuple[int, ...]
    mesh_dim_names: tuple[str, ...]
    slice_id: SliceId = SliceId(-1)
    island: IslandId = IslandId(-1)
    #: The slice that this is a sub-mesh of; None if it is a slice itself.
    parent: VirtualSlice | None = field(default=None, repr=False)
    #: None in eager mode, of a sub-mesh, and once it is closed.
    owner: SliceOwner | None = field(default=None, repr=False)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def size(self, mesh_dim: int | None = None) -> int:
        """Returns the number of devices, or the size of one axis."""
        return math.prod(self.shape) if mesh_dim is None else self.shape[mesh_dim]

    def __getitem__(self, names: str | tuple[str, ...]) -> VirtualSlice:
        """Returns the sub-mesh with the named axes, on the same devices."""
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
        """The slice that this is a sub-mesh of, or the slice itself."""
        return self if self.parent is None else self.parent

    def remap(self, island: int | None = None) -> None:
        """Moves the slice to other devices: of `island`, or of an island that the resource manager chooses.

        The arrays on the slice move with it. Programs use the new devices from their next call on and are not traced
        again. Waits for runs in flight. If it fails or is interrupted, the slice and its arrays stay where they are.

        Raises:
            ResourceExhausted: there are not enough devices.
            PlacementError: there is no such island, or the slice is closed.
            ExecutorLost: the executors of the new devices could not start, or were lost meanwhile.
            RemoteError: an array has no value, because what would have made it failed.
        """
        owner = self.root.owner
        if owner is None and self.root.slice_id >= 0:
            raise PlacementError(f"mesh {self} is closed: make a new one with init_device_mesh")
        if owner is not None:
            owner.move_slice(self.root, island)

    def close(self) -> None:
        """Releases the devices. Arrays on the slice can no longer be read. A second call does nothing."""
        owner = self.owner
        if owner is not None:
            owner.close_slice(self)
        self.owner = None  # only now: of a call that is interrupted before, `__del__` makes up for it

    def __del__(self) -> None:
        if self.owner is not None:
            self.owner.forget_slice(self.slice_id)

    def __str__(self) -> str:
        return mesh_text(self.shape, self.mesh_dim_names)


def mesh_text(shape: Sequence[int], names: Sequence[str]) -> str:
    """Returns ``('dp'=2,'tp'=4)``."""
    return "(" + ",".join(f"{name!r}={size}" for name, size in zip(names, shape, strict=True)) + ")"


def tensor_text(dtype: object, shape: Sequence[int], placements: Placements | None = None) -> str:
    """Returns ``fp32[2048,256][S(0)]``: dtype, shape, and one placement per axis, up to the last split axis."""
    kept = list(placements or ())
    while len(kept) > 1 and kept[-1] == "R":
        kept.pop()
    name = str(dtype).removeprefix("torch.")
    return f"{_SHORT_DTYPES.get(name, name)}[{','.join(map(str, shape))}]" + "".join(f"[{text}]" for text in kept)


def check_mesh(shape: Sequence[int], names: Sequence[str] | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns shape and axis names as tuples.

    Raises:
        PlacementError: the numbers of sizes and names differ, a name occurs twice, or a size is below 1.
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
            raise PlacementError(f"init_device_mesh: axis {name!r} has size {size!r}; a size is a whole number above 0")
    return shape, names


def normalize_placements(placements: Sequence[Any] | None, mesh: VirtualSlice, shape: Sequence[int]) -> Placements:
    """Returns placements in the internal form: one for each axis of the slice.

    Args:
        placements: one placement per axis of `mesh`, either those of torch.distributed.tensor (``Shard(0)``,
            ``Replicate()``) or the strings "R" and "S(0)"; or a partition spec, one entry per dimension of the tensor:
            an axis name, a tuple of axis names, or None (``("dp", None)``, ``(("dp", "tp"),)``). Dimensions after the
            last entry are not split. If `placements` is None, the tensor is replicated.
        mesh: the slice or sub-mesh. Over axes that a sub-mesh leaves out, the tensor is replicated.
        shape: logical shape of the tensor.

    Raises:
        PlacementError: the number of placements is wrong, a placement or axis is unknown, a dimension does not exist or
            cannot be split evenly, or the tensor has more than `MAX_SPLIT_DIMS` dimensions.
    """
    if placements is None:
        placements = ("R",) * mesh.ndim
    elif _is_partition_spec(placements):
        placements = _from_partition_spec(placements, mesh, shape)
    texts = tuple(_placement_text(placement, shape) for placement in placements)
    if len(texts) != mesh.ndim:
        raise PlacementError(
            f"{len(texts)} placements {texts} for the {mesh.ndim} axes of mesh {mesh}: give one per axis"
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
    if axes_of and len(shape) > MAX_SPLIT_DIMS:
        raise PlacementError(
            f"placements {texts} of a tensor of shape {tuple(shape)}: torch-xla splits tensors of at most "
            f"{MAX_SPLIT_DIMS} dimensions; replicate it, or view it with fewer"
        )
    of_axis = dict(zip(mesh.mesh_dim_names, texts, strict=True))
    return tuple(of_axis.get(name, "R") for name in mesh.root.mesh_dim_names)


def _is_partition_spec(entries: Sequence[Any]) -> bool:
    """Returns True if the entries form a partition spec: names, tuples of names, and None."""
    return all(
        entry is None or isinstance(entry, tuple) or (isinstance(entry, str) and not _PLACEMENT.fullmatch(entry))
        for entry in entries
    )


def _from_partition_spec(spec: Sequence[Any], mesh: VirtualSlice, shape: Sequence[int]) -> list[str]:
    if len(spec) > len(shape):
        raise PlacementError(f"the partition spec {tuple(spec)} has {len(spec)} entries for shape {tuple(shape)}")
    texts = {name: "R" for name in mesh.mesh_dim_names}
    for dim, entry in enumerate(spec):
        names = (entry,) if isinstance(entry, str) else entry or ()
        for name in names:
            if name not in texts:
                axes = ", ".join(mesh.mesh_dim_names)
                raise PlacementError(f"the partition spec {tuple(spec)} names {name!r}; mesh {mesh} has axes {axes}")
            if texts[name] != "R":
                raise PlacementError(f"the partition spec {tuple(spec)} names axis {name!r} twice")
            texts[name] = f"S({dim})"
        if list(names) != [name for name in mesh.mesh_dim_names if name in names]:
            raise PlacementError(
                f"the partition spec {tuple(spec)} splits dimension {dim} over {names}: name axes in the mesh's order, "
                f"{mesh.mesh_dim_names}"
            )
    return list(texts.values())


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
    """Returns the default placements of a program's host tensor: dimension 0 split over the axis "dp", if any."""
    texts = ["R"] * len(names)
    if DATA_AXIS in names and 0 < len(shape) <= MAX_SPLIT_DIMS:
        axis = tuple(names).index(DATA_AXIS)
        check_divides(DATA_AXIS, mesh_shape[axis], 0, shape[0], where)
        texts[axis] = "S(0)"
    return tuple(texts)


def _placement_text(placement: Any, shape: Sequence[int]) -> str:
    if isinstance(placement, str) and _PLACEMENT.fullmatch(placement):
        return placement
    # torch.distributed.tensor takes a second to import; its placements say what they are.
    if getattr(placement, "is_replicate", bool)():
        return "R"
    if getattr(placement, "is_shard", bool)():
        dim = placement.dim + len(shape) if placement.dim < 0 else placement.dim
        if dim < 0:
            raise PlacementError(
                f"placement {placement!r} of a tensor of shape {tuple(shape)}: it has no such dimension"
            )
        return f"S({dim})"
    raise PlacementError(f"unknown placement {placement!r}: use Shard(dim) or Replicate() of torch.distributed.tensor")
