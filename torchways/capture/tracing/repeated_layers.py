"""Layers that repeat, and those that users mark for torch.compile: compiled once, however often a program has them.

Marks are `torch.compiler.nested_compile_region`, `Module.compile()` and `torch.compile(module)`. Layers of a
`ModuleList`, `Sequential` or `ModuleDict` that has several alike need no mark in training on a slice of one device.
There, a step of 24 layers compiles as fast as one of 4, and costs a few dispatches more. On several devices, backward
would read values of forward that are passed between computations, split in a way that has to be guessed. There, users
mark layers, or leave the whole to XLA.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from torchways.capture.library.replacement import Replacement, replaced

#: If at least so many layers are alike, they are compiled once.
FEWEST_LAYERS = 4

_CONTAINERS = (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)

#: By its full name: `torch._higher_order_ops.invoke_subgraph` is an operator's object.
_INVOKE_SUBGRAPH = importlib.import_module("torch._higher_order_ops.invoke_subgraph")


@contextmanager
def repeated_layers(region: Callable[[str], Any], is_automatic: Callable[[], bool]) -> Iterator[None]:
    """While it is open, calls of such layers and of marked functions are regions.

    Args:
        region: opens a region of the trace, by its name.
        is_automatic: whether layers that are not marked are to be regions, now.
    """
    calls = _ModuleCalls(region, is_automatic)
    replacements = [
        Replacement(_INVOKE_SUBGRAPH, "invoke_subgraph_placeholder", calls.of_marked_functions),
        Replacement(torch.nn.Module, "__call__", calls.of_modules),
    ]
    with ExitStack() as stack:
        # Importing it takes seconds, and who has not imported it has compiled nothing.
        if (dynamo := sys.modules.get("torch._dynamo.eval_frame")) is not None:
            replacements.append(Replacement(dynamo.OptimizedModule, "__call__", calls.of_compiled_modules))
            # Other functions under torch.compile are called as they are.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for item in replacements:
            stack.enter_context(replaced(item))
        yield


class _ModuleCalls:
    def __init__(self, region: Callable[[str], Any], is_automatic: Callable[[], bool]) -> None:
        self._region = region
        self._is_automatic = is_automatic
        #: Modules whose children were looked at, and those of their children that repeat.
        self._seen: set[int] = set()
        self._repeated: set[int] = set()

    def of_marked_functions(self, _: Any) -> Any:
        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            with self._region(getattr(function, "__qualname__", type(function).__name__)):
                return function(*args, **kwargs)

        return call

    def of_compiled_modules(self, _: Any) -> Any:
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            with self._region(type(module._orig_mod).__name__):
                return module._orig_mod(*args, **kwargs)

        return call

    def of_modules(self, original: Any) -> Any:
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            self._look_at(module)
            is_marked = _state(module).get("_compiled_call_impl") is not None
            if is_marked or (id(module) in self._repeated and self._is_automatic()):
                with self._region(type(module).__name__):
                    return module._call_impl(*args, **kwargs)
            return original(module, *args, **kwargs)

        return call

    def _look_at(self, module: Any) -> None:
        """Notes which children of a module, and of containers among them, repeat."""
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        children = [child for child in _state(module)["_modules"].values() if child is not None]
        for container in (module, *children):
            if not isinstance(container, _CONTAINERS):
                continue
            layers = [layer for layer in _state(container)["_modules"].values() if layer is not None]
            kinds = [_kind(layer) for layer in layers]
            times = Counter(kinds)
            for layer, kind in zip(layers, kinds, strict=True):
                if times[kind] >= FEWEST_LAYERS and _is_composite(layer):
                    self._repeated.add(id(layer))


def _state(module: Any) -> Any:
    """Returns a module's attributes; a trace takes no note of that."""
    return object.__getattribute__(module, "__dict__")


def _kind(module: Any) -> Any:
    """Returns what layers that may be alike have in common: classes, and shapes of parameters."""
    state = _state(module)
    shapes = [(name, None if item is None else item.shape) for name, item in state["_parameters"].items()]
    children = [(name, None if item is None else _kind(item)) for name, item in state["_modules"].items()]
    return type(module), tuple(shapes), tuple(children)


def _is_composite(module: Any) -> bool:
    """Whether a layer is made of several that have parameters: a call of one alone would cost more than it computes."""
    children = [child for child in _state(module)["_modules"].values() if child is not None]
    return sum(any(_state(part)["_parameters"] for part in child.modules()) for child in children) > 1
