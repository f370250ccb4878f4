"""One slice's part of a program: instructions over slots. It crosses processes, and executors carry it out as it is.

A slot is a position in the part's own table of values: arguments come first, then values in the order in which they
are made. Other slices are named by their index in the program, so a part stays the same when slices move to other
devices. Which hosts exchange the value of an edge is worked out where it is needed (executor/routes.py).

Like the rest of this package, it knows neither torch nor gRPC.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from torchways.ids import BufferId
from torchways.ir.program import Function, Value
from torchways.schedules.actions import Action, Kind, Repeat

#: Position of a value in `SlicePart.slots`.
Slot: TypeAlias = int
#: Identifies a transfer or a sum: the same number in each part that takes part, unique in the program.
EdgeId: TypeAlias = int
#: Position of a slice in `Program.slices`.
SliceIndex: TypeAlias = int


class LoopAction(NamedTuple):
    """An action of a loop's schedule.

    Attributes:
        loop: the loop's number in its program.
        action: it.
    """

    loop: int
    action: Action


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeInstruction:
    """Calls a compiled function.

    Attributes:
        function_index: position in `SlicePart.functions`.
        inputs, outputs: slots, in the graph's order.
        donated: positions in `inputs` whose buffers the computation may reuse.
        part_of: in a part without loops, the action of a pipeline's schedule that it was unrolled from.
    """

    function_index: int
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    donated: tuple[int, ...] = ()
    part_of: LoopAction | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SendInstruction:
    """Sends a slot to the slice `peer`."""

    slot: Slot
    edge_id: EdgeId
    peer: SliceIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveInstruction:
    """Fills a slot with the value that the slice `peer` sends."""

    slot: Slot
    edge_id: EdgeId
    peer: SliceIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceInstruction:
    """Fills the slot `output` with the sum of `input` over the slices `members`.

    The slice itself is a member. All members list each other in the same order.
    """

    input: Slot
    output: Slot
    edge_id: EdgeId
    members: tuple[SliceIndex, ...]


#: A consumer that needs only slots and peers calls `reads`, `writes`, `donated_slots` and `peers`, and so goes on to
#: work when there is another kind.
Instruction: TypeAlias = ComputeInstruction | SendInstruction | ReceiveInstruction | AllReduceInstruction


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyInstruction:
    """An instruction of a loop's body and the action of the schedule that it belongs to.

    Attributes:
        stage, kind: of the action; every turn has one action of each stage and kind.
        instruction: its slots are the body's, its edges and functions the part's.
    """

    stage: int
    kind: Kind
    instruction: Instruction


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopBody:
    """What one turn of a loop does on a slice.

    Attributes:
        slots: all values of a turn. The first are its inputs, the values that it does not make.
        inputs: the slots of the part that these are, for the first turn.
        number_slots: of the other slots, those that hold the number of the turn, int64[].
        instructions: in an order in which they can run.
        carried: for each value that turns hand on, the input and the slot that is this input in the next turn.
        last: the slots whose values in the last turn outlive the loop.
    """

    slots: tuple[Value, ...]
    inputs: tuple[Slot, ...]
    number_slots: tuple[Slot, ...]
    instructions: tuple[BodyInstruction, ...]
    carried: tuple[tuple[Slot, Slot], ...]
    last: tuple[Slot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopInstruction:
    """Turns of a body: the microbatches of a pipeline, in the order of a schedule. See `unrolled` (loops.py).

    Attributes:
        bodies: what turns do. If there are two, the last turn has the second: a microbatch of another size.
        num_turns: at least one.
        order: the actions of this slice.
        outputs: the slots that the loop fills: with what the last turn hands on, then with what `last` names.
        donated: positions in `inputs` whose buffers the first turn may reuse.
        edge_stride: an edge of a body is, in turn t, the edge whose number is higher by t times this.
        number: of the loop in its program, if it is a pipeline's: what its actions take is measured.
        schedule: the name of a pipeline's schedule, for people.
    """

    bodies: tuple[LoopBody, ...]
    num_turns: int
    order: tuple[Repeat, ...]
    outputs: tuple[Slot, ...]
    donated: tuple[int, ...]
    edge_stride: int
    number: int | None = None
    schedule: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicePart:
    """Everything that one slice does in a run.

    Attributes:
        slice_index: the slice.
        functions: the compiled functions that it calls.
        slots: all values that it sees.
        num_args: the first so many slots are its arguments, which each run binds.
        instructions: in program order.
        results: (slot, result number) pairs.
        numbers: (slot, number) pairs: slots that hold the same number in each run, int64[].
    """

    slice_index: SliceIndex
    functions: tuple[Function, ...]
    slots: tuple[Value, ...]
    num_args: int
    instructions: tuple[Instruction | LoopInstruction, ...]
    results: tuple[tuple[Slot, int], ...]
    numbers: tuple[tuple[Slot, int], ...] = ()

    def __str__(self) -> str:
        return "\n".join(_lines(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatPart(SlicePart):
    """A part without loops; see `unrolled` (loops.py)."""

    instructions: tuple[Instruction, ...]


#: Stands among the buffer ids of a run's arguments for a value.
NO_BUFFER = BufferId(0)

V = TypeVar("V")


class Arguments(NamedTuple, Generic[V]):
    """What one run binds a part's arguments to: named buffers, and values that come with the run.

    They are columns, as on the wire, and not an object per argument: a run may have thousands of arguments, most of
    them buffers, and its dispatch takes tens of microseconds.

    Attributes:
        buffer_ids: one per argument; NO_BUFFER if the argument is a value.
        values: the values of the arguments that are no buffers, in order.
    """

    buffer_ids: Sequence[BufferId]
    values: Sequence[V] = ()


def reads(instruction: Instruction | LoopInstruction) -> tuple[Slot, ...]:
    """Returns the slots that an instruction reads."""
    match instruction:
        case ComputeInstruction():
            return instruction.inputs
        case SendInstruction():
            return (instruction.slot,)
        case AllReduceInstruction():
            return (instruction.input,)
        case ReceiveInstruction():
            return ()
        case LoopInstruction():
            return tuple(dict.fromkeys(slot for body in instruction.bodies for slot in body.inputs))


def writes(instruction: Instruction | LoopInstruction) -> tuple[Slot, ...]:
    """Returns the slots that an instruction fills."""
    match instruction:
        case ComputeInstruction():
            return instruction.outputs
        case ReceiveInstruction():
            return (instruction.slot,)
        case AllReduceInstruction():
            return (instruction.output,)
        case SendInstruction():
            return ()
        case LoopInstruction():
            return instruction.outputs


def donated_slots(instruction: Instruction | LoopInstruction) -> tuple[Slot, ...]:
    """Returns the slots whose buffers an instruction may reuse; nothing reads them afterwards."""
    if isinstance(instruction, ComputeInstruction):
        return tuple(instruction.inputs[position] for position in instruction.donated)
    if isinstance(instruction, LoopInstruction):
        return tuple(instruction.bodies[0].inputs[position] for position in instruction.donated)
    return ()


def peers(instruction: Instruction | LoopInstruction) -> tuple[SliceIndex, ...]:
    """Returns the slices that an instruction exchanges values with; of a sum, all members."""
    match instruction:
        case SendInstruction() | ReceiveInstruction():
            return (instruction.peer,)
        case AllReduceInstruction():
            return instruction.members
        case ComputeInstruction():
            return ()
        case LoopInstruction():
            inner = (item.instruction for body in instruction.bodies for item in body.instructions)
            return tuple(dict.fromkeys(peer for item in inner for peer in peers(item)))


def freed_slots(part: SlicePart) -> list[tuple[Slot, ...]]:
    """Returns, for each instruction, the slots that are no longer needed after it.

    Arguments and results are kept, and a donated buffer belongs to the computation that reuses it.
    """
    kept = {*range(part.num_args), *(slot for slot, _ in part.results)}
    last: dict[Slot, int] = {}
    for position, instruction in enumerate(part.instructions):
        last.update((slot, position) for slot in (*reads(instruction), *writes(instruction)))
        kept.update(donated_slots(instruction))
    freed: list[list[Slot]] = [[] for _ in part.instructions]
    for slot, position in last.items():
        if slot not in kept:
            freed[position].append(slot)
    return [tuple(sorted(slots)) for slots in freed]


def _lines(part: SlicePart) -> Iterator[str]:
    yield f"part of slice @{part.slice_index}"
    for slot, value in enumerate(part.slots):
        yield f"  ${slot}: {value}" + (" arg" if slot < part.num_args else "")
    for slot, number in part.numbers:
        yield f"  ${slot} = {number}"
    for instruction, freed in zip(part.instructions, freed_slots(part), strict=True):
        yield f"  {_instruction_text(part, instruction)}"
        if isinstance(instruction, LoopInstruction):
            yield from _loop_lines(part, instruction)
        if freed:
            yield f"  free {_slots_text(freed)}"
    yield f"  results {', '.join(f'${slot} as {number}' for slot, number in part.results)}"


def _instruction_text(part: SlicePart, instruction: Instruction | LoopInstruction) -> str:
    match instruction:
        case ComputeInstruction():
            donated = donated_slots(instruction)
            donating = f" donating {_slots_text(donated)}" if donated else ""
            name = part.functions[instruction.function_index].name
            return f"{_slots_text(instruction.outputs)} = {name}({_slots_text(instruction.inputs)}){donating}"
        case SendInstruction():
            return f"send ${instruction.slot} to @{instruction.peer} over edge {instruction.edge_id}"
        case ReceiveInstruction():
            return f"${instruction.slot} = receive from @{instruction.peer} over edge {instruction.edge_id}"
        case AllReduceInstruction():
            members = ", ".join(f"@{member}" for member in instruction.members)
            return f"${instruction.output} = sum of ${instruction.input} over {members}, edge {instruction.edge_id}"

        case LoopInstruction():
            return f"{_slots_text(instruction.outputs)} = loop of {instruction.num_turns} turns"


def _loop_lines(part: SlicePart, loop: LoopInstruction) -> Iterator[str]:
    for repeat in loop.order:
        times = f" {repeat.times} times, each {repeat.step:+d}" if repeat.times > 1 else ""
        yield f"    do {' '.join(map(str, repeat.actions))}{times}"
    for number, body in enumerate(loop.bodies):
        yield f"    {'body' if number == 0 else 'body of the last turn'}"
        for slot, value in enumerate(body.slots):
            note = f" is ${body.inputs[slot]}" if slot < len(body.inputs) else ""
            yield f"      ${slot}: {value}{note}" + (" the turn's number" if slot in body.number_slots else "")
        for item in body.instructions:
            yield f"      {item.stage}{item.kind}: {_instruction_text(part, item.instruction)}"
        for read, made in body.carried:
            yield f"      ${made} is ${read} of the next turn"


def _slots_text(slots: Sequence[Slot]) -> str:
    return ", ".join(f"${slot}" for slot in slots)
