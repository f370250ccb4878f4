"""A graph whose operators have slices: placement makes it, and all later steps of the partitioner read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchways.capture.collectives import ALL_REDUCE
from torchways.capture.regions import REGION_KEY
from torchways.errors import PlacementError
from torchways.mesh import Placements, VirtualSlice


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceholderSpec:
    """What the partitioner knows of a graph input.

    Attributes:
        label: for people, "host 0", "state (64, 256)".
        mesh: slice that holds it; None: a host value, which goes wherever it is read.
        placements: its sharding; None: by default (host data along "dp", all else replicated).
        is_state: an array, which lives on one slice even if it is not placed yet.
        is_data: an argument of the user's, to be split along "dp" by default.
        follows: position of the input whose slice it shares while it has none itself: optimizer state follows its
            parameter.
    """

    label: str
    mesh: VirtualSlice | None
    placements: Placements | None
    is_state: bool
    is_data: bool
    follows: int | None = None


class PlacedGraph:
    """A graph, the slices that it uses, and the slice of each node that has one.

    Args:
        graph: pure; its outputs end with the new values of the `written` inputs.
        inputs: one for each placeholder.
        name: the program's.
        written: positions of the inputs whose new values are the last outputs.
        default_mesh: slice for operators that nothing else places.

    Attributes:
        placeholders: the graph's inputs, with the seeds that were added.
        num_traced: how many of these were traced; the others are seeds.
        position_of: the position of each among them.
        operators: the graph's operators, in order.
        outputs: the graph's results.
        meshes: the slices in use; slices are named by their positions here.
        slice_of: the slice of each placed node. Nodes without an entry *float*: they are repeated wherever they are
            needed.
        sums: the operators that span slices (`tw.all_reduce`), with what they give to each slice.
        of_sums: both of these; none of them belongs to a compiled function.
    """

    def __init__(
        self,
        graph: torch.fx.Graph,
        inputs: list[PlaceholderSpec],
        name: str,
        written: list[int],
        default_mesh: VirtualSlice | None,
    ) -> None:
        self.graph = graph
        self.inputs = inputs
        self.name = name
        self.written = written
        self.meshes: list[VirtualSlice] = []
        self.placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self.num_traced = len(self.placeholders)
        self.position_of = {node: position for position, node in enumerate(self.placeholders)}
        self.operators = [node for node in graph.nodes if node.op == "call_function"]
        self.sums = {node: list(node.users) for node in self.operators if node.target is ALL_REDUCE}
        self.of_sums = {node for users in self.sums.values() for node in users} | self.sums.keys()
        for node in self.of_sums:
            node.meta.pop(REGION_KEY, None)
        self.outputs: list[torch.fx.Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        self.slice_of: dict[torch.fx.Node, int] = {}
        self._default_mesh = default_mesh

    @property
    def num_returned(self) -> int:
        """How many outputs come before the new values of written inputs."""
        return len(self.outputs) - len(self.written)

    def index_of(self, mesh: VirtualSlice) -> int:
        """Returns the position of a slice among those in use; adds it if it is new."""
        root = mesh.root
        for index, known in enumerate(self.meshes):
            if known is root:
                return index
        self.meshes.append(root)
        return len(self.meshes) - 1

    def default_slice(self) -> int:
        """Returns the slice for operators that nothing else places.

        Raises:
            PlacementError: there is none.
        """
        if self._default_mesh is not None:
            return self.index_of(self._default_mesh)
        if not self.meshes:
            raise PlacementError(
                f"nothing in {self.name} says on which slice it runs: call a function or module decorated with "
                "@tw.function(mesh=...), or decorate it with @tw.program(mesh=...)"
            )
        return len(self.meshes) - 1

    def home_of(self, node: torch.fx.Node) -> int:
        """Returns the slice of a node, or the default slice if it floats."""
        return self.slice_of[node] if node in self.slice_of else self.default_slice()

    def placed_inputs(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        """Returns the placed nodes that `node` needs, seeing through nodes that float."""
        seen: dict[torch.fx.Node, None] = {}
        stack = list(reversed(node.all_input_nodes))
        while stack:
            argument = stack.pop()
            if argument not in seen:
                seen[argument] = None
                if argument not in self.slice_of:
                    stack.extend(reversed(argument.all_input_nodes))
        return [argument for argument in seen if argument in self.slice_of]

    def copy_to(self, slice_index: int, node: torch.fx.Node, before: torch.fx.Node) -> torch.fx.Node:
        """Adds an operator, ahead of `before`, that takes a node to a slice."""
        with self.graph.inserting_before(before):
            copy = self.graph.call_function(torch.ops.aten.clone.default, (node,))
        copy.meta = {key: value for key, value in node.meta.items() if key != REGION_KEY}
        position = self.operators.index(before) if before in self.operators else len(self.operators)
        self.operators.insert(position, copy)
        self.slice_of[copy] = slice_index
        return copy


def summed(item: torch.fx.Node) -> torch.fx.Node:
    """Returns the input that a sum has on the slice of one of its outputs: the input of the same number."""
    total, number = item.args
    return total.args[0][number]  # type: ignore[union-attr, index, return-value]
