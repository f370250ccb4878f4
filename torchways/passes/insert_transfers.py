"""Adds a transfer wherever a node reads a value of another slice: one for each value and slice, made early."""

from __future__ import annotations

from dataclasses import replace

from torchways.ir.program import Compute, Node, Program, Transfer, Value, ValueIndex, node_outputs, with_nodes


def insert_transfers(program: Program) -> Program:
    """Returns the program with every Compute reading only values of its own slice.

    A transfer stands right behind the node that makes its value, so that it starts as soon as it can.
    """
    values = list(program.values)
    moved: dict[tuple[ValueIndex, int], ValueIndex] = {}
    nodes: list[Node] = []
    for node in program.nodes:
        if isinstance(node, Compute):
            target = compute_slice(program, node)
            node = replace(node, inputs=tuple(_on_slice(value, target, values, moved) for value in node.inputs))
        nodes.append(node)
    by_source: dict[ValueIndex, list[Transfer]] = {}
    for (value, _), copy in moved.items():
        by_source.setdefault(value, []).append(Transfer(input=value, output=copy))
    placed: list[Node] = []
    for node in nodes:
        placed.append(node)
        for value in node_outputs(node):
            placed.extend(by_source.get(value, ()))
    return with_nodes(program, placed, values)


def compute_slice(program: Program, node: Compute) -> int:
    """Returns the slice that a computation runs on: that of its outputs."""
    return program.values[(node.outputs or node.inputs)[0]].slice_index


def _on_slice(
    value: ValueIndex, target: int, values: list[Value], moved: dict[tuple[ValueIndex, int], ValueIndex]
) -> ValueIndex:
    if values[value].slice_index == target:
        return value
    key = (value, target)
    if key not in moved:
        moved[key] = len(values)
        values.append(replace(values[value], slice_index=target))
    return moved[key]
