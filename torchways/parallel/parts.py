"""Parts of a batch: which tensors are split, and how the results of parts are put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree

from torchways.errors import UserError


def is_split(leaf: Any) -> bool:
    """Whether an argument is split along dimension 0: a tensor with dimensions is."""
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0


def merged(results: list[Any], merge: Callable[[list[Any]], Any], complaint: str) -> Any:
    """Returns one pytree of those that parts return.

    Args:
        results: of the parts.
        merge: makes one leaf of those of all parts.
        complaint: the text of the error where they have different structures.

    Raises:
        UserError: they have.
    """
    flat = [pytree.tree_flatten(result) for result in results]
    spec = flat[0][1]
    if any(other != spec for _, other in flat):
        raise UserError(complaint)
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return pytree.tree_unflatten([merge(list(column)) for column in columns], spec)
