"""`program.report()`: how a program's loops over microbatches ran, beside what their schedules predict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torchways.controller.loop_times import is_whole, measure
from torchways.controller.variant import Variant
from torchways.ir.program import Loop
from torchways.ir.stages import held_bytes, is_pipeline, row_of_stage, schedule_of, slice_of_stage
from torchways.mesh import mesh_text
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramReport:
    """How a program's microbatches ran. ``str()`` is a table for each loop.

    Attributes:
        program: its name.
        slices: its slices, in their order, as text.
        loops: its calls of `tw.microbatch`, in their order; none if it has none, and in eager mode.
        is_eager: it runs as plain PyTorch.
    """

    program: str
    slices: tuple[str, ...] = ()
    loops: tuple[LoopReport, ...] = ()
    is_eager: bool = False

    def __str__(self) -> str:
        if self.is_eager:
            return f"{self.program} runs in eager mode, without schedules"
        if not self.loops:
            return f"{self.program} has no tw.microbatch"
        slices = ", ".join(f"@{index} {text}" for index, text in enumerate(self.slices))
        return "\n\n".join([f"{self.program} on {slices}", *map(str, self.loops)])


def report_of(variant: Variant) -> ProgramReport:
    """Returns the report of a variant; waits until its recent calls are over."""
    program = variant.lowered.program
    measured = measure(variant, list(variant.recent)) if variant.loops else {}
    return ProgramReport(
        program=program.name,
        slices=tuple(mesh_text(spec.shape, spec.axis_names) for spec in program.slices),
        loops=tuple(_loop_report(variant, loop, measured.get(loop.number, [])) for loop in variant.loops),
    )


def _loop_report(variant: Variant, loop: Loop, runs: Sequence[MeasuredRun]) -> LoopReport:
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
            _time(stage.forward_us),
            _time(stage.input_us),
            _time(stage.weight_us),
            _time(stage.backward_us),
            str(stage.held_microbatches),
            f"{stage.held_bytes:,}",
        )
        for stage in report.stages
    ]
    yield from _table(header, rows)
    yield from _table(
        ("", "makespan", "bubble"),
        [
            ("theory", "", _percent(report.theoretical_bubble)),
            ("predicted", _time(report.predicted_us), _percent(report.predicted_bubble)),
            (f"measured, {report.num_calls} calls", _time(report.measured_us), _percent(report.measured_bubble)),
        ],
    )
    if report.transfer_us is not None:
        yield f"  a transfer takes {_time(report.transfer_us)}"
    if report.tried:
        yield "  schedules tried, by the times before the search"
        tried = sorted(report.tried.items(), key=lambda item: item[1])
        yield from _table(("", "makespan"), [(name, _time(makespan)) for name, makespan in tried])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Yields lines: the first column to the left, others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        yield f"  {'  '.join(cells)}".rstrip()


def _time(us: float | None) -> str:
    return "-" if us is None else f"{us / 1e3:,.2f} ms"


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.1%}"
