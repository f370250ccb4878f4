"""Containers that no name leads to: defaults of arguments, arguments of functools.partial, closures; and slots."""

import functools

import pytest
import torch

from tests.local_session import LocalSession
from torchways.controller.program import ProgramFunction


def by_default():
    config = {"k": 1.0, "names": ["a"]}

    def run(x, config=config):
        return x * config["k"] + len(config["names"])

    return run, [lambda: config.update(k=3.0), lambda: config["names"].append("b"), lambda: config.update(k=5.0)]


def by_keyword_default():
    sizes = [2, 3]

    def run(x, *, sizes=sizes):
        return x.repeat(sizes[0]) * sizes[1]

    return run, [lambda: sizes.append(4), lambda: sizes.__setitem__(0, 1)]


def of_an_inner_function():
    weights = {"w": torch.ones(2)}

    def inner(x, weights=(weights, 2.0)):
        return x * weights[0]["w"] * weights[1]

    return lambda x: inner(x) + 1, [lambda: weights.update(w=torch.full((2,), 4.0)), lambda: weights["w"].mul_(2)]


def what_is_written():
    def run(x, seen=[]):  # noqa: B006
        seen.append(len(seen))
        return x + len(seen)

    return run, [lambda: None, lambda: run.__defaults__[0].clear()]


def by_partial():
    config = {"k": 1.0}

    def scaled(config, x, *, more):
        return x * config["k"] + more["m"] + more["n"]

    more = {"m": 1.0, "n": 2}
    partial = functools.partial(scaled, config, more=more)
    changes = [
        lambda: config.update(k=2.0),
        lambda: more.update(n=4),
        lambda: partial.keywords.update(more={**more, "m": 9.0}),
    ]
    return lambda x: partial(x), changes


def by_a_librarys_closure():
    @functools.singledispatch
    def scale(x):
        return x * 2

    return lambda x: scale(x), [lambda: scale.register(torch.Tensor, lambda x: x * 3)]


def in_a_slot():
    class Holder:
        __slots__ = ("weight",)

    holder = Holder()
    holder.weight = torch.ones(2)
    return lambda x: x * holder.weight, [lambda: setattr(holder, "weight", torch.full((2,), 4.0))]


CASES = [
    in_a_slot,
    by_default,
    by_keyword_default,
    of_an_inner_function,
    what_is_written,
    by_partial,
    by_a_librarys_closure,
]


@pytest.mark.parametrize("make", CASES)
def test_a_hidden_container_is_a_condition(make):
    session = LocalSession()
    ours, changes = make()
    eager, others = make()
    program = ProgramFunction(ours, session.mesh(), lambda: session)
    x = torch.arange(2.0)
    for change, other in zip([lambda: None, *changes], [lambda: None, *others], strict=True):
        change(), other()
        for _ in range(2):
            torch.testing.assert_close(program(x).cpu(), eager(x))
