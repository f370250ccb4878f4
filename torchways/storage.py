"""What arrays that share their memory have in common: the buffer that holds the value now, and views of it.

As in PyTorch, `array.detach()` and `array.data` share the storage of the array, and `array[0]` is a view of it. A view
reads its base and applies the view operators; whoever writes to it changes the base. It knows nothing of sessions.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch

from torchways.errors import UserError
from torchways.mesh import Placements, VirtualSlice

#: Reads that go wrong because a program took the buffer meanwhile, until no program may be sent during the next.
_FREE_READS = 2


class Buffer(Protocol):
    """What an array needs to know of the buffer that it stands for."""

    @property
    def mesh(self) -> VirtualSlice | None:
        """Slice that holds it; None while the value waits on the host for its first use."""

    @property
    def placements(self) -> Placements | None:
        """Its sharding; None where `mesh` is None."""

    def read(self, timeout: timedelta | None = None) -> torch.Tensor:
        """Waits for the value and returns it as a CPU tensor that nobody else has."""

    def done(self) -> bool:
        """Whether a read would return at once."""

    def read_async(self) -> Generator[Any, None, torch.Tensor]:
        """Awaits the value on the caller's event loop."""

    def own(self) -> torch.Tensor | None:
        """Returns the value if it is a CPU tensor that nobody else has, which may be changed; else None."""

    def with_value(self, value: torch.Tensor) -> Buffer:
        """Returns a buffer of another value, which becomes its own, to live where this one does."""

    def derived(self, read: Callable[[], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        """Returns a buffer on the host, on no slice yet, whose value `read` computes when it is needed."""

    def is_copy_of(self, other: Buffer) -> bool:
        """Whether it was made by taking `other`, as it is, to a slice."""

    def undisturbed(self) -> AbstractContextManager[Any]:
        """While it is held, no program is sent that could take the buffer."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class _HostCopy:
    """The value of one buffer on the host. Views share it; never changed."""

    buffer: Buffer
    value: torch.Tensor


class Storage:
    """Holds the buffer that has the value now.

    Attributes:
        buffer: runs of programs and writes from Python replace it.
    """

    __slots__ = ("__weakref__", "_copy", "buffer")

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self._copy: weakref.ref[_HostCopy] | None = None

    @property
    def base(self) -> Storage:
        """Itself: it is no view."""
        return self

    def view_of(self, base: torch.Tensor) -> torch.Tensor:
        """Returns what stands for this storage where `base` has the value of its base."""
        return base

    def read(self, timeout: timedelta | None = None) -> torch.Tensor:
        """Waits for the value, see `Array.cpu`; where a program took the buffer meanwhile, for the value after it."""
        for _ in range(_FREE_READS):
            buffer = self.buffer
            try:
                return buffer.read(timeout)
            except UserError:  # donated; who donated it may not have put the new buffer here yet
                pass
        with self.undisturbed():
            return self.buffer.read(timeout)

    def take(self) -> torch.Tensor:
        """Returns the value, to be changed and put back with `put_back`, while `undisturbed` is held."""
        own = self.buffer.own()
        return self.read().contiguous() if own is None else own

    def put_back(self, value: torch.Tensor) -> None:
        """Gives the storage a new value, which goes to where the old one was at its next use."""
        self.buffer = self.buffer.with_value(value)

    def undisturbed(self) -> AbstractContextManager[Any]:
        """While it is held, no program changes the value."""
        return self.buffer.undisturbed()

    def copy_of(self, buffer: Buffer) -> _HostCopy:
        """Returns the value of a buffer that is, or was, the storage's own, read once for all views of it."""
        copy = self._copy() if self._copy is not None else None
        if copy is None or copy.buffer is not buffer:
            value = self.read() if buffer is self.buffer else buffer.read()
            copy = _HostCopy(buffer, value.contiguous())
            self._copy = weakref.ref(copy)
        return copy


@dataclass(frozen=True, slots=True)
class ViewStep:
    """A view operator with all its arguments but the first; of several results, the one at `index`."""

    operator: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    index: int | None = None

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the view of a tensor."""
        result = self.operator(tensor, *self.args, **self.kwargs)
        found: torch.Tensor = result if self.index is None else result[self.index]
        return found


@dataclass(eq=False, slots=True)
class _ViewRead:
    """Computes a view's value from one buffer of its base; keeps the base's value for its other views."""

    base: Storage
    buffer: Buffer
    steps: tuple[ViewStep, ...]
    _copy: _HostCopy | None = field(default=None, init=False)

    def __call__(self) -> torch.Tensor:
        if self._copy is None:
            self._copy = self.base.copy_of(self.buffer)
        value = self._copy.value
        for step in self.steps:
            value = step(value)
        return value


class ViewStorage(Storage):
    """The storage of a view: the base's, through view operators.

    Args:
        viewed: storage of what the last operator was called with.
        step: that operator.
        shape, dtype: of the view.
    """

    __slots__ = ("_base", "_derived", "_dtype", "_of", "_shape", "_steps")

    def __init__(self, viewed: Storage, step: ViewStep, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._base = viewed.base
        self._steps: tuple[ViewStep, ...] = (*viewed._steps, step) if isinstance(viewed, ViewStorage) else (step,)
        self._shape = shape
        self._dtype = dtype
        #: The view's value as a buffer, made of this buffer of the base.
        self._derived: Buffer | None = None
        self._of: Buffer | None = None
        self._copy = None

    @property
    def base(self) -> Storage:
        """What it is a view of; no view itself."""
        return self._base

    def view_of(self, base: torch.Tensor) -> torch.Tensor:
        """Returns what stands for this storage where `base` has the value of its base."""
        for step in self._steps:
            base = step(base)
        return base

    @property
    def buffer(self) -> Buffer:
        """The view's own value, computed when it is needed; set, it is written through to the base."""
        buffer = self._base.buffer
        if self._derived is None or self._of is not buffer:
            self._of = buffer
            self._derived = buffer.derived(_ViewRead(self._base, buffer, self._steps), self._shape, self._dtype)
        return self._derived

    @buffer.setter
    def buffer(self, buffer: Buffer) -> None:
        if self._derived is not None and self._of is self._base.buffer and buffer.is_copy_of(self._derived):
            self._derived = buffer
            return
        with self._base.undisturbed():
            value = self._base.take()
            self.view_of(value).copy_(buffer.read())
            self._base.put_back(value)
