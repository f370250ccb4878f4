"""Schedules that fit: of those that a search finds, the best with which the program can run, in the memory there is.

A search (torchways/schedules/) knows stages and microbatches. Whether turns read what others hand on, and what a slice
holds beside activations, the lowered program says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torchways.controller.session import Session
from torchways.controller.variant import Captured, budgets_of
from torchways.errors import ConfigError
from torchways.ir.loops import unrolled
from torchways.ir.program import Loop
from torchways.ir.stages import held_bytes, row_of_stage, schedule_of, slice_of_stage
from torchways.mesh import VirtualSlice
from torchways.passes.lower import LoweredProgram, lower
from torchways.passes.preflight import budgets_beside, loop_peaks, peak_memory
from torchways.schedules import UNIT_COSTS, Costs, Found, Schedule, dry_run, find_schedules, held_limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A program by other schedules, and how that of the loop in question was found."""

    captured: Captured
    found: Found


def automatic_loops(captured: Captured) -> list[Loop]:
    """Returns the loops of a program whose schedules are searched for."""
    return [node for node in captured.program.nodes if isinstance(node, Loop) and node.is_automatic]


def fitted(captured: Captured, meshes: list[VirtualSlice], session: Session) -> Captured:
    """Returns a program whose automatic schedules fit, for actions that all take the same time.

    It is the given one if there are none. If no schedule fits, too; registering it raises why.
    """
    loops = automatic_loops(captured)
    if not loops or _lowered(captured, meshes, session) is not None:
        return captured
    chosen: dict[int, Schedule] = {}
    for loop in loops:
        found = choose(captured, loop.number, UNIT_COSTS, chosen, meshes, session, apart=True)
        if found is not None:
            captured = found.captured
            chosen[loop.number] = found.found.schedule
    return captured


def choose(
    captured: Captured,
    number: int,
    costs: Costs,
    others: Mapping[int, Schedule],
    meshes: list[VirtualSlice],
    session: Session,
    *,
    apart: bool = False,
) -> Chosen | None:
    """Returns the program by the best schedule for a loop that fits; None: none does.

    Args:
        captured: the program as it is now.
        number: the loop's.
        costs: what its actions take.
        others: the schedules of other automatic loops that are to stay.
        meshes, session: where the program runs.
        apart: whether to take only schedules that have input and weight gradients apart.
    """
    assert captured.reschedule is not None
    [loop] = [loop for loop in automatic_loops(captured) if loop.number == number]
    places, now = row_of_stage(loop), schedule_of(loop)
    also = [Schedule(f"{now.name}, of equal times", now.rows)] if now.has_backward and not apart else []
    fewest = [places.count(row) for row in range(max(places) + 1)]
    limits = [max(pair) for pair in zip(_limits(captured, loop, meshes, session), fewest, strict=True)]
    seen: set[Schedule] = set()
    while True:
        for found in find_schedules(places, loop.num_turns, costs, limits, apart=apart, also=also):
            if found.schedule in seen:
                continue
            seen.add(found.schedule)
            candidate = captured.reschedule({**others, number: found.schedule})
            if _lowered(candidate, meshes, session) is not None:
                return Chosen(captured=candidate, found=found if now.has_backward else _forward(found, costs))
        if limits == fewest:
            return None
        limits = [few + (limit - few) // 2 for few, limit in zip(fewest, limits, strict=True)]


def _forward(found: Found, costs: Costs) -> Found:
    schedule = found.schedule.forward()
    return replace(found, schedule=schedule, timeline=dry_run(schedule, costs))


def _lowered(captured: Captured, meshes: list[VirtualSlice], session: Session) -> LoweredProgram | None:
    """Returns a program after all passes, if it can run and fits into memory."""
    try:
        lowered = lower(captured.program)
    except ConfigError:  # turns hand on what they would read before it is made
        return None
    budgets, executors = budgets_of(meshes, session)
    if any(budgets.values()):
        slices = lowered.program.slices
        parts = [unrolled(part) for part in lowered.parts if part.slots]
        peaks = {part.slice_index: peak_memory(part, slices[part.slice_index]).nbytes for part in parts}
        if any(peaks[index] > budget for index, budget in budgets_beside(peaks, budgets, executors).items()):
            return None
    return lowered


def _limits(captured: Captured, loop: Loop, meshes: list[VirtualSlice], session: Session) -> list[int]:
    """Returns how many microbatches' activations each slice of a loop may hold; an estimate, where there is a limit.

    What a slice holds beside them is what it has now at its peak within the loop, less the activations that it then
    has.
    """
    places = row_of_stage(loop)
    most, num_rows = len(places) * loop.num_turns, max(places) + 1
    budgets, executors = budgets_of(meshes, session)
    if not any(budgets.values()):
        return [most] * num_rows
    try:
        lowered = lower(captured.program)
    except ConfigError:
        return [most] * num_rows
    slices = lowered.program.slices
    parts = {part.slice_index: unrolled(part) for part in lowered.parts if part.slots}
    peaks = {index: peak_memory(part, slices[index]).nbytes for index, part in parts.items()}
    beside = budgets_beside(peaks, budgets, executors)
    [lowered_loop] = [node for node in lowered.program.nodes if isinstance(node, Loop) and node.number == loop.number]
    of_stage, homes = held_bytes(lowered.program, lowered_loop), slice_of_stage(loop)
    schedule = schedule_of(loop)
    held_now = dry_run(schedule).held
    bytes_held = [max(of_stage[stage] for stage, row in enumerate(places) if row == index) for index in range(num_rows)]
    free: list[int | None] = []
    for row in range(num_rows):
        home = homes[places.index(row)]
        if home not in beside:
            free.append(None)
            continue
        during = loop_peaks(parts[home], slices[home]).get(loop.number, 0)
        free.append(beside[home] - during + held_now[row] * bytes_held[row])
    return held_limits(free, bytes_held, most)
