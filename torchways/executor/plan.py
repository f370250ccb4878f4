"""From a program's instructions to what the executor's core issues: its units.

Computations that stand next to each other and wait for the same transfers form one unit: it is issued whole, and what
flows only inside it needs no bookkeeping. Sends, receives and reductions are units of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torchways.ids import PartId


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeInstruction:
    """Run a compiled function: slots in, slots out; `donated` are positions in `inputs`."""

    function_index: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    donated: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SendInstruction:
    """Send a slot to peers: those hosts of the other slice that get it from this one."""

    slot: int
    edge_id: int
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveInstruction:
    """Fill a slot with what a peer sends."""

    slot: int
    edge_id: int
    peer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceInstruction:
    """Fill `output` with the sum of `input` over all members.

    If this executor is none of them, the one that is named gives it the sum; `followers` get it from this one. Of the
    slices that take part, `num_local` are this executor's.
    """

    input: int
    output: int
    edge_id: int
    members: tuple[str, ...]
    followers: tuple[str, ...] = ()
    num_local: int = 1


Instruction: TypeAlias = ComputeInstruction | SendInstruction | ReceiveInstruction | AllReduceInstruction


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is issued at once.

    Attributes:
        position: of its first instruction; an earlier unit has priority.
        instructions: computations, or one instruction of another kind.
        reads, writes: slots that it shares with other units, arguments or results, each once.
        donated: those of `reads` whose buffers it may reuse.
        need_bytes: device memory that it allocates, a device.
    """

    position: int
    instructions: tuple[Instruction, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    donated: tuple[int, ...] = ()
    need_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedProgram:
    """A program's part on a slice of this executor's devices.

    Attributes:
        part: which program's, on which slice.
        name: the program's.
        num_args: the first slots, bound by each run.
        slot_bytes: size of every slot's value, bytes a device.
        units: in program order.
        read_counts: (slot, number of units that read it).
        results: (slot, result number) pairs.
        slot_forms: dtype and shape of every slot's value, as text; what an argument's buffer must have. May be empty.
        peak_bytes: the most that its units, in order, have allocated at a time, a device; arguments are not counted,
            and less where they are donated.
        donated_bytes: the most that its arguments are so less, a device.
    """

    part: PartId
    name: str
    num_args: int
    slot_bytes: tuple[int, ...]
    units: tuple[Unit, ...]
    read_counts: tuple[tuple[int, int], ...]
    results: tuple[tuple[int, int], ...]
    slot_forms: tuple[str, ...] = ()
    peak_bytes: int = 0
    donated_bytes: int = 0


def load_program(
    part: PartId,
    name: str,
    num_args: int,
    slot_bytes: Sequence[int],
    instructions: Sequence[Instruction],
    results: Sequence[tuple[int, int]],
    slot_forms: Sequence[str] = (),
    *,
    limit_bytes: int = 0,
) -> LoadedProgram:
    """Returns a program's part as units.

    Args:
        limit_bytes: what its arguments and all that it allocates may take, bytes a device; 0: no limit. In a unit of
            several computations, what only it shares with others is freed at its end; where that would be too much,
            each computation is a unit, and memory is as pre-flight counts it.
    """
    kept = {slot for slot, _ in results}
    units = _units(instructions, kept, slot_bytes, True)
    peak_bytes = _peak_bytes(units, num_args, slot_bytes, kept)
    if limit_bytes and sum(slot_bytes[:num_args]) + peak_bytes > limit_bytes:
        units = _units(instructions, kept, slot_bytes, False)
        peak_bytes = _peak_bytes(units, num_args, slot_bytes, kept)
    counts = Counter(slot for unit in units for slot in unit.reads)
    return LoadedProgram(
        part=part,
        name=name,
        num_args=num_args,
        slot_bytes=tuple(slot_bytes),
        units=tuple(units),
        read_counts=tuple(sorted(counts.items())),
        results=tuple(results),
        slot_forms=tuple(slot_forms),
        peak_bytes=peak_bytes,
        donated_bytes=sum(slot_bytes[slot] for unit in units for slot in unit.donated if slot < num_args),
    )


def instruction_reads(instruction: Instruction) -> tuple[int, ...]:
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


def instruction_writes(instruction: Instruction) -> tuple[int, ...]:
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


def _units(
    instructions: Sequence[Instruction], results: set[int], slot_bytes: Sequence[int], grouped: bool
) -> list[Unit]:
    groups = _groups(instructions) if grouped else [(position, [item]) for position, item in enumerate(instructions)]
    readers: dict[int, set[int]] = {}
    for number, (_, group) in enumerate(groups):
        for instruction in group:
            for slot in instruction_reads(instruction):
                readers.setdefault(slot, set()).add(number)
    return [
        _unit(position, group, {slot for slot, numbers in readers.items() if numbers - {number}} | results, slot_bytes)
        for number, (position, group) in enumerate(groups)
    ]


def _groups(instructions: Sequence[Instruction]) -> list[tuple[int, list[Instruction]]]:
    """Returns (position of the first, instructions) of each unit."""
    groups: list[tuple[int, list[Instruction]]] = []
    #: What each slot waits for: a bit for every receive or reduction.
    waits: dict[int, int] = {}
    open_waits: int | None = None
    for position, instruction in enumerate(instructions):
        waited = 0
        for slot in instruction_reads(instruction):
            waited |= waits.get(slot, 0)
        if not isinstance(instruction, ComputeInstruction):
            if not isinstance(instruction, SendInstruction):
                waited |= 1 << position
                open_waits = open_waits if isinstance(instruction, ReceiveInstruction) else None
            else:
                open_waits = None  # what is sent must not wait for computations that follow
            groups.append((position, [instruction]))
        elif open_waits == waited and isinstance(groups[-1][1][-1], ComputeInstruction):
            groups[-1][1].append(instruction)
        else:
            groups.append((position, [instruction]))
            open_waits = waited
        for slot in instruction_writes(instruction):
            waits[slot] = waited
    return groups


def _unit(position: int, group: list[Instruction], shared: set[int], slot_bytes: Sequence[int]) -> Unit:
    made: set[int] = set()
    reads: dict[int, None] = {}
    donated: dict[int, None] = {}
    for instruction in group:
        inputs = instruction_reads(instruction)
        reads.update((slot, None) for slot in inputs if slot not in made)
        if isinstance(instruction, ComputeInstruction):
            donated.update((inputs[index], None) for index in instruction.donated if inputs[index] not in made)
        made.update(instruction_writes(instruction))
    writes = tuple(sorted(made & shared))
    return Unit(
        position=position,
        instructions=tuple(group),
        reads=tuple(reads),
        writes=writes,
        donated=tuple(donated),
        need_bytes=_need_bytes(group, set(writes), slot_bytes),
    )


def _need_bytes(group: list[Instruction], kept: set[int], slot_bytes: Sequence[int]) -> int:
    """Returns the most that a group has allocated at a time; what only it reads is freed on the way, or donated."""
    last = {slot: index for index, item in enumerate(group) for slot in instruction_reads(item)}
    held, peak = 0, 0
    made: set[int] = set()
    for index, instruction in enumerate(group):
        reused: set[int] = set()
        if isinstance(instruction, ComputeInstruction):
            reused = {instruction.inputs[position] for position in instruction.donated} & made
        held -= sum(slot_bytes[slot] for slot in reused)
        made -= reused
        held += sum(slot_bytes[slot] for slot in instruction_writes(instruction))
        peak = max(peak, held)
        made.update(instruction_writes(instruction))
        for slot in {*instruction_reads(instruction), *instruction_writes(instruction)}:
            if slot in made and slot not in kept and last.get(slot, index) == index:
                held -= slot_bytes[slot]
    return peak


def _peak_bytes(units: Sequence[Unit], num_args: int, slot_bytes: Sequence[int], results: set[int]) -> int:
    last = {slot: number for number, unit in enumerate(units) for slot in (*unit.reads, *unit.writes)}
    kept = results | set(range(num_args))
    held = peak = 0
    for number, unit in enumerate(units):
        held -= sum(slot_bytes[slot] for slot in unit.donated)
        if isinstance(unit.instructions[0], ComputeInstruction):
            peak = max(peak, held + unit.need_bytes)
        held += sum(slot_bytes[slot] for slot in unit.writes)
        peak = max(peak, held)
        ended = {slot for slot in (*unit.reads, *unit.writes) if last[slot] == number}
        held -= sum(slot_bytes[slot] for slot in ended - kept - set(unit.donated))
    return peak
