"""How large values are, as a whole and on each device.

Dtypes are known by name here, since the passes and the schedulers run without torch; a test compares with torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchways.mesh import Placements

#: PyTorch's names of the dtypes whose elements take more than one byte, by size.
_WIDE_DTYPES = {
    2: ("float16", "half", "bfloat16", "int16", "short", "uint16", "bits16"),
    4: ("float32", "float", "int32", "int", "uint32", "qint32", "complex32", "chalf"),
    8: ("float64", "double", "int64", "long", "uint64", "complex64", "cfloat"),
    16: ("complex128", "cdouble"),
}
_ITEM_BYTES = {name: size for size, names in _WIDE_DTYPES.items() for name in names}


def item_bytes(dtype: str) -> int:
    """Returns the size of one element of a dtype, given its name without the module ("float32")."""
    return _ITEM_BYTES.get(dtype, 1)


def logical_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Returns the size of a whole value."""
    return math.prod(shape) * item_bytes(dtype)


def device_bytes(dtype: str, shape: Sequence[int], placements: Placements, mesh_shape: Sequence[int]) -> int:
    """Returns what a value takes on each device of a mesh."""
    return logical_bytes(dtype, shard_shape(shape, placements, mesh_shape))


def shard_shape(shape: Sequence[int], placements: Placements, mesh_shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the largest shard of a value; `placements` has "R" or "S(dim)" for each axis of the mesh."""
    sizes = list(shape)
    for placement, size in zip(placements, mesh_shape, strict=True):
        if placement != "R":
            dim = int(placement[2:-1])
            sizes[dim] = -(-sizes[dim] // size)
    return tuple(sizes)
