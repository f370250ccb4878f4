"""The result of tracing a function: a graph, and what its inputs and outputs stand for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree

from torchways.capture.python_state.tokens import TensorSource
from torchways.capture.tracing.known_values import ArgumentRead
from torchways.mesh import VirtualSlice


@dataclass(eq=False, slots=True)
class GraphInput:
    """A placeholder of a traced graph, and what it stands for."""

    node: torch.fx.Node
    #: The program's argument at this position (flattened), a tensor of Python's state, a number that is computed on the
    #: host, or the tensor itself where it is the same in each run.
    source: int | TensorSource | NumberInput | torch.Tensor
    fake: torch.Tensor


@dataclass(frozen=True, slots=True)
class NumberInput:
    """A host number as an input of the graph: the step that computes it, and the dtype that the graph wants."""

    step: int
    dtype: torch.dtype


@dataclass(slots=True)
class Trace:
    """The result of tracing a function."""

    #: Pure; its outputs are those that the function returned, `escaped`, and the new values of `written`.
    graph: torch.fx.Graph
    inputs: list[GraphInput]
    num_outputs: int
    out_spec: pytree.TreeSpec
    #: Positions of the inputs that the function changed in place.
    written: list[int] = field(default_factory=list)
    #: Positions in the flattened result, and the values there, that are not tensors.
    constants: dict[int, Any] = field(default_factory=dict)
    #: What it read of values of tensors: the trace holds for calls where these are the same.
    reads: list[ArgumentRead] = field(default_factory=list)
    #: What it gives torch.manual_seed.
    seed: int | None = None
    #: For each slice of a first replica, the slices of all replicas that have the same stage.
    replicas: dict[VirtualSlice, tuple[VirtualSlice, ...]] = field(default_factory=dict)
