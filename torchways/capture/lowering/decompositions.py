"""Which operators are taken apart at capture, so that all that is left has a lowering to XLA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, get_decompositions

from torchways.capture.lowering.accumulation import HALVES
from torchways.capture.lowering.gamma import gamma_decompositions
from torchways.capture.lowering.grad_scaler import scaler_decompositions
from torchways.capture.lowering.kept_whole import kept_whole
from torchways.capture.lowering.linear_algebra import linear_algebra_decompositions
from torchways.capture.lowering.neighbours import neighbour_decompositions
from torchways.capture.lowering.order_statistics import extreme_decompositions, order_decompositions
from torchways.capture.lowering.resizing import resizing_decompositions
from torchways.errors import CaptureError

#: Not in PyTorch's core set of decompositions, but without a lowering in torch-xla (they would run on the host).
_NOT_LOWERED: list[Any] = [
    torch.ops.aten.native_layer_norm_backward,
    torch.ops.aten._fused_rms_norm,
    torch.ops.aten._fused_rms_norm_backward,
    torch.ops.aten.addcdiv_,
    torch.ops.aten.addcmul_,
    torch.ops.aten.uniform,
    torch.ops.aten.normal.Tensor_Tensor,  # lowered, but not for shapes that are broadcast
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


def _neutral(reduce: str, dtype: torch.dtype) -> float:
    """Returns what changes no result of a reduction."""
    if reduce in ("sum", "prod"):
        return 0 if reduce == "sum" else 1
    if dtype.is_floating_point:
        return -math.inf if reduce == "amax" else math.inf
    return torch.iinfo(dtype).min if reduce == "amax" else torch.iinfo(dtype).max


def _scatter_reduce(
    value: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    """torch-xla lowers what includes the old values, but for "mean", which is a sum over a count."""
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
    product, dtype = left @ right, added.dtype
    if dtype in HALVES:  # rounded once, as in PyTorch
        added, product = added.float(), product.float()
    product = product if alpha == 1 else alpha * product
    return (product if beta == 0 else added * beta + product).to(dtype)


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
    # Not flat[index]: of an index without dimensions, Python asks for its value.
    taken = torch.ops.aten.index.Tensor(_in_memory(value).reshape(-1), [index])
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


def _of_numbers(operator: Any) -> Any:
    """torch-xla does not convert integers for it."""

    def convert(value: torch.Tensor) -> Any:
        return NotImplemented if value.is_floating_point() else operator(value.to(torch.get_default_dtype()))

    return convert


def _round_decimals(value: torch.Tensor, *, decimals: int) -> torch.Tensor:
    if decimals == 0 or not value.is_floating_point():
        return value.round()
    scale = 10.0 ** abs(decimals)
    return (value * scale).round() / scale if decimals > 0 else (value / scale).round() * scale


def _angle(value: torch.Tensor) -> Any:
    if value.is_complex():
        return NotImplemented
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    return torch.where(value < 0, math.pi, torch.where(value.isnan(), value, 0.0))


def _gather(value: torch.Tensor, dim: int, index: torch.Tensor, *, sparse_grad: bool = False) -> Any:
    """No elements may be asked for in any number of dimensions."""
    return NotImplemented if index.numel() else value.new_empty(index.shape)


def _scatter_add(value: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> Any:
    """As with `_gather`."""
    return NotImplemented if index.numel() else value.clone()


def _index_select(value: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """torch-xla's own ends the process where the index is computed by sorting."""
    if not value.dim():
        return _index_select(value.reshape(1), 0, index.reshape(-1)).reshape(())
    result: torch.Tensor = torch.ops.aten.index(value, [None] * (dim % value.dim()) + [index.reshape(-1)])
    return result


def _multinomial(
    weights: torch.Tensor, num_samples: int, replacement: bool = False, *, generator: Any = None
) -> torch.Tensor:
    """torch-xla looks at the weights while it traces."""
    if num_samples == 1 or not replacement:
        # The largest of weight / exponential number is drawn with the weight's probability; of these, so are the next.
        race = -torch.log1p(-torch.rand(weights.shape, dtype=weights.dtype))
        return (weights / race.clamp(min=torch.finfo(weights.dtype).tiny)).topk(num_samples).indices
    upto = weights.cumsum(-1)
    drawn = torch.rand(*weights.shape[:-1], num_samples, dtype=weights.dtype) * upto[..., -1:]
    return (upto.unsqueeze(-2) <= drawn.unsqueeze(-1)).sum(-1).clamp(max=weights.shape[-1] - 1)


def _addbmm(
    added: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: Any = 1, alpha: Any = 1
) -> torch.Tensor:
    if not added.is_floating_point():
        beta, alpha = int(beta), int(alpha)
    product = alpha * (left @ right).sum(0)
    return product if beta == 0 else beta * added + product


#: Of Lanczos' approximation, as XLA's own gamma functions have it; its g is 7.
_LANCZOS_BASE = 0.99999999999980993227684700473478
_LANCZOS = (
    676.520368121885098567009190444019,
    -1259.13921672240287047156078755283,
    771.3234287776530788486528258894,
    -176.61502916214059906584551354,
    12.507343278686904814458936853,
    -0.13857109526572011689554707,
    9.984369578019570859563e-6,
    1.50563273514931155834e-7,
)


def _lgamma(value: torch.Tensor) -> torch.Tensor:
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    is_reflected = value < 0.5
    z = torch.where(is_reflected, -value, value - 1)
    series = torch.full_like(z, _LANCZOS_BASE)
    for number, coefficient in enumerate(_LANCZOS):
        series = series + coefficient / (z + (number + 1))
    log_t = math.log(7.5) + torch.log1p(z / 7.5)
    right = math.log(2 * math.pi) / 2 + (z + 0.5 - (z + 7.5) / log_t) * log_t + series.log()
    fraction = value.abs() - value.abs().floor()
    fraction = torch.where(fraction > 0.5, 1 - fraction, fraction)
    log_sin = (math.pi * fraction).sin().log()
    left = torch.where(log_sin.isfinite(), math.log(math.pi) - log_sin - right, -log_sin)
    return torch.where(value.isinf(), math.inf, torch.where(is_reflected, left, right))


def _digamma(value: torch.Tensor) -> torch.Tensor:
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    is_reflected = value < 0.5
    z = torch.where(is_reflected, -value, value - 1)
    series, slope = torch.full_like(z, _LANCZOS_BASE), torch.zeros_like(z)
    for number, coefficient in enumerate(_LANCZOS):
        slope = slope - coefficient / (z + (number + 1)).square()
        series = series + coefficient / (z + (number + 1))
    right = math.log(7.5) + torch.log1p(z / 7.5) + slope / series - 7 / (z + 7.5)
    fraction = value - value.round()
    left = right - math.pi / (math.pi * fraction).tan()
    left = torch.where((value == value.floor()) & (value < 0), math.nan, left)
    left = torch.where(value == 0, torch.copysign(torch.full_like(value, math.inf), -value), left)
    return torch.where(is_reflected, left, right)


def _rrelu(
    value: torch.Tensor,
    noise: torch.Tensor,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
    generator: Any = None,
) -> Any:
    if not training:
        return torch.where(value > 0, value, value * ((lower + upper) / 2)), noise
    noise = torch.where(value > 0, 1.0, lower + (upper - lower) * torch.rand(value.shape, dtype=value.dtype))
    return value * noise, noise


def _zeros(size: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
    return torch.zeros(size, dtype=dtype)


def _repeat_interleave(repeats: torch.Tensor, *, output_size: int | None = None) -> Any:
    if output_size is None:
        return NotImplemented  # how many there are depends on values
    return torch.searchsorted(repeats.to(torch.int64).cumsum(0), torch.arange(output_size), right=True)


def _replication_pad_backward(grad: torch.Tensor, value: torch.Tensor, padding: Sequence[int]) -> Any:
    """torch-xla has it for what only adds elements."""
    if min(padding) >= 0:
        return NotImplemented
    for number in range(len(padding) // 2):
        dim, (before, behind) = value.dim() - 1 - number, padding[2 * number : 2 * number + 2]
        source = torch.arange(-before, value.shape[dim] + behind).clamp(0, value.shape[dim] - 1)
        shape = [value.shape[dim] if other == dim else size for other, size in enumerate(grad.shape)]
        grad = grad.new_zeros(shape).index_add(dim, source, grad)
    return grad


def _convolution_backward(grad: torch.Tensor, *args: Any) -> Any:
    """torch-xla adds up the gradient of the bias in the dtype of `grad`; as an operator of its own, it is widened."""
    *others, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask = args
    if grad.dtype not in HALVES or not mask[2]:
        return NotImplemented
    rest = (bias_sizes, stride, padding, dilation, transposed, output_padding, groups, [*mask[:2], False])
    of_value, of_weight, _ = torch.ops.aten.convolution_backward.default(grad, *others, *rest)
    return of_value, of_weight, grad.sum([dim for dim in range(grad.dim()) if dim != 1])


#: Where PyTorch has no decomposition, or one into what torch-xla does not lower either.
_OURS: dict[Any, Any] = {
    torch.ops.aten._weight_norm_interface_backward.default: _weight_norm_backward,
    torch.ops.aten.scatter_reduce.two: _scatter_reduce,
    torch.ops.aten.index_reduce.default: _index_reduce,
    torch.ops.aten.copysign.Tensor: _copysign,
    torch.ops.aten.copysign.Scalar: _copysign_number,
    torch.ops.aten.signbit.default: _signbit,
    torch.ops.aten.cumsum.default: _cumsum,
    torch.ops.aten.convolution_backward.default: _convolution_backward,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.masked_scatter.default: _masked_scatter,
    torch.ops.aten.masked_scatter_backward.default: _masked_scatter_backward,
    torch.ops.aten.exp2.default: lambda value: torch.exp(value * math.log(2.0)),
    torch.ops.aten.fmax.default: _fmax,
    torch.ops.aten.fmin.default: _fmin,
    torch.ops.aten.hypot.default: lambda value, other: torch.sqrt(value * value + other * other),
    torch.ops.aten.as_strided_scatter.default: _as_strided_scatter,
    torch.ops.aten.erfc.default: _of_numbers(torch.ops.aten.erfc.default),
    torch.ops.aten.erfinv.default: _of_numbers(torch.ops.aten.erfinv.default),
    torch.ops.aten.round.decimals: _round_decimals,
    torch.ops.aten.angle.default: _angle,
    torch.ops.aten.gather.default: _gather,
    torch.ops.aten.rrelu_with_noise_functional.default: _rrelu,
    torch.ops.aten.scatter_add.default: _scatter_add,
    torch.ops.aten.take.default: lambda value, index: torch.ops.aten.index(value.reshape(-1), [index]),
    torch.ops.aten.index_select.default: _index_select,
    torch.ops.aten.multinomial.default: _multinomial,
    torch.ops.aten.addbmm.default: _addbmm,
    torch.ops.aten.lgamma.default: _lgamma,
    torch.ops.aten.digamma.default: _digamma,
    torch.ops.aten._efficientzerotensor.default: _zeros,
    torch.ops.aten.repeat_interleave.Tensor: _repeat_interleave,
    torch.ops.aten.replication_pad1d_backward.default: _replication_pad_backward,
    torch.ops.aten.replication_pad2d_backward.default: _replication_pad_backward,
    # What their results share memory with is kept by the recorder.
    torch.ops.aten.as_strided.default: _as_strided,
    torch.ops.aten.as_strided_copy.default: _as_strided,
    torch.ops.aten.diagonal.default: _diagonal,
    torch.ops.aten.diagonal_copy.default: _diagonal,
    torch.ops.aten.diagonal_scatter.default: _diagonal_scatter,
}


@cache
def taken_apart() -> dict[Any, Any]:
    """Returns PyTorch's decompositions into its core operators."""
    return core_aten_decompositions()


@cache
def decomposition_table() -> dict[Any, Any]:
    """Returns what takes operators apart at capture: PyTorch's core ATen set and what torch-xla lacks beyond it."""
    return {
        **taken_apart(),
        **kept_whole(taken_apart),
        **get_decompositions(_NOT_LOWERED),
        **resizing_decompositions(),
        **linear_algebra_decompositions(),
        **order_decompositions(),
        **neighbour_decompositions(),
        **gamma_decompositions(),
        **scaler_decompositions(),
        **extreme_decompositions(),
        **_OURS,
    }


def decompositions_of(operators: Iterable[torch._ops.OpOverload]) -> dict[Any, Any]:
    """Returns PyTorch's decompositions of operators that the executors turned out not to lower, where it has any."""
    return get_decompositions(list(operators))
