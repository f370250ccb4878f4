"""`torch.amp.GradScaler` within a program: `torch.where` selects where eager PyTorch decides by values.

Only the slice knows whether gradients are finite. So the optimizer's step is always computed, and if a gradient was not
finite, parameters and state keep their values. The scale and its growth counter are arrays, as parameters are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.amp.grad_scaler import GradScaler
from torch.utils._python_dispatch import _disable_current_modes

from torchways.capture.current_trace import current_trace
from torchways.capture.library.replacement import Replacement, replaced
from torchways.capture.source import user_line
from torchways.errors import CaptureError


@contextmanager
def scalers(
    start: Callable[[Any, str, torch.Tensor], None], prepare: Callable[[torch.optim.Optimizer], None]
) -> Iterator[None]:
    """While it is open, scalers select, and the state of one that is used for the first time is made of arrays.

    Args:
        start: called with a scaler, the name of an attribute, and the value that it begins with.
        prepare: called with an optimizer before a step; makes its state arrays.
    """
    with ExitStack() as stack:
        for name, make in (
            ("scale", lambda original: _scaling(original, start)),
            ("step", _step_without_fused_scaling),
            ("_maybe_opt_step", lambda original: _selecting(prepare)),
        ):
            stack.enter_context(replaced(Replacement(GradScaler, name, make)))
        yield


def _scaling(original: Any, start: Callable[[Any, str, torch.Tensor], None]) -> Any:
    def scale(self: Any, outputs: Any) -> Any:
        # Before the scaler looks whether it has begun, which would be a condition.
        state = vars(self)
        if state["_enabled"] and state["_scale"] is None:
            with _disable_current_modes():
                first = torch.full((), state["_init_scale"], dtype=torch.float32)
                count = torch.full((), state["_init_growth_tracker"], dtype=torch.int32)
            start(self, "_scale", first)
            start(self, "_growth_tracker", count)
        return original(self, outputs)

    return scale


def _step_without_fused_scaling(original: Any) -> Any:
    def step(self: Any, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        state = vars(optimizer)
        is_fused = state.get("_step_supports_amp_scaling", False)  # it would unscale, and look for infinities, itself
        if is_fused:
            state["_step_supports_amp_scaling"] = False
        try:
            return original(self, optimizer, *args, **kwargs)
        finally:
            if is_fused:
                state["_step_supports_amp_scaling"] = True

    return step


def _selecting(prepare: Callable[[torch.optim.Optimizer], None]) -> Any:
    def maybe_opt_step(
        self: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        prepare(optimizer)
        return _step_or_keep(optimizer, state, args, kwargs)

    return maybe_opt_step


def _step_or_keep(optimizer: torch.optim.Optimizer, state: dict[str, Any], args: Any, kwargs: Any) -> Any:
    """Does what `GradScaler._maybe_opt_step` does; it selects instead of asking."""
    mode = current_trace()
    assert mode is not None
    is_bad = torch.stack(list(state["found_inf_per_device"].values())).sum() > 0
    with torch.no_grad():
        # On several devices, XLA on CPU was seen to make zeros of a choice between a parameter and NaN.
        for parameter in (item for group in optimizer.param_groups for item in group["params"]):
            if parameter.grad is not None:
                parameter.grad.copy_(torch.where(parameter.grad.isfinite(), parameter.grad, 0.0))
        before = {id(tensor): tensor.clone() for tensor in _held(optimizer)}
    num_inputs = len(mode.inputs)
    result = optimizer.step(*args, **kwargs)
    before.update({key: value.clone() for key, value in mode.constants_before(num_inputs).items()})
    with torch.no_grad():
        for tensor in _held(optimizer):
            is_good = (~is_bad).to(tensor.dtype)
            tensor.mul_(is_good)
            if id(tensor) in before:
                tensor.add_(before[id(tensor)] * (1 - is_good))
            else:
                raise CaptureError(
                    f"GradScaler.step at {user_line()} may skip the first step of {type(optimizer).__name__}, which "
                    "makes state of what it computes: take that step without the scaler, or use another optimizer"
                )
    return result


def _held(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Returns all that a step changes."""
    parameters = [item for group in optimizer.param_groups for item in group["params"] if item.grad is not None]
    state = [optimizer.state.get(item, {}) for item in parameters]
    return [*parameters, *(leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor))]
