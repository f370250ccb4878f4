"""`Array`: the controller's handle and future of one logical sharded buffer.

An array is a `torch.Tensor` without storage, so modules, optimizers and autograd take it for what it stands for.
Inside a traced program, the tracer (capture/tracer.py) replaces it by a graph input. Outside, touching its values
waits for them and reads them to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from torchways.errors import PlacementError, UserError
from torchways.mesh import Placements, VirtualSlice, tensor_text

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement


class Buffer(Protocol):
    """What an array needs to know of the buffer that it stands for."""

    @property
    def mesh(self) -> VirtualSlice | None:
        """Slice that holds it; None while the value waits on the host for its first use."""

    @property
    def placements(self) -> Placements | None:
        """Its sharding; None where `mesh` is None."""

    def read(self, timeout: timedelta | None = None) -> torch.Tensor:
        """Waits for the value and returns it as a CPU tensor."""

    def done(self) -> bool:
        """Whether a read would return at once."""

    def read_async(self) -> Generator[Any, None, torch.Tensor]:
        """Awaits the value on the caller's event loop."""


class Array(torch.Tensor):
    """A future of a sharded tensor on a virtual slice; reads like a tensor.

    `shape`, `dtype`, `mesh`, `sharding` and `repr` never wait. `item()`, `numpy()`, `cpu()`, `tolist()`, `await` and
    any tensor operation outside a program wait for the value; if the computation that makes it failed, they raise
    its error. Arrays are changed only by programs.
    """

    _buffer: Buffer
    #: Raised whenever flags, gradients or memory of an array change outside programs.
    num_changes: ClassVar[int] = 0
    #: Whether a program is being traced, in which an array is a tensor like any other. Set by the tracer.
    _is_traced: ClassVar[Callable[[], bool]] = staticmethod(lambda: False)
    #: Set by the controller, which knows programs.
    _redistribute: ClassVar[Callable[[Any, VirtualSlice, Sequence[Any] | None], Any]]

    @staticmethod
    def __new__(
        cls, buffer: Buffer, shape: tuple[int, ...], dtype: torch.dtype, *, requires_grad: bool = False
    ) -> Array:
        # PyTorch documents this constructor for tensor subclasses without storage; there is no public name for it.
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, requires_grad=requires_grad)
        self._buffer = buffer
        return self

    # What PyTorch's own operations do with an array is decided in __torch_dispatch__ alone.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            array = args[0]
            return Array(array._buffer, tuple(array.shape), array.dtype)
        if func._schema.is_mutable:
            raise UserError(
                f"{func} would change an array in place outside a program; put the call inside a function decorated "
                "with @tw.program"
            )
        args, kwargs = torch.utils._pytree.tree_map_only(Array, lambda array: array.cpu(), (args, kwargs or {}))
        return func(*args, **kwargs)

    @property
    def mesh(self) -> VirtualSlice | None:
        """Slice that holds the value; None while it waits on the host for its first use in a program."""
        return self._buffer.mesh

    @property
    def sharding(self) -> Placements | None:
        """One placement an axis of `mesh`: "R" (replicated) or "S(dim)" (split along dim)."""
        return self._buffer.placements

    @property
    def device_mesh(self) -> VirtualSlice | None:
        """`mesh`, as DTensors call it."""
        return self.mesh

    @property
    def placements(self) -> tuple[Placement, ...] | None:
        """`sharding` as placements of torch.distributed.tensor."""
        from torch.distributed.tensor import Replicate, Shard  # it takes a second to import

        if self.sharding is None:
            return None
        return tuple(Replicate() if text == "R" else Shard(int(text[2:-1])) for text in self.sharding)

    def done(self) -> bool:
        """Whether the value is computed (or failed): a read would not wait for a computation."""
        return self._buffer.done()

    def cpu(self, *args: Any, timeout: timedelta | None = None, **kwargs: Any) -> torch.Tensor:
        """Waits for the value and returns a copy of it on the host.

        Args:
            timeout: longest wait; None waits as long as the executor lives. A wait that ends so does not consume
                the future.

        Raises:
            RemoteError: the computation that makes it failed.
            ExecutorLost: the executor that held it is gone.
            DeadlineExceeded: `timeout` passed.
            SessionClosed: `tw.shutdown()` was called.
        """
        if self._is_traced():
            return self
        return self._buffer.read(timeout).requires_grad_(False)

    def full_tensor(self) -> torch.Tensor:
        """Waits for the value and returns the whole of it on the host, however it is sharded; as `cpu`."""
        return self.cpu()

    def redistribute(self, mesh: VirtualSlice | None = None, placements: Sequence[Any] | None = None) -> Any:
        """Returns an array of the same value with another sharding, or on another slice; see `tw.redistribute`.

        Args:
            mesh: slice that it is to be on; None: the one where it is.
            placements: as for `tw.distribute_tensor`.
        """
        home = mesh or self.mesh
        if home is None:
            raise PlacementError(f"{self!r} is on no slice yet: name the mesh to redistribute it to")
        return Array._redistribute(self, home, placements)

    def item(self) -> Any:
        """Waits for the value of a one-element array and returns it as a Python number."""
        return torch.Tensor.item(self) if self._is_traced() else self.cpu().item()

    def numpy(self, *, force: bool = False) -> Any:
        """Waits for the value and returns it as a numpy array."""
        return torch.Tensor.numpy(self) if self._is_traced() else self.cpu().numpy()

    def tolist(self) -> Any:
        """Waits for the value and returns it as nested lists."""
        return torch.Tensor.tolist(self) if self._is_traced() else self.cpu().tolist()

    def __await__(self) -> Generator[Any, None, torch.Tensor]:
        return self._buffer.read_async()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.cpu().numpy() if dtype is None else self.cpu().numpy().astype(dtype)

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else repr(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        raise UserError("an array stands for a buffer on a slice and cannot be deep-copied; read it with .cpu() first")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        text = tensor_text(self.dtype, self.shape, self.sharding)
        return f"tw.Array({text} on mesh{self.mesh})" if self.mesh is not None else f"tw.Array({text}, not placed yet)"

    __str__ = __repr__
