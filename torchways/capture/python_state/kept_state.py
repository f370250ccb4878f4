"""Copies of Python's state, made when a trace reaches it.

The writes of the trace are found by comparison with the copies, and undone. It does not matter how they were made.
"""

from __future__ import annotations

import collections
import random
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchways.capture.python_state.places import MISSING, Attribute, Call, Entry, Place, dict_class


@dataclass(frozen=True, slots=True)
class Write:
    """A place that the trace wrote to, and what it left there.

    Attributes:
        kind: "set": the value is there now, or nothing if it is `MISSING`; "extend": these items were added;
            "replace": these are the items now.
    """

    kind: str
    place: Place
    value: Any


@dataclass(slots=True)
class _Kept:
    """A container as it was when it was reached."""

    place: Place
    container: Any
    content: Any


@dataclass(slots=True)
class _Hidden:
    """What keeps its state in C, as it was when it was reached."""

    place: Place
    value: Any
    state: Any

    def is_written(self) -> bool:
        return not _is_same_state(_hidden_state(self.value), self.state)


class KeptState:
    """Copies of the containers that one trace reached, and the values of other places."""

    def __init__(self) -> None:
        #: By the container's identity.
        self._kept: dict[int, _Kept] = {}
        #: Places that are no part of a container, by their keys.
        self._singles: dict[Any, tuple[Place, Any]] = {}
        #: What keeps its state in C, by identity.
        self._hidden: dict[int, _Hidden] = {}

    def __contains__(self, container: Any) -> bool:
        return id(container) in self._kept

    def keep(self, place: Place, container: Any) -> None:
        """Copies a container that was reached at a place."""
        if isinstance(container, types.SimpleNamespace):
            self._kept[id(container)] = _Kept(Attribute(place, "__dict__"), vars(container), dict(vars(container)))
        else:
            copy: Any = dict(container) if isinstance(container, dict) else _copy_of(container)
            self._kept[id(container)] = _Kept(place, container, copy)

    def keep_single(self, place: Place, value: Any) -> None:
        """Keeps the value of a place that is no part of a container."""
        self._singles.setdefault(place.key, (place, value))

    def keep_hidden(self, place: Place, value: Any) -> Any:
        """Copies the state, which it keeps in C, of a value that was reached at a place; returns it."""
        if id(value) not in self._hidden:
            self._hidden[id(value)] = _Hidden(place, value, _hidden_state(value))
        return self._hidden[id(value)].state

    def hidden_writes(self) -> list[tuple[Place, Any]]:
        """Returns the values whose state in C is another now, with their places."""
        return [(item.place, item.value) for item in self._hidden.values() if item.is_written()]

    def set_before(self, attributes: dict[str, Any], name: str, value: Any) -> None:
        """Changes an object's attribute in what was kept, so that it stays."""
        if (kept := self._kept.get(id(attributes))) is not None:
            kept.content[name] = value

    def was_written(self, owner: Any, name: str) -> bool:
        """Whether the trace itself put an attribute of an object there."""
        attributes = getattr(owner, "__dict__", None)
        if not isinstance(attributes, dict):
            return False
        dicts = [attributes]
        if isinstance(owner, torch.nn.Module):
            dicts += [attributes[part] for part in ("_parameters", "_buffers", "_modules") if part in attributes]
        for found in dicts:
            kept = self._kept.get(id(found))
            if kept is not None and (name in found or name in kept.content):
                return found.get(name, MISSING) is not kept.content.get(name, MISSING)
        return False

    def writes(self, call: Call, stands_in: Callable[[Place, Any], bool]) -> Iterator[Write]:
        """Returns what differs from what was there when it was reached.

        Args:
            call: the call that was traced.
            stands_in: whether a value at a place is one that the trace put there in place of its own.
        """
        # What was reached later is inside what was reached before, and written to before that has another there.
        for kept in reversed(list(self._kept.values())):
            yield from _writes_to(kept, stands_in)
        for place, before in self._singles.values():
            now = place.get(call)
            if now is not before and not stands_in(place, now) and not _is_same_method(now, before):
                yield Write("set", place, now)

    def put_back(self, call: Call) -> None:
        """Restores everything as it was when it was reached."""
        for kept in self._kept.values():
            container, before = kept.container, kept.content
            if isinstance(container, dict):
                if not _same_items(container, before):
                    dict_class(container).clear(container)
                    for key, value in before.items():
                        dict_class(container).__setitem__(container, key, value)
            elif isinstance(container, set):
                if container != before:
                    container.clear()
                    container.update(before)
            elif not (len(container) == len(before) and all(map(_is, container, before))):
                container.clear()
                container.extend(before)
        for place, before in self._singles.values():
            now = place.get(call)
            if now is not before and not _is_same_method(now, before):
                place.set(call, before)
        for item in self._hidden.values():
            if item.is_written():
                _set_hidden_state(item.value, item.state)


def _writes_to(kept: _Kept, stands_in: Callable[[Place, Any], bool]) -> Iterator[Write]:
    container, before = kept.container, kept.content
    if isinstance(container, dict):
        for key in [*before, *(key for key in container if key not in before)]:
            now, was = dict.get(container, key, MISSING), before.get(key, MISSING)
            place = Entry(kept.place, key)
            if now is not was and not stands_in(place, now):
                yield Write("set", place, now)
    elif isinstance(container, (list, collections.deque)):
        items = list(container)
        if len(items) >= len(before) and all(
            now is was or stands_in(Entry(kept.place, index), now)
            for index, (now, was) in enumerate(zip(items, before, strict=False))
        ):
            if len(items) > len(before):
                yield Write("extend", kept.place, items[len(before) :])
        else:
            yield Write("replace", kept.place, items)
    elif container != before:
        yield Write("replace", kept.place, set(container))


def has_hidden_state(value: Any) -> bool:
    """Whether a value keeps its state in C, and can tell it: a numpy array, or a generator of random numbers."""
    if isinstance(value, np.ndarray):
        return not value.dtype.hasobject
    return isinstance(value, (random.Random, np.random.Generator, np.random.RandomState))


def _hidden_state(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    return value.bit_generator.state if isinstance(value, np.random.Generator) else value.get_state(legacy=False)


def _set_hidden_state(value: Any, state: Any) -> None:
    if isinstance(value, np.ndarray):
        value[...] = np.frombuffer(state, value.dtype).reshape(value.shape)
    elif isinstance(value, random.Random):
        value.setstate(state)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    else:
        value.set_state(state)


def _is_same_state(now: Any, before: Any) -> bool:
    if isinstance(now, dict):
        return all(_is_same_state(item, before[key]) for key, item in now.items())
    return np.array_equal(now, before) if isinstance(now, np.ndarray) else bool(now == before)


def _copy_of(container: Any) -> Any:
    return set(container) if isinstance(container, (set, frozenset)) else list(container)


def _same_items(container: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return len(container) == len(before) and all(
        key in before and before[key] is value for key, value in dict.items(container)
    )


def _is(one: Any, other: Any) -> bool:
    return one is other


def _is_same_method(now: Any, before: Any) -> bool:
    return (
        isinstance(now, types.MethodType)
        and isinstance(before, types.MethodType)
        and now.__func__ is before.__func__
        and now.__self__ is before.__self__
    )
