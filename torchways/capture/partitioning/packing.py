"""Packing: small values that one computation makes and another slice reads travel together.

Gradient clipping over two slices has a norm for each parameter. In a row they are one transfer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from torchways.capture.partitioning.cutting import Group
from torchways.capture.partitioning.placed_graph import PlacedGraph
from torchways.capture.partitioning.rows_of_values import nbytes, put_in_a_row, take_out
from torchways.graphs import SOURCE_KEY

#: Bytes of a value that is worth packing.
_SMALL = 4096


def pack_small_values(placed: PlacedGraph, groups: list[Group]) -> None:
    """Replaces small values that groups send to another slice by one value; changes the graph and the groups.

    All are made at the same time, when their computation ends, so none of them waits for another.
    """
    group_of = {node: group for group in groups for node in group.nodes}
    for group in groups:
        if group.loop is not None:
            continue
        sent: dict[tuple[int, torch.dtype], dict[torch.fx.Node, list[torch.fx.Node]]] = defaultdict(dict)
        for node in group.nodes:
            value = node.meta["val"]
            if not isinstance(value, torch.Tensor) or not 0 < nbytes(node) <= _SMALL:
                continue
            readers: dict[int, list[torch.fx.Node]] = defaultdict(list)
            for user in node.users:
                if user in group_of and placed.slice_of[user] != group.key.slice_index:
                    readers[placed.slice_of[user]].append(user)
            for target, users in readers.items():
                sent[target, value.dtype][node] = users
        for (_, dtype), values in sent.items():
            if len(values) > 1:
                _pack(placed, group, dtype, values)


def _pack(
    placed: PlacedGraph, group: Group, dtype: torch.dtype, values: dict[torch.fx.Node, list[torch.fx.Node]]
) -> None:
    graph, home = placed.graph, group.key.slice_index

    def call(target: Any, *args: Any, shape: Sequence[int]) -> torch.fx.Node:
        made = graph.call_function(target, args)
        made.meta = {
            "val": torch.empty(shape, dtype=dtype, device="meta"),
            SOURCE_KEY: group.nodes[-1].meta.get(SOURCE_KEY, ""),
        }
        return made

    with graph.inserting_before(graph.output_node()):
        made = put_in_a_row(call, list(values))
        group.nodes += made
        placed.slice_of.update(dict.fromkeys(made, home))
        # What is taken out of it floats: it is repeated where it is read.
        items = take_out(call, made[-1], [node.meta["val"].shape for node in values])
    for (node, users), item in zip(values.items(), items, strict=True):
        for user in users:
            user.replace_input_with(node, item)
