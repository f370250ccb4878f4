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


@cache
def decomposition_table() -> dict[Any, Any]:
    """Returns the table that make_fx applies: PyTorch's core ATen set and what torch-xla lacks beyond it."""
    return {**core_aten_decompositions(), **get_decompositions(_NOT_LOWERED)}


def decompositions_of(operators: Iterable[torch._ops.OpOverload]) -> dict[Any, Any]:
    """Returns PyTorch's decompositions of operators that the executors turned out not to lower, where it has any."""
    return get_decompositions(list(operators))
