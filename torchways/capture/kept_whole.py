"""Operators that PyTorch's core set takes apart and this capture keeps: torch-xla lowers them whole.

What is taken apart makes more nodes to trace, send and compile, and gives XLA no more to work with. `KEPT` and
`TAKEN_APART` together are all of PyTorch's core decompositions of operators that torch-xla (2.9) has a kernel for; a
test says so. What has no kernel, or writes, or is a view, is always taken apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.utils._pytree as pytree

#: Overloads by name, after "aten."; without a dot: the default one.
KEPT = frozenset(
    {
        "_log_softmax_backward_data",
        "_prelu_kernel",
        "_prelu_kernel_backward",
        "_softmax_backward_data",
        "addcdiv",
        "addcmul",
        "baddbmm",
        "binary_cross_entropy",
        "binary_cross_entropy_backward",
        "binary_cross_entropy_with_logits",
        "celu",
        "clamp_max",
        "clamp_max.Tensor",
        "clamp_min",
        "clamp_min.Tensor",
        "dot",
        "elu_backward",
        "embedding_dense_backward",
        "frac",
        "gelu_backward",
        "glu",
        "hardshrink",
        "hardsigmoid",
        "hardsigmoid_backward",
        "hardswish",
        "hardswish_backward",
        "hardtanh_backward",
        "leaky_relu_backward",
        "lerp.Scalar",
        "lerp.Tensor",
        "log_sigmoid_backward",
        "log_sigmoid_forward",
        "logsumexp",
        "masked_fill.Scalar",
        "masked_fill.Tensor",
        "mish",
        "mse_loss",
        "mse_loss_backward",
        "mv",
        "native_dropout_backward",
        "nll_loss2d_backward",
        "nll_loss2d_forward",
        "nll_loss_backward",
        "nll_loss_forward",
        "reflection_pad1d",
        "reflection_pad1d_backward",
        "reflection_pad2d",
        "reflection_pad2d_backward",
        "replication_pad1d",
        "replication_pad2d",
        "rsub.Scalar",
        "rsub.Tensor",
        "selu",
        "sgn",
        "sigmoid_backward",
        "silu",
        "silu_backward",
        "smooth_l1_loss",
        "smooth_l1_loss_backward",
        "softplus",
        "softplus_backward",
        "softshrink",
        "stack",
        "std.correction",
        "std_mean.correction",
        "tanh_backward",
        "threshold",
        "threshold_backward",
        "tril",
        "triu",
        "xlogy.Tensor",
    }
)

#: Why each of the others is taken apart although torch-xla has a kernel.
TAKEN_APART: dict[str, list[str]] = {}


def overload_of(name: str) -> Any:
    """Returns the operator of a name in these tables."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


@cache
def kept_whole(taken_apart: Callable[[], dict[Any, Any]]) -> dict[Any, Any]:
    """Returns decompositions that take operators apart only where they concern complex numbers."""
    table = taken_apart()
    return {operator: _of_complex(table[operator]) for operator in map(overload_of, KEPT)}


def _of_complex(decomposition: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, torch.Tensor) and leaf.is_complex() for leaf in leaves):
            return decomposition(*args, **kwargs)
        return NotImplemented

    return call
