"""`torch.amp.GradScaler` in a program, against eager PyTorch: its numbers after each step, whatever is done to them."""

import math

import pytest
import torch
from torch import nn

from tests.local_session import LocalSession
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction
from torchways.errors import CaptureError

LOADED = {"scale": 8.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 1, "_growth_tracker": 0}


def factors(scaler):
    scaler.set_growth_factor(3.0)
    scaler.set_backoff_factor(0.1)


#: What is done to a scaler between two calls, and how often the program is traced then.
CHANGES = {
    "nothing": (lambda scaler: None, 1),
    "a loaded state": (lambda scaler: scaler.load_state_dict(LOADED), 2),
    "a new scale": (lambda scaler: scaler.update(16.0), 1),
    "a new scale in a tensor": (lambda scaler: scaler.update(torch.tensor(16.0)), 1),
    "another interval": (lambda scaler: scaler.set_growth_interval(1), 2),
    "other factors": (factors, 2),
    "it is disabled": (lambda scaler: setattr(scaler, "_enabled", False), 2),
}


def run(model, wrap, change, is_fused=False):
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=is_fused)
    generator = torch.Generator().manual_seed(1)

    def step(x):
        loss = model(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss

    step, states = wrap(step), []
    for number, size in enumerate((1.0, math.inf, 1.0, 1.0, 1.0, math.inf, 1.0)):
        step(torch.randn(4, 5, generator=generator) * size)
        states.append(scaler.state_dict())
        if number == 2:
            change(scaler)
    return step, states, [value.cpu() for value in model.state_dict().values()]


def model_of():
    torch.manual_seed(0)
    return nn.Linear(5, 3)


@pytest.mark.parametrize("name", CHANGES)
def test_a_scaler_is_that_of_eager(name):
    change, num_traces = CHANGES[name]
    session = LocalSession()
    ours = make_function(model_of(), session.mesh(), lambda: session)
    step, states, parameters = run(ours, lambda function: ProgramFunction(function, None, lambda: session), change)
    _, expected, expected_parameters = run(model_of(), lambda function: function, change)
    assert states == expected
    torch.testing.assert_close(parameters, expected_parameters, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert step.num_traces == num_traces


def test_an_optimizer_that_looks_for_infinities_itself_is_that_of_eager():
    session, change = LocalSession(), CHANGES["nothing"][0]
    ours = make_function(model_of(), session.mesh(), lambda: session)
    wrap = lambda function: ProgramFunction(function, None, lambda: session)  # noqa: E731
    _, *found = run(ours, wrap, change, is_fused=True)
    _, *expected = run(model_of(), lambda function: function, change, is_fused=True)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


def skip_first(model, wrap, make):
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=64.0), make(model.parameters())

    def step(x):
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step, generator = wrap(step), torch.Generator().manual_seed(1)
    for size in (math.inf, 1.0, math.inf, 1.0):
        step(torch.randn(4, 5, generator=generator) * size)
    return [value.cpu() for value in model.state_dict().values()]


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
        lambda parameters: torch.optim.Adam(parameters, lr=0.1, amsgrad=True),
        lambda parameters: torch.optim.NAdam(parameters, lr=0.1),
        lambda parameters: torch.optim.RAdam(parameters, lr=0.1),
        lambda parameters: torch.optim.Adamax(parameters, lr=0.1),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, initial_accumulator_value=0.5),
        lambda parameters: torch.optim.Adadelta(parameters, lr=0.1),
        lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, momentum=0.9, centered=True),
    ],
)
def test_a_first_step_that_is_skipped_leaves_no_trace(make):
    session = LocalSession()
    ours = make_function(model_of(), session.mesh(), lambda: session)
    found = skip_first(ours, lambda function: ProgramFunction(function, None, lambda: session), make)
    torch.testing.assert_close(found, skip_first(model_of(), lambda function: function, make), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"), [("SGD", {"momentum": 0.9, "dampening": 0.5}), ("ASGD", {}), ("Rprop", {})]
)
def test_optimizers_whose_first_step_makes_state_of_what_it_computes_are_refused(name, options):
    session = LocalSession()
    ours = make_function(model_of(), session.mesh(), lambda: session)
    with pytest.raises(CaptureError, match=rf"GradScaler.step at test_grad_scaler.py:\d+ in step .* of {name}, which"):
        skip_first(
            ours,
            lambda function: ProgramFunction(function, None, lambda: session),
            lambda parameters: getattr(torch.optim, name)(parameters, lr=0.1, **options),
        )


def test_what_is_written_to_a_container_that_is_replaced_later_is_not_written_to_the_new_one():
    session = LocalSession()

    class Log:
        pass

    def run(wrap):
        log = Log()
        log.items = {"a": 1}

        def step(x):
            log.items["b"] = 2
            log.items = {"c": len(log.items)}
            return x * 2

        step, found = wrap(step), []
        for _ in range(3):
            step(torch.ones(2))
            found.append(dict(log.items))
            log.items["d"] = 4
        return found

    assert run(lambda function: ProgramFunction(function, session.mesh(), lambda: session)) == run(lambda step: step)
