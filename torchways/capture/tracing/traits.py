"""Traits of operators, from their schemas: whether they make views or write, and which pure form they have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Traits:
    """What the recorder asks of an operator."""

    func: Any
    is_view: bool
    is_mutable: bool
    #: The operator that returns what this one writes, of the same arguments.
    functional: Any
    has_dim: bool
    returns_tensors: bool
    returns_something: bool


@cache
def traits_of(func: Any) -> Traits:
    """Returns the traits of an operator."""
    schema = func._schema
    returns = [str(item.type) for item in schema.returns]
    return Traits(
        func,
        is_view=func.is_view and not is_composite(func),  # which return a view or a copy, as the case may be
        is_mutable=schema.is_mutable,
        functional=_functional(func) if schema.is_mutable else None,
        has_dim=any(argument.name == "dim" for argument in schema.arguments),
        returns_tensors=any("Tensor" in text for text in returns),
        returns_something=bool(returns),
    )


@cache
def is_composite(func: Any) -> bool:
    """Whether PyTorch defines an operator by others, for all devices."""
    return bool(func._can_decompose())


def _functional(func: Any) -> Any:
    """Returns the operator that returns what `func` writes, of the same arguments; None: there is none."""
    schema = func._schema
    namespace, name = schema.name.split("::")
    first = schema.arguments[0] if schema.arguments else None
    writes = [item for item in schema.arguments if item.alias_info is not None and item.alias_info.is_write]
    is_in_place = name.endswith("_") and not name.endswith("__") and name != "resize_" and writes == [first]
    if not is_in_place or str(schema.arguments[0].type) != "Tensor":
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    wanted = _signature(schema)
    overloads = [] if packet is None else sorted(packet.overloads(), key=lambda item: item != func._overloadname)
    for other in (getattr(packet, overload) for overload in overloads):
        if _signature(other._schema) == wanted and not other._schema.is_mutable and len(other._schema.returns) == 1:
            return other
    return None


def _signature(schema: Any) -> list[tuple[Any, ...]]:
    return [(item.name, str(item.type), item.has_default_value(), item.default_value) for item in schema.arguments]


def returned(func: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """Returns the result of an operator; one that writes to an argument returns that very argument."""
    returns = func._schema.returns
    if len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write:
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                return value
        return kwargs.get("out", result)
    return result
