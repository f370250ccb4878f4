"""Rows between bounds that values decide: `x.split(sizes.tolist())`, `x[start:end]` and `y[start:end] = rows`.

Grouped products of experts work so: tokens are sorted by expert, and each expert computes the rows of its window. A
window is a ragged tensor (`values.py`) of all rows, of which those within mean something; rows stay where they are.
What is computed for all windows of a split is joined again by torch.cat. Nothing checks that the sizes of a split add
up to the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from torchways.capture.rows.ragged_tensors import RaggedTensors
from torchways.capture.rows.values import Rows, refuse
from torchways.errors import DataDependentError


class WindowSize:
    """An element of a list that `tolist` made of computed sizes: a tensor can be split by it, and nothing else."""

    def __init__(self, sizes: torch.Tensor, index: int) -> None:
        self.sizes = sizes
        self.index = index

    def _refuse(self, *_: Any) -> NoReturn:
        refuse("a size")

    __index__ = __int__ = __float__ = __bool__ = __neg__ = __hash__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse


class Windows(TorchFunctionMode):
    """While it is active, windows can be cut out of tensors, and written or joined."""

    def __init__(self, ragged: RaggedTensors) -> None:
        super().__init__()
        self._ragged = ragged
        #: The windows of a split, by its sizes and the number of rows.
        self._splits: dict[tuple[Any, int], list[Rows]] = {}
        #: A window by its bounds and the number of rows.
        self._slices: dict[tuple[Any, ...], Rows] = {}

    def __enter__(self) -> Any:
        self._tolist = FakeTensor.tolist
        FakeTensor.tolist = _tolist  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        FakeTensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.split, torch.Tensor.split) and _holds_sizes((args, kwargs)):
            return self._split(*args, **kwargs)
        if func is torch.cat and self._splits and (windows := self._windows_of(args[0])) is not None:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if any(rows.dim != dim % args[0][0].dim() for rows in windows):
                refuse("torch.cat")
            return _Join.apply(self._ragged, windows, *args[0])
        if func is torch.Tensor.__getitem__ and (bounds := self._bounds(args[1])) is not None:
            return _Cut.apply(self._ragged, self._slice(*bounds, args[0].shape[0]), args[0])
        if func is torch.Tensor.__setitem__ and (bounds := self._bounds(args[1])) is not None:
            self._write(args[0], self._slice(*bounds, args[0].shape[0]), args[2])
            return None
        if _holds_sizes((args, kwargs)):
            refuse(f"{getattr(func, '__name__', func)} of a size")
        return func(*args, **kwargs)

    def _split(self, value: torch.Tensor, split_size: Any, dim: int = 0) -> list[torch.Tensor]:
        sizes = split_size[0].sizes if isinstance(split_size[0], WindowSize) else None
        order = [size.index if isinstance(size, WindowSize) and size.sizes is sizes else -1 for size in split_size]
        if sizes is None or order != list(range(sizes.shape[0])):
            refuse("a split by other sizes than all of a list")
        dim %= value.dim()
        key = (self._ragged.node_of(sizes), value.shape[dim])
        if key not in self._splits:
            ends = sizes.cumsum(0)
            self._splits[key] = [
                self._window(ends[index] - sizes[index], ends[index], value.shape[dim]) for index in order
            ]
        return [_Cut.apply(self._ragged, rows.along(dim), value) for rows in self._splits[key]]

    def _window(self, start: torch.Tensor, end: torch.Tensor, size: int) -> Rows:
        positions = torch.arange(size)
        return Rows(0, size, end - start, inside=(positions >= start) & (positions < end))

    def _slice(self, start: Any, end: Any, size: int) -> Rows:
        nodes = [self._ragged.node_of(bound) if isinstance(bound, torch.Tensor) else bound for bound in (start, end)]
        key = (*nodes, size)
        if key not in self._slices:
            if size < 2:  # views could not tell it from other dimensions
                refuse("a slice of one row")
            self._slices[key] = self._window(
                torch.as_tensor(0 if start is None else start), torch.as_tensor(size if end is None else end), size
            )
        return self._slices[key]

    def _bounds(self, index: Any) -> tuple[Any, Any] | None:
        """Returns the bounds of an index that is a slice between computed ones."""
        if isinstance(index, tuple) and len(index) == 1:
            [index] = index
        if not isinstance(index, slice) or index.step not in (None, 1):
            return None
        bounds = (index.start, index.stop)
        return bounds if any(isinstance(bound, torch.Tensor) and not _is_known(bound) for bound in bounds) else None

    def _windows_of(self, tensors: Sequence[torch.Tensor]) -> list[Rows] | None:
        """Returns the windows that tensors are, if they are all windows of a split, in order."""
        found = [self._ragged.rows_of(tensor) for tensor in tensors]
        rows = [item for item in found if item is not None and item.inside is not None]
        if not rows:
            return None
        for windows in self._splits.values():
            if len(rows) == len(found) == len(windows) and all(
                one.inside is other.inside for one, other in zip(rows, windows, strict=True)
            ):
                return rows
        refuse("torch.cat of other rows than all windows of a split")

    def _write(self, target: torch.Tensor, window: Rows, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.dim() == target.dim():
            rows = self._ragged.rows_of(value)
            if rows is None or rows.inside is not window.inside or rows.dim != 0:
                refuse("an assignment to a slice of other rows")
        written = torch.where(window.valid(target.dim()), value, target)
        self._ragged.forget(written)
        target.copy_(written)


class _Cut(torch.autograd.Function):
    """A tensor as one of its windows."""

    @staticmethod
    def forward(ctx: Any, ragged: RaggedTensors, rows: Rows, value: torch.Tensor) -> torch.Tensor:
        ctx.ragged, ctx.rows = ragged, rows
        result = value.clone()
        ragged.mark(result, rows)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        [grad] = grads
        return None, None, _within(ctx.ragged, ctx.rows, grad)


class _Join(torch.autograd.Function):
    """All windows of a split as one tensor."""

    @staticmethod
    def forward(ctx: Any, ragged: RaggedTensors, windows: list[Rows], *values: torch.Tensor) -> torch.Tensor:
        ctx.ragged, ctx.windows = ragged, windows
        result = torch.zeros_like(values[0])
        ragged.forget(result)
        for rows, value in zip(windows, values, strict=True):
            result = torch.where(rows.valid(value.dim()), value, result)
            ragged.forget(result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        [grad] = grads
        return None, None, *(_within(ctx.ragged, rows, grad) for rows in ctx.windows)


def _within(ragged: RaggedTensors, rows: Rows, value: torch.Tensor) -> torch.Tensor:
    """Returns a tensor with zeros outside of a window."""
    result = torch.where(rows.valid(value.dim()), value, 0)
    ragged.forget(result)
    return result


def _tolist(value: FakeTensor) -> Any:
    """Returns what `value.tolist()` does; of a vector of computed integers, the sizes of windows."""
    if value.dim() == 0:
        return value.item()
    elements = list(value)
    if value.dim() == 1 and value.dtype == torch.int64 and not all(map(_is_known, elements)):
        return [WindowSize(value, index) for index in range(len(elements))]
    return [element.tolist() for element in elements]


def _is_known(bound: torch.Tensor) -> bool:
    try:
        bound.item()
    except DataDependentError:
        return False
    return True


def _holds_sizes(tree: Any) -> bool:
    return any(type(leaf) is WindowSize for leaf in pytree.tree_leaves(tree))
