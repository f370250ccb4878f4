"""Cuts a pure graph into compiled functions by slice, and makes the dataflow program of them.

Placement of an operator: (1) its label, where the tracer gave one; (2) else the slice that most bytes of its inputs
are on, the first input's where that ties; (3) an operator that reads nothing placed (a mask, a view of a host
argument) *floats*: it is repeated wherever it is needed. So do views of parameters: they cost nothing where they are
used, and a buffer each where they are kept.

Cutting: each call of a user's compiled function is a node of its own. Of all else, operators of one slice form as few
computations as the transfers between slices allow, and what other slices wait for is cut from what they do not (an
optimizer's update never delays the gradient that the stage before needs). An optimizer's update is one of its own,
which works in place. A region that is compiled once is a node for each call, so is its backward, and so is the update
of the parameters that one call alone reads: equal ones share a function.
"""

from __future__ import annotations

import heapq
import operator
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from torchways.capture.collectives import ALL_REDUCE
from torchways.capture.tracer import REGION_KEY, UPDATE_KEY, Region
from torchways.errors import InternalError, PlacementError
from torchways.graphs import SOURCE_KEY, computation_of, serialize
from torchways.ir.program import (
    UNPLACED,
    AllReduce,
    Arg,
    Compute,
    Function,
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
from torchways.mesh import DATA_AXIS, MAX_SPLIT_DIMS, Placements, VirtualSlice
from torchways.operators import CONSTRAIN, MANUAL_SEED, is_random

#: In place of a call's number: for what comes after the updates of single calls' parameters, and for several calls.
_AFTER_OWNERS, _SEVERAL = -2, -3

_VIEWS = {
    torch.ops.aten.expand.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.squeeze.dims,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.view.default,
}


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


class _GroupKey(NamedTuple):
    """Operators with one key make one compiled function; keys sort in an order in which they can run."""

    phase: int
    late: bool
    update: bool
    slice_index: int
    call: int


@dataclass(slots=True)
class _Group:
    key: _GroupKey
    nodes: list[torch.fx.Node] = field(default_factory=list)


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
        default_mesh: slice of what nothing else places.

    Raises:
        PlacementError: nothing says where the program runs, or a host argument cannot be split.
    """
    return _Partitioner(graph, inputs, name, written, default_mesh).run()


class _Partitioner:
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
        self.placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.num_traced = len(self.placeholders)
        self._position = {node: position for position, node in enumerate(self.placeholders)}
        self.operators = [node for node in self.graph.nodes if node.op == "call_function"]
        #: Operators that span slices, with what they give to each slice; neither belongs to a compiled function.
        self.sums = {node: list(node.users) for node in self.operators if node.target is ALL_REDUCE}
        self._of_sums = {node for users in self.sums.values() for node in users} | self.sums.keys()
        for node in self._of_sums:
            node.meta.pop(REGION_KEY, None)
        self.outputs: list[torch.fx.Node] = list(self.graph.output_node().args[0])  # type: ignore[arg-type]
        self.default_mesh = default_mesh
        #: Slice of each placed node; nodes without an entry float.
        self.slice_of: dict[torch.fx.Node, int] = {}
        self.values: list[Value] = []
        self.value_of: dict[tuple[torch.fx.Node, int], ValueIndex] = {}
        self.arg_inputs: dict[ValueIndex, int] = {}
        self.functions: list[Function] = []
        self._function_of: dict[Any, int] = {}

    def run(self) -> PartitionedProgram:
        self._place_operators()
        self._place_outputs()
        groups = self._cut()
        self._add_seeds(groups)
        self.data_sizes = self._find_data_sizes()
        computes: list[Compute | AllReduce] = [*map(self._make_compute, groups), *map(self._make_sum, self.sums)]
        results = tuple(self._value(node, self._slice(node)) for node in self.outputs)
        nodes: list[Node] = [*self._args(), *_in_order(computes, set(self.arg_inputs)), Result(inputs=results)]
        program = Program(
            name=self.name,
            slices=tuple(SliceSpec(shape=mesh.shape, axis_names=mesh.mesh_dim_names) for mesh in self.meshes),
            values=tuple(self.values),
            functions=tuple(self.functions),
            nodes=tuple(nodes),
        )
        return PartitionedProgram(program=program, meshes=self.meshes)

    # ---- placement

    def _index(self, mesh: VirtualSlice) -> int:
        root = mesh.root
        for index, known in enumerate(self.meshes):
            if known is root:
                return index
        self.meshes.append(root)
        return len(self.meshes) - 1

    def _place_operators(self) -> None:
        for node, spec in zip(self.placeholders, self.inputs, strict=True):
            if spec.mesh is not None:
                self.slice_of[node] = self._index(spec.mesh)
        for node in self.operators:
            region: Region | None = node.meta.get(REGION_KEY)
            if region is not None and region.mesh is not None:
                self.slice_of[node] = self._index(region.mesh)
        for node, spec in zip(self.placeholders, self.inputs, strict=True):
            if spec.is_state and node not in self.slice_of:
                homes = [self.slice_of[user] for user in node.users if user in self.slice_of]
                if homes:
                    self.slice_of[node] = homes[0]
        for node, spec in zip(self.placeholders, self.inputs, strict=True):
            leader = self.placeholders[spec.follows] if spec.follows is not None else None
            if leader in self.slice_of and node not in self.slice_of:
                self.slice_of[node] = self.slice_of[leader]
        free = self._float_repeatable()
        for node in list(self.operators):
            if node in self.sums:
                self._place_sum_inputs(node)
            elif node in self._of_sums:
                self.slice_of[node] = self._slice(_summed(node))
            elif node not in self.slice_of and node not in free:
                bytes_on: dict[int, int] = {}
                for argument in self._placed_inputs(node):
                    if argument in self.slice_of:
                        index = self.slice_of[argument]
                        bytes_on[index] = bytes_on.get(index, 0) + _nbytes(argument)
                if bytes_on:  # dicts keep order: the first input's slice wins a tie
                    self.slice_of[node] = max(bytes_on, key=lambda index: bytes_on[index])
        for node, spec in zip(self.placeholders, self.inputs, strict=True):
            if spec.is_state and node not in self.slice_of:
                homes = [self.slice_of[user] for user in node.users if user in self.slice_of]
                self.slice_of[node] = homes[0] if homes else self._default_slice()

    def _float_repeatable(self) -> set[torch.fx.Node]:
        """Takes constants, and views of parameters and constants, off their slices, and returns them."""
        constants: set[torch.fx.Node] = set()
        views = {node for node, spec in zip(self.placeholders, self.inputs, strict=True) if spec.is_state}
        for node in self.operators:
            if node in self._of_sums or node.target is CONSTRAIN:
                continue
            inputs = node.all_input_nodes
            if all(argument in constants for argument in inputs) and not is_random(node):
                constants.add(node)
            elif node.target in _VIEWS and all(argument in views for argument in inputs):
                views.add(node)
            else:
                continue
            self.slice_of.pop(node, None)
        return constants | views

    def _place_sum_inputs(self, node: torch.fx.Node) -> None:
        """A sum has no slice; its item i is where its input i is.

        Inputs that float, or are on one slice (the gradient of a sum may be one tensor for all slices), are taken to
        where their item is used.
        """
        inputs: list[torch.fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        slices = [self.slice_of.get(item) for item in inputs]
        for item in self.sums[node]:
            number: int = item.args[1]
            homes = [self.slice_of[user] for user in item.users if user in self.slice_of]
            if homes and homes[0] != slices[number] and (slices[number] is None or slices.count(slices[number]) > 1):
                slices[number] = homes[0]
                inputs[number] = self._copied_to(homes[0], inputs[number], node)
        for number, home in enumerate(slices):
            if home is None:
                inputs[number] = self._copied_to(self._default_slice(), inputs[number], node)
        node.args = (inputs,)

    def _copied_to(self, slice_index: int, node: torch.fx.Node, before: torch.fx.Node) -> torch.fx.Node:
        """Adds an operator that takes a node to a slice."""
        with self.graph.inserting_before(before):
            copy = self.graph.call_function(torch.ops.aten.clone.default, (node,))
        copy.meta = {key: value for key, value in node.meta.items() if key != REGION_KEY}
        position = self.operators.index(before) if before in self.operators else len(self.operators)
        self.operators.insert(position, copy)
        self.slice_of[copy] = slice_index
        return copy

    def _default_slice(self) -> int:
        if self.default_mesh is not None:
            return self._index(self.default_mesh)
        if not self.meshes:
            raise PlacementError(
                f"nothing in {self.name} says on which slice it runs: call a function or module decorated with "
                "@tw.function(mesh=...), or decorate it with @tw.program(mesh=...)"
            )
        return len(self.meshes) - 1

    def _place_outputs(self) -> None:
        """Outputs do not float, random operators are not repeated, and new state is made where the old one is."""
        for node in self.operators:
            if node not in self.slice_of and is_random(node):
                homes = [self.slice_of[user] for user in node.users if user in self.slice_of]
                self.slice_of[node] = homes[0] if homes else self._default_slice()
        for number, node in enumerate(self.outputs):
            if node not in self.slice_of and node.op == "call_function":
                self.slice_of[node] = self._default_slice()
            elif node not in self.slice_of:
                self.outputs[number] = self._copied_to(self._default_slice(), node, self.graph.output_node())
        first_written = len(self.outputs) - len(self.written)
        for number, position in enumerate(self.written, start=first_written):
            home = self.slice_of[self.placeholders[position]]
            if self.slice_of[self.outputs[number]] != home:
                self.outputs[number] = self._copied_to(home, self.outputs[number], self.graph.output_node())
        self.graph.output_node().args = (self.outputs,)

    def _slice(self, node: torch.fx.Node) -> int:
        return self.slice_of[node] if node in self.slice_of else self._default_slice()

    # ---- cutting

    def _cut(self) -> list[_Group]:
        self._dissolve_calls_of_several_slices()
        awaited = self._awaited_elsewhere()
        updates = self._updates()
        phase_of: dict[torch.fx.Node, int] = {}
        call_phase = self._call_phases(phase_of)
        # What nobody awaits is in its slice's last phase: one computation, and one of what updates state.
        last_phase: dict[int, int] = {}
        for node, phase in phase_of.items():
            last_phase[self.slice_of[node]] = max(last_phase.get(self.slice_of[node], 0), phase)
        owners = self._owners(awaited)
        groups: dict[_GroupKey, _Group] = {}
        group_of: dict[Any, _Group] = {}
        for node in self.operators:
            if node not in self.slice_of or node in self._of_sums:
                continue
            if node.target is operator.getitem:  # an item is made where its tuple is
                maker = group_of[node.args[0]]
                maker.nodes.append(node)
                group_of[node] = maker
                continue
            call = _call_of(node)
            late = call < 0 and node not in awaited
            phase = call_phase[call] if call >= 0 else phase_of[node]
            if late:
                phase = last_phase[self.slice_of[node]]
                call = owners.get(node, call)
            key = _GroupKey(phase, late, late and (node in updates or node in owners), self.slice_of[node], call)
            group_of[node] = groups.setdefault(key, _Group(key))
            group_of[node].nodes.append(node)
        return [groups[key] for key in sorted(groups)]

    def _dissolve_calls_of_several_slices(self) -> None:
        """A repeated region whose operators are on several slices is cut as what is in no region."""
        slices: dict[int, set[int]] = {}
        for node in self.operators:
            if _call_of(node) >= 0 and node in self.slice_of:
                slices.setdefault(_call_of(node), set()).add(self.slice_of[node])
        for node in self.operators:
            if len(slices.get(_call_of(node), ())) > 1:
                del node.meta[REGION_KEY]

    def _call_phases(self, phase_of: dict[torch.fx.Node, int]) -> dict[int, int]:
        """Fills in the phase of every placed operator; returns that of each function call.

        The phase of a node is above that of every node that it needs from another slice or call.
        """
        call_phase: dict[int, int] = {}
        members: dict[int, list[torch.fx.Node]] = {}
        for node in self.operators:
            if node not in self.slice_of:
                continue
            call, phase = _call_of(node), 0
            for argument in self._placed_inputs(node):
                if argument.op == "placeholder":
                    continue
                other = _call_of(argument)
                if call >= 0 and other == call:
                    continue
                crosses = self.slice_of[argument] != self.slice_of[node] or call >= 0 or other >= 0
                crosses = crosses or node in self._of_sums
                phase = max(phase, phase_of[argument] + crosses)
            if call >= 0:
                if phase > call_phase.get(call, -1):
                    call_phase[call] = phase
                    phase_of.update(dict.fromkeys(members.get(call, ()), phase))
                members.setdefault(call, []).append(node)
                phase = call_phase[call]
            phase_of[node] = phase
        return call_phase

    def _owners(self, awaited: set[torch.fx.Node]) -> dict[torch.fx.Node, int]:
        """Returns the call of a repeated region whose parameters alone an operator of the last phase serves.

        What serves several comes before these computations, and has no owner; what depends on them comes after all,
        and has the number `_AFTER_OWNERS`.
        """
        owner_of = {
            node: calls.pop()
            for node, spec in zip(self.placeholders, self.inputs, strict=True)
            if spec.is_state and len(calls := self._repeated_calls(node)) == 1
        }
        first_written = len(self.outputs) - len(self.written)
        served: dict[torch.fx.Node, int] = {}  # by what it is read for; what serves nobody is not there

        def serve(node: torch.fx.Node, owner: int) -> None:
            served[node] = owner if served.get(node, owner) == owner else _SEVERAL

        for number, position in enumerate(self.written, start=first_written):
            if (owner := owner_of.get(self.placeholders[position])) is not None:
                serve(self.outputs[number], owner)
        if not served:
            return {}
        for node in reversed(self.operators):
            for user in node.users:
                if user in served:
                    serve(node, served[user])
        owners: dict[torch.fx.Node, int] = {}
        for node in self.operators:
            if node in awaited or _call_of(node) >= 0 or node not in self.slice_of:
                continue
            if served.get(node, _SEVERAL) != _SEVERAL:
                owners[node] = served[node]
            elif any(argument in owners for argument in self._placed_inputs(node)):
                owners[node] = _AFTER_OWNERS
        return owners

    def _repeated_calls(self, node: torch.fx.Node) -> set[int]:
        """Returns the calls of repeated regions, forward, that read a node, as it is or through what floats."""
        calls: set[int] = set()
        seen, waiting = {node}, [node]
        while waiting:
            for user in waiting.pop().users:
                region: Region | None = user.meta.get(REGION_KEY)
                if user not in self.slice_of and user not in seen:
                    seen.add(user)
                    waiting.append(user)
                elif region is not None and region.is_repeated and not region.backward:
                    calls.add(region.call)
        return calls

    def _placed_inputs(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        """Returns the placed nodes that `node` needs, seeing through what floats."""
        seen: dict[torch.fx.Node, None] = {}
        stack = list(reversed(node.all_input_nodes))
        while stack:
            argument = stack.pop()
            if argument not in seen:
                seen[argument] = None
                if argument not in self.slice_of:
                    stack.extend(reversed(argument.all_input_nodes))
        return [argument for argument in seen if argument in self.slice_of]

    def _awaited_elsewhere(self) -> set[torch.fx.Node]:
        """Returns the operators that some other slice or function call needs, directly or not."""
        awaited: set[torch.fx.Node] = set()
        for node in reversed(self.operators):
            for user in node.users:
                if (
                    user in awaited
                    or user in self.sums
                    or (
                        user in self.slice_of
                        and node in self.slice_of
                        and (self.slice_of[user] != self.slice_of[node] or _call_of(user) >= 0)
                    )
                ):
                    awaited.add(node)
                    break
        return awaited

    def _updates(self) -> set[torch.fx.Node]:
        """Returns the operators of optimizers' steps and all that depends on them.

        Where forward and backward read parameters in the computation that replaces them, XLA's CPU compiler cannot tell
        that they are done with the old values when the new ones are written, and copies the donated buffers first. It
        also pairs donated buffers and results by size alone, in order, which fits where the order of results decides
        that of arguments, as in an update apart: that is done in place.
        """
        updates: set[torch.fx.Node] = set()
        for node in self.operators:
            if UPDATE_KEY in node.meta or not updates.isdisjoint(node.all_input_nodes):
                updates.add(node)
        return updates

    def _add_seeds(self, groups: list[_Group]) -> None:
        """Gives each computation that draws random numbers a seed of its own, as an input."""
        for group in groups:
            if not any(is_random(node) for node in group.nodes):
                continue
            number = len(self.placeholders) - self.num_traced
            with self.graph.inserting_after(self.placeholders[-1] if self.placeholders else self.graph._root):
                seed = self.graph.placeholder(f"seed_{number}")
            with self.graph.inserting_before(self.operators[0]):
                seeding = self.graph.call_function(MANUAL_SEED, (seed,))
            seed.meta["val"] = torch.empty((), dtype=torch.int64, device="meta")
            seeding.meta["val"] = None
            self._position[seed] = len(self.placeholders)
            self.placeholders.append(seed)
            self.inputs.append(
                PlaceholderSpec(label=f"seed {number}", mesh=None, placements=None, is_state=False, is_data=False)
            )
            self.slice_of[seeding] = group.key.slice_index
            group.nodes.insert(0, seeding)

    # ---- values

    def _find_data_sizes(self) -> set[int]:
        """Returns the sizes of dimension 0 of the arguments that are split along the data axis."""
        return {
            int(node.meta["val"].shape[0])
            for node, spec in zip(self.placeholders, self.inputs, strict=True)
            if spec.is_data and node.meta["val"].dim() > 0
        }

    def _value(self, node: torch.fx.Node, slice_index: int) -> ValueIndex:
        """Returns the value of a node; of one that floats, on a slice."""
        if node in self.slice_of:
            slice_index = self.slice_of[node]
        elif node.op == "placeholder":
            slice_index = UNPLACED
        key = (node, slice_index)
        if key not in self.value_of:
            fake = node.meta["val"]
            placements = self._placements(node, slice_index)  # may make the value of what a sum reads
            self.value_of[key] = len(self.values)
            self.values.append(
                Value(
                    dtype=str(fake.dtype).removeprefix("torch."),
                    shape=tuple(int(size) for size in fake.shape),
                    slice_index=slice_index,
                    placements=placements,
                )
            )
            if node.op == "placeholder":
                self.arg_inputs[self.value_of[key]] = self._position[node]
        return self.value_of[key]

    def _placements(self, node: torch.fx.Node, slice_index: int) -> Placements:
        if slice_index == UNPLACED:
            return ()
        mesh = self.meshes[slice_index]
        shape = tuple(node.meta["val"].shape)
        if node in self._of_sums:
            source = _summed(node)
            return self.values[self._value(source, slice_index)].placements
        if node.op == "placeholder":
            spec = self.inputs[self._position[node]]
            if spec.placements is not None:
                return spec.placements
            leader = self.placeholders[spec.follows] if spec.follows is not None else None
            if leader is not None and tuple(leader.meta["val"].shape) == shape:  # optimizer state: as its parameter
                return self._placements(leader, slice_index)
            return ("R",) * mesh.ndim
        first_written = len(self.outputs) - len(self.written)
        for position, output in enumerate(self.outputs[first_written:]):
            if output is node:
                old = self.placeholders[self.written[position]]
                return self._placements(old, slice_index) if self.slice_of[old] == slice_index else ("R",) * mesh.ndim
        if node.target is CONSTRAIN:
            return _constraint(node)
        state = self._updated_state(node, slice_index)
        return self._placements(state, slice_index) if state is not None else self._derived_placements(shape, mesh)

    def _updated_state(self, node: torch.fx.Node, slice_index: int) -> torch.fx.Node | None:
        """Returns the state that a value is combined with element by element, as an update does with a gradient."""
        shape = node.meta["val"].shape
        seen, waiting = {node}, deque([node])
        while waiting:
            for user in waiting.popleft().users:
                if user in seen or self.slice_of.get(user) != slice_index or not _is_pointwise(user, shape):
                    continue
                seen.add(user)
                waiting.append(user)
                for argument in user.all_input_nodes:
                    is_state = argument.op == "placeholder" and self.inputs[self._position[argument]].is_state
                    if is_state and argument.meta["val"].shape == shape and self.slice_of[argument] == slice_index:
                        return argument
        return None

    def _derived_placements(self, shape: tuple[int, ...], mesh: VirtualSlice) -> Placements:
        """Splits what looks like a batch (dimension 0 a multiple of the data's) along "dp"; never changes a result."""
        texts = ["R"] * mesh.ndim
        if DATA_AXIS in mesh.mesh_dim_names and 0 < len(shape) <= MAX_SPLIT_DIMS:
            axis = mesh.mesh_dim_names.index(DATA_AXIS)
            batched = any(size > 1 and shape[0] and shape[0] % size == 0 for size in self.data_sizes)
            if batched and shape[0] % mesh.shape[axis] == 0:
                texts[axis] = "S(0)"
        return tuple(texts)

    # ---- nodes

    def _args(self) -> list[Arg]:
        return [
            Arg(
                output=value,
                label=self.inputs[position].label,
                source=TracedInput(position),
                replaced=position in self.written,
                is_data=self.inputs[position].is_data and self.values[value].slice_index == UNPLACED,
                placements=self._wanted(self.placeholders[position]),
            )
            for value, position in sorted(self.arg_inputs.items())
        ]

    def _wanted(self, node: torch.fx.Node) -> Placements | None:
        """Returns the sharding in which alone a host argument is read, if there is one."""
        constraints = {_constraint(user) for user in node.users if user.target is CONSTRAIN}
        is_alone = len(constraints) == 1 and all(user.target is CONSTRAIN for user in node.users)
        return constraints.pop() if is_alone else None

    def _make_compute(self, group: _Group) -> Compute:
        members = set(group.nodes)
        returned = set(self.outputs)
        needed_outside = [
            node
            for node in group.nodes
            if not isinstance(node.meta["val"], (list, tuple))
            and (node in returned or any(self._read_outside(user, members) for user in node.users))
        ]
        external, body = self._extract(group)
        needed_outside = list(dict.fromkeys(needed_outside))
        inputs = tuple(self._value(node, group.key.slice_index) for node in external)
        outputs = tuple(self._value(node, group.key.slice_index) for node in needed_outside)
        graph = serialize(external, body, needed_outside)
        return Compute(function_index=self._function(graph, group, inputs, outputs), inputs=inputs, outputs=outputs)

    def _make_sum(self, node: torch.fx.Node) -> AllReduce:
        inputs: list[torch.fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        slices = [self._slice(item) for item in inputs]
        line = node.meta.get(SOURCE_KEY, "")
        if len(set(slices)) < len(slices):
            raise PlacementError(f"tw.all_reduce at {line} has two tensors on one slice: add these first")
        sums = {item.args[1]: item for item in self.sums[node]}
        read = tuple(self._value(item, index) for item, index in zip(inputs, slices, strict=True))
        outputs = []
        for number, value in enumerate(read):
            if number in sums:
                outputs.append(self._value(sums[number], slices[number]))
            else:  # nobody reads the sum there
                outputs.append(len(self.values))
                self.values.append(self.values[value])
        return AllReduce(inputs=read, outputs=tuple(outputs), source=line)

    def _read_outside(self, user: torch.fx.Node, members: set[torch.fx.Node]) -> bool:
        """Whether `user`, or a placed node that reads it through floating ones, is not among `members`."""
        seen, stack = {user}, [user]
        while stack:
            user = stack.pop()
            if user in self.slice_of:
                if user not in members:
                    return True
            elif user.op != "output":
                readers = set(user.users) - seen
                seen |= readers
                stack.extend(readers)
        return False

    def _extract(self, group: _Group) -> tuple[list[torch.fx.Node], list[torch.fx.Node]]:
        """Returns what a group reads from outside, and its operators with the floating ones that it needs, in order."""
        members = set(group.nodes)
        seen: set[torch.fx.Node] = set()
        external: list[torch.fx.Node] = []
        body: list[torch.fx.Node] = []
        for member in group.nodes:
            waiting = [member]
            while waiting:
                node = waiting[-1]
                is_inside = node in members or (node not in self.slice_of and node.op == "call_function")
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
        group: _Group,
        inputs: tuple[ValueIndex, ...],
        outputs: tuple[ValueIndex, ...],
    ) -> int:
        """Returns the index of the compiled function for a graph; equal graphs share one."""
        # Not placements: executors compile a function for those of each call.
        kinds = tuple((value.dtype, value.shape) for value in (self.values[i] for i in (*inputs, *outputs)))
        key = (group.key.slice_index, computation_of(graph), kinds)
        if key not in self._function_of:
            regions = [node.meta[REGION_KEY] for node in group.nodes if REGION_KEY in node.meta]
            named = next((region.name for region in regions if region.name), "")
            source = next((node.meta[SOURCE_KEY] for node in group.nodes if node.meta.get(SOURCE_KEY)), "")
            name = f"{self.name}/{len(self.functions)}" + (f":{named}" if named else "")
            self._function_of[key] = len(self.functions)
            self.functions.append(Function(name=name, source=source, graph=graph, num_operators=len(group.nodes)))
        return self._function_of[key]


def _in_order(nodes: list[Compute | AllReduce], given: set[ValueIndex]) -> list[Compute | AllReduce]:
    """Returns nodes in an order in which they can run: sums as early as they can, the rest as it was."""
    readers: dict[ValueIndex, list[int]] = {}
    missing = [set(node_inputs(node)) - given for node in nodes]
    for number, values in enumerate(missing):
        for value in values:
            readers.setdefault(value, []).append(number)
    ready = [(isinstance(nodes[number], Compute), number) for number, values in enumerate(missing) if not values]
    heapq.heapify(ready)
    ordered: list[Compute | AllReduce] = []
    while ready:
        node = nodes[heapq.heappop(ready)[1]]
        ordered.append(node)
        for value in node_outputs(node):
            for number in readers.get(value, ()):
                missing[number].discard(value)
                if not missing[number]:
                    heapq.heappush(ready, (isinstance(nodes[number], Compute), number))
    if len(ordered) < len(nodes):
        raise InternalError(f"{len(nodes) - len(ordered)} nodes of a program wait for each other")
    return ordered


def _summed(item: torch.fx.Node) -> torch.fx.Node:
    """Returns what a sum's output is the sum of, on its slice: the sum's input of the same number."""
    total, number = item.args
    return total.args[0][number]  # type: ignore[union-attr, index, return-value]


def _is_pointwise(node: torch.fx.Node, shape: torch.Size) -> bool:
    """Whether a node gives a tensor of that shape, element by element."""
    is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
    return is_tensor and node.meta["val"].shape == shape and torch.Tag.pointwise in getattr(node.target, "tags", ())


def _constraint(node: torch.fx.Node) -> Placements:
    return tuple(str(node.args[1]).split())


def _call_of(node: torch.fx.Node) -> int:
    """Returns the function call that an operator belongs to, or -1."""
    region: Region | None = node.meta.get(REGION_KEY)
    return -1 if region is None or (region.backward and not region.is_repeated) else region.call


def _nbytes(node: torch.fx.Node) -> int:
    value = node.meta["val"]
    if isinstance(value, (list, tuple)):
        return sum(item.numel() * item.element_size() for item in value)
    return int(value.numel() * value.element_size())
