"""Sums to which several slices of one executor's devices add: they are added up here before they go to others."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from torchways.errors import Failure
from torchways.executor.reduce import cannot_add
from torchways.executor.runs import Task
from torchways.ids import ClientId, RunId, owner
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

    def add(self, task: Task, value: torch.Tensor | Failure, executor_id: str) -> None:
        """Adds a slice's value."""
        if not self.tasks or isinstance(value, Failure):
            self.total = value
        elif not isinstance(self.total, Failure):
            try:
                self.total = self.total + value
            except Exception as error:  # their parts are made for different shapes, or PyTorch adds no such dtype
                self.total = cannot_add(error, executor_id)
        self.tasks.append(task)


class LocalSums:
    """All sums that are not complete yet.

    Args:
        executor_id: for messages.
    """

    def __init__(self, executor_id: str) -> None:
        self._me = executor_id
        self._sums: dict[tuple[RunId, EdgeId], LocalSum] = {}

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, task: Task, edge_id: EdgeId, value: torch.Tensor | Failure, num_local: int) -> LocalSum | None:
        """Adds a slice's value; returns the sum when all slices of this executor have brought theirs."""
        key = (task.run.run_id, edge_id)
        found = self._sums.setdefault(key, LocalSum())
        found.add(task, value, self._me)
        return self._sums.pop(key) if len(found.tasks) == num_local else None

    def drop_client(self, client_id: ClientId) -> list[Task]:
        """Forgets a client's sums; returns the units that wait for them."""
        keys = [key for key in self._sums if owner(key[0]) == client_id]
        return [task for key in keys for task in self._sums.pop(key).tasks]
