"""The conditions under which a trace holds: the places of Python's state that it read have the values that they had.

When nothing has changed, checking this takes one call in C++ and one comparison of variables by identity. Python counts
the changes of each dict, and PyTorch's own guards compare these versions for the dictionaries that the state is kept
in. Only places behind a version that differs are compared one by one. Python 3.13 does not count writes to attributes:
there, places in attributes are compared at each call.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import is_not
from typing import Any

import torch
from torch._dynamo.guards import GuardManagerType

from torchways.array import Array
from torchways.capture.python_state.host_numbers import same_number
from torchways.capture.python_state.places import (
    Argument,
    Attribute,
    Call,
    Cell,
    Entry,
    Fixed,
    Gradient,
    Place,
    Variable,
    attribute_writes_are_counted,
    dicts_behind,
)
from torchways.capture.python_state.tokens import Contents, Exactly, TensorSource, Token, key_of, keys_of, memory_of

_guards = torch._C._dynamo.guards
_NOTHING = torch.empty(0)
#: What fixed places are asked with: they do not look at it.
_NO_CALL: Any = None


@dataclass(slots=True, eq=False)
class _Group:
    """Places that are kept in the same dictionaries."""

    dicts: list[dict[Any, Any]]
    lists: list[tuple[Any, list[Any]]]
    reads: list[tuple[Place, Token]]
    versions: list[int]


class Conditions:
    """The conditions of one trace on Python's state.

    Args:
        reads: what it read.
        sources: the tensors that it reads: they are found again at their places. Those that shared their memory must
            share it still, and no others.
        call: the call that was traced.
        adopt: makes an array of a host tensor that took the place of one, or returns None.
        written: places that each run writes to: they are compared at each call.
        apart: arguments of the call that are arrays, and none of `sources`: they share memory with none of these.
    """

    def __init__(
        self,
        reads: list[tuple[Place, Token]],
        sources: list[TensorSource],
        call: Call,
        adopt: Callable[[TensorSource, Any], Any],
        written: list[Place],
        apart: Sequence[Place] = (),
    ) -> None:
        self._sources = sources
        first_of: dict[int, TensorSource] = {}
        #: The first of the sources that shared their memory when they were traced, of each.
        self._first_of = {id(source): first_of.setdefault(memory_of(source.tensor), source) for source in sources}
        self._apart = apart
        self._of_call = [source for source in sources if any(isinstance(place, Argument) for place in source.places)]
        #: The memory of all sources, where it was asked for since it last changed.
        self._memory: set[int] | None = None
        self._adopt = adopt
        self._variables: list[tuple[Place, Token]] = []
        self._cells: list[Any] = []
        self._globals: list[tuple[dict[str, Any], str]] = []
        #: Places that are compared at each call.
        self._direct: list[tuple[Place, Token]] = []
        self._groups: list[_Group] = []
        #: Gradients: where one comes or goes, that is counted.
        self._gradients: list[tuple[Place, Token]] = []
        #: Dictionaries that were empty (hooks, mostly): they must stay so.
        self._empty: list[dict[Any, Any]] = []
        self._reads = reads
        self._written = {id(item) for place in written for item in (dicts_behind(place, call) or ())[-1:]}
        self._path_sources = [
            source for source in sources if any(self._may_move(place, call) for place in source.places)
        ]
        self._classes: list[dict[Any, Any]] = []
        self._sort(call)
        self._refresh(call)

    # ---- at each call

    def hold(self, call: Call) -> bool:
        """Whether all hold for a call; the tensors of `sources` are then those that are at their places."""
        return self._holds(call) and (not self._apart or self._are_apart(call))

    def forget_call(self) -> None:
        """Keeps none of the call's own tensors: they are its caller's to drop."""
        for source in self._of_call:
            source.tensor = _NOTHING
            self._memory = None

    def _are_apart(self, call: Call) -> bool:
        if self._memory is None:
            self._memory = {memory_of(source.tensor) for source in self._sources}
        return not any(memory_of(place.get(call)) in self._memory for place in self._apart)

    def _holds(self, call: Call) -> bool:
        is_same = self._guard.check(self._all_dicts) and Array.num_changes == self._num_changes
        if is_same and not any(self._empty) and not self._lists_changed() and not self._variables_changed():
            if not self._direct and not self._path_sources:
                return True
            return self._compare(self._direct, call) and self._bind(self._path_sources, call)
        return self._hold_all(call)

    def changes(self, call: Call) -> list[tuple[Place, str]]:
        """Returns the places that differ, and how."""
        found = []
        for place, token in self._reads:
            change = token.change(place, place.get(call), call)
            if change is not None:
                found.append(change)
        if not found:
            source = self._unbound(self._sources, call)
            if source is not None:
                found.append(
                    (source.places[0], "is not the one tensor of all its places any more, or of another place")
                )
        if not found and not self._are_apart(call):
            found.append((self._apart[0], "or another argument is one of the arrays that the program finds elsewhere"))
        return found

    def changed_numbers(self, call: Call) -> set[Any]:
        """Returns the keys of places where there is another number than the one that the trace took for constant."""
        return {key for place, token in self._reads for key in _changed_numbers(place, token, call)}

    def _lists_changed(self) -> bool:
        return any(list(map(id, now)) != was for now, was in self._list_items)

    def _variables_changed(self) -> bool:
        now = self._variable_values()
        return any(map(is_not, now, self._values))

    def _variable_values(self) -> list[Any]:
        values = [place.get(_NO_CALL) for place in self._cells]
        values += [namespace.get(name) for namespace, name in self._globals]
        return values

    def _hold_all(self, call: Call) -> bool:
        """Compares the places behind versions that differ, and notes the new versions."""
        flags_changed = Array.num_changes != self._num_changes
        classes_changed = [_version(found) for found in self._classes] != self._class_versions
        moved = []
        for group in self._groups:
            is_moved = [_version(found) for found in group.dicts] != group.versions or any(
                len(now) != len(was) or any(map(is_not, now, was)) for now, was in group.lists
            )
            if is_moved:
                moved.append(group)
            if (is_moved or flags_changed or classes_changed) and not self._compare(group.reads, call):
                return False
        for reads in (self._variables, self._direct, self._gradients):
            if not self._compare(reads, call):
                return False
        if not self._bind(self._sources, call):
            return False
        for group in moved:
            # State that changes although nothing of it that was read does: from now on that is compared itself.
            if not group.lists and all(isinstance(place, Attribute) for place, _ in group.reads):
                self._groups.remove(group)
                self._direct.extend(group.reads)
                self._ask_always({place.key for place, _ in group.reads})
        self._refresh(call)
        return True

    def _ask_always(self, keys: set[Any]) -> None:
        """Has tensors at or below places looked up at each call: no version is watched that tells of others there."""
        known = set(map(id, self._path_sources))
        self._path_sources += [
            source
            for source in self._sources
            if id(source) not in known and any(not keys.isdisjoint(_keys_above(place)) for place in source.places)
        ]

    def _compare(self, reads: list[tuple[Place, Token]], call: Call) -> bool:
        for place, token in reads:
            if token.change(place, place.get(call), call) is not None:
                return self._adopt_and_compare(place, token, call)
        return True

    def _adopt_and_compare(self, place: Place, token: Token, call: Call) -> bool:
        """Makes arrays of host tensors in a place, where arrays were, and compares again."""
        found = [source for source in self._sources if source.is_array]
        adopted = False
        for source in found:
            now = source.places[0].get(call) if source.places else None
            if isinstance(now, torch.Tensor) and not isinstance(now, Array):
                array = self._adopt(source, now)
                if array is not None:
                    source.places[0].set(call, array)
                    adopted = True
        return adopted and token.change(place, place.get(call), call) is None

    def _bind(self, sources: list[TensorSource], call: Call) -> bool:
        if self._unbound(sources, call) is not None:
            return False
        for source in sources:
            if source.places:
                source.tensor = source.places[0].get(call)
                self._memory = None
        return True

    def _unbound(self, sources: list[TensorSource], call: Call) -> TensorSource | None:
        """Returns a source whose places have not one tensor, or that shares its memory with others than it did."""
        asked = set(map(id, sources))
        owner_of: dict[int, TensorSource] = {}
        memory: dict[int, int] = {}
        for source in self._sources:
            if id(source) not in asked:
                first = self._first_of[id(source)]
                memory[id(first)] = key = memory_of(source.tensor)
                owner_of[key] = first
        for source in sources:
            tensors = [place.get(call) for place in source.places] or [source.tensor]
            if any(tensor is not tensors[0] for tensor in tensors) or not _fits(source, tensors[0]):
                return source
            first, key = self._first_of[id(source)], memory_of(tensors[0])
            if owner_of.setdefault(key, first) is not first or memory.setdefault(id(first), key) != key:
                return source
        return None

    # ---- set-up

    def _sort(self, call: Call) -> None:
        groups: dict[Any, _Group] = {}
        classes: dict[type, None] = {}
        for place, token in self._reads:
            if isinstance(place, Cell):
                self._variables.append((place, token))
                self._cells.append(place)
            elif isinstance(place, Variable):
                self._variables.append((place, token))
                self._globals.append((place.namespace, place.name))
            elif isinstance(place, Gradient):
                self._gradients.append((place, token))
                continue
            value = place.get(call)
            inner, lists = list(token.dicts(value)), list(token.lists(value))
            behind = dicts_behind(place, call) if place.is_fixed else None
            if isinstance(place, (Cell, Fixed, Variable)):
                behind = []
            if isinstance(place, Attribute) and place.is_fixed:
                classes.update(dict.fromkeys(type(place.parent.get(call)).__mro__))
            is_counted = token.is_counted and place.is_fixed
            if behind is None or not is_counted or any(id(item) in self._written for item in (*behind, *inner)):
                self._direct.append((place, token))
                continue
            if inner or lists or behind:  # a container's group is of its own: it may hold lists
                key = (id(behind[0]) if behind else id(token), bool(inner or lists))
                groups.setdefault(key, _Group([], [], [], [])).reads.append((place, token))
        self._groups = list(groups.values())
        self._classes = [_dict_of_class(cls) for cls in classes if cls is not object]

    def _may_move(self, place: Place, call: Call) -> bool:
        """Whether another tensor may be at a place although no version says so."""
        if isinstance(place, Gradient) or not place.is_fixed:
            return True
        behind = dicts_behind(place, call)
        if behind is None:  # a slot, which no dictionary holds; or anything, where writes to attributes are not counted
            return isinstance(place, Attribute) or not attribute_writes_are_counted()
        return any(id(item) in self._written for item in behind)

    def _refresh(self, call: Call) -> None:
        self._num_changes = Array.num_changes
        for group in self._groups:
            inner = [item for place, token in group.reads for item in token.dicts(place.get(call))]
            behind = [item for place, _ in group.reads for item in dicts_behind(place, call) or ()]
            group.dicts = list({id(item): item for item in (*behind, *inner)}.values())
            group.lists = [(item, list(item)) for place, token in group.reads for item in token.lists(place.get(call))]
            group.versions = [_version(found) for found in group.dicts]
        self._class_versions = [_version(found) for found in self._classes]
        unique = {id(found): found for group in self._groups for found in group.dicts}
        self._empty = [found for found in unique.values() if not found]
        unique = {key: found for key, found in unique.items() if found}
        unique.update({id(found): found for found in self._classes})
        self._all_dicts = list(unique.values())
        self._guard = _version_guard(self._all_dicts)
        self._values = self._variable_values()
        self._list_items = [(now, list(map(id, was))) for group in self._groups for now, was in group.lists]


def _changed_numbers(place: Place, token: Token, call: Call) -> Iterator[Any]:
    value = place.get(call)
    if isinstance(token, Exactly) and type(token.value) in (int, float):
        if type(value) is type(token.value) and not same_number(value, token.value):
            yield place.key
    elif isinstance(token, Contents) and type(value) is token.type and keys_of(value) == token.keys:
        for key, item in zip(token.keys, token.items, strict=False):  # the items of a set are its keys
            yield from _changed_numbers(Entry(place, key_of(key)), item, call)


def _keys_above(place: Any) -> Iterator[Any]:
    """Returns the keys of a place and of those that it is in."""
    while place is not None:
        yield place.key
        place = getattr(place, "parent", None)


def _fits(source: TensorSource, tensor: Any) -> bool:
    """Whether a tensor is where, and of the kind that, the trace's program wants it."""
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != source.shape or tensor.dtype != source.dtype:
        return False
    if source.home is None or not isinstance(tensor, Array) or tensor.mesh is None:
        return True
    mesh, placements = source.home
    return tensor.mesh.root is mesh.root and tensor.sharding == placements


def _version(found: dict[Any, Any]) -> int:
    version: int = _guards.dict_version(found)
    return version


def _dict_of_class(cls: type) -> dict[Any, Any]:
    """Returns the dictionary behind a class's read-only `__dict__`, whose version counts its changes."""
    found: dict[Any, Any] = next(item for item in gc.get_referents(cls.__dict__) if isinstance(item, dict))
    return found


def _version_guard(dicts: list[dict[Any, Any]]) -> Any:
    """Returns what checks, in C++, that none of a list of dictionaries has changed since now."""
    root = _guards.RootGuardManager()
    for index, found in enumerate(dicts):
        manager = root.list_getitem_manager(index, f"dict {index}", found, GuardManagerType.GUARD_MANAGER)
        manager.add_dict_version_guard(found, [f"dict {index}"])
    return root
