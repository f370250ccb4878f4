"""Optimizers in a trace: hooks around `Optimizer.step` that let one trace serve all steps.

The hooks put the optimizer on its path that reads no tensor on the host. Its hyperparameters become numbers that each
call reads anew. State that the first step makes as a constant (Adam's zeros) becomes an array of that constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _disable_current_modes

from torchways.array import Array
from torchways.capture.current_trace import current_trace
from torchways.capture.host_content import HostContent
from torchways.capture.library.grad_scaler import scalers
from torchways.capture.python_state.gradients import gradient_of
from torchways.capture.python_state.kept_state import Write
from torchways.capture.python_state.places import Attribute, Entry, Fixed, Place
from torchways.capture.python_state.watcher import Watcher
from torchways.capture.source import user_line
from torchways.errors import CaptureError

#: Options that put torch.optim's optimizers on the path that reads no tensor on the host.
_TRACED_OPTIONS = {"capturable": True, "foreach": True, "fused": False}


@dataclass(slots=True)
class StateTracker:
    """Makes traced state out of what optimizers keep.

    Attributes:
        make_array: makes an array of a host value, to live where the given parameter lives.
        watcher: of the trace.
        replaced_by: returns the array that took the place of a parameter in its module, or None.
        optimizers: those that stepped.
    """

    make_array: Callable[[HostContent, torch.Tensor | None], Array]
    watcher: Watcher
    replaced_by: Callable[[torch.Tensor], Array | None]
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    _saved_options: list[dict[str, Any]] = field(default_factory=list)
    #: State that a step made as a constant: its parameter's state, key, array, and what stood for it in the trace.
    _created: list[tuple[torch.optim.Optimizer, Any, str, Array, Any]] = field(default_factory=list)
    #: Identities of what stood for it, and of the state that it is in; `_created` and optimizers keep both.
    _stand_ins: set[int] = field(default_factory=set)
    _new_states: set[int] = field(default_factory=set)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches every optimizer step inside."""
        hooks = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        try:
            with scalers(self._start_scaler, self._prepare):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _start_scaler(self, scaler: Any, name: str, value: torch.Tensor) -> None:
        """Makes an array of what a scaler begins with, so that the first call's trace serves all."""
        with _disable_current_modes():
            self.watcher.set_before(scaler, name, self.make_array(HostContent((), value.dtype, value), None))

    def is_created(self, write: Write) -> bool:
        """Whether a write is that of state which became an input of the trace."""
        if id(write.value) in self._stand_ins:
            return True
        # A new parameter's state: all that is in it became inputs.
        return isinstance(write.value, dict) and id(write.value) in self._new_states

    def writes_to_new_state(self, write: Write) -> Iterator[Write]:
        """Returns what a write that `is_created` leaves besides: state that is no constant."""
        if isinstance(write.value, dict):
            for key, value in write.value.items():
                if id(value) not in self._stand_ins:
                    yield Write("set", Entry(write.place, key), value)

    def commit(self) -> None:
        """Puts the created state where the trace made it, and notes what optimizers keep."""
        for optimizer, parameter, key, array, _ in self._created:
            optimizer.state[parameter][key] = array
        for optimizer in self.optimizers:
            self.watcher.note_container(self._place(optimizer, "state"), is_new=True)

    def _place(self, optimizer: torch.optim.Optimizer, name: str) -> Place:
        self.watcher.note_object(Fixed(optimizer, type(optimizer).__name__), optimizer)
        return Attribute(self.watcher.owner_of(optimizer), name)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        mode = current_trace()
        if mode is None:
            return
        if mode.loop is not None:
            raise CaptureError(f"an optimizer steps within a microbatch at {user_line()}: step after the loop")
        mode.in_optimizer = self.watcher.in_optimizer = True
        self._prepare(optimizer)
        with self.watcher.pause():
            self._saved_options = [
                {name: group[name] for name in _TRACED_OPTIONS if name in group} for group in optimizer.param_groups
            ]
            for group in optimizer.param_groups:
                group.update({name: value for name, value in _TRACED_OPTIONS.items() if name in group})

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes arrays of an optimizer's state before its first step in the trace."""
        if optimizer in self.optimizers:
            return
        with self.watcher.pause():
            self._check_parameters(optimizer)
            self.optimizers.append(optimizer)
            self._take_to_slice(optimizer)
            self._start_momentum(optimizer)
            self.watcher.note_container(self._place(optimizer, "param_groups"), free_numbers=True)
            self.watcher.note_container(self._place(optimizer, "state"))

    def _check_parameters(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, torch.optim.Adafactor):
            raise CaptureError(
                f"Adafactor reads norms of its parameters on the host in each step, at {user_line()}: a program cannot "
                "contain it; use AdamW, or RMSprop with a schedule"
            )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not isinstance(parameter, Array) and self.replaced_by(parameter) is not None:
                    raise CaptureError(
                        f"{type(optimizer).__name__} was built before its model was placed, and has a parameter of "
                        f"shape {list(parameter.shape)} that an array has replaced, at {user_line()}: build the "
                        "optimizer after tw.function, tw.pipeline or tw.parallelize_module"
                    )

    def _take_to_slice(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes arrays of state that is on the host, as from a checkpoint that was loaded."""
        for parameter, parameter_state in optimizer.state.items():
            for key, value in parameter_state.items():
                if type(value) is torch.Tensor:
                    parameter_state[key] = self.make_array(
                        HostContent(tuple(value.shape), value.dtype, value), parameter
                    )

    def _start_momentum(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives SGD's momentum zeros to start with, which is what it computes without, in one trace for all steps."""
        if type(optimizer) is not torch.optim.SGD:
            return
        for group in optimizer.param_groups:
            if group["momentum"] == 0 or group["dampening"] != 0:
                continue
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                if _has_gradient(parameter) and state.get("momentum_buffer") is None:
                    content = HostContent(tuple(parameter.shape), parameter.dtype, 0.0)
                    optimizer.state[parameter]["momentum_buffer"] = self.make_array(content, parameter)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        mode = current_trace()
        if mode is None:
            return
        mode.in_optimizer = self.watcher.in_optimizer = False
        with self.watcher.pause():
            for group, options in zip(optimizer.param_groups, self._saved_options, strict=True):
                group.update(options)
            for parameter, parameter_state in optimizer.state.items():
                for key, value in parameter_state.items():
                    constant = mode.constant_state(value) if isinstance(value, FakeTensor) else None
                    if constant is not None:
                        array = self.make_array(HostContent(tuple(value.shape), value.dtype, constant), parameter)
                        mode.make_input_of(value, array)
                        self._created.append((optimizer, parameter, key, array, value))
                        self._stand_ins.add(id(value))
                        self._new_states.add(id(parameter_state))


def _has_gradient(parameter: torch.Tensor) -> bool:
    return gradient_of(parameter) is not None  # reading it here is no condition
