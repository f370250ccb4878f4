"""The trace under way in this thread, for code that runs inside it.

Decorated functions and modules, optimizer hooks and decompositions ask `current_trace` whether they are being traced.
`CurrentTrace` lists all that they may do with the trace. The tracer implements it; this module knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from torchways.array import Array
from torchways.capture.regions import LoopLabel, Region
from torchways.capture.replica_trace import ReplicaTrace
from torchways.mesh import Placements, VirtualSlice
from torchways.schedules import Schedule


class MicrobatchTrace(Protocol):
    """A loop over microbatches that is being traced; see `torchways.capture.tracing.microbatches`."""

    def body(self, call: Callable[[torch.Tensor], Any], *, is_remainder: bool) -> None:
        """Traces a turn."""

    def results(self) -> Any:
        """Returns the results of all microbatches; a turn returns a list, of those of each replica."""


class CurrentTrace(Protocol):
    """What code that is being traced may ask of its trace."""

    #: The region of operators that are called now.
    region: Region | None
    #: Whether an optimizer's step is running.
    in_optimizer: bool
    #: The loop over microbatches whose body is being traced, and the number of the body.
    loop: tuple[LoopLabel, int] | None

    @property
    def replicas(self) -> ReplicaTrace:
        """What it knows of replicas."""

    @property
    def inputs(self) -> Sequence[object]:
        """The inputs of the graph so far."""

    def node_of(self, tensor: Any) -> torch.fx.Node | None:
        """Returns the node of a tensor's present value, or None if it is none of this trace's."""

    def noting_writes_to_others(self) -> AbstractContextManager[dict[object, str]]:
        """Notes memory that was there before and is written to inside, with the line that does; known at the end."""

    # ---- regions

    def unplaced(self) -> AbstractContextManager[None]:
        """Has what is called inside run wherever it is needed."""

    def placed(self, mesh: VirtualSlice) -> AbstractContextManager[None]:
        """Has what is called inside run on `mesh`, outside of the call under way."""

    def function_call(self, mesh: VirtualSlice, name: str) -> AbstractContextManager[None]:
        """Makes all that runs inside part of one call of the compiled function `name` on `mesh`."""

    def stage(self, mesh: VirtualSlice, name: str, stage_index: int = -1) -> AbstractContextManager[None]:
        """Places what runs inside on `mesh`, until other stages begin within it."""

    def enter_stage(self, mesh: VirtualSlice | None, name: str = "", stage_index: int = -1) -> None:
        """Places what runs from here on on `mesh`, as part of whatever runs there; None: places it by its inputs.

        Args:
            stage_index: number of the pipeline's stage that begins here; -1: of none.
        """

    def microbatches(
        self, function: Callable[..., Any], num_turns: int, num_whole: int, schedule: str | Schedule
    ) -> AbstractContextManager[MicrobatchTrace]:
        """Opens a loop over microbatches.

        Args:
            function: the user's, which is called for each.
            num_turns: number of microbatches.
            num_whole: how many of them are not smaller than the others.
            schedule: the order in which a pipeline's slices work on them.
        """

    def constrain(self, tensor: torch.Tensor, mesh: VirtualSlice, placements: Placements) -> torch.Tensor:
        """Returns the tensor on `mesh`, with these placements."""

    # ---- tensors

    def leaf_copy(self, parameter: torch.Tensor, number: int) -> torch.Tensor:
        """Returns a copy of a parameter, on the slice of a replica, that gathers gradients of its own."""

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what stands for a host tensor that is the same in each run."""

    def stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what stands for a tensor of Python's state."""

    def set_data(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Gives a tensor the memory of another, as assigning to its `data` does."""

    def assigned_data(self) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Returns the arrays whose `data` were assigned, each with what stands for it now."""

    def value_of(self, tensor: torch.Tensor) -> object:
        """Returns what a tensor's value is now: the same object until it is written to."""

    def constant_state(self, tensor: torch.Tensor) -> float | None:
        """Returns the value that all elements of `tensor` had when an optimizer's step made it, if it had one."""

    def make_input_of(self, tensor: Any, array: Array) -> None:
        """Makes the constant that became `tensor` a graph input that stands for `array`."""

    def constants_before(self, first: int) -> Mapping[int, torch.Tensor]:
        """Returns the values, before the graph changes them, of constants that became inputs.

        Args:
            first: number of the first of these inputs.

        Returns:
            The values, by the identity of what stands for the changed constant.
        """


_current: ContextVar[CurrentTrace | None] = ContextVar("torchways_trace", default=None)


def current_trace() -> CurrentTrace | None:
    """Returns the trace under way in this thread, if any."""
    return _current.get()


@contextmanager
def as_current_trace(trace: CurrentTrace) -> Iterator[None]:
    """Makes `trace` the one under way, for what runs inside."""
    token = _current.set(trace)
    try:
        yield
    finally:
        _current.reset(token)
