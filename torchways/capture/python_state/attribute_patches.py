"""Patches of classes that let a trace see reads of attributes.

`__getattribute__` of a class is replaced while a trace is under way; so are the attribute methods of `torch.nn.Module`.
The observer of the trace in this thread is told of each read. This module does not know what it makes of it.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from torchways.capture.python_state.places import MISSING
from torchways.signals import uninterrupted

_MISSING_OBJECT = object()


class Observer(Protocol):
    """The receiver of reads of attributes.

    Attributes:
        paused: if it is not zero, reads do not matter.
        thread: the one whose reads matter.
    """

    paused: int
    thread: int

    def pause(self) -> AbstractContextManager[None]:
        """Makes reads inside not matter."""

    def note_attribute(self, owner: Any, name: str, value: Any) -> Any:
        """Notes that an attribute of an object was read; returns the value to go on with."""


class AttributePatches:
    """The classes that one trace patched."""

    def __init__(self) -> None:
        self._patches: list[tuple[type, str, Any]] = []
        self._patched: set[type] = set()

    @contextmanager
    def observed_by(self, observer: Observer) -> Iterator[None]:
        """Tells an observer of reads inside, in its thread; undoes all patches at the end."""
        global _active
        saved, _active = _active, observer
        try:
            self.patch(torch.nn.Module)
            self._patch_function(torch.nn.Module, "__getattr__", _noting_getattr)
            self._patch_function(torch.nn.Module, "__setattr__", _quietly)
            self._patch_function(torch.nn.Module, "__delattr__", _quietly)
            yield
        finally:
            with uninterrupted():
                _active = saved
                for cls, name, old in reversed(self._patches):
                    if old is _MISSING_OBJECT:
                        delattr(cls, name)
                    else:
                        setattr(cls, name, old)
                self._patches.clear()

    def patch(self, cls: type) -> None:
        """Patches a class, so that reads of its objects' attributes are seen."""
        if cls in self._patched:
            return
        self._patched.add(cls)
        if any(base in self._patched for base in cls.__mro__[1:]) and "__getattribute__" not in cls.__dict__:
            return  # it has that of a class that is patched
        self._patch_function(cls, "__getattribute__", _noting)

    def _patch_function(self, cls: type, name: str, wrapper: Callable[[Any], Any]) -> None:
        old = cls.__dict__.get(name, _MISSING_OBJECT)
        try:
            setattr(cls, name, wrapper(getattr(cls, name)))
        except TypeError:  # a metaclass that keeps its classes as they are: their objects count as a whole
            return
        self._patches.append((cls, name, old))


_active: Observer | None = None


def active_observer() -> Observer | None:
    """Returns what observes the trace under way in this thread, if any."""
    observer = _active
    return observer if observer is not None and observer.thread == threading.get_ident() else None


def _noting(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    def __getattribute__(self: Any, name: str) -> Any:
        observer = _active
        if observer is None or observer.paused or observer.thread != threading.get_ident():
            return original(self, name)
        try:
            value = original(self, name)
        except AttributeError:
            if not hasattr(type(self), "__getattr__"):
                observer.note_attribute(self, name, MISSING)
            raise
        return observer.note_attribute(self, name, value)

    return __getattribute__


def _noting_getattr(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    def __getattr__(self: Any, name: str) -> Any:
        observer = active_observer()
        if observer is None or observer.paused:
            return original(self, name)
        try:
            with observer.pause():
                value = original(self, name)
        except AttributeError:
            observer.note_attribute(self, name, MISSING)
            raise
        return observer.note_attribute(self, name, value)

    return __getattr__


def _quietly(original: Callable[..., Any]) -> Callable[..., Any]:
    def write(self: Any, *args: Any) -> None:
        observer = active_observer()
        if observer is None:
            original(self, *args)
            return
        with observer.pause():
            original(self, *args)

    write.unpatched = original  # type: ignore[attr-defined]
    return write


def unpatched(value: Any) -> Any:
    """Returns the function or method that a patch of the trace stands for."""
    original = getattr(value, "unpatched", None) if isinstance(value, (types.FunctionType, types.MethodType)) else None
    if original is None:
        return value
    return types.MethodType(original, value.__self__) if isinstance(value, types.MethodType) else original
