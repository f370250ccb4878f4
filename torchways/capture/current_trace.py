"""The trace under way in this thread, for code that runs inside it.

Decorated functions and modules, optimizer hooks and decompositions ask `current_trace` whether they are being traced.
`CurrentTrace` lists all that they may do with the trace. The tracer implements it; this module knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from torchways.array import Array
from torchways.capture.regions import Region
from torchways.mesh import Placements, VirtualSlice


class CurrentTrace(Protocol):
    """What code that is being traced may ask of its trace."""

    #: The region of operators that are called now.
    region: Region | None
    #: Whether an optimizer's step is running.
    in_optimizer: bool

    @property
    def inputs(self) -> Sequence[object]:
        """The inputs of the graph so far."""

    # ---- regions

    def function_call(self, mesh: VirtualSlice, name: str) -> AbstractContextManager[None]:
        """Makes all that runs inside part of one call of the compiled function `name` on `mesh`."""

    def stage(self, mesh: VirtualSlice, name: str) -> AbstractContextManager[None]:
        """Places what runs inside on `mesh`, until other stages begin within it."""

    def enter_stage(self, mesh: VirtualSlice | None, name: str = "") -> None:
        """Places what runs from here on on `mesh`, as part of whatever runs there; None: places it by its inputs."""

    def constrain(self, tensor: torch.Tensor, mesh: VirtualSlice, placements: Placements) -> torch.Tensor:
        """Returns the tensor on `mesh`, with these placements."""

    # ---- tensors

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what stands for a host tensor that is the same in each run."""

    def stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what stands for a tensor of Python's state."""

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
