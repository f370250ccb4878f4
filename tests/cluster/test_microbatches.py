"""Microbatches on real executors: a pipeline of two islands works on several at once, in the schedule's order."""

import copy
import json
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchways as tw
from recipes.models.gpt import GPT, GPTConfig
from torchways.schedules import make_schedule


@pytest.fixture(scope="module")
def slices(cluster):
    """One device of each island."""
    return [tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=island) for island in (0, 1)]


class Model(nn.Module):
    def __init__(self, num_layers=4):
        super().__init__()
        self.embed = nn.Embedding(17, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(num_layers)
        )
        self.head = nn.Linear(8, 17)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def make_step(model, count, schedule, *, zero_first=False):
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)

    def forward_backward(x, y):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / count
        loss.backward()
        return loss

    def step(x, y):
        if zero_first:
            opt.zero_grad()
        losses = tw.microbatch(forward_backward, x, y, n_microbatches=count, schedule=schedule)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if not zero_first:
            opt.zero_grad()
        return losses.sum()

    return step


def losses_of(step, count, batch=8, length=6):
    torch.manual_seed(1)
    found = []
    for _ in range(count):
        x = torch.randint(0, 17, (batch, length))
        found.append(step(x, x.roll(1, 1)))
    return torch.stack([loss.cpu() for loss in found])


PLACES = {
    "1F1B": ({"layers.2": tw.SplitPoint.BEGINNING}, "ab", 4),
    "GPipe": ({"layers.2": tw.SplitPoint.BEGINNING}, "ab", 3),
    "InterleavedZeroBubble": ({f"layers.{i}": tw.SplitPoint.BEGINNING for i in (1, 2, 3)}, "abab", 4),
    "ZBVZeroBubble": ({f"layers.{i}": tw.SplitPoint.BEGINNING for i in (1, 2, 3)}, "abba", 4),
}


@pytest.mark.parametrize(
    "schedule", [pytest.param(name, marks=[pytest.mark.slow] * (name == "GPipe")) for name in PLACES]
)
def test_losses_are_those_of_gradient_accumulation(slices, schedule):
    torch.manual_seed(0)
    split, where, count = PLACES[schedule]
    model = Model()
    ours = tw.pipeline(copy.deepcopy(model), split_spec=split, meshes=[slices["ab".index(letter)] for letter in where])
    step = tw.program(make_step(ours, count, schedule))
    torch.testing.assert_close(losses_of(step, 5), losses_of(make_step(model, count, schedule), 5), rtol=1e-4, atol=0)


def test_slices_keep_the_schedules_order_and_do_not_wait_for_whole_batches(slices, tmp_path):
    # Of four layers alike, each would be a function of its own.
    ours = tw.pipeline(Model(3), split_spec={"layers.1": tw.SplitPoint.BEGINNING}, meshes=list(slices))
    step = tw.program(make_step(ours, 4, "InterleavedZeroBubble"))
    losses_of(step, 2)
    with tw.profile(tmp_path / "trace.json"):
        losses_of(step, 1)
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = [
        (event["ts"], (event["pid"], event["tid"]), found[1])
        for event in trace
        if event.get("cat") == "compute" and (found := re.search(r"stage\d\.([FIW])", event["name"]))
    ]
    lanes = {lane: [event for event in sorted(events) if event[1] == lane] for _, lane, _ in sorted(events)}
    first, last = next(iter(lanes.values())), next(reversed(lanes.values()))
    # Nobody waits for input gradients of stage 0.
    row = make_schedule("InterleavedZeroBubble", 2, 2, 4).rows[0]
    assert [kind for _, _, kind in first] == [action.kind for action in row if action.kind != "I"]
    assert last[0][0] < first[-2][0]  # the second slice does not wait until the first has done its forward passes
    # An activation of 2 sequences of 6 tokens, 8 wide; as many gradients go back. (Norms of gradients are smaller.)
    sent = Counter(event["pid"] for event in trace if event.get("args", {}).get("sent_bytes") == 4 * 2 * 6 * 8)
    assert sorted(sent.values()) == [4, 4]


def test_a_run_is_one_message_an_island_whatever_the_number_of_microbatches(slices):
    sizes = {}
    for count in (4, 16):
        ours = tw.pipeline(Model(), split_spec=PLACES["1F1B"][0], meshes=list(slices))
        step = tw.program(make_step(ours, count, "1F1B"))
        losses_of(step, 2, batch=count)
        session = tw.api._current()
        before = session.num_messages()
        losses_of(step, 3, batch=count)
        after = session.num_messages()
        assert {island: after[island]["run_program"] - before[island]["run_program"] for island in after} == {
            0: 3,
            1: 3,
        }
        sizes[count] = len(str(step).splitlines())
    assert sizes[4] == sizes[16]


def test_gradients_beside_the_update(slices):
    """What turns add up is returned, and used by the optimizer."""
    model = Model(3)
    ours = tw.pipeline(copy.deepcopy(model), split_spec={"layers.1": tw.SplitPoint.BEGINNING}, meshes=list(slices))

    def with_gradients(model):
        step = make_step(model, 4, "1F1B", zero_first=True)
        return lambda x, y: (step(x, y), [param.grad.clone() for param in model.parameters()])

    step, expected = tw.program(with_gradients(ours)), with_gradients(model)
    for turn in range(3):
        torch.manual_seed(turn)
        x = torch.randint(0, 17, (8, 6))
        loss, gradients = step(x, x.roll(1, 1))
        expected_loss, expected_gradients = expected(x, x.roll(1, 1))
        torch.testing.assert_close(loss.cpu(), expected_loss, rtol=1e-4, atol=0)
        for found, wanted in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("plan", "shape"),
    [
        (tw.fully_shard, (2, 1)),
        pytest.param(None, (2, 1), marks=pytest.mark.slow),
        pytest.param(tw.tensor_parallel, (1, 2), marks=pytest.mark.slow),
    ],
)
def test_slices_of_several_devices(cluster, plan, shape):
    """Wide enough for XLA to compute products as it does for real models; updates are in place."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=17, seq_len=128, d_model=128, n_layers=2, n_heads=4))
    ours = tw.pipeline(
        copy.deepcopy(model),
        split_spec={"layers.1": tw.SplitPoint.BEGINNING},
        meshes=[tw.init_device_mesh(shape, mesh_dim_names=("dp", "tp"), island=island) for island in (0, 1)],
        plan=plan,
    )
    found = losses_of(tw.program(make_step(ours, 4, "1F1B")), 5, batch=16, length=128)
    torch.testing.assert_close(
        found, losses_of(make_step(model, 4, "1F1B"), 5, batch=16, length=128), rtol=1e-4, atol=0
    )
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-3, msg=name)
