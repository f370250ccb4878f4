"""A program's report: everything that is known of its recent calls, together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torchways.controller.loop_times import measured_loops, spans_of
from torchways.controller.reports.html import page_of
from torchways.controller.reports.items import (
    LineReport,
    MemoryReport,
    NodeReport,
    TimelineBar,
    TransferReport,
    WaitReport,
)
from torchways.controller.reports.loops import LoopReport, loop_report
from torchways.controller.reports.measured import Measured, measured
from torchways.controller.reports.planned import Plan, peaks_of, plan_of
from torchways.controller.reports.tables import summary_lines, table_lines, tables_of
from torchways.controller.variant import Variant
from torchways.errors import ConfigError
from torchways.mesh import mesh_text

#: Rows of a table in the text; the HTML page has all.
_MOST_ROWS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramReport:
    """What a program's last calls took, five at most, and what they move and hold. ``str()`` has it as tables.

    Times are microseconds, and of one call: of each time the median over the calls.

    Attributes:
        program: its name.
        slices: its slices, in their order, as text.
        num_calls: the calls that were measured. Calls that failed, and those whose spans are gone, are none of them.
        call_us: from the start of a call's first computation or transfer to the end of the last; None: not measured.
            If calls overlap because the script runs ahead, that is longer than what a call costs.
        interval_us: from the end of a call to the end of the next; None: there are no two calls.
        send_us: what the script needed to bind a call and to send it, waits for room among it.
        trace_seconds: what tracing the function took, in seconds.
        compile_seconds: from when the program was sent until all executors had compiled it, in seconds.
        nodes: what each node took, the longest first; none if no call was measured.
        lines: the same by the user's line.
        waits: for what the script, the schedulers and the devices waited, the longest first.
        transfers: what goes between slices.
        memory: the most that each slice holds at a time.
        timeline: what the slices did in the call whose `call_us` is the median.
        loops: its calls of `tw.microbatch`, in their order; none if it has none, and in eager mode.
        is_eager: it runs as plain PyTorch, and nothing is measured.
        earlier: the report that this one is compared with, if any.
    """

    program: str
    slices: tuple[str, ...] = ()
    num_calls: int = 0
    call_us: float | None = None
    interval_us: float | None = None
    send_us: float | None = None
    trace_seconds: float | None = None
    compile_seconds: float | None = None
    nodes: tuple[NodeReport, ...] = ()
    lines: tuple[LineReport, ...] = ()
    waits: tuple[WaitReport, ...] = ()
    transfers: tuple[TransferReport, ...] = ()
    memory: tuple[MemoryReport, ...] = ()
    timeline: tuple[TimelineBar, ...] = ()
    loops: tuple[LoopReport, ...] = ()
    is_eager: bool = False
    earlier: ProgramReport | None = None

    def __str__(self) -> str:
        return "\n\n".join("\n".join(block) for block in self._blocks())

    def _blocks(self) -> Iterator[Iterator[str]]:
        yield summary_lines(self)
        for table in tables_of(self):
            yield table_lines(table, _MOST_ROWS)
        for loop in self.loops:
            yield iter([str(loop)])

    def against(self, earlier: ProgramReport) -> ProgramReport:
        """Returns this report compared with another one: `str()` and the HTML page show what has changed.

        Items are compared with those of the same name, slices and line. The report may be one of another program.
        """
        return replace(self, earlier=replace(earlier, earlier=None))

    def write_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as one HTML page, with a timeline. It needs no other file, no network and no scripts.

        Raises:
            ConfigError: the file cannot be written.
        """
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(page_of(self), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write the report {target}: {error.strerror or error}") from error


def report_of(variant: Variant) -> ProgramReport:
    """Returns the report of a variant; waits until its recent calls are over."""
    program, calls = variant.lowered.program, list(variant.recent)
    spans = spans_of(variant, calls)
    plan = plan_of(variant)
    found = measured(program.name, calls, spans, plan)
    of_loops = measured_loops(variant, calls, spans)
    return ProgramReport(
        program=program.name,
        slices=tuple(mesh_text(spec.shape, spec.axis_names) for spec in program.slices),
        num_calls=found.num_calls,
        call_us=found.call_us,
        interval_us=found.interval_us,
        send_us=found.send_us,
        trace_seconds=variant.traced_seconds or None,
        compile_seconds=variant.compile_seconds(),
        nodes=found.nodes,
        lines=found.lines,
        waits=found.waits,
        transfers=_transfers(plan, found),
        memory=peaks_of(variant),
        timeline=found.timeline,
        loops=tuple(loop_report(variant, loop, of_loops.get(loop.number, [])) for loop in variant.loops),
    )


def _transfers(plan: Plan, found: Measured) -> tuple[TransferReport, ...]:
    """Returns what goes between slices, the largest first."""
    reports = [
        TransferReport(
            kind=planned.kind,
            value=planned.value,
            slices=planned.slices,
            source=planned.source,
            num_runs=num_runs,
            value_bytes=value_bytes,
            sent_bytes=found.sent_bytes.get(planned),
            time_us=found.transfer_us.get(planned),
        )
        for planned, (num_runs, value_bytes) in plan.sizes.items()
    ]
    return tuple(sorted(reports, key=lambda item: -item.value_bytes))
