"""`@tw.function`: one function, or one module, as a compiled function of its own on a slice."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torchways.capture.current_trace import current_trace
from torchways.controller.buffers import HostBuffer
from torchways.controller.initialize import build_on_slices
from torchways.controller.modules import is_placed, make_placed, note_homes, note_placed, placed_class
from torchways.controller.program import ProgramFunction
from torchways.controller.session import Session
from torchways.controller.variants import DEFAULT_OPTIONS, VariantOptions
from torchways.errors import PlacementError, UserError
from torchways.mesh import Placements, VirtualSlice, normalize_placements
from torchways.parallel.pipeline import (
    SplitPoint,
    add_boundaries,
    add_stages,
    check_stages,
    stage_call,
    stages_of,
)
from torchways.parallel.plans import PlanOrMaker, add_constraints, placements_of, plan_of
from torchways.parallel.replicate import Reduction, check_replicas, note_replicas, replica_call


def make_function(
    target: Any, mesh: VirtualSlice, get_session: Callable[[], Session], options: VariantOptions = DEFAULT_OPTIONS
) -> Any:
    """Returns `target` (a function, a module class or a module) as a compiled function on `mesh`."""
    if isinstance(target, torch.nn.Module):
        make_placed(target, _call_on(mesh), lambda module: _module_entry(module, mesh, get_session, options))
        note_homes(target, {name: (mesh.root, texts) for name, texts in placements_of(target, mesh, {}).items()})
        return target
    if isinstance(target, type) and issubclass(target, torch.nn.Module):
        return _function_class(target, mesh, get_session, options)
    if callable(target):
        return _plain_function(target, mesh, get_session, options)
    raise UserError(f"tw.function decorates functions, nn.Module classes and modules, not {target!r}")


def make_parallel(
    target: torch.nn.Module | Callable[[], torch.nn.Module],
    mesh: VirtualSlice,
    plan: PlanOrMaker | None,
    get_session: Callable[[], Session],
) -> torch.nn.Module:
    """Places a module, or what `target` builds, on `mesh`, its parameters split as `plan` says.

    It is a stage and no compiled function: forward and backward are one computation, within which XLA chooses how
    activations are split; a function's forward would be a computation of its own, and all that backward needs of it an
    output with a sharding that is guessed.
    """

    def place(module: torch.nn.Module) -> dict[str, tuple[VirtualSlice, Placements]]:
        placements = placements_of(module, mesh, plan_of(module, mesh, plan))
        return {name: (mesh.root, texts) for name, texts in placements.items()}

    module = target if isinstance(target, torch.nn.Module) else build_on_slices(target, place, get_session)
    homes = place(module)
    add_constraints(module, mesh, plan_of(module, mesh, plan), _constrain_here)
    make_placed(
        module, stage_call(mesh, type(module).__name__), lambda placed: _module_entry(placed, mesh, get_session)
    )
    _place_host_state(module, homes)
    return module


def make_pipeline(
    target: torch.nn.Module | Callable[[], torch.nn.Module],
    split_spec: Mapping[str, SplitPoint],
    meshes: Sequence[VirtualSlice],
    plan: PlanOrMaker | None,
    get_session: Callable[[], Session],
) -> torch.nn.Module:
    """Splits a module, or what `target` builds, into stages; see `tw.pipeline`."""

    def placements(module: torch.nn.Module) -> dict[str, Placements]:
        axes = {mesh.mesh_dim_names for mesh in meshes}
        if plan is not None and len(axes) > 1:
            raise PlacementError(
                f"tw.pipeline: one plan is for meshes with the same axes, not {' and '.join(map(str, sorted(axes)))}"
            )
        actual = plan_of(module, meshes[0], plan)
        by_stage = [placements_of(module, mesh, actual) for mesh in meshes]
        return by_stage[0]

    def place(module: torch.nn.Module) -> dict[str, tuple[VirtualSlice, Placements]]:
        check_stages(module, split_spec, meshes)
        stages, texts = stages_of(module, split_spec), placements(module)
        return {name: (meshes[stage].root, texts[name]) for name, stage in stages.items()}

    module = target if isinstance(target, torch.nn.Module) else build_on_slices(target, place, get_session)
    call = add_stages(module, split_spec, meshes)
    expected = place(module)
    homes: dict[str, tuple[VirtualSlice | None, Placements]] = {}  # the slice is that of whoever uses it
    if plan is not None:
        add_constraints(module, meshes[0], plan_of(module, meshes[0], plan), _constrain_here)
        homes = {name: (None, texts) for name, (_, texts) in expected.items()}
    make_placed(module, call, lambda placed: _module_entry(placed, None, get_session))
    _place_host_state(module, homes)
    note_homes(module, expected)
    return module


def make_replicated(
    target: torch.nn.Module | Callable[[], torch.nn.Module],
    stages: Sequence[Sequence[VirtualSlice]],
    split_spec: Mapping[str, SplitPoint],
    plan: PlanOrMaker | None,
    reduction: Reduction,
    get_session: Callable[[], Session],
) -> torch.nn.Module:
    """Places a module, or what `target` builds, on the first replica's slices, to be copied to the others."""
    check_replicas(stages)

    def place(module: torch.nn.Module) -> dict[str, tuple[VirtualSlice, Placements]]:
        check_stages(module, split_spec, stages[0])
        actual = plan_of(module, stages[0][0], plan)
        texts, *_ = [placements_of(module, mesh, actual) for row in stages for mesh in row]
        return {name: (stages[0][stage].root, texts[name]) for name, stage in stages_of(module, split_spec).items()}

    module = target if isinstance(target, torch.nn.Module) else build_on_slices(target, place, get_session)
    homes = place(module)
    add_boundaries(module, split_spec, stages)
    add_constraints(module, stages[0][0], plan_of(module, stages[0][0], plan), _constrain_here)
    call = replica_call(stages, reduction, {name: mesh for name, (mesh, _) in homes.items()})
    make_placed(module, call, lambda placed: _module_entry(placed, None, get_session))
    note_replicas(module, len(stages))
    _place_host_state(module, homes)
    return module


def _place_host_state(module: torch.nn.Module, homes: Mapping[str, tuple[VirtualSlice | None, Placements]]) -> None:
    """Says where those arrays of a module go that are still on the host.

    Arrays of submodules that were placed before, on slices of their own, go there: these run them.
    """
    state: list[tuple[str, Any]] = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    inner = [submodule for submodule in module.modules() if submodule is not module and is_placed(submodule)]
    theirs = {id(array) for submodule in inner for array in (*submodule.parameters(), *submodule.buffers())}
    for name, array in state:
        if id(array) in theirs and isinstance(array._buffer, HostBuffer) and array._buffer.mesh is not None:
            continue
        if isinstance(array._buffer, HostBuffer) and name in homes:
            mesh, placements = homes[name]
            array._buffer = HostBuffer(array._buffer.value, mesh=mesh or array._buffer.mesh, placements=placements)


def _constrain_here(tensor: torch.Tensor, placements: Sequence[Any]) -> torch.Tensor:
    """Constrains a tensor on the slice of the module that is being called."""
    mode = current_trace()
    if mode is None or mode.region is None or mode.region.mesh is None:
        return tensor
    mesh = mode.region.mesh
    return mode.constrain(tensor, mesh, normalize_placements(placements, mesh, tensor.shape))


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
    placed: Any = placed_class(cls, _call_on(mesh), lambda module: _module_entry(module, mesh, get_session, options))

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super(placed, self).__init__(*args, **kwargs)
        note_placed(self)

    placed.__init__ = __init__
    return placed
