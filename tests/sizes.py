"""How large the collections of an object are, counted through all that it refers to: what finds leaks in pure cores."""

from collections import deque
from collections.abc import Mapping

_COLLECTIONS = (list, tuple, set, frozenset, deque, Mapping)


def sizes(root):
    """Returns the number of entries of each collection that `root` has as an attribute, with all that is below it."""
    return {name: _entries(value, set()) for name, value in _attributes(root) if _is_followed(value)}


def _entries(value, seen):
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, Mapping):
        return len(value) + sum(_entries(item, seen) for item in value.values() if _is_followed(item))
    if isinstance(value, _COLLECTIONS):
        return len(value) + sum(_entries(item, seen) for item in value if _is_followed(item))
    return sum(_entries(item, seen) for _, item in _attributes(value) if _is_followed(item))


def _is_followed(value):
    return isinstance(value, _COLLECTIONS) or type(value).__module__.startswith("torchways.")


def _attributes(value):
    names = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    return [(name, getattr(value, name)) for name in [*names, *getattr(value, "__dict__", ())] if hasattr(value, name)]
