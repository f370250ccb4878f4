"""Descriptions of the values that a trace found at places, to compare later values with."""

from __future__ import annotations

import collections
import enum
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from torchways.array import Array
from torchways.capture.python_state.places import MISSING, Call, Entry, Place

_PLAIN = (type(None), bool, int, complex, str, bytes, slice, range, torch.dtype, torch.device, torch.layout)
_PLAIN_TYPES = {*_PLAIN, torch.memory_format, type(Ellipsis), type(NotImplemented), type(MISSING), torch.Size, float}
#: Kinds of container whose items are compared one by one; objects of other classes are what they are.
_SEQUENCES = (list, tuple, collections.deque)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, functools.partial, type)


@dataclass(eq=False, slots=True)
class TensorSource:
    """A tensor that a trace found at places: each call binds what is there then.

    Attributes:
        places: all places where it was found; they must have the same tensor at later calls.
        tensor: what is there, as of the last call.
        home: mesh and placements that the trace's program wants it at, if it is used there.
        hooks: what is called with its gradient.
    """

    places: list[Place]
    tensor: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    is_array: bool
    home: Any = None
    hooks: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        return str(self.places[0]) if self.places else f"a tensor of shape {list(self.shape)}"


def memory_of(tensor: torch.Tensor) -> int:
    """Returns what tensors that share their memory have in common; of the host's only the tensor itself does."""
    return id(getattr(tensor, "_storage", tensor) if isinstance(tensor, Array) else tensor)


def source_of(tensor: torch.Tensor) -> TensorSource:
    """Returns a source of a tensor of which no place is known yet."""
    shape, hooks = tuple(tensor.shape), _hooks_of(tensor)
    return TensorSource([], tensor, shape, tensor.dtype, tensor.requires_grad, isinstance(tensor, Array), hooks=hooks)


def _hook_dicts(tensor: torch.Tensor) -> list[dict[Any, Any]]:
    with torch._C.DisableTorchFunctionSubclass():
        found: list[Any] = [tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)]
    return [hooks for hooks in found if hooks is not None]


def _hooks_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(hook for hooks in _hook_dicts(tensor) for hook in hooks.values())


class Token:
    """Describes the value at a place.

    Attributes:
        is_counted: dictionaries, identities and lengths tell of all changes; if not, it is compared at each call.
    """

    __slots__ = ()

    @property
    def is_counted(self) -> bool:
        return True

    def change(self, place: Place, value: Any, call: Call) -> tuple[Place, str] | None:
        """Returns where, and how, what is there now differs; None where it does not."""
        raise NotImplementedError

    def dicts(self, value: Any) -> Iterator[dict[Any, Any]]:
        """Returns the dictionaries in the value of which one changes whenever what was compared does."""
        return iter(())

    def lists(self, value: Any) -> Iterator[Any]:
        """Returns the containers in the value that are no dictionaries."""
        return iter(())


@dataclass(frozen=True, slots=True, eq=False)
class Exactly(Token):
    """A plain value."""

    value: Any

    def change(self, place: Place, value: Any, call: Call) -> tuple[Place, str] | None:
        if value is self.value or same_plain(value, self.value):
            return None
        return place, f"is {short(value)}, was {short(self.value)}"


@dataclass(frozen=True, slots=True, eq=False)
class Same(Token):
    """An object: it must be the same one."""

    value: Any

    def change(self, place: Place, value: Any, call: Call) -> tuple[Place, str] | None:
        if value is self.value:
            return None
        if isinstance(self.value, types.MethodType) and isinstance(value, types.MethodType):
            if value.__func__ is self.value.__func__ and value.__self__ is self.value.__self__:
                return None
        elif isinstance(self.value, types.BuiltinMethodType) and value == self.value:
            return None
        return place, f"is {short(value)}, was {short(self.value)}"


@dataclass(frozen=True, slots=True, eq=False)
class SameElements(Token):
    """A numpy array: it must be the same one, with the same elements, which may have been read as numbers."""

    value: Any
    elements: bytes = field(repr=False)

    @property
    def is_counted(self) -> bool:
        return False

    def change(self, place: Place, value: Any, call: Call) -> tuple[Place, str] | None:
        if value is not self.value:
            return place, "is another array than before"
        return None if value.tobytes() == self.elements else (place, "has other elements than before")


@dataclass(frozen=True, slots=True, eq=False)
class SameAs(Token):
    """A number that is that of another place, as an object's attribute may be that of its class."""

    other: Place

    def change(self, place: Place, value: Any, call: Call) -> tuple[Place, str] | None:
        if same_plain(value, found := self.other.get(call)):
            return None
        return place, f"is {short(value)}, and {self.other} is {short(found)}"


@dataclass(frozen=True, slots=True, eq=False)
class OfType(Token):
    """Anything of a type; all else that matters of it is compared elsewhere."""

    type: type

    def change(self, place: Place, value: Any, call: Call) -> tuple[Place, str] | None:
        if type(value) is self.type:
            return None
        return place, f"is {short(value)}, was a {self.type.__name__}"


@dataclass(frozen=True, slots=True, eq=False)
class OneOf(Token):
    """A tensor: one of this shape and dtype must be there."""

    source: TensorSource

    def change(self, place: Place, value: Any, call: Call) -> tuple[Place, str] | None:
        source, now = self.source, value
        if not isinstance(now, torch.Tensor):
            return place, f"is {short(now)}, was a tensor of shape {list(source.shape)}"
        for what, is_now, was in (
            ("shape", tuple(now.shape), source.shape),
            ("dtype", now.dtype, source.dtype),
            ("requires_grad", now.requires_grad, source.requires_grad),
        ):
            if is_now != was:
                text = [list(item) if isinstance(item, tuple) else item for item in (is_now, was)]
                return place, f"has {what} {text[0]}, had {text[1]}"
        if isinstance(now, Array) != source.is_array:
            return place, "is on a slice, was on the host" if isinstance(now, Array) else "is on the host, was an array"
        if (hooks := _hooks_of(now)) != source.hooks:
            return place, f"has {len(hooks)} hooks of its gradient, had {len(source.hooks)}, or others"
        return None

    def dicts(self, value: Any) -> Iterator[dict[Any, Any]]:
        if isinstance(value, torch.Tensor):
            yield from _hook_dicts(value)


@dataclass(frozen=True, slots=True, eq=False)
class Contents(Token):
    """A container: type, keys (in their order, if it is one of meaning) and items are compared."""

    type: type
    keys: tuple[Any, ...]
    items: tuple[Token, ...] = field(repr=False)
    is_ordered: bool = True

    @property
    def is_counted(self) -> bool:
        return all(item.is_counted for item in self.items)

    def change(self, place: Place, value: Any, call: Call) -> tuple[Place, str] | None:
        if type(value) is not self.type:
            return place, f"is {short(value)}, was a {self.type.__name__}"
        keys = keys_of(value)
        if keys != self.keys and (self.is_ordered or set(keys) != set(self.keys)):
            return place, _keys_change(keys, self.keys, value)
        # The items of a set are its keys.
        for key, item, token in zip(self.keys, self._items_of(value), self.items, strict=False):
            found = token.change(Entry(place, key_of(key)), item, call)
            if found is not None:
                return found
        return None

    def dicts(self, value: Any) -> Iterator[dict[Any, Any]]:
        if isinstance(value, dict):
            yield value
        elif isinstance(value, types.SimpleNamespace):
            yield vars(value)
        for item, token in zip(self._items_of(value), self.items, strict=False):
            yield from token.dicts(item)

    def lists(self, value: Any) -> Iterator[Any]:
        if not isinstance(value, (dict, tuple, types.SimpleNamespace)):
            yield value
        for item, token in zip(self._items_of(value), self.items, strict=False):
            yield from token.lists(item)

    def _items_of(self, value: Any) -> list[Any]:
        """Returns the items in the order of `keys`."""
        if isinstance(value, dict):
            return [dict.get(value, key_of(key)) for key in self.keys]
        return items_of(value)


def is_plain(value: Any) -> bool:
    """Whether a value is compared with ==: it cannot change, and holds nothing that could."""
    if type(value) in _PLAIN_TYPES or isinstance(value, enum.Enum):
        return True
    if isinstance(value, (tuple, frozenset)) and type(value) in (tuple, frozenset):
        return all(map(is_plain, value))
    return isinstance(value, (int, float, str, bytes)) and not isinstance(value, torch.Tensor)


def is_container(value: Any) -> bool:
    """Whether what a value holds is compared item by item."""
    return isinstance(value, (dict, set, types.SimpleNamespace, *_SEQUENCES))


def is_function(value: Any) -> bool:
    """Whether a value is a function, a method, or a class."""
    return isinstance(value, (*_FUNCTIONS, types.MethodType))


def same_plain(now: Any, was: Any) -> bool:
    """Whether two plain values are one to a program."""
    if type(now) is not type(was):
        return False
    if isinstance(was, float):
        return repr(now) == repr(was)
    if isinstance(was, tuple):
        return len(now) == len(was) and all(map(same_plain, now, was))
    try:
        return bool(now == was)
    except Exception:  # a comparison of somebody's
        return False


def keys_of(container: Any) -> tuple[Any, ...]:
    """Returns the keys of a container's items; tensors by identity."""
    if isinstance(container, dict):
        return tuple(_Identity(key) if isinstance(key, torch.Tensor) else key for key in container)
    if isinstance(container, types.SimpleNamespace):
        return tuple(vars(container))
    if isinstance(container, (set, frozenset)):
        return tuple(sorted(map(repr, container)))
    return tuple(range(len(container)))


def items_of(container: Any) -> list[Any]:
    """Returns a container's items, in the order of `keys_of`."""
    if isinstance(container, dict):
        return list(dict.values(container))
    if isinstance(container, types.SimpleNamespace):
        return list(vars(container).values())
    return [] if isinstance(container, (set, frozenset)) else list(container)


class _Identity:
    """A tensor as a key of a dict."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)

    def __repr__(self) -> str:
        return f"<{type(self.tensor).__name__}>"


def key_of(key: Any) -> Any:
    """Returns the key itself, of an entry of `keys_of`."""
    return key.tensor if isinstance(key, _Identity) else key


def _keys_change(now: tuple[Any, ...], was: tuple[Any, ...], container: Any) -> str:
    if not isinstance(container, (dict, types.SimpleNamespace)):
        return f"has {len(now)} items, had {len(was)}"
    added, removed = [key for key in now if key not in was], [key for key in was if key not in now]
    texts = [f"has {', '.join(map(short, added))} now"] if added else []
    texts += [f"has no {', '.join(map(short, removed))} any more"] if removed else []
    return " and ".join(texts) or "has its items in another order"


def short(value: Any) -> str:
    """Returns a value for a message."""
    if value is MISSING:
        return "missing"
    if isinstance(value, torch.nn.Module):
        return f"a {type(value).__name__}"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    if is_container(value) and not isinstance(value, tuple):
        return f"a {type(value).__name__} of {len(keys_of(value))} items"
    try:
        text = repr(value)
    except Exception:  # a class of somebody's
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
