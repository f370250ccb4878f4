"""Sums to which several slices of one executor's devices add: they are added up here before they go to others."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from torchways.errors import Failure
from torchways.executor.runs import Task
from torchways.ids import RunId
from torchways.ir.part import EdgeId


@dataclass(slots=True)
class LocalSum:
    """What the slices of this executor have brought to a sum so far.

    Attributes:
        tasks: the units that brought it.
        total: the sum of their values, or why there is none.
    """

    tasks: list[Task] = field(default_factory=list)
    total: torch.Tensor | Failure = field(default_factory=lambda: torch.empty(0))

    def add(self, task: Task, value: torch.Tensor | Failure) -> None:
        """Adds a slice's value."""
        if not self.tasks or isinstance(value, Failure):
            self.total = value
        elif not isinstance(self.total, Failure):
            self.total = self.total + value
        self.tasks.append(task)


class LocalSums:
    """All sums that are not complete yet."""

    def __init__(self) -> None:
        self._sums: dict[tuple[RunId, EdgeId], LocalSum] = {}

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, task: Task, edge_id: EdgeId, value: torch.Tensor | Failure, num_local: int) -> LocalSum | None:
        """Adds a slice's value; returns the sum when all slices of this executor have brought theirs."""
        key = (task.run.run_id, edge_id)
        found = self._sums.setdefault(key, LocalSum())
        found.add(task, value)
        return self._sums.pop(key) if len(found.tasks) == num_local else None
