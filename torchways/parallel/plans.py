"""Sharding plans: how the parameters of a module are split over the axes of a slice.

A plan is a mapping that can be read and edited: from patterns of parameter names to placements, by axis
(``{"*.wq.weight": {"tp": Shard(0)}}``), one an axis (``[Replicate(), Shard(0)]``), or as a partition spec, one entry a
dimension (``("tp", None)``). The first pattern that fits a name holds; what no pattern fits is replicated. A pattern of
submodule names that ends in ":input" or ":output" constrains what these modules take or give
(``{"layers.*:output": ("dp", "tp", None)}``). A plan says where values live, never what is computed: XLA adds the
collectives that a split needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch.distributed.tensor import Shard

from torchways.errors import PlacementError
from torchways.mesh import Placements, VirtualSlice, normalize_placements, tensor_text

#: Placements of one parameter: by axis name, or one an axis.
Entry: TypeAlias = Mapping[str, Any] | Sequence[Any]
Plan: TypeAlias = Mapping[str, Entry]
#: A plan, or what makes one of a module and its slice, as `fully_shard` does.
PlanOrMaker: TypeAlias = Plan | Callable[[torch.nn.Module, VirtualSlice], Plan]

_ENDS = ("input", "output")

#: Last parts of the names of modules that split what they make (column-wise), and of those that take what is split
#: (row-wise), in the transformers of torchtitan, Llama and its relatives, GPT-2, T5, BERT, OPT and ViT.
_COLUMN_WISE = (
    *("wq", "wk", "wv", "w1", "w3", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "c_fc"),
    *("q", "k", "v", "wi", "wi_0", "wi_1", "query", "key", "value", "intermediate.dense"),
)
_ROW_WISE = (
    *("wo", "w2", "o_proj", "out_proj", "down_proj", "fc2", "mlp.c_proj", "o"),
    *("attention.output.dense", "output.dense"),
)


def tensor_parallel(module: torch.nn.Module, mesh: VirtualSlice, *, axis: str = "tp") -> dict[str, dict[str, Any]]:
    """Returns a plan for Megatron-style tensor parallelism: pairs of column-wise and row-wise layers.

    Layers are recognised by their names, those of common transformers. A layer whose size is not a multiple of the
    axis size is not split. If your module uses other names, print the plan and edit it.

    Raises:
        PlacementError: `mesh` has no such axis.
    """
    size = _axis_size(mesh, axis)
    plan: dict[str, dict[str, Any]] = {}
    for name, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        is_column = _ends_with(name, _COLUMN_WISE)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not (is_column or _ends_with(name, _ROW_WISE)):
            continue
        if isinstance(layer, torch.nn.Embedding):
            continue
        # A Linear's weight is [out, in]; the Conv1D of GPT-2 is [in, out].
        is_transposed = not isinstance(layer, torch.nn.Linear)
        dim = int(is_column == is_transposed)
        if weight.shape[dim] % size:
            continue
        plan[f"{name}.weight"] = {axis: Shard(dim)}
        if is_column and getattr(layer, "bias", None) is not None:
            plan[f"{name}.bias"] = {axis: Shard(0)}
    return plan


def fully_shard(
    module: torch.nn.Module, mesh: VirtualSlice, *, axis: str = "dp", plan: Plan | None = None
) -> dict[str, dict[str, Any]]:
    """Returns a plan that splits every parameter over `axis`, as FSDP and ZeRO-3 do.

    The longest dimension that divides evenly is split. XLA adds the communication, because the data is split over the
    same axis: parameters are gathered before they are read and gradients are reduce-scattered. Optimizer state is split
    like its parameter.

    Args:
        module: the module whose parameters to split.
        mesh: the slice.
        axis: the axis to split over.
        plan: a plan for other axes, for example one of `tensor_parallel`. The result combines both.

    Raises:
        PlacementError: `mesh` has no such axis, or `plan` does not fit the module.
    """
    size = _axis_size(mesh, axis)
    given = placements_of(module, mesh, plan or {})
    found: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        placements = given[name]
        taken = [int(text[2:-1]) for text in placements if text != "R"]
        found[name] = {
            mesh.mesh_dim_names[index]: Shard(int(text[2:-1])) for index, text in enumerate(placements) if text != "R"
        }
        dims = [dim for dim, length in enumerate(parameter.shape) if length % size == 0 and dim not in taken]
        if dims:
            found[name][axis] = Shard(max(dims, key=lambda dim: parameter.shape[dim]))
    return found


def plan_of(module: torch.nn.Module, mesh: VirtualSlice, plan: PlanOrMaker | None) -> Plan:
    """Returns the plan itself."""
    return plan(module, mesh) if callable(plan) else plan or {}


def placements_of(module: torch.nn.Module, mesh: VirtualSlice, plan: Plan) -> dict[str, Placements]:
    """Returns the placements of every parameter and buffer of a module, by all of its names.

    Raises:
        PlacementError: a pattern fits no name, an axis does not exist, or a dimension cannot be split; the message
            has the parameter's name and shape.
    """
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    unused = {pattern for pattern in plan if not _is_of_modules(pattern)}
    by_tensor: dict[int, Placements] = {}
    for name, tensor in tensors.items():
        for pattern, entry in plan.items():
            if fnmatchcase(name, pattern):
                unused.discard(pattern)
                by_tensor.setdefault(id(tensor), _placements(name, tensor, mesh, entry))
                break
    if unused:
        known = ", ".join(list(tensors)[:8])
        raise PlacementError(
            f"the plan's pattern {sorted(unused)[0]!r} fits no parameter of {type(module).__name__}, which has {known}"
            f"{', ...' if len(tensors) > 8 else ''}"
        )
    return {name: by_tensor.get(id(tensor), ("R",) * mesh.ndim) for name, tensor in tensors.items()}


def _placements(name: str, tensor: torch.Tensor, mesh: VirtualSlice, entry: Entry) -> Placements:
    try:
        return normalize_placements(_listed(mesh, entry), mesh, tensor.shape)
    except PlacementError as error:
        raise PlacementError(f"parameter {name} {tensor_text(tensor.dtype, tensor.shape)}: {error}") from error


def _listed(mesh: VirtualSlice, entry: Entry) -> Sequence[Any]:
    if not isinstance(entry, Mapping):
        return entry
    for axis in entry:
        _axis_size(mesh, axis)
    return [entry.get(axis, "R") for axis in mesh.mesh_dim_names]


def _is_of_modules(pattern: str) -> bool:
    return pattern.rpartition(":")[2] in _ENDS and ":" in pattern


def add_constraints(
    module: torch.nn.Module,
    mesh: VirtualSlice,
    plan: Plan,
    constrain: Callable[[torch.Tensor, Sequence[Any]], torch.Tensor],
) -> None:
    """Adds the hooks that a plan's ":input" and ":output" entries ask for.

    Args:
        module: the whole model.
        mesh: slice that it runs on, or one with its axes.
        plan: the plan.
        constrain: called by the hooks with a tensor and placements; returns the constrained tensor.

    Raises:
        PlacementError: a pattern fits no submodule, or an axis does not exist.
    """
    for pattern, entry in plan.items():
        if not _is_of_modules(pattern):
            continue
        names, _, end = pattern.rpartition(":")
        placements = _listed(mesh, entry)
        found = [submodule for name, submodule in module.named_modules() if fnmatchcase(name, names)]
        if not found:
            known = ", ".join(list(dict(module.named_modules()))[1:9])
            raise PlacementError(f"the plan's pattern {pattern!r} fits no submodule; there are {known}, ...")
        for submodule in found:
            _constrain_end(submodule, end, functools.partial(_first_tensor, constrain, placements))


def _constrain_end(module: torch.nn.Module, end: str, change: Callable[[Any], Any]) -> None:
    if end == "output":
        module.register_forward_hook(lambda _module, _args, result: change(result))
    else:
        module.register_forward_pre_hook(lambda _module, args, kwargs: change((args, kwargs)), with_kwargs=True)


def _first_tensor(constrain: Callable[..., Any], placements: Sequence[Any], tree: Any) -> Any:
    """Constrains the first tensor of what a module takes or gives that is no scalar: its activations."""
    leaves, spec = pytree.tree_flatten(tree)
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            leaves[position] = constrain(leaf, placements)
            break
    return pytree.tree_unflatten(leaves, spec)


def _axis_size(mesh: VirtualSlice, axis: str) -> int:
    if axis not in mesh.mesh_dim_names:
        raise PlacementError(f"mesh {mesh} has no axis {axis!r}; its axes are {', '.join(mesh.mesh_dim_names)}")
    return mesh.shape[mesh.mesh_dim_names.index(axis)]


def _ends_with(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith("." + ending) for ending in endings)
