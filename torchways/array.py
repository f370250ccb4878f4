"""`Array`: the controller's handle and future of one logical sharded buffer.

An array is a `torch.Tensor` without memory, so modules, optimizers and autograd take it for what it stands for.
Inside a traced program, the tracer (capture/tracing/tracer.py) replaces it by a graph input. Outside, touching its
values waits for them and reads them to the host; changing them in place changes them on the host, from where they go
back to their slice at their next use.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.utils._pytree as pytree

from torchways.errors import PlacementError, UserError
from torchways.mesh import Placements, VirtualSlice, tensor_text
from torchways.storage import Buffer, Storage, ViewStep, ViewStorage

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

_SHARING = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
#: A tensor's own attributes, which autograd keeps.
_REQUIRES_GRAD: Any = torch.Tensor.requires_grad
_GRAD: Any = torch.Tensor.grad
_DATA: Any = torch.Tensor.data
#: In-place operators that give a tensor other memory.
_MEMORY_CHANGES = ("aten::set_", "aten::resize_", "aten::resize_as_", "aten::set_data", "aten::swap")


def _grad_of(array: Array) -> Any:
    return _GRAD.__get__(array)


def _no_trace() -> bool:
    return False


def _nothing(array: Array, dtype: torch.dtype) -> None:
    pass


class Array(torch.Tensor):
    """A handle and future of one sharded tensor on a virtual slice. Use it like a tensor.

    `shape`, `dtype`, `mesh`, `sharding` and `repr` never wait. `item()`, `numpy()`, `cpu()`, `tolist()`, `await` and
    any tensor operation outside a program wait for the value. If the computation of the value failed, they raise its
    error. `detach()`, `data` and views share the value with the array: a change in place to one of them changes all.
    """

    #: Counts how often Python code, outside traces, set `requires_grad`, `grad`, `data` or the dtype of any array.
    #: While the count stays the same, the conditions of a trace on these need no check.
    num_changes: ClassVar[int] = 0
    _storage: Storage
    #: Set by the controller, which knows programs.
    _redistribute: ClassVar[Callable[[Any, VirtualSlice, Sequence[Any] | None], Any]]
    #: Casts an array on its slice; returns None where its value is on the host. Set by the controller.
    _cast_on_slice: ClassVar[Callable[[Any, torch.dtype], Any]] = staticmethod(_nothing)
    #: Whether a trace is under way; set by the controller.
    _is_tracing: ClassVar[Callable[[], bool]] = staticmethod(_no_trace)

    @staticmethod
    def __new__(
        cls,
        buffer: Buffer | Storage,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        requires_grad: bool = False,
        strides: tuple[int, ...] | None = None,
    ) -> Array:
        # PyTorch documents this constructor for tensor subclasses without storage; there is no public name for it.
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, requires_grad=requires_grad
        )
        self._storage = buffer if isinstance(buffer, Storage) else Storage(buffer)
        return self

    # What PyTorch's own operations do with an array is decided in __torch_dispatch__ alone.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _SHARING:
            return _sharing(args[0])
        if (device := kwargs.get("device")) is not None:
            _check_device(device)
        if func.is_view and isinstance(args[0], Array):
            return _view(func, args[0], args[1:], kwargs)
        if func is torch.ops.aten._to_copy.default and _is_cast(args[0], kwargs):
            return _cast(args[0], kwargs.get("dtype"))
        if func._schema.is_mutable:
            written = _written(func, args, kwargs)
            if written:
                return _change(func, args, kwargs, written)
        args, kwargs = pytree.tree_map_only(Array, _read, (args, kwargs))
        return func(*args, **kwargs)

    @property
    def _buffer(self) -> Buffer:
        """The buffer that has the value now."""
        return self._storage.buffer

    @_buffer.setter
    def _buffer(self, buffer: Buffer) -> None:
        self._storage.buffer = buffer

    # What Python code sets, and a trace may depend on. Autograd's own accesses, in C++, do not come here.

    @property
    def requires_grad(self) -> bool:
        """As a tensor's."""
        found: bool = _REQUIRES_GRAD.__get__(self)
        return found

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value is not _REQUIRES_GRAD.__get__(self):
            _REQUIRES_GRAD.__set__(self, value)
            _note_change()

    def requires_grad_(self, requires_grad: bool = True) -> Array:
        """As a tensor's."""
        self.requires_grad = requires_grad
        return self

    def _set_grad(self, value: Any) -> None:
        if value is not _grad_of(self):
            set_grad_quietly(self, value)
            _note_change()

    def _delete_grad(self) -> None:
        self._set_grad(None)

    grad = property(_grad_of, _set_grad, _delete_grad, "As a tensor's.")

    @property
    def data(self) -> Any:
        """An array that shares the value. Assigning to it replaces the value, as for a tensor."""
        return _DATA.__get__(self)

    @data.setter
    def data(self, value: Any) -> None:
        if Array._is_tracing() or not isinstance(value, torch.Tensor):
            _DATA.__set__(self, value)
            return
        if value is self:
            return
        new = _with_whole_storage(value, self)
        _DATA.__set__(self, new)
        self._storage = new._storage
        _note_change()

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Computes gradients, inside a program, as for a tensor.

        Raises:
            UserError: it was called outside a program. Gradients exist only inside programs.
        """
        if not Array._is_tracing():
            raise UserError(
                f"backward() of {self!r} is called outside a program, where gradients do not exist: call it in the "
                "function decorated with @tw.program, with the forward and the optimizer's step"
            )
        super().backward(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Casts to a dtype, as for a tensor. The result stays on the slice.

        Raises:
            UserError: a device other than the CPU was given.
        """
        if not Array._is_tracing():
            device = torch._C._nn._parse_to(*args, **kwargs)[0]  # what nn.Module.to calls
            if device is not None:
                _check_device(device)
        return super().to(*args, **kwargs)

    def cuda(self, *args: Any, **kwargs: Any) -> Any:
        """Raises UserError: the slice decides where an array is stored."""
        _check_device(torch.device("cuda"))

    def share_memory_(self) -> Any:
        """Raises UserError: an array has no memory in this process."""
        raise UserError(
            f"{self!r} has no memory in this process that others could share: read it with .cpu(), and share that"
        )

    def data_ptr(self) -> int:
        """Raises UserError outside a trace: an array has no address in this process."""
        if not Array._is_tracing():
            raise UserError(f"{self!r} has no memory in this process: read it with .cpu(), whose result has")
        return super().data_ptr()

    def is_shared(self) -> bool:
        """Returns False: an array has no memory in this process."""
        return False

    @property
    def mesh(self) -> VirtualSlice | None:
        """The slice that holds the value. None while the value is on the host, before its first use in a program."""
        return self._buffer.mesh

    @property
    def sharding(self) -> Placements | None:
        """One placement per axis of `mesh`: "R" (replicated) or "S(dim)" (split along dim)."""
        return self._buffer.placements

    @property
    def device_mesh(self) -> VirtualSlice | None:
        """The same as `mesh`; DTensor's name for it."""
        return self.mesh

    @property
    def placements(self) -> tuple[Placement, ...] | None:
        """`sharding` as placements of torch.distributed.tensor."""
        from torch.distributed.tensor import Replicate, Shard  # it takes a second to import

        if self.sharding is None:
            return None
        return tuple(Replicate() if text == "R" else Shard(int(text[2:-1])) for text in self.sharding)

    def done(self) -> bool:
        """Returns True if the value is computed, or its computation failed: a read would not wait for it."""
        return self._buffer.done()

    def cpu(
        self, memory_format: torch.memory_format = torch.preserve_format, *, timeout: timedelta | None = None
    ) -> torch.Tensor:
        """Waits for the value and returns a copy of it on the host.

        Args:
            memory_format: as for `torch.Tensor.cpu`.
            timeout: longest wait. None waits as long as the executor is alive. After a timeout you can read again.

        Raises:
            RemoteError: the computation of the value failed.
            ExecutorLost: the executor that held the value is gone.
            DeadlineExceeded: `timeout` passed.
            SessionClosed: `tw.shutdown()` was called.
            TypeError: a timeout was not given by name.
        """
        if not isinstance(memory_format, torch.memory_format):
            raise TypeError(f"{memory_format!r} is no memory format; a timeout is given by name: cpu(timeout=...)")
        if Array._is_tracing():
            return self
        value = self._storage.read(timeout).requires_grad_(False)
        return value if memory_format is torch.preserve_format else value.contiguous(memory_format=memory_format)

    def full_tensor(self) -> torch.Tensor:
        """Waits for the value and returns the whole tensor on the host; the same as `cpu`."""
        return self.cpu()

    def redistribute(self, mesh: VirtualSlice | None = None, placements: Sequence[Any] | None = None) -> Any:
        """Returns the same value with another sharding, or on another slice; see `tw.redistribute`.

        Args:
            mesh: the target slice. None keeps the present one.
            placements: as for `tw.distribute_tensor`.
        """
        home = mesh or self.mesh
        if home is None:
            raise PlacementError(f"{self!r} is on no slice yet: name the mesh to redistribute it to")
        return Array._redistribute(self, home, placements)

    def item(self) -> Any:
        """Waits for the value of a one-element array and returns it as a Python number."""
        return torch.Tensor.item(self) if Array._is_tracing() else self.cpu().item()

    def numpy(self, *, force: bool = False) -> Any:
        """Waits for the value and returns it as a numpy array."""
        return torch.Tensor.numpy(self) if Array._is_tracing() else self.cpu().numpy()

    def tolist(self) -> Any:
        """Waits for the value and returns it as nested lists."""
        return torch.Tensor.tolist(self) if Array._is_tracing() else self.cpu().tolist()

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
        return host_copy(self).__reduce_ex__(protocol)

    def register_hook(self, hook: Any) -> Any:
        """As of a plain tensor; the next call of a program that uses this array traces it anew."""
        _note_change()
        return super().register_hook(hook)

    def register_post_accumulate_grad_hook(self, hook: Any) -> Any:
        """As of a plain tensor; the next call of a program that uses this array traces it anew."""
        _note_change()
        return super().register_post_accumulate_grad_hook(hook)

    def __deepcopy__(self, memo: Any) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("only arrays that no operator made can be deep-copied: call detach() first")
        value = self._storage.read().contiguous()
        new = Array(self._buffer.with_value(value), tuple(self.shape), self.dtype, requires_grad=self.requires_grad)
        memo[id(self)] = new
        vars(new).update({key: copy.deepcopy(item, memo) for key, item in vars(self).items() if key != "_storage"})
        if (grad := _grad_of(self)) is not None:
            set_grad_quietly(new, copy.deepcopy(grad, memo))
        return new

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        text = tensor_text(self.dtype, self.shape, self.sharding)
        return f"tw.Array({text} on mesh{self.mesh})" if self.mesh is not None else f"tw.Array({text}, not placed yet)"

    __str__ = __repr__


def set_grad_quietly(array: Array, value: torch.Tensor | None) -> None:
    """Sets an array's gradient without counting it as a change: for the results of runs."""
    _GRAD.__set__(array, value)


def host_copy(array: Array) -> torch.Tensor:
    """Waits for the value and returns it as a tensor, or a parameter, of plain PyTorch."""
    value = array.cpu()
    if isinstance(array, torch.nn.Parameter):
        return torch.nn.Parameter(value, requires_grad=array.requires_grad)
    return value.requires_grad_(array.requires_grad and array.is_leaf)


def _note_change() -> None:
    if not Array._is_tracing():
        Array.num_changes += 1


def _with_whole_storage(value: torch.Tensor, home: Array) -> Array:
    """Returns an array whose storage `home` may share: the value itself, or a copy that lives where `home` does."""
    if isinstance(value, Array) and not isinstance(value._storage, ViewStorage):
        return value
    _check_device(value.device)
    host = _read(value) if isinstance(value, Array) else value.detach().clone()
    return Array(home._buffer.with_value(host.contiguous()), tuple(value.shape), value.dtype)


def _read(array: Array) -> torch.Tensor:
    return array.cpu()


def _sharing(array: Array) -> Array:
    return Array(array._storage, tuple(array.shape), array.dtype, strides=array.stride())


def _view(func: Any, array: Array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns a view of an array, or several; reads nothing."""
    args, kwargs = pytree.tree_map_only(Array, _read, (args, kwargs))
    like = torch.empty_strided(array.shape, array.stride(), dtype=array.dtype, device="meta")
    found = func(like, *args, **kwargs)

    def view(result: torch.Tensor, index: int | None) -> Array:
        shape = tuple(result.shape)
        storage = ViewStorage(array._storage, ViewStep(func, args, kwargs, index), shape, result.dtype)
        return Array(storage, shape, result.dtype, strides=result.stride())

    if isinstance(found, torch.Tensor):
        return view(found, None)
    return [view(result, index) for index, result in enumerate(found)]


def _check_device(device: Any) -> None:
    if torch.device(device).type != "cpu":
        raise UserError(
            f"an array cannot go to device {device}: its slice says where it is. tw.redistribute(array, mesh) takes it "
            "to another slice, .cpu() reads it to the host, and only from there .to(device) takes it on"
        )


def _is_cast(tensor: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a copy is for another dtype or memory format (which arrays do not have), and no copy to the host."""
    return isinstance(tensor, Array) and (kwargs.get("dtype") is not None or kwargs.get("memory_format") is not None)


def _cast(array: Array, dtype: torch.dtype | None) -> Array:
    dtype = dtype or array.dtype
    if _is_same_on_slices(array.dtype, dtype) and (found := Array._cast_on_slice(array, dtype)) is not None:
        return found
    value = array.cpu().to(dtype).contiguous()
    return Array(array._buffer.with_value(value), tuple(value.shape), value.dtype)


def _is_same_on_slices(now: torch.dtype, new: torch.dtype) -> bool:
    """Whether a slice casts as the host does: there, complex numbers are pairs and large floats other integers."""
    is_to_integer = not (new.is_floating_point or new is torch.bool)
    return not (now.is_complex or new.is_complex or (now.is_floating_point and is_to_integer))


def _written(func: Any, args: Any, kwargs: Any) -> list[Array]:
    """Returns the arrays that an operator writes to."""
    found: list[Array] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Array)]
    return found


def _change(func: Any, args: Any, kwargs: Any, written: list[Array]) -> Any:
    """Calls an operator that changes arrays in place: on the host, from where the new values go back at their use."""
    if func is torch.ops.aten.set_.source_Tensor and args[0].shape == args[1].shape and args[0].dtype == args[1].dtype:
        args[0]._storage = _with_whole_storage(args[1], args[0])._storage
        _note_change()
        return args[0]
    if torch.Tag.inplace_view in func.tags or func._schema.name in _MEMORY_CHANGES:
        raise UserError(
            f"{func} would change the shape or the memory of {written[0]!r}, which is the slice's: assign the new "
            "value to its .data"
        )
    if func is torch.ops.aten.copy_.default and args[0]._storage.base is args[0]._storage:
        return _overwrite(args[0], *args[1:], **kwargs)
    with contextlib.ExitStack() as stack:
        bases = {id(array._storage.base): array._storage.base for array in written}
        for base in bases.values():
            stack.enter_context(base.undisturbed())
        return _change_bases(func, args, kwargs, bases)


def _overwrite(array: Array, source: Any, non_blocking: bool = False) -> Array:
    """Copies values over all of an array, whose old ones nobody needs to read: it may have none yet."""
    host = _read(source) if isinstance(source, Array) else source
    value = torch.empty(array.shape, dtype=array.dtype).copy_(host)
    with array._storage.undisturbed():
        array._storage.put_back(value)
    return array


def _change_bases(func: Any, args: Any, kwargs: Any, bases: dict[int, Storage]) -> Any:
    values = {key: base.take() for key, base in bases.items()}
    given: dict[int, Array] = {}

    def on_host(array: Array) -> torch.Tensor:
        value = values.get(id(array._storage.base))
        if value is None:
            return _read(array)
        host = array._storage.view_of(value)
        host = host if host is not value else host.view_as(host)
        given[id(host)] = array
        return host

    host_args, host_kwargs = pytree.tree_map_only(Array, on_host, (args, kwargs))
    shapes = {id(leaf): leaf.shape for leaf in pytree.tree_leaves((host_args, host_kwargs)) if id(leaf) in given}
    result = func(*host_args, **host_kwargs)
    for leaf in pytree.tree_leaves((host_args, host_kwargs)):
        if id(leaf) in given and leaf.shape != shapes[id(leaf)]:
            raise UserError(
                f"{func} writes a value of shape {tuple(leaf.shape)} to {given[id(leaf)]!r}; give it one of its shape"
            )
    for key, base in bases.items():
        base.put_back(values[key])
    return pytree.tree_map_only(torch.Tensor, lambda leaf: given.get(id(leaf), leaf), result)
