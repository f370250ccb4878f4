"""Notes what a function reads of Python's state, and what it writes there, while it is traced.

Reads of attributes are seen by patches of the classes of objects that the function can reach (attribute_patches.py);
those of globals and closures by what its code names (functions.py); those of containers when they are reached. Writes
are found at the end, by comparison with what everything was when it was reached (kept_state.py), so it does not matter
how they were made. Then all is put back, and each run makes the writes again.
"""

from __future__ import annotations

import functools
import io
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from torchways.array import Array
from torchways.capture.python_state.attribute_patches import AttributePatches, active_observer, unpatched
from torchways.capture.python_state.functions import (
    CodeReads,
    is_our_function,
    is_tracked_class,
    is_user_code,
    is_user_module,
    reads_of,
)
from torchways.capture.python_state.host_numbers import HostNumbers, node_of
from torchways.capture.python_state.kept_state import KeptState, Write, has_hidden_state
from torchways.capture.python_state.places import (
    MISSING,
    Argument,
    Attribute,
    Call,
    Cell,
    Entry,
    Fixed,
    OwnAttribute,
    Place,
    Variable,
)
from torchways.capture.python_state.tokens import (
    Contents,
    Exactly,
    OfType,
    OneOf,
    Same,
    SameAs,
    SameElements,
    TensorSource,
    Token,
    is_container,
    is_function,
    is_plain,
    items_of,
    key_of,
    keys_of,
    source_of,
)
from torchways.capture.source import user_line
from torchways.capture.tensor_kinds import check_tensor_kind
from torchways.errors import CaptureError

#: Attributes of an optimizer: of groups, numbers are inputs; state that its own step reads is noted after the trace.
_OF_OPTIMIZERS = {"param_groups", "state", "defaults"}
#: Attributes whose reading says nothing: how Python and torch.nn look things up.
_UNNOTED = {"__class__", "__dict__", "__doc__", "__module__", "__weakref__"}


@dataclass(eq=False)
class Watcher:
    """Notes what one trace reads and writes.

    Args:
        call: the call that is traced.
        symbolic: keys of places whose numbers are inputs of the program.
    """

    call: Call
    numbers: HostNumbers
    symbolic: frozenset[Any]
    #: What was read, by the place's key.
    reads: dict[Any, tuple[Place, Token]] = field(default_factory=dict)
    #: Tensors that were found, by identity.
    sources: dict[int, TensorSource] = field(default_factory=dict)
    paused: int = 0
    in_optimizer: bool = False
    thread: int = field(default_factory=threading.get_ident)
    _owners: dict[int, Place] = field(default_factory=dict)
    _alive: list[Any] = field(default_factory=list)
    _attributes: set[tuple[int, str]] = field(default_factory=set)
    _kept: KeptState = field(default_factory=KeptState)
    _functions: set[int] = field(default_factory=set)
    _codes: list[CodeReads] = field(default_factory=list)
    #: The user's classes, with what messages call them, and whether only code that asks objects for theirs has them.
    _classes: dict[type, tuple[str, bool]] = field(default_factory=dict)
    _patches: AttributePatches = field(default_factory=AttributePatches)
    _is_over: bool = False
    #: Tuples of numbers that stand in for a place's own.
    _stand_ins: list[Any] = field(default_factory=list)

    # ---- while tracing

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches everything that runs inside, in this thread."""
        with self._patches.observed_by(self):
            yield

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Makes reads inside not matter."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def source(self, tensor: torch.Tensor) -> TensorSource:
        """Returns the source of a tensor that is no part of the trace."""
        found = self.sources.get(id(tensor))
        if found is None:
            found = self.sources[id(tensor)] = source_of(tensor)
            self._alive.append(tensor)
            for hook in found.hooks:
                self.note_object_or_function(Fixed(hook, "a hook of a gradient"), hook)
        return found

    def note(self, place: Place, value: Any) -> Any:
        """Notes that a place was read.

        Returns:
            the value that the trace is to go on with: a number that is an input stands in for one that changes.
        """
        if place.key in self.reads:
            return value
        with self.pause():
            token, value = self._token(place, value)
            if token is not None:
                self.reads[place.key] = place, token
        return value

    def _token(self, place: Place, value: Any, *, free_numbers: bool = False) -> tuple[Token | None, Any]:
        if (node := node_of(value)) is not None:
            known_place = node.numbers.steps[node.step].place
            if isinstance(place, Attribute) and known_place is not None and not self._is_its_own(place):
                return SameAs(known_place), value
            return None, value
        if isinstance(value, torch.Tensor):
            if isinstance(value, FakeTensor) and not isinstance(value, Array):
                return None, value
            if value.is_nested:  # it has no shape
                check_tensor_kind(str(place), value, user_line())
            source = self.source(value)
            if all(known.key != place.key for known in source.places):
                source.places.append(place)
            return OneOf(source), value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and is_plain(value):
            is_item_of_tuple = isinstance(place, Entry) and isinstance(place.parent.get(self.call), tuple)
            if (free_numbers or place.key in self.symbolic) and not is_item_of_tuple and self._is_its_own(place):
                return self._number(place, value)
            return Exactly(value), value
        if is_plain(value):
            return Exactly(value), value
        if is_function(value):
            self.note_function(value)
            return Same(unpatched(value)), value
        if isinstance(value, types.ModuleType):
            return Same(value), value
        if is_container(value):
            known = self._owners.get(id(value))
            if known is not None and known.key != place.key and known.is_fixed and value in self._kept:
                return Same(value), value  # it is compared where it was reached first
            if is_tracked_class(type(value)):
                self.note_object(place, value)
            return self._contents(place, value, free_numbers), value
        if has_hidden_state(value):
            state = self._kept.keep_hidden(place, value)
            return (SameElements(value, state) if isinstance(value, np.ndarray) else Same(value)), value
        check_iterator(place, value)
        self.note_object(place, value)
        is_path = not self._owners.get(id(value), place).is_fixed
        return (OfType(type(value)) if is_path else Same(value)), value

    def _is_its_own(self, place: Place) -> bool:
        """Whether a value is kept at the place itself: not in the class of the object whose attribute it is."""
        if not isinstance(place, Attribute):
            return True
        owner = place.parent.get(self.call)
        cls: Any = type(owner)
        return place.name in getattr(owner, "__dict__", {}) or _kind_of_attribute(cls, place.name) is not None

    def _number(self, place: Place, value: Any) -> tuple[Token, Any]:
        number = self.numbers.at_place(place, value)
        if self._is_over:
            return OfType(type(value)), value
        if isinstance(place, Argument):  # whoever makes the call of the trace takes it from here
            return OfType(type(value)), number
        place.set(self.call, number)  # `put_back` restores it
        return OfType(type(value)), number

    def _contents(self, place: Place, value: Any, free_numbers: bool) -> Token:
        self._keep(place, value)
        keys, tokens = keys_of(value), []
        for key, item in zip(keys, items_of(value), strict=False):
            inner = Entry(place, key_of(key))
            if free_numbers and type(item) is tuple and item and all(type(number) is float for number in item):
                token: Token | None = self._tuple_of_numbers(inner, item)
            else:
                free = free_numbers and not isinstance(value, tuple)
                token, _ = self._token(inner, item, free_numbers=free)
            tokens.append(token or _ANYTHING)
        return Contents(type(value), keys, tuple(tokens), is_ordered=not free_numbers)

    def _tuple_of_numbers(self, place: Place, value: tuple[Any, ...]) -> Token:
        numbers = tuple(self.numbers.at_place(Entry(place, index), item) for index, item in enumerate(value))
        place.set(self.call, numbers)
        self._stand_ins.append(numbers)
        return Contents(tuple, keys_of(value), tuple(OfType(float) for _ in value))

    def _keep(self, place: Place, container: Any) -> None:
        if isinstance(container, tuple) or container in self._kept:
            return
        self._owners.setdefault(id(container), place)
        self._alive.append(container)
        self._kept.keep(place, container)

    def note_object(self, place: Place, value: Any) -> None:
        """Notes that an object was reached at a place: reads of its attributes are noted from here on."""
        if id(value) in self._owners:
            return
        owner: Place = Fixed(value, str(place)) if place.is_fixed else place
        self._owners[id(value)] = owner
        self._alive.append(value)
        cls = type(value)
        if not is_tracked_class(cls):
            return
        self._patches.patch(cls)
        self._note_class(cls, cls.__name__, is_asked_for=True)
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._kept.keep(Attribute(owner, "__dict__"), attributes)
            if isinstance(value, torch.nn.Module):
                for name in ("_parameters", "_buffers", "_modules"):
                    self._keep(Attribute(owner, name), attributes[name])
        for base in cls.__mro__:
            if is_user_module(base.__module__):
                for name, method in vars(base).items():  # Python calls these without looking for an attribute
                    is_special = name.startswith("__") and name.endswith("__") and name != "__init__"
                    if is_special and isinstance(method, types.FunctionType):
                        self.note_function(method)

    def note_attribute(self, owner: Any, name: str, value: Any) -> Any:
        """Notes that an attribute of an object was read; returns the value to go on with."""
        if (id(owner), name) in self._attributes or id(owner) not in self._owners:
            return value
        if name in _UNNOTED:
            # Python's and PyTorch's own code looks something up there, which is seen; a user's reads all of it.
            if name == "__dict__" and is_user_code(sys._getframe(2).f_code.co_filename):
                self._attributes.add((id(owner), name))
                self.note_container(Attribute(self._owners[id(owner)], name))
            return value
        if isinstance(owner, torch.optim.Optimizer) and name in _OF_OPTIMIZERS:
            if name == "param_groups" and not self.in_optimizer:
                self.note_container(Attribute(self._owners[id(owner)], name), free_numbers=True)
                self._attributes.add((id(owner), name))
                return value
            if self.in_optimizer or name == "defaults":
                return value
        with self.pause():
            cls: Any = type(owner)
            kind = _kind_of_attribute(cls, name)
            if isinstance(kind, property):
                self._note_property(kind)
                return value
            if self._kept.was_written(owner, name):
                return value
            self._attributes.add((id(owner), name))
            place = Attribute(self._owners[id(owner)], name)
            if isinstance(value, types.MethodType) and value.__self__ is owner:
                for base in type(owner).__mro__:
                    if isinstance(base.__dict__.get(name), types.FunctionType):
                        self.note_function(base.__dict__[name])
            if kind is not None and not isinstance(kind, property):
                self._kept.keep_single(place, value)  # a slot
        return self.note(place, value)

    def _note_property(self, found: property) -> None:
        if found.fget is not None:
            self.note_function(found.fget)

    def note_function(self, function: Any) -> None:
        """Notes that a function may be called: the variables that its code names are read."""
        if isinstance(function, types.MethodType):
            self.note_object_or_function(Fixed(function.__self__, "self"), function.__self__)
            function = function.__func__
        if isinstance(function, functools.partial):
            for item in (function.func, *function.args, function.keywords):
                self.note_object_or_function(Fixed(item, "an argument of functools.partial"), item)
            return
        if isinstance(function, type):
            self._note_class(function, function.__name__, is_asked_for=False)
        function = getattr(function, "traced_function", function)
        if not isinstance(function, types.FunctionType) or id(function) in self._functions:
            return
        self._functions.add(id(function))
        self._alive.append(function)
        is_users = is_user_code(function.__code__.co_filename)
        reads = reads_of(function.__code__)
        if is_users:
            self._note_code(reads)
            names = function.__code__.co_names
            if self.symbolic and "type" in names and ("int" in names or "float" in names):
                raise CaptureError(f"{function.__qualname__} may ask for a number's own type, which no stand-in has")
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            place = Cell(cell, name)
            value = place.get(self.call)
            if is_users:
                self._note_variable(place, value, reads)
            elif value is not MISSING and not (is_container(value) and is_our_function(function)):
                self.note_object_or_function(Fixed(value, name), value)
        if is_users:
            for name in (*reads.variables, *reads.assigned):
                place_of_global = Variable(function.__globals__, name)
                if name in function.__globals__ or name in reads.assigned:
                    self._note_variable(place_of_global, place_of_global.get(self.call), reads)
            for name, default in _defaults_of(function):
                self.note_object_or_function(Fixed(default, f"{name}, a default of {function.__name__}"), default)

    def note_object_or_function(self, place: Place, value: Any) -> None:
        """Notes a value that is always the same, but may have attributes, or hold items, that are not."""
        if is_function(value):
            self.note_function(value)
        elif is_container(value) and not is_plain(value):
            self.note(place, value)
        elif not is_plain(value) and not isinstance(value, torch.Tensor):
            self.note_object(place, value)

    def _note_variable(self, place: Place, value: Any, reads: CodeReads) -> None:
        self._kept.keep_single(place, value)
        self.note(place, value)
        if isinstance(value, type):
            self._note_class(value, str(place), is_asked_for=False)
        elif isinstance(value, types.ModuleType) and is_user_module(value.__name__):
            for name in [name for name in reads.attributes if name in vars(value)]:
                inner = Attribute(Fixed(value, str(place)), name)
                self._kept.keep_single(inner, inner.get(self.call))
                self._note_name(value, str(place), name)

    def _note_class(self, cls: type, name: str, *, is_asked_for: bool) -> None:
        """Notes that code may read, or write to, attributes of a class: those that it names.

        Args:
            name: what messages call it.
            is_asked_for: only code that asks an object for its class has it.
        """
        known = self._classes.get(cls)
        if not is_user_module(cls.__module__) or (known is not None and (is_asked_for or not known[1])):
            return
        self._classes[cls] = name, is_asked_for
        for reads in list(self._codes):
            self._note_names_of_class(cls, reads)

    def _note_code(self, reads: CodeReads) -> None:
        self._codes.append(reads)
        for cls in list(self._classes):
            self._note_names_of_class(cls, reads)

    def _note_names_of_class(self, cls: type, reads: CodeReads) -> None:
        cls_name, is_asked_for = self._classes[cls]
        if is_asked_for and not reads.asks_for_classes:
            return
        for name in reads.attributes:
            if name.startswith("__") or not hasattr(cls, name):
                continue
            for owner in cls.__mro__:
                if owner is cls or name in vars(owner):
                    own = OwnAttribute(owner, name)
                    self._kept.keep_single(own, own.get(self.call))
            self._note_name(cls, cls_name, name)

    def _note_name(self, owner: Any, owner_name: str, name: str) -> None:
        found = getattr(owner, name)
        if not isinstance(found, (property, types.ModuleType)):
            self.note(Attribute(Fixed(owner, owner_name), name), found)

    def note_container(self, place: Place, *, free_numbers: bool = False, is_new: bool = False) -> None:
        """Notes all that a container holds, as it is now.

        Args:
            free_numbers: numbers in it may be others at the next call: they are inputs.
            is_new: the trace is over; what is there is what the next call finds.
        """
        if place.key in self.reads and not is_new:
            return
        with self.pause():
            self._is_over = is_new
            value = place.get(self.call)
            self.reads[place.key] = place, self._contents(place, value, free_numbers)
            self._is_over = False

    def set_before(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute as if it had had that value when its owner was reached: it stays after the trace."""
        with self.pause():
            attributes = vars(owner)
            attributes[name] = value
            self._kept.set_before(attributes, name, value)

    def is_known(self, value: Any) -> bool:
        """Whether an object was there before the trace, as far as that reached it."""
        return id(value) in self._owners

    def owner_of(self, value: Any) -> Place:
        """Returns where an object that was noted is found again."""
        return self._owners[id(value)]

    # ---- afterwards

    def writes(self) -> list[Write]:
        """Returns what differs from what was there when it was reached.

        Raises:
            CaptureError: an array of numpy's does, or a generator of random numbers.
        """
        with self.pause():
            for place, value in self._kept.hidden_writes():
                what, remedy = "draws from", "draw outside the program and pass the numbers, or use torch.rand"
                if isinstance(value, np.ndarray):
                    what, remedy = "writes to", "write to a tensor, such as a buffer of a module"
                raise CaptureError(
                    f"a program, called at {user_line()}, {what} {place} ({type(value).__name__}), which a run cannot "
                    f"do again: {remedy}"
                )
            return list(self._kept.writes(self.call, self._stands_in))

    def _stands_in(self, place: Place, value: Any) -> bool:
        if isinstance(value, tuple):
            return any(value is stand_in for stand_in in self._stand_ins)
        node = node_of(value)
        step = node.numbers.steps[node.step] if node is not None else None
        if isinstance(place, Entry) and isinstance(place.parent, Attribute) and place.parent.name == "__dict__":
            place = Attribute(place.parent.parent, place.item)
        return step is not None and step.place is not None and step.place.key == place.key

    def put_back(self) -> None:
        """Restores everything as it was when it was reached."""
        with self.pause():
            self._kept.put_back(self.call)

    def forget(self) -> None:
        """Lets go of the call and of all that was reached."""
        vars(self).clear()

    def free_containers_that_are_only_added_to(self, writes: list[Write]) -> None:
        """Takes back the condition on a container's content if the code only ever adds to it."""
        for write in writes:
            name = getattr(write.place, "name", None)
            if write.kind != "extend" or name is None:
                continue
            loading = [reads for reads in self._codes if name in reads.all_loads]
            if loading and all(name in reads.only_added_to for reads in loading):
                key = write.place.key
                if key in self.reads:
                    self.reads[key] = write.place, OfType(type(write.place.get(self.call)))


def check_iterator(place: Place, value: Any) -> None:
    """Refuses iterators that are made in C and generators: nothing tells where they are, or sets them back.

    Raises:
        CaptureError: the value at the place is one.
    """
    cls = type(value)
    is_seen = is_tracked_class(cls) or cls.__module__.split(".")[0] == "torchways" or isinstance(value, io.IOBase)
    if isinstance(value, Iterator) and not is_seen:
        raise CaptureError(
            f"{place} is a {cls.__name__}, of which a program cannot tell how far it is, at {user_line()}: call next() "
            "outside the program and pass what it gives, or pass a list"
        )


class _Anything(Token):
    __slots__ = ()

    def change(self, place: Place, value: Any, call: Call) -> tuple[Place, str] | None:
        return None


_ANYTHING = _Anything()


def active_watcher() -> Watcher | None:
    """Returns what watches the trace under way in this thread, if any."""
    observer = active_observer()
    return observer if isinstance(observer, Watcher) else None


@functools.lru_cache(maxsize=65536)
def _kind_of_attribute(cls: type, name: str) -> Any:
    """Returns the property or slot that an attribute of a class's instances is; None: it is neither."""
    for base in cls.__mro__:
        if name in base.__dict__:
            found = base.__dict__[name]
            if isinstance(found, (property, types.MemberDescriptorType)):
                return found
            return None
    return None


def _defaults_of(function: types.FunctionType) -> list[tuple[str, Any]]:
    code, defaults = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    return [*zip(names, defaults, strict=True), *(function.__kwdefaults__ or {}).items()]
