"""Splits a program into one part per slice: its computations, and its ends of transfers and sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torchways.errors import InternalError
from torchways.ir.part import (
    AllReduceInstruction,
    BodyInstruction,
    ComputeInstruction,
    Instruction,
    LoopBody,
    LoopInstruction,
    ReceiveInstruction,
    SendInstruction,
    SlicePart,
    Slot,
)
from torchways.ir.program import (
    AllReduce,
    Arg,
    BodyNode,
    Compute,
    Function,
    Loop,
    Node,
    Program,
    Result,
    Transfer,
    Value,
    ValueIndex,
    node_inputs,
    node_outputs,
)
from torchways.ir.stages import is_pipeline
from torchways.passes.insert_transfers import compute_slice
from torchways.schedules.actions import Kind


class _PartBuilder:
    """A part in the making: values and functions are numbered as they are first named."""

    def __init__(self, program: Program, args: list[ValueIndex]) -> None:
        self.instructions: list[Instruction | LoopInstruction] = []
        self.results: list[tuple[Slot, int]] = []
        self._program = program
        self._num_args = len(args)
        self._slots: list[Value] = []
        self._functions: list[Function] = []
        self._slot_of: dict[ValueIndex, Slot] = {}
        self._function_of: dict[int, int] = {}
        for value in args:
            self.slot(value)

    def slot(self, value: ValueIndex) -> Slot:
        """Returns the slot of a value."""
        if value not in self._slot_of:
            self._slot_of[value] = len(self._slots)
            self._slots.append(self._program.values[value])
        return self._slot_of[value]

    def function(self, function_index: int) -> int:
        """Returns the position in the part of a function of the program."""
        if function_index not in self._function_of:
            self._function_of[function_index] = len(self._functions)
            self._functions.append(self._program.functions[function_index])
        return self._function_of[function_index]

    def part(self, slice_index: int) -> SlicePart:
        """Returns the part as it is now."""
        return SlicePart(
            slice_index=slice_index,
            functions=tuple(self._functions),
            slots=tuple(self._slots),
            num_args=self._num_args,
            instructions=tuple(self.instructions),
            results=tuple(self.results),
        )


def slice_args(program: Program) -> list[list[ValueIndex]]:
    """Returns, for each slice, the arguments of its part in the order of their slots."""
    args: list[list[ValueIndex]] = [[] for _ in program.slices]
    for node in program.nodes:
        if isinstance(node, Arg):
            args[program.values[node.output].slice_index].append(node.output)
    return args


def split(program: Program) -> list[SlicePart]:
    """Returns the part of each slice that has one, in slice order."""
    builders = [_PartBuilder(program, args) for args in slice_args(program)]
    stride = _count_edges(program.nodes)
    num_edges = 0
    for node in program.nodes:
        match node:
            case Compute():
                builder = builders[compute_slice(program, node)]
                builder.instructions.append(
                    ComputeInstruction(
                        function_index=builder.function(node.function_index),
                        inputs=tuple(map(builder.slot, node.inputs)),
                        outputs=tuple(map(builder.slot, node.outputs)),
                        donated=node.donated,
                    )
                )
            case Transfer():
                source, target = (program.values[value].slice_index for value in (node.input, node.output))
                slot = builders[source].slot(node.input)
                builders[source].instructions.append(SendInstruction(slot=slot, edge_id=num_edges, peer=target))
                slot = builders[target].slot(node.output)
                builders[target].instructions.append(ReceiveInstruction(slot=slot, edge_id=num_edges, peer=source))
                num_edges += 1
            case AllReduce():
                members = tuple(program.values[value].slice_index for value in node.inputs)
                for member, read, made in zip(members, node.inputs, node.outputs, strict=True):
                    builder = builders[member]
                    builder.instructions.append(
                        AllReduceInstruction(
                            input=builder.slot(read), output=builder.slot(made), edge_id=num_edges, members=members
                        )
                    )
                num_edges += 1
            case Loop():
                _split_loop(program, node, builders, num_edges, stride)
                num_edges += _count_edges([item.node for body in node.bodies for item in body.nodes])
            case Result():
                for number, value in enumerate(node.inputs):
                    builder = builders[program.values[value].slice_index]
                    builder.results.append((builder.slot(value), number))
            case Arg():
                pass
    parts = [builder.part(slice_index) for slice_index, builder in enumerate(builders)]
    return [part for part in parts if part.slots or part.instructions]  # a loop has slots of its own


@dataclass(frozen=True, slots=True)
class Edges:
    """A transfer or a sum of a program.

    Attributes:
        node: it.
        edge_ids: of what it becomes in the parts: one, or in a loop one for each turn that it is part of.
    """

    node: Transfer | AllReduce
    edge_ids: range


def edges_of(program: Program) -> list[Edges]:
    """Returns all transfers and sums of a program, with the edges that `split` makes of them."""
    found: list[Edges] = []
    stride, num_edges = _count_edges(program.nodes), 0
    for node in program.nodes:
        if isinstance(node, (Transfer, AllReduce)):
            found.append(Edges(node, range(num_edges, num_edges + 1)))
            num_edges += 1
        elif isinstance(node, Loop):
            for body in node.bodies:
                turns = range(node.num_turns)
                if len(node.bodies) > 1:
                    turns = turns[-1:] if body is node.bodies[-1] else turns[:-1]
                for item in body.nodes:
                    if isinstance(item.node, (Transfer, AllReduce)):
                        first, end = (num_edges + turn * stride for turn in (turns.start, turns.stop))
                        found.append(Edges(item.node, range(first, end, stride)))
                        num_edges += 1
    return found


def _count_edges(nodes: Iterable[Node]) -> int:
    count = 0
    for node in nodes:
        if isinstance(node, Loop):
            count += _count_edges(item.node for body in node.bodies for item in body.nodes)
        else:
            count += isinstance(node, (Transfer, AllReduce))
    return count


def _split_loop(program: Program, loop: Loop, builders: list[_PartBuilder], first_edge: int, stride: int) -> None:
    """Adds to each part that a loop concerns the loop's bodies, as far as they run on the part's slice."""
    orders = dict(loop.orders)
    for slice_index, builder in enumerate(builders):
        mine = [number for number, value in enumerate(loop.firsts) if program.values[value].slice_index == slice_index]
        last = [
            number
            for number in range(len(loop.bodies[-1].last))
            if program.values[loop.outputs[len(loop.firsts) + number]].slice_index == slice_index
        ]
        bodies, edge = [], first_edge
        for body in loop.bodies:
            splitter = _BodySplitter(program, builder, slice_index, edge)
            for number in mine:
                splitter.enter(body.carried[number][0], loop.firsts[number])
            splitter.read_invariants(body.nodes, {*body.numbers, *(entered for entered, _ in body.carried)})
            bodies.append(
                splitter.body(
                    body.nodes,
                    numbers=[value for value in body.numbers if program.values[value].slice_index == slice_index],
                    carried=[body.carried[number] for number in mine],
                    last=[body.last[number] for number in last] if body is loop.bodies[-1] else [],
                )
            )
            edge += _count_edges(item.node for item in body.nodes)
        if not any(body.instructions for body in bodies):
            continue
        outputs = [loop.outputs[number] for number in (*mine, *(len(loop.firsts) + number for number in last))]
        builder.instructions.append(
            LoopInstruction(
                bodies=tuple(bodies),
                num_turns=loop.num_turns,
                order=orders[slice_index],
                outputs=tuple(map(builder.slot, outputs)),
                donated=tuple(position for position, number in enumerate(mine) if number in loop.donated),
                edge_stride=stride,
                number=loop.number if is_pipeline(loop) else None,
                schedule=loop.schedule if is_pipeline(loop) else "",
            )
        )


class _BodySplitter:
    """What a loop's body does on one slice, in the making. Its inputs are known before anything else has a slot."""

    def __init__(self, program: Program, builder: _PartBuilder, slice_index: int, first_edge: int) -> None:
        self._program = program
        self._builder = builder
        self._slice_index = slice_index
        self._edge = first_edge
        self._slots: list[Value] = []
        self._slot_of: dict[ValueIndex, Slot] = {}
        self._inputs: list[Slot] = []

    def enter(self, value: ValueIndex, outer: ValueIndex) -> None:
        """Makes a value of the part an input, as `value` of the body."""
        self._slot(value)
        self._inputs.append(self._builder.slot(outer))

    def read_invariants(self, nodes: Iterable[BodyNode], own: set[ValueIndex]) -> None:
        """Makes inputs of the values that are read on this slice and come from outside."""
        made = own | {value for item in nodes for value in node_outputs(item.node)}
        for item in nodes:
            for value in node_inputs(item.node):
                if value not in made and self._is_here(value) and value not in self._slot_of:
                    self.enter(value, value)

    def body(
        self,
        nodes: Sequence[BodyNode],
        *,
        numbers: Sequence[ValueIndex],
        carried: Sequence[tuple[ValueIndex, ValueIndex]],
        last: Sequence[ValueIndex],
    ) -> LoopBody:
        """Returns the body."""
        number_slots = tuple(map(self._slot, numbers))
        instructions = [found for item in nodes for found in self._instructions(item, nodes)]
        return LoopBody(
            slots=tuple(self._slots),
            inputs=tuple(self._inputs),
            number_slots=number_slots,
            instructions=tuple(instructions),
            carried=tuple((self._slot(entered), self._slot(made)) for entered, made in carried),
            last=tuple(map(self._slot, last)),
        )

    def _slot(self, value: ValueIndex) -> Slot:
        if value not in self._slot_of:
            self._slot_of[value] = len(self._slots)
            self._slots.append(self._program.values[value])
        return self._slot_of[value]

    def _is_here(self, value: ValueIndex) -> bool:
        return self._program.values[value].slice_index == self._slice_index

    def _instructions(self, item: BodyNode, nodes: Sequence[BodyNode]) -> Iterator[BodyInstruction]:
        node, stage, kind = item.node, item.stage, item.kind
        match node:
            case Compute() if compute_slice(self._program, node) == self._slice_index:
                compute = ComputeInstruction(
                    function_index=self._builder.function(node.function_index),
                    inputs=tuple(map(self._slot, node.inputs)),
                    outputs=tuple(map(self._slot, node.outputs)),
                    donated=node.donated,
                )
                yield BodyInstruction(stage=stage, kind=kind, instruction=compute)
            case Transfer():
                source, target = (self._program.values[value].slice_index for value in (node.input, node.output))
                edge, self._edge = self._edge, self._edge + 1
                if source == self._slice_index:
                    stage, kind = self._action_of(nodes, lambda other: node.input in node_outputs(other))
                    send = SendInstruction(slot=self._slot(node.input), edge_id=edge, peer=target)
                    yield BodyInstruction(stage=stage, kind=kind, instruction=send)
                elif target == self._slice_index:
                    stage, kind = self._action_of(nodes, lambda other: node.output in node_inputs(other))
                    receive = ReceiveInstruction(slot=self._slot(node.output), edge_id=edge, peer=source)
                    yield BodyInstruction(stage=stage, kind=kind, instruction=receive)
            case AllReduce():
                edge, self._edge = self._edge, self._edge + 1
                members = tuple(self._program.values[value].slice_index for value in node.inputs)
                if self._slice_index in members:
                    position = members.index(self._slice_index)
                    made = node.outputs[position]
                    stage, kind = self._action_of(nodes, lambda other: made in node_inputs(other))
                    reduce = AllReduceInstruction(
                        input=self._slot(node.inputs[position]), output=self._slot(made), edge_id=edge, members=members
                    )
                    yield BodyInstruction(stage=stage, kind=kind, instruction=reduce)

    def _action_of(self, nodes: Sequence[BodyNode], is_meant: Callable[[Compute], bool]) -> tuple[int, Kind]:
        """Returns the action of the first computation on this slice for which something holds, else of the first."""
        here = [
            (item, item.node)
            for item in nodes
            if isinstance(item.node, Compute) and compute_slice(self._program, item.node) == self._slice_index
        ]
        for item, node in here:
            if is_meant(node):
                return item.stage, item.kind
        if not here:
            raise InternalError("a loop moves a value to or from a slice that computes nothing in it")
        return here[0][0].stage, here[0][0].kind
