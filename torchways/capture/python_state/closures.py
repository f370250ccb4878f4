"""Variables and containers that a function reaches by its closure."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torchways.capture.python_state.functions import is_tracked_class
from torchways.capture.python_state.kept_state import KeptState
from torchways.capture.python_state.places import Attribute, Cell, Entry, Fixed, Place
from torchways.capture.python_state.tokens import is_container, is_function, is_plain, items_of, key_of, keys_of


def keep_closure(kept: KeptState, function: Any, is_known: Callable[[Any], bool]) -> None:
    """Keeps what a function's variables are now, and what is in the containers and objects that they hold.

    Args:
        kept: where to.
        function: any callable.
        is_known: whether somebody else keeps what is in a container or object.
    """
    _keep(kept, Fixed(function, "the function"), function, is_known, set())


def _keep(kept: KeptState, place: Place, value: Any, is_known: Callable[[Any], bool], seen: set[int]) -> None:
    if is_plain(value) or id(value) in seen or is_known(value):
        return
    seen.add(id(value))
    if isinstance(value, types.MethodType):
        _keep(kept, Fixed(value.__self__, "self"), value.__self__, is_known, seen)
        value = value.__func__
    if isinstance(value, functools.partial):
        for item in (value.func, value.args, value.keywords):
            _keep(kept, place, item, is_known, seen)
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            variable = Cell(cell, name)
            now = variable.get(None)  # type: ignore[arg-type]
            kept.keep_single(variable, now)
            _keep(kept, variable, now, is_known, seen)
    elif is_container(value):
        if not isinstance(value, tuple):
            kept.keep(place, value)
        for key, item in zip(keys_of(value), items_of(value), strict=False):
            _keep(kept, Entry(place, key_of(key)), item, is_known, seen)
    elif not is_function(value) and is_tracked_class(type(value)):
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            kept.keep(Attribute(place, "__dict__"), attributes)
