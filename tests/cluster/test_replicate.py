"""Replicas on real executors: two islands train as one."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchways as tw
from recipes.models.gpt import GPT, GPTConfig
from torchways.errors import CaptureError

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


@dataclasses.dataclass
class Batch:
    """Rows and what is known of them."""

    rows: torch.Tensor
    name: str = "batch"


@dataclasses.dataclass
class Output:
    """What a model makes of a batch."""

    logits: torch.Tensor
    name: str


class Objects(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.longest = 0

    def forward(self, batch):
        self.longest = 4  # the same for each part of a batch
        return Output(self.linear(batch.rows), batch.name)


@pytest.mark.parametrize("microbatches", [0, 4])
def test_objects_are_split_and_put_together(cluster, microbatches):
    torch.manual_seed(0)
    plain = Objects()
    model = tw.replicate(copy.deepcopy(plain), meshes=one_device_of_each_island())
    batch = Batch(torch.randn(8, 4))

    def forward_backward(batch):
        out = model(batch)
        out.logits.square().sum().backward()
        return out

    @tw.program
    def step(batch):
        out = tw.microbatch(forward_backward, batch, n_microbatches=4) if microbatches else forward_backward(batch)
        return out, model.linear.weight.grad

    if microbatches:
        plain.longest = model.longest = 4  # what a microbatch assigns must be there before
    out, grad = step(batch)
    expected = plain(batch)
    expected.logits.square().sum().backward()
    assert (type(out), out.name) == (Output, "batch")
    assert torch.allclose(out.logits.detach().cpu(), expected.logits, atol=1e-6)
    assert torch.allclose(grad.cpu(), plain.linear.weight.grad, atol=1e-4)
    assert model.longest == 4


@pytest.mark.parametrize(
    "assign",
    [
        lambda model, out: setattr(model, "aux", out.sum()),
        lambda model, out: setattr(model, "count", model.count + 1),
        lambda model, out: model.seen.append(out.shape[0]),
    ],
    ids=["tensor", "counter", "list"],
)
def test_a_model_that_assigns_to_itself_is_refused(cluster, assign):
    class Assigning(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.count, self.seen, self.aux = nn.Linear(4, 2), 0, [], None

        def forward(self, x):
            out = self.linear(x)
            assign(self, out)
            return out

    model = tw.replicate(Assigning(), meshes=one_device_of_each_island())
    program = tw.program(lambda x: model(x).sum())
    with pytest.raises(
        CaptureError, match=r"a replicated Assigning assigns to .*(aux|count|seen) when it is called at"
    ):
        program(torch.ones(8, 4))
    assert (model.count, model.seen, model.aux) == (0, [], None)
