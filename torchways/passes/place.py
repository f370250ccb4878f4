"""Places host arguments: one argument for every slice that reads one, split over the slice's data axis."""

from __future__ import annotations

from dataclasses import replace

from torchways.ir.program import UNPLACED, Arg, Compute, Node, Program, Value, ValueIndex, with_nodes
from torchways.mesh import Placements, data_placements
from torchways.passes.insert_transfers import compute_slice, with_computes


def place(program: Program) -> Program:
    """Returns the program with every argument on a slice.

    Raises:
        PlacementError: an argument cannot be split evenly over a slice's "dp" axis.
    """
    args = {node.output: node for node in program.nodes if isinstance(node, Arg)}
    values = list(program.values)
    placed: dict[tuple[ValueIndex, int], ValueIndex] = {}

    def place_inputs(node: Compute) -> Compute:
        home = compute_slice(program, node)
        for value in node.inputs:
            if values[value].slice_index == UNPLACED and (value, home) not in placed:
                placed[value, home] = len(values)
                values.append(_placed(program, args[value], values[value], home))
        return replace(node, inputs=tuple(placed.get((value, home), value) for value in node.inputs))

    nodes: list[Node] = []
    for node in program.nodes:
        nodes.append(with_computes(node, place_inputs))
    homes: dict[ValueIndex, list[Arg]] = {}
    for (value, _), index in placed.items():
        homes.setdefault(value, []).append(replace(args[value], output=index, is_data=False, placements=None))
    with_args: list[Node] = []
    for node in nodes:
        if isinstance(node, Arg) and values[node.output].slice_index == UNPLACED:
            with_args.extend(homes.get(node.output, ()))
        else:
            with_args.append(node)
    return with_nodes(program, with_args, values)


def _placed(program: Program, arg: Arg, value: Value, home: int) -> Value:
    spec = program.slices[home]
    placements: Placements = ("R",) * len(spec.shape)
    if arg.placements is not None and len(arg.placements) == len(spec.shape):
        placements = arg.placements
    elif arg.is_data:
        placements = data_placements(value.shape, spec.shape, spec.axis_names, f"{arg.label} of {program.name}")
    return replace(value, slice_index=home, placements=placements)
