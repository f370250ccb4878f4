"""State that a traced function touches beside its arguments: optimizer state, gradients, learning rates.

While a trace is open, hooks around every `Optimizer.step` put the optimizer on its tensor-only path, make its
learning rate a graph input (so that a schedule changes a value and not the graph), and turn state that the step
creates as a constant (Adam's zeros) into arrays of that constant. Everything is put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torchways.array import Array
from torchways.capture.amp import scalers
from torchways.capture.tracer import current_trace
from torchways.errors import CaptureError

#: Options that put torch.optim's optimizers on the path that reads no tensor on the host.
_TRACED_OPTIONS = {"capturable": True, "foreach": True, "fused": False}


@dataclass(frozen=True, eq=False, slots=True)
class LearningRate:
    """The learning rate of one parameter group, read anew for each run."""

    optimizer: torch.optim.Optimizer
    group_index: int

    def read(self) -> float:
        """Returns its value now."""
        return float(self.optimizer.param_groups[self.group_index]["lr"])


@dataclass(frozen=True, eq=False, slots=True)
class StateSlot:
    """A place in a Python object that a run fills with a new array.

    Attributes:
        owner: an optimizer's state of one parameter, or a parameter whose gradient it is.
        key: key in that state, or "grad".
    """

    owner: dict[str, Any] | torch.Tensor
    key: str

    def set(self, value: Any) -> None:
        """Stores `value` there."""
        if isinstance(self.owner, dict):
            self.owner[self.key] = value
        else:
            self.owner.grad = value


@dataclass(frozen=True, eq=False, slots=True)
class HostContent:
    """A value on the host: a tensor, or one number everywhere."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    content: torch.Tensor | float


@dataclass(slots=True)
class StateTracker:
    """Notes what state a trace touches, and makes traced state out of what it finds.

    Attributes:
        make_array: makes an array of a host value, to live where the given parameter lives.
        slots: places whose new value leaves the trace as an output, in output order.
        optimizers: those that stepped.
    """

    make_array: Callable[[HostContent, torch.Tensor | None], Array]
    slots: list[StateSlot] = field(default_factory=list)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    #: Learning rates when the trace first saw them, by optimizer.
    _rates: dict[int, list[Any]] = field(default_factory=dict)
    _saved_options: list[dict[str, Any]] = field(default_factory=list)
    _saved_state: dict[int, tuple[torch.optim.Optimizer, dict[Any, dict[str, Any]]]] = field(default_factory=dict)
    _created: list[tuple[StateSlot, Array]] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches every optimizer step inside."""
        hooks = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        try:
            with scalers(lambda value: self.make_array(HostContent((), value.dtype, value), None)):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def escaped(self, lifted: list[Array]) -> list[torch.Tensor]:
        """Returns the traced values that Python objects hold when the function has returned, noting where.

        Args:
            lifted: arrays that the trace read.
        """
        values: list[torch.Tensor] = []
        created = {(id(slot.owner), slot.key) for slot, _ in self._created}
        for optimizer in self.optimizers:
            for parameter_state in optimizer.state.values():
                for key, value in parameter_state.items():
                    if isinstance(value, FakeTensor) and (id(parameter_state), key) not in created:
                        self.slots.append(StateSlot(parameter_state, key))
                        values.append(value)
        for array in lifted:
            if array.requires_grad and isinstance(array.grad, FakeTensor):
                self.slots.append(StateSlot(array, "grad"))
                values.append(array.grad)
        return values

    def check_learning_rates(self) -> None:
        """Raises CaptureError where the traced function itself changed a learning rate: that would happen only once."""
        for optimizer in self.optimizers:
            if [group["lr"] for group in optimizer.param_groups] != self._rates[id(optimizer)]:
                raise CaptureError(
                    "the program changes a learning rate while it is traced, which would happen only once: call the "
                    "scheduler's step() outside the @tw.program function"
                )

    def commit(self) -> None:
        """Puts the created state's arrays where the trace's stand-ins are."""
        for slot, array in self._created:
            slot.set(array)

    def roll_back(self, lifted: list[Array]) -> None:
        """Restores all Python objects after a failed trace."""
        for optimizer, state in self._saved_state.values():
            optimizer.state.clear()
            optimizer.state.update(state)
        for array in lifted:
            if isinstance(array.grad, FakeTensor):
                array.grad = None

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        mode = current_trace()
        if mode is None:
            return
        if optimizer not in self.optimizers:
            self.optimizers.append(optimizer)
            self._rates[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
            self._saved_state[id(optimizer)] = (optimizer, {key: dict(s) for key, s in optimizer.state.items()})
        for parameter, parameter_state in optimizer.state.items():
            for key, value in parameter_state.items():
                if type(value) is torch.Tensor:  # from a loaded checkpoint
                    parameter_state[key] = self.make_array(
                        HostContent(tuple(value.shape), value.dtype, value), parameter
                    )
        self._saved_options = [
            {name: group[name] for name in ("lr", *_TRACED_OPTIONS) if name in group}
            for group in optimizer.param_groups
        ]
        mode.in_optimizer = True
        for index, group in enumerate(optimizer.param_groups):
            group.update({name: value for name, value in _TRACED_OPTIONS.items() if name in group})
            group["lr"] = mode.add_input(LearningRate(optimizer, index), (), torch.float32).fake

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        mode = current_trace()
        if mode is None:
            return
        mode.in_optimizer = False
        for group, options in zip(optimizer.param_groups, self._saved_options, strict=True):
            group.update(options)
        for parameter, parameter_state in optimizer.state.items():
            for key, value in parameter_state.items():
                constant = mode.constant_state(value) if isinstance(value, FakeTensor) else None
                if constant is not None:
                    array = self.make_array(HostContent(tuple(value.shape), value.dtype, constant), parameter)
                    mode.make_input_of(value, array)
                    self._created.append((StateSlot(parameter_state, key), array))


def hyperparameters(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """Returns all that a trace of `optimizer` took for constant: a change of it needs a new trace."""
    groups = tuple(
        tuple((name, value) for name, value in group.items() if name not in ("params", "lr", "initial_lr"))
        for group in optimizer.param_groups
    )
    return (groups, len(optimizer.state), tuple(len(group["params"]) for group in optimizer.param_groups))
