"""Products with a transposed matrix: the same values in the other form, for few rows only."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from torchways.runtime.products import turn_products


@pytest.mark.parametrize("rows", [1, 2, 128, 129])
@pytest.mark.parametrize("has_bias", [False, True])
def test_values_stay_and_few_rows_are_turned(rows, has_bias):
    left, weight, bias = torch.randn(rows, 6), torch.randn(5, 6), torch.randn(5) if has_bias else None
    traced = make_fx(lambda x, w: torch.nn.functional.linear(x, w, bias))(left, weight)
    turn_products(traced.graph)
    traced.recompile()
    assert torch.allclose(traced(left, weight), torch.nn.functional.linear(left, weight, bias), atol=1e-5)
    again = make_fx(traced)(left, weight).graph
    is_turned = bool(again.find_nodes(op="call_function", target=torch.ops.aten.bmm.default))
    assert is_turned == (1 < rows <= 128)


def test_other_products_stay():
    traced = make_fx(lambda x, w: x @ w)(torch.randn(4, 6), torch.randn(6, 5))
    before = str(traced.graph)
    turn_products(traced.graph)
    assert str(traced.graph) == before
