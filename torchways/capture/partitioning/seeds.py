"""Seeds: each computation that draws random numbers gets one of its own, as an argument."""

from __future__ import annotations

import torch

from torchways.capture.partitioning.cutting import Group
from torchways.capture.partitioning.placed_graph import PlacedGraph, PlaceholderSpec
from torchways.capture.regions import LOOP_KEY, LoopLabel
from torchways.operators import MANUAL_SEED, TURN, is_random

#: An odd number without pattern: the seeds of turns are far from each other, and from those of other computations.
_STEP = -7046029254386353131


def add_seeds(placed: PlacedGraph, groups: list[Group]) -> None:
    """Adds a seed to the inputs of each group that draws random numbers, and an operator that sets it."""
    for group in groups:
        if not any(is_random(node) for node in group.nodes):
            continue
        graph, placeholders = placed.graph, placed.placeholders
        number = len(placeholders) - placed.num_traced
        with graph.inserting_after(placeholders[-1] if placeholders else graph._root):
            seed = graph.placeholder(f"seed_{number}")
        with graph.inserting_before(placed.operators[0]):
            seeding = graph.call_function(MANUAL_SEED, (seed,))
        seed.meta["val"] = torch.empty((), dtype=torch.int64, device="meta")
        if group.loop is not None:
            seeding.args = (_of_turn(placed, seed, seeding, group.loop),)
        seeding.meta["val"] = None
        placed.position_of[seed] = len(placeholders)
        placeholders.append(seed)
        placed.inputs.append(
            PlaceholderSpec(label=f"seed {number}", mesh=None, placements=None, is_state=False, is_data=False)
        )
        placed.slice_of[seeding] = group.key.slice_index
        group.nodes.insert(0, seeding)


def _of_turn(
    placed: PlacedGraph, seed: torch.fx.Node, seeding: torch.fx.Node, loop: tuple[LoopLabel, int]
) -> torch.fx.Node:
    """Returns a seed of each turn's own; its operators float."""
    with placed.graph.inserting_before(seeding):
        turn = placed.graph.call_function(TURN)
        step = placed.graph.call_function(torch.ops.aten.mul.Tensor, (turn, _STEP))
        total = placed.graph.call_function(torch.ops.aten.add.Tensor, (seed, step))
    for node in (turn, step, total):
        node.meta = {"val": seed.meta["val"], LOOP_KEY: loop}
    placed.apart.add(turn)
    return total
