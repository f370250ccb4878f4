"""Replicas: state that a model has on several slices is updated on each of them.

A trace has one logical value for each parameter, on the slice of the first replica. Other replicas read copies of it
(`REPLICA`), and gradients are summed over all (`SUM_REPLICAS`). This pass

- makes each copy of state an input of its own;
- repeats what computes the new value of such state (an optimizer's update) on each slice that has a copy, from the
  copies there, so that updates need no traffic. What only the first replica has is transferred, as anything else;
- puts sums that are next to each other into buckets, each one message in each direction.

It runs on a pure graph, before placement, which then sees inputs and operators like any other.
"""

from __future__ import annotations

import functools
import operator
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from torchways.capture.collectives import ALL_REDUCE
from torchways.capture.partitioning.placed_graph import PlaceholderSpec
from torchways.capture.partitioning.rows_of_values import nbytes, put_in_a_row, take_out
from torchways.capture.regions import BACKWARD_KEY, LOOP_KEY, PART_KEY, REGION_KEY, Region
from torchways.graphs import SOURCE_KEY
from torchways.mesh import VirtualSlice
from torchways.operators import CARRY, CONSTRAIN, EXIT, REPLICA, SUM_REPLICAS, TURN, is_random

aten = torch.ops.aten

#: For each slice of a first replica, the slices of all replicas that have the same stage.
Replicas = Mapping[VirtualSlice, tuple[VirtualSlice, ...]]

#: Bytes; values of this size are moved between slices rather than computed on each.
_SMALL = 4096


@dataclass(frozen=True, slots=True)
class Copy:
    """An input that is a copy of state on another slice.

    Attributes:
        position: of the input whose value it has.
        mesh: its slice.
    """

    position: int
    mesh: VirtualSlice


def separate_replicas(
    graph: torch.fx.Graph, inputs: list[PlaceholderSpec], written: list[int], replicas: Replicas
) -> list[Copy]:
    """Makes copies of state inputs of their own, and updates each where it is.

    Args:
        graph: pure; changed. Its outputs end with the new values of the `written` inputs.
        inputs: one for each placeholder; gets those of the copies.
        written: positions of the inputs whose new values are the last outputs; gets those of the copies.
        replicas: which slices have copies of each other's state.

    Returns:
        what the new inputs are, in their order behind the others.
    """
    if not replicas:
        return []
    is_sharded = any(spec.placements is not None and set(spec.placements) != {"R"} for spec in inputs if spec.is_state)
    sums, ends = _fill_buckets(graph, is_sharded)
    _part_backward(graph, ends)
    return _Separation(graph, inputs, written, replicas, sums).run()


class _Separation:
    def __init__(
        self,
        graph: torch.fx.Graph,
        inputs: list[PlaceholderSpec],
        written: list[int],
        replicas: Replicas,
        sums: Mapping[torch.fx.Node, list[torch.fx.Node]],
    ) -> None:
        self._graph = graph
        self._inputs = inputs
        self._written = written
        self._replicas = replicas
        self._placeholders = graph.find_nodes(op="placeholder", sort=True)
        self._position_of = {node: position for position, node in enumerate(self._placeholders)}
        self._outputs: list[torch.fx.Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        first = len(self._outputs) - len(written)
        self._new_value = {position: self._outputs[first + number] for number, position in enumerate(written)}
        self._sums = sums
        #: What each node is on the slices of each replica.
        self._env: dict[tuple[torch.fx.Node, int], torch.fx.Node] = {
            (total, number): item for total, items in sums.items() for number, item in enumerate(items)
        }
        self._copies: list[Copy] = []
        self._repeatable = self._find_repeatable()
        #: Nodes that are repeated for a replica.
        self._wanted: set[tuple[torch.fx.Node, int]] = set()

    def run(self) -> list[Copy]:
        self._find_copies()
        self._repeat()
        for node in self._graph.find_nodes(op="call_function", target=REPLICA, sort=True):
            value, number = node.args
            found = self._env.get((value, number))
            if found is None:  # it is computed on the first replica alone
                node.target, node.args = CONSTRAIN, (value, " ".join("R" * self._mesh_of(node).ndim))
            else:
                node.replace_all_uses_with(found)
                self._graph.erase_node(node)
        output = self._graph.output_node()
        outputs: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        first = len(self._inputs) - len(self._copies)
        for index, copy in enumerate(self._copies):
            if copy.position in self._new_value:
                number = self._replicas[self._home_of(copy.position)].index(copy.mesh)  # type: ignore[index]
                outputs.append(self._on(self._new_value[copy.position], number))
                self._written.append(first + index)
        output.args = (tuple(outputs),)
        return self._copies

    # ---- homes

    def _home_of(self, position: int) -> VirtualSlice | None:
        """Returns the slice of a state input that has copies, or could have some."""
        spec = self._inputs[position]
        if not spec.is_state:
            return None
        if spec.mesh is None and spec.follows is not None:
            spec = self._inputs[spec.follows]
        root = spec.mesh.root if spec.mesh is not None else None
        return root if root in self._replicas else None

    @staticmethod
    def _mesh_of(node: torch.fx.Node) -> VirtualSlice:
        region: Region = node.meta[REGION_KEY]
        assert region.mesh is not None
        return region.mesh.root

    # ---- what can be repeated

    def _find_repeatable(self) -> set[torch.fx.Node]:
        """Returns the nodes whose value other replicas can compute from what they have."""
        found: set[torch.fx.Node] = set()
        for node in self._graph.nodes:
            if node.op == "placeholder":
                if self._home_of(self._position_of[node]) is not None:
                    found.add(node)
            elif node in self._sums:
                found.add(node)
            elif node.op == "call_function" and self._is_plain(node):
                inputs = node.all_input_nodes
                if any(item in found for item in inputs) and all(
                    item in found or nbytes(item) <= _SMALL for item in inputs
                ):
                    found.add(node)
        return found

    def _is_plain(self, node: torch.fx.Node) -> bool:
        region: Region | None = node.meta.get(REGION_KEY)
        is_mark = node.target in (TURN, CARRY, EXIT, REPLICA, ALL_REDUCE)
        is_elsewhere = region is not None and region.mesh is not None and region.mesh.root not in self._replicas
        return not (is_mark or is_elsewhere or is_random(node) or LOOP_KEY in node.meta)

    # ---- copies

    def _find_copies(self) -> None:
        """Notes all copies, and what has to be repeated for them."""
        waiting: list[tuple[torch.fx.Node, int]] = []
        for node in self._graph.find_nodes(op="call_function", target=REPLICA):
            waiting.append((node.args[0], node.args[1]))
        waiting += self._read_elsewhere()
        seen: set[tuple[torch.fx.Node, int]] = set()
        while waiting:
            key = node, number = waiting.pop()
            if key in seen or node not in self._repeatable:
                continue
            seen.add(key)
            if node.op == "placeholder":
                position = self._position_of[node]
                self._add_copy(position, number)
                if position in self._new_value:
                    waiting.append((self._new_value[position], number))
            elif node not in self._sums:
                self._wanted.add(key)
                waiting += [(item, number) for item in node.all_input_nodes]

    def _read_elsewhere(self) -> Iterable[tuple[torch.fx.Node, int]]:
        """Yields state that nothing changes and that other replicas read: buffers, tables."""
        for position, node in enumerate(self._placeholders):
            home = self._home_of(position)
            if home is None or position in self._new_value:
                continue
            for user in list(node.users):
                region: Region | None = user.meta.get(REGION_KEY)
                root = region.mesh.root if region is not None and region.mesh is not None else None
                if user.target is REPLICA or root is None or root not in self._replicas[home][1:]:
                    continue
                number = self._replicas[home].index(root)
                with self._graph.inserting_before(user):
                    copy = self._graph.call_function(REPLICA, (node, number))
                copy.meta = {**node.meta, REGION_KEY: Region(root, -1, "")}
                user.replace_input_with(node, copy)
                yield node, number

    def _add_copy(self, position: int, number: int) -> None:
        home, spec = self._home_of(position), self._inputs[position]
        assert home is not None
        original = self._placeholders[position]
        last = self._graph.find_nodes(op="placeholder", sort=True)[-1]
        with self._graph.inserting_after(last):
            node = self._graph.placeholder(f"copy_{len(self._copies)}_of_{original.name}")
        node.meta = dict(original.meta)
        mesh = self._replicas[home][number]
        self._inputs.append(replace(spec, label=f"copy of {spec.label}", mesh=mesh, follows=None))
        if spec.placements is None and spec.follows is not None:
            leader = self._inputs[spec.follows]
            is_alike = self._placeholders[spec.follows].meta["val"].shape == original.meta["val"].shape
            self._inputs[-1] = replace(self._inputs[-1], placements=leader.placements if is_alike else None)
        self._copies.append(Copy(position, mesh))
        self._env[original, number] = node

    # ---- updates

    def _repeat(self) -> None:
        """Repeats what is wanted, each operator behind the one that it repeats, or behind the call that has it."""
        tails: dict[int, torch.fx.Node] = {}
        numbers: dict[tuple[int, int], int] = {}
        order = list(self._graph.nodes)
        for node in order:
            if (region := node.meta.get(REGION_KEY)) is not None and region.call >= 0:
                tails[region.call] = node
        next_call = 1 + max(tails, default=-1)
        count = max(map(len, self._replicas.values()))
        for node in order:
            for number in range(1, count):
                if (node, number) not in self._wanted:
                    continue
                region = node.meta.get(REGION_KEY)
                call = region.call if region is not None else -1
                tail = tails.get(call, self._env.get((node, number - 1), node))
                with self._graph.inserting_after(tail):
                    made = self._graph.node_copy(node, lambda item, number=number: self._on(item, number))  # type: ignore[misc]
                made.meta = dict(node.meta)
                if region is not None:
                    if call >= 0 and (call, number) not in numbers:
                        numbers[call, number] = next_call
                        next_call += 1
                    mesh = self._replicas[region.mesh.root][number] if region.mesh is not None else None
                    made.meta[REGION_KEY] = replace(region, mesh=mesh, call=numbers.get((call, number), -1))
                if call >= 0:
                    tails[call] = made
                self._env[node, number] = made

    def _on(self, node: torch.fx.Node, number: int) -> torch.fx.Node:
        """Returns what a node is on the slices of a replica; the node itself where it is not repeated."""
        return self._env.get((node, number), node)


# ---- sums


def _fill_buckets(
    graph: torch.fx.Graph, is_sharded: bool
) -> tuple[dict[torch.fx.Node, list[torch.fx.Node]], list[torch.fx.Node]]:
    """Makes sums over slices of `SUM_REPLICAS`, of several at once where they fit.

    Args:
        is_sharded: values are split over the devices of their slices: in a row they would be gathered first.

    Returns:
        For each sum's value on the first replica, its value on each replica. And what makes the last addend of each
        sum, of each replica.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    found: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    ends: list[torch.fx.Node] = []
    bucket: list[torch.fx.Node] = []
    kind: Any = None
    size = 0
    for node in graph.find_nodes(op="call_function", target=SUM_REPLICAS, sort=True):
        values, max_bytes, dtype = node.args
        this = (node.meta["val"].dtype, dtype, tuple(map(_slice_of, values)))
        first_use = min((order[user] for item in bucket for user in item.users), default=len(order))
        fits = this == kind and size + nbytes(node) <= max_bytes and first_use > order[node]
        if bucket and (is_sharded or not fits):
            rows = [item.args[0] for item in bucket]
            ends += [max(addends, key=order.__getitem__) for addends in zip(*rows, strict=True)]
            found.update(_sum(graph, bucket))
            bucket, size = [], 0
        bucket.append(node)
        kind, size = this, size + nbytes(node)
    if bucket:
        found.update(_sum(graph, bucket))
    return found, ends


def _part_backward(graph: torch.fx.Graph, ends: Iterable[torch.fx.Node]) -> None:
    """Cuts backward behind the operators that make the last addend of a sum."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    ends_on: dict[VirtualSlice | None, list[int]] = defaultdict(list)
    for node in sorted(ends, key=order.__getitem__):
        ends_on[_slice_of(node)].append(order[node])
    for node in graph.nodes:
        if BACKWARD_KEY in node.meta and LOOP_KEY not in node.meta:
            region: Region | None = node.meta.get(REGION_KEY)
            if region is not None and region.mesh is not None:
                node.meta[PART_KEY] = bisect_left(ends_on[region.mesh.root], order[node])


def _slice_of(value: torch.fx.Node) -> VirtualSlice | None:
    """Returns the slice of the nearest operator with a label before a value."""
    seen, waiting = {value}, deque([value])
    while waiting:
        node = waiting.popleft()
        region: Region | None = node.meta.get(REGION_KEY)
        if region is not None and region.mesh is not None:
            return region.mesh.root
        waiting += [item for item in node.all_input_nodes if item not in seen]
        seen.update(node.all_input_nodes)
    return None


def _sum(graph: torch.fx.Graph, bucket: list[torch.fx.Node]) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """Replaces sums by one, of all of their values in a row; returns their values on each replica."""
    *_, last = bucket
    values: list[list[torch.fx.Node]] = [list(node.args[0]) for node in bucket]  # type: ignore[arg-type]
    dtype: torch.dtype = last.meta["val"].dtype
    name = str(last.args[2])
    wire: torch.dtype = getattr(torch, name) if name and dtype.is_floating_point else dtype
    slices = [_slice_of(value) for value in values[-1]]
    row = sum(node.meta["val"].numel() for node in bucket)

    def call(number: int, target: Any, *args: Any, shape: Sequence[int], of: torch.dtype) -> torch.fx.Node:
        made = graph.call_function(target, args, {"dtype": of} if target is aten._to_copy.default else {})
        mesh = slices[number]
        made.meta = {"val": torch.empty(shape, dtype=of, device="meta"), SOURCE_KEY: last.meta.get(SOURCE_KEY, "")}
        if mesh is not None and target is not ALL_REDUCE:
            made.meta[REGION_KEY] = Region(mesh, -1, "")
        return made

    found: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    parts: list[list[torch.fx.Node]] = []
    shapes = [node.meta["val"].shape for node in bucket]
    with graph.inserting_before(last):
        wholes = []
        for number in range(len(values[0])):
            add = functools.partial(call, number, of=dtype)
            whole = put_in_a_row(add, [items[number] for items in values])[-1]
            if wire is not dtype:
                whole = call(number, aten._to_copy.default, whole, shape=[row], of=wire)
            wholes.append(whole)
        total = call(0, ALL_REDUCE, wholes, shape=[row], of=wire)
        total.meta["val"] = [whole.meta["val"] for whole in wholes]
        for number in range(len(wholes)):
            whole = call(number, operator.getitem, total, number, shape=[row], of=wire)
            whole.meta.pop(REGION_KEY, None)
            if wire is not dtype:
                whole = call(number, aten._to_copy.default, whole, shape=[row], of=dtype)
            parts.append(take_out(functools.partial(call, number, of=dtype), whole, shapes))
    for index, node in enumerate(bucket):
        items = [of_replica[index] for of_replica in parts]
        node.replace_all_uses_with(items[0])
        graph.erase_node(node)
        found[items[0]] = items
    return found
