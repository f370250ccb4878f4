"""Seeds: each computation that draws random numbers gets one of its own, as an argument."""

from __future__ import annotations

import torch

from torchways.capture.partitioning.cutting import Group
from torchways.capture.partitioning.placed_graph import PlacedGraph, PlaceholderSpec
from torchways.operators import MANUAL_SEED, is_random


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
        seeding.meta["val"] = None
        placed.position_of[seed] = len(placeholders)
        placeholders.append(seed)
        placed.inputs.append(
            PlaceholderSpec(label=f"seed {number}", mesh=None, placements=None, is_state=False, is_data=False)
        )
        placed.slice_of[seeding] = group.key.slice_index
        group.nodes.insert(0, seeding)
