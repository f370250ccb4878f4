"""Batches and loader states as JSON: containers and plain values inline, tensors apart.

Nothing that is read back can run code: containers are dicts, lists, tuples and named tuples made anew.
"""

from __future__ import annotations

import base64
import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from torchways.errors import DataError


def flatten(tree: Any) -> tuple[Any, list[torch.Tensor], list[str]]:
    """Takes a batch apart.

    Returns:
        its structure, for JSON; its tensors; and the first key (or index) of each tensor's path, "" of a lone tensor.

    Raises:
        DataError: something in it is neither a container, nor a tensor or NumPy array, nor a plain value.
    """
    tensors: list[torch.Tensor] = []
    keys: list[str] = []

    def take(value: Any, path: tuple[Any, ...]) -> dict[str, Any]:
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            value = torch.from_numpy(value if value.flags.writeable else value.copy())
        if not isinstance(value, torch.Tensor):
            raise DataError(
                f"the batch has a {type(value).__name__} at {_path_text(path)}: a batch consists of tensors, numbers "
                "and strings in dicts, lists and tuples; convert it in collate_fn"
            )
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise DataError(
                f"the tensor at {_path_text(path)} of the batch is on {value.device} with layout {value.layout}: only "
                "dense tensors on the CPU go to slices; convert it in collate_fn"
            )
        tensors.append(value.detach())
        keys.append(str(path[0]) if path else "")
        return {"t": len(tensors) - 1}

    return _encode(tree, (), take), tensors, keys


def unflatten(structure: Any, leaves: list[Any]) -> Any:
    """Puts a batch together again, of what stands for its tensors."""
    return _decode(structure, lambda entry: leaves[entry["t"]])


def encode_state(state: Any) -> Any:
    """Returns a loader's state for JSON, with tensors and bytes inline.

    Raises:
        DataError: something in it cannot be written down.
    """
    return _encode(state, (), _encode_value)


def decode_state(content: Any) -> Any:
    """Reads what `encode_state` wrote."""
    return _decode(content, _decode_value)


def _encode(value: Any, path: tuple[Any, ...], other: Callable[[Any, tuple[Any, ...]], dict[str, Any]]) -> Any:
    def items(values: Any) -> list[Any]:
        return [_encode(item, (*path, index), other) for index, item in enumerate(values)]

    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"v": value}
    if isinstance(value, Mapping):
        return {"d": [[_encode(key, path, other), _encode(item, (*path, key), other)] for key, item in value.items()]}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"n": [type(value).__name__, list(value._fields), items(value)]}
    if isinstance(value, tuple):
        return {"u": items(value)}
    if isinstance(value, list):
        return {"l": items(value)}
    return other(value, path)


def _decode(content: Any, other: Callable[[Any], Any]) -> Any:
    ((kind, inner),) = content.items()
    match kind:
        case "v":
            return inner
        case "d":
            return {_decode(key, other): _decode(item, other) for key, item in inner}
        case "n":
            name, names, items = inner
            return _named_tuple(name, tuple(names))(*(_decode(item, other) for item in items))
        case "u":
            return tuple(_decode(item, other) for item in inner)
        case "l":
            return [_decode(item, other) for item in inner]
        case _:
            return other(content)


@functools.lru_cache(maxsize=64)
def _named_tuple(name: str, names: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, names)  # the names are data


def _encode_value(value: Any, path: tuple[Any, ...]) -> dict[str, Any]:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {"a": [str(value.dtype), list(value.shape), _text(np.ascontiguousarray(value).tobytes())]}
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {"t": [str(value.dtype).removeprefix("torch."), list(value.shape), _text(data)]}
    if isinstance(value, bytes):
        return {"b": _text(value)}
    raise DataError(
        f"the loader's state has a {type(value).__name__} at {_path_text(path)}: a dataset's state_dict() consists of "
        "tensors, NumPy arrays, numbers, strings and bytes in dicts, lists and tuples"
    )


def _decode_value(content: Any) -> Any:
    ((kind, inner),) = content.items()
    if kind == "b":
        return base64.b64decode(inner)
    dtype, shape, text = inner
    data = bytearray(base64.b64decode(text))
    if kind == "a":
        return np.frombuffer(data, dtype=np.dtype(dtype)).reshape(shape)
    if not data:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.frombuffer(data, dtype=getattr(torch, dtype)).reshape(shape)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _path_text(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key!r}]" for key in path) or "its top"
