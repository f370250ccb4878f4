"""Adds a transfer wherever a node reads a value of another slice: one for each value and slice, made early."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torchways.ir.program import (
    BodyNode,
    Compute,
    Loop,
    Node,
    Program,
    Transfer,
    Value,
    ValueIndex,
    node_outputs,
    with_nodes,
)


def insert_transfers(program: Program) -> Program:
    """Returns the program with every Compute reading only values of its own slice.

    A transfer stands right behind the node that makes its value, so that it starts as soon as it can.
    """
    values = list(program.values)
    moved: dict[tuple[ValueIndex, int], ValueIndex] = {}

    def move_inputs(node: Compute) -> Compute:
        home = compute_slice(program, node)
        return replace(node, inputs=tuple(_on_slice(program, value, home, values, moved) for value in node.inputs))

    nodes = [with_computes(node, move_inputs) for node in program.nodes]
    transfers: dict[ValueIndex, list[Transfer]] = {}
    for (value, _), copy in moved.items():
        transfers.setdefault(value, []).append(Transfer(input=value, output=copy))
    placed: list[Node] = []
    for node in nodes:
        placed.append(_with_transfers(node, transfers) if isinstance(node, Loop) else node)
        for value in node_outputs(node):
            placed.extend(transfers.get(value, ()))
    return with_nodes(program, placed, values)


def with_computes(node: Node, change: Callable[[Compute], Compute]) -> Node:
    """Returns a node with its computations changed: itself, or those of a loop's bodies."""
    if isinstance(node, Compute):
        return change(node)
    if not isinstance(node, Loop):
        return node
    bodies = []
    for body in node.bodies:
        items = [
            replace(item, node=change(item.node)) if isinstance(item.node, Compute) else item for item in body.nodes
        ]
        bodies.append(replace(body, nodes=tuple(items)))
    return replace(node, bodies=tuple(bodies))


def _with_transfers(loop: Loop, transfers: Mapping[ValueIndex, Sequence[Transfer]]) -> Loop:
    """Returns a loop with the transfers of values that its bodies make, or get from the turn before.

    Values that are the same in each turn are moved once, before the loop.
    """
    bodies = []
    for body in loop.bodies:
        first = body.nodes[0]
        items = [
            BodyNode(stage=first.stage, kind=first.kind, node=transfer)
            for value in (*body.numbers, *(entered for entered, _ in body.carried))
            for transfer in transfers.get(value, ())
        ]
        for item in body.nodes:
            items.append(item)
            for value in node_outputs(item.node):
                items += [replace(item, node=transfer) for transfer in transfers.get(value, ())]
        bodies.append(replace(body, nodes=tuple(items)))
    return replace(loop, bodies=tuple(bodies))


def compute_slice(program: Program, node: Compute) -> int:
    """Returns the slice that a computation runs on: that of its outputs."""
    return program.values[(node.outputs or node.inputs)[0]].slice_index


def _on_slice(
    program: Program,
    value: ValueIndex,
    target: int,
    values: list[Value],
    moved: dict[tuple[ValueIndex, int], ValueIndex],
) -> ValueIndex:
    if values[value].slice_index == target:
        return value
    key = (value, target)
    if key not in moved:
        moved[key] = len(values)
        values.append(_moved(program, values[value], target))
    return moved[key]


def _moved(program: Program, value: Value, target: int) -> Value:
    """Returns a value on another slice: split over the axes of the same names, where these divide it."""
    source, spec = program.slices[value.slice_index], program.slices[target]
    of_axis = dict(zip(source.axis_names, value.placements, strict=True))
    placements: list[str] = []
    ways: dict[str, int] = {}
    for name, size in zip(spec.axis_names, spec.shape, strict=True):
        text = of_axis.get(name, "R")
        if text != "R":
            ways[text] = ways.get(text, 1) * size
            if value.shape[int(text[2:-1])] % ways[text]:
                ways[text] //= size
                text = "R"
        placements.append(text)
    return replace(value, slice_index=target, placements=tuple(placements))
