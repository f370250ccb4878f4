"""Attributes of classes that a program reads and writes, by whatever way it comes to the class; no processes."""

import pytest
import torch

from tests.local_session import LocalSession
from torchways.controller.program import ProgramFunction

X = torch.ones(2)


def make_classes():
    class Base:
        scale = 1.0
        table = {"a": 1.0}  # noqa: RUF012
        calls = 0

        def by_type(self, x):
            return x * type(self).scale

        def by_class(self, x):
            return x * self.__class__.table["a"] + self.scale

        @classmethod
        def of_class(cls, x):
            return x * cls.scale

        def by_class_method(self, x):
            return self.of_class(x) + self.scale

        def counts(self, x):
            type(self).calls += 1
            return x * self.calls

        def counts_for_all(self, x):
            Base.calls += 1
            return x * type(self).calls

    class Derived(Base):
        pass

    return Base, Derived


@pytest.mark.parametrize("name", ["by_type", "by_class", "of_class", "by_class_method", "counts", "counts_for_all"])
@pytest.mark.parametrize("of_instance", [True, False])
def test_each_call_reads_what_the_class_has(name, of_instance):
    session = LocalSession()
    results = []
    for is_ours in (True, False):
        base, derived = make_classes()
        owner = derived() if of_instance or name != "of_class" else derived
        program = getattr(owner, name)
        if is_ours:
            program = ProgramFunction(program, session.mesh(), lambda: session)
        found = [program(X).tolist() for _ in range(3)]
        for value in (2.0, 3.0, 4.0):
            base.scale = value
            found += [program(X).tolist()]
        base.table["a"] = 5.0
        found += [program(X).tolist()]
        derived.scale, derived.table = 6.0, {"a": 6.0}
        found += [program(X).tolist(), program(X).tolist()]
        if not isinstance(owner, type):
            owner.scale = 7.0
            found += [program(X).tolist()]
            del owner.scale
        del derived.scale
        found += [program(X).tolist(), base.calls, derived.calls, sorted(set(vars(derived)) - set(vars(base)))]
        results.append(found)
    assert results[0] == results[1]


def test_arguments_of_a_method_that_ignores_its_object_are_its_own():
    class Owner:
        def second(self, first, second=None):
            return second if second is not None else first

    session = LocalSession()
    program = ProgramFunction(Owner().second, session.mesh(), lambda: session)
    assert program(X).tolist() == [1, 1]
    assert program(X, X * 2).tolist() == [2, 2]
