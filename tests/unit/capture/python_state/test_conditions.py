"""Places whose values change between calls: each call finds what is there then; no processes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.local_session import LocalSession
from torchways.controller.function import make_parallel
from torchways.controller.program import ProgramFunction


class Owner:
    def __init__(self):
        self.value = torch.zeros(3)
        self.values = {"a": self.value}


def of_an_object():
    owner = Owner()

    def change(value):
        owner.value = value

    return lambda x: x * owner.value, change


def of_a_dict_of_an_object():
    owner = Owner()
    return lambda x: x * owner.values["a"], lambda value: owner.values.update(a=value)


def of_a_namespace():
    owner = SimpleNamespace(value=torch.zeros(3))
    return lambda x: x * owner.value, lambda value: setattr(owner, "value", value)


def of_a_module():
    owner = torch.nn.Module()
    owner.register_buffer("value", torch.zeros(3))
    owner.plain = torch.zeros(3)

    def change(value):
        owner.value, owner.plain = value, value + 1

    return lambda x: x * owner.value + owner.plain, change


def of_a_name_that_was_missing():
    owner = torch.nn.Module()

    def change(value):
        owner.register_buffer("value", value)

    return lambda x: x * getattr(owner, "value", 7.0), change


@pytest.mark.parametrize(
    "make", [of_an_object, of_a_dict_of_an_object, of_a_namespace, of_a_module, of_a_name_that_was_missing]
)
def test_another_tensor_is_found_however_often_there_is_another(make):
    session = LocalSession()
    function, change = make()
    program = ProgramFunction(function, session.mesh(), lambda: session)
    x = torch.ones(3)
    program(x)
    for number in range(6):
        change(torch.full((3,), float(number)))
        for _ in range(2):
            assert torch.equal(program(x).cpu(), function(x)), number


def test_layers_of_other_shapes_have_state_that_is_not_read():
    session = LocalSession()
    model = make_parallel(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)), session.mesh(), None, lambda: session)
    program = ProgramFunction(lambda x: model(x).sum(), None, lambda: session)
    x = torch.ones(2, 3)
    for layer in model:
        layer.note = 0
    plain = program(x).item()
    for number, layer in enumerate(reversed(model)):
        layer.note = number + 1
        assert program(x).item() == plain
    assert program.num_traces == 1
