"""Operators of a program that span several slices; the partitioner turns them into nodes of the dataflow program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchways.errors import ShapeError, UserError


@torch.library.custom_op("torchways::all_reduce", mutates_args=())
def _all_reduce(values: list[torch.Tensor]) -> list[torch.Tensor]:
    total = torch.stack(values).sum(0, dtype=values[0].dtype)
    return [total.clone() for _ in values]


@_all_reduce.register_fake
def _(values: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.empty_like(value) for value in values]


def _backward(context: Any, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    # Every output holds every input once.
    return _all_reduce(list(grads))


_all_reduce.register_autograd(_backward)

#: The operator as graphs have it.
ALL_REDUCE = torch.ops.torchways.all_reduce.default


def all_reduce(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Sums tensors of several slices elementwise, inside a program. Every slice gets the sum.

    The slices exchange parts with each other (reduce-scatter and all-gather); there is no central slice. Gradients flow
    through it. The sum is computed in the order of `values`, so all slices get the same bits.

    Args:
        values: one tensor per slice, all with the same shape and dtype.

    Returns:
        The sums, in the order of `values`: item i is on the slice of ``values[i]``.

    Raises:
        UserError: `values` is empty.
        ShapeError: shapes or dtypes differ.
        PlacementError: two tensors are on the same slice (raised when the program is traced).
    """
    values = list(values)
    if not values:
        raise UserError("tw.all_reduce needs at least one tensor")
    kinds = dict.fromkeys((tuple(value.shape), value.dtype) for value in values)
    if len(kinds) > 1:
        texts = ", ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in kinds)
        raise ShapeError(f"tw.all_reduce needs tensors of one shape and dtype, not {texts}")
    return _all_reduce(values)
