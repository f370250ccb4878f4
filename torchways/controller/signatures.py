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
from torchways.capture.python_state.ambient import ambient_modes, modes_changed
from torchways.capture.python_state.functions import is_tracked_class
from torchways.capture.python_state.tokens import is_container, is_plain, memory_of
from torchways.capture.source import user_line
from torchways.capture.tensor_kinds import check_tensor_kind, is_plain_tensor
from torchways.capture.tracing.objects import holds_program, holds_tensors, may_open, open_objects
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
        opened: which of these hold tensors: their attributes are leaves.
        tensor_positions: which leaves are tensors.
        key: equal for calls that one trace may serve: structure, an entry a leaf, the modes that hold. The entry of an
            array is shape, dtype, identity of its mesh and sharding; that of a host tensor shape and dtype; that of a
            number or an object its type, since a trace has conditions on those; that of another constant its type and
            value. Of tensors that share their memory, which do.
        function: that is called: it names the arguments.
        given: the arguments as the caller gave them, in containers of the caller's.
    """

    arguments: tuple[Any, Any]
    leaves: list[Any]
    spec: pytree.TreeSpec
    objects: list[Any] = field(default_factory=list)
    opened: list[bool] = field(default_factory=list)
    tensor_positions: list[int] = field(default_factory=list)
    key: Any = None
    function: Callable[..., Any] | None = None
    given: tuple[Any, Any] = ((), {})
    _names: list[str] | None = None

    def name_of(self, position: int) -> str:
        """Returns the name of a leaf: ``x``, ``batch['input_ids']``."""
        if self._names is None:
            self._names = [name for name, _ in named_leaves(self.function, self.arguments)]
        return self._names[position]

    def name_of_tensor(self, position: int) -> str:
        """Returns the name of a tensor among the leaves."""
        return self.name_of(self.tensor_positions[position])

    def is_by_path(self, position: int) -> bool:
        """Whether a leaf is an object that another call may have another of."""
        return isinstance(self.key[1][position], _Kind)

    def shared(self) -> tuple[tuple[int, ...], ...]:
        """Returns the positions of tensors that share their memory and may change, those of one memory together.

        Arrays may be written to, and tensors that need gradients get them.
        """
        by_memory: dict[int, list[int]] = {}
        for position in self.tensor_positions:
            if isinstance(leaf := self.leaves[position], Array) or leaf.requires_grad:
                by_memory.setdefault(memory_of(leaf), []).append(position)
        return tuple(tuple(positions) for positions in by_memory.values() if len(positions) > 1)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The leaves that are tensors."""
        return [self.leaves[position] for position in self.tensor_positions]


def signature_of(args: Any, kwargs: Any, function: Callable[..., Any] | None = None) -> Signature:
    """Returns the signature of a call of a function."""
    arguments = (args, kwargs)
    leaves, spec = pytree.tree_flatten(arguments)
    objects = [leaf for leaf in leaves if may_open(leaf)]
    opened: list[bool] = []
    if objects:
        opened = [holds_tensors(item) for item in objects]
        if any(opened):
            arguments = open_objects(arguments)
            leaves, spec = pytree.tree_flatten(arguments)
    signature = Signature(arguments, leaves, spec, objects, opened, function=function, given=(args, kwargs))
    key: list[Any] = []
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Array):
            signature.tensor_positions.append(position)
            mesh = leaf.mesh
            # The mesh and not its id, which changes when it moves to other devices; variants keep it alive.
            kind = (tuple(leaf.shape), leaf.dtype, None if mesh is None else id(mesh), leaf.sharding)
            key.append((*kind, *_gradient_key(leaf)) if leaf.requires_grad else kind)
        elif isinstance(leaf, torch.Tensor):
            signature.tensor_positions.append(position)
            if not is_plain_tensor(leaf):
                check_tensor_kind(signature.name_of(position), leaf, user_line())
            key.append((tuple(leaf.shape), leaf.dtype, *_gradient_key(leaf)))
        else:
            key.append(_constant_key(leaf))
    signature.key = (spec, tuple(key), ambient_modes(), signature.shared())
    return signature


def _gradient_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Returns what a trace takes for given of a tensor that needs gradients."""
    if not tensor.requires_grad:
        return ()
    if not tensor.is_leaf:
        return ("computed",)
    return ("leaf", tensor.grad is None)


@dataclass(frozen=True, slots=True)
class _Kind:
    """An object of which a trace has conditions of its own: calls with other ones of its type may share it."""

    type: type


class _Identity:
    """An object that only itself is equal to."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _constant_key(leaf: Any) -> Any:
    if type(leaf) in (int, float):
        return (type(leaf), _ANY_NUMBER)
    if isinstance(leaf, slice):  # which has no hash before Python 3.12
        return (slice, leaf.start, leaf.stop, leaf.step)
    if is_plain(leaf):
        return (type(leaf), leaf)
    is_conditional = is_container(leaf) or is_tracked_class(type(leaf))
    if is_conditional and not callable(leaf) and may_open(leaf) and not holds_program(leaf):
        return _Kind(type(leaf))
    return _Identity(leaf)


_ANY_NUMBER = "any"


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
    spec, entries, modes, shared = key
    found = []
    if spec != signature.spec:
        found.append(f"the call has {_count(signature.key[1])}, or another nesting, was {_count(entries)}")
    else:
        names: list[str] = []
        for position, (now, was) in enumerate(zip(signature.key[1], entries, strict=True)):
            if now != was:
                names = names or [name for name, _ in named_leaves(function, signature.arguments)]
                found.append(f"{names[position]} is {_describe(now, was)}")
        if not found and signature.key[3] != shared:
            found.append("other arguments than before are the same tensor, or share its memory")
    return [*found, *modes_changed(signature.key[2], modes)]


def _count(entries: Sequence[Any]) -> str:
    tensors = sum(map(_is_tensor, entries))
    return f"{tensors} tensors and {len(entries) - tensors} other values"


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, tuple) and isinstance(entry[0], tuple)


def _describe(now: Any, was: Any) -> str:
    if _is_tensor(now) and _is_tensor(was):
        if _gradient_of(now) != _gradient_of(was):
            return f"{_gradient_text(now)}, was {_gradient_text(was)}"
        if now[:2] == was[:2] and _is_array(now) and _is_array(was) and now[3] == was[3]:
            return f"{_text(now)} on another mesh"
        return f"{_text(now)}, was {_text(was)}"
    if isinstance(now, _Identity) and isinstance(was, _Identity):
        return f"another {type(now.value).__name__} than before"
    return f"{_text(now)}, was {_text(was)}"


def _text(entry: Any) -> str:
    if _is_tensor(entry):
        text = tensor_text(entry[1], entry[0], entry[3] if _is_array(entry) else None)
        return text if _is_array(entry) else f"{text} on the host"
    if isinstance(entry, _Kind):
        return f"a {entry.type.__name__}"
    if isinstance(entry, _Identity):
        return f"a {type(entry.value).__name__}"
    if entry[1] is _ANY_NUMBER:
        return f"a number of type {entry[0].__name__}"
    text = repr(entry[1])
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_array(entry: Any) -> bool:
    return len(entry) > 3 and not isinstance(entry[2], str)


def _gradient_of(entry: Any) -> Any:
    return entry[4 if _is_array(entry) else 2 :]


def _gradient_text(entry: Any) -> str:
    found = _gradient_of(entry)
    if not found:
        return "a tensor that needs no gradient"
    return (
        "a tensor with a history"
        if found[0] == "computed"
        else ("a tensor that needs a gradient and has none" if found[1] else "a tensor that has a gradient")
    )


def named_leaves(function: Callable[..., Any] | None, arguments: tuple[Any, Any]) -> list[tuple[str, Any]]:
    """Returns the leaves of a call's arguments, each with its name: ``x``, ``batch['input_ids']``, ``args[2]``.

    Args:
        function: the function that is called.
        arguments: positional and keyword arguments.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values()) if function is not None else []
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
