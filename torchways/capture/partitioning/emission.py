"""Emission: the dataflow program of a graph that is placed and cut into groups."""

from __future__ import annotations

import heapq
from typing import Any

import torch

from torchways.capture.partitioning.cutting import Group
from torchways.capture.partitioning.loops import LoopPlan
from torchways.capture.partitioning.placed_graph import PlacedGraph, summed
from torchways.capture.partitioning.shardings import Shardings
from torchways.capture.regions import CARRY_KEY, LOOP_KEY, REGION_KEY
from torchways.errors import InternalError, PlacementError
from torchways.graphs import SOURCE_KEY, computation_of, serialize
from torchways.ir.program import (
    ONE_AFTER_THE_OTHER,
    UNPLACED,
    AllReduce,
    Arg,
    BodyNode,
    Compute,
    Function,
    Loop,
    LoopBody,
    Node,
    Program,
    Result,
    SliceSpec,
    TracedInput,
    Value,
    ValueIndex,
    node_inputs,
    node_outputs,
)
from torchways.mesh import Placements
from torchways.operators import CARRY, EXIT, TURN


def emit(placed: PlacedGraph, groups: list[Group], loops: list[LoopPlan]) -> Program:
    """Returns the program whose computations are the groups of a placed graph, and those of its loops' bodies.

    Raises:
        PlacementError: a sum has two tensors on one slice.
    """
    return _Emitter(placed).program(groups, loops)


class _Emitter:
    def __init__(self, placed: PlacedGraph) -> None:
        self._placed = placed
        self._shardings = Shardings(placed)
        self._values: list[Value] = []
        #: By node and slice: a node that floats has a value on each slice that needs it.
        self._value_of: dict[tuple[torch.fx.Node, int], ValueIndex] = {}
        #: The positions of the inputs that are read, by their values.
        self._arg_inputs: dict[ValueIndex, int] = {}
        self._functions: list[Function] = []
        #: By slice, computation, and dtypes and shapes of values.
        self._function_of: dict[Any, int] = {}

    def program(self, groups: list[Group], loops: list[LoopPlan]) -> Program:
        placed = self._placed
        sums = [self._sum(node) for node in placed.sums if LOOP_KEY not in node.meta]
        computes: list[Compute | AllReduce | Loop] = [*map(self._compute, groups), *map(self._loop, loops), *sums]
        results = tuple(self._value(node, placed.home_of(node)) for node in placed.outputs)
        nodes: list[Node] = [*self._args(), *_in_order(computes, set(self._arg_inputs)), Result(inputs=results)]
        return Program(
            name=placed.name,
            slices=tuple(SliceSpec(shape=mesh.shape, axis_names=mesh.mesh_dim_names) for mesh in placed.meshes),
            values=tuple(self._values),
            functions=tuple(self._functions),
            nodes=tuple(nodes),
        )

    # ---- values

    def _value(self, node: torch.fx.Node, slice_index: int) -> ValueIndex:
        """Returns the value of a node; of one that floats, on a slice."""
        if node in self._placed.slice_of:
            slice_index = self._placed.slice_of[node]
        elif node.op == "placeholder":
            slice_index = UNPLACED
        key = (node, slice_index)
        if key not in self._value_of:
            fake = node.meta["val"]
            placements = self._placements(node, slice_index)  # may make the value of what a sum reads
            self._value_of[key] = len(self._values)
            self._values.append(
                Value(
                    dtype=str(fake.dtype).removeprefix("torch."),
                    shape=tuple(int(size) for size in fake.shape),
                    slice_index=slice_index,
                    placements=placements,
                )
            )
            if node.op == "placeholder":
                self._arg_inputs[self._value_of[key]] = self._placed.position_of[node]
        return self._value_of[key]

    def _placements(self, node: torch.fx.Node, slice_index: int) -> Placements:
        if slice_index == UNPLACED:
            return ()
        if node in self._placed.of_sums:
            return self._values[self._value(summed(node), slice_index)].placements
        return self._shardings.of(node, slice_index)

    # ---- nodes

    def _args(self) -> list[Arg]:
        placed = self._placed
        return [
            Arg(
                output=value,
                label=placed.inputs[position].label,
                source=TracedInput(position),
                replaced=position in placed.written,
                is_data=placed.inputs[position].is_data and self._values[value].slice_index == UNPLACED,
                placements=self._shardings.wanted(placed.placeholders[position]),
            )
            for value, position in sorted(self._arg_inputs.items())
        ]

    def _compute(self, group: Group) -> Compute:
        members = set(group.nodes)
        returned = set(self._placed.outputs)
        needed_outside = [
            node
            for node in group.nodes
            if not isinstance(node.meta["val"], (list, tuple))
            and (node in returned or any(self._is_read_outside(user, members) for user in node.users))
        ]
        external, body = self._extract(group)
        needed_outside = list(dict.fromkeys(needed_outside))
        inputs = tuple(self._value(node, group.key.slice_index) for node in external)
        outputs = tuple(self._value(node, group.key.slice_index) for node in needed_outside)
        graph = serialize(external, body, needed_outside)
        return Compute(function_index=self._function(graph, group, inputs, outputs), inputs=inputs, outputs=outputs)

    def _loop(self, plan: LoopPlan) -> Loop:
        ends: dict[int, torch.fx.Node] = {}
        last: list[torch.fx.Node] = []
        carries: dict[tuple[int, int], torch.fx.Node] = {}
        for node in self._placed.operators:
            if node.target is CARRY and node.meta[LOOP_KEY][0] is plan.label:
                carries[node.meta[LOOP_KEY][1], node.meta[CARRY_KEY][1]] = node
            elif node.target is EXIT and node.args[0][0].meta[LOOP_KEY][0] is plan.label:
                if CARRY_KEY in node.meta:
                    ends[node.meta[CARRY_KEY][1]] = node
                else:
                    last.append(node)
        indices = sorted(ends)
        bodies = []
        for number, groups in enumerate(plan.bodies):
            nodes = [
                BodyNode(stage=group.action[0], kind=group.action[1], node=self._compute(group)) for group in groups
            ]
            is_last = number == len(plan.bodies) - 1
            bodies.append(
                LoopBody(
                    nodes=tuple(nodes),
                    carried=tuple(
                        (self._own_value(carries[number, index]), self._own_value(ends[index].args[0][number]))  # type: ignore[index, arg-type]
                        for index in indices
                    ),
                    last=tuple(self._own_value(node.args[0][0]) for node in last) if is_last else (),  # type: ignore[index, arg-type]
                    numbers=tuple(
                        value
                        for (node, _), value in self._value_of.items()
                        if node.target is TURN and node.meta[LOOP_KEY] == (plan.label, number)
                    ),
                )
            )
        return Loop(
            bodies=tuple(bodies),
            num_turns=plan.label.num_turns,
            orders=tuple(sorted(plan.orders.items())),
            firsts=tuple(self._own_value(carries[0, index].args[0]) for index in indices),  # type: ignore[arg-type]
            outputs=tuple(map(self._own_value, (*(ends[index] for index in indices), *last))),
            number=plan.number,
            schedule=plan.schedule,
            is_automatic=plan.label.is_automatic and plan.schedule != ONE_AFTER_THE_OTHER,
            source=plan.label.line,
        )

    def _own_value(self, node: torch.fx.Node) -> ValueIndex:
        return self._value(node, self._placed.slice_of[node])

    def _sum(self, node: torch.fx.Node) -> AllReduce:
        inputs: list[torch.fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        slices = [self._placed.home_of(item) for item in inputs]
        line = node.meta.get(SOURCE_KEY, "")
        if len(set(slices)) < len(slices):
            raise PlacementError(f"tw.all_reduce at {line} has two tensors on one slice: add these first")
        sums = {item.args[1]: item for item in self._placed.sums[node]}
        read = tuple(self._value(item, index) for item, index in zip(inputs, slices, strict=True))
        outputs = []
        for number, value in enumerate(read):
            if number in sums:
                outputs.append(self._value(sums[number], slices[number]))
            else:  # nobody reads the sum there
                outputs.append(len(self._values))
                self._values.append(self._values[value])
        return AllReduce(inputs=read, outputs=tuple(outputs), source=line)

    def _is_read_outside(self, user: torch.fx.Node, members: set[torch.fx.Node]) -> bool:
        """Whether `user`, or a placed node that reads it through floating ones, is not among `members`."""
        seen, stack = {user}, [user]
        while stack:
            user = stack.pop()
            if user in self._placed.slice_of:
                if user not in members:
                    return True
            elif user.op != "output":
                readers = set(user.users) - seen
                seen |= readers
                stack.extend(readers)
        return False

    def _extract(self, group: Group) -> tuple[list[torch.fx.Node], list[torch.fx.Node]]:
        """Returns what a group reads from outside, and its operators with the floating ones that it needs, in order."""
        members = set(group.nodes)
        seen: set[torch.fx.Node] = set()
        external: list[torch.fx.Node] = []
        body: list[torch.fx.Node] = []
        for member in group.nodes:
            waiting = [member]
            while waiting:
                node = waiting[-1]
                floats = node not in self._placed.slice_of and node.op == "call_function" and node.target is not TURN
                is_inside = node in members or floats
                missing = [item for item in node.all_input_nodes if item not in seen] if is_inside else []
                if missing:
                    waiting.extend(reversed(missing))
                    continue
                waiting.pop()
                if node not in seen:
                    seen.add(node)
                    (body if is_inside else external).append(node)
        return external, body

    def _function(
        self,
        graph: bytes,
        group: Group,
        inputs: tuple[ValueIndex, ...],
        outputs: tuple[ValueIndex, ...],
    ) -> int:
        """Returns the index of the compiled function for a graph; equal graphs share one."""
        # Not placements: executors compile a function for those of each call.
        kinds = tuple((value.dtype, value.shape) for value in (self._values[i] for i in (*inputs, *outputs)))
        key = (group.key.slice_index, computation_of(graph), kinds)
        if key not in self._function_of:
            regions = [node.meta[REGION_KEY] for node in group.nodes if REGION_KEY in node.meta]
            named = next((region.name for region in regions if region.name), "")
            source = next((node.meta[SOURCE_KEY] for node in group.nodes if node.meta.get(SOURCE_KEY)), "")
            if group.loop is not None and named:
                named += f".{group.action[1]}"
            name = f"{self._placed.name}/{len(self._functions)}" + (f":{named}" if named else "")
            self._function_of[key] = len(self._functions)
            self._functions.append(Function(name=name, source=source, graph=graph, num_operators=len(group.nodes)))
        return self._function_of[key]


def _in_order(nodes: list[Compute | AllReduce | Loop], given: set[ValueIndex]) -> list[Compute | AllReduce | Loop]:
    """Returns nodes in an order in which they can run: sums as early as they can, the rest as it was."""
    readers: dict[ValueIndex, list[int]] = {}
    missing = [set(node_inputs(node)) - given for node in nodes]
    for number, values in enumerate(missing):
        for value in values:
            readers.setdefault(value, []).append(number)
    ready = [(not isinstance(nodes[number], AllReduce), number) for number, values in enumerate(missing) if not values]
    heapq.heapify(ready)
    ordered: list[Compute | AllReduce | Loop] = []
    while ready:
        node = nodes[heapq.heappop(ready)[1]]
        ordered.append(node)
        for value in node_outputs(node):
            for number in readers.get(value, ()):
                missing[number].discard(value)
                if not missing[number]:
                    heapq.heappush(ready, (not isinstance(nodes[number], AllReduce), number))
    if len(ordered) < len(nodes):
        raise InternalError(f"{len(nodes) - len(ordered)} nodes of a program wait for each other")
    return ordered
