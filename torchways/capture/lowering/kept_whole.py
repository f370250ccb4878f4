"""Operators that PyTorch's core set takes apart and this capture keeps: torch-xla lowers them whole.

An operator that is taken apart makes more nodes to trace, send and compile, and XLA gains nothing by it. `KEPT` and
`TAKEN_APART` together are all of PyTorch's core decompositions of operators that torch-xla (2.9) has a kernel for; a
test checks that. Operators that have no kernel, that write, or that make views are always taken apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._decomp import get_decompositions

aten = torch.ops.aten

#: Overloads by name, after "aten."; without a dot: the default one.
KEPT = frozenset(
    {
        "_log_softmax_backward_data",
        "_prelu_kernel",
        "_prelu_kernel_backward",
        "_softmax_backward_data",
        "addcdiv",
        "addcmul",
        "binary_cross_entropy",
        "binary_cross_entropy_backward",
        "binary_cross_entropy_with_logits",
        "clamp_max",
        "clamp_min",
        "dot",
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
        "masked_fill.Scalar",
        "masked_fill.Tensor",
        "mish",
        "mse_loss",
        "mse_loss_backward",
        "mv",
        "reflection_pad1d",
        "reflection_pad1d_backward",
        "reflection_pad2d",
        "reflection_pad2d_backward",
        "rsub.Scalar",
        "rsub.Tensor",
        "sgn",
        "sigmoid_backward",
        "silu",
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

#: Operators that torch-xla computes with constants of float32, whatever the tensors: of float64, they are taken apart.
IN_FLOAT32 = frozenset({"gelu", "gelu_backward", "log10", "log2", "native_layer_norm", "threshold"})

#: Why each of the others is taken apart although torch-xla has a kernel. Found by running PyTorch's database of
#: operators on torch-xla's device, against PyTorch's CPU (torch 2.9.1, torch-xla 2.9.0).
TAKEN_APART = {
    "its kernel divides by zero, and ends the process, where a dimension is empty": {"roll"},
    "its kernel ended the process on a sample": {
        "nll_loss_forward",
        "nll_loss_backward",
        "nll_loss2d_forward",
        "nll_loss2d_backward",
    },
    "its kernel takes no integers": {"logsumexp"},
    "its kernel does not broadcast": {"clamp_max.Tensor", "clamp_min.Tensor"},
    "its kernel refuses negative padding": {"replication_pad1d", "replication_pad2d", "replication_pad3d"},
    "wrong values": {"baddbmm", "celu", "elu_backward", "smooth_l1_loss", "smooth_l1_loss_backward"},
    "it keeps the biased variance as the running one": {"native_batch_norm_backward"},
    "another dtype than PyTorch's": {"native_dropout_backward"},
    "not tried: PyTorch makes one or two reductions, views or pads of it": {
        "all",
        "all.dim",
        "count_nonzero",
        "count_nonzero.dim_IntList",
        "sum",
        "_unsafe_view",
        "alias_copy",
        "block_diag",
        "diag_embed",
        "diagonal_backward",
        "diagonal_copy",
        "expand_copy",
        "pixel_shuffle",
        "pixel_unshuffle",
        "select_backward",
        "select_scatter",
        "slice_backward",
        "split_with_sizes_copy",
        "squeeze_copy",
        "squeeze_copy.dim",
        "squeeze_copy.dims",
        "t",
        "t_copy",
        "transpose_copy.int",
        "unsqueeze_copy",
    },
    "not tried: seldom in models": {
        "_euclidean_dist",
        "affine_grid_generator",
        "bernoulli",
        "floor_divide",
        "index_add",
        "index_copy",
        "isneginf",
        "linspace",
        "logit",
        "max_unpool2d",
        "max_unpool3d",
        "mvlgamma",
        "nan_to_num",
        "norm.Scalar",
        "norm.ScalarOpt_dim",
        "norm.ScalarOpt_dim_dtype",
        "norm.ScalarOpt_dtype",
        "reflection_pad3d",
        "reflection_pad3d_backward",
        "take",
        "trace",
    },
}


def overload_of(name: str) -> Any:
    """Returns the operator of a name in these tables."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


@cache
def kept_whole(taken_apart: Callable[[], dict[Any, Any]]) -> dict[Any, Any]:
    """Returns decompositions that take operators apart only where the kernel computes something else."""
    kept, in_float32 = (frozenset(map(overload_of, names)) for names in (KEPT, IN_FLOAT32))
    core = get_decompositions(list(in_float32))  # some are of PyTorch's core operators themselves
    table = {**core, **taken_apart(), aten.log2.default: _log2, aten.log10.default: _log10}
    return {
        operator: _of_dtypes(table[operator], in_complex=operator in kept, in_float64=operator in in_float32)
        for operator in kept | in_float32
    }


def _log2(value: torch.Tensor) -> torch.Tensor:
    return value.log() / math.log(2)


def _log10(value: torch.Tensor) -> torch.Tensor:
    return value.log() / math.log(10)


def _of_dtypes(decomposition: Callable[..., Any], *, in_complex: bool, in_float64: bool) -> Callable[..., Any]:
    """Returns a decomposition that takes an operator apart only if there are tensors of these dtypes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and (
                (in_complex and leaf.is_complex()) or (in_float64 and leaf.dtype == torch.float64)
            ):
                return decomposition(*args, **kwargs)
        return NotImplemented

    return call
