"""Decompositions of distances between rows, sums over bags of rows, and maxima of windows of uneven size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten


# ---- distances


def _norm(difference: torch.Tensor, p: float) -> torch.Tensor:
    """Returns the p-norm over the last dimension."""
    size = difference.abs()
    if p == 0:
        return (size != 0).sum(-1).to(size.dtype)
    if not size.shape[-1]:
        return size.sum(-1)
    if math.isinf(p):
        return size.amax(-1)
    if p == 1:
        return size.sum(-1)
    return size.square().sum(-1).sqrt() if p == 2 else size.pow(p).sum(-1).pow(1 / p)


def _norm_gradient(grad: torch.Tensor, difference: torch.Tensor, p: float, norm: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of differences; zero where rows are equal."""
    grad, norm, size = grad.unsqueeze(-1), norm.unsqueeze(-1), difference.abs()
    if p == 0:
        return torch.zeros_like(difference)
    if p == 1:
        return grad * difference.sign()
    if math.isinf(p):
        return grad * difference.sign() * (size == norm)
    is_zero = norm == 0
    if p < 1:
        is_zero = is_zero | (size == 0)
    scaled = difference.sign() * size.pow(p - 1) / torch.where(is_zero, 1.0, norm).pow(p - 1)
    return torch.where(is_zero, 0.0, grad * scaled)


def _cdist(left: torch.Tensor, right: torch.Tensor, p: float, compute_mode: int | None) -> torch.Tensor:
    return _norm(left.unsqueeze(-2) - right.unsqueeze(-3), p)


def _cdist_backward(
    grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor, p: float, distance: torch.Tensor
) -> torch.Tensor:
    return _norm_gradient(grad, left.unsqueeze(-2) - right.unsqueeze(-3), p, distance).sum(-2)


def _pairs(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = torch.triu_indices(num_rows, num_rows, 1)
    return pairs[0], pairs[1]


def _pdist(value: torch.Tensor, p: float = 2) -> torch.Tensor:
    first, second = _pairs(value.shape[0])
    return _norm(value[first] - value[second], p)


def _pdist_backward(grad: torch.Tensor, value: torch.Tensor, p: float, distance: torch.Tensor) -> torch.Tensor:
    first, second = _pairs(value.shape[0])
    of_pairs = _norm_gradient(grad, value[first] - value[second], p, distance)
    return torch.zeros_like(value).index_add(0, first, of_pairs).index_add(0, second, -of_pairs)


# ---- bags

_SUM, _MEAN, _MAX = 0, 1, 2


def _embedding_bag(
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:
    """Returns the sum (mean, maximum) of each bag, which bag each index is in, bags' sizes, and rows of maxima."""
    indices, offsets = indices.to(torch.int64), offsets.to(torch.int64)
    starts = offsets[:-1] if include_last_offset else offsets
    num_bags, width = starts.shape[0], weight.shape[1]
    bag = (torch.arange(indices.shape[0]).unsqueeze(-1) >= starts).sum(-1) - 1
    counts = (indices != padding_idx) if padding_idx >= 0 else torch.ones_like(indices, dtype=torch.bool)
    size = torch.zeros(num_bags, dtype=torch.int64).index_add(0, bag, counts.to(torch.int64))
    rows = weight[indices]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if mode == _MAX:
        is_in = (bag.unsqueeze(-1) == torch.arange(num_bags)) & counts.unsqueeze(-1)
        candidates = torch.where(is_in.T.unsqueeze(-1), rows, -math.inf)  # [bag, index, width]
        if not indices.shape[0]:
            empty = torch.zeros(num_bags, width, dtype=torch.int64)
            return weight.new_zeros(num_bags, width), bag, size, empty
        largest, place = candidates.max(1)
        is_empty = (size == 0).unsqueeze(-1)
        source = torch.where(is_empty, 0, indices[place])
        return torch.where(is_empty, 0.0, largest), bag, size, source
    rows = torch.where(counts.unsqueeze(-1), rows, 0.0)
    total = weight.new_zeros(num_bags, width).index_add(0, bag, rows)
    if mode == _MEAN:
        total = total / size.clamp(min=1).unsqueeze(-1)
    return total, bag, size, torch.zeros(num_bags if mode == _MEAN else 0, dtype=torch.int64)


def _embedding_bag_backward(
    grad: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    bag: torch.Tensor,
    size: torch.Tensor,
    source: torch.Tensor,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: torch.Tensor | None,
    padding_idx: int = -1,
) -> torch.Tensor:
    return _embedding_bag_dense_backward(
        grad, indices, bag, size, source, num_weights, scale_grad_by_freq, mode, per_sample_weights, padding_idx
    )


def _embedding_bag_dense_backward(
    grad: torch.Tensor,
    indices: torch.Tensor,
    bag: torch.Tensor,
    size: torch.Tensor,
    source: torch.Tensor,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    per_sample_weights: torch.Tensor | None,
    padding_idx: int = -1,
) -> torch.Tensor:
    zeros = grad.new_zeros(num_weights, grad.shape[1])
    if mode == _MAX:
        grad = torch.where((size == 0).unsqueeze(-1), 0.0, grad)
        return zeros.scatter_add(0, source, grad)
    indices = indices.to(torch.int64)
    rows = grad[bag]
    if mode == _MEAN:
        rows = rows / size.clamp(min=1)[bag].unsqueeze(-1)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if scale_grad_by_freq:
        counts = torch.zeros(num_weights, dtype=torch.int64).index_add(0, indices, torch.ones_like(indices))
        rows = rows / counts[indices].unsqueeze(-1)
    if padding_idx >= 0:
        rows = torch.where((indices == padding_idx).unsqueeze(-1), 0.0, rows)
    return zeros.index_add(0, indices, rows)


def _per_sample_weights_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    bag: torch.Tensor,
    mode: int,
    padding_idx: int = -1,
) -> torch.Tensor:
    products = (grad[bag] * weight[indices.to(torch.int64)]).sum(-1)
    return products if padding_idx < 0 else torch.where(indices == padding_idx, 0.0, products)


# ---- maxima of windows


def _windows(size: int, out_size: int) -> torch.Tensor:
    """Returns the positions of each window [out_size, width]; a short window names its last one again."""
    number = torch.arange(out_size)
    starts = torch.div(number * size, out_size, rounding_mode="floor")
    ends = torch.div((number + 1) * size + out_size - 1, out_size, rounding_mode="floor")
    width = max(-(-(index + 1) * size // out_size) - index * size // out_size for index in range(out_size))
    return torch.minimum(starts.unsqueeze(-1) + torch.arange(width), ends.unsqueeze(-1) - 1)


def _adaptive_max_pool(num_dims: int) -> Callable[..., Any]:
    def pool(value: torch.Tensor, output_size: Sequence[int]) -> Any:
        if not value.numel() or not math.prod(output_size):
            return NotImplemented
        sizes = value.shape[-num_dims:]
        flat = torch.zeros(
            (), dtype=torch.int64
        )  # position of each element of each window: [out, width, out, width, ..]
        for size, out_size in zip(sizes, output_size, strict=True):
            flat = flat.unsqueeze(-1).unsqueeze(-1) * size + _windows(size, out_size)
        order = [*range(0, 2 * num_dims, 2), *range(1, 2 * num_dims, 2)]
        flat = flat.permute(order).reshape(*output_size, -1)
        elements = value.flatten(-num_dims)[..., flat]
        largest, place = elements.max(-1)
        return largest, flat.expand(elements.shape).gather(-1, place.unsqueeze(-1)).squeeze(-1)

    return pool


def _adaptive_max_pool_backward(num_dims: int) -> Callable[..., Any]:
    def backward(grad: torch.Tensor, value: torch.Tensor, indices: torch.Tensor) -> Any:
        zeros = torch.zeros_like(value).flatten(-num_dims)
        return zeros.scatter_add(-1, indices.flatten(-num_dims), grad.flatten(-num_dims)).reshape(value.shape)

    return backward


def _embedding_renorm(weight: torch.Tensor, indices: torch.Tensor, max_norm: float, norm_type: float) -> torch.Tensor:
    """Shortens the rows that are looked up, in place."""
    places, ones = indices.reshape(-1), torch.ones(indices.numel(), dtype=torch.int64)
    is_used = torch.zeros(weight.shape[0], dtype=torch.int64).index_add(0, places.to(torch.int64), ones) > 0
    norm = torch.linalg.vector_norm(weight, norm_type, dim=1)
    scale = torch.where(is_used & (norm > max_norm), max_norm / (norm + 1e-7), 1.0)
    return weight.copy_(weight * scale.unsqueeze(-1))


def neighbour_decompositions() -> dict[Any, Any]:
    """Returns decompositions of operators that torch-xla would run on the host, or computes otherwise than PyTorch."""
    return {
        aten._cdist_forward.default: _cdist,
        aten._cdist_backward.default: _cdist_backward,
        aten._pdist_forward.default: _pdist,
        aten._pdist_backward.default: _pdist_backward,
        aten._embedding_bag.default: _embedding_bag,
        aten._embedding_bag_forward_only.default: _embedding_bag,
        aten._embedding_bag_backward.default: _embedding_bag_backward,
        aten._embedding_bag_dense_backward.default: _embedding_bag_dense_backward,
        aten.embedding_renorm_.default: _embedding_renorm,
        aten._embedding_bag_per_sample_weights_backward.default: _per_sample_weights_backward,
        aten.adaptive_max_pool2d.default: _adaptive_max_pool(2),
        aten.adaptive_max_pool3d.default: _adaptive_max_pool(3),
        aten.adaptive_max_pool2d_backward.default: _adaptive_max_pool_backward(2),
        aten.adaptive_max_pool3d_backward.default: _adaptive_max_pool_backward(3),
    }
