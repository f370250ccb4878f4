"""The table of operators that are taken apart at capture, so that all that is left has a lowering to XLA.

It joins PyTorch's decompositions, those of each family beside this module, and those of operators that belong to none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, get_decompositions

from torchways.capture.lowering.accumulation import HALVES
from torchways.capture.lowering.gamma import gamma_decompositions
from torchways.capture.lowering.grad_scaler import scaler_decompositions
from torchways.capture.lowering.indexing import indexing_decompositions
from torchways.capture.lowering.kept_whole import kept_whole
from torchways.capture.lowering.linear_algebra import linear_algebra_decompositions
from torchways.capture.lowering.neighbours import neighbour_decompositions
from torchways.capture.lowering.order_statistics import extreme_decompositions, order_decompositions
from torchways.capture.lowering.resizing import resizing_decompositions
from torchways.capture.lowering.special_functions import function_decompositions
from torchways.capture.lowering.strides import stride_decompositions

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


def _addmm(added: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """torch-xla lowers it without factors only."""
    if (beta, alpha) == (1, 1):
        return NotImplemented
    product, dtype = left @ right, added.dtype
    if dtype in HALVES:  # rounded once, as in PyTorch
        added, product = added.float(), product.float()
    product = product if alpha == 1 else alpha * product
    return (product if beta == 0 else added * beta + product).to(dtype)


def _cumsum(value: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """torch-xla adds small integers and booleans up in their own type."""
    if value.dtype.is_floating_point or value.is_complex() or value.dtype == torch.int64:
        return NotImplemented
    return value.to(dtype or torch.int64).cumsum(dim)


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
    if not added.is_floating_point() and not added.is_complex():
        beta, alpha = int(beta), int(alpha)
    product = alpha * (left @ right).sum(0)
    return product if beta == 0 else beta * added + product


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


def _replication_pad_backward(grad: torch.Tensor, value: torch.Tensor, padding: Sequence[int]) -> Any:
    """torch-xla has it for padding that only adds elements."""
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


#: Operators of no family, for which PyTorch has no decomposition, or one into what torch-xla does not lower either.
_OURS: dict[Any, Any] = {
    torch.ops.aten._weight_norm_interface_backward.default: _weight_norm_backward,
    torch.ops.aten.cumsum.default: _cumsum,
    torch.ops.aten.convolution_backward.default: _convolution_backward,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.rrelu_with_noise_functional.default: _rrelu,
    torch.ops.aten.multinomial.default: _multinomial,
    torch.ops.aten.addbmm.default: _addbmm,
    torch.ops.aten._efficientzerotensor.default: _zeros,
    torch.ops.aten.replication_pad1d_backward.default: _replication_pad_backward,
    torch.ops.aten.replication_pad2d_backward.default: _replication_pad_backward,
}


@cache
def taken_apart() -> dict[Any, Any]:
    """Returns PyTorch's decompositions into its core operators."""
    return core_aten_decompositions()


@cache
def decomposition_table() -> dict[Any, Any]:
    """Returns the functions that take operators apart at capture: PyTorch's core ATen set, and what torch-xla lacks."""
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
        **indexing_decompositions(),
        **stride_decompositions(),
        **function_decompositions(),
        **_OURS,
    }


def decompositions_of(operators: Iterable[torch._ops.OpOverload]) -> dict[Any, Any]:
    """Returns PyTorch's decompositions of operators that the executors turned out not to lower, where it has any."""
    return get_decompositions(list(operators))
