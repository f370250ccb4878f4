"""A program's report as one HTML page: well-formed, without scripts, and without references to anything else."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from torchways.controller.reports.items import TimelineBar
from torchways.controller.reports.tables import Table, summary_lines, tables_of, time_text

if TYPE_CHECKING:
    from torchways.controller.reports.report import ProgramReport

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2530; max-width: 1180px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 0.9em; }
th, td { padding: 0.2em 0.8em; border-bottom: 1px solid #e0e5ea; text-align: right; white-space: nowrap; }
th { font-weight: 600; color: #44505c; } .name { text-align: left; white-space: normal; }
.note, .axis { color: #66717d; } pre { background: #f5f7f9; padding: 0.8em; overflow-x: auto; }
.wide { overflow-x: auto; }
"""
#: Of functions, in the order in which they first run.
_COLOURS = ("#9ecae1", "#fdd0a2", "#c7e9c0", "#dadaeb", "#f7b6d2", "#c49c94", "#dbdb8d", "#9edae5")
_MOVED_COLOUR = "#8894a0"
_LEFT, _WIDTH, _LANE, _BAR, _THIN = 48, 1000, 44, 22, 8
#: The narrowest bar that its name is written on, and the width of a letter.
_LEAST_NAMED, _LETTER = 46, 6.5


def page_of(report: ProgramReport) -> str:
    """Returns the page."""
    return "\n".join(["<!DOCTYPE html>", *_page(report), ""])


def _page(report: ProgramReport) -> Iterator[str]:
    title = _text(f"Report of {report.program}")
    yield '<html lang="en"><head><meta charset="utf-8"/>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
    yield f"<title>{title}</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>{title}</h1>"
    yield f"<p>{'<br/>'.join(map(_text, summary_lines(report)))}</p>"
    if report.timeline:
        yield "<h2>timeline of the call in the middle</h2>"
        yield f'<div class="wide">{_timeline(report.timeline)}</div>'
        yield '<p class="note">A lane is a slice: computations above, transfers and sums below. '
        yield "The pointer shows names and lines.</p>"
    for table in tables_of(report):
        yield from _table(table)
    for loop in report.loops:
        yield f"<h2>microbatches</h2><pre>{_text(str(loop))}</pre>"
    yield "</body></html>"


def _table(table: Table) -> Iterator[str]:
    yield f'<h2>{_text(table.title)}</h2><div class="wide"><table>'
    for number, row in enumerate((table.header, *table.rows)):
        tag = "td" if number else "th"
        cells = [
            f'<{tag} class="{"name" if table.is_name(column) else "number"}">{_text(cell)}</{tag}>'
            for column, cell in enumerate(row)
        ]
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</table></div>"
    for note in table.notes:
        yield f'<p class="note">{_text(note)}</p>'


def _timeline(bars: tuple[TimelineBar, ...]) -> str:
    slices = sorted({bar.slice_index for bar in bars})
    end_us = max(bar.end_us for bar in bars) or 1.0
    names = dict.fromkeys(bar.name.partition(" ")[0] for bar in bars if bar.kind == "compute")
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}
    height = _LANE * len(slices) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 60}" height="{height}" font-size="11" '
        'font-family="system-ui, sans-serif" role="img" aria-label="timeline">'
    ]
    for lane, index in enumerate(slices):
        top = _LANE * lane
        parts.append(f'<text x="8" y="{top + 20}">@{index}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{top + 4}" width="{_WIDTH}" height="{_BAR + _THIN + 4}" fill="#f5f7f9"/>')
    for bar in bars:
        parts.append(_bar(bar, _LANE * slices.index(bar.slice_index), _WIDTH / end_us, colours))
    for quarter in range(5):
        left = _LEFT + _WIDTH * quarter / 4
        text = time_text(end_us * quarter / 4)
        parts.append(f'<text x="{left:.0f}" y="{height - 6}" fill="#66717d">{text}</text>')
    return "\n".join([*parts, "</svg>"])


def _bar(bar: TimelineBar, lane_top: int, scale: float, colours: dict[str, str]) -> str:
    left = _LEFT + bar.start_us * scale
    width = max(1.0, (bar.end_us - bar.start_us) * scale)
    is_moved = bar.kind != "compute"
    top, height = (lane_top + 6 + _BAR, _THIN) if is_moved else (lane_top + 4, _BAR)
    colour = _MOVED_COLOUR if is_moved else colours[bar.name.partition(" ")[0]]
    title = f"{bar.name}, {time_text(bar.end_us - bar.start_us)}" + (f", {bar.source}" if bar.source else "")
    shown = ""
    if not is_moved and width >= _LEAST_NAMED:
        name = bar.name if len(bar.name) * _LETTER < width else bar.name[: int(width / _LETTER) - 1] + "…"
        shown = f'<text x="{left + 3:.1f}" y="{top + 15}">{_text(name)}</text>'
    return (
        f'<g><title>{_text(title)}</title><rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{height}" '
        f'fill="{colour}" stroke="#ffffff" stroke-width="0.5"/>{shown}</g>'
    )


def _text(text: str) -> str:
    """Returns text as it may stand in a page: escaped, and without control characters, which XML does not allow."""
    return escape("".join(letter for letter in text if letter.isprintable() or letter == "\n"))
