"""Modules that are initialised on their slices: a module is built within a program, whose results are its state.

Nothing is drawn or filled on the controller, which holds no more than shapes. A parameter is made where it is to live
and split as its plan says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from torchways.capture.current_trace import current_trace
from torchways.capture.source import user_line
from torchways.controller.buffers import empty_array
from torchways.controller.program import ProgramFunction
from torchways.controller.session import Session
from torchways.errors import UserError
from torchways.mesh import Placements, VirtualSlice

_EMPTY = torch.ops.aten.empty.memory_format

#: Says where a module's tensors go: slice and placements, by all of their names.
Place = Callable[[torch.nn.Module], dict[str, tuple[VirtualSlice, Placements]]]


@dataclass(eq=False, slots=True)
class _Made:
    """A tensor that a module's constructor made, and everything that refers to it."""

    tensor: torch.Tensor
    names: list[str] = field(default_factory=list)
    owners: list[tuple[dict[str, Any], str]] = field(default_factory=list)


def build_on_slices(
    build: Callable[[], torch.nn.Module], place: Place, get_session: Callable[[], Session]
) -> torch.nn.Module:
    """Calls `build` within a program; returns the module that it made, whose state are arrays.

    What `build` leaves empty, to be loaded, is zero and takes no memory before its first use.

    Args:
        build: returns a new module; traced, so it may do what a program may do.
        place: see `Place`; called with the module once it is built.
        get_session: the session to run in.

    Raises:
        CaptureError: `build` cannot be captured.
        UserError: `build` returns no module.
    """
    built: list[torch.nn.Module] = []
    made: list[_Made] = []
    #: Tensors that have no values yet: of which slice, and how they are split.
    empty: dict[int, tuple[VirtualSlice, Placements]] = {}

    def initialize() -> list[torch.Tensor]:
        mode = current_trace()
        assert mode is not None
        module = build()
        if not isinstance(module, torch.nn.Module):
            raise UserError(f"{build!r} must return a module, not {type(module).__name__}, at {user_line()}")
        built.append(module)
        made.extend(_state_of(module))
        homes = place(module)
        if not homes:
            raise UserError(
                f"{type(module).__name__} has neither parameters nor buffers to build on a slice, at {user_line()}: "
                "give the module itself"
            )
        default = next(iter(homes.values()))
        results = []
        for number, item in enumerate(made):
            mesh, placements = homes.get(item.names[0] if item.names else "", default)
            if not item.names:
                placements = ("R",) * mesh.root.ndim
            node = mode.node_of(item.tensor)
            if node is not None and node.target is _EMPTY:
                empty[number] = mesh.root, placements
                continue
            results.append(mode.constrain(item.tensor.detach(), mesh, placements))
        return results

    computed = iter(ProgramFunction(initialize, None, get_session)())
    for number, item in enumerate(made):
        array = (
            empty_array(tuple(item.tensor.shape), item.tensor.dtype, *empty[number])
            if number in empty
            else next(computed)
        )
        value = (
            torch.nn.Parameter(array, item.tensor.requires_grad)
            if isinstance(item.tensor, torch.nn.Parameter)
            else array
        )
        for owner, key in item.owners:
            owner[key] = value
    return built[0]


def _state_of(module: torch.nn.Module) -> list[_Made]:
    """Returns the traced tensors of a module: parameters, buffers, and other attributes that are tensors."""
    found: dict[int, _Made] = {}
    for prefix, submodule in module.named_modules():
        for owner in (submodule._parameters, submodule._buffers, vars(submodule)):
            for key, value in owner.items():
                if isinstance(value, FakeTensor):
                    item = found.setdefault(id(value), _Made(value))
                    item.owners.append((owner, key))
                    if owner is not vars(submodule):
                        item.names.append(f"{prefix}.{key}" if prefix else key)
    return list(found.values())
