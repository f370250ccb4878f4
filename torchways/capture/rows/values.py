"""Rows of unknown number as values: which rows of a tensor mean something, and how many there are.

A tensor of such rows is *ragged*: it has as many rows as there can be, and what stands in its other rows means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from torchways.capture.source import user_line
from torchways.errors import DataDependentError


@dataclass(frozen=True, slots=True)
class Rows:
    """Which dimension of a tensor is ragged.

    Attributes:
        dim: the dimension.
        size: the tensor's size there.
        count: how many rows mean something: a traced integer of no dimensions.
        mask: the mask of one dimension that selected the rows, as it was where that is known.
        positions: the rows if all of them were selected, in the shape of the tensor; not traced.
        inside: which rows mean something, if these are not the first ones (`windows.py`).
    """

    dim: int
    size: int
    count: torch.Tensor
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    inside: torch.Tensor | None = None

    def valid(self, num_dims: int, dim: int | None = None) -> torch.Tensor:
        """Returns which rows mean something, in a shape that broadcasts to a tensor of `num_dims` dimensions."""
        shape = [1] * num_dims
        shape[self.dim if dim is None else dim] = self.size
        valid = torch.arange(self.size) < self.count if self.inside is None else self.inside
        return valid.reshape(shape)

    def along(self, dim: int) -> Rows:
        """Returns the same rows of a tensor that has them along another dimension."""
        return replace(self, dim=dim)

    def read_count(self) -> int:
        """Returns how many rows there are.

        Raises:
            DataDependentError: that depends on computed values.
        """
        try:
            return int(self.count.item())
        except DataDependentError:
            refuse("arithmetic with a number of rows")


class RowCount(int):
    """The number of rows of a ragged tensor, as far as Python may know it.

    Asked whether there are any rows, it says yes: what is computed on none has no effect. It can be used as a size. All
    other operations ask for the number itself, which is known if the mask is.
    """

    _read: Callable[[], int]

    @classmethod
    def of(cls, most: int, read: Callable[[], int]) -> RowCount:
        """Returns a count that is `most` where Python takes it for a size, and which `read` asks for."""
        count = cls(most)
        count._read = read
        return count

    def _is_more_than(self, other: Any) -> bool:
        return True if other == 0 else self._read() > other

    def _is_at_least(self, other: Any) -> bool:
        return True if other == 1 else self._read() >= other

    def _is_not(self, other: Any) -> bool:
        return True if int(other) == 0 else self._read() != other

    __gt__ = _is_more_than
    __ge__ = _is_at_least
    __ne__ = _is_not
    __hash__ = int.__hash__

    def __lt__(self, other: Any) -> bool:
        return not self._is_at_least(other)

    def __le__(self, other: Any) -> bool:
        return not self._is_more_than(other)

    def __eq__(self, other: Any) -> bool:
        return not self._is_not(other)


def _with_number(name: str) -> Any:
    operator = getattr(int, name)

    def compute(count: RowCount, *others: Any) -> Any:
        return operator(count._read(), *map(_number, others))

    return compute


def _number(value: Any) -> Any:
    return value._read() if isinstance(value, RowCount) else value


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    for _prefix in ("__", "__r"):
        setattr(RowCount, f"{_prefix}{_name}__", _with_number(f"{_prefix}{_name}__"))
for _name in ("float", "neg"):
    setattr(RowCount, f"__{_name}__", _with_number(f"__{_name}__"))


class RaggedSize(tuple[int, ...]):
    """A shape with a `RowCount` in it, of which torch.Size would make a number."""

    def numel(self) -> RowCount:
        """Returns the number of elements."""
        return RowCount.of(math.prod(map(int, self)), lambda: math.prod(map(_number, self)))


def refuse(operator: str) -> NoReturn:
    """Raises the error for what needs to know how many rows there are."""
    raise DataDependentError(
        f"{operator} at {user_line()} needs to know how many rows a mask selects, which depends on values; "
        "select with torch.where, or return the tensor and decide outside the program"
    )
