"""`tw.microbatch` against the loop of gradient accumulation; no processes (tests/local_session.py runs the parts)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchways as tw
from tests.local_session import LocalSession
from tests.unit.capture.models import Model, pipelined
from torchways.controller.function import make_function, make_pipeline
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


def compare(model, ours, session, count, schedule, *, batch=8, steps=2, clip=False):
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
#: With tied parameters, `make test` takes one schedule of each kind: stages on slices of their own, in turn, and back.
TIED = [item for item in SCHEDULES if item[0] in ("1F1B", "InterleavedZeroBubble", "ZBVZeroBubble") and item[1] == FOUR]


@pytest.mark.parametrize(
    ("schedule", "split", "where", "tied"),
    [
        *((*item, False) for item in SCHEDULES),
        *(pytest.param(*item, True, marks=[pytest.mark.slow] * (item not in TIED)) for item in SCHEDULES),
    ],
)
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
    for count in (4, 16):
        session = LocalSession()
        ours = pipelined(session, Model(), TWO, [session.mesh(), session.mesh()])
        step = training_step(ours, torch.optim.SGD(ours.parameters(), lr=0.1), count)
        program = ProgramFunction(step, None, lambda session=session: session)
        program(torch.randint(0, 17, (count, 5)), torch.randint(0, 17, (count, 5)))
        sizes[count] = len(str(program).splitlines())
    assert sizes[4] == sizes[16]


class Positions(nn.Module):
    """Its first stage makes tables that all stages read, as a rotary embedding does."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(17, 6)
        self.register_buffer("frequencies", torch.rand(3))
        self.scale = nn.Parameter(torch.ones(1))
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 17)

    def forward(self, tokens):
        angles = torch.arange(tokens.shape[-1])[:, None] * self.frequencies
        low, high = torch.aminmax(angles.cos().repeat(1, 2) + angles.sin().repeat(1, 2), dim=-1, keepdim=True)
        table, learned = low + high, self.scale.exp() + low
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x).tanh() * table + x * learned
        return self.head(x)


@pytest.mark.parametrize(("split", "where"), [(THREE, "abc"), (FOUR, "abba")])
def test_what_is_the_same_in_each_microbatch_goes_to_other_stages_once(split, where):
    torch.manual_seed(0)
    model, session = Positions(), LocalSession()
    meshes = {letter: session.mesh() for letter in where}
    ours = pipelined(session, copy.deepcopy(model), split, [meshes[letter] for letter in where])
    text = str(compare(model, ours, session, 4, "ZBVZeroBubble" if where == "abba" else "1F1B"))
    before, loop = text.split("    each turn\n")
    sent = [line for line in loop.splitlines() if "transfer" in line and "F:" in line]
    assert sent
    assert all("[2,5,6]" in line for line in sent)
    assert before.count("transfer") == 2 * (len(meshes) - 1)  # the tables with and without a parameter


@pytest.mark.parametrize(("batch", "count"), [(3, 2), (7, 4)])
def test_what_has_one_turn_stays_in_its_loop(batch, count):
    """As a smaller last microbatch, in which everything is the same in each turn."""
    torch.manual_seed(0)
    model, session = Positions(), LocalSession()
    meshes = [session.mesh(), session.mesh()]
    ours = pipelined(session, copy.deepcopy(model), TWO, meshes)
    _, loop = str(compare(model, ours, session, count, "1F1B", batch=batch)).split("    each turn\n", 1)
    assert sum("0F: " in line and "compute" in line for line in loop.splitlines()) == 2


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

    def clear_in_place(model, x):
        model.zero_grad(set_to_none=False)
        model(x).sum().backward()

    def clip(model, x):
        model(x).sum().backward()
        return nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    def update(model, x):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(x).sum().backward()
        optimizer.step()

    def write_to_chunk(model, x):
        return model(x.clamp_(0, 3)).sum()

    def all_reduce(model, x):
        return tw.all_reduce([model(x)])

    refused(CaptureError, "clears or assigns gradients, which add up over microbatches", clear)
    refused(CaptureError, "reads a gradient that it makes.*after the loop", clear_in_place)
    refused(CaptureError, "reads a gradient that it makes.*after the loop", clip)
    refused(CaptureError, r"optimizer steps within a microbatch at test_microbatches\.py:\d+ in update", update)
    refused(UserError, "writes to its microbatch in place.*clone it first", write_to_chunk)
    refused(CaptureError, r"all_reduce at test_microbatches\.py:\d+.*sum them after", all_reduce)
    refused(CaptureError, "within another loop over microbatches", nested)


def test_a_microbatch_that_is_written_to_in_inference_mode_is_refused():
    """PyTorch counts no writes there."""
    session = LocalSession()
    ours = make_function(nn.Linear(3, 2), session.mesh(), lambda: session)

    @torch.inference_mode()
    def step(x, write):
        return tw.microbatch(lambda rows: ours(write(rows)), x, n_microbatches=2)

    run = ProgramFunction(step, None, lambda: session)
    for write in (lambda rows: rows.mul_(2), lambda rows: rows[0].zero_() + rows):
        with pytest.raises(UserError, match=r"writes to its microbatch in place.*clone it first"):
            run(torch.ones(4, 3), write)
    assert run(torch.ones(4, 3), lambda rows: rows.clone().mul_(2)).shape == (4, 2)


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


def test_a_schedule_that_does_not_fit_names_the_line():
    """Two stages on one slice, which the default schedule does not allow."""
    session = LocalSession()
    slice_ = session.mesh()
    model = make_pipeline(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)),
        {"1": SplitPoint.BEGINNING},
        [slice_] * 2,
        None,
        lambda: session,
    )

    def forward_backward(rows):
        loss = model(rows).sum()
        loss.backward()
        return loss

    def program(schedule):
        return ProgramFunction(
            lambda x: tw.microbatch(forward_backward, x, n_microbatches=2, schedule=schedule), None, lambda: session
        )

    with pytest.raises(ConfigError, match=r"1F1B has one stage .* take .*, at .*test_microbatches\.py:\d+"):
        program("1F1B")(torch.ones(4, 2))
    assert program("LoopedBFS")(torch.ones(4, 2)).shape == (2,)


def test_a_schedule_of_ones_own():
    torch.manual_seed(0)
    model, session = Model(), LocalSession()
    ours = pipelined(session, copy.deepcopy(model), TWO, [session.mesh(), session.mesh()])
    schedule = tw.Schedule.from_csv("0F0,0F1,0I0,0I1,0W1,0W0\n1F0,1B0,1F1,1B1\n", "mine")
    program = compare(model, ours, session, 2, schedule)
    assert "loop of 2 turns by mine" in str(program)


class Small(nn.Module):
    """Three layers of a few numbers, and two buffers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.middle = nn.Tanh()
        self.last = nn.Linear(4, 2)
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("other", torch.ones(4))

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


def agrees(step_of, model=Small, split=(), count=8, calls=2):
    """Compares the steps that `step_of` makes of a module with eager ones: results, state and gradients."""
    torch.manual_seed(0)
    module, session = model(), LocalSession()
    ours = copy.deepcopy(module)
    if split:
        meshes = [session.mesh() for _ in range(len(split) + 1)]
        ours = pipelined(session, ours, dict.fromkeys(split, SplitPoint.BEGINNING), meshes)
    else:
        ours = make_function(ours, session.mesh(), lambda: session)
    step, program = step_of(module), ProgramFunction(step_of(ours), None, lambda: session)
    for _ in range(calls):
        x = torch.randn(count, 3)
        expected = step(x.clone())
        found = torch.utils._pytree.tree_map(lambda value: value.cpu(), program(x))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for mine, other in zip(ours.buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(mine.cpu(), other, rtol=1e-4, atol=1e-5)
    for mine, other in zip(ours.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(mine.detach().cpu(), other.detach(), rtol=1e-4, atol=1e-5)
        assert (mine.grad is None) == (other.grad is None)
        if other.grad is not None:
            torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-4, atol=1e-5)


def backward_of(module):
    def forward_backward(x):
        loss = module(x).square().mean()
        loss.backward()
        return loss.detach()

    return forward_backward


class Joined(nn.Module):
    """Its gradients are parts of one tensor."""

    def __init__(self, join):
        super().__init__()
        self.join = join
        self.p, self.q = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return x @ self.join([self.p, self.q]).flatten(0, -2).t()


@pytest.mark.parametrize("join", [torch.cat, torch.stack])
def test_gradients_that_share_memory(join):
    agrees(lambda module: lambda x: tw.microbatch(backward_of(module), x, n_microbatches=4), model=lambda: Joined(join))


@pytest.mark.parametrize("count", [8, 7])
def test_gradients_from_before_the_loop_and_two_loops(count):
    def step_of(module):
        def step(x):
            module(x).sum().backward()
            norms = tw.microbatch(lambda rows: clipped(module, rows), x, n_microbatches=4)
            return norms, tw.microbatch(backward_of(module), 2 * x, n_microbatches=3)

        return step

    def clipped(module, x):
        module(x).square().sum().backward()
        return nn.utils.clip_grad_norm_(module.parameters(), 0.5)

    agrees(step_of, count=count)


@pytest.mark.parametrize("count", [8, 7])
def test_views_of_what_is_written_to(count):
    def step_of(module):
        def step(x):
            table = torch.zeros(2, 3)
            row = table[0]

            def add(rows):
                before = row.sum()
                row.add_(rows.sum(0))
                table[1] += row
                module.total[:3] += rows.sum(0)
                module.total[3].mul_(2).add_(1)
                return module(rows).sum() + before + row.sum() + module.total.sum()

            return tw.microbatch(add, x, n_microbatches=4), row.clone(), table

        return step

    agrees(step_of, count=count)


def test_state_that_is_copied():
    def step_of(module):
        def swap(x):
            kept = module.total.clone()
            module.total.copy_(module.other)
            module.other.copy_(kept)
            module.total += x.sum()
            return module(x).sum() + module.total.sum()

        def read(x):
            module.total += x.sum()
            return module.other.sum()

        def step(x):
            swapped = tw.microbatch(swap, x, n_microbatches=3)
            module.other.copy_(module.total)
            return swapped, tw.microbatch(read, x, n_microbatches=4)  # only one of the two is written to

        return step

    agrees(step_of)


def test_state_that_nobody_reads_before_or_after():
    def step_of(module):
        def step(x):
            running, newest = torch.zeros(()), torch.zeros(3)

            def function(rows):
                newest.copy_(rows[0])
                module.total.copy_(module.first.bias)
                running.add_(rows.sum())
                return module(rows).sum() * running

            return tw.microbatch(function, x, n_microbatches=4), newest

        return step

    with torch.no_grad():
        agrees(step_of)


def test_results_that_no_microbatch_computes():
    scale = torch.tensor(3.0)

    def step_of(module):
        return lambda x: tw.microbatch(
            lambda rows: (rows, module.last.bias, scale, module(rows).t(), rows > 0), x, n_microbatches=4
        )

    agrees(step_of)


@pytest.mark.parametrize("count", [9, 8])
@pytest.mark.parametrize("split", [(), ("last",)])
def test_results_that_were_there_before_the_loop_are_what_its_last_microbatch_leaves(count, split):
    def step_of(module):
        def step(x):
            module(x).sum().backward()
            number, rows_seen, newest = torch.tensor(0.0), torch.zeros(3), torch.zeros(())

            def function(rows):
                module(rows).square().sum().backward()
                early = torch.empty(4)
                early.copy_(module.total)
                module.total[1] += rows.sum()
                number.add_(1)
                newest.copy_(number)
                written = (module.total, module.total[1], module.total[1:].view(3, 1), number, newest)
                whole = (rows_seen.index_add_(0, torch.tensor([2]), rows.new_ones(1)), module.last.weight.grad)
                return *written, *whole, early, module.total.clone(), number * 2

            return tw.microbatch(function, x, n_microbatches=3)

        return step

    agrees(step_of, split=split, count=count)


class Running(Small):
    """A total that backward reads, too, when the next microbatch has gone on with it."""

    def forward(self, x):
        hidden = self.first(x)
        with torch.no_grad():
            self.total += hidden.sum(0)
        return self.last(self.middle(hidden * self.total))


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_state_that_backward_reads_is_not_overwritten_by_the_next_turn(schedule):
    def step_of(module):
        return lambda x: tw.microbatch(backward_of(module), x, n_microbatches=4, schedule=schedule)

    agrees(step_of, model=Running, split=("middle", "last"))


@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble"])
def test_a_stage_without_parameters(schedule):
    def step_of(module):
        return lambda x: tw.microbatch(backward_of(module), x, n_microbatches=4, schedule=schedule)

    agrees(step_of, split=("middle", "last"))


def test_a_microbatch_that_needs_its_stages_twice_in_turn_does_not_fit_every_schedule():
    def step_of(schedule):
        def function(module, x):
            again = module(torch.cat([module(x), x[:, :1]], 1))
            again.sum().backward()

        return lambda module: (
            lambda x: tw.microbatch(lambda rows: function(module, rows), x, n_microbatches=4, schedule=schedule)
        )

    with pytest.raises(ConfigError, match=r"schedule 1F1B at test_microbatches\.py:\d+.* does not fit.*GPipe"):
        agrees(step_of("1F1B"), split=("last",))


class Sparse(Small):
    """Its last layer computes only the rows that a mask selects."""

    def forward(self, x):
        hidden = self.middle(self.first(x))
        [rows] = (hidden.sum(-1) > 0).nonzero(as_tuple=True)
        return hidden.new_zeros(len(x), 2).index_add(0, rows, self.last(hidden[rows]))


@pytest.mark.parametrize("split", [(), ("last",)])
def test_rows_that_a_mask_selects(split):
    def step_of(module):
        opt = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-4)

        def step(x):
            losses = tw.microbatch(backward_of(module), x, n_microbatches=4)
            opt.step()
            opt.zero_grad()
            return losses

        return step

    agrees(step_of, Sparse, split)


class Meter:
    def __init__(self):
        self.total = 0.0


def test_variables_and_containers_of_the_program_itself():
    def attempt(change, match):
        session = LocalSession()
        ours = make_function(Small(), session.mesh(), lambda: session)

        def step(x):
            count, losses, counts, meter = 0, [], {"rows": 0}, Meter()

            def function(rows):
                nonlocal count
                loss = ours(rows).sum()
                if change == "variable":
                    count += 1
                elif change == "list":
                    losses.append(loss.detach())
                elif change == "dict":
                    counts["rows"] += len(rows)
                else:
                    meter.total += loss.detach()
                return loss

            return tw.microbatch(function, x, n_microbatches=2), count, losses, counts, meter.total

        with pytest.raises(CaptureError, match=f"assigns to {match}.*traced once"):
            ProgramFunction(step, None, lambda: session)(torch.randn(4, 3))

    attempt("variable", "count")
    attempt("list", "losses")
    attempt("dict", r"counts\['rows'\]")
    attempt("object", "meter.*total")


def test_gradients_of_a_tensor_of_the_program_are_refused():
    def step_of(module):
        def step(x):
            shift = torch.zeros(3, requires_grad=True)
            tw.microbatch(lambda rows: backward_of(module)(rows + shift), x, n_microbatches=2)
            return shift.grad

        return step

    with pytest.raises(CaptureError, match=r"uses a tensor that microbatches at test_microbatches\.py.*return it"):
        agrees(step_of)


def test_a_smaller_last_microbatch_with_a_result_of_fewer_dimensions():
    def step_of(module):
        return lambda x: tw.microbatch(lambda rows: module(rows)[:, 0].squeeze(), x, n_microbatches=4)

    with pytest.raises(RuntimeError, match="zero-dimensional"):
        agrees(step_of, count=7)
    session = LocalSession()
    ours = make_function(Small(), session.mesh(), lambda: session)
    with pytest.raises(UserError, match="returns a tensor of 0 dimensions and the others one of 1"):
        ProgramFunction(step_of(ours), None, lambda: session)(torch.randn(7, 3))
