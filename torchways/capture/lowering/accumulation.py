"""Operators that accumulate many elements: on 16-bit ones, they are captured in float32.

XLA on CPU rounds every partial sum of 16-bit elements to 16 bits: a sum of 32,768 numbers in bfloat16 was half of the
true one. PyTorch's kernels accumulate in float32. Products of matrices and convolutions need no help: XLA accumulates
them in float32 too.
"""

from __future__ import annotations

from typing import Any

import torch

#: Types that are accumulated in float32.
HALVES = frozenset({torch.bfloat16, torch.float16})

_NAMES = """
    sum mean prod nansum cumsum cumprod logcumsumexp logsumexp trace
    var var_mean std std_mean norm linalg_vector_norm dist
    _softmax _log_softmax _softmax_backward_data _log_softmax_backward_data
    native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward
    native_batch_norm_backward
    avg_pool2d avg_pool3d avg_pool2d_backward avg_pool3d_backward _adaptive_avg_pool2d _adaptive_avg_pool3d
    index_add scatter_add scatter_reduce index_reduce
    mse_loss binary_cross_entropy binary_cross_entropy_with_logits nll_loss_forward nll_loss2d_forward
"""
_PACKETS = frozenset(getattr(torch.ops.aten, name) for name in _NAMES.split())
_INDEX_PUTS = frozenset({torch.ops.aten.index_put.default, torch.ops.aten._unsafe_index_put.default})


def adds_up(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator accumulates elements."""
    if func in _INDEX_PUTS:
        return bool(args[3] if len(args) > 3 else kwargs.get("accumulate", False))
    return func.overloadpacket in _PACKETS
