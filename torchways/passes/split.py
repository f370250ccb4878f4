"""Splits a program into what each slice does: computations, and both ends of each transfer as instructions.

A part names its values by slot, position in its own table: arguments first, then in order of making.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torchways.ir.program import (
    AllReduce,
    Arg,
    Compute,
    Function,
    Program,
    Result,
    Transfer,
    Value,
    ValueIndex,
)
from torchways.passes.insert_transfers import compute_slice


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeStep:
    """Run function `function_index` of the part."""

    function_index: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    donated: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SendStep:
    """Send a slot to the slice `peer`; `edge_id` is the same on both ends."""

    slot: int
    edge_id: int
    peer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveStep:
    """Fill a slot with what the slice `peer` sends."""

    slot: int
    edge_id: int
    peer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceStep:
    """Fill slot `output` with the sum of `input` over the slices `members`, this one among them."""

    input: int
    output: int
    edge_id: int
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeStep:
    """Drop values that no later instruction reads."""

    slots: tuple[int, ...]


Step: TypeAlias = ComputeStep | SendStep | ReceiveStep | AllReduceStep | FreeStep


@dataclass(slots=True, kw_only=True)
class SlicePart:
    """What one slice does in a run.

    Attributes:
        slice_index: the program's slice.
        functions: the compiled functions that it calls.
        slots: every value that it sees; the first `len(args)` are its arguments.
        args: the program's Arg values, in slot order.
        steps: instructions in program order.
        results: (slot, result number) pairs.
    """

    slice_index: int
    functions: list[Function] = field(default_factory=list)
    slots: list[Value] = field(default_factory=list)
    args: list[ValueIndex] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    results: list[tuple[int, int]] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(_part_lines(self))


class _PartBuilder:
    def __init__(self, slice_index: int) -> None:
        self.part = SlicePart(slice_index=slice_index)
        self._slot_of: dict[ValueIndex, int] = {}
        self._function_of: dict[int, int] = {}

    def slot(self, program: Program, value: ValueIndex) -> int:
        if value not in self._slot_of:
            self._slot_of[value] = len(self.part.slots)
            self.part.slots.append(program.values[value])
        return self._slot_of[value]

    def function(self, program: Program, function_index: int) -> int:
        if function_index not in self._function_of:
            self._function_of[function_index] = len(self.part.functions)
            self.part.functions.append(program.functions[function_index])
        return self._function_of[function_index]


def split(program: Program) -> list[SlicePart]:
    """Returns the part of each slice that has one, in slice order."""
    builders = [_PartBuilder(index) for index in range(len(program.slices))]
    for node in program.nodes:
        if isinstance(node, Arg):
            builder = builders[program.values[node.output].slice_index]
            builder.slot(program, node.output)
            builder.part.args.append(node.output)
    edges = 0
    for node in program.nodes:
        match node:
            case Compute():
                builder = builders[compute_slice(program, node)]
                builder.part.steps.append(
                    ComputeStep(
                        function_index=builder.function(program, node.function_index),
                        inputs=tuple(builder.slot(program, value) for value in node.inputs),
                        outputs=tuple(builder.slot(program, value) for value in node.outputs),
                        donated=node.donated,
                    )
                )
            case Transfer():
                source, target = (program.values[value].slice_index for value in (node.input, node.output))
                sender, receiver = builders[source], builders[target]
                sender.part.steps.append(SendStep(slot=sender.slot(program, node.input), edge_id=edges, peer=target))
                receiver.part.steps.append(
                    ReceiveStep(slot=receiver.slot(program, node.output), edge_id=edges, peer=source)
                )
                edges += 1
            case AllReduce():
                members = tuple(program.values[value].slice_index for value in node.inputs)
                for member, read, made in zip(members, node.inputs, node.outputs, strict=True):
                    builder = builders[member]
                    builder.part.steps.append(
                        AllReduceStep(
                            input=builder.slot(program, read),
                            output=builder.slot(program, made),
                            edge_id=edges,
                            members=members,
                        )
                    )
                edges += 1
            case Result():
                for number, value in enumerate(node.inputs):
                    builder = builders[program.values[value].slice_index]
                    builder.part.results.append((builder.slot(program, value), number))
            case Arg():
                pass
    for builder in builders:
        _insert_frees(builder.part)
    return [builder.part for builder in builders if builder.part.slots]


def _insert_frees(part: SlicePart) -> None:
    """Adds a Free behind the last reader of each value that is neither an argument nor a result, nor donated."""
    kept = {slot for slot, _ in part.results} | set(range(len(part.args)))
    kept |= {step.inputs[index] for step in part.steps if isinstance(step, ComputeStep) for index in step.donated}
    last: dict[int, int] = {}
    for position, step in enumerate(part.steps):
        for slot in _touched(step):
            last[slot] = position
    freed: dict[int, list[int]] = {}
    for slot, position in last.items():
        if slot not in kept:
            freed.setdefault(position, []).append(slot)
    steps: list[Step] = []
    for position, step in enumerate(part.steps):
        steps.append(step)
        if position in freed:
            steps.append(FreeStep(slots=tuple(sorted(freed[position]))))
    part.steps = steps


def _part_lines(part: SlicePart) -> Iterator[str]:
    def text(slots: Sequence[int]) -> str:
        return ", ".join(f"${slot}" for slot in slots)

    yield f"part of slice @{part.slice_index}"
    for slot, value in enumerate(part.slots):
        yield f"  ${slot}: {value}" + (" arg" if slot < len(part.args) else "")
    for step in part.steps:
        match step:
            case ComputeStep():
                donated = f" donating {text([step.inputs[index] for index in step.donated])}" if step.donated else ""
                name = part.functions[step.function_index].name
                yield f"  {text(step.outputs)} = {name}({text(step.inputs)}){donated}"
            case SendStep():
                yield f"  send {text([step.slot])} to @{step.peer} over edge {step.edge_id}"
            case ReceiveStep():
                yield f"  {text([step.slot])} = receive from @{step.peer} over edge {step.edge_id}"
            case AllReduceStep():
                members = ", ".join(f"@{member}" for member in step.members)
                yield f"  {text([step.output])} = sum of {text([step.input])} over {members}, edge {step.edge_id}"
            case FreeStep():
                yield f"  free {text(step.slots)}"
    yield f"  results {', '.join(f'${slot} as {number}' for slot, number in part.results)}"


def _touched(step: Step) -> tuple[int, ...]:
    match step:
        case ComputeStep():
            return (*step.inputs, *step.outputs)
        case SendStep() | ReceiveStep():
            return (step.slot,)
        case AllReduceStep():
            return (step.input, step.output)
        case FreeStep():
            return ()
