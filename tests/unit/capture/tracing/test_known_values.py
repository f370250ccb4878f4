"""Values that a program asks for while it is traced; no processes."""

import copy

import pytest
import torch
from torch import nn

from tests.local_session import LocalSession
from torchways.controller.function import make_function
from torchways.errors import DataDependentError


class Drops(nn.Module):
    """Layer drop that is off, as several libraries write it."""

    def __init__(self, probability):
        super().__init__()
        self.probability = probability
        self.layer = nn.Linear(2, 2)
        self.stray = torch.tensor([0.0, 3.0])  # no buffer

    def forward(self, x):
        for _ in range(2):
            if self.training and torch.rand([]) < self.probability:
                continue
            x = self.layer(x)
        steps = torch.arange(4)
        steps[1] = 7
        if steps.max() > self.stray.max():
            x = x * int(steps.max())
        return x.repeat_interleave(steps.nonzero().shape[0], dim=0)


def test_values_that_depend_on_nothing_can_be_asked():
    session = LocalSession()
    eager = Drops(0.0)
    ours = make_function(copy.deepcopy(eager), session.mesh(), lambda: session)
    x = torch.randn(2, 2)
    torch.testing.assert_close(ours(x).cpu(), eager(x))


def test_a_random_branch_is_refused_with_its_line():
    session = LocalSession()
    ours = make_function(Drops(0.5), session.mesh(), lambda: session)
    line = Drops.forward.__code__.co_firstlineno + 2
    for _ in range(2):
        with pytest.raises(DataDependentError, match=rf"test_known_values\.py:{line} in forward"):
            ours(torch.randn(2, 2))


def test_a_value_that_depends_on_an_array_through_a_view_cannot_be_asked():
    session = LocalSession()
    make = make_function(lambda x: x * 2, session.mesh(), lambda: session)

    def function(x):
        y = torch.zeros(2)
        y[0] = x.sum()
        return x if y.sum() > 0 else -x

    with pytest.raises(DataDependentError, match=r"a computed tensor bool\[\].*test_known_values"):
        make_function(function, session.mesh(), lambda: session)(make(torch.ones(2)))
