"""Tables of a program's report, as they are shown: what the text and the HTML page have in common."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torchways.controller.reports.items import LineReport, NodeReport, TransferReport, WaitReport, slices_text

if TYPE_CHECKING:
    from torchways.controller.reports.report import ProgramReport

_T = TypeVar("_T")
#: Columns of names: they are aligned to the left. The first column always is.
_NAMES = ("slice", "line", "where", "made at", "at", "largest value", "value")
_CHANGE = "change"
_TIMES_OF_A_CALL: dict[str, Callable[[ProgramReport], float | None]] = {
    "from start to end": lambda report: report.call_us,
    "from end to end  ": lambda report: report.interval_us,
    "sent in          ": lambda report: report.send_us,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of texts.

    Attributes:
        title: "" for none.
        header: the names of its columns.
        rows: as long as the header each.
        notes: lines below it.
    """

    title: str = ""
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def is_name(self, column: int) -> bool:
        """Whether a column has names, which are aligned to the left; numbers are not."""
        return column == 0 or self.header[column] in _NAMES


def tables_of(report: ProgramReport) -> list[Table]:
    """Returns the tables of a report, all but those of its loops; a table without rows is left out."""
    tables = [_nodes(report), _lines(report), _waits(report), _transfers(report), _memory(report)]
    return [table if report.earlier is not None else _without_changes(table) for table in tables if table.rows]


def summary_lines(report: ProgramReport) -> Iterator[str]:
    """Yields what a report says of the whole program, in a few lines."""
    if report.is_eager:
        yield f"{report.program} runs in eager mode, as plain PyTorch: nothing is measured"
        return
    slices = ", ".join(f"@{index} {text}" for index, text in enumerate(report.slices))
    yield f"{report.program} on {slices}"
    before = report.earlier
    if report.call_us is None:
        yield "no call was measured: its last calls failed, ran in parity mode or too long ago, or TORCHWAYS_SPANS=0"
    else:
        calls = "1 call was" if report.num_calls == 1 else f"{report.num_calls} calls were"
        yield f"{calls} measured" + (f", and {before.num_calls} for the report before" if before is not None else "")
        for name, number in _TIMES_OF_A_CALL.items():
            if number(report) is not None:
                yield f"{name} {_with_change(number(report), number(before) if before is not None else None)}"
    once = [
        f"{name} {seconds:.1f} s"
        for name, seconds in (("traced in", report.trace_seconds), ("compiled in", report.compile_seconds))
        if seconds is not None
    ]
    if once:
        yield ", ".join(once)


def _with_change(us: float | None, before: float | None) -> str:
    change = change_text(us, before)
    return time_text(us) + (f"  {change}" if change else "")


def table_lines(table: Table, most_rows: int | None = None) -> Iterator[str]:
    """Yields a table as lines, with so many rows at most."""
    if table.title:
        yield table.title
    columns = range(len(table.header))
    rows = table.rows[:most_rows]
    widths = [max(len(row[column]) for row in (table.header, *rows)) for column in columns]
    for row in (table.header, *rows):
        cells = [
            row[column].ljust(widths[column]) if table.is_name(column) else row[column].rjust(widths[column])
            for column in columns
        ]
        yield f"  {'  '.join(cells)}".rstrip()
    if len(rows) < len(table.rows):
        yield f"  and {len(table.rows) - len(rows)} more, which the HTML page has"
    yield from (f"  {note}" for note in table.notes)


# ---- the tables


def _nodes(report: ProgramReport) -> Table:
    before = _by_key(report, lambda earlier: earlier.nodes, _node_key)
    return Table(
        title="time by node, in a call",
        header=("node", "slice", "runs", "time", _CHANGE, "share", "line"),
        rows=[
            (
                f"{node.kind} {node.name}" if node.kind != "compute" else node.name,
                slices_text(node.kind, node.slices),
                str(node.num_runs),
                time_text(node.time_us),
                _changed(node, before, _node_key, lambda item: item.time_us),
                percent_text(node.share),
                node.source,
            )
            for node in report.nodes
        ],
        notes=_gone(report.nodes, before, _node_key, lambda node: node.name),
    )


def _lines(report: ProgramReport) -> Table:
    before = _by_key(report, lambda earlier: earlier.lines, _line_key)
    return Table(
        title="time by line, in a call",
        header=("line", "computing", "transfers", _CHANGE, "share"),
        rows=[
            (
                line.source or "(no line)",
                time_text(line.compute_us),
                time_text(line.transfer_us),
                _changed(line, before, _line_key, lambda item: item.compute_us + item.transfer_us),
                percent_text(line.share),
            )
            for line in report.lines
        ],
        notes=_gone(report.lines, before, _line_key, lambda line: line.source or "(no line)"),
    )


def _waits(report: ProgramReport) -> Table:
    before = _by_key(report, lambda earlier: earlier.waits, _wait_key)
    return Table(
        title="waits, in a call",
        header=("reason", "where", "mean", _CHANGE, "longest", "calls"),
        rows=[
            (
                wait.reason,
                wait.where,
                time_text(wait.mean_us),
                _changed(wait, before, _wait_key, lambda item: item.mean_us),
                time_text(wait.longest_us),
                f"{wait.num_calls} of {report.num_calls}",
            )
            for wait in report.waits
        ],
    )


def _transfers(report: ProgramReport) -> Table:
    before = _by_key(report, lambda earlier: earlier.transfers, _transfer_key)
    return Table(
        title="bytes by transfer, in a call",
        header=("transfer", "value", "runs", "bytes", _CHANGE, "sent", "time", "made at"),
        rows=[
            (
                f"{'sum ' if item.kind == 'sum' else ''}{slices_text(item.kind, item.slices)}",
                item.value,
                str(item.num_runs),
                f"{item.value_bytes:,}",
                _changed(item, before, _transfer_key, lambda item: item.value_bytes),
                "-" if item.sent_bytes is None else f"{item.sent_bytes:,.0f}",
                time_text(item.time_us),
                item.source,
            )
            for item in report.transfers
        ],
        notes=_gone(report.transfers, before, _transfer_key, lambda item: f"{_transfer_text(item)} {item.value}"),
    )


def _memory(report: ProgramReport) -> Table:
    before = _by_key(report, lambda earlier: earlier.memory, lambda item: item.slice_index)
    return Table(
        title="memory, bytes per device",
        header=("slice", "peak", _CHANGE, "budget", "at", "largest value", "its bytes"),
        rows=[
            (
                f"@{item.slice_index}",
                f"{item.peak_bytes:,}",
                _changed(item, before, lambda item: item.slice_index, lambda item: item.peak_bytes),
                f"{item.budget_bytes:,}" if item.budget_bytes else "none",
                " ".join(filter(None, [item.function, item.source])) or "the arguments",
                item.largest,
                f"{item.largest_bytes:,}",
            )
            for item in report.memory
        ],
    )


# ---- changes


def change_text(now: float | None, before: float | None) -> str:
    """Returns how a number has changed, "+12%" or "same"; "" if either is unknown."""
    if now is None or before is None:
        return ""
    if now == before:
        return "same"
    if not before:
        return "new"
    return f"{100 * (now / before - 1):+.0f}%"


def _node_key(node: NodeReport) -> Hashable:
    return (node.kind, node.name, node.slices, node.source)


def _line_key(line: LineReport) -> Hashable:
    return line.source


def _wait_key(wait: WaitReport) -> Hashable:
    return (wait.reason, wait.where)


def _transfer_key(item: TransferReport) -> Hashable:
    return (item.kind, item.value, item.slices, item.source)


def _transfer_text(item: TransferReport) -> str:
    return f"{item.kind} {slices_text(item.kind, item.slices)}"


def _by_key(
    report: ProgramReport, items: Callable[[ProgramReport], Iterable[_T]], key: Callable[[_T], Hashable]
) -> Mapping[Hashable, _T] | None:
    return {key(item): item for item in items(report.earlier)} if report.earlier is not None else None


def _changed(
    item: _T,
    before: Mapping[Hashable, _T] | None,
    key: Callable[[_T], Hashable],
    number: Callable[[_T], float | None],
) -> str:
    if before is None:
        return ""
    known = before.get(key(item))
    return "new" if known is None else change_text(number(item), number(known))


def _gone(
    items: Iterable[_T],
    before: Mapping[Hashable, _T] | None,
    key: Callable[[_T], Hashable],
    name: Callable[[_T], str],
) -> list[str]:
    left = set(map(key, items))
    gone = [name(item) for known, item in (before or {}).items() if known not in left]
    return [f"no longer there: {'; '.join(gone)}"] if gone else []


def _without_changes(table: Table) -> Table:
    kept = [column for column, name in enumerate(table.header) if name != _CHANGE]
    return Table(
        title=table.title,
        header=[table.header[column] for column in kept],
        rows=[[row[column] for column in kept] for row in table.rows],
        notes=table.notes,
    )


# ---- numbers


def time_text(us: float | None) -> str:
    """Returns microseconds as text, "1.25 ms"; "-" if unknown."""
    return "-" if us is None else f"{us / 1e3:,.2f} ms"


def percent_text(part: float | None) -> str:
    """Returns a part as text, "12.5%"; "-" if unknown."""
    return "-" if part is None else f"{part:.1%}"
