"""Rows of values: several values as one, and what is taken out of it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

aten = torch.ops.aten

#: Adds an operator to a graph: (operator, its arguments, the shape that it gives).
AddOperator: TypeAlias = Callable[..., torch.fx.Node]


def put_in_a_row(add: AddOperator, values: Sequence[torch.fx.Node]) -> list[torch.fx.Node]:
    """Adds the operators that flatten values and put them behind each other; the last of them gives the row."""
    made, parts = [], []
    for value in values:
        shape = value.meta["val"].shape
        copy = add(aten.clone.default, value, shape=shape)
        parts.append(add(aten.view.default, copy, [-1], shape=[shape.numel()]))
        made += [copy, parts[-1]]
    if len(values) > 1:
        made.append(add(aten.cat.default, parts, shape=[sum(part.meta["val"].numel() for part in parts)]))
    return made


def take_out(add: AddOperator, row: torch.fx.Node, shapes: Sequence[Sequence[int]]) -> list[torch.fx.Node]:
    """Adds the operators that take values of these shapes out of a row; returns them."""
    start, found = 0, []
    for shape in map(list, shapes):
        part, end = row, start + math.prod(shape)
        if len(shapes) > 1:
            part = add(aten.slice.Tensor, row, 0, start, end, shape=[end - start])
        found.append(add(aten.view.default, part, shape, shape=shape))
        start = end
    return found


def nbytes(node: torch.fx.Node) -> int:
    """Returns the bytes of a node's value, or of all of them if it gives several."""
    value = node.meta["val"]
    items = value if isinstance(value, (list, tuple)) else [value]
    return sum(int(item.numel() * item.element_size()) for item in items)
