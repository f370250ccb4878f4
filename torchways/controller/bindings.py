"""What the arguments of a traced program are bound to in each of its runs.

A binding is made once, when a function is traced. A run looks up the tensor or number that it stands for, and so makes
no object per argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from torchways.capture.python_state.tokens import TensorSource
from torchways.capture.tracing.trace import NumberInput
from torchways.ir.program import MadeValue
from torchways.mesh import Placements


@dataclass(frozen=True, slots=True)
class CallTensor:
    """The tensor at a position among the tensors of the call's arguments."""

    position: int


@dataclass(frozen=True, slots=True, eq=False)
class StateTensor:
    """The tensor that Python's state has where the trace found one."""

    source: TensorSource


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A tensor that the trace found, and that is the same in each run."""

    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class ComputedNumber:
    """A number that each call computes on the host: the step that computes it, and the dtype that the graph wants."""

    step: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Seed:
    """The seed of one of a run's computations that draw random numbers."""

    number: int

    def of_run(self, run_seed: int) -> bytes:
        """Returns it as int64[]; seeds of one run have nothing to do with each other (SplitMix64's finalizer)."""
        mixed = (run_seed + (self.number + 1) * 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        return ((mixed ^ (mixed >> 31)) >> 1).to_bytes(8, "little")


@dataclass(frozen=True, slots=True)
class CopyOf:
    """A copy, on another slice, of what is bound to an input that is an array (`RemoteBuffer.copies`)."""

    original: CallTensor | StateTensor | Constant


#: What an input of a traced function is bound to.
Binding: TypeAlias = CallTensor | StateTensor | Constant | CopyOf | ComputedNumber | Seed


@dataclass(frozen=True, slots=True)
class BoundArgument:
    """What an argument of a slice's part is bound to.

    Attributes:
        binding: an input of the traced function, or a value that an earlier piece of the program makes.
        placements: how it is sharded on the slice.
        donated: a run gives its buffer up.
    """

    binding: Binding | MadeValue
    placements: Placements
    donated: bool


def binding_of(source: int | TensorSource | NumberInput | torch.Tensor) -> Binding:
    """Returns the binding of an input of a trace (`GraphInput.source`)."""
    match source:
        case int():
            return CallTensor(source)
        case TensorSource():
            return StateTensor(source)
        case NumberInput():
            return ComputedNumber(source.step, source.dtype)
        case torch.Tensor():
            return Constant(source)


def binding_of_copy(binding: Binding) -> CopyOf:
    """Returns the binding of a copy of what another input is bound to, an array."""
    assert isinstance(binding, (CallTensor, StateTensor, Constant))
    return CopyOf(binding)
