"""Python objects that hold tensors and that PyTorch's pytrees do not know: caches, outputs, batches of any library.

A program's arguments and results are trees of tensors. An object with tensors among its attributes, at any depth,
counts as a tree of its attributes; it is made anew, without its constructor, where the tree is put together again.
An object that holds a module or an optimizer does not count: it is the user's program, not its data.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree

_PLAIN = (torch.Tensor, int, float, complex, str, bytes, type(None), type, enum.Enum, torch.dtype, torch.device)
_PROGRAM = (torch.nn.Module, torch.optim.Optimizer)
#: Objects nest no deeper than this.
_MAX_DEPTH = 16
#: Classes of which an object was seen with tensors: all their objects are opened, also empty ones.
_seen: weakref.WeakSet[type] = weakref.WeakSet()


class _Opened:
    """An object as a tree: a pytree node whose children are the attributes."""

    __slots__ = ("attributes", "cls", "items")

    def __init__(self, cls: type, attributes: dict[str, Any], items: dict[Any, Any] | list[Any] | None) -> None:
        self.cls = cls
        self.attributes = attributes
        #: What it holds beside attributes, if its class is a kind of dict or list.
        self.items = items


def _flatten(opened: _Opened) -> tuple[list[Any], Any]:
    keys = tuple(opened.attributes)
    return [opened.items, *opened.attributes.values()], (opened.cls, keys)


def _unflatten(values: Any, context: Any) -> Any:
    cls, keys = context
    items, *attributes = values
    result = cls.__new__(cls)
    if isinstance(items, dict):
        dict.update(result, items)
    elif items is not None:
        list.extend(result, items)
    for key, value in zip(keys, attributes, strict=True):
        object.__setattr__(result, key, value)
    return result


def _flatten_with_keys(opened: _Opened) -> tuple[list[tuple[Any, Any]], Any]:
    values, context = _flatten(opened)
    keys: list[Any] = [pytree.GetAttrKey("items"), *map(pytree.GetAttrKey, opened.attributes)]
    return list(zip(keys, values, strict=True)), context


pytree.register_pytree_node(_Opened, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys)


def may_open(leaf: Any) -> bool:
    """Whether a leaf of a pytree may be an object that holds tensors."""
    return not isinstance(leaf, (*_PLAIN, *_PROGRAM)) and not callable(leaf) and _attributes(leaf) is not None


def open_objects(tree: Any, replace: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """Returns a tree with every object that holds tensors replaced by a node of its attributes.

    Args:
        tree: any pytree.
        replace: asked first for each object; what it returns in place of it stays closed.
    """
    return _open(tree, replace, ())


def _open(tree: Any, replace: Callable[[Any], Any], above: tuple[int, ...]) -> Any:
    def of_leaf(leaf: Any) -> Any:
        if not may_open(leaf):
            return leaf
        replaced = replace(leaf)
        if replaced is not leaf:
            return replaced
        if id(leaf) in above or not holds_tensors(leaf):
            return leaf
        inside = (*above, id(leaf))
        attributes = {key: _open(value, replace, inside) for key, value in (_attributes(leaf) or {}).items()}
        items: Any = None
        if isinstance(leaf, dict):
            items = {key: _open(value, replace, inside) for key, value in leaf.items()}
        elif isinstance(leaf, list):
            items = [_open(value, replace, inside) for value in leaf]
        return _Opened(type(leaf), attributes, items)

    return pytree.tree_map(of_leaf, tree)


def holds_tensors(leaf: Any) -> bool:
    """Whether an object is, or was seen to be, one that holds tensors."""
    found = _contents(leaf, ())
    if found is torch.Tensor:
        _seen.add(type(leaf))
    return found is torch.Tensor or (found is None and type(leaf) in _seen)


def _contents(leaf: Any, above: tuple[int, ...]) -> type | None:
    """Returns Module where there is part of a program below `leaf`, else Tensor where there is a tensor."""
    if id(leaf) in above or len(above) > _MAX_DEPTH:
        return None
    parts: list[Any] = list((_attributes(leaf) or {}).values())
    if isinstance(leaf, dict):
        parts.extend(leaf.values())
    elif isinstance(leaf, list):
        parts.extend(leaf)
    found: type | None = None
    for item in pytree.tree_leaves(parts):
        kind: type | None = None
        if isinstance(item, _PROGRAM):
            kind = torch.nn.Module
        elif isinstance(item, torch.Tensor):
            kind = torch.Tensor
        elif may_open(item):
            kind = _contents(item, (*above, id(leaf)))
        if kind is torch.nn.Module:
            return kind
        found = found or kind
    return found


def _attributes(leaf: Any) -> dict[str, Any] | None:
    """Returns an object's attributes by name, or None where it has none that could be set again."""
    names = [name for cls in type(leaf).__mro__ for name in _slots_of(cls)]
    attributes = {name: getattr(leaf, name) for name in names if hasattr(leaf, name)}
    try:
        attributes.update(vars(leaf))
    except TypeError:
        return attributes or None
    return attributes


def _slots_of(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def holds_program(leaf: Any) -> bool:
    """Whether an object holds a module or an optimizer, at any depth: part of the user's program."""
    return _contents(leaf, ()) is torch.nn.Module


def set_attributes(target: Any, source: Any) -> None:
    """Gives an object the attributes and items of another of its class."""
    old, new = _attributes(target) or {}, _attributes(source) or {}
    for key in old.keys() - new.keys():
        object.__delattr__(target, key)
    for key, value in new.items():
        object.__setattr__(target, key, value)
    if isinstance(target, dict):
        dict.clear(target)
        dict.update(target, source)
    elif isinstance(target, list):
        list.clear(target)
        list.extend(target, source)
