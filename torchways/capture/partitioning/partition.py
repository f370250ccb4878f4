"""The partitioner: makes the dataflow program of a pure graph, step by step.

Placement gives each operator a slice, cutting groups the operators of a slice into compiled functions, and emission
writes the program, with shardings for all values between functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from torchways.capture.partitioning.cutting import cut
from torchways.capture.partitioning.emission import emit
from torchways.capture.partitioning.invariants import take_out_invariants
from torchways.capture.partitioning.loops import plan_loops
from torchways.capture.partitioning.packing import pack_small_values
from torchways.capture.partitioning.placed_graph import PlaceholderSpec
from torchways.capture.partitioning.placement import place
from torchways.capture.partitioning.seeds import add_seeds
from torchways.capture.regions import LOOP_KEY, REGION_KEY
from torchways.ir.program import Program
from torchways.mesh import VirtualSlice
from torchways.schedules import Schedule


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


def has_automatic_loops(graph: torch.fx.Graph) -> bool:
    """Whether a graph has a loop whose schedule is searched for: it may be partitioned again."""
    return any(node.meta[LOOP_KEY][0].is_automatic for node in graph.nodes if LOOP_KEY in node.meta)


def copy_of(graph: torch.fx.Graph) -> torch.fx.Graph:
    """Returns a graph with the same operators and labels, for `partition` to change."""
    copy = torch.fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def partition(
    graph: torch.fx.Graph,
    inputs: list[PlaceholderSpec],
    *,
    name: str,
    written: list[int],
    default_mesh: VirtualSlice | None,
    schedules: Mapping[int, Schedule] | None = None,
) -> PartitionedProgram:
    """Returns the dataflow program of a pure graph.

    Args:
        graph: pure; its outputs end with the new values of the `written` inputs. It is changed.
        inputs: one for each placeholder; those of seeds are added.
        name: the program's.
        written: positions of the inputs whose new values are the last outputs.
        default_mesh: slice for operators that nothing else places.
        schedules: see `plan_loops`.

    Raises:
        PlacementError: nothing says where the program runs, or a sum has two tensors on one slice.
    """
    placed = place(graph, inputs, name, written, default_mesh)
    take_out_invariants(placed)
    groups, loops = cut(placed), plan_loops(placed, schedules)
    pack_small_values(placed, groups)
    add_seeds(placed, [*groups, *(group for loop in loops for body in loop.bodies for group in body)])
    return PartitionedProgram(program=emit(placed, groups, loops), meshes=placed.meshes)
