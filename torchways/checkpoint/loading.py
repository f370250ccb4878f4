"""`tw.checkpoint.load`: a plan of reads, of which executors do those for their devices."""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.storage import StorageReader

from torchways.array import Array
from torchways.checkpoint import folders
from torchways.checkpoint.state import (
    RANDOM_STATE,
    Place,
    form_of,
    is_stateful,
    modules_of,
    named_groups,
    new_tensor_beside,
    parameter_names,
    place_of,
    set_random_state,
    spec_of,
    unpack,
)
from torchways.controller.modules import is_extra_state, send_home, unread_state
from torchways.errors import CheckpointError
from torchways.mesh import VirtualSlice
from torchways.rpc import torchways_pb2 as pb
from torchways.signals import result_of

#: How many names an error message has.
_MAX_NAMES = 5


def load(folder: str | os.PathLike[str], state: Any, *, strict: bool = True, random_state: bool = True) -> Any:
    """Loads a checkpoint into modules, optimizers and other objects.

    Arrays are read by the executors on whose devices they are, or will be: no process has a whole copy. Meshes, plans,
    stages and islands may be others than when it was saved, and so may the framework: plain PyTorch's
    `torch.distributed.checkpoint` writes the same format.

    Load only what you trust: like `torch.load`, it can run code that is in the checkpoint.

    Args:
        folder: a checkpoint; a folder of them, of which the latest complete one is taken; or a folder of safetensors,
            as `save_pretrained` of transformers writes it (`state` is then the model).
        state: what to load, as `tw.checkpoint.save` was given it; parts of it may be left out. Tensors are changed in
            place.
        strict: if False, what the checkpoint does not have stays as it is.
        random_state: whether to set the random generators to the states that they had.

    Returns:
        `state` with the plain values that were loaded, such as ``{"model": model, "step": 100}``.

    Raises:
        CheckpointError: there is no complete checkpoint, something is missing in it, or shapes differ.
    """
    path = _find(Path(folder).absolute())
    is_ours = folders.is_checkpoint(path)
    reader = FileSystemReader(path) if is_ours else HuggingFaceStorageReader(str(path))
    try:
        metadata = _metadata(reader, path)
        loading = _Loading(path, metadata, state, strict)
        loading.read(reader)
        if random_state and isinstance(state, Mapping) and RANDOM_STATE in metadata.state_dict_metadata:
            set_random_state(unpack(_read_bytes(reader, metadata, RANDOM_STATE)))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: a file in it is damaged") from error
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {str(error) or type(error).__name__}") from error
    return loading.finish()


def _metadata(reader: StorageReader, path: Path) -> Metadata:
    try:
        return reader.read_metadata()
    except Exception as error:  # a damaged pickle raises anything
        where = path / folders.METADATA if folders.is_checkpoint(path) else path
        reason = error if isinstance(error, (OSError, SafetensorError)) else f"it is damaged ({type(error).__name__})"
        raise CheckpointError(f"checkpoint {path} cannot be read: {where}: {reason}") from error


def _find(folder: Path) -> Path:
    """Returns the checkpoint that a folder is, or has."""
    if any(folder.glob("*.safetensors")):
        return folder
    found = folders.find(folder) or folders.latest(folder)
    if found is None:
        what = "it has no complete checkpoint" if folder.is_dir() else "there is no such folder"
        raise CheckpointError(f"nothing to load from {folder}: {what}")
    return found


class _Loading:
    """Where each value of a checkpoint goes."""

    def __init__(self, path: Path, metadata: Metadata, state: Any, strict: bool) -> None:
        self._path = path
        self._metadata = metadata
        self._known = metadata.state_dict_metadata
        self._state = state
        self._names = parameter_names(state)
        for module in modules_of(state):
            send_home(module)
        #: What takes the values that are read here, after they are.
        self._finish: list[Callable[[Mapping[str, Any]], None]] = []
        tree = self._template(state, ())
        flat, self._mappings = flatten_state_dict(tree)
        self._check(flat, strict)
        self._flat = {name: leaf for name, leaf in flat.items() if name in self._known}
        #: Arrays that executors read, and where they are.
        self._remote: dict[str, tuple[Array, Place]] = {}
        for name, leaf in self._flat.items():
            if isinstance(leaf, Array):
                place = place_of(leaf)
                if place is not None:
                    self._remote[name] = leaf, place
                    self._flat[name] = form_of(leaf)
                else:
                    self._flat[name] = torch.empty(leaf.shape, dtype=leaf.dtype)
                    self._finish.append(functools.partial(_copy, leaf, name))
            elif isinstance(leaf, torch.Tensor):
                self._flat[name] = leaf.detach()

    # ---- what there is to load

    def _template(self, value: Any, path: tuple[str, ...]) -> Any:
        """Returns tensors and plain values whose places in the checkpoint `value` has."""
        match value:
            case nn.Module():
                return self._module(value, path)
            case torch.optim.Optimizer():
                return self._optimizer(value, path)
            case Mapping():
                return {key: self._template(item, (*path, key)) for key, item in value.items()}
            case _ if is_stateful(value):
                name = ".".join(path)
                self._finish.append(
                    lambda flat: value.load_state_dict(unpack(flat[name])) if flat.get(name) is not None else None
                )
                return None
            case _:
                return value

    def _module(self, module: nn.Module, path: tuple[str, ...]) -> dict[str, Any]:
        state = unread_state(module)
        extra = {name: self._saved_below((*path, name)) for name in state if is_extra_state(name)}
        for name, keys in extra.items():  # of whatever form the checkpoint has it in
            if keys:
                state[name] = self._nested({key: self._new_value(key) for key in keys}, (*path, name))
        if extra:

            def finish(flat: Mapping[str, Any]) -> None:
                found: dict[str, Any] = {}
                for name, keys in extra.items():
                    if saved := {key: flat[key] for key in keys if key in flat}:
                        found[name] = self._nested(saved, (*path, name))
                module.load_state_dict(found, strict=False)

            self._finish.append(finish)
        return state

    def _saved_below(self, path: tuple[str, ...]) -> list[str]:
        """Returns the names in the checkpoint of the parts of a nested value."""
        paths: Mapping[str, tuple[Any, ...]] = self._metadata.planner_data or {}
        return [name for name, known in paths.items() if known[: len(path)] == path and name in self._known]

    def _nested(self, values: Mapping[str, Any], path: tuple[str, ...]) -> Any:
        """Returns the nested value at a path, of its parts by their names in the checkpoint."""
        below = {name: ("value", *self._metadata.planner_data[name][len(path) :]) for name in values}
        return unflatten_state_dict(dict(values), below)["value"]

    def _new_value(self, name: str) -> torch.Tensor | None:
        found = self._known[name]
        if isinstance(found, TensorStorageMetadata):
            return torch.empty(found.size, dtype=found.properties.dtype)
        return None

    def _optimizer(self, optimizer: torch.optim.Optimizer, path: tuple[str, ...]) -> dict[str, Any]:
        """An optimizer has no state before its first step: the checkpoint says what it must have."""
        groups = named_groups(optimizer, self._names)
        states: dict[str, dict[str, Any]] = {name: {} for named in groups for name, _ in named}
        params = {".".join((*path, "state", name)): (name, param) for named in groups for name, param in named}
        for key in self._known:
            owner, _, kind = key.rpartition(".")
            if owner in params:
                name, param = params[owner]
                states[name][kind] = value = self._optimizer_value(optimizer, param, kind, key)
                if not isinstance(value, torch.Tensor):
                    self._finish.append(functools.partial(_set, optimizer.state[param], kind, key))
        parts = [
            {**group, "params": [name for name, _ in named]}
            for group, named in zip(optimizer.param_groups, groups, strict=True)
        ]

        has_groups = bool(self._saved_below((*path, "param_groups")))

        def finish(flat: Mapping[str, Any]) -> None:
            if has_groups:  # else the checkpoint does not have this optimizer, and strict=False leaves it as it is
                for name, param in params.values():
                    _keep_only(optimizer.state, param, states[name])
            wanted = [part["params"] for part in parts]
            for number, group in enumerate(optimizer.param_groups):
                for key in group:
                    name = ".".join((*path, "param_groups", str(number), key))
                    if key == "params":
                        if name in flat and flat[name] != wanted[number]:
                            raise CheckpointError(
                                f"the optimizer {'.'.join(path)} in {self._path} has other parameters in group "
                                f"{number}: {_list(flat[name])}; here they are {_list(wanted[number])}"
                            )
                    elif name in flat and not isinstance(group[key], torch.Tensor):
                        group[key] = flat[name]

        self._finish.append(finish)
        return {"state": states, "param_groups": parts}

    def _optimizer_value(self, optimizer: torch.optim.Optimizer, param: torch.Tensor, kind: str, key: str) -> Any:
        found = self._known[key]
        if not isinstance(found, TensorStorageMetadata):
            return None
        mine = optimizer.state[param].get(kind)
        if not isinstance(mine, torch.Tensor) or mine.shape != found.size:
            mine = new_tensor_beside(param, found.size, found.properties.dtype)
            optimizer.state[param][kind] = mine
        return mine

    def _check(self, flat: Mapping[str, Any], strict: bool) -> None:
        """Checks that the checkpoint has what is asked for, in the same shapes."""
        missing = [name for name in flat if name not in self._known]
        if missing:
            there = {_storage(leaf) for name, leaf in flat.items() if name in self._known} - {None}
            missing = [name for name in missing if _storage(flat[name]) not in there]  # not those tied to another
        if missing and strict:
            raise CheckpointError(
                f"checkpoint {self._path} does not have {_list(missing)}. It has {_list(list(self._known))}. Load only "
                "what it has, or pass strict=False"
            )
        for name, leaf in flat.items():
            found = self._known.get(name)
            if isinstance(leaf, torch.Tensor) and found is not None:
                shape = tuple(found.size) if isinstance(found, TensorStorageMetadata) else None
                if shape != tuple(leaf.shape):
                    raise CheckpointError(
                        f"{name} has the shape {shape} in checkpoint {self._path}, and {tuple(leaf.shape)} here"
                    )

    # ---- reading

    def read(self, reader: FileSystemReader) -> None:
        """Reads everything: here what is on the host, and on the executors what is theirs."""
        reader.set_up_storage_reader(self._metadata, True)
        planner, plan = _plan(self._flat, self._metadata)
        pieces: dict[str, list[pb.Piece]] = {name: [] for name in self._remote}
        mine = []
        for item in plan.items:
            if item.dest_index.fqn in pieces:
                pieces[item.dest_index.fqn].append(_piece(reader, item))
            else:
                mine.append(item)
        loads = self._start(pieces)
        reader.read_data(dataclasses.replace(plan, items=mine), planner).wait()
        for arrays, load in loads:
            for array, buffer in zip(arrays, result_of(load, None), strict=True):
                array._buffer = buffer

    def _start(self, pieces: Mapping[str, list[pb.Piece]]) -> list[Any]:
        by_mesh: dict[VirtualSlice, dict[int, tuple[Array, Any]]] = defaultdict(dict)
        for name, (array, (mesh, placements)) in self._remote.items():
            loaded = placements, pb.LoadedBuffer(spec=spec_of(array, placements), pieces=pieces[name])
            by_mesh[mesh.root].setdefault(id(array._storage), (array, loaded))  # tied parameters once
        loads = []
        for mesh, items in by_mesh.items():
            session: Any = mesh.owner
            if session is None:
                raise CheckpointError(f"mesh {mesh}, where arrays of the state go, is closed")
            arrays = [array for array, _ in items.values()]
            loads.append((arrays, session.values.load(mesh, [loaded for _, loaded in items.values()])))
        return loads

    def finish(self) -> Any:
        """Gives objects what was loaded for them; returns the state with its plain values."""
        for finish in self._finish:
            finish(self._flat)
        tree = unflatten_state_dict(dict(self._flat), {name: self._mappings[name] for name in self._flat})
        return _merged(self._state, tree)


def _merged(state: Any, tree: Any) -> Any:
    if isinstance(state, nn.Module | torch.optim.Optimizer | torch.Tensor) or is_stateful(state):
        return state
    if isinstance(state, Mapping):
        found = tree if isinstance(tree, Mapping) else {}
        return {key: _merged(value, found[key]) if key in found else value for key, value in state.items()}
    return tree


def _copy(array: Array, name: str, flat: Mapping[str, Any]) -> None:
    with torch.no_grad():
        array.detach().copy_(flat[name])


def _set(state: dict[str, Any], kind: str, name: str, flat: Mapping[str, Any]) -> None:
    state[kind] = flat[name]


def _keep_only(state: dict[Any, dict[str, Any]], param: torch.Tensor, loaded: Mapping[str, Any]) -> None:
    """Drops a parameter's state that was not loaded: it is of steps after the checkpoint, or of another optimizer."""
    for kind in state.get(param, {}).keys() - loaded.keys():
        del state[param][kind]
    if not loaded:
        state.pop(param, None)


def _storage(leaf: Any) -> int | None:
    if isinstance(leaf, Array):
        return id(leaf._storage)
    return leaf.untyped_storage().data_ptr() if isinstance(leaf, torch.Tensor) and leaf.numel() else None


def _piece(reader: FileSystemReader, item: ReadItem) -> pb.Piece:
    info = reader.storage_data[item.storage_index]
    is_safetensors = isinstance(reader, HuggingFaceStorageReader)
    return pb.Piece(
        file=os.path.join(reader.path, info.relative_path),
        key=item.storage_index.fqn if is_safetensors else "",
        offset=0 if is_safetensors else info.offset,
        length=0 if is_safetensors else info.length,
        source=item.storage_offsets,
        target=item.dest_offsets,
        sizes=item.lengths,
    )


def _plan(flat: dict[str, Any], metadata: Metadata) -> tuple[DefaultLoadPlanner, LoadPlan]:
    """Returns the reads of all that `flat` names, and what takes them there."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(flat, metadata, is_coordinator=True)
    return planner, planner.finish_plan(planner.create_local_plan())


def _read_bytes(reader: FileSystemReader, metadata: Metadata, name: str) -> bytes:
    flat: dict[str, Any] = {name: None}
    planner, plan = _plan(flat, metadata)
    reader.read_data(plan, planner).wait()
    data: bytes = flat[name]
    return data


def _list(names: list[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
