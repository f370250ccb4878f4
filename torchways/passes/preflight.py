"""What is proved of a lowered program before it is sent: it can run to its end, and it fits.

Both follow the schedule that executors keep to: each slice carries out its steps in program order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchways.errors import InternalError, ResourceExhausted
from torchways.ir.program import SliceSpec, Value
from torchways.mesh import mesh_text, shard_shape
from torchways.passes.split import AllReduceStep, ComputeStep, FreeStep, ReceiveStep, SendStep, SlicePart

_EdgeEnd = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The most that a slice's part of a program holds at a time.

    Attributes:
        nbytes: bytes a device.
        function: the compiled function that runs then; "" where arguments alone are the most.
        source: its line.
        largest: the largest value that is there then.
        largest_nbytes: its bytes a device.
    """

    nbytes: int
    function: str
    source: str
    largest: Value
    largest_nbytes: int


def check_order(parts: Sequence[SlicePart]) -> None:
    """Proves that every transfer and sum has its two ends, and that no steps wait for each other in a circle.

    Raises:
        InternalError: they do; the message says which step of each slice would wait for ever.
    """
    position = {part.slice_index: 0 for part in parts}
    sent: set[_EdgeEnd] = set()
    summing: dict[int, set[int]] = {}
    moved = True
    while moved:
        moved = False
        for part in parts:
            while position[part.slice_index] < len(part.steps):
                step = part.steps[position[part.slice_index]]
                if isinstance(step, SendStep):
                    sent.add((step.edge_id, step.peer))
                elif isinstance(step, ReceiveStep):
                    if (step.edge_id, part.slice_index) not in sent:
                        break
                    sent.discard((step.edge_id, part.slice_index))
                elif isinstance(step, AllReduceStep):
                    arrived = summing.setdefault(step.edge_id, set())
                    moved = moved or part.slice_index not in arrived
                    arrived.add(part.slice_index)
                    if arrived != set(step.members):
                        break
                position[part.slice_index] += 1
                moved = True
    stuck = [
        f"slice {part.slice_index} at step {position[part.slice_index]}: {part.steps[position[part.slice_index]]}"
        for part in parts
        if position[part.slice_index] < len(part.steps)
    ]
    if stuck or sent:
        unread = [f"edge {edge} to slice {peer} is never received" for edge, peer in sorted(sent)]
        raise InternalError("a program can never end: " + "; ".join([*stuck, *unread]))


def value_bytes(value: Value, spec: SliceSpec) -> int:
    """Returns what a value takes on each device of its slice, bytes."""
    return math.prod(shard_shape(value.shape, value.placements, spec.shape)) * value.item_bytes


def peak_memory(part: SlicePart, spec: SliceSpec) -> Peak:
    """Returns the most that a part holds at a time, what XLA needs inside a computation not counted."""
    sizes = [value_bytes(value, spec) for value in part.slots]
    live = dict.fromkeys(range(len(part.args)))
    held = sum(sizes[slot] for slot in live)
    peak, function, source, at_peak = held, "", "", list(live) or list(range(len(part.slots)))
    for step in part.steps:
        match step:
            case ComputeStep():
                live.update(dict.fromkeys(step.outputs))
                reused = {step.inputs[index] for index in step.donated}
                held += sum(sizes[slot] for slot in step.outputs)
                now = held - sum(sizes[slot] for slot in reused)
                if now > peak:
                    called = part.functions[step.function_index]
                    peak, function, source, at_peak = now, called.name, called.source, list(live)
                for slot in reused:
                    del live[slot]
                held = now
            case ReceiveStep():
                live[step.slot] = None
                held += sizes[step.slot]
            case AllReduceStep():
                live[step.output] = None
                held += sizes[step.output]
            case FreeStep():
                for slot in step.slots:
                    if slot in live:
                        del live[slot]
                        held -= sizes[slot]
        if held > peak:
            peak, function, source, at_peak = held, "a transfer", "", list(live)
    largest = max(at_peak, key=lambda slot: sizes[slot])
    return Peak(
        nbytes=peak,
        function=function,
        source=source,
        largest=part.slots[largest],
        largest_nbytes=sizes[largest],
    )


def check_memory(
    name: str,
    parts: Sequence[SlicePart],
    slices: Sequence[SliceSpec],
    budgets: Mapping[int, int],
    executors: Mapping[int, str] | None = None,
) -> None:
    """Refuses a program that cannot fit.

    Args:
        name: the program's.
        parts: what each slice does.
        slices: the program's slices.
        budgets: bytes a device of each slice, by slice index; a slice without one has no limit.
        executors: who has each slice's devices, by slice index: slices of the same devices must fit together.

    Raises:
        ResourceExhausted: the message names the function at whose call the most is held, and the smallest fix.
    """
    peaks = {part.slice_index: peak_memory(part, slices[part.slice_index]) for part in parts if part.slots}
    for index, peak in peaks.items():
        others = [other for other in peaks if other != index and executors and executors[other] == executors[index]]
        budget = budgets.get(index, 0)
        if not budget:
            continue
        budget -= sum(peaks[other].nbytes for other in others)
        spec = slices[index]
        if peak.nbytes > budget:
            what = f"at {peak.function}" + (f" ({peak.source})" if peak.source else "") if peak.function else "at once"
            beside = " beside what its other slices of these devices need" if others else ""
            raise ResourceExhausted(
                f"{name} needs {peak.nbytes:,} bytes on each device of slice {mesh_text(spec.shape, spec.axis_names)} "
                f"{what}, but a device's budget is {budget:,}{beside}; {_fix(peak, spec, max(1, budget))}"
            )


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
