"""Padding of host tensors to a few sizes, so that a few executables serve calls of all sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree

from torchways.array import Array
from torchways.capture.source import user_line
from torchways.controller.signatures import named_leaves
from torchways.errors import ConfigError, ShapeError, UserError

#: From an argument's name to a dimension's sizes: ``{"x": {1: [64, 128, 256]}}``.
Buckets: TypeAlias = Mapping[str, Mapping[int, Sequence[int]]]
#: One value, or one for each argument's name.
PadValue: TypeAlias = float | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Padding:
    """Pads arguments as `buckets` says; see `tw.program`.

    Raises (when made):
        ConfigError: sizes that are no ascending positive numbers, or a pad value for an argument without buckets.
    """

    buckets: Buckets
    value: PadValue = 0

    def __post_init__(self) -> None:
        for name, dims in self.buckets.items():
            for dim, sizes in dims.items():
                if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                    raise ConfigError(
                        f"buckets of dimension {dim} of {name!r} are {list(sizes)}: "
                        "give positive sizes in ascending order"
                    )
        if isinstance(self.value, Mapping) and (unknown := self.value.keys() - self.buckets.keys()):
            raise ConfigError(f"pad_value names {sorted(unknown)}, which have no buckets")

    def pad(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Returns the arguments of a call, host tensors padded at the end of dimensions that have buckets.

        Raises:
            ConfigError: no tensor of the call has a name that buckets name.
            ShapeError: a tensor has no such dimension, or is larger than its largest bucket.
            UserError: a tensor that is to be padded requires grad.
        """
        found: set[str] = set()
        leaves = []
        for name, leaf in named_leaves(function, (args, kwargs)):
            entry = next((key for key in self.buckets if _is_below(name, key)), None)
            if entry is not None and isinstance(leaf, torch.Tensor):
                found.add(entry)
                if not isinstance(leaf, Array):
                    leaf = self._pad(name, entry, leaf)
            leaves.append(leaf)
        if missing := [name for name in self.buckets if name not in found]:
            names = [name for name, leaf in named_leaves(function, (args, kwargs)) if isinstance(leaf, torch.Tensor)]
            raise ConfigError(f"buckets are given for {missing}, but the call's tensors are {names}, at {user_line()}")
        padded: tuple[Any, Any] = pytree.tree_unflatten(leaves, pytree.tree_structure((args, kwargs)))
        return padded

    def _pad(self, name: str, entry: str, tensor: torch.Tensor) -> torch.Tensor:
        shape = list(tensor.shape)
        for dim, sizes in self.buckets[entry].items():
            if not -tensor.dim() <= dim < tensor.dim():
                raise ShapeError(f"buckets name dimension {dim} of {name}, which has shape {shape}, at {user_line()}")
            fitting = [size for size in sizes if size >= tensor.shape[dim]]
            if not fitting:
                raise ShapeError(
                    f"dimension {dim} of {name} is {tensor.shape[dim]}, larger than its largest bucket {sizes[-1]} "
                    f"(buckets {list(sizes)}), at {user_line()}; add a larger one, or shorten it"
                )
            shape[dim] = fitting[0]
        if shape == list(tensor.shape):
            return tensor
        if tensor.requires_grad:
            raise UserError(
                f"{name}, at {user_line()}, requires grad, but buckets pad it: a copy of shape {shape} would get the "
                f"gradient. Pad it with torch.nn.functional.pad, or pass {name}.detach() if you need no gradient"
            )
        value = self.value.get(entry, 0) if isinstance(self.value, Mapping) else self.value
        padded = torch.full(shape, value, dtype=tensor.dtype)
        padded[tuple(slice(size) for size in tensor.shape)] = tensor.detach()
        return padded


def _is_below(name: str, entry: str) -> bool:
    """Whether a leaf is the argument, or part of it, that an entry of the buckets names."""
    return name == entry or name.startswith((f"{entry}[", f"{entry}."))
