"""Python numbers that a trace computes with and that may be others at the next call.

A `HostFloat` or `HostInt` stands in a trace for a number that is read anew for each run: a hyperparameter of an
optimizer, a number that changed from one call to the next. It computes as the number does, and what it computes is
kept as steps, which each call takes again on the host, in Python's own arithmetic. A result goes into the graph as a
scalar input. Where Python's control flow or an operator needs the number itself, the trace gets it, and that it is
the same becomes a condition of the trace: nothing that reads it can get a stale one.

PyTorch knows these numbers as its own `SymFloat` and `SymInt`, over nodes of ours.
"""

from __future__ import annotations

import builtins
import math
import operator
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchways.capture.python_state.places import Call, Place
from torchways.capture.source import user_line

Number = int | float | bool


@dataclass(frozen=True, slots=True)
class Step:
    """One number: read at a place, a constant, or computed of earlier steps."""

    function: Callable[..., Any] | None
    operands: tuple[int, ...] = ()
    place: Place | None = None
    constant: Any = None


@dataclass(frozen=True, slots=True)
class NumberCondition:
    """The condition that a number has the value that the trace used."""

    step: int
    value: Number
    line: str


@dataclass(slots=True)
class HostNumbers:
    """The numbers of one trace: how each is computed, and which of them must stay the same."""

    steps: list[Step] = field(default_factory=list)
    conditions: list[NumberCondition] = field(default_factory=list)
    _hints: list[Any] = field(default_factory=list)
    _of_place: dict[Any, int] = field(default_factory=dict)

    def at_place(self, place: Place, value: Number) -> Any:
        """Returns the number that stands for what is at a place."""
        if place.key not in self._of_place:
            self._of_place[place.key] = self._add(Step(None, place=place), value)
        return wrap(Node(self, self._of_place[place.key]))

    def constant(self, value: Number) -> Node:
        """Returns a number that is always the same."""
        return Node(self, self._add(Step(None, constant=value), value))

    def apply(self, function: Callable[..., Any], *operands: Node) -> Node:
        """Returns the result of a function of numbers, as a number."""
        hint = function(*(self._hints[node.step] for node in operands))
        return Node(self, self._add(Step(function, tuple(node.step for node in operands)), hint))

    def hint(self, step: int) -> Any:
        """Returns the number as it is in the call that is traced."""
        return self._hints[step]

    def require(self, step: int) -> Any:
        """Returns the number itself: from here on the trace holds only where it is the same."""
        value = self._hints[step]
        if all(condition.step != step for condition in self.conditions):
            self.conditions.append(NumberCondition(step, value, user_line()))
        return value

    def _add(self, step: Step, hint: Any) -> int:
        self.steps.append(step)
        self._hints.append(hint)
        return len(self.steps) - 1

    def evaluate(self, call: Call) -> list[Any]:
        """Returns all numbers for a call.

        Raises:
            ArithmeticError, TypeError, ValueError: what is at a place now does not allow the computation.
        """
        values: list[Any] = []
        for step in self.steps:
            if step.place is not None:
                values.append(step.place.get(call))
            elif step.function is None:
                values.append(step.constant)
            else:
                values.append(step.function(*(values[index] for index in step.operands)))
        return values

    def changed(self, values: Sequence[Any]) -> NumberCondition | None:
        """Returns the first condition that numbers do not meet."""
        for condition in self.conditions:
            if not same_number(values[condition.step], condition.value):
                return condition
        return None

    def places_of(self, step: int) -> list[Place]:
        """Returns the places that a number is computed from."""
        found = self.steps[step]
        if found.place is not None:
            return [found.place]
        return [place for operand in found.operands for place in self.places_of(operand)]


def same_number(now: Any, was: Any) -> bool:
    """Whether two numbers are one to a program: of one type and value, NaN like NaN, 0.0 unlike -0.0."""
    if type(now) is not type(was):
        return False
    return struct.pack("d", now) == struct.pack("d", was) if isinstance(was, float) else bool(now == was)


def number_bytes(value: Number, dtype: torch.dtype) -> bytes:
    """Returns a number as an element of a tensor."""
    return torch.tensor(value, dtype=dtype).reshape(1).view(torch.uint8).numpy().tobytes()


class Node:
    """What PyTorch's `SymFloat` and `SymInt` hold: the protocol of its symbolic nodes, in the parts that are asked."""

    __slots__ = ("numbers", "step")

    def __init__(self, numbers: HostNumbers, step: int) -> None:
        self.numbers = numbers
        self.step = step

    @property
    def hint(self) -> Any:
        return self.numbers.hint(self.step)

    def is_int(self) -> bool:
        return type(self.hint) is int

    def is_float(self) -> bool:
        return isinstance(self.hint, float)

    def is_bool(self) -> bool:
        return isinstance(self.hint, bool)

    def is_symbolic(self) -> bool:
        return True

    def is_constant(self) -> bool:
        return False

    def is_nested_int(self) -> bool:
        return False

    def has_hint(self) -> bool:
        return True

    def nested_int(self) -> None:
        return None

    def maybe_as_int(self) -> None:
        return None

    def maybe_as_float(self) -> None:
        return None

    def maybe_as_bool(self) -> None:
        return None

    def constant_int(self) -> None:
        return None

    def constant_bool(self) -> None:
        return None

    def clone(self) -> Node:
        return self

    def wrap_int(self, value: int) -> Node:
        return self.numbers.constant(value)

    wrap_float = wrap_int
    wrap_bool = wrap_int

    def require(self) -> Any:
        return self.numbers.require(self.step)

    def guard_int(self, file: builtins.str = "", line: int = 0) -> int:
        return int(self.require())

    def guard_float(self, file: builtins.str = "", line: int = 0) -> float:
        return float(self.require())

    def guard_bool(self, file: builtins.str = "", line: int = 0) -> bool:
        return bool(self.require())

    def guard_size_oblivious(self, file: builtins.str = "", line: int = 0) -> bool:
        return bool(self.require())

    def guard_or_false(self, file: builtins.str = "", line: int = 0) -> bool:
        return bool(self.require())

    guard_or_true = guard_or_false

    def expect_true(self, file: builtins.str = "", line: int = 0) -> bool:
        return bool(self.require())

    def expect_size(self, file: builtins.str = "", line: int = 0) -> bool:
        return bool(self.require())

    def bool_(self) -> bool:
        return bool(self.require())

    def int_(self) -> int:
        return int(self.require())

    def str(self) -> builtins.str:
        return str(self.hint)

    _graph_repr = str

    def __getattr__(self, name: builtins.str) -> Any:
        """The arithmetic of nodes, which PyTorch's own C++ code does where it computes with sizes and indices."""
        function = _NODE_ARITHMETIC.get(name)
        if function is None:
            raise AttributeError(name)
        return lambda *others: self.numbers.apply(function, self, *others)

    def __repr__(self) -> builtins.str:
        return f"number {self.hint}"


_NODE_ARITHMETIC: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "mod", "pow", "truediv", "floordiv", "neg")},
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")},
    **{"int_floordiv": operator.floordiv, "int_truediv": operator.truediv, "float_truediv": operator.truediv},
    **{"float_pow": operator.pow, "pow_by_natural": operator.pow, "sym_not": operator.not_, "sym_float": float},
    **{"sym_and": operator.and_, "sym_or": operator.or_, "sym_ite": lambda test, one, other: one if test else other},
    **{"sym_min": min, "sym_max": max, "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc, "abs": abs},
}


def node_of(value: Any) -> Node | None:
    """Returns the node of a number that is read anew for each run; None for all other values."""
    node = getattr(value, "node", None) if isinstance(value, (torch.SymFloat, torch.SymInt, torch.SymBool)) else None
    return node if isinstance(node, Node) else None


def wrap(node: Node) -> Any:
    """Returns the number that a trace computes with."""
    if node.is_bool():
        return torch.SymBool(node)
    return (HostInt if node.is_int() else HostFloat)(node)


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def forward(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float, torch.SymInt, torch.SymFloat)):
            return NotImplemented
        if isinstance(other, (torch.SymInt, torch.SymFloat)) and node_of(other) is None:
            return NotImplemented
        second = node_of(other) or self.node.numbers.constant(other)
        return wrap(self.node.numbers.apply(function, self.node, second))

    return forward


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def backward(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return wrap(self.node.numbers.apply(function, self.node.numbers.constant(other), self.node))

    return backward


def _unary(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(self: Any, *args: Any) -> Any:
        numbers = self.node.numbers
        return wrap(numbers.apply(function, self.node, *map(numbers.constant, args)))

    return apply


class _Arithmetic:
    """The operations of a number. All others ask for the number itself."""

    __slots__ = ()
    node: Node

    def __float__(self) -> float:
        return float(self.node.require())

    def __int__(self) -> int:
        return int(self.node.require())

    def __index__(self) -> int:
        return operator.index(self.node.require())

    def __bool__(self) -> bool:
        return bool(_NOT_ZERO(self))

    def __hash__(self) -> int:
        return hash(self.node.require())

    def __complex__(self) -> complex:
        return complex(self.node.require())

    def __format__(self, spec: str) -> str:
        return format(self.node.require(), spec)

    def __str__(self) -> str:
        return str(self.node.require())

    def __repr__(self) -> str:
        return repr(self.node.require())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.node.require().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.node.require(), name)  # is_integer, bit_length, ...


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _function = getattr(operator, _name)
    setattr(_Arithmetic, f"__{_name}__", _binary(_function))
    setattr(_Arithmetic, f"__r{_name}__", _reflected(_function))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Arithmetic, f"__{_name}__", _binary(getattr(operator, _name)))
for _name in ("neg", "pos", "abs"):
    setattr(_Arithmetic, f"__{_name}__", _unary(getattr(operator, _name)))
for _name, _function in {"trunc": math.trunc, "floor": math.floor, "ceil": math.ceil, "round": round}.items():
    setattr(_Arithmetic, f"__{_name}__", _unary(_function))  # type: ignore[arg-type]
#: What torch.sym_sqrt and its like call.
for _name in ("sqrt", "exp", "log", "log2", "sin", "cos", "tan"):
    setattr(_Arithmetic, f"__sym_{_name}__", _unary(getattr(math, _name)))
_NOT_ZERO = _unary(bool)


class HostFloat(_Arithmetic, torch.SymFloat):
    """A float that is read anew for each run. `isinstance(x, float)` holds, as for the number that it stands for."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return float


class HostInt(_Arithmetic, torch.SymInt):
    """An int that is read anew for each run. `isinstance(x, int)` holds, as for the number that it stands for."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return int
