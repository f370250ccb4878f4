"""Runs that check their values: the first function that makes NaN or infinity fails, with its name and line."""

import pytest
import torch
from torch import nn

import torchways as tw
from torchways.errors import NonFiniteError, RemoteError


def line_of(error):
    """Returns the file of the line that an error names."""
    return error.value.source.split(":")[0].rsplit("/", 1)[-1]


def test_the_first_function_is_named_and_what_does_not_need_it_is_right(meshes):
    first, second = meshes

    @tw.program(mesh=first)
    def step(x):
        there = tw.redistribute(x * 2, second, ("dp",))
        bad = torch.log(there - 2)  # -inf where x is 1, NaN below
        return there, bad, tw.redistribute(bad, second, ("dp",)) * 3

    good = tw.distribute_tensor(torch.full((4,), 1.5), first)
    x = tw.distribute_tensor(torch.tensor([0.5, 1.0, 2.0, 3.0]), first)
    assert step(x)[2].cpu().isnan().any()  # nothing is checked
    with tw.check_values():
        assert step(good)[2].cpu().tolist() == [0] * 4
        there, *bad = step(x)
    assert there.cpu().tolist() == [1, 2, 4, 6]
    for item in bad:
        with pytest.raises(NonFiniteError, match=r"float32\[4\], has 1 NaN and 1 infinite of 4 elements") as error:
            item.cpu()
    assert error.value.function.startswith("step/")
    assert line_of(error) == "test_check_values.py"
    assert isinstance(error.value, RemoteError)
    assert step(x)[2].cpu().isnan().any()  # nor is it later


def test_the_environment_turns_it_on(meshes, monkeypatch):
    @tw.program(mesh=meshes[0])
    def divide(x):
        return x / 0

    monkeypatch.setenv("TORCHWAYS_CHECK_VALUES", "1")
    result = divide(tw.distribute_tensor(torch.ones(4), meshes[0]))
    with pytest.raises(NonFiniteError, match="has 4 infinite of 4 elements"):
        result.cpu()
    monkeypatch.setenv("TORCHWAYS_CHECK_VALUES", "0")
    assert divide(tw.distribute_tensor(torch.ones(4), meshes[0])).cpu().isinf().all()


class Root(nn.Module):
    def forward(self, x):
        return torch.sqrt(x)


def test_a_pipelines_microbatch_is_named(meshes):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Root(), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
        model[0].bias.zero_()
    pipe = tw.pipeline(model, split_spec={"2": tw.SplitPoint.BEGINNING}, meshes=meshes)

    def loss_of(part):
        loss = pipe(part).sum()
        loss.backward()
        return loss

    @tw.program
    def train_step(x):
        return tw.microbatch(loss_of, x, n_microbatches=4)

    x = torch.ones(8, 8)
    with tw.check_values():
        assert train_step(x).cpu().isfinite().all()
        x[4] = -1  # of the third microbatch
        loss = train_step(x)
    with pytest.raises(NonFiniteError, match=r"\(1F1B, stage 1, forward, microbatch 2\) made .* NaN"):
        loss.cpu()
