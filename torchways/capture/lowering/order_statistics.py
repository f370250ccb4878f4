"""Decompositions about order: extremes and where they are, medians, running extremes, places in sorted sequences.

A NaN is greater than all else and is every extreme, as in PyTorch. Where several elements are equal, a position may
name another of them than in PyTorch, which leaves that open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten


# ---- extremes


def _position_of(extreme: Any) -> Callable[..., Any]:
    def position(value: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
        if not value.is_floating_point() or not value.numel():
            return NotImplemented
        along = value.reshape(-1) if dim is None else value
        at = 0 if dim is None else dim
        is_there = along.isnan() | (along == extreme(along, [at], True))
        found = is_there.to(torch.int32).argmax(at, keepdim)
        return found.reshape([1] * value.dim()) if dim is None and keepdim else found

    return position


def _nan_where_any_is(extreme: Any) -> Callable[..., Any]:
    """Makes an extreme NaN where any element is: between devices, XLA leaves NaNs out whatever it is told."""
    is_inside = False

    def reduce(value: torch.Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
        nonlocal is_inside
        if is_inside or not value.is_floating_point() or not value.numel() or not value.dim():
            return NotImplemented
        is_inside = True
        try:
            dims = list(dim) or list(range(value.dim()))
            return torch.where(value.isnan().sum(dims, keepdim) > 0, math.nan, extreme(value, dims, keepdim))
        finally:
            is_inside = False

    return reduce


def _extreme_of_all(extreme: Any) -> Callable[..., Any]:
    def reduce(value: torch.Tensor) -> Any:
        return extreme(value) if value.is_floating_point() else NotImplemented

    return reduce


def _vector_norm(
    value: torch.Tensor,
    ord: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """The largest or smallest size is an extreme; the other norms are torch-xla's."""
    if not math.isinf(ord) or not value.is_floating_point() or not value.numel():
        return NotImplemented
    size = value.to(dtype or value.dtype).abs()
    return (aten.amax if ord > 0 else aten.amin).default(size, list(dim or range(value.dim())), keepdim)


def _extreme_and_position(extreme: Any, position: Any) -> Callable[..., Any]:
    def both(value: torch.Tensor, dim: int, keepdim: bool = False) -> Any:
        if not value.is_floating_point() or not value.numel():
            return NotImplemented
        return extreme(value, [dim], keepdim), position(value, dim, keepdim)

    return both


# ---- medians


def _median(value: torch.Tensor, dim: int, keepdim: bool = False) -> Any:
    ordered, order = value.sort(dim=dim, stable=True)
    if not value.is_floating_point():
        place = torch.full_like(ordered.narrow(dim, 0, 1), (value.shape[dim] - 1) // 2, dtype=torch.int64)
        return _taken(ordered, order, place, dim, keepdim)
    num_numbers = value.isnan().logical_not().sum(dim, keepdim=True)  # NaNs come last
    has_nan = num_numbers < value.shape[dim]
    return _taken(ordered, order, torch.where(has_nan, num_numbers, (value.shape[dim] - 1) // 2), dim, keepdim)


def _nanmedian(value: torch.Tensor, dim: int, keepdim: bool = False) -> Any:
    if not value.is_floating_point():
        return _median(value, dim, keepdim)
    ordered, order = value.sort(dim=dim, stable=True)
    num_numbers = value.isnan().logical_not().sum(dim, keepdim=True)
    place = torch.div((num_numbers - 1).clamp(min=0), 2, rounding_mode="floor")
    return _taken(ordered, order, place, dim, keepdim)


def _taken(ordered: torch.Tensor, order: torch.Tensor, place: torch.Tensor, dim: int, keepdim: bool) -> Any:
    values, positions = ordered.gather(dim, place), order.gather(dim, place)
    return (values, positions) if keepdim else (values.squeeze(dim), positions.squeeze(dim))


def _of_all(along: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(value: torch.Tensor) -> Any:
        return along(value.reshape(-1), 0)[0] if value.numel() else NotImplemented

    return reduce


def _mode(value: torch.Tensor, dim: int = -1, keepdim: bool = False) -> Any:
    """The smallest of the most frequent values; each is compared with all others."""
    if not value.numel():
        return NotImplemented
    if not value.dim():
        return value.clone(), torch.zeros_like(value, dtype=torch.int64)
    moved = value.movedim(dim, -1)
    count = (moved.unsqueeze(-1) == moved.unsqueeze(-2)).sum(-1)
    is_most = count == count.amax(-1, keepdim=True)
    found = torch.where(is_most, moved, moved.amax(-1, keepdim=True)).amin(-1, keepdim=True)
    places = torch.arange(moved.shape[-1])
    position = torch.where(moved == found, places, 0).amax(-1, keepdim=True)
    found, position = found.movedim(-1, dim), position.movedim(-1, dim)
    return (found, position) if keepdim else (found.squeeze(dim), position.squeeze(dim))


# ---- running values


def _scan(values: tuple[torch.Tensor, ...], dim: int, combine: Callable[..., tuple[torch.Tensor, ...]]) -> Any:
    """Returns, for each position, what `combine(earlier, later)` makes of all up to it; in log2(size) rounds."""
    size, distance = values[0].shape[dim], 1
    while distance < size:
        earlier = tuple(value.narrow(dim, 0, size - distance) for value in values)
        later = tuple(value.narrow(dim, distance, size - distance) for value in values)
        combined = combine(earlier, later)
        values = tuple(
            torch.cat([value.narrow(dim, 0, distance), new], dim) for value, new in zip(values, combined, strict=True)
        )
        distance *= 2
    return values


def _running_extreme(is_later: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def combine(earlier: tuple[torch.Tensor, ...], later: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        old, new = earlier[0], later[0]
        takes_later = is_later(new, old)
        if new.is_floating_point():
            takes_later = new.isnan() | (takes_later & old.isnan().logical_not())
        return tuple(torch.where(takes_later, b, a) for a, b in zip(earlier, later, strict=True))

    def running(value: torch.Tensor, dim: int) -> Any:
        if not value.dim():
            return value.clone(), torch.zeros_like(value, dtype=torch.int64)
        shape = [1] * value.dim()
        shape[dim] = value.shape[dim]
        places = torch.arange(value.shape[dim]).reshape(shape).expand(value.shape)
        return _scan((value, places), dim, combine)

    return running


def _logcumsumexp(value: torch.Tensor, dim: int) -> torch.Tensor:
    if not value.dim():
        return value.clone()
    [result] = _scan((value,), dim, lambda earlier, later: (torch.logaddexp(earlier[0], later[0]),))
    return result


def _cumprod(value: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """torch-xla has it for numbers with a fraction only."""
    dtype = dtype or (value.dtype if value.is_floating_point() or value.is_complex() else torch.int64)
    if dtype.is_floating_point or dtype.is_complex or not value.dim():
        return NotImplemented if value.dtype == dtype else value.to(dtype).cumprod(dim)
    [result] = _scan((value.to(dtype),), dim, lambda earlier, later: (earlier[0] * later[0],))
    return result


# ---- places in sorted sequences


def _searchsorted(
    sequence: torch.Tensor,
    value: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: torch.Tensor | None = None,
) -> torch.Tensor:
    """Counts what stands before: all are compared with all."""
    if not isinstance(value, torch.Tensor):
        value = torch.full((), value)
    if sorter is not None:
        sequence = sequence.gather(-1, sorter)
    if sequence.dim() > 1:
        sequence = sequence.unsqueeze(-2)
    value = value.unsqueeze(-1)
    is_behind = sequence > value if right or side == "right" else sequence >= value
    return is_behind.logical_not().sum(-1).to(torch.int32 if out_int32 else torch.int64)


def _bucketize(value: Any, boundaries: torch.Tensor, *, out_int32: bool = False, right: bool = False) -> torch.Tensor:
    return _searchsorted(boundaries, value, out_int32=out_int32, right=right)


def _histc(value: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0) -> torch.Tensor:
    low, high = torch.full((), min, dtype=value.dtype), torch.full((), max, dtype=value.dtype)
    value = value.reshape(-1)
    if min == max and value.numel():
        low, high = value.amin(), value.amax()
    is_point = low == high
    low, high = torch.where(is_point, low - 1, low), torch.where(is_point, high + 1, high)
    place = ((value - low) * bins / (high - low)).to(torch.int64).clamp(0, bins - 1)
    is_inside = ((value >= low) & (value <= high)).to(value.dtype)
    return value.new_zeros(bins).scatter_add(0, place, is_inside)


def extreme_decompositions() -> dict[Any, Any]:
    """Returns decompositions that are made once, of a graph that is otherwise done."""
    return {
        aten.amax.default: _nan_where_any_is(aten.amax.default),
        aten.amin.default: _nan_where_any_is(aten.amin.default),
    }


def order_decompositions() -> dict[Any, Any]:
    """Returns decompositions of operators that torch-xla would run on the host, or computes otherwise than PyTorch."""
    return {
        aten.argmax.default: _position_of(aten.amax.default),
        aten.argmin.default: _position_of(aten.amin.default),
        aten.max.default: _extreme_of_all(aten.amax.default),
        aten.min.default: _extreme_of_all(aten.amin.default),
        aten.linalg_vector_norm.default: _vector_norm,
        aten.max.dim: _extreme_and_position(aten.amax.default, aten.argmax.default),
        aten.min.dim: _extreme_and_position(aten.amin.default, aten.argmin.default),
        aten.median.dim: _median,
        aten.nanmedian.dim: _nanmedian,
        aten.median.default: _of_all(_median),
        aten.nanmedian.default: _of_all(_nanmedian),
        aten.mode.default: _mode,
        aten.cummax.default: _running_extreme(torch.ge),
        aten.cummin.default: _running_extreme(torch.le),
        aten.logcumsumexp.default: _logcumsumexp,
        aten.cumprod.default: _cumprod,
        aten.searchsorted.Tensor: _searchsorted,
        aten.searchsorted.Scalar: _searchsorted,
        aten.bucketize.Tensor: _bucketize,
        aten.bucketize.Scalar: _bucketize,
        aten.histc.default: _histc,
    }
