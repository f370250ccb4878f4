"""Values that a traced function can read although it is only traced: those that no array has a part in.

Library code asks tensors that it has just made from Python numbers: `if torch.rand([]) < self.layerdrop`,
`int(positions.max())`. A graph that reads no input and no random number has one value, so the question has an answer.
So it has where the inputs are host tensors, which this call was given: `if torch.all(attention_mask == 1)`. That
answer may be another one at the next call. `ArgumentRead` keeps how it was computed, to be asked again then.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from torchways.array import Array
from torchways.capture.python_state.tokens import TensorSource

#: Comparisons of a tensor with a number, and what they say of one element.
_COMPARISONS = {
    torch.ops.aten.lt.Scalar: operator.lt,
    torch.ops.aten.le.Scalar: operator.le,
    torch.ops.aten.gt.Scalar: operator.gt,
    torch.ops.aten.ge.Scalar: operator.ge,
}
#: What `torch.rand` returns is from 0 to this.
_BELOW_ONE = 1.0 - 2.0**-24
#: Larger tensors are not computed at capture.
_MAX_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class ArgumentRead:
    """A value that a trace read of host tensors among a call's arguments, or of tensors of Python's state.

    Attributes:
        compute: computes it from those tensors.
        sources: which of the call's tensors these are, or which of Python's state.
        value: what it was: a bool, a number, or positions (tensors of integers).
        line: of the user, that read it.
    """

    compute: torch.fx.GraphModule
    sources: tuple[int | TensorSource, ...]
    value: Any
    line: str

    def again(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Returns the value for the tensors of another call; waits for arrays."""
        found = [tensors[source] if isinstance(source, int) else source.tensor for source in self.sources]
        with torch.no_grad():
            return self.compute(*(item._buffer.read() if isinstance(item, Array) else item.detach() for item in found))

    def is_same(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the tensors of another call give the same value."""
        pairs = zip(pytree.tree_leaves(self.again(tensors)), pytree.tree_leaves(self.value), strict=True)
        return all(torch.equal(now, was) if isinstance(was, torch.Tensor) else now == was for now, was in pairs)


class KnownValues:
    """Computes the nodes of a growing graph that depend on no array, when somebody asks for one of them.

    The graph has in-place operators: nodes are run in its order, on real tensors, so what shares memory there does
    here. An in-place operator with something unknown makes all that shares its target's memory unknown.

    Args:
        root: holds the tensors that the graph has as attributes.
        graph: the graph under construction.
        start_of: returns what a placeholder stands for (None: it is the same in each run), and its value if that may
            be read.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        graph: torch.fx.Graph,
        start_of: Callable[[torch.fx.Node], tuple[Any, torch.Tensor | None]],
    ) -> None:
        self._root = root
        self._graph = graph
        self._placeholder = start_of
        #: Nodes that stand for what may be another value at the next call.
        self._arguments: dict[torch.fx.Node, int | TensorSource] = {}
        self._values: dict[torch.fx.Node, Any] = {}
        self._uniform: set[torch.fx.Node] = set()
        self._last: torch.fx.Node = graph._root
        #: All nodes that were computed, in order, and what they were (which keeps its memory from being used again).
        self._computed: dict[torch.fx.Node, Any] = {}
        #: What nodes without known inputs were at first.
        self._initial: dict[torch.fx.Node, torch.Tensor] = {}

    def value_of(self, node: torch.fx.Node) -> torch.Tensor | None:
        """Returns the value of a node as it is after all operators so far, or None if it is not known."""
        with _disable_current_modes(), torch.no_grad():
            while self._last.next is not self._graph._root:
                self._last = self._last.next
                self._run(self._last)
        value = self._values.get(node)
        return value if isinstance(value, torch.Tensor) else None

    def read(
        self,
        function: Any,
        nodes: dict[int, torch.fx.Node],
        values: dict[int, torch.Tensor],
        args: Any,
        kwargs: Any,
        result: Any,
        line: str,
    ) -> ArgumentRead | None:
        """Returns how a value was read of arguments, or None if none had a part in it.

        Args:
            function: the operator that read it.
            nodes: of its tensors, by the tensors' identity; they are known.
            values: of its tensors, also where they have no node.
            args, kwargs: its arguments.
            result: what it returned.
            line: of the user.
        """
        steps = self._steps_to(nodes.values())
        if not any(step in self._arguments for step in steps):
            return None
        graph, root = torch.fx.Graph(), torch.nn.Module()
        arguments = [step for step in steps if step in self._arguments]
        made = {step: graph.placeholder(f"argument_{number}") for number, step in enumerate(arguments)}
        for number, step in enumerate(steps):
            if step in self._initial:
                root.register_buffer(f"value_{number}", self._initial[step])
                made[step] = graph.get_attr(f"value_{number}")
        if any(map(_is_mutable, steps)):  # they write to copies
            made = {step: graph.call_function(torch.ops.aten.clone.default, (start,)) for step, start in made.items()}
        for step in steps:
            if step not in made:
                made[step] = graph.node_copy(step, made.__getitem__)
                made[step].meta.clear()
        for key, value in values.items():
            if key not in nodes:
                root.register_buffer(f"constant_{key}", value)
        operands = {key: made[nodes[key]] if key in nodes else graph.get_attr(f"constant_{key}") for key in values}
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: operands[id(tensor)], (args, kwargs))
        graph.output(graph.call_function(function, tuple(args), kwargs))
        sources = tuple(self._arguments[step] for step in arguments)
        return ArgumentRead(torch.fx.GraphModule(root, graph), sources, result, line)

    def _steps_to(self, nodes: Iterable[torch.fx.Node]) -> list[torch.fx.Node]:
        """Returns the computed nodes that these depend on, with what wrote to memory that they share, in order."""
        needed = set(nodes)
        shared = {storage for node in needed for storage in _storages(self._computed[node])}
        steps = []
        for node, value in reversed(self._computed.items()):
            if node in needed or (_is_mutable(node) and not shared.isdisjoint(_storages(value))):
                steps.append(node)
                if node not in self._initial:
                    needed.update(node.all_input_nodes)
                for item in (node, *(node.all_input_nodes if node not in self._initial else ())):
                    shared.update(_storages(self._computed[item]))
        return steps[::-1]

    def _run(self, node: torch.fx.Node) -> None:
        if node.op in ("get_attr", "placeholder"):
            value = self._start_of(node)
            if isinstance(value, torch.Tensor) and value.numel() <= _MAX_ELEMENTS:
                self._note(node, value.detach().clone())
                if node not in self._arguments:
                    self._initial[node] = value.detach().clone()
            return
        if node.op != "call_function":
            return
        target: Any = node.target
        if target is torch.ops.aten.rand.default:
            self._uniform.add(node)
        if target in _COMPARISONS and node.args[0] in self._uniform:
            self._compare(node)
        elif all(argument in self._values for argument in node.all_input_nodes) and _is_deterministic(node):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda argument: self._values[argument])
            try:
                self._note(node, target(*args, **kwargs))
            except Exception:  # an operator that only tracing knows
                self._forget_written(node)
        else:
            self._forget_written(node)

    def _compare(self, node: torch.fx.Node) -> None:
        """A comparison of a random number with one that is out of its range is known."""
        target: Any = node.target
        number: Any = node.args[1]
        holds = {_COMPARISONS[target](bound, number) for bound in (0.0, _BELOW_ONE)}
        if len(holds) == 1:
            value = torch.full(node.meta["val"].shape, holds.pop())
            self._note(node, value)
            self._initial[node] = value.clone()

    def _start_of(self, node: torch.fx.Node) -> Any:
        """Returns what a node without inputs is."""
        if node.op == "get_attr":
            return getattr(self._root, str(node.target))
        source, value = self._placeholder(node)
        if source is not None and value is not None:
            self._arguments[node] = source
        return value

    def _note(self, node: torch.fx.Node, value: Any) -> None:
        self._values[node] = self._computed[node] = value

    def _forget_written(self, node: torch.fx.Node) -> None:
        if not _is_mutable(node):
            return
        for argument in node.all_input_nodes:
            value = self._values.get(argument)
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()._cdata
                self._values = {
                    other: kept
                    for other, kept in self._values.items()
                    if not (isinstance(kept, torch.Tensor) and kept.untyped_storage()._cdata == storage)
                }


def _is_mutable(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _storages(value: Any) -> set[int]:
    return {item.untyped_storage()._cdata for item in pytree.tree_leaves(value) if isinstance(item, torch.Tensor)}


def _is_deterministic(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    sizes = [item.numel() for item in values if isinstance(item, torch.Tensor)]
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags and all(size <= _MAX_ELEMENTS for size in sizes)
