"""What arrays stand for: a value still on the host, or a named buffer on a slice."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree

from torchways.array import Array
from torchways.capture.current_trace import current_trace
from torchways.capture.host_content import HostContent
from torchways.errors import DeadlineExceeded, SessionClosed, UserError
from torchways.ids import BufferId, SliceId
from torchways.mesh import Placements, VirtualSlice
from torchways.rpc.local_values import INLINE_BYTES, ValueFile
from torchways.rpc.programs import InlineValue
from torchways.signals import if_interrupted, result_of, uninterrupted


class BufferReads(Protocol):
    """How remote buffers are read and given back."""

    def fetch(self, buffer: RemoteBuffer, timeout: timedelta | None) -> torch.Tensor:
        """Waits for a buffer's value."""

    def start_fetch(self, buffer: RemoteBuffer) -> concurrent.futures.Future[torch.Tensor]:
        """Starts waiting for a buffer's value."""

    def give_up(self, buffer: RemoteBuffer) -> None:
        """Who waited for a buffer was interrupted."""

    def is_ready(self, buffer: RemoteBuffer) -> bool:
        """Whether a read would not wait for a computation."""

    def release(self, slice_id: SliceId, buffer_id: BufferId) -> None:
        """Gives a buffer back."""


class ProcessLife(Protocol):
    """What lives in one process, until it is closed."""

    @property
    def closed(self) -> bool:
        """Whether it is over."""

    @property
    def pid(self) -> int:
        """The process."""


class BufferHome(ProcessLife, Protocol):
    """What a remote buffer needs of the session that it belongs to."""

    #: Held while a call is bound, sent and its results are put in place.
    lock: threading.RLock
    #: The buffers that are referred to, by their ids.
    buffers: dict[BufferId, weakref.ref[RemoteBuffer]]

    @property
    def values(self) -> BufferReads:
        """What is on its slices."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class HostBuffer:
    """A value on the host, until its first use in a program says where it goes.

    Attributes:
        value: the value.
        follows: array whose slice it shares (optimizer state: its parameter), or None.
        mesh, placements: where it must go, if that is known.
        is_own: nobody else has the value's tensor.
    """

    value: HostContent
    follows: torch.Tensor | None = None
    mesh: VirtualSlice | None = None
    placements: Placements | None = None
    is_own: bool = False

    def read(self, timeout: timedelta | None = None) -> torch.Tensor:
        """Returns the value."""
        content = self.value.content
        if isinstance(content, torch.Tensor):
            return content.clone()
        return torch.full(self.value.shape, content, dtype=self.value.dtype)

    def done(self) -> bool:
        """Always: it never waits."""
        return True

    def read_async(self) -> Generator[Any, None, torch.Tensor]:
        """Returns the value."""
        return self.read()
        yield

    def own(self) -> torch.Tensor | None:
        """Returns the value if nobody else has it."""
        content = self.value.content if self.is_own else None
        return content if isinstance(content, torch.Tensor) else None

    def with_value(self, value: torch.Tensor) -> HostBuffer:
        """Returns a buffer of another value that goes where this one would."""
        return _replacing(value, self.mesh, self.placements, self.follows)

    def derived(self, read: Callable[[], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> HostBuffer:
        """Returns a buffer whose value `read` computes when it is needed."""
        return DerivedBuffer(read, shape, dtype)

    def is_copy_of(self, other: Any) -> bool:
        """It is no copy."""
        return False

    def undisturbed(self) -> AbstractContextManager[Any]:
        """Nothing takes what is on the host."""
        return contextlib.nullcontext()

    def inline(self, placements: Placements) -> InlineValue:
        """Returns the value as part of a message."""
        return self._sent(placements, tensor_bytes)

    def copied(self, placements: Placements) -> InlineValue:
        """Returns a copy of the value that can be put on a slice."""
        return self._sent(placements, _in_a_file)

    def _sent(self, placements: Placements, copy: Callable[[torch.Tensor], bytes | ValueFile]) -> InlineValue:
        dtype = str(self.value.dtype).removeprefix("torch.")
        content = self.value.content
        data = copy(content) if isinstance(content, torch.Tensor) else content
        return InlineValue(dtype=dtype, shape=self.value.shape, placements=placements, data=data)


class DerivedBuffer(HostBuffer):
    """A value on the host that is computed when it is needed: a view of what is elsewhere."""

    __slots__ = ("_dtype", "_read", "_shape")

    def __init__(self, read: Callable[[], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._read = read
        self._shape = shape
        self._dtype = dtype
        self.follows = None
        self.mesh = None
        self.placements = None
        self.is_own = False

    @property
    def value(self) -> HostContent:  # type: ignore[override]
        """The value; waits for it."""
        return HostContent(self._shape, self._dtype, self._read())


class RemoteBuffer:
    """One reference of the controller to a named buffer of a slice; dropping it releases the buffer.

    Attributes:
        origin: the host value that it is a copy of, where that is alive.
        copies: buffers on other slices with the same value, by slice. An array that gets another buffer has none of
            these any more, so they are never out of date.
    """

    __slots__ = ("__weakref__", "buffer_id", "consumed", "copies", "mesh", "origin", "placements", "session")

    def __init__(self, session: BufferHome, mesh: VirtualSlice, placements: Placements, buffer_id: BufferId) -> None:
        self.session = session
        self.mesh = mesh
        self.placements = placements
        self.buffer_id = buffer_id
        self.origin: weakref.ref[HostBuffer] | None = None
        self.copies: dict[VirtualSlice, RemoteBuffer] = {}
        #: A run was sent that donates it: it is the executor's to free.
        self.consumed = False
        session.buffers[buffer_id] = weakref.ref(self)

    def read(self, timeout: timedelta | None = None) -> torch.Tensor:
        """Waits for the value; see `Array.cpu`."""
        return self.session.values.fetch(self, timeout)

    def done(self) -> bool:
        """Asks the executor whether the value is there."""
        return self.session.values.is_ready(self)

    def read_async(self) -> Generator[Any, None, torch.Tensor]:
        """Awaits the value on the caller's loop."""
        return asyncio.wrap_future(self.session.values.start_fetch(self)).__await__()

    def own(self) -> None:
        """Nothing: it is on its slice."""

    def with_value(self, value: torch.Tensor) -> HostBuffer:
        """Returns a buffer of another value that goes to the same slice, sharded the same, at its next use."""
        return _replacing(value, self.mesh, self.placements, None)

    def derived(self, read: Callable[[], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> HostBuffer:
        """Returns a buffer on the host whose value `read` computes when it is needed."""
        return DerivedBuffer(read, shape, dtype)

    def is_copy_of(self, other: Any) -> bool:
        """Whether it was made by putting `other` on a slice."""
        return self.origin is not None and self.origin() is other

    def undisturbed(self) -> AbstractContextManager[Any]:
        """While it is held, no call is sent."""
        check_open(self.session, "this array")
        return self.session.lock

    def __del__(self) -> None:
        self.session.buffers.pop(self.buffer_id, None)
        if not self.consumed:
            self.session.values.release(self.mesh.slice_id, self.buffer_id)


def _replacing(
    value: torch.Tensor,
    mesh: VirtualSlice | None,
    placements: Placements | None,
    follows: torch.Tensor | None,
) -> HostBuffer:
    """Returns a buffer of a value that takes the place of another, of another shape perhaps."""
    if placements is not None:
        placements = tuple("R" if text != "R" and int(text[2:-1]) >= value.ndim else text for text in placements)
    content = HostContent(tuple(value.shape), value.dtype, value)
    return HostBuffer(content, follows, mesh, placements, is_own=True)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Returns a CPU tensor's elements, row-major."""
    return _elements(tensor).tobytes()


def _in_a_file(tensor: torch.Tensor) -> bytes | ValueFile:
    return tensor_bytes(tensor) if tensor.nbytes <= INLINE_BYTES else ValueFile(_elements(tensor))


def _elements(tensor: torch.Tensor) -> memoryview:
    # Contiguous tensors may have any stride where a dimension has one element, in which bytes cannot be viewed.
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def tensor_from_bytes(dtype: str, shape: tuple[int, ...], data: bytearray) -> torch.Tensor:
    """Returns a CPU tensor over `data`."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    if not data:
        return torch.empty(shape, dtype=torch_dtype)
    return torch.frombuffer(data, dtype=torch_dtype).reshape(shape)


def host_array(tensor: torch.Tensor, *, requires_grad: bool = False) -> Array:
    """Returns an array of a host tensor, to be placed by its first use."""
    content = HostContent(tuple(tensor.shape), tensor.dtype, tensor)
    return Array(HostBuffer(content), content.shape, content.dtype, requires_grad=requires_grad)


def array_like(content: HostContent, follows: torch.Tensor | None) -> Array:
    """Returns an array of a host value, to live where `follows` lives; None: where it is used first."""
    return Array(HostBuffer(content, follows=follows), content.shape, content.dtype)


def empty_array(shape: tuple[int, ...], dtype: torch.dtype, mesh: VirtualSlice, placements: Placements) -> Array:
    """Returns an array whose value is to be loaded: zero until then, and without memory until its first use."""
    return Array(HostBuffer(HostContent(shape, dtype, 0.0), None, mesh, placements), shape, dtype)


def get_all(tree: Any, timeout: timedelta | None) -> Any:
    """Returns a pytree with the values of its arrays, all as they are between two calls; see `tw.get`."""
    leaves, spec = pytree.tree_flatten(tree)
    deadline = None if timeout is None else time.monotonic() + timeout.total_seconds()
    with contextlib.ExitStack() as locks:
        for attempt in range(2):
            try:
                return pytree.tree_unflatten(_read_all(leaves, timeout, deadline), spec)
            except UserError:  # another thread's program took one of them meanwhile: it waits the next time
                if attempt:
                    raise
                sessions = {id(buffer.session): buffer.session for buffer in _remote_buffers(leaves).values()}
                for session in sessions.values():
                    locks.enter_context(session.lock)
    raise AssertionError("the last attempt returns or raises")


def _remote_buffers(leaves: list[Any]) -> dict[int, RemoteBuffer]:
    """Returns the buffers of those leaves that are on a slice, by position."""
    buffers = {position: leaf._buffer for position, leaf in enumerate(leaves) if isinstance(leaf, Array)}
    return {position: buffer for position, buffer in buffers.items() if isinstance(buffer, RemoteBuffer)}


def _read_all(leaves: list[Any], timeout: timedelta | None, deadline: float | None) -> list[Any]:
    found = list(leaves)
    buffers = _remote_buffers(leaves)
    with contextlib.ExitStack() as locks:
        for session in {id(buffer.session): buffer.session for buffer in buffers.values()}.values():
            locks.enter_context(session.lock)
        buffers = _remote_buffers(leaves)  # of one moment
    reads = {position: buffer.session.values.start_fetch(buffer) for position, buffer in buffers.items()}

    def give_up() -> None:
        for buffer in buffers.values():
            buffer.session.values.give_up(buffer)

    try:
        with if_interrupted(give_up):
            for position, leaf in enumerate(leaves):
                if position in reads:
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    try:
                        found[position] = result_of(reads[position], left)
                    except concurrent.futures.TimeoutError as error:
                        if reads[position].done():
                            raise  # the read itself raised it
                        raise DeadlineExceeded(f"waited {timeout} for an array's value in vain") from error
                elif isinstance(leaf, Array):
                    found[position] = leaf.cpu()
    finally:
        with uninterrupted():
            for read in reads.values():
                read.cancel()
    return found


def check_open(session: ProcessLife, what: str) -> None:
    """Raises SessionClosed if the session is over, UserError if this process is not its own."""
    if os.getpid() != session.pid:
        raise UserError(
            f"{what} belongs to process {session.pid}, and this one ({os.getpid()}) was forked from it: a session does "
            "not follow into other processes. Read what they need with .cpu() before they are forked, and pass that"
        )
    if session.closed:
        raise SessionClosed(
            f"{what} belongs to a session that tw.shutdown() has closed; its buffers are gone. Read what you need "
            "before shutting down"
        )


Array._is_tracing = staticmethod(lambda: current_trace() is not None)
