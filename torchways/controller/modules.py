"""Modules whose state lives on slices: `tw.function` on modules, and what `tw.pipeline` builds on.

A placed module keeps its identity and its parameters' names. Its class becomes a subclass of its old one whose
parameters are arrays, whose calls are part of a program, and whose `state_dict` reads the values back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from torchways.array import Array
from torchways.capture.state import HostContent
from torchways.capture.tracer import current_trace
from torchways.controller.buffers import HostBuffer, get_all, host_array
from torchways.errors import ShapeError, UserError

#: Attribute of a placed module's class: runs one call of it outside any program.
ENTRY = "_torchways_entry"


def arrays_of(module: torch.nn.Module) -> None:
    """Replaces all parameters and buffers of a module by arrays, in place; shared ones stay shared."""
    replaced: dict[int, Any] = {}
    for submodule in module.modules():
        for name, parameter in submodule._parameters.items():
            if parameter is not None and not isinstance(parameter, Array):
                if id(parameter) not in replaced:
                    _check_initialized(parameter, name)
                    array = host_array(parameter.detach())
                    replaced[id(parameter)] = torch.nn.Parameter(array, requires_grad=parameter.requires_grad)
                submodule._parameters[name] = replaced[id(parameter)]
        for name, buffer in submodule._buffers.items():
            if buffer is not None and not isinstance(buffer, Array):
                if id(buffer) not in replaced:
                    replaced[id(buffer)] = host_array(buffer.detach())
                submodule._buffers[name] = replaced[id(buffer)]


def make_placed(
    module: torch.nn.Module,
    call: Callable[..., Any],
    entry: Callable[[torch.nn.Module], Callable[..., Any]],
) -> None:
    """Makes `module` a placed module, in place.

    Args:
        module: any module; its parameters become arrays.
        call: called as ``call(module, plain_call, args, kwargs)`` when the module is called within a trace.
        entry: makes the program that runs a call outside any trace.
    """
    arrays_of(module)
    module.__class__ = placed_class(type(module), call)
    object.__setattr__(module, ENTRY, entry(module))


def placed_class(cls: type, call: Callable[..., Any]) -> type:
    """Returns the subclass of a module class that `make_placed` describes."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode = current_trace()
        if mode is None:
            return getattr(self, ENTRY)(*args, **kwargs)
        arrays_of(self)  # what the user has put there since
        return call(self, super(placed, self).__call__, args, kwargs)

    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        return get_all(super(placed, self).state_dict(*args, **kwargs), None)

    def load_state_dict(self: Any, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return _load(self, state, strict)

    namespace = {
        "__call__": __call__,
        "state_dict": state_dict,
        "load_state_dict": load_state_dict,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    placed: Any = type(cls.__name__, (cls,), namespace)
    return placed


def _load(module: torch.nn.Module, state: Mapping[str, Any], strict: bool) -> Any:
    """Gives a module's arrays new values; they go to their slices at their next use."""
    own = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **{
            name: buffer
            for name, buffer in module.named_buffers(remove_duplicate=False)
            if name.rsplit(".", 1)[-1] not in module.get_submodule(name.rpartition(".")[0])._non_persistent_buffers_set
        },
    }
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    if strict and (missing or unexpected):
        raise UserError(
            f"load_state_dict of {type(module).__name__}: missing keys {missing}, unexpected keys {unexpected}; "
            "pass strict=False to load what fits"
        )
    for name, array in own.items():
        if name not in state:
            continue
        value = torch.as_tensor(state[name].cpu() if isinstance(state[name], Array) else state[name])
        if tuple(value.shape) != tuple(array.shape):
            raise ShapeError(
                f"load_state_dict: {name} has shape {tuple(array.shape)} but the value {tuple(value.shape)}"
            )
        assert isinstance(array, Array)
        old = array._buffer
        content = HostContent(tuple(value.shape), array.dtype, value.detach().to(array.dtype).clone())
        array._buffer = HostBuffer(content, mesh=old.mesh, placements=old.placements)
    return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)


def _check_initialized(parameter: torch.Tensor, name: str) -> None:
    if parameter.device.type != "cpu":
        raise UserError(
            f"parameter {name} is on device {parameter.device}. Give torchways a function that builds the module, as "
            "in tw.parallelize_module(lambda: Net(), mesh), and it is initialised on its slice; or build it on the CPU"
        )
