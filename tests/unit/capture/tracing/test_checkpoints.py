"""Activation checkpoints: forward is computed again in backward, with the same random numbers; no processes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.local_session import LocalSession
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction


class Block(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.reentrant = reentrant

    def inner(self, x, p):
        return x + self.second(F.dropout(F.gelu(self.first(x)), p))

    def forward(self, x, p):
        if self.reentrant is None:
            return self.inner(x, p)
        return checkpoint(self.inner, x, p, use_reentrant=self.reentrant)


def make_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)

    def step(x, p):
        x = x * model[0].second.bias.exp()  # a reentrant checkpoint wants an input with a gradient
        for block in model:
            x = block(x, p)
        loss = x.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_survives(reentrant):
    torch.manual_seed(0)
    session = LocalSession()
    eager = nn.Sequential(Block(None), Block(None))
    ours = nn.Sequential(Block(reentrant), Block(reentrant))
    ours.load_state_dict(eager.state_dict())
    make_function(ours, session.mesh(), lambda: session)
    expected, step = make_step(eager), ProgramFunction(make_step(ours), session.mesh(), lambda: session)
    for _ in range(3):
        x = torch.randn(4, 8)
        torch.testing.assert_close(step(x, 0.0).cpu(), expected(x, 0.0).detach(), rtol=1e-5, atol=1e-6)
    products = session.num_operators("mm") + session.num_operators("addmm")
    assert products > 2 * 2 * 3  # forward, and for each product two in backward: what is above was computed again
    assert session.num_operators("barrier") >= 2  # each block's input, so that XLA does not merge it with the forward


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_drops_the_same_elements_again(reentrant):
    session = LocalSession()
    model = make_function(nn.Sequential(Block(reentrant)), session.mesh(), lambda: session)

    @lambda function: ProgramFunction(function, session.mesh(), lambda: session)
    def step(x):
        x = x * model[0].first.weight.mean().exp()
        model[0](x, 0.5).sum().backward()
        return 0

    step(torch.randn(4, 8))
    assert session.num_operators("bernoulli") + session.num_operators("rand") == 1
