"""Marks what a run replaces as donated where it is read last, so that its memory is used again.

That is replaced state, and what a turn of a loop gives to the next: the pass `unroll` marks the latter already.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torchways.ir.program import Arg, Compute, Loop, Node, Program, ValueIndex, node_inputs, node_outputs, with_nodes


def donate(program: Program) -> Program:
    """Returns the program with donations marked.

    Only the last reader of a replaced value donates it, only if it reads it once, and not a value that is also a
    result or that a transfer reads later.
    """
    replaced = {node.output for node in program.nodes if isinstance(node, Arg) and node.replaced}
    arguments = {node.output for node in program.nodes if isinstance(node, Arg)}
    last_reader: dict[ValueIndex, int] = {}
    for position, node in enumerate(program.nodes):
        for value in node_inputs(node):
            last_reader[value] = position
    nodes: list[Node] = []
    for position, node in enumerate(program.nodes):
        if isinstance(node, Compute):
            donated = tuple(
                index
                for index, value in enumerate(node.inputs)
                if (value in replaced or index in node.donated)
                and last_reader[value] == position
                and node.inputs.count(value) == 1
            )
            node = replace(node, donated=donated)
        elif isinstance(node, Loop):
            node = _in_place(node, last_reader, position, arguments - replaced)
        nodes.append(node)
    return with_nodes(program, nodes)


def _in_place(loop: Loop, last_reader: Mapping[ValueIndex, int], position: int, kept: Collection[ValueIndex]) -> Loop:
    """Returns a loop that updates in place what its turns hand on, and whose first turn does so where it may."""
    bodies = []
    read_on = _read_on(loop)
    for body in loop.bodies:
        entered = {value for index, (value, _) in enumerate(body.carried) if index not in read_on}
        last = {value: number for number, item in enumerate(body.nodes) for value in node_inputs(item.node)}
        items = []
        for number, item in enumerate(body.nodes):
            node = item.node
            if isinstance(node, Compute):
                donated = tuple(
                    index
                    for index, value in enumerate(node.inputs)
                    if value in entered and last[value] == number and node.inputs.count(value) == 1
                )
                item = replace(item, node=replace(node, donated=donated))
            items.append(item)
        bodies.append(replace(body, nodes=tuple(items)))
    invariants = loop.invariants()
    donated = tuple(
        index
        for index, value in enumerate(loop.firsts)
        if last_reader[value] == position
        and value not in kept
        and value not in invariants
        and loop.firsts.count(value) == 1
    )
    return replace(loop, bodies=tuple(bodies), donated=donated)


def _read_on(loop: Loop) -> set[int]:
    """Returns the positions of handed-on values that their turn may still read while the next turn works on them."""
    found = set()
    for body in loop.bodies:
        action_of = {value: (item.stage, item.kind) for item in body.nodes for value in node_outputs(item.node)}
        for index, (_, made) in enumerate(body.carried):
            readers = [item for item in body.nodes if made in node_inputs(item.node)]
            if any(
                not isinstance(item.node, Compute) or (item.stage, item.kind) != action_of[made] for item in readers
            ):
                found.add(index)
    return found
