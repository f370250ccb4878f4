"""What an executor needs of its devices. `xla.py` is the real one; a simulated one can stand in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from torchways.ir.sizes import device_bytes, logical_bytes

T = TypeVar("T")


class OnDevice(Protocol):
    """Runs a piece of work on the thread that makes all other calls of a runtime; returns its result."""

    def __call__(self, work: Callable[[], T], /) -> T:
        """See the class."""


def at_once(work: Callable[[], T]) -> T:
    """The `OnDevice` of a process with one thread."""
    return work()


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferSpec:
    """A logical buffer on a mesh of devices.

    Attributes:
        dtype: as PyTorch names it ("float32").
        shape: logical.
        placements: one for each axis of the mesh ("R"/"S(dim)").
        mesh: sizes of the mesh's axes; their product is the number of devices.
    """

    dtype: str
    shape: tuple[int, ...]
    placements: tuple[str, ...]
    mesh: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)

    @property
    def form(self) -> str:
        """The logical dtype and shape as text; buffers of one form can stand in for each other."""
        return f"{self.dtype}{list(self.shape)}"

    @property
    def nbytes(self) -> int:
        """Logical size in bytes."""
        return logical_bytes(self.dtype, self.shape)

    @property
    def device_nbytes(self) -> int:
        """Bytes that it takes on each device."""
        return device_bytes(self.dtype, self.shape, self.placements, self.mesh)


class Runtime(Protocol):
    """The devices of one process, for slices of any mesh over them. One thread calls all methods but `compile`.

    Attributes:
        shares_memory: what `to_host` returns may be a buffer's own memory; else it is nobody else's.
    """

    shares_memory: bool

    def put(self, host: torch.Tensor, spec: BufferSpec) -> Any:
        """Copies a CPU tensor of `spec`, which must not change any more, to the devices; returns the buffer."""

    def fill(self, spec: BufferSpec, value: float) -> Any:
        """Returns a buffer with one value everywhere."""

    def compile(
        self,
        graph: bytes,
        inputs: Sequence[BufferSpec],
        outputs: Sequence[BufferSpec],
        donated: Sequence[int],
        on_device: OnDevice,
    ) -> Any:
        """Compiles a serialized graph, without running it; on any thread, several calls at a time.

        What must not happen beside other calls is given to `on_device`. What is returned is let go with its last user.

        Raises:
            CaptureError: an operator would run on the host.
        """

    def execute(self, executable: Any, inputs: Sequence[Any], gang_key: str) -> tuple[list[Any], Sequence[Any]]:
        """Starts a computation.

        Returns, before it ends, its outputs, and those buffers that it computes (none where all outputs are inputs).
        `gang_key` is the same on all hosts of a gang.
        """

    def has_room(self, wake: Callable[[], None]) -> bool:
        """Whether `execute` can start a computation without waiting for others to end.

        If not, calls `wake` once or more, on some thread, when there may be room. `progress` must be called meanwhile.
        """

    def on_ready(self, buffers: Sequence[Any], callback: Callable[[], None]) -> None:
        """Calls back, on some thread, when the computation of which these are outputs has ended.

        `progress` must be called meanwhile. Buffers may be donated before: then it may call back a computation later.
        """

    def progress(self) -> bool:
        """Does what `on_ready` waits for; returns whether it must be called again soon."""

    def to_host(self, buffer: Any) -> torch.Tensor:
        """Returns a computed buffer as a CPU tensor; see `shares_memory`."""

    def fallback_counters(self) -> dict[str, int]:
        """Operators that ran on the host since the start, with counts."""

    def lowered_ops(self) -> list[str]:
        """Names of the operators that this runtime compiles."""
