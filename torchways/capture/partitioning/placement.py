"""Placement: gives each operator of a graph a slice.

An operator is placed by (1) its label, if the tracer gave it one, or else (2) the slice that holds most bytes of its
inputs; if that ties, the first input's. (3) An operator that reads nothing placed (a mask, a view of a host argument)
*floats*: it is repeated wherever it is needed. Views of parameters float too: they cost nothing where they are used,
and a buffer each where they are kept.
"""

from __future__ import annotations

import operator

import torch

from torchways.capture.partitioning.placed_graph import PlacedGraph, PlaceholderSpec, summed
from torchways.capture.partitioning.rows_of_values import nbytes
from torchways.capture.regions import CARRY_KEY, LOOP_KEY, REGION_KEY, Region
from torchways.mesh import VirtualSlice
from torchways.operators import CARRY, CONSTRAIN, EXIT, TURN, is_random

_VIEWS = {
    torch.ops.aten.expand.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.squeeze.dims,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.view.default,
}


def place(
    graph: torch.fx.Graph,
    inputs: list[PlaceholderSpec],
    name: str,
    written: list[int],
    default_mesh: VirtualSlice | None,
) -> PlacedGraph:
    """Places the operators and outputs of a graph; the arguments are those of `PlacedGraph`.

    Raises:
        PlacementError: nothing says where the program runs.
    """
    placed = PlacedGraph(graph, inputs, name, written, default_mesh)
    _place_labelled(placed)
    free = _float_repeatable(placed)
    _place_by_inputs(placed, free)
    _place_outputs(placed)
    return placed


def _place_labelled(placed: PlacedGraph) -> None:
    """Places inputs that live on a slice, operators with a label, and state that these use."""
    slice_of = placed.slice_of
    for node, spec in zip(placed.placeholders, placed.inputs, strict=True):
        if spec.mesh is not None:
            slice_of[node] = placed.index_of(spec.mesh)
    for node in placed.operators:
        region: Region | None = node.meta.get(REGION_KEY)
        if region is not None and region.mesh is not None:
            slice_of[node] = placed.index_of(region.mesh)
    for node, spec in zip(placed.placeholders, placed.inputs, strict=True):
        if spec.is_state and node not in slice_of:
            homes = _homes_of_users(placed, node)
            if homes:
                slice_of[node] = homes[0]
    for node, spec in zip(placed.placeholders, placed.inputs, strict=True):
        leader = placed.placeholders[spec.follows] if spec.follows is not None else None
        if leader in slice_of and node not in slice_of:
            slice_of[node] = slice_of[leader]


def _float_repeatable(placed: PlacedGraph) -> set[torch.fx.Node]:
    """Takes constants, and views of parameters and constants, off their slices, and returns them."""
    constants: set[torch.fx.Node] = set()
    views = {node for node, spec in zip(placed.placeholders, placed.inputs, strict=True) if spec.is_state}
    for node in placed.operators:
        if node in placed.apart or node.target is CONSTRAIN:
            continue
        inputs = node.all_input_nodes
        if all(argument in constants for argument in inputs) and not is_random(node):
            constants.add(node)
        elif node.target in _VIEWS and all(argument in views for argument in inputs):
            views.add(node)
        else:
            continue
        placed.slice_of.pop(node, None)
    return constants | views


def _place_by_inputs(placed: PlacedGraph, free: set[torch.fx.Node]) -> None:
    """Places operators without a label, then state that nothing placed used before."""
    slice_of = placed.slice_of
    for node in list(placed.operators):
        if node in placed.sums:
            _place_sum_inputs(placed, node)
        elif node in placed.of_sums:
            slice_of[node] = placed.home_of(summed(node))
        elif node.target is EXIT:
            _place_end(placed, node)
        elif node.target is not TURN and node not in slice_of and node not in free:
            bytes_on: dict[int, int] = {}
            for argument in placed.placed_inputs(node):
                if argument in slice_of:
                    index = slice_of[argument]
                    bytes_on[index] = bytes_on.get(index, 0) + nbytes(argument)
            if bytes_on:  # dicts keep order: the first input's slice wins a tie
                slice_of[node] = max(bytes_on, key=lambda index: bytes_on[index])
    for node, spec in zip(placed.placeholders, placed.inputs, strict=True):
        if spec.is_state and node not in slice_of:
            homes = _homes_of_users(placed, node)
            slice_of[node] = homes[0] if homes else placed.default_slice()


def _place_sum_inputs(placed: PlacedGraph, node: torch.fx.Node) -> None:
    """Gives each input of a sum a slice of its own; the sum itself has none, and its item i is where its input i is.

    Inputs that float, or are on one slice (the gradient of a sum may be one tensor for all slices), are taken to
    where their item is used.
    """
    inputs: list[torch.fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    slices = [placed.slice_of.get(item) for item in inputs]
    for item in placed.sums[node]:
        number: int = item.args[1]
        homes = _homes_of_users(placed, item)
        if homes and homes[0] != slices[number] and (slices[number] is None or slices.count(slices[number]) > 1):
            slices[number] = homes[0]
            inputs[number] = placed.copy_to(homes[0], inputs[number], node)
    for number, home in enumerate(slices):
        if home is None:
            inputs[number] = placed.copy_to(placed.default_slice(), inputs[number], node)
    node.args = (inputs,)


def _place_end(placed: PlacedGraph, node: torch.fx.Node) -> None:
    """Places what is left of a loop where its value is, and what turns hand on where the first turn gets it."""
    values: list[torch.fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    carries = [_carry_of(placed, node, value) for value in values] if CARRY_KEY in node.meta else []
    homes = [placed.slice_of[item] for item in (*carries, *values) if item in placed.slice_of]
    home = homes[0] if homes else placed.default_slice()
    for number, value in enumerate(values):
        if placed.slice_of.get(value) != home:
            values[number] = placed.copy_to(home, value, _behind(value))
    for carry in carries:
        placed.slice_of[carry] = home
        first: torch.fx.Node = carry.args[0]  # type: ignore[assignment]
        if placed.slice_of.get(first) != home:
            copy = placed.copy_to(home, first, carry)
            copy.meta.pop(LOOP_KEY, None)
            carry.args = (copy,)
    placed.slice_of[node] = home
    node.args = (values,)


def _carry_of(placed: PlacedGraph, end: torch.fx.Node, value: torch.fx.Node) -> torch.fx.Node:
    """Returns what stands for what a turn gets, of a value that it hands on."""
    return next(
        node
        for node in placed.operators
        if node.target is CARRY
        and node.meta[CARRY_KEY] == end.meta[CARRY_KEY]
        and node.meta[LOOP_KEY] == value.meta[LOOP_KEY]
    )


def _behind(node: torch.fx.Node) -> torch.fx.Node:
    following = node.next
    while following.target is operator.getitem:  # which belongs to the tuple before it
        following = following.next
    return following


def _place_outputs(placed: PlacedGraph) -> None:
    """Places what may not float: outputs, and random operators, which are not repeated.

    New state is made where the old one is.
    """
    slice_of, outputs, output_node = placed.slice_of, placed.outputs, placed.graph.output_node()
    for node in placed.operators:
        if node not in slice_of and is_random(node):
            homes = _homes_of_users(placed, node)
            slice_of[node] = homes[0] if homes else placed.default_slice()
    for number, node in enumerate(outputs):
        if node not in slice_of and node.op == "call_function":
            slice_of[node] = placed.default_slice()
        elif node not in slice_of:
            outputs[number] = placed.copy_to(placed.default_slice(), node, output_node)
    for number, position in enumerate(placed.written, start=placed.num_returned):
        home = slice_of[placed.placeholders[position]]
        if slice_of[outputs[number]] != home:
            outputs[number] = placed.copy_to(home, outputs[number], output_node)
    output_node.args = (outputs,)


def _homes_of_users(placed: PlacedGraph, node: torch.fx.Node) -> list[int]:
    """Returns the slices of the operators that read a node, in their order."""
    return [placed.slice_of[user] for user in node.users if user in placed.slice_of]
