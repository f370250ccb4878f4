"""Replicas on real executors: two islands train as one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchways as tw
from recipes.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=64, seq_len=16, d_model=32, n_layers=2, n_heads=4)
HALVES = {"layers.1": tw.SplitPoint.BEGINNING}


def whole_islands():
    return [tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=island) for island in (0, 1)]


def one_device_of_each_island():
    return [tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=island) for island in (0, 1)]


def stages_on_each_island():
    return [[tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=island) for _ in range(2)] for island in (0, 1)]


def make_step(model, count):
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-5)

    def forward_backward(x, y):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / count
        loss.backward()
        return loss

    def step(x, y):
        if count == 1:
            loss = forward_backward(x, y)
        else:
            loss = tw.microbatch(forward_backward, x, y, n_microbatches=count).sum()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        return loss, norm

    return step


def losses_of(step, steps):
    torch.manual_seed(1)
    found = []
    for _ in range(steps):
        x = torch.randint(0, 64, (8, 16))
        found.append(torch.stack([value.cpu().detach() for value in step(x, x.roll(1, 1))]))
    return torch.stack(found)


WAYS = {
    "batch": (whole_islands, None, None, 1),
    "split parameters": (whole_islands, None, tw.fully_shard, 1),
    "microbatches": (one_device_of_each_island, None, None, 4),
    "pipelines": (stages_on_each_island, HALVES, None, 4),
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way != "batch")) for way in WAYS])
def test_losses_over_twenty_steps_are_those_of_the_module(cluster, way):
    make_meshes, split, plan, count = WAYS[way]
    torch.manual_seed(0)
    model = GPT(CONFIG)
    ours = tw.replicate(copy.deepcopy(model), make_meshes(), split_spec=split, plan=plan)
    found = losses_of(tw.program(make_step(ours, count)), 20)
    torch.testing.assert_close(found, losses_of(make_step(model, count), 20), rtol=1e-5, atol=0)
    plain = GPT(CONFIG)
    plain.load_state_dict(ours.state_dict())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_gradients_travel_as_bfloat16_and_weights_stay_alike(cluster):
    ours = tw.replicate(GPT(CONFIG), whole_islands(), reduce_dtype=torch.bfloat16)
    found = losses_of(tw.program(make_step(ours, 1)), 5)
    assert found[:, 0].isfinite().all()
    for parameter in ours.parameters():
        [copied] = parameter._buffer.copies.values()
        assert torch.equal(copied.read(), parameter.detach().cpu())
