"""Values that a traced function can read although it is only traced: those that depend on nothing outside it.

Library code asks tensors that it has just made from Python numbers: `if torch.rand([]) < self.layerdrop`,
`int(positions.max())`. A graph that reads no input and no random number has one value, so the question has an answer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

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


class KnownValues:
    """Computes the nodes of a growing graph that depend on no placeholder, when somebody asks for one of them.

    The graph has in-place operators: nodes are run in its order, on real tensors, so what shares memory there does
    here. An in-place operator with something unknown makes all that shares its target's memory unknown.

    Args:
        root: holds the tensors that the graph has as attributes.
        graph: the graph under construction.
        constant_of: returns the tensor that a placeholder stands for, where that is the same in each run.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        graph: torch.fx.Graph,
        constant_of: Callable[[torch.fx.Node], torch.Tensor | None],
    ) -> None:
        self._root = root
        self._graph = graph
        self._constant_of = constant_of
        self._values: dict[torch.fx.Node, Any] = {}
        self._uniform: set[torch.fx.Node] = set()
        self._last: torch.fx.Node = graph._root

    def value_of(self, node: torch.fx.Node) -> torch.Tensor | None:
        """Returns the value of a node as it is after all operators so far, or None if it is not known."""
        with _disable_current_modes(), torch.no_grad():
            while self._last.next is not self._graph._root:
                self._last = self._last.next
                self._run(self._last)
        value = self._values.get(node)
        return value if isinstance(value, torch.Tensor) else None

    def _run(self, node: torch.fx.Node) -> None:
        if node.op in ("get_attr", "placeholder"):
            value = getattr(self._root, str(node.target)) if node.op == "get_attr" else self._constant_of(node)
            if type(value) is torch.Tensor:
                self._values[node] = value.clone()
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
                self._values[node] = target(*args, **kwargs)
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
            self._values[node] = torch.full(node.meta["val"].shape, holds.pop())

    def _forget_written(self, node: torch.fx.Node) -> None:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
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


def _is_deterministic(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    sizes = [item.numel() for item in values if isinstance(item, torch.Tensor)]
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags and all(size <= _MAX_ELEMENTS for size in sizes)
