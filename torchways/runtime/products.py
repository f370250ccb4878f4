"""Products of few rows with a transposed matrix, in the form that XLA's kernels for CPUs are fast at.

A linear layer is `x @ weight.T`. Of that, XLA on CPU makes one call of Eigen, which first copies the whole weight into
an order of its own, number by number: for a few rows (a decoding step) the copy takes up to ten times as long as the
product. `(weight @ x.T).T` takes the weight as it lies. As a product of two matrices XLA would turn it back into the
first form, so it is a batch of one.
"""

from __future__ import annotations

import torch

_aten = torch.ops.aten
_TRANSPOSES = (_aten.permute.default, _aten.t.default, _aten.transpose.int)

#: The most rows for which the other form was as fast or faster for all sizes tried (docs/benchmarks.md).
_FEW_ROWS = 128


def turn_products(graph: torch.fx.Graph) -> None:
    """Lets products with a transposed matrix be computed in the faster form, where they have few rows."""
    for operator, ours in ((_aten.mm.default, _mm), (_aten.addmm.default, _addmm)):
        for node in graph.find_nodes(op="call_function", target=operator):
            right = node.args[-1]
            if isinstance(right, torch.fx.Node) and right.target in _TRANSPOSES:
                node.target = ours


def _mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if not 1 < left.shape[0] <= _FEW_ROWS:  # one row is a product of matrix and vector, fast as it is
        return left @ right
    return torch.bmm(right.t()[None], left.t()[None]).transpose(1, 2)[0]


def _addmm(added: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return added + _mm(left, right)
