"""Resizing (interpolation, average pooling) as products with matrices, where torch-xla has no lowering for it.

Each of these operators is linear and separable, so it is a product with one matrix for each spatial dimension. The
matrix is the operator's own result for the identity. The gradient is the product with its transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from torchways.capture.current_trace import current_trace
from torchways.capture.source import user_line
from torchways.errors import CaptureError

aten = torch.ops.aten


def _matrix(
    operator: Any, size: int, out_size: int, dim: int, num_dims: int, rest: Sequence[Any], dtype: torch.dtype
) -> torch.Tensor:
    """Returns the matrix [size, out_size] of `operator` in one of its spatial dimensions.

    Args:
        rest: arguments of the operator behind the output size.
        dtype: of what is resized.
    """
    with _disable_current_modes():
        shape = [size if other == dim else 1 for other in range(num_dims)]
        # Two in the other dimensions: with one, PyTorch 2.9's antialiasing gives the first row for all.
        wide = [size if other == dim else 2 for other in range(num_dims)]
        out_shape = [out_size if other == dim else 2 for other in range(num_dims)]
        columns = _identity(size, dtype).reshape(size, 1, *shape).expand(size, 1, *wide)
        rows = operator(columns.contiguous(), out_shape, *rest).movedim(2 + dim, -1).reshape(size, -1, out_size)[:, 0]
    return _constant(rows)


def _identity(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def _constant(matrix: torch.Tensor) -> torch.Tensor:
    trace = current_trace()
    assert trace is not None
    return trace.constant(matrix)


def _multiply(value: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    for number, matrix in enumerate(matrices):
        dim = value.dim() - len(matrices) + number
        value = (value.movedim(dim, -1) @ matrix.to(value.dtype)).movedim(-1, dim)
    return value


def _resize(operator: Any, num_dims: int) -> Callable[..., torch.Tensor]:
    def resize(value: torch.Tensor, output_size: Sequence[int], *rest: Any) -> torch.Tensor:
        sizes = value.shape[-num_dims:]
        pairs = enumerate(zip(sizes, output_size, strict=True))
        return _multiply(
            value, [_matrix(operator, old, new, dim, num_dims, rest, value.dtype) for dim, (old, new) in pairs]
        )

    return resize


def _resize_by_factor(operator: Any, num_dims: int) -> Callable[..., Any]:
    resize = _resize(operator, num_dims)

    def resize_by_factor(
        value: torch.Tensor, output_size: Sequence[int], align_corners: bool, *factors: float | None
    ) -> Any:
        if value.dtype != torch.float64 and (align_corners or not any(factors)):
            return NotImplemented  # as it is; torch-xla does not look at factors, and computes in float32
        return resize(value, output_size, align_corners, *factors)

    return resize_by_factor


def _resize_backward(operator: Any, num_dims: int) -> Callable[..., torch.Tensor]:
    def backward(grad: torch.Tensor, output_size: Sequence[int], input_size: Sequence[int], *rest: Any) -> torch.Tensor:
        pairs = enumerate(zip(input_size[-num_dims:], output_size, strict=True))
        return _multiply(
            grad, [_matrix(operator, old, new, dim, num_dims, rest, grad.dtype).T for dim, (old, new) in pairs]
        )

    return backward


def _pool(operator: Any, num_dims: int) -> Callable[..., Any]:
    resize = _resize(operator, num_dims)

    def pool(value: torch.Tensor, output_size: Sequence[int]) -> Any:
        if value.dtype != torch.float64 and _divides(value.shape[-num_dims:], output_size):
            return NotImplemented  # as it is; torch-xla computes in float32
        return resize(value, output_size)

    return pool


def _pool_backward(operator: Any, num_dims: int) -> Callable[..., Any]:
    backward = _resize_backward(operator, num_dims)

    def pool_backward(grad: torch.Tensor, value: torch.Tensor) -> Any:
        if value.dtype != torch.float64 and _divides(value.shape[-num_dims:], grad.shape[-num_dims:]):
            return NotImplemented
        return backward(grad, grad.shape[-num_dims:], value.shape)

    return pool_backward


def _average_matrices(
    operator: Any,
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
    *,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Returns the matrices of average pooling; with a divisor of its own, the product of theirs is the whole."""
    num_dims = len(sizes)

    def of(values: Sequence[int], dim: int) -> int:
        return values[dim if len(values) > 1 else 0]

    matrices = []
    for dim, size in enumerate(sizes):
        unit = [1] * num_dims
        shape, window, step, border = [*unit], [*unit], [*unit], [0] * num_dims
        shape[dim], window[dim], border[dim] = size, of(kernel, dim), of(padding, dim)
        step[dim] = of(stride, dim) if stride else window[dim]
        own = None if divisor is None else (divisor if dim == 0 else 1)
        with _disable_current_modes():
            rows = operator(
                _identity(size, dtype).reshape(size, 1, *shape), window, step, border, ceil_mode, count_include_pad, own
            ).reshape(size, -1)
        matrices.append(_constant(rows))
    return matrices


def _average_pool(operator: Any, num_dims: int) -> Callable[..., Any]:
    def pool(
        value: torch.Tensor,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor: int | None = None,
    ) -> Any:
        if not ceil_mode and divisor is None and (count_include_pad or not any(padding)):
            return NotImplemented  # as it is
        if not value.is_floating_point():
            raise CaptureError(
                f"average pooling of {value.dtype} with these options has no lowering to XLA, at {user_line()}"
            )
        sizes = value.shape[-num_dims:]
        options = (kernel, stride, padding, ceil_mode, count_include_pad, divisor)
        return _multiply(value, _average_matrices(operator, sizes, *options, dtype=value.dtype))

    return pool


def _average_pool_backward(operator: Any, num_dims: int) -> Callable[..., Any]:
    def backward(grad: torch.Tensor, value: torch.Tensor, *options: Any) -> Any:
        matrices = _average_matrices(operator, value.shape[-num_dims:], *options, dtype=value.dtype)
        return _multiply(grad, [matrix.T for matrix in matrices])

    return backward


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
        "_upsample_bilinear2d_aa": 2,
        "_upsample_bicubic2d_aa": 2,
    }
    table: dict[Any, Any] = {}
    for name, num_dims in names.items():
        operator = getattr(aten, name).default
        table[getattr(aten, name + "_backward").default] = _resize_backward(operator, num_dims)
    for operator in (aten._upsample_bilinear2d_aa.default, aten._upsample_bicubic2d_aa.default):
        table[operator] = _resize(operator, 2)
    table[aten.upsample_bilinear2d.default] = _resize_by_factor(aten.upsample_bilinear2d.default, 2)
    for name, num_dims in {"_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3}.items():
        operator = getattr(aten, name).default
        table[operator] = _pool(operator, num_dims)
        table[getattr(aten, name + "_backward").default] = _pool_backward(operator, num_dims)
    for name, num_dims in {"avg_pool2d": 2, "avg_pool3d": 3}.items():
        operator = getattr(aten, name).default
        table[operator] = _average_pool(operator, num_dims)
        table[getattr(aten, name + "_backward").default] = _average_pool_backward(operator, num_dims)
    return table
