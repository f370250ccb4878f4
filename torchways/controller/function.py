"""`@tw.function`: one function, or one module, as a compiled function of its own on a slice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from torchways.capture.tracer import current_trace
from torchways.controller.buffers import HostBuffer
from torchways.controller.modules import _ENTRY, arrays_of, make_placed, placed_class
from torchways.controller.program import ProgramFunction
from torchways.controller.session import Session
from torchways.errors import UserError
from torchways.mesh import VirtualSlice
from torchways.parallel.plans import Plan, placements_of


def make_function(target: Any, mesh: VirtualSlice, get_session: Callable[[], Session]) -> Any:
    """Returns `target` (a function, a module class or a module) as a compiled function on `mesh`."""
    if isinstance(target, torch.nn.Module):
        make_placed(target, _call_on(mesh), lambda module: _module_entry(module, mesh, get_session))
        return target
    if isinstance(target, type) and issubclass(target, torch.nn.Module):
        return _function_class(target, mesh, get_session)
    if callable(target):
        return _plain_function(target, mesh, get_session)
    raise UserError(f"tw.function decorates functions, nn.Module classes and modules, not {target!r}")


def make_parallel(
    module: torch.nn.Module, mesh: VirtualSlice, plan: Plan, get_session: Callable[[], Session]
) -> torch.nn.Module:
    """Places a module on `mesh`, its parameters split as `plan` says; in place.

    It is a stage and no compiled function: a training step of it is one computation, within which XLA chooses how
    activations are split; a function's forward would be a computation of its own, and all that backward needs of it an
    output with a sharding that is guessed.
    """
    placements = placements_of(module, mesh, plan)
    make_placed(module, _stage_on(mesh), lambda placed: _module_entry(placed, mesh, get_session))
    arrays: list[tuple[str, Any]] = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, array in arrays:
        array._buffer = HostBuffer(array._buffer.value, mesh=mesh.root, placements=placements[name])
    return module


def _plain_function(function: Callable[..., Any], mesh: VirtualSlice, get_session: Callable[[], Session]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        mode = current_trace()
        assert mode is not None
        with mode.function_call(mesh, function.__name__):
            return function(*args, **kwargs)

    functools.update_wrapper(run, function)
    # A call outside any program is a program of one node; within one, ProgramFunction calls `run` directly.
    return ProgramFunction(run, mesh, get_session, is_one_node=True)


def _call_on(mesh: VirtualSlice) -> Callable[..., Any]:
    def call(module: torch.nn.Module, plain_call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        mode = current_trace()
        assert mode is not None
        with mode.function_call(mesh, type(module).__name__):
            return plain_call(*args, **kwargs)

    return call


def _stage_on(mesh: VirtualSlice) -> Callable[..., Any]:
    def call(module: torch.nn.Module, plain_call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        mode = current_trace()
        assert mode is not None
        saved = mode.region
        mode.enter_stage(mesh, type(module).__name__)
        try:
            return plain_call(*args, **kwargs)
        finally:
            mode.region = saved

    return call


def _module_entry(
    module: torch.nn.Module, mesh: VirtualSlice | None, get_session: Callable[[], Session]
) -> ProgramFunction:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return module(*args, **kwargs)

    run.__name__ = type(module).__name__
    return ProgramFunction(run, mesh, get_session, is_one_node=True)


def _function_class(cls: type, mesh: VirtualSlice, get_session: Callable[[], Session]) -> type:
    placed: Any = placed_class(cls, _call_on(mesh))

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super(placed, self).__init__(*args, **kwargs)
        arrays_of(self)
        object.__setattr__(self, _ENTRY, _module_entry(self, mesh, get_session))

    placed.__init__ = __init__
    return placed
