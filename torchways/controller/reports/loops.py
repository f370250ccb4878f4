"""How a program's loops over microbatches ran, beside what their schedules predict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torchways.controller.loop_times import is_whole
from torchways.controller.reports.tables import Table, percent_text, table_lines, time_text
from torchways.controller.variant import Variant
from torchways.ir.program import Loop
from torchways.ir.stages import held_bytes, is_pipeline, row_of_stage, schedule_of, slice_of_stage
from torchways.schedules import UNIT_COSTS, Costs, Kind, Schedule, dry_run
from torchways.schedules.dry_run import held_by_stage
from torchways.schedules.measured import MeasuredRun, measured_costs, measured_timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """A stage of a pipeline.

    Times are medians over microbatches and recent calls, in microseconds; None: the schedule has no such action, or it
    was not measured.

    Attributes:
        stage_index: its number.
        slice_index: the number of its slice in the program, as in ``print(program)``.
        forward_us: of a forward pass.
        input_us: of the gradients of the stage's inputs, where the schedule has weight gradients apart.
        weight_us: of the gradients of its parameters, where the schedule has them apart.
        backward_us: of a whole backward pass.
        held_microbatches: the most microbatches whose activations it holds at a time.
        held_bytes: what these take, bytes per device.
    """

    stage_index: int
    slice_index: int
    forward_us: float | None
    input_us: float | None
    weight_us: float | None
    backward_us: float | None
    held_microbatches: int
    held_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopReport:
    """A call of `tw.microbatch`.

    A bubble is the part of the time of all slices in which they compute nothing for the loop, 0 to 1. What was not
    measured is None: the program has only run long ago, or the loop is no pipeline, whose turns run one after the
    other.

    Attributes:
        source: the line of the call.
        num_microbatches: turns of the loop.
        schedule_name: of its schedule.
        schedule: it; None: no pipeline.
        is_automatic: it is searched for.
        is_settled: the search is over; True for other schedules.
        stages: of the pipeline.
        num_slices: that take part.
        transfer_us: from the end of a computation to the arrival of its value on another slice, the median.
        predicted_us: the makespan of the schedule, by a dry run with the measured times.
        predicted_bubble: its bubble.
        theoretical_bubble: that of a dry run in which a forward pass takes as long as each half of a backward pass.
        measured_us: the makespan, from the start of the first action to the end of the last; of the call whose
            makespan is the median.
        measured_bubble: the bubble of that call.
        num_calls: calls that were measured.
        tried: the makespans of the schedules that the search tried, by name, in microseconds, by the times that it had.
    """

    source: str
    num_microbatches: int
    schedule_name: str
    schedule: Schedule | None
    is_automatic: bool
    is_settled: bool
    stages: tuple[StageReport, ...]
    num_slices: int
    transfer_us: float | None
    predicted_us: float | None
    predicted_bubble: float | None
    theoretical_bubble: float | None
    measured_us: float | None
    measured_bubble: float | None
    num_calls: int
    tried: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join(_loop_lines(self))


def loop_report(variant: Variant, loop: Loop, runs: Sequence[MeasuredRun]) -> LoopReport:
    """Returns the report of a loop of a variant, given how it ran in recent calls."""
    if not is_pipeline(loop):
        return LoopReport(
            source=loop.source,
            num_microbatches=loop.num_turns,
            schedule_name=loop.schedule,
            schedule=None,
            is_automatic=False,
            is_settled=True,
            stages=(),
            num_slices=len(loop.orders),
            transfer_us=None,
            predicted_us=None,
            predicted_bubble=None,
            theoretical_bubble=None,
            measured_us=None,
            measured_bubble=None,
            num_calls=0,
        )
    schedule, rows = schedule_of(loop), row_of_stage(loop)
    whole = [run for run in runs if is_whole([run], loop.num_turns)]
    costs = measured_costs(whole) if whole else None
    timelines = [measured_timeline(run, dict(enumerate(rows)), len(schedule.rows)) for run in whole]
    timelines.sort(key=lambda timeline: timeline.makespan)
    median = timelines[(len(timelines) - 1) // 2] if timelines else None
    predicted = dry_run(schedule, costs) if costs is not None else None
    search = variant.search
    found = search.found.get(loop.number) if search is not None else None
    return LoopReport(
        source=loop.source,
        num_microbatches=loop.num_turns,
        schedule_name=found.schedule.name if found is not None else loop.schedule,  # its name among those tried
        schedule=schedule,
        is_automatic=loop.is_automatic,
        is_settled=not loop.is_automatic or search is None or search.is_over,
        stages=_stages(variant, loop, schedule, costs),
        num_slices=len(schedule.rows),
        transfer_us=costs.transfer if costs is not None else None,
        predicted_us=predicted.makespan if predicted is not None else None,
        predicted_bubble=predicted.bubble if predicted is not None else None,
        theoretical_bubble=dry_run(schedule, UNIT_COSTS).bubble,
        measured_us=median.makespan if median is not None else None,
        measured_bubble=median.bubble if median is not None else None,
        num_calls=len(whole),
        tried=dict(found.tried) if found is not None else {},
    )


def _stages(variant: Variant, loop: Loop, schedule: Schedule, costs: Costs | None) -> tuple[StageReport, ...]:
    homes, of_stage = slice_of_stage(loop), held_bytes(variant.lowered.program, loop)
    held = held_by_stage(schedule)
    kinds = {kind for row in schedule.rows for action in row for kind in (action.kind, *action.kind.parts)}

    def taken(stage: int, kind: Kind) -> float | None:
        return costs.of(stage, kind) if costs is not None and kind in kinds else None

    return tuple(
        StageReport(
            stage_index=stage,
            slice_index=homes[stage],
            forward_us=taken(stage, Kind.FORWARD),
            input_us=taken(stage, Kind.INPUT) if schedule.splits_backward else None,
            weight_us=taken(stage, Kind.WEIGHT) if schedule.splits_backward else None,
            backward_us=costs.of(stage, Kind.BACKWARD) if costs is not None and schedule.has_backward else None,
            held_microbatches=held[stage],
            held_bytes=held[stage] * of_stage[stage],
        )
        for stage in sorted(homes)
    )


# ---- as text


def _loop_lines(report: LoopReport) -> Iterable[str]:
    auto = ("auto: " if report.is_settled else "auto, not yet measured: ") if report.is_automatic else ""
    yield f"{report.num_microbatches} microbatches at {report.source}"
    yield f"schedule {auto}{report.schedule_name}"
    if report.schedule is None:
        return
    header = ("stage", "slice", "forward", "input grad.", "weight grad.", "backward", "held", "held bytes")
    rows = [
        (
            str(stage.stage_index),
            f"@{stage.slice_index}",
            time_text(stage.forward_us),
            time_text(stage.input_us),
            time_text(stage.weight_us),
            time_text(stage.backward_us),
            str(stage.held_microbatches),
            f"{stage.held_bytes:,}",
        )
        for stage in report.stages
    ]
    yield from table_lines(Table(header=header, rows=rows))
    measured = f"measured, {report.num_calls} calls"
    spans = [
        ("theory", "", percent_text(report.theoretical_bubble)),
        ("predicted", time_text(report.predicted_us), percent_text(report.predicted_bubble)),
        (measured, time_text(report.measured_us), percent_text(report.measured_bubble)),
    ]
    yield from table_lines(Table(header=("", "makespan", "bubble"), rows=spans))
    if report.transfer_us is not None:
        yield f"  a transfer takes {time_text(report.transfer_us)}"
    if report.tried:
        yield "  schedules tried, by the times before the search"
        tried = sorted(report.tried.items(), key=lambda item: item[1])
        makespans = [(name, time_text(makespan)) for name, makespan in tried]
        yield from table_lines(Table(header=("", "makespan"), rows=makespans))
