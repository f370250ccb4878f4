"""Programs that hand out every value between their nodes, for parity mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from torchways.controller.parity.replay import is_drawn, operator_values, outputs_of, with_outputs
from torchways.graphs import deserialize_graph
from torchways.ir.program import (
    Arg,
    Compute,
    MadeValue,
    Program,
    Result,
    Value,
    node_inputs,
    node_outputs,
    verify,
    with_nodes,
)
from torchways.mesh import Placements
from torchways.passes.insert_transfers import compute_slice, insert_transfers
from torchways.passes.place import place
from torchways.passes.sequential import FinalResult, Piece


def observed(program: Program) -> Piece:
    """Returns a program, as traced, with all its values as results beside its own, and nothing donated.

    Transfers are nodes of it. What random operators draw is an output of their node, and so a value.
    """
    program = _with_random_values(insert_transfers(place(verify(program))))
    nodes = [replace(node, replaced=False) if isinstance(node, Arg) else node for node in program.nodes[:-1]]
    results = node_inputs(program.nodes[-1])
    made = [value for node in nodes for value in node_outputs(node)]
    program = with_nodes(program, [*nodes, Result(inputs=(*results, *made))])
    return Piece(program=program, results=(*map(FinalResult, range(len(results))), *map(MadeValue, made)))


def _with_random_values(program: Program) -> Program:
    """Makes what random operators draw outputs of their compiled functions."""
    functions, values, nodes = list(program.functions), list(program.values), list(program.nodes)
    for index, function in enumerate(functions):
        graph = deserialize_graph(function.graph)
        outputs = outputs_of(graph)
        drawn = [node for node in operator_values(graph) if is_drawn(node) and node not in outputs]
        if not drawn:
            continue
        functions[index] = replace(function, graph=with_outputs(graph, drawn))
        for position, node in enumerate(nodes):
            if isinstance(node, Compute) and node.function_index == index:
                first = len(values)
                values += values_of(drawn, program, node)
                nodes[position] = replace(node, outputs=(*node.outputs, *range(first, len(values))))
    return replace(program, functions=tuple(functions), values=tuple(values), nodes=tuple(nodes))


def values_of(nodes: Sequence[torch.fx.Node], program: Program, compute: Compute) -> list[Value]:
    """Returns values for nodes of a computation's graph, split as what looks like them is."""
    home = compute_slice(program, compute)
    known = [program.values[index] for index in (*compute.inputs, *compute.outputs)]
    made = []
    for node in nodes:
        fake = node.meta["val"]
        shape = tuple(int(size) for size in fake.shape)
        placements = _likely_placements(shape, known, len(program.slices[home].shape))
        dtype = str(fake.dtype).removeprefix("torch.")
        made.append(Value(dtype=dtype, shape=shape, slice_index=home, placements=placements))
    return made


def _likely_placements(shape: tuple[int, ...], known: Sequence[Value], num_axes: int) -> Placements:
    """Returns how a value inside a computation is probably split, so that to read it changes little.

    As an input or output of the same shape, else on dimension 0 as one of which it is a multiple there (a batch).
    """
    split = [value for value in known if any(text != "R" for text in value.placements)]
    for value in split:
        if value.shape == shape:
            return value.placements
    for value in split:
        if shape and set(value.placements) <= {"R", "S(0)"} and value.shape[0] and shape[0] % value.shape[0] == 0:
            return value.placements
    return ("R",) * num_axes
