"""Simulated devices: what a computation's products count."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from torchways.graphs import deserialize_graph, serialize_graph
from torchways.runtime.simulated import count_flops


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda x, y: x @ y, [(2, 3), (3, 5)], 2 * 2 * 3 * 5),
        (lambda x, y, z: torch.tanh(x @ y) @ z, [(2, 3), (3, 5), (5, 7)], 2 * 2 * 3 * 5 + 2 * 2 * 5 * 7),
        (lambda x, y, z: (torch.addmm(x, y, z),), [(5,), (2, 3), (3, 5)], 2 * 2 * 3 * 5),
        (lambda x, y: torch.bmm(x, y), [(4, 2, 3), (4, 3, 5)], 4 * 2 * 2 * 3 * 5),
        (lambda x, y: x * y + x.sum(), [(2, 3), (2, 3)], 0),
    ],
)
def test_products_are_counted_and_nothing_else(function, shapes, expected):
    def listed(*inputs):
        found = function(*inputs)
        return list(found) if isinstance(found, tuple) else [found]

    traced = make_fx(listed, tracing_mode="fake")(*map(torch.zeros, shapes))
    assert count_flops(deserialize_graph(serialize_graph(traced.graph))) == expected
