"""What a call's arguments are to a trace, and which of it differs from what was traced before.

A `Signature` is looked up at every call, so it holds no names. Names and words for people are made only where a
function is traced anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree

from torchways.array import Array
from torchways.capture.objects import may_open, open_objects
from torchways.mesh import tensor_text

#: Differences that one message lists.
_MAX_LISTED = 4


@dataclass(slots=True)
class Signature:
    """A call's arguments, flattened: tensors apart from constants.

    Attributes:
        arguments: positional and keyword ones, objects that hold tensors opened.
        leaves: of `arguments`.
        objects: arguments that are objects, which a call may change.
        tensor_positions: which leaves are tensors.
        key: equal for calls that one trace may serve: structure, an entry a leaf, grad mode. The entry of an array is
            shape, dtype, identity of its mesh and sharding; that of a host tensor shape and dtype; that of a constant
            its type and value, or its identity if it cannot be hashed.
    """

    arguments: tuple[Any, Any]
    leaves: list[Any]
    spec: pytree.TreeSpec
    objects: list[Any] = field(default_factory=list)
    tensor_positions: list[int] = field(default_factory=list)
    key: Any = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The leaves that are tensors."""
        return [self.leaves[position] for position in self.tensor_positions]


def signature_of(args: Any, kwargs: Any) -> Signature:
    """Returns the signature of a call."""
    arguments = (args, kwargs)
    leaves, spec = pytree.tree_flatten(arguments)
    objects = [leaf for leaf in leaves if may_open(leaf)]
    if objects:
        arguments = open_objects(arguments)
        leaves, spec = pytree.tree_flatten(arguments)
    signature = Signature(arguments, leaves, spec, objects)
    key: list[Any] = []
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Array):
            signature.tensor_positions.append(position)
            mesh = leaf.mesh
            # The mesh and not its id, which changes when it moves to other devices; variants keep it alive.
            key.append((tuple(leaf.shape), leaf.dtype, None if mesh is None else id(mesh), leaf.sharding))
        elif isinstance(leaf, torch.Tensor):
            signature.tensor_positions.append(position)
            key.append((tuple(leaf.shape), leaf.dtype))
        else:
            key.append(_constant_key(leaf))
    signature.key = (spec, tuple(key), torch.is_grad_enabled())
    return signature


def _constant_key(leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return (type(leaf), leaf)


def difference(function: Callable[..., Any], signature: Signature, known: Iterable[Any]) -> str:
    """Says, for people, in what a call differs from the nearest of the calls that were traced; "" where in nothing.

    Args:
        function: whose call it is: it names the arguments.
        signature: of the call.
        known: keys of signatures.
    """
    differences = [_differences(function, signature, key) for key in known]
    if not differences:
        return ""
    nearest = min(differences, key=len)
    listed = nearest[:_MAX_LISTED]
    if len(nearest) > _MAX_LISTED:
        listed.append(f"and {len(nearest) - _MAX_LISTED} more")
    return "; ".join(listed)


def _differences(function: Callable[..., Any], signature: Signature, key: Any) -> list[str]:
    spec, entries, grad = key
    found = []
    if spec != signature.spec:
        found.append(f"the call has {_count(signature.key[1])}, or another nesting, was {_count(entries)}")
    else:
        names: list[str] = []
        for position, (now, was) in enumerate(zip(signature.key[1], entries, strict=True)):
            if now != was:
                names = names or [name for name, _ in named_leaves(function, signature.arguments)]
                found.append(f"{names[position]} is {_describe(now, was)}")
    if grad != signature.key[2]:
        found.append(f"gradients are {'enabled' if signature.key[2] else 'disabled'}, were not")
    return found


def _count(entries: Sequence[Any]) -> str:
    tensors = sum(map(_is_tensor, entries))
    return f"{tensors} tensors and {len(entries) - tensors} other values"


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, tuple) and isinstance(entry[0], tuple)


def _describe(now: Any, was: Any) -> str:
    if _is_tensor(now) and _is_tensor(was):
        if now[:2] == was[:2] and len(now) == len(was) == 4 and now[3] == was[3]:
            return f"{_text(now)} on another mesh"
        return f"{_text(now)}, was {_text(was)}"
    if isinstance(now, int) and isinstance(was, int):
        return "another object than before (it cannot be hashed, so objects are told apart by identity)"
    return f"{_text(now)}, was {_text(was)}"


def _text(entry: Any) -> str:
    if _is_tensor(entry):
        text = tensor_text(entry[1], entry[0], entry[3] if len(entry) == 4 else None)
        return f"{text} on the host" if len(entry) == 2 else text
    if isinstance(entry, int):
        return "an object that cannot be hashed"
    text = repr(entry[1])
    return text if len(text) <= 60 else f"{text[:57]}..."


def named_leaves(function: Callable[..., Any], arguments: tuple[Any, Any]) -> list[tuple[str, Any]]:
    """Returns the leaves of a call's arguments, each with its name: ``x``, ``batch['input_ids']``, ``args[2]``.

    Args:
        function: the function that is called.
        arguments: positional and keyword arguments.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    args, kwargs = arguments
    named: list[tuple[str, Any]] = []
    for position, value in enumerate(args):
        named.extend(_with_paths(_positional_name(parameters, position), value))
    for name, value in kwargs.items():
        named.extend(_with_paths(str(name), value))
    return named


def _positional_name(parameters: list[inspect.Parameter], position: int) -> str:
    for index, parameter in enumerate(parameters):
        if parameter.kind is parameter.VAR_POSITIONAL:
            return f"{parameter.name}[{position - index}]"
        if index == position:
            return parameter.name
    return f"argument {position}"


def _with_paths(name: str, value: Any) -> list[tuple[str, Any]]:
    try:
        return [(name + pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(value)[0]]
    except ValueError:  # a class of somebody's, registered without names for what it holds
        return [(f"{name}, leaf {number}", leaf) for number, leaf in enumerate(pytree.tree_leaves(value))]
