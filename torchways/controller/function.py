"""`@tw.function`: one function, or one module, as a compiled function of its own on a slice."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from torchways.capture.tracer import current_trace
from torchways.controller.buffers import HostBuffer
from torchways.controller.modules import _ENTRY, arrays_of, make_placed, placed_class
from torchways.controller.program import ProgramFunction
from torchways.controller.session import Session
from torchways.controller.variants import DEFAULT_OPTIONS, VariantOptions
from torchways.errors import UserError
from torchways.mesh import VirtualSlice
from torchways.parallel.plans import Plan, placements_of


def make_function(
    target: Any, mesh: VirtualSlice, get_session: Callable[[], Session], options: VariantOptions = DEFAULT_OPTIONS
) -> Any:
    """Returns `target` (a function, a module class or a module) as a compiled function on `mesh`."""
    if isinstance(target, torch.nn.Module):
        make_placed(target, _call_on(mesh), lambda module: _module_entry(module, mesh, get_session, options))
        return target
    if isinstance(target, type) and issubclass(target, torch.nn.Module):
        return _function_class(target, mesh, get_session, options)
    if callable(target):
        return _plain_function(target, mesh, get_session, options)
    raise UserError(f"tw.function decorates functions, nn.Module classes and modules, not {target!r}")


def make_parallel(
    module: torch.nn.Module, mesh: VirtualSlice, plan: Plan, get_session: Callable[[], Session]
) -> torch.nn.Module:
    """Makes a module a compiled function on `mesh`, its parameters split as `plan` says; in place."""
    placements = placements_of(module, mesh, plan)
    make_function(module, mesh, get_session)
    arrays: list[tuple[str, Any]] = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, array in arrays:
        array._buffer = HostBuffer(array._buffer.value, mesh=mesh.root, placements=placements[name])
    return module


def _plain_function(
    function: Callable[..., Any], mesh: VirtualSlice, get_session: Callable[[], Session], options: VariantOptions
) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        mode = current_trace()
        assert mode is not None
        with mode.function_call(mesh, function.__name__):
            return function(*args, **kwargs)

    functools.update_wrapper(run, function)
    # A call outside any program is a program of one node; within one, ProgramFunction calls `run` directly.
    return ProgramFunction(run, mesh, get_session, is_one_node=True, options=options)


def _call_on(mesh: VirtualSlice) -> Callable[..., Any]:
    def call(module: torch.nn.Module, plain_call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        mode = current_trace()
        assert mode is not None
        with mode.function_call(mesh, type(module).__name__):
            return plain_call(*args, **kwargs)

    return call


def _module_entry(
    module: torch.nn.Module,
    mesh: VirtualSlice | None,
    get_session: Callable[[], Session],
    options: VariantOptions = DEFAULT_OPTIONS,
) -> ProgramFunction:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return module(*args, **kwargs)

    run.__name__ = type(module).__name__
    run.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]  # it names the arguments
    return ProgramFunction(run, mesh, get_session, is_one_node=True, options=options)


def _function_class(cls: type, mesh: VirtualSlice, get_session: Callable[[], Session], options: VariantOptions) -> type:
    placed: Any = placed_class(cls, _call_on(mesh))

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super(placed, self).__init__(*args, **kwargs)
        arrays_of(self)
        object.__setattr__(self, _ENTRY, _module_entry(self, mesh, get_session, options))

    placed.__init__ = __init__
    return placed
