"""How often programs are traced, and the switch that traces them at every call."""

import threading
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.local_session import LocalSession
from torchways.capture.python_state.conditions import Conditions
from torchways.controller.function import make_parallel
from torchways.controller.program import ProgramFunction
from torchways.errors import InternalError

CALLS = 12


class Placed:
    """A session with one slice, and ways to put things there."""

    def __init__(self):
        self.session = LocalSession()
        self.mesh = self.session.mesh()

    def model(self, *widths):
        torch.manual_seed(0)
        layers = [nn.Linear(first, second) for first, second in pairwise(widths)]
        return make_parallel(nn.Sequential(*layers), self.mesh, None, lambda: self.session)

    def program(self, function):
        return ProgramFunction(function, self.mesh, lambda: self.session)


@pytest.fixture
def placed():
    return Placed()


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def test_zero_grad_first(placed):
    model = placed.model(3, 4, 2)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    step = placed.program(step)
    for _ in range(CALLS):
        step(X)
    assert step._times_traced == 1


def test_a_step_over_two_programs(placed):
    model = placed.model(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def accumulate(x):
        loss = model(x).square().mean()
        loss.backward()
        return loss

    def update():
        optimizer.step()
        optimizer.zero_grad()

    accumulate, update = placed.program(accumulate), placed.program(update)
    for _ in range(CALLS):
        accumulate(X)
        update()
    assert (accumulate._times_traced, update._times_traced) == (1, 1)


def test_two_optimizers_of_a_gan(placed):
    generator, critic = placed.model(3, 3), placed.model(3, 1)
    of_generator = torch.optim.Adam(generator.parameters(), lr=0.01)
    of_critic = torch.optim.Adam(critic.parameters(), lr=0.01)

    def critic_step(real, noise):
        of_critic.zero_grad()
        loss = critic(generator(noise).detach()).mean() - critic(real).mean()
        loss.backward()
        of_critic.step()
        return loss

    def generator_step(noise):
        of_generator.zero_grad()
        loss = -critic(generator(noise)).mean()
        loss.backward()
        of_generator.step()
        return loss

    critic_step, generator_step = placed.program(critic_step), placed.program(generator_step)
    for _ in range(CALLS):
        critic_step(X, X)
        generator_step(X)
    assert (critic_step._times_traced, generator_step._times_traced) == (1, 1)


def test_gradients_that_others_replace_are_added_to(placed):
    """A step leaves gradients of the critic, which another step's program made anew since its first call."""

    def run(generator, critic, wrap):
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.01)

        def critic_step(real):
            optimizer.zero_grad()
            critic(real).mean().backward()
            optimizer.step()

        def generator_step(noise):
            critic(generator(noise)).square().mean().backward()

        critic_step, generator_step = wrap(critic_step), wrap(generator_step)
        found = []
        for number in range(CALLS):
            critic_step(X * number)
            generator_step(X - number)
            found += [parameter.grad.cpu().clone() for parameter in critic.parameters()]
        return found, generator_step

    def plain(*widths):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(*widths))

    expected, _ = run(plain(3, 3), plain(3, 1), lambda function: function)
    found, step = run(placed.model(3, 3), placed.model(3, 1), placed.program)
    torch.testing.assert_close(found, expected)
    assert step._times_traced == 2  # without gradients of the generator, and with them


@pytest.mark.parametrize("name", ["one cycle, betas", "cyclic, momentum", "weight decay"])
def test_schedules_of_hyperparameters(placed, name):
    def losses(model, wrap):
        if name == "cyclic, momentum":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.8)
            schedule = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=4)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=2 * CALLS)

        def step(x):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        step = wrap(step)
        found = []
        for number in range(CALLS):
            found.append(step(X).item())
            if name == "weight decay":
                optimizer.param_groups[0]["weight_decay"] = 0.1 + 0.01 * number
            else:
                schedule.step()
        return found, step

    ours, step = losses(placed.model(3, 4, 2), placed.program)
    torch.manual_seed(0)
    expected, _ = losses(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), lambda function: function)
    assert step._times_traced == 1
    assert ours == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("value", "traces"),
    [(lambda i: i, 2), (lambda i: i / 7, 2), (lambda i: "name", 1)],
    ids=["int", "float", "str"],
)
def test_a_number_that_changes_becomes_an_input_after_its_second_value(placed, value, traces):
    def scaled(x, factor):
        return x * factor + factor if not isinstance(factor, str) else x

    program = placed.program(scaled)
    for number in range(1, CALLS + 1):
        torch.testing.assert_close(program(X, value(number)).cpu(), scaled(X, value(number)))
    assert program._times_traced == traces


def test_an_argument_that_nobody_reads_is_no_condition(placed):
    program = placed.program(lambda x, epoch, *, name, settings=None: x * 2)
    for number in range(CALLS):
        program(X, number, name=f"step {number}", settings=[f"{number}"])
    assert program._times_traced == 1


def test_numbers_keep_their_arithmetic(placed):
    """Python's own: in double precision, of the types that it says, through control flow."""

    def function(x, a, n):
        b = a**n / (1 + abs(a)) - n // 2 + n % 3
        large = b > 1.5
        return x * b, x.add(x, alpha=a), torch.full((2,), a) + n, x / a if large else x - a, isinstance(a, float), b

    program = placed.program(function)
    for number in range(CALLS):
        arguments = (0.3 + 0.11 * number, number % 5)
        *tensors, is_float, b = program(X, *arguments)
        *expected, _, exact = function(X, *arguments)
        assert is_float is True
        assert b == exact
        torch.testing.assert_close([tensor.cpu() for tensor in tensors], expected)
    assert program._times_traced <= 4  # and one for each branch


def test_momentum_is_traced_once(placed):
    model = placed.model(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def step(x):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step = placed.program(step)
    for _ in range(CALLS):
        step(X)
    assert step._times_traced == 1


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_training_is_the_same_trace_at_every_call(placed, make, monkeypatch):
    monkeypatch.setenv("TORCHWAYS_CHECK_TRACES", "1")
    model = placed.model(3, 4, 2)
    optimizer = make(model.parameters(), lr=0.1)

    def step(x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step = placed.program(step)
    losses = [step(X, torch.tensor([0, 1, 0, 1])).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert step._times_traced == 1


def test_the_switch_finds_a_stale_trace(placed, monkeypatch):
    monkeypatch.setenv("TORCHWAYS_CHECK_TRACES", "1")
    scale = [2.0]
    program = placed.program(lambda x: x * scale[0])
    program(X)
    program(X)
    scale[0] = 3.0
    monkeypatch.setattr(Conditions, "hold", lambda self, call: True)  # as if nothing were noticed
    with pytest.raises(InternalError, match="goes on with a trace that is not what a new one would be: result 0 is"):
        program(X)


def test_threads_share_a_program(placed):
    """Three threads trace at a time, and train one model: each call is one step to the others."""
    model = placed.model(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(x, power):
        loss = (model(x) ** power).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step = placed.program(step)
    errors = []

    def train(size):
        try:
            for _ in range(8):
                step(X[:size], 2).item()
                model.state_dict()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(size,)) for size in (1, 2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert step._times_traced == 3
    assert all(value.isfinite().all() for value in model.state_dict().values())
