"""Parity mode on real executors: what works is not reported, and an operator of torch-xla that is wrong is named."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchways as tw
from recipes.models.gpt import GPT, GPTConfig
from torchways.capture.lowering.decompositions import decomposition_table
from torchways.errors import ParityError


def batch(generator, length=16):
    rows = torch.randint(0, 256, (4, length + 1), generator=generator)
    return rows[:, :-1], rows[:, 1:]


def test_a_training_step_over_two_slices_agrees(meshes):
    """A pipeline, shards, dropout, Adam and a sum over slices."""
    torch.manual_seed(0)
    gpt = nn.Sequential(OrderedDict(gpt=GPT(GPTConfig(n_layers=2)), dropout=nn.Dropout(0.1)))
    model = tw.pipeline(gpt, split_spec={"gpt.layers.1": tw.SplitPoint.BEGINNING}, meshes=meshes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    norms = [tw.function(lambda value: value.square().mean(), mesh=mesh) for mesh in meshes]

    @tw.program
    def train_step(x, y):
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        total, _ = tw.all_reduce([norm(logits.detach()) for norm in norms])
        optimizer.step()
        optimizer.zero_grad()
        return loss, total

    x, y = batch(torch.Generator().manual_seed(0))
    with tw.parity() as report:
        losses = [train_step(x, y)[0].item() for _ in range(3)]
    assert losses[-1] < losses[0]
    assert report.num_calls == 3
    assert report.largest["float32"].max_abs_error < 1e-4
    kinds = [line.split(" = ")[1].split(" ")[0].split("(")[0] for line in str(train_step).splitlines() if " = " in line]
    assert report.num_nodes == 3 * sum(kind in ("compute", "transfer", "all_reduce") for kind in kinds)
    assert {"compute", "transfer", "all_reduce"} <= set(kinds)


def test_a_sharded_plan_agrees(cluster, meshes):
    mesh = meshes[0]
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32))
    model = tw.parallelize_module(module, mesh, tw.fully_shard(module, mesh))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    @tw.program
    def train_step(x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    with tw.parity() as report:
        losses = [train_step(x).item() for _ in range(2)]
    assert losses[1] < losses[0]
    assert report.num_calls == 2


def test_a_wrong_operator_of_torch_xla_is_named(meshes, monkeypatch):
    """torch-xla's batch norm keeps the biased variance as the running one; capture spells batch norm out for that."""
    table = decomposition_table()
    for operator in [key for key in table if "batch_norm" in str(key)]:
        monkeypatch.delitem(table, operator)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    model = tw.function(module, mesh=meshes[0])
    with tw.parity(), pytest.raises(ParityError) as caught:
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    error = caught.value
    assert "batch_norm" in error.operator
    assert error.program == "Sequential"
    assert "in forward" in error.operator_source or "test_parity.py:" in error.operator_source
    assert 1e-4 < error.max_abs_error < 0.1
    assert "4 of 4 elements differ (rtol=1.3e-06, atol=1e-05); largest absolute error" in str(error)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
