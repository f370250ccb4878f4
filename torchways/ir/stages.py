"""The stages of a loop over microbatches: where they are, in which order they work, and what they hold meanwhile."""

from __future__ import annotations

from collections import defaultdict

from torchways.ir.program import ONE_AFTER_THE_OTHER, Compute, Loop, LoopBody, Program, ValueIndex, node_outputs
from torchways.ir.sizes import device_bytes
from torchways.schedules.actions import Kind, Schedule, expanded


def is_pipeline(loop: Loop) -> bool:
    """Whether a loop's turns overlap, because a pipeline has split its body into stages."""
    return loop.schedule != ONE_AFTER_THE_OTHER


def schedule_of(loop: Loop) -> Schedule:
    """Returns the schedule of a pipeline's loop; its rows are those of `loop.orders`, by the first stage of each."""
    rows = sorted((tuple(expanded(order)) for _, order in loop.orders), key=lambda row: min(item.stage for item in row))
    return Schedule(loop.schedule, tuple(rows))


def slice_of_stage(loop: Loop) -> dict[int, int]:
    """Returns the slice of each stage of a pipeline's loop."""
    return {
        stage: slice_index
        for slice_index, order in loop.orders
        for stage in sorted({action.stage for repeat in order for action in repeat.actions})
    }


def row_of_stage(loop: Loop) -> list[int]:
    """Returns the row of each stage in `schedule_of`."""
    homes = slice_of_stage(loop)
    rows = {home: row for row, home in enumerate(dict.fromkeys(homes[stage] for stage in sorted(homes)))}
    return [rows[homes[stage]] for stage in sorted(homes)]


def held_bytes(program: Program, loop: Loop) -> dict[int, int]:
    """Returns what one microbatch holds on each stage from its forward pass to its backward pass, bytes per device.

    Those are the values that the forward pass makes, or receives from another slice, and the backward pass reads.
    """
    found: dict[int, int] = dict.fromkeys(slice_of_stage(loop), 0)
    for stage, values in _held(program, loop.bodies[0]).items():
        found[stage] = sum(
            device_bytes(value.dtype, value.shape, value.placements, program.slices[value.slice_index].shape)
            for value in (program.values[index] for index in values)
        )
    return found


def _held(program: Program, body: LoopBody) -> dict[int, set[ValueIndex]]:
    computes = [(item.stage, item.kind, item.node) for item in body.nodes if isinstance(item.node, Compute)]
    made = {value for item in body.nodes for value in node_outputs(item.node)}
    first_stage: dict[ValueIndex, int] = {}  # of those that are forward passes, and make it or read it
    for stage, kind, node in computes:
        if kind is Kind.FORWARD:
            for value in (*node.inputs, *node.outputs):
                if value in made:
                    first_stage.setdefault(value, stage)
    held: dict[int, set[ValueIndex]] = defaultdict(set)
    for _, kind, node in computes:
        if kind is not Kind.FORWARD:
            for value in node.inputs:
                if value in first_stage:
                    held[first_stage[value]].add(value)
    return held
