"""Gradients that a trace reads and leaves behind.

Autograd adds to `.grad` of a leaf in C++, so a gradient is compared with its value when its tensor was first used. A
gradient that is cleared before anything reads it (`zero_grad()` at the start of a step) is no condition: it may be
there or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from torchways.array import Array
from torchways.capture.python_state.kept_state import Write
from torchways.capture.python_state.places import Call, Gradient, Place
from torchways.capture.python_state.tokens import Exactly, OneOf, TensorSource, Token
from torchways.capture.python_state.watcher import Watcher, active_watcher
from torchways.signals import uninterrupted


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """The tensor that a source has at a call."""

    source: TensorSource

    @property
    def key(self) -> Any:
        return ("source", id(self.source))

    @property
    def is_fixed(self) -> bool:
        return True

    def get(self, call: Call) -> Any:
        return self.source.tensor

    def set(self, call: Call, value: Any) -> None:
        raise TypeError(f"{self.source.name} is no variable")

    def __str__(self) -> str:
        return self.source.name


@dataclass(slots=True)
class _Gradient:
    owner: torch.Tensor
    place: Place
    initial: torch.Tensor | None
    is_condition: bool
    is_read: bool = False
    is_written: bool = False


class Gradients:
    """The gradients of one trace.

    Args:
        watcher: of the trace.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._found: dict[int, _Gradient] = {}
        #: Identities of the tensors whose gradients Python reads, while somebody asks for them.
        self._looked_at: set[int] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sees gradients that Python reads, assigns and clears inside."""
        patches: list[tuple[Any, str, Any]] = [
            (Array, "grad", property(self._get, self._set, lambda array: self._set(array, None))),
            (torch.optim.Optimizer, "zero_grad", self._zerogradient_of(torch.optim.Optimizer.zero_grad, _of_groups)),
            (torch.nn.Module, "zero_grad", self._zerogradient_of(torch.nn.Module.zero_grad, _of_module)),
        ]
        missing = object()
        saved = [cls.__dict__.get(name, missing) for cls, name, _ in patches]
        try:
            for cls, name, new in patches:
                setattr(cls, name, new)
            yield
        finally:
            with uninterrupted():
                for (cls, name, _), old in zip(patches, saved, strict=True):
                    if old is missing:
                        delattr(cls, name)
                    else:
                        setattr(cls, name, old)

    def note(self, owner: torch.Tensor, place: Place | None = None, *, is_condition: bool = True) -> _Gradient:
        """Notes a tensor whose gradient may be read or written from here on."""
        found = self._found.get(id(owner))
        if found is None:
            place = place or Gradient(Bound(self._watcher.source(owner)))
            found = self._found[id(owner)] = _Gradient(owner, place, gradient_of(owner), is_condition)
        return found

    def _get(self, array: Array) -> Any:
        if active_watcher() is self._watcher and not self._watcher.paused:
            found = self.note(array)
            found.is_read = found.is_read or not found.is_written
            if self._looked_at is not None:
                self._looked_at.add(id(array))
        return gradient_of(array)

    def _set(self, array: Array, value: Any) -> None:
        if active_watcher() is self._watcher:
            found = self.note(array)
            was_added_to = gradient_of(array) is not found.initial
            found.is_read = found.is_read or (was_added_to and not found.is_written)
            found.is_written = True
        GRAD.__set__(array, value)

    def _zerogradient_of(self, original: Callable[..., None], parameters_of: Callable[[Any], Iterable[Any]]) -> Any:
        def zero_grad(owner: Any, set_to_none: bool = True) -> None:
            if active_watcher() is not self._watcher or not set_to_none:
                original(owner, set_to_none)
                return
            for parameter in parameters_of(owner):
                parameter.grad = None

        zero_grad.unpatched = original  # type: ignore[attr-defined]
        return zero_grad

    @contextmanager
    def looking(self) -> Iterator[set[int]]:
        """Notes the identities of the tensors whose gradients Python reads inside."""
        self._looked_at = set()
        try:
            yield self._looked_at
        finally:
            self._looked_at = None

    def now(self) -> dict[int, Any]:
        """Returns the gradient of each tensor that was noted, by the tensor's identity."""
        return {key: gradient_of(item.owner) for key, item in self._found.items()}

    def changed_since(self, before: Mapping[int, Any]) -> list[tuple[torch.Tensor, Any]]:
        """Returns the tensors that have another gradient than in `before`, and the one that they had."""
        found = []
        for key, item in self._found.items():
            old = before.get(key, item.initial)
            if gradient_of(item.owner) is not old:
                found.append((item.owner, old))
        return found

    def assigned(self) -> set[int]:
        """Returns the identities of the tensors whose gradients Python assigned or cleared."""
        return {key for key, item in self._found.items() if item.is_written}

    def writes(self) -> list[Write]:
        """Returns the gradients that have changed, and those that were cleared."""
        found = []
        for item in self._found.values():
            now = gradient_of(item.owner)
            if now is not item.initial and not item.is_written:
                item.is_read = True
            if now is not item.initial or item.is_written:
                found.append(Write("set", item.place, now))
        return found

    def reads(self) -> Iterator[tuple[Place, Token]]:
        """Returns the gradients that are conditions, with what they were."""
        for item in self._found.values():
            # Autograd adds to one that is there in place: the trace reads it, and nothing above sees it.
            is_added_to = item.initial is not None and id(item.initial) in self._watcher.sources
            if (item.is_read or is_added_to) and item.is_condition:
                if item.initial is None:
                    yield item.place, Exactly(None)
                else:
                    source = self._watcher.source(item.initial)
                    if not source.places:
                        source.places.append(item.place)
                    yield item.place, OneOf(source)

    def put_back(self) -> None:
        """Restores all gradients as they were."""
        for item in self._found.values():
            if gradient_of(item.owner) is not item.initial:
                GRAD.__set__(item.owner, item.initial)


#: PyTorch's own attribute, which is not watched.
GRAD: Any = torch.Tensor.grad


def gradient_of(tensor: torch.Tensor) -> Any:
    """Returns a tensor's gradient without a note that it was read."""
    return GRAD.__get__(tensor)


def _of_groups(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _of_module(module: torch.nn.Module) -> Iterator[Any]:
    yield from module.parameters()
