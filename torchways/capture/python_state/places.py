"""Places of Python's state: where a value is kept, how to read it again at a later call, and how to write it.

A place begins at a fixed object (a module, an optimizer, the cell of a closure) or at an argument of the call, which
may be another object each time, and goes on by attributes and items.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

#: Stands for the value of a place that has none.
MISSING = type("Missing", (), {"__repr__": lambda self: "missing"})()

#: Dictionaries of a module whose items are read as its attributes.
_MODULE_DICTS = ("_parameters", "_buffers", "_modules")


class Call(Protocol):
    """A call, as far as places need to know it."""

    @property
    def leaves(self) -> Sequence[Any]:
        """Its arguments, flattened."""


class Place(Protocol):
    """Where a value is kept."""

    @property
    def key(self) -> Hashable:
        """Equal for the same place, in all traces of a function."""

    @property
    def is_fixed(self) -> bool:
        """Whether it does not begin at an argument of the call."""

    def get(self, call: Call) -> Any:
        """Returns what is there now, or `MISSING`."""

    def set(self, call: Call, value: Any) -> None:
        """Puts a value there; `MISSING` removes what is there."""

    def __str__(self) -> str:
        """Its name, for people."""


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """An object that is the same in each call: where other places begin."""

    value: Any
    name: str

    @property
    def key(self) -> Hashable:
        return id(self.value)

    @property
    def is_fixed(self) -> bool:
        return True

    def get(self, call: Call) -> Any:
        return self.value

    def set(self, call: Call, value: Any) -> None:
        raise TypeError(f"{self.name} is no variable")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, eq=False)
class Argument:
    """A leaf of the call's flattened arguments."""

    position: int
    name: str

    @property
    def key(self) -> Hashable:
        return ("argument", self.position)

    @property
    def is_fixed(self) -> bool:
        return False

    def get(self, call: Call) -> Any:
        return call.leaves[self.position]

    def set(self, call: Call, value: Any) -> None:
        raise TypeError(f"argument {self.name} is no variable of the caller")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, eq=False)
class Attribute:
    """An attribute of an object, as `getattr` finds it."""

    parent: Place
    name: str

    @property
    def key(self) -> Hashable:
        return (self.parent.key, "attribute", self.name)

    @property
    def is_fixed(self) -> bool:
        return self.parent.is_fixed

    def get(self, call: Call) -> Any:
        owner = self.parent.get(call)
        return owner if owner is MISSING else getattr(owner, self.name, MISSING)

    def set(self, call: Call, value: Any) -> None:
        owner = self.parent.get(call)
        if isinstance(owner, torch.nn.Module):
            for name in _MODULE_DICTS:
                if self.name in owner.__dict__.get(name, ()):
                    Entry(Attribute(self.parent, name), self.name).set(call, value)
                    return
        if value is MISSING:
            object.__delattr__(owner, self.name)
        elif isinstance(owner, type):
            type.__setattr__(owner, self.name, value)
        else:
            object.__setattr__(owner, self.name, value)

    def __str__(self) -> str:
        return f"{self.parent}.{self.name}"


@dataclass(frozen=True, slots=True, eq=False)
class OwnAttribute:
    """An attribute that a class may have itself, beside those of its bases."""

    owner: type
    name: str

    @property
    def key(self) -> Hashable:
        return (id(self.owner), "attribute", self.name)

    @property
    def is_fixed(self) -> bool:
        return True

    def get(self, call: Call) -> Any:
        return vars(self.owner).get(self.name, MISSING)

    def set(self, call: Call, value: Any) -> None:
        if value is MISSING:
            type.__delattr__(self.owner, self.name)
        else:
            type.__setattr__(self.owner, self.name, value)

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """An item of a dict or list."""

    parent: Place
    item: Any

    @property
    def key(self) -> Hashable:
        item = self.item
        return (self.parent.key, "item", id(item) if isinstance(item, torch.Tensor) else item)

    @property
    def is_fixed(self) -> bool:
        return self.parent.is_fixed

    def get(self, call: Call) -> Any:
        container = self.parent.get(call)
        if isinstance(container, dict):  # dict's own method: a defaultdict makes no entry
            return dict.get(container, self.item, MISSING)
        try:
            return container[self.item]
        except (LookupError, TypeError):
            return MISSING

    def set(self, call: Call, value: Any) -> None:
        container = self.parent.get(call)
        if not isinstance(container, dict):
            container[self.item] = value
        elif value is MISSING:
            dict_class(container).pop(container, self.item, None)
        else:
            dict_class(container).__setitem__(container, self.item, value)

    def __str__(self) -> str:
        if isinstance(self.parent, Attribute) and self.parent.name in (*_MODULE_DICTS, "__dict__"):
            return f"{self.parent.parent}.{self.item}"
        item = f"<{type(self.item).__name__}>" if isinstance(self.item, torch.Tensor) else repr(self.item)
        return f"{self.parent}[{item}]"


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """A variable of a closure."""

    cell: Any
    name: str

    @property
    def key(self) -> Hashable:
        return ("cell", id(self.cell))

    @property
    def is_fixed(self) -> bool:
        return True

    def get(self, call: Call) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # nothing was assigned to it yet
            return MISSING

    def set(self, call: Call, value: Any) -> None:
        if value is MISSING:
            del self.cell.cell_contents
        else:
            self.cell.cell_contents = value

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, eq=False)
class Variable:
    """A global variable of a module."""

    namespace: dict[str, Any] = field(repr=False)
    name: str

    @property
    def key(self) -> Hashable:
        return ("global", id(self.namespace), self.name)

    @property
    def is_fixed(self) -> bool:
        return True

    def get(self, call: Call) -> Any:
        return self.namespace.get(self.name, MISSING)

    def set(self, call: Call, value: Any) -> None:
        if value is MISSING:
            self.namespace.pop(self.name, None)
        else:
            self.namespace[self.name] = value

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, eq=False)
class Gradient:
    """The gradient of a tensor."""

    parent: Place

    @property
    def key(self) -> Hashable:
        return (self.parent.key, "grad")

    @property
    def is_fixed(self) -> bool:
        return self.parent.is_fixed

    def get(self, call: Call) -> Any:
        owner = self.parent.get(call)
        return owner.grad if isinstance(owner, torch.Tensor) else MISSING

    def set(self, call: Call, value: Any) -> None:
        self.parent.get(call).grad = None if value is MISSING else value

    def __str__(self) -> str:
        return f"{self.parent}.grad"


def dict_class(container: dict[Any, Any]) -> Any:
    """Returns the class whose methods change a dict and nothing else, whatever a subclass of it does besides."""
    return OrderedDict if isinstance(container, OrderedDict) else dict


@functools.cache
def attribute_writes_are_counted() -> bool:
    """Whether the version of an object's `__dict__` rises when an attribute is written.

    Python 3.13 keeps attributes beside the dict, and does not tell watchers of dicts, which count on 3.12 and later, of
    writes to these (seen with 3.13.0 and torch 2.9.1).
    """
    instance = type("_Probe", (), {})()
    instance.attribute = 1
    version = torch._C._dynamo.guards.dict_version(vars(instance))
    instance.attribute = 2
    return bool(torch._C._dynamo.guards.dict_version(vars(instance)) != version)


def dicts_behind(place: Place, call: Call) -> list[dict[Any, Any]] | None:
    """Returns dictionaries of which one changes whenever the place does; None: there are none such."""
    if isinstance(place, Attribute):
        if not attribute_writes_are_counted():
            return None
        owner = place.parent.get(call)
        try:
            attributes = vars(owner)
        except TypeError:
            return None
        if not isinstance(attributes, dict):
            return None
        found: list[dict[Any, Any]] = [attributes]
        if isinstance(owner, torch.nn.Module):
            parts = [attributes[name] for name in _MODULE_DICTS if name in attributes]
            is_missing = place.get(call) is MISSING  # it may come to be in any of them
            found.extend(part for part in parts if is_missing or place.name in part)
        return found
    if isinstance(place, Entry):
        container = place.parent.get(call)
        above = dicts_behind(place.parent, call)
        if isinstance(container, dict) and above is not None:
            return [*above, container]
    return None
