"""Memory that tensors share, and tensors as views of it.

A memory has one value at a time: the graph node of the last write. A tensor is a chain of views of a memory. When it
is read after the memory was written to, its views are taken again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Step:
    """A view of a tensor: an operator, what it gets beside the tensor, and which of its results it is."""

    func: Any
    rest: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        result = self.func(tensor, *self.rest, **self.kwargs)
        return result if self.index is None else result[self.index]


@dataclass(slots=True, eq=False)
class Memory:
    """The node of a memory's present value, and the geometry of the tensor that it was made for."""

    node: torch.fx.Node
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    version: int = 0


@dataclass(slots=True, eq=False)
class Place:
    """A tensor as views of a memory, and the node of its value when the memory had `version`."""

    memory: Memory
    steps: tuple[Step, ...]
    node: torch.fx.Node
    version: int


def place_of(tensor: Any) -> Place:
    """Returns what the recorder noted with a tensor."""
    place: Place = tensor._tw_place
    return place
