"""Decompositions of views and writes through strides, and of diagonals, into indexing.

The recorder keeps track of the memory that a result shares with the tensor that it is a view of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from torchways.errors import CaptureError

aten = torch.ops.aten


def _order_in_memory(strides: Sequence[int]) -> list[int]:
    return sorted(range(len(strides)), key=lambda dim: -strides[dim])


def _permute_back(value: torch.Tensor, order: list[int]) -> torch.Tensor:
    return value.permute([order.index(dim) for dim in range(value.dim())])


def _in_memory(value: torch.Tensor) -> torch.Tensor:
    """Returns a tensor with its dimensions in the order in which they lie in memory."""
    dense = value.permute(_order_in_memory(value.stride()))
    if not dense.is_contiguous():
        raise CaptureError(
            f"as_strided of a tensor of shape {list(value.shape)} and strides {list(value.stride())} cannot be "
            "captured: its elements do not lie side by side; call it on a contiguous one, or index instead"
        )
    return dense


def _memory_index(
    value: torch.Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None
) -> torch.Tensor:
    """Returns which elements in memory a tensor of these strides has, counted from the first of `value`."""
    start = 0 if storage_offset is None else storage_offset - int(value.storage_offset())
    end = start + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    if math.prod(size) and (start < 0 or end >= value.numel()):
        raise CaptureError(
            f"as_strided({list(size)}, {list(stride)}, {storage_offset}) of a tensor of shape {list(value.shape)} "
            "cannot be captured: it reaches beyond that tensor; call it on the whole one"
        )
    index = torch.full((), start, dtype=torch.int64)
    for count, step in zip(size, stride, strict=True):
        index = index.unsqueeze(-1) + torch.arange(count) * step
    return index


def _as_strided(
    value: torch.Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> torch.Tensor:
    """By index; torch-xla's own takes every tensor for a contiguous one.

    Where no elements are shared or left out, the result has the strides asked for: views that follow need them.
    """
    order = _order_in_memory(stride)
    index = _memory_index(value, [size[dim] for dim in order], [stride[dim] for dim in order], storage_offset)
    # Not flat[index]: of an index without dimensions, Python asks for its value.
    taken = aten.index.Tensor(_in_memory(value).reshape(-1), [index])
    return _permute_back(taken, order)


def _as_strided_scatter(
    value: torch.Tensor,
    source: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> torch.Tensor:
    """An assignment by index; torch-xla's own writes to the wrong elements where strides leave some out."""
    dense = _in_memory(value)
    index = _memory_index(value, size, stride, storage_offset)
    flat = dense.reshape(-1).index_put((index.reshape(-1),), source.reshape(-1))
    return _permute_back(flat.reshape(dense.shape), _order_in_memory(value.stride()))


def _diagonal(value: torch.Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> torch.Tensor:
    """By index; torch-xla's own takes other elements where the offset is negative or dimensions are not in order."""
    moved = value.movedim((dim1, dim2), (-2, -1))
    below, right = max(-offset, 0), max(offset, 0)
    steps = torch.arange(max(0, min(moved.shape[-2] - below, moved.shape[-1] - right)), device=value.device)
    return moved[..., steps + below, steps + right]


def _diagonal_scatter(
    value: torch.Tensor, source: torch.Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> torch.Tensor:
    moved = value.movedim((dim1, dim2), (-2, -1))
    below = max(-offset, 0)
    rows = torch.arange(moved.shape[-2], device=value.device).unsqueeze(-1)
    columns = torch.arange(moved.shape[-1], device=value.device)
    position = (rows - below).clamp(0, max(0, source.shape[-1] - 1)).squeeze(-1)
    on_diagonal = (columns - rows == offset).expand(moved.shape)
    spread = source[..., position].unsqueeze(-1) if source.shape[-1] else moved
    return torch.where(on_diagonal, spread, moved).movedim((-2, -1), (dim1, dim2))


def stride_decompositions() -> dict[Any, Any]:
    """Returns decompositions of operators that read or write through strides."""
    return {
        aten.as_strided_scatter.default: _as_strided_scatter,
        aten.as_strided.default: _as_strided,
        aten.as_strided_copy.default: _as_strided,
        aten.diagonal.default: _diagonal,
        aten.diagonal_copy.default: _diagonal,
        aten.diagonal_scatter.default: _diagonal_scatter,
    }
