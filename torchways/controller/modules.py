"""Modules whose state lives on slices: `tw.function` on modules, and what `tw.pipeline` builds on.

A placed module keeps its identity and its parameters' names. Its class becomes a subclass of its old one whose
parameters are arrays, whose calls are part of a program, and whose `state_dict` reads the values back.
"""

from __future__ import annotations

import contextvars
import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from torchways.array import Array, set_grad_quietly
from torchways.capture.current_trace import current_trace
from torchways.controller.buffers import HostBuffer, get_all, host_array
from torchways.errors import UserError
from torchways.mesh import Placements, VirtualSlice

#: Attribute of a placed module: runs one call of it outside any program.
ENTRY = "_torchways_entry"
#: In a module's state: what its `get_extra_state` returned.
_EXTRA_STATE = "_extra_state"
#: What torchways keeps in a module's `__dict__` begins so; copies do not have it.
_OURS = "_torchways_"
#: Where a placed module keeps that.
_KEPT = "_torchways_kept"
#: Where a placed module's parameters and buffers are expected to be used, by name.
_HOMES = "_torchways_homes"
#: All placed modules.
_placed: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
#: Parameters and buffers that could not become arrays themselves, and the arrays that took their place.
_replaced = WeakIdKeyDictionary()


#: Whether `state_dict` gives arrays, and not their values.
_is_unread = contextvars.ContextVar("is_unread", default=False)


def unread_state(module: torch.nn.Module) -> dict[str, Any]:
    """Returns what `state_dict` does, but with the arrays in it as they are: nothing is read."""
    before = _is_unread.set(True)
    try:
        return dict(module.state_dict())
    finally:
        _is_unread.reset(before)


def is_extra_state(name: str) -> bool:
    """Whether an entry of a module's state is what `get_extra_state` returned."""
    return name.rpartition(".")[2] == _EXTRA_STATE


def replaced_by(tensor: torch.Tensor) -> Array | None:
    """Returns the array that took a tensor's place in its module, where the tensor could not become it itself.

    Optimizers that were built before the module was placed still have such tensors.
    """
    array: Array | None = _replaced.get(tensor)
    return array


def arrays_of(module: torch.nn.Module) -> None:
    """Makes arrays of all parameters and buffers of a module, in place; shared ones stay shared.

    The very objects become arrays, so that whatever refers to them (an optimizer) goes on with the arrays. An object
    that others hold in ways that do not allow this is replaced; see `replaced_by`.
    """
    done: dict[int, Any] = {}
    flattened: list[Any] = [item for item in module.modules() if hasattr(item, "_flat_weight_refs")]
    for item in flattened:  # recurrent modules, whose weak references would be in the way
        item._flat_weight_refs = []
    for submodule in module.modules():
        for owner in (submodule._parameters, submodule._buffers):
            for name, tensor in owner.items():
                if tensor is not None and not isinstance(tensor, Array):
                    if id(tensor) not in done:
                        _check_initialized(tensor, name)
                        done[id(tensor)] = (_become_array(tensor), tensor)  # an id that is free is used again
                    owner[name] = done[id(tensor)][0]
    for item in flattened:
        item._init_flat_weights()
    Array.num_changes += bool(done)


def note_placed(module: torch.nn.Module) -> None:
    """Makes arrays of a module's state, and of what comes into it later."""
    arrays_of(module)
    _placed.add(module)


def take_new_state() -> None:
    """Makes arrays of parameters and buffers that have come into placed modules since: replaced layers, new buffers."""
    for module in list(_placed):
        arrays_of(module)


def _become_array(tensor: torch.Tensor) -> Any:
    """Returns a parameter or buffer as an array, the same object where that can be."""
    array: Any = host_array(tensor.detach())
    if isinstance(tensor, torch.nn.Parameter):
        array = torch.nn.Parameter(array, requires_grad=tensor.requires_grad)
    gradient = tensor.grad
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        vars(array).update(vars(tensor))
        try:
            torch.utils.swap_tensors(tensor, array)
        except RuntimeError:
            _replaced[tensor] = array
        else:
            array = tensor
    else:
        _replaced[tensor] = array
    if gradient is not None:
        set_grad_quietly(array, host_array(gradient.detach()))
    return array


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
    note_placed(module)
    module.__class__ = placed_class(type(module), call, entry)


def note_homes(module: torch.nn.Module, homes: Mapping[str, tuple[VirtualSlice, Placements]]) -> None:
    """Notes where the parameters and buffers of a placed module are expected to be used, by name."""
    vars(module)[_HOMES] = homes


def send_home(module: torch.nn.Module) -> None:
    """Says of those arrays of a module that no program has used yet that they go where they are expected to be."""
    for submodule in module.modules():
        homes = vars(submodule).get(_HOMES, {})
        for name, array in (
            *submodule.named_parameters(remove_duplicate=False),
            *submodule.named_buffers(remove_duplicate=False),
        ):
            if not isinstance(array, Array) or name not in homes:
                continue
            buffer = array._buffer
            if isinstance(buffer, HostBuffer) and buffer.mesh is None:
                mesh, placements = homes[name]
                array._buffer = HostBuffer(buffer.value, None, mesh, buffer.placements or placements)


def is_placed(module: torch.nn.Module) -> bool:
    """Whether `make_placed` has been called for a module."""
    return hasattr(type(module), ENTRY)


def placed_class(cls: type, call: Callable[..., Any], entry: Callable[[torch.nn.Module], Callable[..., Any]]) -> type:
    """Returns the subclass of a module class that `make_placed` describes."""

    def entry_of(self: Any) -> Callable[..., Any]:
        found: Callable[..., Any] | None = vars(self).get(_KEPT)
        if found is None:
            found = vars(self)[_KEPT] = entry(self)
        return found

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode = current_trace()
        if mode is None:
            return entry_of(self)(*args, **kwargs)
        return call(self, super(placed, self).__call__, args, kwargs)

    def __copy__(self: Any) -> Any:
        new = placed.__new__(type(self))
        vars(new).update({key: value for key, value in vars(self).items() if not key.startswith(_OURS)})
        return new

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        state = {key: value for key, value in vars(self).items() if not key.startswith(_OURS)}
        memo[id(self)] = new = placed.__new__(type(self))
        _placed.add(new)
        return _set_state(new, copy.deepcopy(state, memo))

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Later protocols insist on the class of what is pickled, which is the placed one.
        return _plain_copy(self, cls).__reduce_ex__(1)

    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = super(placed, self).state_dict(*args, **kwargs)
        return state if _is_unread.get() else _read_state(state)

    def load_state_dict(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("assign") or True in args[1:2]:
            raise UserError(
                f"load_state_dict of {cls.__name__} with assign=True would put other tensors in the place of the "
                "arrays on its slices; leave it out, and the values are copied into them"
            )
        return super(placed, self).load_state_dict(_read_state(state_dict), *args, **kwargs)

    namespace = {
        ENTRY: property(entry_of),
        "__call__": __call__,
        "__copy__": __copy__,
        "__reduce_ex__": __reduce_ex__,
        "state_dict": state_dict,
        "load_state_dict": load_state_dict,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    if not hasattr(cls, "__deepcopy__"):
        namespace["__deepcopy__"] = __deepcopy__
    placed: Any = type(cls.__name__, (cls,), namespace)
    return placed


def _set_state(module: Any, state: dict[str, Any]) -> Any:
    if hasattr(module, "__setstate__"):
        module.__setstate__(state)
    else:
        vars(module).update(state)
    return module


def _plain_copy(module: torch.nn.Module, cls: type) -> torch.nn.Module:
    """Returns a copy of a placed module as it was before it was placed: on the host, of its own class."""
    tensors = [*module.parameters(), *module.buffers()]
    values = get_all([tensor.detach() for tensor in tensors], None)
    memo: dict[int, Any] = {}
    for tensor, value in zip(tensors, values, strict=True):
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(value, tensor.requires_grad) if is_parameter else value
    plain: torch.nn.Module = copy.deepcopy(module, memo)
    plain.__class__ = cls
    for submodule in plain.modules():
        for hooks in (submodule._forward_hooks, submodule._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]
    return plain


def _is_ours(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torchways.")


def _read_state(state: Any) -> Any:
    """Returns a module's state with the values of the arrays in it, which are read side by side."""
    read = get_all(state, None)
    if read is not state and hasattr(state, "_metadata"):  # versions of modules
        read._metadata = state._metadata
    return read


def _check_initialized(parameter: torch.Tensor, name: str) -> None:
    if parameter.device.type != "cpu":
        raise UserError(
            f"{name} is on device {parameter.device}. Give torchways a function that builds the module, as "
            "in tw.parallelize_module(lambda: Net(), mesh), and it is initialised on its slice; or build it on the CPU"
        )
