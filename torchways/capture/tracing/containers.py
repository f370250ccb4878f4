"""Lists and dictionaries among a call's arguments: what a function changes in them, their caller sees.

A trace gets containers of its own, made of the call's leaves, so a change to one of them is found by comparison, and
made in the caller's container at each run. This module knows nothing of runs.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import torch.utils._pytree as pytree

#: Kinds that pytrees take apart and that a function may change.
_MUTABLE = (list, dict, collections.OrderedDict, collections.defaultdict, collections.deque)


def containers_in(tree: Any) -> list[Any]:
    """Returns the containers in a tree that may be changed, in an order that only its structure decides."""
    return list(_containers(tree))


def _containers(tree: Any) -> Iterator[Any]:
    if type(tree) in _MUTABLE:
        yield tree
    if isinstance(tree, dict):
        items: Any = tree.values()
    else:
        items = tree if isinstance(tree, (list, tuple, collections.deque)) else ()
    if type(tree) in pytree.SUPPORTED_NODES or pytree.is_namedtuple_instance(tree):
        for item in items:
            yield from _containers(item)


def content_of(container: Any) -> Any:
    """Returns a copy of a container, as deep as the container itself."""
    return dict(container) if isinstance(container, dict) else list(container)


class Containers:
    """The containers in a tree, and what each holds when this is made.

    Attributes:
        items: the containers, in the order of `containers_in`.
    """

    def __init__(self, tree: Any) -> None:
        self.items = containers_in(tree)
        self._contents = list(map(content_of, self.items))

    def changed(self) -> list[int]:
        """Returns the positions of those that hold something else, or in another order, now."""
        pairs = zip(self.items, self._contents, strict=True)
        return [position for position, (item, before) in enumerate(pairs) if _is_changed(item, before)]


def _is_changed(container: Any, before: Any) -> bool:
    now = content_of(container)
    if isinstance(now, dict):
        if list(now) != list(before):
            return True
        now, before = list(now.values()), list(before.values())
    return len(now) != len(before) or any(one is not other for one, other in zip(now, before, strict=True))


def extend(container: Any, content: Any) -> None:
    """Adds what another container has to a list, a set or a dictionary."""
    (container.update if isinstance(container, (dict, set)) else container.extend)(content)


def fill(container: Any, content: Any) -> None:
    """Makes a container hold what another has."""
    container.clear()
    extend(container, content)
