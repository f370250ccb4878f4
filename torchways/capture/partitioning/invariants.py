"""What is the same in each turn of a loop, and read on another slice, is computed and sent once, before the loop.

A rotary embedding is an example: the first stage of a pipeline makes its tables, and all stages read them. What only
its own slice reads stays in the loop: to keep it would take memory, and to compute it again takes no transfer.
"""

from __future__ import annotations

import operator

import torch

from torchways.capture.partitioning.placed_graph import PlacedGraph
from torchways.capture.regions import BACKWARD_KEY, LOOP_KEY, PART_KEY, REGION_KEY
from torchways.operators import is_random


def take_out_invariants(placed: PlacedGraph) -> None:
    """Takes such operators out of the loops of a placed graph, with what they need."""
    invariant = _invariant(placed)
    waiting = [
        item
        for node in placed.operators
        if LOOP_KEY in node.meta and node in placed.slice_of
        for item in placed.placed_inputs(node)
        if item in invariant and placed.slice_of[item] != placed.slice_of[node]
    ]
    outside: set[torch.fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in outside:
            outside.add(node)
            waiting += [item for item in placed.placed_inputs(node) if item in invariant]
            waiting += [user for user in node.users if user.target is operator.getitem and user in invariant]
    for node in outside:
        for key in (LOOP_KEY, REGION_KEY, BACKWARD_KEY, PART_KEY):
            node.meta.pop(key, None)


def _invariant(placed: PlacedGraph) -> set[torch.fx.Node]:
    """Returns the operators of loops that compute the same in each of several turns, but for what a loop gives back."""
    bodies = {node.meta[LOOP_KEY] for node in placed.operators if LOOP_KEY in node.meta}
    # A second body, of a smaller last microbatch, has one turn: nothing there depends on its number.
    repeated = {(label, 0) for label, _ in bodies if label.num_turns - ((label, 1) in bodies) > 1}
    found: set[torch.fx.Node] = set()
    for node in placed.operators:
        if (
            node.meta.get(LOOP_KEY) in repeated
            and node not in placed.apart
            and not is_random(node)
            and placed.apart.isdisjoint(node.users)
            and all(item in found or LOOP_KEY not in item.meta for item in node.all_input_nodes)
        ):
            found.add(node)
    return found
