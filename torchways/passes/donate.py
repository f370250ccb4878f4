"""Marks what a run replaces as donated where it is read last, so that its memory is used again.

That is replaced state, and what a turn of a loop gives to the next: the pass `unroll` marks the latter already.
"""

from __future__ import annotations

from dataclasses import replace

from torchways.ir.program import Arg, Compute, Node, Program, ValueIndex, node_inputs, with_nodes


def donate(program: Program) -> Program:
    """Returns the program with donations marked.

    Only the last reader of a replaced value donates it, only if it reads it once, and not a value that is also a
    result or that a transfer reads later.
    """
    replaced = {node.output for node in program.nodes if isinstance(node, Arg) and node.replaced}
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
        nodes.append(node)
    return with_nodes(program, nodes)
