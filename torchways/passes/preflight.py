"""Proves two things of a lowered program before it is sent: it can run to its end, and it fits into memory.

Both follow the schedule that executors keep to: each slice carries out its instructions in program order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass

from torchways.errors import InternalError, ResourceExhausted
from torchways.ir.memory import InstructionStep, footprints
from torchways.ir.part import (
    AllReduceInstruction,
    ComputeInstruction,
    FlatPart,
    ReceiveInstruction,
    SendInstruction,
)
from torchways.ir.program import SliceSpec, Value
from torchways.ir.sizes import device_bytes
from torchways.mesh import mesh_text

_EdgeEnd = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The most that a slice's part of a program holds at a time.

    Attributes:
        nbytes: bytes per device.
        function: the compiled function that runs at that time; "" if the arguments alone are the most.
        source: its line.
        largest: the largest value held at that time.
        largest_nbytes: its bytes per device.
    """

    nbytes: int
    function: str
    source: str
    largest: Value
    largest_nbytes: int


def check_order(parts: Sequence[FlatPart]) -> None:
    """Proves that every transfer and sum has its two ends, and that no instructions wait for each other in a circle.

    Raises:
        InternalError: it is not so; the message names the instruction of each slice that would wait for ever.
    """
    position = {part.slice_index: 0 for part in parts}
    sent: set[_EdgeEnd] = set()
    summing: dict[int, set[int]] = {}
    moved = True
    while moved:
        moved = False
        for part in parts:
            while position[part.slice_index] < len(part.instructions):
                match part.instructions[position[part.slice_index]]:
                    case SendInstruction() as send:
                        sent.add((send.edge_id, send.peer))
                    case ReceiveInstruction() as receive:
                        if (receive.edge_id, part.slice_index) not in sent:
                            break
                        sent.discard((receive.edge_id, part.slice_index))
                    case AllReduceInstruction() as reduce:
                        arrived = summing.setdefault(reduce.edge_id, set())
                        moved = moved or part.slice_index not in arrived
                        arrived.add(part.slice_index)
                        if arrived != set(reduce.members):
                            break
                position[part.slice_index] += 1
                moved = True
    stuck = [
        f"slice {part.slice_index} at instruction {index}: {part.instructions[index]}"
        for part in parts
        if (index := position[part.slice_index]) < len(part.instructions)
    ]
    if stuck or sent:
        unread = [f"edge {edge} to slice {peer} is never received" for edge, peer in sorted(sent)]
        raise InternalError("a program can never end: " + "; ".join([*stuck, *unread]))


def peak_memory(part: FlatPart, spec: SliceSpec) -> Peak:
    """Returns the most that a part holds at a time, not counting what XLA needs inside a computation."""
    sizes = _sizes(part, spec)
    most, at, live = -1, 0, list(range(part.num_args))
    for index, (nbytes, slots) in enumerate(_footprints(part, sizes)):
        if nbytes > most:
            most, at, live = nbytes, index, list(slots)
    function = source = ""
    if at > 0:  # the first footprint is that of the arguments alone
        match part.instructions[at - 1]:
            case ComputeInstruction() as compute:
                called = part.functions[compute.function_index]
                function, source = called.name, called.source
            case _:
                function = "a transfer"
    largest = max(live or range(len(part.slots)), key=lambda slot: sizes[slot])
    return Peak(
        nbytes=most, function=function, source=source, largest=part.slots[largest], largest_nbytes=sizes[largest]
    )


def _sizes(part: FlatPart, spec: SliceSpec) -> list[int]:
    return [device_bytes(value.dtype, value.shape, value.placements, spec.shape) for value in part.slots]


def _footprints(part: FlatPart, sizes: Sequence[int]) -> Iterator[tuple[int, KeysView[int]]]:
    args = range(part.num_args)
    steps = [InstructionStep.of(instruction, sizes) for instruction in part.instructions]
    return footprints(steps, sizes, held=args, kept={*args, *(slot for slot, _ in part.results)})


def check_memory(
    name: str,
    parts: Sequence[FlatPart],
    slices: Sequence[SliceSpec],
    budgets: Mapping[int, int],
    executors: Mapping[int, str] | None = None,
) -> None:
    """Refuses a program that cannot fit into memory.

    Args:
        name: the program's name.
        parts: the program's parts.
        slices: the program's slices.
        budgets: bytes per device of each slice, by slice index; a slice without an entry has no limit.
        executors: the executor that has each slice's devices, by slice index: slices of the same devices must fit
            together.

    Raises:
        ResourceExhausted: the message names the function at whose call the most is held, and the smallest fix.
    """
    peaks = {part.slice_index: peak_memory(part, slices[part.slice_index]) for part in parts if part.slots}
    nbytes = {index: peak.nbytes for index, peak in peaks.items()}
    for index, budget in budgets_beside(nbytes, budgets, executors).items():
        peak, spec = peaks[index], slices[index]
        others = [other for other in peaks if other != index and executors and executors[other] == executors[index]]
        if peak.nbytes > budget:
            what = f"at {peak.function}" + (f" ({peak.source})" if peak.source else "") if peak.function else "at once"
            beside = " beside what its other slices of these devices need" if others else ""
            raise ResourceExhausted(
                f"{name} needs {peak.nbytes:,} bytes on each device of slice {mesh_text(spec.shape, spec.axis_names)} "
                f"{what}, but a device's budget is {budget:,}{beside}; {_fix(peak, spec, max(1, budget))}"
            )


def budgets_beside(
    peaks: Mapping[int, int], budgets: Mapping[int, int], executors: Mapping[int, str] | None = None
) -> dict[int, int]:
    """Returns what each slice that has a limit may hold beside the other slices of its devices, bytes per device.

    Args:
        peaks: the most that each slice holds, bytes per device.
        budgets, executors: see `check_memory`.
    """
    return {
        index: budgets[index]
        - sum(
            peak
            for other, peak in peaks.items()
            if other != index and executors and executors[other] == executors[index]
        )
        for index in peaks
        if budgets.get(index, 0)
    }


def loop_peaks(part: FlatPart, spec: SliceSpec) -> dict[int, int]:
    """Returns the most that a part holds while each of its loops runs, by the loop's number, bytes per device."""
    found: dict[int, int] = {}
    held = _footprints(part, _sizes(part, spec))
    next(held)  # before the first instruction
    for instruction, (nbytes, _) in zip(part.instructions, held, strict=True):
        if isinstance(instruction, ComputeInstruction) and instruction.part_of is not None:
            number = instruction.part_of.loop
            found[number] = max(nbytes, found.get(number, 0))
    return found


def _fix(peak: Peak, spec: SliceSpec, budget: int) -> str:
    """Returns the smallest change that would make it fit: shard the largest value, or take more devices."""
    largest = f"the largest value is {peak.largest} with {peak.largest_nbytes:,} bytes"
    for axis, (placement, size) in enumerate(zip(peak.largest.placements, spec.shape, strict=True)):
        saved = peak.largest_nbytes - peak.largest_nbytes // size
        if placement == "R" and size > 1 and peak.nbytes - saved <= budget:
            for dim, length in enumerate(peak.largest.shape):
                if length % size == 0 and f"S({dim})" not in peak.largest.placements:
                    return f"{largest}: shard it, Shard({dim}) on axis {spec.axis_names[axis]!r} would do"
    needed = -(-peak.nbytes * math.prod(spec.shape) // budget)
    return f"{largest}: a slice of {needed} devices, all of it sharded, would do"
