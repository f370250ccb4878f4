"""Rewrites calls of the user's code above autograd whose operators the tracer could not capture.

- `x[mask] = value` finds the selected elements first, and how many these are depends on values. `torch.where` gives the
  same result in one shape for all masks.
- `x.fill_diagonal_` writes through strides, for which no pure form is known. `torch.where` has one.
- `x.data = value` gives a tensor other memory behind the tracer's back, which is told of it.
- `f"{x:.3f}"` formats a number, which is asked for as `x.item()` is.
- `tensor_split` reads its sizes from a tensor; here they are asked for as numbers.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.overrides import TorchFunctionMode

from torchways.capture.current_trace import current_trace


class Rewrites(TorchFunctionMode):
    """While it is active, calls run in a form that can be captured, if it gives the same result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _SET_DATA and (trace := current_trace()) is not None:
            return trace.set_data(*args)
        if func in (torch.tensor, torch.as_tensor) and isinstance(args[0], (list, tuple)) and _holds_tensors(args[0]):
            result = _stacked(args[0]).detach()
            return result.to(kwargs["dtype"]) if kwargs.get("dtype") else result
        if func is torch.Tensor.__setitem__ and _is_mask(args[1]):
            target, mask, value = args
            if isinstance(mask, tuple):
                [mask] = mask
            rest = target.dim() - mask.dim()
            if rest >= 0 and mask.shape == target.shape[: mask.dim()] and _is_same_for_all(value, target, rest):
                if not isinstance(value, torch.Tensor):
                    value = torch.full((), value, dtype=target.dtype)
                mask = mask.reshape(*mask.shape, *[1] * rest)
                target.copy_(torch.where(mask, value, target))
                return None
        if func is torch.Tensor.__format__ and len(args) == 2 and args[1] and args[0].dim() == 0:
            return format(args[0].item(), args[1])
        if func in _SPLITS and len(args) > 1 and isinstance(args[1], torch.Tensor):
            args = (args[0], args[1].tolist(), *args[2:])
        if func is torch.Tensor.fill_diagonal_ and len(args) == 2 and args[0].dim() == 2 and not kwargs.get("wrap"):
            return _fill_diagonal(*args)
        return func(*args, **kwargs)


def _holds_tensors(data: Any) -> bool:
    return any(isinstance(item, torch.Tensor) for item in pytree.tree_leaves(data))


def _stacked(data: Any) -> torch.Tensor:
    if isinstance(data, torch.Tensor):
        return data
    if not isinstance(data, (list, tuple)):
        return torch.tensor(data)
    items = list(map(_stacked, data))
    dtype = reduce(torch.promote_types, (item.dtype for item in items))
    return torch.stack([item.to(dtype) for item in items])


def _fill_diagonal(target: torch.Tensor, value: float) -> torch.Tensor:
    rows, columns = (torch.arange(size) for size in target.shape)
    return target.copy_(torch.where(rows.unsqueeze(1) == columns, torch.full((), value, dtype=target.dtype), target))


_SPLITS = {torch.tensor_split, torch.Tensor.tensor_split}

#: What sets the attribute `data`.
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def _is_mask(index: Any) -> bool:
    if isinstance(index, tuple) and len(index) == 1:
        [index] = index
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool and index.dim() > 0


def _is_same_for_all(value: Any, target: torch.Tensor, rest: int) -> bool:
    """Whether each selected element gets the same value: a number, or one of no more dimensions than an element."""
    if isinstance(value, torch.Tensor):
        return value.dtype == target.dtype and value.dim() <= rest
    return isinstance(value, (int, float))
