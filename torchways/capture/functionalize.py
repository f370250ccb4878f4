"""Removes in-place operators from a traced graph: what is left is pure, and what was written comes out.

Labels (region, source line) of the old nodes carry over to the nodes that replace them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from torchways.capture.complex_numbers import call_on_pairs, can_be_pairs, has_rule
from torchways.capture.decompositions import pure_decomposition_table
from torchways.capture.tracer import RECOMPUTED_KEY, REGION_KEY, UPDATE_KEY
from torchways.graphs import SOURCE_KEY
from torchways.operators import BARRIER, is_random

_ALIASES = {torch.ops.aten.alias.default, torch.ops.aten.detach.default, torch.ops.aten.lift_fresh_copy.default}

#: Reductions that go over all dimensions if they name none.
_REDUCTIONS = {
    torch.ops.aten.sum.dim_IntList,
    torch.ops.aten.mean.dim,
    torch.ops.aten.amax.default,
    torch.ops.aten.amin.default,
}


@dataclass(frozen=True, slots=True)
class PureGraph:
    """A graph without side effects.

    Attributes:
        graph_module: flat; the output is the tuple of the old outputs followed by the new values of `written`.
        written: positions of the inputs that the old graph changed in place.
    """

    graph_module: torch.fx.GraphModule
    written: list[int]


class _LabellingInterpreter(torch.fx.Interpreter):
    """Runs a graph under a new trace and labels the new nodes as the old ones were."""

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op == "call_function" and n.target in _ALIASES:
            return self.fetch_args_kwargs_from_env(n)[0][0]
        graph = get_proxy_mode().tracer.graph  # type: ignore[union-attr]
        before = graph._root.prev
        result = self._run(n)
        node = before.next
        while node is not graph._root:
            for key in (REGION_KEY, SOURCE_KEY, RECOMPUTED_KEY, UPDATE_KEY):
                if key in n.meta:
                    node.meta.setdefault(key, n.meta[key])
            node = node.next
        return result

    def _run(self, n: torch.fx.Node) -> Any:
        return self._run_of_scalar(n) if _is_along_dim_of_scalar(n) else super().run_node(n)

    def _run_of_scalar(self, n: torch.fx.Node) -> Any:
        """Runs an operator along the dimension that a scalar does not have, which torch-xla refuses, on vectors."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda value: value.reshape(1) if value.dim() == 0 else value, (args, kwargs)
        )
        result = n.target(*args, **kwargs)  # type: ignore[operator]
        return pytree.tree_map(
            lambda value, like: value.reshape(like.shape) if isinstance(like, torch.Tensor) else value,
            result,
            n.meta["val"],
        )


class _InPairs(_LabellingInterpreter):
    """Runs a pure graph with pairs of real numbers for complex ones."""

    def _run(self, n: torch.fx.Node) -> Any:
        if not has_rule(n):
            return super()._run(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return call_on_pairs(n.target, args, kwargs)


def _is_along_dim_of_scalar(node: torch.fx.Node) -> bool:
    value = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], torch.fx.Node) else None
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dim() > 0:
        return False
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(argument.name == "dim" for argument in schema.arguments)


def make_pure(graph_module: torch.fx.GraphModule, decompositions: Mapping[Any, Any] | None = None) -> PureGraph:
    """Returns `graph_module` without in-place operators, dead nodes and aliases.

    Args:
        graph_module: all placeholders come first; every placeholder has a fake tensor in ``meta["val"]``.
        decompositions: of operators to be taken apart beyond those that always are.
    """
    fakes = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    with fakes[0].fake_mode if fakes else _no_fake_mode():
        pure = make_fx(
            functionalize(_LabellingInterpreter(graph_module).run, remove="mutations"),
            decomposition_table={**pure_decomposition_table(), **(decompositions or {})},
        )(*fakes)
        _drop_copies(pure.graph)
        if can_be_pairs(pure.graph):
            pure = make_fx(_InPairs(pure).run, decomposition_table=pure_decomposition_table())(*fakes)
    placeholders = [node for node in pure.graph.nodes if node.op == "placeholder"]
    written: dict[int, torch.fx.Node] = {}
    for node in list(pure.graph.nodes):
        # functionalize writes what it changed back to the inputs at the end; these become outputs instead.
        if node.target is torch.ops.aten.copy_.default and node.args[0] in placeholders:
            written[placeholders.index(node.args[0])] = node.args[1]
            node.replace_all_uses_with(node.args[1])
            pure.graph.erase_node(node)
    output = pure.graph.output_node()
    values = output.args[0] if isinstance(output.args[0], (list, tuple)) else [output.args[0]]
    output.args = ((*values, *written.values()),)
    _drop_copies(pure.graph)
    _spell_out_full_reductions(pure.graph)
    _clamp_slices(pure.graph)
    _fill_empty(pure.graph)
    pure.graph.eliminate_dead_code(lambda node: node.is_impure() and not is_random(node))
    _keep_recomputation(pure.graph)
    pure.recompile()
    return PureGraph(pure, list(written))


def _keep_recomputation(graph: torch.fx.Graph) -> None:
    """Keeps XLA from merging what a checkpoint computes anew with its forward, whose values it would have to hold.

    On CPU, XLA takes barriers away before it merges (seen in torch-xla 2.9's dumps): there nothing is saved.
    """
    barriers: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if RECOMPUTED_KEY not in node.meta or node.target is BARRIER:
            continue
        for value in node.all_input_nodes:
            is_held = value.op == "call_function" and RECOMPUTED_KEY not in value.meta and value.all_input_nodes
            if not is_held or not isinstance(value.meta["val"], torch.Tensor):
                continue
            if value not in barriers:
                with graph.inserting_before(node):
                    barriers[value] = graph.call_function(BARRIER, (value,))
                barriers[value].meta = {**node.meta, "val": value.meta["val"]}
            node.replace_input_with(value, barriers[value])


def _spell_out_full_reductions(graph: torch.fx.Graph) -> None:
    """Names all dimensions where a reduction over all of them names none: torch-xla takes that for one over none."""
    for node in graph.nodes:
        if node.target in _REDUCTIONS and (len(node.args) < 2 or not node.args[1]):
            node.args = (node.args[0], list(range(node.args[0].meta["val"].dim())), *node.args[2:])


def _clamp_slices(graph: torch.fx.Graph) -> None:
    """Lets no slice start before the first element, as `x[-window:]` of a shorter tensor: torch-xla refuses it."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.slice.Tensor and len(node.args) > 2 and node.args[2] is not None:
            value, dim, start, *rest = node.args
            node.args = (value, dim, max(start, -value.meta["val"].shape[dim]), *rest)


def _fill_empty(graph: torch.fx.Graph) -> None:
    """Makes values without elements where they are wanted: torch-xla has no lowering for all that leads there."""
    full = torch.ops.aten.full.default
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.numel() or node.target is full or REGION_KEY not in node.meta:
            continue
        with graph.inserting_before(node):
            empty = graph.call_function(full, (list(value.shape), 0), {"dtype": value.dtype, "device": value.device})
        empty.meta = dict(node.meta)
        node.replace_all_uses_with(empty)
        graph.erase_node(node)


def _drop_copies(graph: torch.fx.Graph) -> None:
    """Replaces copy(old, new) by `new` where the copy changes nothing but the storage."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.copy.default:
            old, new = (argument.meta["val"] for argument in node.args)
            if (old.shape, old.dtype) == (new.shape, new.dtype):
                node.replace_all_uses_with(node.args[1])
                graph.erase_node(node)


def _no_fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()
