"""Calls that are rewritten above autograd: assignments by mask, diagonals, tensors of traced numbers; no processes."""

import torch

from tests.local_session import LocalSession
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction


def test_assignments_by_mask():
    session = LocalSession()

    def function(x, mask, vector):
        x = x * 1
        x[mask] = 5.0
        x[mask[:, 0]] = vector
        counts = torch.zeros(3, 2, dtype=torch.int64)
        counts[mask] = 2.9
        return x, counts

    x, mask, vector = torch.randn(3, 2), torch.tensor([[True, False], [False, True], [False, False]]), torch.ones(2)
    ours = make_function(function, session.mesh(), lambda: session)
    for result, expected in zip(ours(x, mask, vector), function(x, mask, vector), strict=True):
        torch.testing.assert_close(result.cpu(), expected)


def test_a_diagonal_is_filled_in_a_view():
    session = LocalSession()

    def function(x):
        x = x.clone()
        for row in range(2):
            x[:, row].fill_diagonal_(row, wrap=False)
        return x

    x = torch.randn(3, 2, 4)
    assert torch.equal(make_function(function, session.mesh(), lambda: session)(x).cpu(), function(x))


def test_a_tensor_is_made_of_traced_ones():
    session = LocalSession()

    def function(x):
        pair, square = torch.tensor([x[0], x[1]]), torch.tensor([[x[0], 2], [3, x[2]]], dtype=torch.float64)
        return pair, square, torch.as_tensor([x[2], x[0]])

    x = torch.randn(3)
    ours = make_function(function, session.mesh(), lambda: session)
    for result, expected in zip(ours(x), function(x), strict=True):
        torch.testing.assert_close(result.cpu(), expected)


def test_a_formatted_number_is_read():
    session = LocalSession()

    def function(x, count):
        return f"{x.sum():.2f} of {count:03d}"

    x, count = torch.ones(3), torch.tensor(7)
    assert ProgramFunction(function, session.mesh(), lambda: session)(x, count) == "3.00 of 007"
