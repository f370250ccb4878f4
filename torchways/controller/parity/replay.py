"""Graphs of compiled functions run by plain PyTorch on the CPU, operator by operator."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from torchways import operators
from torchways.graphs import run_operator, serialize_graph

_WIDE = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.complex64: torch.complex128,
}


def is_drawn(node: torch.fx.Node) -> bool:
    """Whether a node draws random numbers, or is one of several tensors that a node drew."""
    return operators.is_random(node.args[0] if node.target is operator.getitem else node)  # type: ignore[arg-type]


def operator_values(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """Returns the nodes whose values are tensors that operators made, in order."""
    return [
        node for node in graph.nodes if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
    ]


def outputs_of(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """Returns the nodes that a graph outputs."""
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def with_outputs(graph: torch.fx.Graph, more: Iterable[torch.fx.Node]) -> bytes:
    """Returns a graph, serialized, with more of its nodes as outputs, behind its own."""
    output = graph.output_node()
    old = output.args
    output.args = ((*outputs_of(graph), *more),)
    data = serialize_graph(graph)
    output.args = old
    return data


def replay(
    graph: torch.fx.Graph,
    inputs: Sequence[torch.Tensor],
    given: Mapping[torch.fx.Node, torch.Tensor],
    *,
    in_float64: bool = False,
) -> list[torch.Tensor]:
    """Runs a graph.

    Args:
        graph: of core ATen, flat.
        inputs: of its placeholders, on the CPU.
        given: values of nodes that are not computed.
        in_float64: computes in float64 whatever the graph computes in a narrower floating-point dtype.
    """
    return list(_Replay(graph, given, in_float64).run(*inputs, enable_io_processing=False))


def call_operator(target: Any, args: Any, kwargs: Any, *, in_float64: bool = False) -> Any:
    """Calls an operator; in float64: as `replay` says."""
    if not in_float64:
        return run_operator(target, args, kwargs)
    args, kwargs = pytree.tree_map(_widened, (args, kwargs))
    return pytree.tree_map(_widened, run_operator(target, args, kwargs))


class _Replay(torch.fx.Interpreter):
    def __init__(self, graph: torch.fx.Graph, given: Mapping[torch.fx.Node, torch.Tensor], in_float64: bool) -> None:
        super().__init__(torch.nn.Module(), graph=graph)
        self._given = given
        self._in_float64 = in_float64

    def run_node(self, n: torch.fx.Node) -> Any:
        if n in self._given:
            return self._given[n]
        return (
            None if is_drawn(n) or n.target is operators.MANUAL_SEED else super().run_node(n)
        )  # of several random tensors each is given

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return call_operator(target, args, kwargs, in_float64=self._in_float64)


def _widened(leaf: Any) -> Any:
    if isinstance(leaf, torch.dtype):
        return _WIDE.get(leaf, leaf)
    return leaf.to(_WIDE.get(leaf.dtype, leaf.dtype)) if isinstance(leaf, torch.Tensor) else leaf
