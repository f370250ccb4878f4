"""The partitioner: makes the dataflow program of a pure graph, step by step.

Placement gives each operator a slice, cutting groups the operators of a slice into compiled functions, and emission
writes the program, with shardings for all values between functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchways.capture.partitioning.cutting import cut
from torchways.capture.partitioning.emission import emit
from torchways.capture.partitioning.loops import plan_loops
from torchways.capture.partitioning.packing import pack_small_values
from torchways.capture.partitioning.placed_graph import PlaceholderSpec
from torchways.capture.partitioning.placement import place
from torchways.capture.partitioning.seeds import add_seeds
from torchways.capture.regions import REGION_KEY
from torchways.ir.program import Program
from torchways.mesh import VirtualSlice


@dataclass(slots=True, kw_only=True)
class PartitionedProgram:
    """A program and how its ends are tied to what was traced.

    Attributes:
        program: the dataflow program; not lowered yet. Arguments whose source is past the inputs of what was traced
            are seeds, int64[]: one for each computation that draws random numbers.
        meshes: the virtual slice that each of its slices stands for.
    """

    program: Program
    meshes: list[VirtualSlice]


def meshes_of(
    graph: torch.fx.Graph, inputs: list[PlaceholderSpec], default_mesh: VirtualSlice | None
) -> list[VirtualSlice]:
    """Returns the slices that a graph may run on."""
    regions = {id(region): region for node in graph.nodes if (region := node.meta.get(REGION_KEY)) is not None}
    found = [default_mesh, *(spec.mesh for spec in inputs), *(region.mesh for region in regions.values())]
    return list({id(mesh.root): mesh.root for mesh in found if mesh is not None}.values())


def partition(
    graph: torch.fx.Graph,
    inputs: list[PlaceholderSpec],
    *,
    name: str,
    written: list[int],
    default_mesh: VirtualSlice | None,
) -> PartitionedProgram:
    """Returns the dataflow program of a pure graph.

    Args:
        graph: pure; its outputs end with the new values of the `written` inputs.
        inputs: one for each placeholder.
        name: the program's.
        written: positions of the inputs whose new values are the last outputs.
        default_mesh: slice for operators that nothing else places.

    Raises:
        PlacementError: nothing says where the program runs, or a sum has two tensors on one slice.
    """
    placed = place(graph, inputs, name, written, default_mesh)
    groups, loops = cut(placed), plan_loops(placed)
    pack_small_values(placed, groups)
    add_seeds(placed, [*groups, *(group for loop in loops for body in loop.bodies for group in body)])
    return PartitionedProgram(program=emit(placed, groups, loops), meshes=placed.meshes)
