"""What a checkpoint holds of modules, optimizers and other objects, as a tree of tensors and plain values.

A module is its `state_dict()`. An optimizer has its state by the names of the parameters, as
`torch.distributed.checkpoint.state_dict` has it: so it fits a model that is cut into other stages. Any other object
with `state_dict` and `load_state_dict` is bytes that `torch.save` made.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import nn

from torchways.array import Array
from torchways.controller.buffers import HostBuffer, RemoteBuffer, empty_array
from torchways.controller.modules import is_extra_state, replaced_by, unread_state
from torchways.errors import CheckpointError
from torchways.mesh import Placements, VirtualSlice
from torchways.rpc import torchways_pb2 as pb

#: What the caller may not call a part of the state.
RANDOM_STATE = "random_state"

Place = tuple[VirtualSlice, Placements]


def collect(state: Any) -> dict[str, Any]:
    """Returns what a checkpoint of `state` holds: nested dictionaries of tensors and plain values.

    Raises:
        CheckpointError: a key is not a string.
    """
    names = parameter_names(state)
    return {key: _collect(value, names, key) for key, value in _items(state)}


def _collect(value: Any, names: Mapping[int, str], path: str) -> Any:
    match value:
        case nn.Module():
            return _module_state(value, path)
        case torch.optim.Optimizer():
            return _optimizer_state(value, names)
        case Mapping():
            _check_keys(value, path)
            return {key: _collect(item, names, f"{path}.{key}") for key, item in value.items()}
        case _ if is_stateful(value):
            return pack(value.state_dict())
        case _:
            return value


def _module_state(module: nn.Module, path: str) -> dict[str, Any]:
    state = unread_state(module)
    for name in filter(is_extra_state, state):
        _collect(state[name], {}, f"{path}.{name}")  # for its keys
    return state


def _items(state: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(state, nn.Module):
        yield from _module_state(state, "the module").items()
        return
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"a checkpoint is of a module or a dictionary of what to keep, such as {{'model': model}}, not of "
            f"{type(state).__name__}"
        )
    _check_keys(state, "the state")
    if RANDOM_STATE in state:
        raise CheckpointError(f"{RANDOM_STATE!r} is the checkpoint's own; give yours another name")
    yield from state.items()


def _check_keys(mapping: Mapping[Any, Any], path: str) -> None:
    for key in mapping:
        if not isinstance(key, str):
            raise CheckpointError(f"keys of a checkpoint are strings; {path} has {key!r}")


def is_stateful(value: Any) -> bool:
    """Whether an object says what its state is, and takes it back."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def pack(state: Any) -> bytes:
    """Returns an object's state as bytes; arrays in it are read."""
    return to_bytes(pytree.tree_map_only(Array, lambda array: array.cpu(), state))


def to_bytes(state: Any) -> bytes:
    """Returns a state without arrays as bytes."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def unpack(data: bytes) -> Any:
    """Returns what `pack` was given. It may be any Python object: who wrote the checkpoint is trusted."""
    return torch.load(io.BytesIO(data), weights_only=False)


def random_state() -> dict[str, Any]:
    """Returns the states of the random generators of this process, from which those of programs follow."""
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Sets them."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def parameter_names(state: Any) -> dict[int, str]:
    """Returns the names of the parameters of all modules in `state`, by identity.

    A name that several modules have has the module's before it.
    """
    found: dict[int, str] = {}
    taken: set[str] = set()
    for path, module in _modules(state, ""):
        for name, param in module.named_parameters():
            if id(param) not in found:
                found[id(param)] = f"{path}.{name}" if name in taken else name
                taken.add(name)
    return found


def modules_of(state: Any) -> list[nn.Module]:
    """Returns the modules that are parts of `state`."""
    return [module for _, module in _modules(state, "")]


def _modules(value: Any, path: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _modules(item, f"{path}.{key}" if path else str(key))


def named_groups(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[list[tuple[str, Any]]]:
    """Returns the parameters of each group with their names; a number where no module has it."""
    count = 0
    groups = []
    for group in optimizer.param_groups:
        named = []
        for param in group["params"]:
            array = replaced_by(param)
            named.append((names.get(id(param if array is None else array), str(count)), param))
            count += 1
        groups.append(named)
    return groups


def _optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    groups = named_groups(optimizer, names)
    return {
        "state": {
            name: dict(optimizer.state[param]) for named in groups for name, param in named if param in optimizer.state
        },
        "param_groups": [
            {**group, "params": [name for name, _ in named]}
            for group, named in zip(optimizer.param_groups, groups, strict=True)
        ],
    }


def form_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of the same shape and dtype that takes no memory; a new one each time."""
    return torch.empty((), dtype=tensor.dtype).expand(tensor.shape)


def spec_of(tensor: torch.Tensor, placements: Placements = ()) -> pb.TensorSpec:
    """Returns a tensor's form as a message."""
    return pb.TensorSpec(dtype=str(tensor.dtype).removeprefix("torch."), shape=tensor.shape, placements=placements)


def place_of(tensor: Any) -> Place | None:
    """Returns where an array is, or goes at its first use; None: it is on the host, and may go anywhere."""
    if not isinstance(tensor, Array) or tensor._storage.base is not tensor._storage:
        return None
    buffer = tensor._buffer
    if isinstance(buffer, RemoteBuffer):
        return buffer.mesh, buffer.placements
    assert isinstance(buffer, HostBuffer)
    if buffer.mesh is not None:
        return buffer.mesh, buffer.placements or _replicated(buffer.mesh)
    return place_beside(buffer.follows, tensor.shape)


def place_beside(tensor: Any, shape: torch.Size) -> Place | None:
    """Returns where a value of an optimizer goes: to its parameter, and split as that is if it has its shape."""
    array = replaced_by(tensor) if isinstance(tensor, torch.Tensor) else None
    place = place_of(tensor if array is None else array)
    if place is None:
        return None
    mesh, placements = place
    return mesh, placements if shape == tensor.shape else _replicated(mesh)


def _replicated(mesh: VirtualSlice) -> Placements:
    return ("R",) * mesh.root.ndim


def new_tensor_beside(param: Any, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor whose value is to be loaded, that lives where `param` does."""
    place = place_beside(param, shape)
    if place is None:
        return torch.empty(shape, dtype=dtype)
    mesh, placements = place
    return empty_array(tuple(shape), dtype, mesh, placements)
