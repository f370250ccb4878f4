"""Arrays that a function has by two names: as an argument and as state, twice among its arguments, or by `detach()`.

No processes: tests/local_session.py runs the programs.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.local_session import LocalSession
from torchways.controller.function import make_parallel, make_replicated
from torchways.controller.program import ProgramFunction
from torchways.errors import CaptureError
from torchways.parallel.microbatch import run_microbatches
from torchways.parallel.replicate import Reduction


class Place:
    """A model and somewhere to keep an array, and a way to run functions: eager PyTorch's, or ours."""

    def __init__(self, is_ours):
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.session, self.programs = LocalSession(), []
        if is_ours:
            self.model = make_parallel(self.model, self.session.mesh(), None, lambda: self.session)
        self.is_ours = is_ours
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.kept = self.model.weight.detach()

    def program(self, function):
        if not self.is_ours:
            return function
        self.programs.append(ProgramFunction(function, None, lambda: self.session))
        return self.programs[-1]

    def value(self, tensor):
        return tensor.detach().cpu() if self.is_ours else tensor.detach().clone()


X = torch.linspace(-1, 1, 12).view(4, 3)


def regularized(place):
    """Parameters come as arguments, and have a gradient by both of their names."""

    def step(parameters, x):
        loss = place.model(x).square().mean() + 0.5 * sum(parameter.square().sum() for parameter in parameters)
        loss.backward()
        place.optimizer.step()
        place.optimizer.zero_grad()
        return loss

    step = place.program(step)
    for _ in range(3):
        yield step(list(place.model.parameters()), X)
    yield place.model.weight


def clipped(place):
    def step(parameters, x):
        loss = (10 * place.model(x)).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 0.01)
        place.optimizer.step()
        place.optimizer.zero_grad()
        return norm

    step = place.program(step)
    for _ in range(3):
        yield step(list(place.model.parameters()), X)
    yield place.model.weight


def written(place):
    """What is written by one name is read by the other."""

    @torch.no_grad()
    def by_state(weight):
        place.model.weight.add_(1.0)
        return weight.sum()

    @torch.no_grad()
    def by_argument(weight):
        weight.mul_(2.0)
        return place.model.weight.sum()

    by_state, by_argument = place.program(by_state), place.program(by_argument)
    for _ in range(2):
        yield by_state(place.model.weight)
        yield by_argument(place.model.weight)
        yield by_state(place.model.weight.detach())
        yield place.model.weight


def now_one_then_two(place):
    """The arguments are one array in some calls, and two in others."""

    @torch.no_grad()
    def change(first, second):
        place.model.weight.add_(1.0)
        return (first + 2 * second).sum(), (first * place.model.weight).sum()

    change = place.program(change)
    other = place.program(lambda: place.model.weight.detach() * 3)()
    weight = place.model.weight
    for first, second in ((weight, weight), (weight, other), (other, other), (other, weight), (weight, weight)):
        yield from change(first, second)
    if place.is_ours:
        assert place.programs[0].num_traces == 4


def kept_apart_later(place):
    """What shared its memory when the function was traced does not later, and the other way round."""
    distance = place.program(lambda: (place.model.weight - place.kept).abs().sum())
    add = place.program(lambda: place.model.weight.detach().add_(1.0).sum())
    yield distance()
    yield add()
    yield distance()
    place.kept = copy.deepcopy(place.model.weight.detach())
    yield add()
    yield distance()
    place.kept = place.model.weight.detach()
    yield add()
    yield distance()


def written_arguments(place):
    """Arrays among the arguments are written to, as a cache is; other calls have other ones."""
    make = place.program(lambda: (place.model.weight.detach() * 0, place.model.weight.detach() + 1))

    @torch.no_grad()
    def step(cache, x):
        cache["values"][0] += x
        cache["count"].add_(1)
        return cache["values"].sum()

    step = place.program(step)
    caches = [dict(zip(("values", "count"), make(), strict=True)) for _ in range(2)]
    for number in (0, 1, 0, 0):
        yield step(caches[number], X[number])
        yield from caches[number].values()
    if place.is_ours:
        assert step.num_traces == 1


def gradient_of_the_detached(place):
    def step(x):
        loss = ((place.model.weight - 2 * place.kept) * x.mean()).square().sum()
        loss.backward()
        place.optimizer.step()
        place.optimizer.zero_grad()
        return loss

    step = place.program(step)
    for _ in range(3):
        yield step(X + 1)
    yield place.kept


def kept_by_two_names(place):
    """A run leaves one array at two places of Python's state, and the memory of a parameter at a third."""
    state = SimpleNamespace(first=None, second=None, weight=None)

    @torch.no_grad()
    def keep(x):
        state.first = state.second = place.model(x)
        state.weight = place.model.weight.detach()
        return state.first.sum()

    @torch.no_grad()
    def change():
        state.first.add_(1.0)
        place.model.weight.mul_(0.5)
        return state.second.sum(), state.weight.sum()

    keep, change = place.program(keep), place.program(change)
    for _ in range(3):
        yield keep(X)
        yield from change()
        yield from change()
        state.weight.zero_()
        yield place.model.weight


def data_assigned(place):
    """As optimizers of users do: the new value is computed, or one that was put aside."""
    aside, outside = {}, place.model.weight.detach()

    def step(x):
        place.model(x).square().mean().backward()
        with torch.no_grad():
            for parameter in place.model.parameters():
                aside[parameter] = parameter.data.clone()
                parameter.add_(parameter.grad)
        place.optimizer.zero_grad()
        loss = place.model(x).square().mean()
        loss.backward()
        for parameter in place.model.parameters():
            parameter.data = aside[parameter]
            parameter.data = parameter.data - 0.1 * parameter.grad
        place.model.bias.data = aside[place.model.bias]
        place.optimizer.step()
        place.optimizer.zero_grad()
        return loss

    step = place.program(step)
    for _ in range(4):
        yield step(X)
        yield outside
        yield from place.model.parameters()
        yield from aside.values()


def data_exchanged(place):
    other = copy.deepcopy(place.model)
    for parameter in other.parameters():
        parameter.data.add_(1.0)

    def exchange():
        for first, second in zip(place.model.parameters(), other.parameters(), strict=True):
            first.data, second.data = second.data, first.data

    @torch.no_grad()
    def step(x):
        exchange()
        result = place.model(x).sum()
        place.model.bias.mul_(2.0)
        return result

    @torch.no_grad()
    def there_and_back(x):
        exchange()
        result = place.model(x).sum()
        exchange()
        return result + place.model(x).sum()

    step, there_and_back = place.program(step), place.program(there_and_back)
    for _ in range(3):
        yield step(X)
        yield there_and_back(X)
        yield from [*place.model.parameters(), *other.parameters()]


def data_of_what_the_program_makes(place):
    @torch.no_grad()
    def step(x):
        first, second = x * place.model.bias.sum(), x * 3
        view = first[0]
        first.data = second
        second.add_(1.0)
        return first, view, second.t()

    yield from place.program(step)(X)


@pytest.mark.parametrize(
    "steps",
    [
        regularized,
        clipped,
        written,
        now_one_then_two,
        kept_apart_later,
        written_arguments,
        gradient_of_the_detached,
        kept_by_two_names,
        data_assigned,
        data_exchanged,
        data_of_what_the_program_makes,
    ],
)
def test_it_is_one_array_as_in_eager_pytorch(steps):
    eager, ours = Place(False), Place(True)
    for expected, found in zip(steps(eager), steps(ours), strict=True):
        torch.testing.assert_close(ours.value(found), eager.value(expected))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda place, x: setattr(place.model.weight, "data", x), r"shape \[4, 3\].*test_shared_arrays.py.*outside"),
        (lambda place, x: setattr(x, "data", x * 2), r"test_shared_arrays.py.*of an argument.*data.copy_"),
        (
            lambda place, x: run_microbatches(
                lambda x: setattr(place.model.weight, "data", place.model.weight * x.sum()), (x,), {}, 2, "1F1B"
            ),
            r"test_shared_arrays.py.* within a microbatch: .*data.copy_",
        ),
    ],
)
def test_data_that_cannot_be_assigned(step, message):
    place = Place(True)
    before = place.value(place.model.weight)
    with pytest.raises(CaptureError, match=message):
        place.program(lambda x: step(place, x))(X.clone())
    assert torch.equal(place.value(place.model.weight), before)


def test_hooks_of_gradients_write_to_what_is_theirs():
    place, seen = Place(True), []
    place.model.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.sum()))
    place.model.bias.register_hook(lambda gradient: seen.append(gradient.sum()))

    def step(x):
        place.model(x).sum().backward()
        place.optimizer.zero_grad()

    step = place.program(step)
    for _ in range(2):
        step(X)
    assert sorted(value.item() for value in seen) == pytest.approx(sorted([2 * X.sum().item(), 8.0] * 2), abs=1e-5)


def test_a_program_keeps_no_argument():
    session = LocalSession()
    make = ProgramFunction(lambda: torch.zeros(3), session.mesh(), lambda: session)

    @torch.no_grad()
    def step(cache, other):
        return cache.add_(1).sum() + other.sum()

    step = ProgramFunction(step, None, lambda: session)
    for _ in range(2):
        cache, other = make(), make()
        step(cache, other)
        held = {array._buffer.buffer_id for array in (cache, other)}
        del cache, other
        assert held <= set(session.released)


def test_a_host_tensor_that_is_given_twice_gets_both_gradients():
    session = LocalSession()
    x, y = (torch.ones(3, requires_grad=True) for _ in range(2))

    def run(first, second):
        (first * 2 + second * 3).sum().backward()

    program = ProgramFunction(run, session.mesh(), lambda: session)
    program(x, x)
    program(x, y)
    assert (x.grad.tolist(), y.grad.tolist()) == ([7.0] * 3, [3.0] * 3)


@pytest.mark.parametrize("dispatch", ["parallel", "sequential"])
def test_a_later_computation_reads_what_state_was_before_the_call_wrote_it(dispatch):
    session = LocalSession()
    torch.manual_seed(0)
    eager = nn.Linear(3, 1, bias=False)
    ours = make_replicated(
        copy.deepcopy(eager), [[session.mesh()], [session.mesh()]], {}, None, Reduction(1 << 20, ""), lambda: session
    )
    losses = []
    for model in (eager, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(x, model=model, optimizer=optimizer):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        run = step if model is eager else ProgramFunction(step, None, lambda: session, dispatch)
        losses.append([run(X).item() for _ in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    [copied] = ours.weight._buffer.copies.values()
    assert torch.equal(session.fetch(copied), ours.weight.detach().cpu())


@pytest.mark.parametrize("dispatch", ["parallel", "sequential"])
def test_a_value_goes_to_another_slice_before_it_is_written(dispatch):
    session = LocalSession()
    first, second = session.mesh(), session.mesh()
    counter = make_parallel(Counter(), first, None, lambda: session)
    shift = make_parallel(Shift(), second, None, lambda: session)

    def step(x):
        result = shift(counter(x), counter.count)
        counter.count.add_(1)
        return result

    step = ProgramFunction(step, None, lambda: session, dispatch)
    assert [step(torch.ones(1)).tolist() for _ in range(3)] == [[2.0], [3.0], [4.0]]


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        return x * 2 + self.count * 0


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("unused", torch.zeros(1))

    def forward(self, x, by):
        return x + by + self.unused
