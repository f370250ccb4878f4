"""State that is kept in C: elements of numpy arrays, generators of random numbers, iterators; no processes."""

import itertools
import random

import numpy as np
import pytest
import torch

from tests.local_session import LocalSession
from torchways.controller.program import ProgramFunction
from torchways.errors import CaptureError

X = torch.ones(2)


@pytest.fixture
def program():
    session = LocalSession()
    return lambda function: ProgramFunction(function, session.mesh(), lambda: session)


class Owner:
    def __init__(self, weights):
        self.weights = weights
        self.table = {"weights": [weights]}


@pytest.mark.parametrize(
    "function",
    [
        lambda owner: lambda x, weights: x * weights.mean(),
        lambda owner: lambda x, weights: x * owner.weights.mean(),
        lambda owner: lambda x, weights: x * owner.table["weights"][0].mean(),
        lambda owner: lambda x, weights: x * torch.from_numpy(owner.weights).mean() + torch.tensor(weights).sum(),
    ],
    ids=["argument", "attribute", "item", "tensor"],
)
def test_each_call_reads_the_elements_that_an_array_has(program, function):
    weights = np.array([1.0, 2.0, np.nan])
    eager = function(Owner(weights))
    ours = program(eager)
    for number in range(4):
        weights[1:] = number
        for _ in range(2):
            torch.testing.assert_close(ours(X, weights).cpu(), eager(X, weights))
    assert ours.num_traces == 4


def draw_of(draw):
    return lambda x, generator: x * draw(generator)


@pytest.mark.parametrize(
    ("generator", "draw", "state"),
    [
        (random.Random(0), random.Random.random, lambda generator: generator.getstate()),
        (np.random.default_rng(0), np.random.Generator.normal, lambda generator: generator.bit_generator.state),
        (np.random.RandomState(0), np.random.RandomState.rand, lambda generator: str(generator.get_state())),
    ],
)
def test_generators_of_random_numbers_are_refused(program, generator, draw, state):
    before = state(generator)
    for call in (lambda: program(lambda x: x * draw(generator))(X), lambda: program(draw_of(draw))(X, generator)):
        with pytest.raises(CaptureError, match=r"test_hidden_state.py.* draws from generator .*torch.rand"):
            call()
        assert state(generator) == before
    assert program(lambda x: x * (generator is not None))(X).tolist() == [1, 1]


def test_a_write_to_an_array_is_refused(program):
    weights = np.zeros(2)

    def run(x):
        weights[0] += 1
        return x * weights[0]

    with pytest.raises(CaptureError, match=r"test_hidden_state.py.* writes to weights \(ndarray\).*buffer"):
        program(run)(X)
    assert weights.tolist() == [0, 0]


@pytest.mark.parametrize("make", [lambda: iter([1, 2, 3]), itertools.count, lambda: (item for item in [1, 2, 3])])
def test_iterators_are_refused(program, make):
    iterator = make()
    with pytest.raises(CaptureError, match=r"iterator is a .*test_hidden_state.py.*next\(\) outside"):
        program(lambda x: x * next(iterator))(X)
    with pytest.raises(CaptureError, match=r"items is a .*test_hidden_state.py.*pass a list"):
        program(lambda x, items: x * next(items))(X, iterator)
    assert next(iterator) in (0, 1)
