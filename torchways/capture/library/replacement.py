"""Replaces functions and methods of PyTorch while a trace runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Replacement:
    """A function of PyTorch's library that another one takes the place of within a trace.

    Attributes:
        owner: the class or module that has it.
        name: its name there.
        make: returns the other one, given the original.
    """

    owner: Any
    name: str
    make: Callable[[Any], Any]


@contextmanager
def replaced(item: Replacement) -> Iterator[None]:
    """Puts the other function in place, and the first one back at the end."""
    original = getattr(item.owner, item.name)
    other = item.make(original)
    other.unpatched = original  # a trace that reads it notes that it found this one
    setattr(item.owner, item.name, other)
    try:
        yield
    finally:
        setattr(item.owner, item.name, original)
