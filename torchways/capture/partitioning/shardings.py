"""Shardings: every value between computations gets definite placements on its slice.

State keeps its own placements. Optimizer state has those of its parameter, and a gradient those of the state that its
update combines it with. A value that looks like a batch is split along "dp"; all others are replicated. Inside a
computation, XLA decides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from torchways.capture.partitioning.placed_graph import PlacedGraph
from torchways.capture.regions import CARRY_KEY, LOOP_KEY
from torchways.mesh import DATA_AXIS, MAX_SPLIT_DIMS, Placements, VirtualSlice
from torchways.operators import CARRY, CONSTRAIN, EXIT, TURN


class Shardings:
    """The placements of a placed graph's values."""

    def __init__(self, placed: PlacedGraph) -> None:
        self._placed = placed
        #: Sizes of dimension 0 of the arguments that are split along the data axis.
        self._data_sizes = {
            int(node.meta["val"].shape[0])
            for node, spec in zip(placed.placeholders, placed.inputs, strict=True)
            if spec.is_data and node.meta["val"].dim() > 0
        }
        self._data_sizes |= _chunk_sizes(placed)
        #: By the loop's value: what stands for it in a turn; by what is handed on, or gotten: what is left of the loop.
        self._carries = {node.meta[CARRY_KEY]: node for node in placed.operators if node.target is CARRY}
        self._ends: dict[torch.fx.Node, torch.fx.Node] = {}
        ends = [node for node in placed.operators if node.target is EXIT and CARRY_KEY in node.meta]
        by_key = {node.meta[CARRY_KEY]: node for node in ends}
        for node in placed.operators:
            if node.target is CARRY and (end := by_key.get(node.meta[CARRY_KEY])) is not None:
                self._ends[node] = end
                first: torch.fx.Node = node.args[0]
                if first.op == "call_function":
                    self._ends[first] = end
        for end in ends:
            self._ends.update((value, end) for value in end.args[0])

    def of(self, node: torch.fx.Node, slice_index: int) -> Placements:
        """Returns the placements of a node's value on a slice; not for those of sums, which have their inputs'."""
        placed = self._placed
        mesh = placed.meshes[slice_index]
        shape = tuple(node.meta["val"].shape)
        if node.op == "placeholder":
            spec = placed.inputs[placed.position_of[node]]
            if spec.placements is not None:
                return spec.placements
            leader = placed.placeholders[spec.follows] if spec.follows is not None else None
            if leader is not None and tuple(leader.meta["val"].shape) == shape:  # optimizer state: as its parameter
                return self.of(leader, slice_index)
            return ("R",) * mesh.ndim
        for position, output in enumerate(placed.outputs[placed.num_returned :]):
            if output is node:
                old = placed.placeholders[placed.written[position]]
                return self.of(old, slice_index) if placed.slice_of[old] == slice_index else ("R",) * mesh.ndim
        if node.target is CONSTRAIN:
            return _constraint(node)
        if (end := self._ends.get(node)) is not None:  # what turns hand on is alike in all of them
            return self.of(end, slice_index)
        if node.target is EXIT and CARRY_KEY in node.meta:
            first = self._carries[node.meta[CARRY_KEY]].args[0]
            if isinstance(first, torch.fx.Node) and first.op == "placeholder":
                return self.of(first, slice_index)
        state = self._updated_state(node, slice_index)
        return self.of(state, slice_index) if state is not None else self._derived(shape, mesh)

    def wanted(self, node: torch.fx.Node) -> Placements | None:
        """Returns the placements that all readers of a host argument constrain it to; None: they do not agree."""
        constraints = {_constraint(user) for user in node.users if user.target is CONSTRAIN}
        is_alone = len(constraints) == 1 and all(user.target is CONSTRAIN for user in node.users)
        return constraints.pop() if is_alone else None

    def _updated_state(self, node: torch.fx.Node, slice_index: int) -> torch.fx.Node | None:
        """Returns the state that a value is combined with element by element, as an update does with a gradient."""
        placed, shape = self._placed, node.meta["val"].shape
        seen, waiting = {node}, deque([node])
        while waiting:
            for user in waiting.popleft().users:
                if user in seen or placed.slice_of.get(user) != slice_index or not _is_pointwise(user, shape):
                    continue
                seen.add(user)
                waiting.append(user)
                for argument in user.all_input_nodes:
                    is_state = argument.op == "placeholder" and placed.inputs[placed.position_of[argument]].is_state
                    if is_state and argument.meta["val"].shape == shape and placed.slice_of[argument] == slice_index:
                        return argument
        return None

    def _derived(self, shape: tuple[int, ...], mesh: VirtualSlice) -> Placements:
        """Splits a value that looks like a batch (dimension 0 a multiple of the data's) along "dp".

        That never changes a result.
        """
        texts = ["R"] * mesh.ndim
        if DATA_AXIS in mesh.mesh_dim_names and 0 < len(shape) <= MAX_SPLIT_DIMS:
            axis = mesh.mesh_dim_names.index(DATA_AXIS)
            batched = any(size > 1 and shape[0] and shape[0] % size == 0 for size in self._data_sizes)
            if batched and shape[0] % mesh.shape[axis] == 0:
                texts[axis] = "S(0)"
        return tuple(texts)


def _chunk_sizes(placed: PlacedGraph) -> set[int]:
    """Returns the sizes of dimension 0 of what turns of loops select from the data."""
    sizes = set()
    of_turns: set[torch.fx.Node] = set()
    for node in placed.operators:
        if LOOP_KEY not in node.meta:
            continue
        selection = _SELECTIONS.get(node.target)
        if selection is None:
            if node.target is TURN or any(item in of_turns for item in node.all_input_nodes):
                of_turns.add(node)
        elif not of_turns.isdisjoint(selection(node)) and node.meta["val"].dim() > 1:
            sizes.add(int(node.meta["val"].shape[1]))
    return sizes


#: Operators that select rows, and what tells which.
_SELECTIONS: dict[Any, Callable[[torch.fx.Node], Any]] = {
    torch.ops.aten.index_select.default: lambda node: node.args[2:],
    torch.ops.aten.index.Tensor: lambda node: node.args[1],
}


def _constraint(node: torch.fx.Node) -> Placements:
    return tuple(str(node.args[1]).split())


def _is_pointwise(node: torch.fx.Node, shape: torch.Size) -> bool:
    """Whether a node gives a tensor of that shape, element by element."""
    is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
    return is_tensor and node.meta["val"].shape == shape and torch.Tag.pointwise in getattr(node.target, "tags", ())
