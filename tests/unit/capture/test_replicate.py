"""`tw.replicate` against the module itself; no processes (tests/local_session.py runs the parts)."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchways as tw
from tests.local_session import LocalSession
from tests.unit.capture.models import Model, pipelined
from torchways.controller.function import make_replicated
from torchways.controller.program import ProgramFunction
from torchways.errors import CaptureError, PlacementError, ShapeError, UserError
from torchways.ir.program import AllReduce, Compute, Loop, Transfer
from torchways.parallel.pipeline import SplitPoint
from torchways.parallel.replicate import Reduction

TWO_STAGES = {"layers.1": SplitPoint.BEGINNING}


@pytest.fixture
def session():
    return LocalSession()


def replicated(session, module, *, count=2, split=None, bucket_bytes=25 << 20, dtype=""):
    stages = [[session.mesh() for _ in range(1 + len(split or {}))] for _ in range(count)]
    return make_replicated(
        copy.deepcopy(module), stages, split or {}, None, Reduction(bucket_bytes, dtype), lambda: session
    )


def program(session, function):
    return ProgramFunction(function, None, lambda: session)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)


def make_step(model, opt, clip=True):
    def step(x, y):
        opt.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5) if clip else torch.zeros(())
        opt.step()
        return loss, norm

    return step


def make_microbatched(model, opt, count, schedule="1F1B"):
    def forward_backward(x, y):
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()) / count
        loss.backward()
        return loss, logits.argmax(-1), "same"

    def step(x, y):
        opt.zero_grad()
        losses, tokens, _ = tw.microbatch(forward_backward, x, y, n_microbatches=count, schedule=schedule)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
        return losses, tokens, norm

    return step


def batches(count, rows=8):
    torch.manual_seed(1)
    return [torch.randint(0, 17, (rows, 5)) for _ in range(count)]


def compare(session, model, ours, make, *, steps=2, rows=8, optimizer=adamw, rtol=1e-5, atol=1e-6):
    """Trains both; returns our program."""
    expected_step = make(model, optimizer(model.parameters()))
    step = program(session, make(ours, optimizer(ours.parameters())))
    for x in batches(steps, rows):
        found = [value.cpu() for value in step(x, x.roll(1, 1))]
        torch.testing.assert_close(found, list(expected_step(x, x.roll(1, 1))), rtol=rtol, atol=atol)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=10 * rtol, atol=10 * atol)
    return step


def nodes_of(step, kind):
    return [node for node in step.lower().program.nodes if isinstance(node, kind)]


def values_of(step):
    return step.lower().program.values


# ---- a whole batch


@pytest.mark.parametrize(
    "optimizer",
    [
        adamw,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.01, eps=1e-3),
    ],
)
def test_losses_are_those_of_the_module(session, optimizer):
    model = Model()
    step = compare(session, model, replicated(session, model), make_step, optimizer=optimizer)
    assert len(nodes_of(step, AllReduce)) == 1
    # The second replica's logits and their gradients, for the loss, which is outside of the module: nothing else.
    assert len(nodes_of(step, Transfer)) == 2


def test_three_replicas_with_parts_that_are_not_equal(session):
    model = Model()
    compare(session, model, replicated(session, model, count=3), make_step, rows=8)


def test_tied_and_frozen_parameters(session):
    model = Model(tied=True)
    model.layers[0].requires_grad_(False)
    ours = replicated(session, model)
    step = compare(session, model, ours, make_step)
    assert len(nodes_of(step, Transfer)) == 2
    assert ours.head.weight is ours.embed.weight


class TwoNames(nn.Module):
    """A module with two names, as T5's embedding; a third one has the same parameter."""

    def __init__(self):
        super().__init__()
        self.shared, self.hidden, self.head = nn.Embedding(17, 8), nn.Linear(8, 8), nn.Linear(8, 17, bias=False)
        self.embed, self.head.weight = self.shared, self.shared.weight

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(self.shared(x) + self.embed(x + 1 - x.ge(16).long()))))


@pytest.mark.parametrize("make", [make_step, lambda model, opt: make_microbatched(model, opt, 2)])
def test_a_module_with_two_names_keeps_its_parameters(session, make):
    torch.manual_seed(0)
    model = TwoNames()
    ours = replicated(session, model)
    before = ours.shared.weight
    step = compare(session, model, ours, make)
    assert step.num_traces == 1
    assert ours.shared.weight is ours.embed.weight is ours.head.weight is before


def test_a_pipeline_of_each_replica(session):
    model = Model()
    step = compare(session, model, replicated(session, model, split=TWO_STAGES), make_step)
    assert len(nodes_of(step, AllReduce)) == 2  # one for each stage
    # Each replica: an activation, its gradient, the norms of one stage's gradients, and what they are scaled by.
    # Between replicas: logits, and their gradient.
    assert len(nodes_of(step, Transfer)) == 2 * 4 + 2


def test_buckets_are_as_large_as_asked(session):
    model = Model()
    numel = sum(parameter.numel() for parameter in model.parameters())
    for bucket_bytes, most in ((0, 1), (1000, 250), (numel * 4, numel)):
        step = compare(session, model, replicated(session, model, bucket_bytes=bucket_bytes), make_step, steps=1)
        sizes = [values_of(step)[node.inputs[0]].shape for node in nodes_of(step, AllReduce)]
        assert sum(torch.Size(shape).numel() for shape in sizes) == numel
        if bucket_bytes:
            assert max(torch.Size(shape).numel() for shape in sizes) <= most
        else:
            assert len(sizes) == len(list(model.parameters()))


def test_a_bucket_is_summed_while_backward_goes_on(session):
    model = Model()
    numel = sum(parameter.numel() for parameter in model.parameters())
    step = compare(session, model, replicated(session, model, bucket_bytes=2 * numel), make_step, steps=2)
    nodes = step.lower().program.nodes
    sums = [index for index, node in enumerate(nodes) if isinstance(node, AllReduce)]
    assert len(sums) >= 2
    computes = [index for index, node in enumerate(nodes) if isinstance(node, Compute)]
    feeding = [max(i for i in computes if set(nodes[i].outputs) & set(nodes[index].inputs)) for index in sums]
    assert sums[0] < feeding[-1]


def test_gradients_travel_in_another_dtype(session):
    model = Model()
    ours = replicated(session, model, dtype="bfloat16")
    step = compare(session, model, ours, make_step, rtol=0.02, atol=1e-2)
    assert {values_of(step)[value].dtype for node in nodes_of(step, AllReduce) for value in node.inputs} == {"bfloat16"}


def test_gradients_that_accumulate_over_calls(session):
    model = Model()

    def make(model, opt):
        def step(x, y):
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            return (loss,)

        return step

    ours = replicated(session, model)
    expected, step = make(model, None), program(session, make(ours, None))
    update, our_update = adamw(model.parameters()), adamw(ours.parameters())
    for turn, x in enumerate(batches(6)):
        torch.testing.assert_close(step(x, x)[0].cpu(), expected(x, x)[0].detach())
        if turn % 2:
            for opt, run in ((update, lambda function: function), (our_update, lambda f: program(session, f))):
                run(opt.step)()
                opt.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)


class Normed(nn.Module):
    """With buffers that are written, and one that is not."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 17))
        self.register_buffer("scale", torch.rand(17))

    def forward(self, x):
        return self.inner(F.one_hot(x[:, 0] % 8, 8).float()) * self.scale


def test_batch_norms_take_the_parts_one_after_the_other(session):
    """As gradient accumulation over the parts does."""
    model = Normed()
    ours = replicated(session, model)
    opts = adamw(model.parameters()), adamw(ours.parameters())

    def step(x, y):
        loss = F.cross_entropy(ours(x), y[:, 0])
        loss.backward()
        opts[1].step()
        opts[1].zero_grad()
        return loss

    run = program(session, step)
    for x in batches(4):
        y = x.roll(1, 1)
        loss = F.cross_entropy(torch.cat([model(part) for part in x.chunk(2)]), y[:, 0])
        loss.backward()
        opts[0].step()
        opts[0].zero_grad()
        torch.testing.assert_close(run(x, y).cpu(), loss.detach(), rtol=1e-5, atol=1e-6)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_evaluation_needs_no_traffic_but_results(session):
    model = Model().eval()
    ours = replicated(session, model)

    @torch.no_grad()
    def evaluate(x):
        return ours(x)

    run = program(session, evaluate)
    x = batches(1)[0]
    for _ in range(2):
        torch.testing.assert_close(run(x).cpu(), model(x).detach())
    assert len(nodes_of(run, Transfer)) == 1
    torch.testing.assert_close(ours(x).cpu(), model(x).detach())  # outside any program


def test_copies_follow_what_else_changes_the_parameters(session):
    """Loaded values, writes from the host, and programs that know of no replicas."""
    model = Model()
    ours = replicated(session, model)
    step = program(session, make_step(ours, adamw(ours.parameters())))
    expected = make_step(model, adamw(model.parameters()))

    def check():
        for x in batches(2):
            found, wanted = step(x, x), expected(x, x)
            torch.testing.assert_close([value.cpu() for value in found], list(wanted), rtol=1e-5, atol=1e-6)

    check()
    other = Model().state_dict()
    for item in (model, ours):
        item.load_state_dict(other)
    check()
    for item in (model, ours):
        with torch.no_grad():
            item.layers[0].out.weight[0] = 0.25
    check()

    def halve(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)

    halve(model)
    program(session, lambda: halve(ours))()
    check()
    gc.collect()
    num_buffers = len(session.buffers)
    check()
    gc.collect()
    assert len(session.buffers) <= num_buffers


def test_a_second_forward_after_the_update_reads_new_values(session):
    model = Model()

    def make(model, opt):
        once = make_step(model, opt)

        def step(x, y):
            first = once(x, y)
            return (*first, *once(y, x))

        return step

    step = compare(session, model, replicated(session, model), make)
    assert len(nodes_of(step, AllReduce)) == 2


def test_two_forwards_of_one_backward_have_one_sum(session):
    model = Model()

    def make(model, opt):
        def step(x, y):
            opt.zero_grad()
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) + model(y).square().mean()
            loss.backward()
            opt.step()
            return (loss,)

        return step

    step = compare(session, model, replicated(session, model), make)
    assert len(nodes_of(step, AllReduce)) == 1


def test_updates_are_one_computation_on_each_slice_and_bit_for_bit_the_same(session):
    model = Model()
    ours = replicated(session, model)
    compare(session, model, ours, make_step)
    for parameter in ours.parameters():
        [copied] = parameter._buffer.copies.values()
        assert torch.equal(session.values.fetch(copied), parameter.detach().cpu())


# ---- microbatches


_slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("count", "rows"), [(2, 8), (4, 7), pytest.param(4, 8, marks=_slow), pytest.param(8, 8, marks=_slow)]
)
def test_each_replica_takes_microbatches_of_its_own(session, count, rows):
    model = Model()
    ours = replicated(session, model)
    step = compare(session, model, ours, lambda *args: make_microbatched(*args, count), rows=rows, rtol=1e-4, atol=1e-6)
    assert len(nodes_of(step, AllReduce)) == 1
    assert len(nodes_of(step, Loop)) == (count > 2)
    for loop in nodes_of(step, Loop):
        assert all(isinstance(item.node, Compute) for body in loop.bodies for item in body.nodes)  # no traffic inside


@pytest.mark.parametrize(
    ("schedule", "split"),
    [
        ("GPipe", TWO_STAGES),
        ("1F1B", {**TWO_STAGES, "layers.2": SplitPoint.BEGINNING}),
        ("InterleavedZeroBubble", TWO_STAGES),
    ],
)
@pytest.mark.parametrize("count", [2, 3])
def test_pipelines_of_each_replica_keep_their_schedule(session, schedule, split, count):
    model = Model()
    ours = replicated(session, model, count=count, split=split)
    num = 4 * count
    step = compare(
        session, model, ours, lambda *args: make_microbatched(*args, num, schedule), rows=num, rtol=1e-4, atol=1e-6
    )
    [loop] = nodes_of(step, Loop)
    assert loop.num_turns == 4
    assert len(loop.orders) == count * (1 + len(split))


def test_gradients_that_were_there_before_microbatches(session):
    model = Model()

    def make(model, opt):
        def forward_backward(x, y):
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / 4
            loss.backward()
            return loss

        def step(x, y):
            opt.zero_grad()
            model(x).square().mean().backward()
            losses = tw.microbatch(forward_backward, x, y, n_microbatches=4)
            opt.step()
            return (losses,)

        return step

    compare(session, model, replicated(session, model), make, rtol=1e-4)


def test_a_batch_norm_sees_microbatches_in_their_order(session):
    model = Normed()

    def make(model, opt):
        def forward_backward(x, y):
            loss = F.cross_entropy(model(x), y[:, 0]) / 4
            loss.backward()
            return loss

        def step(x, y):
            opt.zero_grad()
            losses = tw.microbatch(forward_backward, x, y, n_microbatches=4)
            opt.step()
            return (losses,)

        return step

    compare(session, model, replicated(session, model), make, rtol=1e-4)


def test_a_pipeline_without_replicas_beside_a_replicated_model(session):
    """Both work on the microbatches of each replica."""
    torch.manual_seed(0)
    model, teacher = Model(), Model()
    placed_teacher = pipelined(session, copy.deepcopy(teacher), TWO_STAGES, [session.mesh(), session.mesh()])

    def make(model, teacher):
        opt = adamw(model.parameters())

        def forward_backward(x):
            with torch.no_grad():
                wanted = teacher(x)
            loss = F.mse_loss(model(x), wanted) / 4
            loss.backward()
            return loss

        def step(x, _):
            opt.zero_grad()
            losses = tw.microbatch(forward_backward, x, n_microbatches=4)
            opt.step()
            return (losses,)

        return step

    step = program(session, make(replicated(session, model), placed_teacher))
    expected = make(model, teacher)
    for x in batches(3):
        torch.testing.assert_close(step(x, x)[0].cpu(), expected(x, x)[0], rtol=1e-4, atol=1e-6)


class Trainer:
    """Reaches its model by an attribute, and calls it in a helper."""

    def __init__(self, model, opt):
        self.parts = {"model": model}
        self.opt = opt

    def loss(self, x, y):
        return F.cross_entropy(self.parts["model"](x).flatten(0, 1), y.flatten()) / 4

    def forward_backward(self, x, y):
        loss = self.loss(x, y)
        loss.backward()
        return loss

    def step(self, x, y):
        self.opt.zero_grad()
        losses = tw.microbatch(self.forward_backward, x, y, n_microbatches=4)
        self.opt.step()
        return (losses,)


def test_models_are_found_behind_objects(session):
    model = Model()
    compare(session, model, replicated(session, model), lambda *args: Trainer(*args).step, rtol=1e-4)


# ---- errors


def test_wrong_uses_are_refused(session):
    a, b = session.mesh(), session.mesh()
    reduction = Reduction(0, "")
    for stages, text in (
        ([[a], [a]], "two replicas share a slice"),
        ([[a, b], [a]], "as many slices"),
        ([[a], [session.mesh(1, names=("tp",))]], "the same axes"),
    ):
        with pytest.raises(PlacementError, match=text):
            make_replicated(nn.Linear(2, 2), stages, {}, None, reduction, lambda: session)
    ours = replicated(session, Model())
    x = batches(1)[0]
    with pytest.raises(ShapeError, match=r"sizes \[1\] at .*test_replicate.py:\d+"):
        program(session, lambda x: ours(x))(x[:1])
    step = program(session, make_microbatched(ours, adamw(ours.parameters()), 4))
    with pytest.raises(UserError, match=r"test_replicate.py:\d+ in step has 3 microbatches for 2 replicas"):
        step(x[:3], x[:3])
    total = replicated(session, nn.Sequential(nn.Linear(2, 2), Sum()))
    with pytest.raises(UserError, match=r"without dimensions at .*test_replicate.py:\d+"):
        program(session, lambda x: total(x))(torch.rand(4, 2))
    hidden = Hidden(ours)
    with pytest.raises(CaptureError, match="make the module a variable of the function"):
        program(session, lambda x: tw.microbatch(hidden.call, x, n_microbatches=4))(x)


class Counting(nn.Module):
    """Writes to a buffer of its own; to its batch, too, which each replica does for its own rows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        x.mul_(2)
        if self.training:
            self.calls.add_(1)
        return self.linear(x).relu_() / (1 + self.calls)


def test_buffers_that_each_replica_would_write_are_refused(session):
    line = r"test_replicate\.py:\d+ in forward"
    counting = replicated(session, Counting())
    with pytest.raises(CaptureError, match=rf"replicated Counting writes to calls in place at .*{line}.*return"):
        program(session, lambda x: counting(x))(torch.ones(4, 2))
    normed = replicated(session, nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)))
    with pytest.raises(CaptureError, match=r"writes to parametrizations\.weight\.0\._u in place at "):
        program(session, lambda x: normed(x))(torch.ones(4, 2))

    def twice(x):
        x = x.clone()
        return counting(x), x

    model = Counting().eval()
    model.load_state_dict(counting.state_dict())
    x = torch.randn(4, 2)
    counting.eval()
    found, written = program(session, twice)(x)
    torch.testing.assert_close(written.cpu(), 2 * x)
    torch.testing.assert_close(found.cpu(), model(x.clone()).detach())
    # In microbatches, each call writes once.
    counting.train()
    run = program(session, lambda x: tw.microbatch(lambda rows: counting(rows.clone()), x, n_microbatches=4))
    run(x)
    assert counting.calls.item() == 4


class Router(nn.Module):
    """Returns the load of its experts beside the probabilities of each row."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, x):
        probabilities = self.linear(x).softmax(-1)
        return probabilities, probabilities.mean(0)


def test_results_without_the_batch_are_refused(session):
    router = replicated(session, Router())
    with pytest.raises(
        UserError, match=r"test_replicate.py:\d+.*dimension 0 is not .*\[4, 4\] rows.*\[\[3\], \[3\]\].*microbatch"
    ):
        program(session, lambda x: router(x))(torch.rand(8, 2))
    loads = program(session, lambda x: tw.microbatch(router, x, n_microbatches=2)[1])(torch.rand(8, 2))
    assert loads.shape == (6,)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(17, 6), kind(6, 8, 2, batch_first=True), nn.Linear(8, 17)

    def forward(self, x):
        return self.head(self.layer(self.embed(x))[0])


@pytest.mark.parametrize("make", [make_step, lambda model, opt: make_microbatched(model, opt, 4)])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(session, kind, make):
    torch.manual_seed(0)
    model = Recurrent(kind)
    ours = replicated(session, model)
    step = compare(session, model, ours, make, rtol=1e-4)
    assert step.num_traces == 1
    assert all(a is b for a, b in zip(ours.layer._flat_weights, ours.layer.parameters(), strict=True))


def test_a_layer_that_was_added_afterwards_is_refused(session):
    ours = replicated(session, nn.Sequential(nn.Linear(2, 2)))
    ours.append(nn.Linear(2, 2))
    with pytest.raises(PlacementError, match=r"1\.weight of a replicated Sequential was not there.*add it before"):
        program(session, lambda x: ours(x))(torch.rand(4, 2))


class Sum(nn.Module):
    def forward(self, x):
        return x.sum()


class Hidden:
    """Its model is in nothing that Python's attributes lead to."""

    def __init__(self, model):
        self.get = iter([model] * 100).__next__

    def call(self, x):
        return self.get()(x)
