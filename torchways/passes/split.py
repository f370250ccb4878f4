"""Splits a program into one part per slice: its computations, and its ends of transfers and sums."""

from __future__ import annotations

from torchways.ir.part import (
    AllReduceInstruction,
    ComputeInstruction,
    Instruction,
    ReceiveInstruction,
    SendInstruction,
    SlicePart,
    Slot,
)
from torchways.ir.program import AllReduce, Arg, Compute, Function, Program, Result, Transfer, Value, ValueIndex
from torchways.passes.insert_transfers import compute_slice


class _PartBuilder:
    """A part in the making: values and functions are numbered as they are first named."""

    def __init__(self, program: Program, args: list[ValueIndex]) -> None:
        self.instructions: list[Instruction] = []
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
            case Result():
                for number, value in enumerate(node.inputs):
                    builder = builders[program.values[value].slice_index]
                    builder.results.append((builder.slot(value), number))
            case Arg():
                pass
    parts = [builder.part(slice_index) for slice_index, builder in enumerate(builders)]
    return [part for part in parts if part.slots]
