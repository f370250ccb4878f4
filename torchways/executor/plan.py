"""Plans a program's part: groups its instructions into the units that the executor's core issues.

Computations that stand next to each other and wait for the same transfers form one unit. It is issued as a whole, and
values that flow only inside it need no bookkeeping. Sends, receives and sums are units of their own, and so is each
action of a pipeline's schedule: what it takes is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torchways.executor.routes import Routes
from torchways.ids import PartId
from torchways.ir.memory import InstructionStep, peak_bytes
from torchways.ir.part import (
    ComputeInstruction,
    Instruction,
    ReceiveInstruction,
    SendInstruction,
    Slot,
    donated_slots,
    reads,
    writes,
)

#: A pipeline of 2,000 transfers and 25,000 computations has a hundredth of it, 512 MB.
_MAX_WAIT_BITS = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Instructions that are issued together.

    Attributes:
        position: of its first instruction; an earlier unit has priority.
        instructions: computations, or one instruction of another kind.
        reads, writes: the slots that it shares with other units, and arguments and results; each once.
        donated: those of `reads` whose buffers it may reuse.
        need_bytes: device memory that it allocates, bytes per device.
    """

    position: int
    instructions: tuple[Instruction, ...]
    reads: tuple[Slot, ...]
    writes: tuple[Slot, ...]
    donated: tuple[Slot, ...] = ()
    need_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedProgram:
    """A program's part on a slice of this executor's devices.

    Attributes:
        part: the program, and the slice.
        name: the program's name.
        num_args: the first so many slots are bound by each run.
        slot_bytes: size of every slot's value, bytes per device.
        units: in program order.
        read_counts: (slot, number of units that read it).
        results: (slot, result number) pairs.
        numbers: (slot, number) pairs: values that are the same in each run, and are kept as long as the program.
        slot_forms: dtype and shape of every slot's value, as text, which an argument's buffer must have. May be empty.
        routes: the executors at the other ends of its edges.
        peak_bytes: the most that its units, run in order, have allocated at a time, bytes per device. Arguments are not
            counted; where they are donated, their memory is subtracted.
        donated_args: the arguments that are donated.
        donated_bytes: the most that is so subtracted, bytes per device.
    """

    part: PartId
    name: str
    num_args: int
    slot_bytes: tuple[int, ...]
    units: tuple[Unit, ...]
    read_counts: tuple[tuple[Slot, int], ...]
    results: tuple[tuple[Slot, int], ...]
    numbers: tuple[tuple[Slot, int], ...] = ()
    slot_forms: tuple[str, ...] = ()
    routes: Routes = field(default_factory=Routes)
    peak_bytes: int = 0
    donated_args: tuple[Slot, ...] = ()
    donated_bytes: int = 0


def load_program(
    part: PartId,
    name: str,
    num_args: int,
    slot_bytes: Sequence[int],
    instructions: Sequence[Instruction],
    results: Sequence[tuple[Slot, int]],
    slot_forms: Sequence[str] = (),
    *,
    numbers: Sequence[tuple[Slot, int]] = (),
    routes: Routes | None = None,
    limit_bytes: int = 0,
) -> LoadedProgram:
    """Returns a program's part as units.

    Args:
        part, name, num_args, slot_bytes, results, slot_forms, numbers, routes: see `LoadedProgram`.
        instructions: in program order.
        limit_bytes: the most that the arguments and all that the part allocates may take, bytes per device; 0 means no
            limit. A unit of several computations frees the values that it shares with other units only at its end. If
            that takes more than the limit, each computation becomes a unit, and memory is as pre-flight counts it.
    """
    args = range(num_args)
    kept = {slot for slot, _ in results}
    arg_bytes = sum(slot_bytes[:num_args])
    units = _units(_groups(instructions), kept, slot_bytes)
    peak = peak_bytes(units, slot_bytes, held=args, kept={*args, *kept})
    if limit_bytes and peak > limit_bytes:
        units = _units([(position, [item]) for position, item in enumerate(instructions)], kept, slot_bytes)
        peak = peak_bytes(units, slot_bytes, held=args, kept={*args, *kept})
    counts = Counter(slot for unit in units for slot in unit.reads)
    donated_args = tuple(slot for unit in units for slot in unit.donated if slot < num_args)
    return LoadedProgram(
        part=part,
        name=name,
        num_args=num_args,
        slot_bytes=tuple(slot_bytes),
        units=tuple(units),
        read_counts=tuple(sorted(counts.items())),
        results=tuple(results),
        numbers=tuple(numbers),
        slot_forms=tuple(slot_forms),
        routes=routes or Routes(),
        peak_bytes=peak - arg_bytes,
        donated_args=donated_args,
        donated_bytes=sum(slot_bytes[slot] for slot in donated_args),
    )


def _units(
    groups: Sequence[tuple[int, list[Instruction]]], results: set[Slot], slot_bytes: Sequence[int]
) -> list[Unit]:
    readers: dict[Slot, set[int]] = {}
    for number, (_, group) in enumerate(groups):
        for instruction in group:
            for slot in reads(instruction):
                readers.setdefault(slot, set()).add(number)
    units = []
    for number, (position, group) in enumerate(groups):
        made = {slot for instruction in group for slot in writes(instruction)}
        shared = {slot for slot in made if slot in results or readers.get(slot, set()) - {number}}
        units.append(_unit(position, group, shared, slot_bytes))
    return units


def _groups(instructions: Sequence[Instruction]) -> list[tuple[int, list[Instruction]]]:
    """Returns (position of the first, instructions) of each unit.

    Raises:
        ValueError: so many values wait for so many transfers that to note it would take too much memory.
    """
    groups: list[tuple[int, list[Instruction]]] = []
    #: What each slot waits for: a bit for every receive or reduction.
    waits: dict[int, int] = {}
    open_waits: int | None = None
    num_waits = num_bits = 0
    for position, instruction in enumerate(instructions):
        waited = 0
        for slot in reads(instruction):
            waited |= waits.get(slot, 0)
        num_bits += waited.bit_length()
        if num_bits > _MAX_WAIT_BITS:
            raise ValueError(f"it has too many transfers that other instructions wait for ({num_waits:,} and more)")
        if not isinstance(instruction, ComputeInstruction):
            if not isinstance(instruction, SendInstruction):
                waited |= 1 << num_waits
                num_waits += 1
                open_waits = open_waits if isinstance(instruction, ReceiveInstruction) else None
            else:
                open_waits = None  # what is sent must not wait for computations that follow
            groups.append((position, [instruction]))
        elif open_waits == waited and _are_together(groups[-1][1][-1], instruction):
            groups[-1][1].append(instruction)
        else:
            groups.append((position, [instruction]))
            open_waits = waited
        for slot in writes(instruction):
            waits[slot] = waited
    return groups


def _are_together(before: Instruction, instruction: ComputeInstruction) -> bool:
    return isinstance(before, ComputeInstruction) and before.part_of == instruction.part_of


def _unit(position: int, group: list[Instruction], shared: set[Slot], slot_bytes: Sequence[int]) -> Unit:
    """Returns a group of instructions as a unit; `shared`: what it writes for others."""
    made: set[Slot] = set()
    outer_reads: dict[Slot, None] = {}
    outer_donated: dict[Slot, None] = {}
    for instruction in group:
        outer_reads.update((slot, None) for slot in reads(instruction) if slot not in made)
        outer_donated.update((slot, None) for slot in donated_slots(instruction) if slot not in made)
        made.update(writes(instruction))
    outer_writes = tuple(sorted(made & shared))
    steps = [InstructionStep.of(instruction, slot_bytes) for instruction in group]
    need_bytes = peak_bytes(steps, slot_bytes, held=(), kept=outer_writes)
    if not outer_writes and not isinstance(group[0], ComputeInstruction):
        need_bytes = 0  # nobody reads what it receives, so that is not put on the devices
    return Unit(
        position=position,
        instructions=tuple(group),
        reads=tuple(outer_reads),
        writes=outer_writes,
        donated=tuple(outer_donated),
        need_bytes=need_bytes,
    )
