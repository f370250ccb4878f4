"""Which operators are taken apart at capture, so that all that is left has a lowering to XLA."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, get_decompositions

#: Not in PyTorch's core set of decompositions, but without a lowering in torch-xla (they would run on the host).
_NOT_LOWERED = [
    torch.ops.aten.native_layer_norm_backward,
    torch.ops.aten._fused_rms_norm,
    torch.ops.aten._fused_rms_norm_backward,
    torch.ops.aten.addcdiv_,
    torch.ops.aten.addcmul_,
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


#: Where PyTorch has no decomposition.
_OURS: dict[Any, Any] = {torch.ops.aten._weight_norm_interface_backward.default: _weight_norm_backward}


@cache
def decomposition_table() -> dict[Any, Any]:
    """Returns the table that make_fx applies: PyTorch's core ATen set and what torch-xla lacks beyond it."""
    return {**core_aten_decompositions(), **get_decompositions(_NOT_LOWERED), **_OURS}


def decompositions_of(operators: Iterable[torch._ops.OpOverload]) -> dict[Any, Any]:
    """Returns PyTorch's decompositions of operators that the executors turned out not to lower, where it has any."""
    return get_decompositions(list(operators))
