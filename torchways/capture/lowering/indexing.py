"""Decompositions of reads and writes by index: gathering, scattering, and reductions into scattered places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

aten = torch.ops.aten


def _neutral(reduce: str, dtype: torch.dtype) -> float:
    """Returns the number that changes no result of a reduction."""
    if reduce in ("sum", "prod"):
        return 0 if reduce == "sum" else 1
    if dtype.is_floating_point:
        return -math.inf if reduce == "amax" else math.inf
    return torch.iinfo(dtype).min if reduce == "amax" else torch.iinfo(dtype).max


def _scatter_reduce(
    value: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    """torch-xla lowers reductions that include the old values, but not "mean", which is a sum over a count."""
    if not index.numel():
        return value.clone()
    if not value.dim():
        return _scatter_reduce(
            value.reshape(1), 0, index.reshape(1), source.reshape(1), reduce, include_self=include_self
        ).reshape(())
    source = source[tuple(slice(size) for size in index.shape)]
    if reduce == "mean":
        return _scatter_mean(value, dim, index, source, include_self)
    if include_self:
        return NotImplemented
    start = value.scatter(dim, index, _neutral(reduce, value.dtype))
    return start.scatter_reduce(dim, index, source, reduce)


def _scatter_mean(
    value: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, include_self: bool
) -> torch.Tensor:
    start, ones = (value, torch.ones_like(value)) if include_self else (torch.zeros_like(value),) * 2
    count = ones.scatter_add(dim, index, torch.ones_like(source))
    total = start.scatter_add(dim, index, source)
    rounding = None if value.is_floating_point() else "floor"
    mean = torch.div(total, count.clamp(min=1), rounding_mode=rounding)
    return mean if include_self else torch.where(count > 0, mean, value)


def _index_reduce(
    value: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, reduce: str, *, include_self: bool = True
) -> torch.Tensor:
    if not value.dim():
        value, source = value.reshape(1), source.reshape(1)
        return _index_reduce(value, 0, index, source, reduce, include_self=include_self).reshape(())
    shape = [1] * source.dim()
    shape[dim] = index.numel()
    index = index.to(torch.int64).reshape(shape).expand(source.shape)
    return value.scatter_reduce(dim, index, source, reduce, include_self=include_self)


def _masked_scatter(value: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Each selected element takes the next of the source: its position is a count of those before."""
    value, mask = torch.broadcast_tensors(value, mask)
    if not source.numel():  # nothing is selected
        return value.clone()
    position = (mask.reshape(-1).to(torch.int64).cumsum(0) - 1).clamp(min=0, max=source.numel() - 1)
    return torch.where(mask, source.reshape(-1)[position].reshape(value.shape), value)


def _masked_scatter_backward(grad: torch.Tensor, mask: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The gradient of the source; elements that are not selected are written behind its end, which is cut off."""
    size = math.prod(sizes)
    grad, mask = torch.broadcast_tensors(grad, mask)
    selected = mask.reshape(-1)
    position = torch.where(selected, selected.to(torch.int64).cumsum(0) - 1, size)
    return grad.new_zeros(size + 1).scatter(0, position, grad.reshape(-1))[:size].reshape(sizes)


def _gather(value: torch.Tensor, dim: int, index: torch.Tensor, *, sparse_grad: bool = False) -> Any:
    """An index without elements may have any number of dimensions."""
    return NotImplemented if index.numel() else value.new_empty(index.shape)


def _scatter_add(value: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> Any:
    """As with `_gather`."""
    return NotImplemented if index.numel() else value.clone()


def _index_select(value: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """torch-xla's own ends the process where the index is computed by sorting."""
    if not value.dim():
        return _index_select(value.reshape(1), 0, index.reshape(-1)).reshape(())
    result: torch.Tensor = aten.index(value, [None] * (dim % value.dim()) + [index.reshape(-1)])
    return result


def _repeat_interleave(repeats: torch.Tensor, *, output_size: int | None = None) -> Any:
    if output_size is None:
        return NotImplemented  # how many there are depends on values
    return torch.searchsorted(repeats.to(torch.int64).cumsum(0), torch.arange(output_size), right=True)


def indexing_decompositions() -> dict[Any, Any]:
    """Returns decompositions of operators that read or write by index."""
    return {
        aten.scatter_reduce.two: _scatter_reduce,
        aten.index_reduce.default: _index_reduce,
        aten.masked_scatter.default: _masked_scatter,
        aten.masked_scatter_backward.default: _masked_scatter_backward,
        aten.gather.default: _gather,
        aten.scatter_add.default: _scatter_add,
        aten.take.default: lambda value, index: aten.index(value.reshape(-1), [index]),
        aten.index_select.default: _index_select,
        aten.repeat_interleave.Tensor: _repeat_interleave,
    }
