"""Values that are known at trace time, because they depend on no array.

Library code asks for values of tensors that it has just made from Python numbers: `if torch.rand([]) < self.layerdrop`,
`int(positions.max())`. A graph that reads no input and no random number has one value, so the question has an answer.
It also has one if the inputs are host tensors that this call was given: `if torch.all(attention_mask == 1)`. At the
next call the answer may differ, so `ArgumentRead` keeps how it was computed, to ask again.
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
from torchways.graphs import run_operator

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
        line: the user's, that read it.
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
    """Computes nodes of a graph under construction that depend on no array, when the function asks for one of them.

    Args:
        start_of: returns what a placeholder stands for (None: it is the same in each run), and its value if that may
            be read.
    """

    def __init__(self, start_of: Callable[[torch.fx.Node], tuple[Any, torch.Tensor | None]]) -> None:
        self._placeholder = start_of
        #: Nodes that stand for what may be another value at the next call.
        self._arguments: dict[torch.fx.Node, int | TensorSource] = {}
        #: What nodes are; None: not known.
        self._values: dict[torch.fx.Node, Any] = {}
        #: What nodes without known inputs are.
        self._initial: dict[torch.fx.Node, torch.Tensor] = {}

    def value_of(self, node: torch.fx.Node) -> torch.Tensor | None:
        """Returns the value of a node, or None if it is not known."""
        with _disable_current_modes(), torch.no_grad():
            waiting = [node]
            while waiting:
                last = waiting[-1]
                missing = [item for item in last.all_input_nodes if item not in self._values]
                if last in self._values or not missing:
                    waiting.pop()
                    if last not in self._values:
                        self._values[last] = self._run(last)
                elif any(self._values.get(item, ...) is None for item in last.all_input_nodes):
                    self._values[waiting.pop()] = None
                else:
                    waiting.append(missing[0])
        value = self._values[node]
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
        """Returns how a value was computed from arguments, or None if it depends on none.

        Args:
            function: the operator that read it.
            nodes: of its tensors, by the tensors' identity; they are known.
            values: of its tensors, also where they have no node.
            args, kwargs: its arguments.
            result: what it returned.
            line: the user's.
        """
        steps = self._steps_to(nodes.values())
        arguments = [step for step in steps if step in self._arguments]
        if not arguments:
            return None
        graph, root = torch.fx.Graph(), torch.nn.Module()
        made = {step: graph.placeholder(f"argument_{number}") for number, step in enumerate(arguments)}
        for number, step in enumerate(steps):
            if step in self._initial:
                root.register_buffer(f"value_{number}", self._initial[step])
                made[step] = graph.get_attr(f"value_{number}")
            elif step not in made:
                made[step] = graph.node_copy(step, made.__getitem__)
                made[step].meta.clear()
                if step.target is torch.ops.aten.view.default:  # which asks for strides, as `run_operator` says
                    made[step].target = torch.ops.aten.reshape.default
        for key, value in values.items():
            if key not in nodes:
                root.register_buffer(f"constant_{key}", value)
        operands = {key: made[nodes[key]] if key in nodes else graph.get_attr(f"constant_{key}") for key in values}
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: operands[id(tensor)], (args, kwargs))
        graph.output(graph.call_function(function, tuple(args), kwargs))
        sources = tuple(self._arguments[step] for step in arguments)
        return ArgumentRead(torch.fx.GraphModule(root, graph), sources, result, line)

    def _steps_to(self, nodes: Iterable[torch.fx.Node]) -> list[torch.fx.Node]:
        """Returns the nodes that these depend on, in an order in which they can run."""
        steps: dict[torch.fx.Node, None] = {}
        waiting = list(nodes)
        while waiting:
            node = waiting[-1]
            inputs = [] if node in self._initial else [item for item in node.all_input_nodes if item not in steps]
            if inputs:
                waiting.extend(inputs)
            else:
                steps[waiting.pop()] = None
        return list(steps)

    def _run(self, node: torch.fx.Node) -> Any:
        """Returns what a node whose inputs were asked for is."""
        if node.op == "placeholder":
            source, value = self._placeholder(node)
            if value is None or value.numel() > _MAX_ELEMENTS:
                return None
            if source is not None:
                self._arguments[node] = source
            else:
                self._initial[node] = value.detach().clone()
            return value.detach().clone()
        target: Any = node.target
        if target in _COMPARISONS and getattr(node.args[0], "target", None) is torch.ops.aten.rand.default:
            return self._compare(node)
        inputs = node.all_input_nodes
        if node.op != "call_function" or not _is_deterministic(node):
            return None
        if any(self._values[item] is None for item in inputs):
            return None
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        try:
            return run_operator(target, args, kwargs)
        except Exception:  # an operator that only tracing knows
            return None

    def _compare(self, node: torch.fx.Node) -> torch.Tensor | None:
        """A comparison of a random number with one that is out of its range is known."""
        target: Any = node.target
        number: Any = node.args[1]
        holds = {_COMPARISONS[target](bound, number) for bound in (0.0, _BELOW_ONE)}
        if len(holds) > 1:
            return None
        value = torch.full(node.meta["val"].shape, holds.pop())
        self._initial[node] = value.clone()
        return value


def _is_deterministic(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    sizes = [item.numel() for item in values if isinstance(item, torch.Tensor)]
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags and all(size <= _MAX_ELEMENTS for size in sizes)
