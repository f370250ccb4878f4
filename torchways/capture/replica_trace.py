"""What a trace knows of the replicas of modules (parallel/replicate.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from torchways.mesh import VirtualSlice


@dataclass(slots=True)
class Leaf:
    """A parameter's copy that gathers gradients of its own.

    Attributes:
        parameter: the parameter.
        before: its gradient, when the first copy was made.
        count: number of replicas.
        copies: by number of the replica; the first replica has the parameter itself.
        reduction: what `SUM_REPLICAS` gets beside the gradients.
    """

    parameter: torch.Tensor
    before: torch.Tensor | None
    count: int
    reduction: tuple[int, str]
    copies: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class ReplicaTrace:
    """The replicas of a trace.

    Attributes:
        number: what is called now belongs to this replica; None: to all of them.
        slices: for each slice of a first replica, the slices of all replicas that have the same stage.
        running: identities of the modules a replica of which is called now.
        values: of parameters on all replicas, by identity and value of the parameter.
        leaves: where each replica works on microbatches of its own: what gathers gradients, by identity of the
            parameter; None elsewhere.
    """

    number: int | None = None
    slices: dict[VirtualSlice, tuple[VirtualSlice, ...]] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    values: dict[tuple[int, object], tuple[torch.Tensor, ...]] = field(default_factory=dict)
    leaves: dict[int, Leaf] | None = None

    @contextmanager
    def of_number(self, number: int) -> Iterator[None]:
        """What is called inside belongs to one replica."""
        outer, self.number = self.number, number
        try:
            yield
        finally:
            self.number = outer

    @contextmanager
    def calling(self, module: torch.nn.Module, number: int) -> Iterator[None]:
        """A replica of a module is called inside."""
        self.running.add(id(module))
        try:
            with self.of_number(number):
                yield
        finally:
            self.running.discard(id(module))
