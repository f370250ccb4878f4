"""One frame of `torchways top`, as `rich` draws it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from torchways.cli.top import SORTS
from torchways.rpc.activity import Activity, ClientActivity, ExecutorActivity, IslandActivity

#: Waits that are shown.
_MAX_WAITS = 8
_BAR_WIDTH = 12


def frame(address: str, activity: Activity, *, sort: str = "got", is_paused: bool = False, keys: bool = False) -> Group:
    """Returns a frame.

    Args:
        address: of the cluster.
        activity: what to show.
        sort: what clients are sorted by, one of `top.SORTS`.
        is_paused: say so.
        keys: name the keys.
    """
    parts: list[RenderableType] = [
        _head(address, activity, is_paused),
        _islands(activity.islands),
        _clients(activity.clients, sort),
        _executors(activity.executors),
        *_stalls(activity),
        *_waits(activity),
    ]
    if keys:
        parts.append(Text("q quit   p pause   s sort by the next column", style="dim"))
    return Group(*parts)


def _head(address: str, activity: Activity, is_paused: bool) -> Text:
    at = time.strftime("%H:%M:%S", time.localtime(activity.time_ns / 1e9))
    text = Text(f"torchways at {address}   {at}, over {activity.seconds:.1f} s", style="bold")
    if is_paused:
        text.append("   PAUSED", style="bold yellow")
    for name in activity.unreachable:
        text.append(f"\n{name} does not answer", style="red")
    return text


def _table(title: str, *columns: str) -> Table:
    """Returns a table; columns whose names begin with "<" are text, the others numbers."""
    table = Table(
        title=title, title_justify="left", box=None, pad_edge=False, header_style="dim", title_style="bold cyan"
    )
    for column in columns:
        table.add_column(column.lstrip("<"), justify="left" if column.startswith("<") else "right", no_wrap=True)
    return table


def _islands(islands: Sequence[IslandActivity]) -> Table:
    table = _table("Islands", "island", "<platform", "slices", "held", "admitted", "queue", "<devices")
    for island in islands:
        devices = Table.grid(padding=(0, 1))
        devices.add_row(*(part for used in island.utilisation for part in (_bar(used), f"{used:4.0%}")))
        counts = (str(island.num_slices), str(island.num_held), str(island.num_admitted))
        table.add_row(str(island.island), island.platform, *counts, f"{island.queue_seconds * 1e3:.1f} ms", devices)
    return table


def _bar(part: float) -> ProgressBar:
    return ProgressBar(total=1.0, completed=part, width=_BAR_WIDTH)


def _clients(clients: Sequence[ClientActivity], sort: str) -> Table:
    columns = ("weight", "priority", "wanted", "got", "device time", "held", "admitted", "runs/s", "memory")
    table = _table(f"Clients, by {sort}", "client", "<name", *columns)
    for client in sorted(clients, key=SORTS[sort]):
        table.add_row(
            str(client.client_id),
            escape(client.name),
            f"{client.weight:g}",
            str(client.priority),
            f"{client.wanted:.1%}",
            f"{client.got:.1%}",
            f"{client.device_seconds:.2f} s",
            str(client.num_held),
            str(client.num_admitted),
            f"{client.runs_per_second:,.1f}",
            _size(client.buffer_bytes),
        )
    if not clients:
        table.add_row("none")
    return table


def _executors(executors: Sequence[ExecutorActivity]) -> Table:
    columns = ("memory", "of", "process", "runs", "programs", "compiled", "compiling", "queue")
    table = _table("Executors", "<executor", "<devices", *columns)
    for executor in executors:
        table.add_row(
            executor.executor_id,
            " ".join(map(str, executor.devices)),
            _size(executor.used_bytes),
            _size(executor.budget_bytes) if executor.budget_bytes else "no limit",
            _size(executor.rss_bytes),
            str(executor.num_runs),
            str(executor.num_programs),
            str(executor.num_compiled),
            f"{executor.compiling:.0%}",
            str(executor.num_compiling),
        )
    if not executors:
        table.add_row("none")
    return table


def _stalls(activity: Activity) -> list[RenderableType]:
    lines = [line for executor in activity.executors for line in executor.stalls]
    if not lines:
        return []
    shown: list[RenderableType] = [Text("Stalled runs", style="bold red"), *map(Text, lines[:_MAX_WAITS])]
    if len(lines) > _MAX_WAITS:
        shown.append(Text(f"and {len(lines) - _MAX_WAITS} more", style="dim"))
    return shown


def _waits(activity: Activity) -> list[RenderableType]:
    lines = [f"island {island.island}: {line}" for island in activity.islands for line in island.waits]
    lines += [f"executor {executor.executor_id}: {line}" for executor in activity.executors for line in executor.waits]
    if not lines:
        return []
    shown = [Text(line, overflow="ellipsis", no_wrap=True) for line in lines[:_MAX_WAITS]]
    if len(lines) > _MAX_WAITS:
        shown.append(Text(f"and {len(lines) - _MAX_WAITS} more", style="dim"))
    return [Text("Waits", style="bold cyan"), *shown]


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"
