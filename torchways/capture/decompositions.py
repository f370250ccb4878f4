"""Which operators are taken apart at capture, so that all that is left has a lowering to XLA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, get_decompositions

from torchways.capture.resizing import resizing_decompositions
from torchways.errors import CaptureError

#: Not in PyTorch's core set of decompositions, but without a lowering in torch-xla (they would run on the host).
_NOT_LOWERED = [
    torch.ops.aten.native_layer_norm_backward,
    torch.ops.aten._fused_rms_norm,
    torch.ops.aten._fused_rms_norm_backward,
    torch.ops.aten.addcdiv_,
    torch.ops.aten.addcmul_,
    torch.ops.aten.uniform,
    # Lowered, but torch-xla keeps the biased variance as the running one, and PyTorch the unbiased.
    torch.ops.aten.native_batch_norm,
    torch.ops.aten.native_batch_norm_backward,
    torch.ops.aten._native_batch_norm_legit,
    torch.ops.aten._native_batch_norm_legit_functional,
]


def _weight_norm_backward(
    grad: torch.Tensor, v: torch.Tensor, g: torch.Tensor, norms: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `v * (g / norm(v))`, with the norm over all dimensions but `dim` (PyTorch has none in Python)."""
    others = [other for other in range(v.dim()) if other != dim % v.dim()]
    projected = (grad * v).sum(others, keepdim=True)
    norms = norms.reshape(projected.shape)
    grad_v = (g.reshape(projected.shape) / norms) * (grad - v * (projected / norms.square()))
    return grad_v, (projected / norms).reshape(g.shape)


def _identity(reduce: str, dtype: torch.dtype) -> float:
    """Returns the number that changes nothing in a reduction."""
    if reduce in ("sum", "prod"):
        return 0 if reduce == "sum" else 1
    if dtype.is_floating_point:
        return -math.inf if reduce == "amax" else math.inf
    return torch.iinfo(dtype).min if reduce == "amax" else torch.iinfo(dtype).max


def _scatter_reduce(
    value: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    """By "mean" as a sum over a count; torch-xla lowers the other kinds where the result starts with `value`."""
    if reduce != "mean":
        if include_self:
            return NotImplemented
        return value.scatter(dim, index, _identity(reduce, value.dtype)).scatter_reduce(dim, index, source, reduce)
    start, ones = (value, torch.ones_like(value)) if include_self else (torch.zeros_like(value),) * 2
    source = source[tuple(slice(size) for size in index.shape)]
    count = ones.scatter_add(dim, index, torch.ones_like(source))
    total = start.scatter_add(dim, index, source)
    rounding = None if value.is_floating_point() else "floor"
    mean = torch.div(total, count.clamp(min=1), rounding_mode=rounding)
    return mean if include_self else torch.where(count > 0, mean, value)


def _masked_scatter(value: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Each selected element takes the next of the source: its position is a count of those before."""
    value, mask = torch.broadcast_tensors(value, mask)
    position = (mask.reshape(-1).to(torch.int64).cumsum(0) - 1).clamp(min=0, max=max(0, source.numel() - 1))
    return torch.where(mask, source.reshape(-1)[position].reshape(value.shape), value)


def _masked_scatter_backward(grad: torch.Tensor, mask: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The gradient of the source; what is not selected is written behind its end, which is cut off."""
    size = math.prod(sizes)
    grad, mask = torch.broadcast_tensors(grad, mask)
    selected = mask.reshape(-1)
    position = torch.where(selected, selected.to(torch.int64).cumsum(0) - 1, size)
    return grad.new_zeros(size + 1).scatter(0, position, grad.reshape(-1))[:size].reshape(sizes)


def _addmm(added: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """torch-xla lowers it without factors only."""
    if (beta, alpha) == (1, 1):
        return NotImplemented
    product = left @ right if alpha == 1 else alpha * (left @ right)
    return product if beta == 0 else added * beta + product


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


def _cumsum(value: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """torch-xla adds small integers and booleans up in their own type."""
    if value.dtype.is_floating_point or value.dtype == torch.int64:
        return NotImplemented
    return value.to(dtype or torch.int64).cumsum(dim)


def _signbit(value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        return value < 0
    return (value < 0) | ((value == 0) & (value.reciprocal() < 0))


def _copysign_number(value: torch.Tensor, sign: float) -> torch.Tensor:
    value = value.abs() if value.is_floating_point() else value.abs().to(torch.get_default_dtype())
    return -value if math.copysign(1.0, sign) < 0 else value


def _copysign(value: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    dtype = torch.result_type(value, sign)
    magnitude = value.abs().to(dtype if dtype.is_floating_point else torch.get_default_dtype())
    return torch.where(_signbit(sign), -magnitude, magnitude)


def _fmax(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.where(value.isnan(), other, torch.where(other.isnan(), value, value.maximum(other)))


def _fmin(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.where(value.isnan(), other, torch.where(other.isnan(), value, value.minimum(other)))


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
    return _permute_back(_in_memory(value).reshape(-1)[index], order)


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


#: Where PyTorch has no decomposition, or one into what torch-xla does not lower either.
_OURS: dict[Any, Any] = {
    torch.ops.aten._weight_norm_interface_backward.default: _weight_norm_backward,
    torch.ops.aten.scatter_reduce.two: _scatter_reduce,
    torch.ops.aten.copysign.Tensor: _copysign,
    torch.ops.aten.copysign.Scalar: _copysign_number,
    torch.ops.aten.signbit.default: _signbit,
    torch.ops.aten.cumsum.default: _cumsum,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.masked_scatter.default: _masked_scatter,
    torch.ops.aten.masked_scatter_backward.default: _masked_scatter_backward,
    torch.ops.aten.exp2.default: lambda value: torch.exp(value * math.log(2.0)),
    torch.ops.aten.fmax.default: _fmax,
    torch.ops.aten.fmin.default: _fmin,
    torch.ops.aten.hypot.default: lambda value, other: torch.sqrt(value * value + other * other),
    torch.ops.aten.as_strided_scatter.default: _as_strided_scatter,
}


#: Of views: only for graphs in which nothing is written any more.
_OF_VIEWS: dict[Any, Any] = {
    torch.ops.aten.as_strided.default: _as_strided,
    torch.ops.aten.as_strided_copy.default: _as_strided,
    torch.ops.aten.diagonal.default: _diagonal,
    torch.ops.aten.diagonal_copy.default: _diagonal,
    torch.ops.aten.diagonal_scatter.default: _diagonal_scatter,
}


@cache
def pure_decomposition_table() -> dict[Any, Any]:
    """Returns the table for graphs without in-place operators, in which a view may be a copy."""
    return {**decomposition_table(), **_OF_VIEWS}


@cache
def decomposition_table() -> dict[Any, Any]:
    """Returns the table that make_fx applies: PyTorch's core ATen set and what torch-xla lacks beyond it."""
    return {**core_aten_decompositions(), **get_decompositions(_NOT_LOWERED), **resizing_decompositions(), **_OURS}


def decompositions_of(operators: Iterable[torch._ops.OpOverload]) -> dict[Any, Any]:
    """Returns PyTorch's decompositions of operators that the executors turned out not to lower, where it has any."""
    return get_decompositions(list(operators))
