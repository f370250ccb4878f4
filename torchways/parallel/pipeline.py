"""`tw.pipeline`: a module split into stages, each on a slice of its own.

Splitting only says where each operator runs: from the split point on, operators belong to the next stage's slice.
What crosses is found when the program is cut (capture/partitioning), so skip connections and tied weights need no
special care.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torchways.capture.current_trace import current_trace
from torchways.errors import PlacementError
from torchways.mesh import VirtualSlice


class SplitPoint(enum.Enum):
    """Where a stage begins, as in torch.distributed.pipelining."""

    BEGINNING = 1
    """The next stage begins with the named submodule."""
    END = 2
    """The next stage begins after the named submodule."""


def add_stages(
    module: torch.nn.Module, split_spec: Mapping[str, SplitPoint], meshes: Sequence[VirtualSlice]
) -> Callable[..., Any]:
    """Puts stage boundaries into a module; returns what runs a call of it within a trace.

    Args:
        module: the whole model.
        split_spec: submodule names, in the order in which they run.
        meshes: slice of each stage, one more than split points.

    Raises:
        PlacementError: a name does not exist, or the numbers do not fit.
    """
    check_stages(module, split_spec, meshes)
    add_boundaries(module, split_spec, [meshes])
    return stage_call(meshes[0], "stage0", 0)


def add_boundaries(
    module: torch.nn.Module, split_spec: Mapping[str, SplitPoint], stages: Sequence[Sequence[VirtualSlice]]
) -> None:
    """Puts stage boundaries into a module; `stages` has the slices of each replica's stages."""
    names = dict(module.named_modules())
    for stage_index, (name, point) in enumerate(split_spec.items(), start=1):
        _add_boundary(names[name], point, [meshes[stage_index] for meshes in stages], stage_index)


def stage_call(mesh: VirtualSlice, name: str, stage_index: int = -1) -> Callable[..., Any]:
    """Returns what runs a call of a module within a trace as a stage on `mesh`, until other stages begin within it."""

    def call(module: torch.nn.Module, plain_call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        mode = current_trace()
        assert mode is not None
        with mode.stage(mesh, name, stage_index):
            return plain_call(*args, **kwargs)

    return call


def check_stages(module: torch.nn.Module, split_spec: Mapping[str, SplitPoint], meshes: Sequence[VirtualSlice]) -> None:
    """Raises PlacementError where a name does not exist, or the numbers do not fit."""
    if len(meshes) != len(split_spec) + 1:
        raise PlacementError(
            f"tw.pipeline: {len(split_spec)} split points make {len(split_spec) + 1} stages, but there are "
            f"{len(meshes)} meshes; give one mesh a stage"
        )
    names = dict(module.named_modules())
    for name in split_spec:
        if name not in names:
            known = ", ".join(list(names)[1:12])
            raise PlacementError(f"tw.pipeline: the module has no submodule {name!r}; it has {known}, ...")


def stages_of(module: torch.nn.Module, split_spec: Mapping[str, SplitPoint]) -> dict[str, int]:
    """Returns the stage of every parameter and buffer, by name: submodules run in the order of their registration."""
    stage = 0
    ended = ""
    found: dict[str, int] = {}
    for name, submodule in module.named_modules():
        if ended and not name.startswith(ended + "."):
            stage, ended = stage + 1, ""
        point = split_spec.get(name)
        stage += point is SplitPoint.BEGINNING
        ended = name if point is SplitPoint.END else ended
        for key, _ in (*submodule.named_parameters(recurse=False), *submodule.named_buffers(recurse=False)):
            found[f"{name}.{key}" if name else key] = stage
    return found


def _add_boundary(
    submodule: torch.nn.Module, point: SplitPoint, meshes: Sequence[VirtualSlice], stage_index: int
) -> None:
    def enter(*_: Any) -> None:
        mode = current_trace()
        if mode is not None:
            mesh = meshes[(mode.replicas.number or 0) % len(meshes)]  # a replica's, or all replicas' one
            mode.enter_stage(mesh, f"stage{stage_index}", stage_index)

    if point is SplitPoint.BEGINNING:
        submodule.register_forward_pre_hook(enter)
    else:
        submodule.register_forward_hook(enter)
