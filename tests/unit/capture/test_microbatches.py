"""`tw.microbatch` against the loop of gradient accumulation; no processes (tests/local_session.py runs the parts)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchways as tw
from tests.local_session import LocalSession
from tests.unit.capture.models import Model, pipelined
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction
from torchways.errors import CaptureError, ConfigError, ShapeError, UserError
from torchways.parallel.pipeline import SplitPoint

TWO = {"layers.1": SplitPoint.BEGINNING}
THREE = {"layers.1": SplitPoint.BEGINNING, "layers.2": SplitPoint.BEGINNING}
FOUR = {**THREE, "head": SplitPoint.BEGINNING}


def training_step(model, opt, count, schedule="1F1B", clip=False):
    def forward_backward(x, y):
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()) / count
        loss.backward()
        return loss, logits.argmax(-1)

    def step(x, y):
        opt.zero_grad()
        losses, tokens = tw.microbatch(forward_backward, x, y, n_microbatches=count, schedule=schedule)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5) if clip else torch.zeros(())
        opt.step()
        return losses, tokens, norm

    return step


def compare(model, ours, session, count, schedule, *, batch=8, steps=3, clip=False):
    torch.manual_seed(1)
    data = [torch.randint(0, 17, (batch, 5)) for _ in range(steps)]
    results = []
    for item in (model, ours):
        opt = torch.optim.AdamW(item.parameters(), lr=1e-2, eps=1e-4)
        step = training_step(item, opt, count, schedule, clip)
        program = step if item is model else ProgramFunction(step, None, lambda: session)
        results.append([[value.cpu() for value in program(x, x.roll(1, 1))] for x in data])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    return program


SCHEDULES = [
    *((name, split, "abcd"[: len(split) + 1]) for name in ("GPipe", "1F1B") for split in (TWO, THREE, FOUR)),
    *((name, FOUR, "abab") for name in ("LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble")),
    *((name, FOUR, "abba") for name in ("ZBVZeroBubble", "DualPipeV")),
    ("InterleavedZeroBubble", THREE, "abc"),
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("schedule", "split", "where"), SCHEDULES)
def test_training_by_every_schedule_agrees_with_gradient_accumulation(schedule, split, where, tied):
    torch.manual_seed(0)
    model, session = Model(tied), LocalSession()
    meshes = {letter: session.mesh() for letter in where}
    ours = pipelined(session, copy.deepcopy(model), split, [meshes[letter] for letter in where])
    program = compare(model, ours, session, 4, schedule, clip=True)
    assert f"loop of 4 turns by {schedule}" in str(program)
    assert program.num_traces == 1


@pytest.mark.parametrize(("batch", "count"), [(8, 3), (7, 4), (5, 4), (3, 8), (4, 1)])
def test_uneven_chunks_are_those_of_torch_chunk(batch, count):
    torch.manual_seed(0)
    model, session = Model(), LocalSession()
    ours = pipelined(session, copy.deepcopy(model), TWO, [session.mesh(), session.mesh()])
    compare(model, ours, session, count, "1F1B", batch=batch)


def test_one_slice_computes_microbatches_one_after_the_other():
    torch.manual_seed(0)
    model, session = Model(), LocalSession()
    ours = make_function(copy.deepcopy(model), session.mesh(), lambda: session)
    program = compare(model, ours, session, 4, "GPipe")
    assert "loop of 4 turns by one after the other" in str(program)


def test_the_program_does_not_grow_with_the_number_of_microbatches():
    sizes = {}
    for count in (4, 64):
        session = LocalSession()
        ours = pipelined(session, Model(), TWO, [session.mesh(), session.mesh()])
        step = training_step(ours, torch.optim.SGD(ours.parameters(), lr=0.1), count)
        program = ProgramFunction(step, None, lambda session=session: session)
        program(torch.randint(0, 17, (count, 5)), torch.randint(0, 17, (count, 5)))
        sizes[count] = len(str(program).splitlines())
    assert sizes[4] == sizes[64]


class Statistics(nn.Module):
    """A batch norm on the first stage, and a count that the last one keeps."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.last = nn.Linear(4, 2)
        self.register_buffer("total", torch.zeros(2))

    def forward(self, x):
        y = self.last(self.first(x).relu())
        with torch.no_grad():
            self.total += y.sum(0)
        return y


@pytest.mark.parametrize("stages", [1, 2])
def test_state_that_is_written_in_place_goes_from_turn_to_turn(stages):
    torch.manual_seed(0)
    model, session = Statistics(), LocalSession()
    ours = copy.deepcopy(model)
    if stages == 2:
        ours = pipelined(session, ours, {"last": SplitPoint.BEGINNING}, [session.mesh(), session.mesh()])
    else:
        ours = make_function(ours, session.mesh(), lambda: session)

    def step_of(item):
        def forward_backward(x):
            loss = item(x).square().mean()
            loss.backward()
            return loss

        return lambda x: tw.microbatch(forward_backward, x, n_microbatches=3)

    step, program = step_of(model), ProgramFunction(step_of(ours), None, lambda: session)
    for _ in range(3):  # gradients are kept and add up over the calls, too
        x = torch.randn(12, 3)
        torch.testing.assert_close(program(x).cpu(), step(x))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    for mine, other in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-4, atol=1e-5)


def test_without_gradients_and_with_what_is_no_tensor():
    session = LocalSession()
    torch.manual_seed(0)
    model = Model().eval()
    ours = pipelined(session, copy.deepcopy(model), TWO, [session.mesh(), session.mesh()])

    def step_of(item):
        def predict(x, scale, *, shift):
            return {"logits": item(x) * scale + shift, "name": "model"}

        def step(x):
            with torch.no_grad():
                return tw.microbatch(predict, x, 2.0, n_microbatches=4, shift=torch.tensor(1.0))

        return step

    x = torch.randint(0, 17, (8, 5))
    found = ProgramFunction(step_of(ours), None, lambda: session)(x)
    assert found["name"] == "model"
    torch.testing.assert_close(found["logits"].cpu(), step_of(model)(x)["logits"])


def test_every_microbatch_draws_numbers_of_its_own_which_backward_knows():
    session = LocalSession()
    module = nn.Linear(1, 1000, bias=False)
    nn.init.ones_(module.weight)
    ours = make_function(module, session.mesh(), lambda: session)

    def forward_backward(x):
        kept = F.dropout(ours(x), 0.5)
        kept.sum().backward()
        return kept.detach()

    def step(x):
        ours.weight.grad = None
        return tw.microbatch(forward_backward, x, n_microbatches=4), ours.weight.grad

    program = ProgramFunction(step, None, lambda: session)
    kept, gradient = program(torch.ones(4, 1))
    rows = kept.cpu() > 0
    assert len({tuple(row.tolist()) for row in rows}) == 4
    torch.testing.assert_close(gradient.cpu()[:, 0], kept.cpu().sum(0))
    again, _ = program(torch.ones(4, 1))
    assert not torch.equal(again.cpu(), kept.cpu())


def test_gradients_of_the_batch_itself():
    session = LocalSession()
    weight = torch.randn(3)

    def step(x):
        def forward_backward(rows):
            (rows.square() @ weight).sum().backward()

        tw.microbatch(forward_backward, x, n_microbatches=2)
        return x.grad

    x = torch.randn(4, 3, requires_grad=True)
    ours = ProgramFunction(step, session.mesh(), lambda: session)(x)
    torch.testing.assert_close(ours.cpu(), 2 * x.detach() * weight)


def refused(error, match, body, *, count=2, schedule="1F1B", x=None, stages=2):
    session = LocalSession()
    model = Model()
    model.calls = 0
    meshes = [session.mesh() for _ in range(stages)]
    split = {1: {}, 2: TWO, 3: THREE}[stages]
    ours = pipelined(session, model, split, meshes)

    def step(x):
        return tw.microbatch(lambda rows: body(ours, rows), x, n_microbatches=count, schedule=schedule)

    with pytest.raises(error, match=match):
        ProgramFunction(step, None, lambda: session)(torch.randint(0, 17, (4, 5)) if x is None else x)


def test_what_a_microbatch_may_not_do():
    def count_calls(model, x):
        model.calls += 1
        return model(x).sum()

    def clear(model, x):
        model.zero_grad()
        model(x).sum().backward()

    def nested(model, x):
        return tw.microbatch(lambda rows: model(rows).sum(), x, n_microbatches=2)

    refused(CaptureError, r"microbatch at test_microbatches\.py:\d+.* assigns to .*calls.*traced once", count_calls)
    refused(CaptureError, "clears or assigns gradients, which add up over microbatches", clear)
    refused(CaptureError, "within another loop over microbatches", nested)


def test_arguments_that_do_not_fit():
    def total(model, x):
        return model(x).sum()

    refused(UserError, "there is no schedule 'fast'; there are GPipe, 1F1B", total, schedule="fast")
    refused(UserError, "n_microbatches must be a whole number of at least 1, not 0", total, count=0)
    refused(
        ShapeError, "dimension 0, which must have one size in all of them; there are none", total, x=torch.tensor(1)
    )
    refused(ConfigError, "two stages on each slice, but there are 2 stages and 2 slices", total, schedule="DualPipeV")
    csv = tw.Schedule.from_csv("0F0,0B0\n1F0,1B0\n")
    refused(ConfigError, "has 2 stages and 1 microbatches, but the pipeline at .* has 2 and 2", total, schedule=csv)
    with pytest.raises(ShapeError, match=r"sizes \[2, 3\]"):
        tw.microbatch(lambda x, y: None, torch.ones(2), torch.ones(3), n_microbatches=1)
    with pytest.raises(UserError, match="returns different values that are no tensors"):
        tw.microbatch(lambda x: x.sum().item(), torch.arange(4.0), n_microbatches=2)


def test_a_schedule_of_ones_own():
    torch.manual_seed(0)
    model, session = Model(), LocalSession()
    ours = pipelined(session, copy.deepcopy(model), TWO, [session.mesh(), session.mesh()])
    schedule = tw.Schedule.from_csv("0F0,0F1,0I0,0I1,0W1,0W0\n1F0,1B0,1F1,1B1\n", "mine")
    program = compare(model, ours, session, 2, schedule)
    assert "loop of 2 turns by mine" in str(program)
