"""A program's graph as SVG: text alone, without scripts, styles or references to anything else."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

from torchways.cluster.web.layout import Layout, Line, Node

_COLUMN, _BOX, _ROW, _BOX_HEIGHT = 330, 250, 52, 34
_TOP, _LEFT, _TEXT_LINE = 56, 24, 14
_LONGEST = 36
#: By kind: the box's colour.
_COLOURS = {
    "compute": "#cfe3f7",
    "send": "#fde3c4",
    "receive": "#fdf1c4",
    "all_reduce": "#e3d3f3",
    "loop": "#d2eed8",
    "arguments": "#eceff2",
    "results": "#eceff2",
    "summary": "#cfe3f7",
}
_FONT = 'font-family="system-ui, sans-serif"'


def draw(title: str, graph: Layout) -> str:
    """Returns a graph as one SVG document."""
    heights = [max(_BOX_HEIGHT, 8 + _TEXT_LINE * len(node.lines)) for node in graph.nodes]
    bottom = max((_top(node) + height for node, height in zip(graph.nodes, heights, strict=True)), default=_TOP)
    width, height = _LEFT + _COLUMN * max(1, len(graph.columns)), bottom + 40
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" aria-label={quoteattr(_clean(title))} {_FONT} font-size="12">',
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0L8 4L0 8z" fill="#66717d"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            _text(_LEFT, 20, title, 'font-weight="bold" font-size="14" fill="#1c2530"', limit=100),
            *_columns(graph),
            *_between(graph, heights),
            *_boxes(graph, heights),
            *([_text(_LEFT, height - 14, f"{graph.num_hidden:,} edges are not drawn", 'fill="#66717d"')]
              if graph.num_hidden else []),
            "</svg>",
        ]
    )  # fmt: skip


def _columns(graph: Layout) -> Iterator[str]:
    for number, name in enumerate(graph.columns):
        yield _text(_LEFT + number * _COLUMN, 44, name, 'font-weight="bold" fill="#44505c"')


def _left(node: Node) -> int:
    return _LEFT + node.column * _COLUMN + 14 * node.depth


def _width(node: Node) -> int:
    return _BOX - 14 * node.depth


def _top(node: Node) -> int:
    return _TOP + node.row * _ROW


def _boxes(graph: Layout, heights: list[int]) -> Iterator[str]:
    for node, height in zip(graph.nodes, heights, strict=True):
        left, top = _left(node), _top(node)
        yield "<g>"
        if node.details:
            yield f"<title>{escape(_clean(node.details, keep_lines=True))}</title>"
        yield (
            f'<rect x="{left}" y="{top}" width="{_width(node)}" height="{height}" rx="4" '
            f'fill="{_COLOURS[node.kind]}" stroke="#8fa0b1"/>'
        )
        for number, line in enumerate(node.lines):
            style = 'fill="#1c2530"' if number == 0 else 'fill="#5a6672" font-size="10"'
            yield _text(left + 8, top + 14 + number * _TEXT_LINE, line, style)
        yield "</g>"


def _between(graph: Layout, heights: list[int]) -> Iterator[str]:
    for line in graph.lines:
        source, target = graph.nodes[line.source], graph.nodes[line.target]
        is_crossing = source.column != target.column
        path = _across(source, target) if is_crossing else _down(source, target, heights[line.source])
        colour = "#d07a1f" if is_crossing else "#9aa6b2"
        yield (
            f'<path d="{path}" fill="none" stroke="{colour}" marker-end="url(#arrow)">'
            f"<title>{escape(_clean(line.label, keep_lines=True))}</title></path>"
        )
        if source.kind == "summary":
            yield _summary_label(source, target, line)


def _across(source: Node, target: Node) -> str:
    """From one slice to another: from side to side."""
    is_right = target.column > source.column
    x1 = _left(source) + (_width(source) if is_right else 0)
    x2 = _left(target) + (0 if is_right else _width(target))
    shift = 0 if is_right else 8  # two directions between two boxes do not lie on each other
    y1, y2 = (_top(node) + _BOX_HEIGHT // 2 + shift for node in (source, target))
    bend = 40 if is_right else -40
    return f"M{x1} {y1}C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}"


def _down(source: Node, target: Node, height: int) -> str:
    """Within a slice: straight to the next box, around those between."""
    if target.row == source.row + 1:
        x = max(_left(source), _left(target)) + 20
        return f"M{x} {_top(source) + height}L{x} {_top(target)}"
    x1, x2 = _left(source) + _width(source), _left(target) + _width(target)
    y1, y2 = _top(source) + _BOX_HEIGHT // 2 + 4, _top(target) + _BOX_HEIGHT // 2 - 4
    bend = max(x1, x2) + min(60, 12 + 3 * abs(target.row - source.row))
    return f"M{x1} {y1}C{bend} {y1} {bend} {y2} {x2} {y2}"


def _summary_label(source: Node, target: Node, line: Line) -> str:
    x = (_left(source) + _left(target) + _BOX) // 2 - 24
    y = _top(source) + _BOX_HEIGHT // 2 + (-6 if target.column > source.column else 22)
    return _text(x, y, line.label, 'fill="#a85c10" font-size="10"')


def _text(x: int, y: int, text: str, style: str, limit: int = _LONGEST) -> str:
    shown = _clean(text)
    shown = shown if len(shown) <= limit else "…" + shown[1 - limit :] if "/" in shown else shown[: limit - 1] + "…"
    return f'<text x="{x}" y="{y}" {style}>{escape(shown)}</text>'


def _clean(text: str, *, keep_lines: bool = False) -> str:
    """Returns text without what XML 1.0 has no place for."""
    kept = "\n" if keep_lines else ""
    return "".join(character if character.isprintable() or character in kept else " " for character in text)
