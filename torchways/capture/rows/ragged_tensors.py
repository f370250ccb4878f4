"""The ragged tensors of one trace: which of its nodes have rows of unknown number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree

from torchways.capture.rows.values import Rows, refuse


class RaggedTensors:
    """The ragged tensors of one trace.

    Args:
        node_of: returns the graph node of a traced tensor.
    """

    def __init__(self, node_of: Callable[[torch.Tensor], torch.fx.Node | None]) -> None:
        self.node_of = node_of
        self._rows: dict[torch.fx.Node, Rows] = {}

    def rows_of(self, tensor: Any) -> Rows | None:
        """Returns how a tensor is ragged, or None if it is not."""
        if not self._rows or not isinstance(tensor, torch.Tensor):
            return None
        node = self.node_of(tensor)
        return self._rows.get(node) if node is not None else None

    @property
    def is_used(self) -> bool:
        """Whether the trace has ragged tensors."""
        return bool(self._rows)

    def concerns(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether one of an operator's arguments is ragged."""
        if not self._rows or func.namespace == "prim":  # which ask for a tensor's device or layout
            return False
        return any(self.rows_of(leaf) is not None for leaf in pytree.tree_leaves((args, kwargs)))

    def agree(self, result: Any, found: list[tuple[Rows, int]]) -> Any:
        """Makes results ragged as the tensors that they were computed from, if these agree."""
        if len({(dim, rows.size, id(rows.inside)) for rows, dim in found}) > 1:
            refuse("an operator on rows that two masks select")
        if found:
            [(rows, dim), *_] = found
            for tensor in pytree.tree_leaves(result):
                self.mark(tensor, replace(rows, dim=dim, mask=None, positions=None))
        return result

    def mark(self, tensor: torch.Tensor, rows: Rows) -> None:
        """Makes a tensor ragged."""
        node = self.node_of(tensor)
        assert node is not None
        self._rows[node] = rows

    def forget(self, tensor: torch.Tensor) -> None:
        """Makes a tensor one whose rows all mean something."""
        self._rows.pop(self.node_of(tensor), None)  # type: ignore[arg-type]

    def follow(self, old: torch.fx.Node, new: torch.fx.Node) -> None:
        """Notes that a tensor was written to, and is ragged as before."""
        if old in self._rows:
            self._rows.setdefault(new, self._rows[old])
