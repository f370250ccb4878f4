"""Methods of ragged tensors that Python code calls: size, iteration, and means of rows.

A size that depends on values is a `RowCount`. Means, and losses that end in one, divide by the number of rows that
there are.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch.overrides import TorchFunctionMode

from torchways.capture.rows.loops import RowLoops
from torchways.capture.rows.ragged_tensors import RaggedTensors
from torchways.capture.rows.values import RaggedSize, RowCount, Rows, refuse


class RowsInPython(TorchFunctionMode):
    """While it is active, Python can ask a ragged tensor for its size, its rows and their mean."""

    def __init__(self, ragged: RaggedTensors, loops: RowLoops) -> None:
        super().__init__()
        self._ragged = ragged
        self._loops = loops

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MEANS and (rows := self._ragged.rows_of(args[0])) is not None:
            return _mean(rows, *args, **kwargs)
        if func in _LOSSES and any(self._ragged.rows_of(value) is not None for value in args[:2]):
            return self._loss(func, args, kwargs)
        rows = self._ragged.rows_of(args[0]) if func in _ASKED_BY_PYTHON else None
        if rows is None:
            if self._ragged.is_used and func not in _TAKE_SIZES and _holds_count((args, kwargs)):
                refuse(f"{getattr(func, '__name__', func)} of a number of rows")
            return func(*args, **kwargs)
        if func is torch.Tensor.unbind:  # which a loop over a tensor calls
            if rows.dim != (args[1] if len(args) > 1 else kwargs.get("dim", 0)):
                return func(*args, **kwargs)
            return self._loops.iterate(args[0])
        if func is torch.Tensor.__len__ and rows.dim == 0:
            refuse("len()")
        result = func(*args, **kwargs)
        shape = RaggedSize(
            RowCount.of(size, rows.read_count) if dim == rows.dim else size for dim, size in enumerate(args[0].shape)
        )
        if func in (torch.Tensor.numel, torch.Tensor.nelement):
            return shape.numel()
        if isinstance(result, torch.Size):
            return shape
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return result if dim is None else shape[dim]

    def _loss(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """Computes a loss of each element, and their mean by itself: backward divides by the number of all rows."""
        call = inspect.signature(func).bind(*args, **kwargs)
        call.apply_defaults()
        if call.arguments["reduction"] != "mean" or {
            call.arguments.get("reduce"),
            call.arguments.get("size_average"),
        } != {None}:
            return func(*args, **kwargs)
        call.arguments["reduction"] = "none"
        losses: torch.Tensor = func(*call.args, **call.kwargs)
        rows = self._ragged.rows_of(losses)
        return losses.mean() if rows is None else _mean(rows, losses)


def _mean(
    rows: Rows,
    value: torch.Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Returns a mean of as many rows as there are; PyTorch's own would divide by the number of all."""
    dims = list(range(value.dim())) if dim is None or dim == () else [dim] if isinstance(dim, int) else list(dim)
    dims = [item % value.dim() for item in dims]
    if rows.dim not in dims:
        return torch.mean(value, dims, keepdim, dtype=dtype)
    others = math.prod(size for place, size in enumerate(value.shape) if place in dims and place != rows.dim)
    total = torch.sum(value, dims, keepdim, dtype=dtype)
    return total / (rows.count * others).to(total.dtype)


def _holds_count(tree: Any) -> bool:
    return any(type(leaf) is RowCount for leaf in pytree.tree_leaves(tree))


_MEANS = {torch.mean, torch.Tensor.mean}
#: Losses whose mean PyTorch computes where no rule sees it.
_LOSSES = {
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
}
#: They put the rows of a ragged tensor into another form; all else would take their number for a value.
_TAKE_SIZES = {torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.expand, torch.reshape}
_ASKED_BY_PYTHON = {
    torch.Tensor.unbind,
    torch.Tensor.__len__,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.size,
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
}
