"""Modes of PyTorch that hold around a call: a trace is for one combination of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from torchways.capture.source import user_line
from torchways.errors import CaptureError

#: What `ambient_modes` returns, in its order.
NAMES = (
    "gradients enabled",
    "inference mode",
    "autocast on the CPU",
    "dtype of autocast",
    "cache of autocast",
    "default dtype",
    "deterministic algorithms",
    "warnings for nondeterministic algorithms",
    "float32 matmul precision",
    "anomaly detection",
    "multithreaded backward",
    "hooks on saved tensors",
    "transforms of torch.func",
    "hooks on all modules",
    "torch function modes",
    "torch dispatch modes",
)


def ambient_modes() -> tuple[Any, ...]:
    """Returns the modes that hold now, by `NAMES`; calls with equal modes are traced alike."""
    module = torch.nn.modules.module
    hooks = (
        module._global_forward_hooks,
        module._global_forward_pre_hooks,
        module._global_backward_hooks,
        module._global_backward_pre_hooks,
    )
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_anomaly_enabled(),
        torch.autograd.is_multithreading_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._functorch.peek_interpreter_stack() is not None,
        tuple(tuple(found.values()) for found in hooks) if any(hooks) else (),
        tuple(_get_current_function_mode_stack()) if torch._C._len_torch_function_stack() else (),
        tuple(_get_current_dispatch_mode_stack()) if torch._C._len_torch_dispatch_stack() else (),
    )


def modes_changed(now: tuple[Any, ...], was: tuple[Any, ...]) -> list[str]:
    """Returns a text of the modes that differ."""
    return [
        f"{name}: {_text(one)}, was {_text(other)}"
        for name, one, other in zip(NAMES, now, was, strict=True)
        if one != other
    ]


def _text(mode: Any) -> str:
    if isinstance(mode, tuple):
        return "(" + ", ".join(_text(item) for item in mode) + ")"
    return str(mode) if isinstance(mode, (bool, str, torch.dtype, type(None))) else type(mode).__name__


@contextmanager
def no_host_randomness(name: str) -> Iterator[None]:
    """Refuses a trace that draws from Python's or numpy's generators, whose numbers would be the same in each run.

    Raises:
        CaptureError: it did; both generators are as before.
    """
    before, numpy_before = random.getstate(), np.random.get_state(legacy=False)
    yield
    numpy_now: Any = np.random.get_state(legacy=False)
    changed = []
    if random.getstate() != before:
        changed.append("random")
        random.setstate(before)
    if _numpy_state(numpy_now) != _numpy_state(numpy_before):
        changed.append("numpy.random")
        np.random.set_state(numpy_before)
    if changed:
        raise CaptureError(
            f"{name} draws numbers of {' and '.join(changed)}, which would be the same in each run, at {user_line()}: "
            "draw them outside the program and pass them as arguments, or use torch's generator (torch.rand)"
        )


def _numpy_state(state: Any) -> Any:
    return (state["state"]["pos"], state["state"]["key"].tobytes(), state["has_gauss"])
