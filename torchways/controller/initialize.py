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
from torchways.controller.program import ProgramFunction
from torchways.controller.session import Session
from torchways.errors import UserError
from torchways.mesh import Placements, VirtualSlice

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
        for item in made:
            mesh, placements = homes.get(item.names[0] if item.names else "", default)
            if not item.names:
                placements = ("R",) * mesh.root.ndim
            results.append(mode.constrain(item.tensor.detach(), mesh, placements))
        return results

    arrays = ProgramFunction(initialize, None, get_session)()
    for item, array in zip(made, arrays, strict=True):
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
