"""Resizing (interpolation, adaptive pooling) as products with matrices, where torch-xla has no lowering for it.

Each of these operators is linear and separable: one matrix for each spatial dimension says all. The matrix is read off
the operator itself: it is what it makes of the identity. The gradient is the product with its transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten


def _matrix(operator: Any, size: int, out_size: int, dim: int, num_dims: int, rest: Sequence[Any]) -> torch.Tensor:
    """Returns the matrix [size, out_size] of `operator` in one of its spatial dimensions.

    Args:
        rest: arguments of the operator behind the output size.
    """
    with _disable_current_modes():
        shape = [size if other == dim else 1 for other in range(num_dims)]
        out_shape = [out_size if other == dim else 1 for other in range(num_dims)]
        rows = operator(torch.eye(size).reshape(size, 1, *shape), out_shape, *rest).reshape(size, out_size)
    from torchways.capture.tracer import current_trace  # which applies these decompositions

    trace = current_trace()
    assert trace is not None
    return trace.constant(rows)


def _multiply(value: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    for number, matrix in enumerate(matrices):
        dim = value.dim() - len(matrices) + number
        value = (value.movedim(dim, -1) @ matrix.to(value.dtype)).movedim(-1, dim)
    return value


def _resize(operator: Any, num_dims: int) -> Callable[..., torch.Tensor]:
    def resize(value: torch.Tensor, output_size: Sequence[int], *rest: Any) -> torch.Tensor:
        sizes = value.shape[-num_dims:]
        pairs = enumerate(zip(sizes, output_size, strict=True))
        return _multiply(value, [_matrix(operator, old, new, dim, num_dims, rest) for dim, (old, new) in pairs])

    return resize


def _resize_backward(operator: Any, num_dims: int) -> Callable[..., torch.Tensor]:
    def backward(grad: torch.Tensor, output_size: Sequence[int], input_size: Sequence[int], *rest: Any) -> torch.Tensor:
        pairs = enumerate(zip(input_size[-num_dims:], output_size, strict=True))
        return _multiply(grad, [_matrix(operator, old, new, dim, num_dims, rest).T for dim, (old, new) in pairs])

    return backward


def _pool(operator: Any, num_dims: int) -> Callable[..., Any]:
    resize = _resize(operator, num_dims)

    def pool(value: torch.Tensor, output_size: Sequence[int]) -> Any:
        if _divides(value.shape[-num_dims:], output_size):
            return NotImplemented  # as it is
        return resize(value, output_size)

    return pool


def _pool_backward(operator: Any, num_dims: int) -> Callable[..., Any]:
    backward = _resize_backward(operator, num_dims)

    def pool_backward(grad: torch.Tensor, value: torch.Tensor) -> Any:
        if _divides(value.shape[-num_dims:], grad.shape[-num_dims:]):
            return NotImplemented
        return backward(grad, grad.shape[-num_dims:], value.shape)

    return pool_backward


def _divides(sizes: Sequence[int], out_sizes: Sequence[int]) -> bool:
    return all(size % out_size == 0 for size, out_size in zip(sizes, out_sizes, strict=True))


def resizing_decompositions() -> dict[Any, Any]:
    """Returns decompositions of the resizing operators that torch-xla would run on the host."""
    names = {
        "upsample_linear1d": 1,
        "upsample_bilinear2d": 2,
        "upsample_trilinear3d": 3,
        "upsample_bicubic2d": 2,
        "upsample_nearest1d": 1,
        "upsample_nearest2d": 2,
        "upsample_nearest3d": 3,
        "_upsample_nearest_exact1d": 1,
        "_upsample_nearest_exact2d": 2,
        "_upsample_nearest_exact3d": 3,
    }
    table: dict[Any, Any] = {}
    for name, num_dims in names.items():
        operator = getattr(aten, name).default
        table[getattr(aten, name + "_backward").default] = _resize_backward(operator, num_dims)
    for name, num_dims in {"_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3}.items():
        operator = getattr(aten, name).default
        table[operator] = _pool(operator, num_dims)
        table[getattr(aten, name + "_backward").default] = _pool_backward(operator, num_dims)
    return table
