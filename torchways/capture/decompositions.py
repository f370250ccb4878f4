"""Which operators are taken apart at capture, so that all that is left has a lowering to XLA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, get_decompositions

from torchways.capture.resizing import resizing_decompositions

#: Not in PyTorch's core set of decompositions, but without a lowering in torch-xla (they would run on the host).
_NOT_LOWERED = [
    torch.ops.aten.native_layer_norm_backward,
    torch.ops.aten._fused_rms_norm,
    torch.ops.aten._fused_rms_norm_backward,
    torch.ops.aten.addcdiv_,
    torch.ops.aten.addcmul_,
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


def _scatter_mean(
    value: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    """`scatter_reduce` by "mean" as a sum over a count; torch-xla lowers the other kinds."""
    if reduce != "mean":
        return NotImplemented
    start, ones = (value, torch.ones_like(value)) if include_self else (torch.zeros_like(value),) * 2
    source = source[tuple(slice(size) for size in index.shape)]
    count = ones.scatter_add(dim, index, torch.ones_like(source))
    total = start.scatter_add(dim, index, source)
    rounding = None if value.is_floating_point() else "floor"
    mean = torch.div(total, count.clamp(min=1), rounding_mode=rounding)
    return mean if include_self else torch.where(count > 0, mean, value)


def _copysign(value: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    negative = (sign < 0) | ((sign == 0) & (sign.reciprocal() < 0))
    return torch.where(negative, -value.abs(), value.abs())


def _fmax(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.where(value.isnan(), other, torch.where(other.isnan(), value, value.maximum(other)))


def _fmin(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.where(value.isnan(), other, torch.where(other.isnan(), value, value.minimum(other)))


def _as_strided_scatter(
    value: torch.Tensor,
    source: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> torch.Tensor:
    """An assignment by index; torch-xla's own writes to the wrong elements where strides leave some out."""
    index = torch.full((), storage_offset or 0, dtype=torch.int64)
    for count, step in zip(size, stride, strict=True):
        index = index.unsqueeze(-1) + torch.arange(count) * step
    flat = value.reshape(-1).index_put((index.reshape(-1),), source.reshape(-1))
    return flat.reshape(value.shape)


#: Where PyTorch has no decomposition, or one into what torch-xla does not lower either.
_OURS: dict[Any, Any] = {
    torch.ops.aten._weight_norm_interface_backward.default: _weight_norm_backward,
    torch.ops.aten.scatter_reduce.two: _scatter_mean,
    torch.ops.aten.copysign.Tensor: _copysign,
    torch.ops.aten.exp2.default: lambda value: torch.exp(value * math.log(2.0)),
    torch.ops.aten.fmax.default: _fmax,
    torch.ops.aten.fmin.default: _fmin,
    torch.ops.aten.hypot.default: lambda value, other: torch.sqrt(value * value + other * other),
    torch.ops.aten.as_strided_scatter.default: _as_strided_scatter,
}


@cache
def decomposition_table() -> dict[Any, Any]:
    """Returns the table that make_fx applies: PyTorch's core ATen set and what torch-xla lacks beyond it."""
    return {**core_aten_decompositions(), **get_decompositions(_NOT_LOWERED), **resizing_decompositions(), **_OURS}


def decompositions_of(operators: Iterable[torch._ops.OpOverload]) -> dict[Any, Any]:
    """Returns PyTorch's decompositions of operators that the executors turned out not to lower, where it has any."""
    return get_decompositions(list(operators))
