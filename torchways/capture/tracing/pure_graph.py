"""Tidies a recorded graph before it is cut into compiled functions.

Complex numbers become pairs, dead nodes go, and what torch-xla reads otherwise than PyTorch is written another way.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torchways.capture.lowering.accumulation import HALVES
from torchways.capture.lowering.complex_numbers import call_on_pairs, can_be_pairs, has_rule
from torchways.capture.lowering.decompositions import decomposition_table
from torchways.capture.regions import CARRY_KEY, LABEL_KEYS, RECOMPUTED_KEY, REGION_KEY, Region
from torchways.capture.tracing.recorder import Recorder
from torchways.graphs import SOURCE_KEY
from torchways.operators import BARRIER, is_random

aten = torch.ops.aten

#: What PyTorch computes in the dtype of the result, whatever those of the arguments are.
_PROMOTING = {
    *(aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_min.Tensor),
    *(aten.clamp_max.default, aten.clamp_max.Tensor, aten.maximum.default, aten.minimum.default),
    *(aten.fmax.default, aten.fmin.default, aten.fmod.Scalar, aten.fmod.Tensor),
    *(aten.remainder.Scalar, aten.remainder.Tensor, aten.hypot.default, aten.where.self),
}

_KEYS = (SOURCE_KEY, *LABEL_KEYS)

#: Reductions that go over all dimensions if they name none.
_REDUCTIONS = {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default}


def tidy(graph: torch.fx.Graph, decompositions: Mapping[Any, Any] | None = None) -> torch.fx.Graph:
    """Returns a recorded graph in the form that executors take: real numbers, no dead nodes; changes the given one.

    Args:
        graph: from the tracer.
        decompositions: of operators to be taken apart beyond those that always are.
    """
    if decompositions:
        graph = _recorded_again(graph, {**decomposition_table(), **decompositions}, in_pairs=False)
    if can_be_pairs(graph):
        graph = _recorded_again(graph, decomposition_table(), in_pairs=True)
    _remove_dead_nodes(graph)
    _spell_out_full_reductions(graph)
    _clamp_slices(graph)
    _spell_out_dtypes(graph)
    _fill_empty(graph)
    _remove_dead_nodes(graph)
    _keep_recomputation(graph)
    return graph


def separate_results(graph: torch.fx.Graph) -> None:
    """Gives each result a value of its own: none is an input, and none another result.

    Else one buffer would have two names, and a run that gives up one of them, as it replaces state, would take along
    the other. Of a value that is several results, the last one keeps it: state, where there is some among them.
    """
    output = graph.output_node()
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    seen: set[torch.fx.Node] = set()
    for index in reversed(range(len(results))):
        value = results[index]
        if not isinstance(value, torch.fx.Node):
            continue
        if value.op == "placeholder" or value in seen:
            with graph.inserting_before(output):
                copy = results[index] = graph.call_function(BARRIER, (value,))
            copy.meta = {key: value.meta[key] for key in ("val", SOURCE_KEY) if key in value.meta}
            region: Region | None = value.meta.get(REGION_KEY)
            if region is not None:
                copy.meta[REGION_KEY] = Region(region.mesh, -1, "")
        seen.add(value)
    output.args = (tuple(results),)


class _AsBefore(Recorder):
    """Records a graph again; new nodes have the labels of those that they come from."""

    of: torch.fx.Node

    def label(self, node: torch.fx.Node) -> None:
        node.meta.update({key: self.of.meta[key] for key in _KEYS if key in self.of.meta})


class _Rerun(torch.fx.Interpreter):
    def __init__(self, graph: torch.fx.Graph, recorder: _AsBefore, *, in_pairs: bool) -> None:
        super().__init__(torch.nn.Module(), graph=graph)
        self._recorder = recorder
        self._in_pairs = in_pairs

    def run_node(self, n: torch.fx.Node) -> Any:
        self._recorder.of = n
        if self._in_pairs and has_rule(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return call_on_pairs(n.target, args, kwargs)
        return super().run_node(n)


def _recorded_again(graph: torch.fx.Graph, decompositions: Mapping[Any, Any], *, in_pairs: bool) -> torch.fx.Graph:
    recorder = _AsBefore(FakeTensorMode(), decompositions)
    inputs = []
    for node in graph.find_nodes(op="placeholder"):
        recorder.of = node
        value = node.meta["val"]
        inputs.append(recorder.add_input(str(node.target), value.shape, value.dtype))
    with recorder.fake_mode, recorder:
        results = _Rerun(graph, recorder, in_pairs=in_pairs).run(*inputs, enable_io_processing=False)
    recorder.graph.output(tuple(recorder.node_of(result) for result in results))
    return recorder.graph


def living_nodes(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Returns the nodes of a recorded graph that its results or effects depend on."""
    marks: dict[Any, list[torch.fx.Node]] = {}  # of each value that turns of a loop hand on
    for node in graph.nodes:
        if CARRY_KEY in node.meta:
            marks.setdefault(node.meta[CARRY_KEY], []).append(node)
    waiting = [node for node in graph.nodes if node.op != "call_function" or (node.is_impure() and not is_random(node))]
    living: set[torch.fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in living:
            living.add(node)
            waiting += [*node.all_input_nodes, *marks.get(node.meta.get(CARRY_KEY), ())]
    return living


def _remove_dead_nodes(graph: torch.fx.Graph) -> None:
    living = living_nodes(graph)
    for node in reversed(graph.nodes):
        if node not in living:
            graph.erase_node(node)


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
        if node.target is aten.slice.Tensor and len(node.args) > 2 and node.args[2] is not None:
            value, dim, start, *rest = node.args
            node.args = (value, dim, max(start, -value.meta["val"].shape[dim]), *rest)


def _spell_out_dtypes(graph: torch.fx.Graph) -> None:
    """Writes out what an executor would find out for itself, otherwise than PyTorch does.

    torch-xla computes some operators in the dtype of their first argument, and an executor has another default dtype
    than the user may have set: where integers become floats, and where a new tensor's dtype is not said.
    """
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or node.target is aten._to_copy.default:
            continue
        if node.target is aten.div.Scalar and value.is_complex():
            node.target = aten.div.Tensor  # the other keeps the real part
        is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if is_pointwise:
            _narrow_scalars(graph, node)
        schema = getattr(node.target, "_schema", None)
        inputs = [item for item in node.all_input_nodes if isinstance(item.meta.get("val"), torch.Tensor)]
        if schema is not None and not inputs and node.kwargs.get("dtype") is None:
            if any(argument.name == "dtype" for argument in schema.arguments):
                node.update_kwarg("dtype", value.dtype)
            continue
        is_promoting = node.target in _PROMOTING
        if not is_promoting and not (value.is_floating_point() and is_pointwise):
            continue
        for item in inputs:
            dtype = item.meta["val"].dtype
            is_mask = dtype is torch.bool and value.dtype is not torch.bool and not is_promoting
            becomes_float = not dtype.is_floating_point and not dtype.is_complex and not is_mask
            if dtype is value.dtype or not (is_promoting or becomes_float) or _is_condition(node, item):
                continue
            _cast_input(graph, node, item, value.dtype)


def _narrow_scalars(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Keeps the dtype of tensors that compute with scalars of a wider one, as PyTorch does: XLA widens the tensors."""
    values = {item: value for item in node.all_input_nodes if isinstance(value := item.meta.get("val"), torch.Tensor)}
    beside = {value.dtype for value in values.values() if value.dim() and value.is_floating_point()}
    if not beside or torch.float64 in beside:
        return
    common, result = functools.reduce(torch.promote_types, beside), node.meta["val"]
    # Arithmetic in half precision takes a scalar in float32; a comparison does not.
    dtype = torch.float32 if result.is_floating_point() else common
    scalars = {item: value for item, value in values.items() if value.dim() == 0 and value.is_floating_point()}
    for item, value in scalars.items():
        if torch.promote_types(value.dtype, dtype) is not dtype:
            _cast_input(graph, node, item, dtype)
    if result.dtype in HALVES and any(value.dtype not in HALVES for value in scalars.values()):
        for item, value in values.items():
            if value.dim() and value.dtype in HALVES:
                _cast_input(graph, node, item, torch.float32)
        with graph.inserting_after(node):
            cast = graph.call_function(aten._to_copy.default, (node,), {"dtype": result.dtype})
        cast.meta = dict(node.meta)
        node.meta["val"] = result.to(torch.float32)
        node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)


def _cast_input(graph: torch.fx.Graph, node: torch.fx.Node, item: torch.fx.Node, dtype: torch.dtype) -> None:
    with graph.inserting_before(node):
        cast = graph.call_function(aten._to_copy.default, (item,), {"dtype": dtype})
    cast.meta = {**node.meta, "val": item.meta["val"].to(dtype)}
    node.replace_input_with(item, cast)


def _is_condition(node: torch.fx.Node, item: torch.fx.Node) -> bool:
    return node.target is aten.where.self and node.args[0] is item


def _fill_empty(graph: torch.fx.Graph) -> None:
    """Makes values without elements where they are wanted: torch-xla has no lowering for all that leads there."""
    full = aten.full.default
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.numel() or node.target is full or REGION_KEY not in node.meta:
            continue
        with graph.inserting_before(node):
            empty = graph.call_function(full, (list(value.shape), 0), {"dtype": value.dtype, "device": value.device})
        empty.meta = dict(node.meta)
        node.replace_all_uses_with(empty)
        graph.erase_node(node)
