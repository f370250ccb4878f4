"""What arrays stand for: a value still on the host, or a named buffer on a slice."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Generator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree

from torchways.array import Array
from torchways.capture.state import HostContent
from torchways.errors import DeadlineExceeded, SessionClosed
from torchways.ids import BufferId, SliceId
from torchways.mesh import Placements, VirtualSlice
from torchways.rpc.programs import InlineValue


class BufferHome(Protocol):
    """What a remote buffer needs of the session that it belongs to."""

    closed: bool

    def fetch(self, buffer: RemoteBuffer, timeout: timedelta | None) -> torch.Tensor:
        """Waits for a buffer's value."""

    def start_fetch(self, buffer: RemoteBuffer) -> concurrent.futures.Future[torch.Tensor]:
        """Starts waiting for a buffer's value."""

    def is_ready(self, buffer: RemoteBuffer) -> bool:
        """Whether a read would not wait for a computation."""

    def release(self, slice_id: SliceId, buffer_id: BufferId) -> None:
        """Gives a buffer back."""


@dataclass(eq=False, slots=True)
class HostBuffer:
    """A value on the host, until its first use in a program says where it goes.

    Attributes:
        value: the value.
        follows: array whose slice it shares (optimizer state: its parameter), or None.
        mesh, placements: where it must go, if that is known.
    """

    value: HostContent
    follows: torch.Tensor | None = None
    mesh: VirtualSlice | None = None
    placements: Placements | None = None

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

    def inline(self, placements: Placements) -> InlineValue:
        """Returns the value as part of a message."""
        dtype = str(self.value.dtype).removeprefix("torch.")
        content = self.value.content
        data = tensor_bytes(content) if isinstance(content, torch.Tensor) else content
        return InlineValue(dtype=dtype, shape=self.value.shape, placements=placements, data=data)


class RemoteBuffer:
    """One reference of the controller to a named buffer of a slice; dropping it releases the buffer."""

    __slots__ = ("buffer_id", "consumed", "mesh", "placements", "session")

    def __init__(self, session: BufferHome, mesh: VirtualSlice, placements: Placements, buffer_id: BufferId) -> None:
        self.session = session
        self.mesh = mesh
        self.placements = placements
        self.buffer_id = buffer_id
        #: A run was sent that donates it: it is the executor's to free.
        self.consumed = False

    def read(self, timeout: timedelta | None = None) -> torch.Tensor:
        """Waits for the value; see `Array.cpu`."""
        return self.session.fetch(self, timeout)

    def done(self) -> bool:
        """Asks the executor whether the value is there."""
        return self.session.is_ready(self)

    def read_async(self) -> Generator[Any, None, torch.Tensor]:
        """Awaits the value on the caller's loop."""
        return asyncio.wrap_future(self.session.start_fetch(self)).__await__()

    def __del__(self) -> None:
        if not self.consumed:
            self.session.release(self.mesh.slice_id, self.buffer_id)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Returns a CPU tensor's elements, row-major."""
    # Contiguous tensors may have any stride where a dimension has one element, in which bytes cannot be viewed.
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


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


def get_all(tree: Any, timeout: timedelta | None) -> Any:
    """Returns a pytree with the values of its arrays; see `tw.get`."""
    leaves, spec = pytree.tree_flatten(tree)
    deadline = None if timeout is None else time.monotonic() + timeout.total_seconds()
    reads = {
        position: leaf._buffer.session.start_fetch(leaf._buffer)
        for position, leaf in enumerate(leaves)
        if isinstance(leaf, Array) and isinstance(leaf._buffer, RemoteBuffer)
    }
    try:
        for position, leaf in enumerate(leaves):
            if position in reads:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                try:
                    leaves[position] = reads[position].result(left)
                except concurrent.futures.TimeoutError as error:
                    if reads[position].done():
                        raise  # the read itself raised it
                    raise DeadlineExceeded(f"waited {timeout} for an array's value in vain") from error
            elif isinstance(leaf, Array):
                leaves[position] = leaf.cpu()
    finally:
        for read in reads.values():
            read.cancel()
    return pytree.tree_unflatten(leaves, spec)


def check_open(session: BufferHome, what: str) -> None:
    """Raises SessionClosed if the session is over."""
    if session.closed:
        raise SessionClosed(
            f"{what} belongs to a session that tw.shutdown() has closed; its buffers are gone. Read what you need "
            "before shutting down"
        )
