"""Traces in Chrome's JSON format, which Perfetto and chrome://tracing open: a row for each device.

Arrows lead from a run's dispatch to where it was held and admitted, and to its first computation on each executor; and
from where a value was sent to where it was received.
"""

from __future__ import annotations

import gzip
import heapq
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torchways.errors import ConfigError

#: The least that a span is drawn with: arrows cannot end at what takes no time.
_LEAST_NS = 1_000


class TraceSpan(Protocol):
    """Something that took time; times are Unix nanoseconds. `torchways.rpc.spans.Span` says what the rest means."""

    name: str
    track: str
    start_ns: int
    end_ns: int
    run_id: int
    sent_bytes: int
    kind: str
    client_id: int
    edge_id: int | None


class _Placed(NamedTuple):
    """A span in its row."""

    process: str
    pid: int
    tid: int
    span: Any


def chrome_trace(spans: Mapping[str, Sequence[Any]], clients: Mapping[int, str] | None = None) -> dict[str, Any]:
    """Returns spans as a Chrome trace.

    Args:
        spans: of each process, by its name; each a `TraceSpan`.
        clients: names of clients, by id, as far as they are known.
    """
    origin = min((span.start_ns for process in spans.values() for span in process), default=0)
    known = {str(client_id): name for client_id, name in (clients or {}).items()}
    names: list[dict[str, Any]] = []
    placed: list[_Placed] = []
    for pid, (process, process_spans) in enumerate(sorted(spans.items())):
        named = {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": _process_name(process, known)}}
        names.append(named)
        for tid, (track, row) in enumerate(_rows(process_spans)):
            names.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": track}})
            placed += [_Placed(process, pid, tid, span) for span in row]
    events = [_event(item, origin) for item in placed]
    for number, arrow in enumerate(_arrows(placed), start=1):
        events += _arrow_events(number, arrow, origin)
    events.sort(key=lambda event: event["ts"])
    return {"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": {"clients": known}}


def _process_name(process: str, clients: Mapping[str, str]) -> str:
    role, _, number = process.partition(" ")
    return f"{process}: {clients[number]}" if role == "client" and clients.get(number) else process


def _rows(spans: Iterable[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Returns rows of spans that do not overlap: as many for a track as it needs."""
    tracks: dict[str, list[Any]] = defaultdict(list)
    for span in spans:
        tracks[span.track].append(span)
    for track, of_track in sorted(tracks.items()):
        rows: list[list[Any]] = []
        #: When each row is free.
        free: list[tuple[int, int]] = []
        for span in sorted(of_track, key=lambda span: span.start_ns):
            if free and free[0][0] <= span.start_ns:
                _, number = heapq.heappop(free)
            else:
                number = len(rows)
                rows.append([])
            rows[number].append(span)
            heapq.heappush(free, (_drawn_end(span), number))
        for number, row in enumerate(rows):
            yield (f"{track} ({number + 1})" if number else track), row


def _drawn_end(span: Any) -> int:
    return max(span.end_ns, span.start_ns + _LEAST_NS) if span.edge_id is not None else int(span.end_ns)


def _event(item: _Placed, origin: int) -> dict[str, Any]:
    span = item.span
    more = {"client": span.client_id, "sent_bytes": span.sent_bytes}
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.kind or "span",
        "pid": item.pid,
        "tid": item.tid,
        "ts": (span.start_ns - origin) / 1e3,
        "dur": (_drawn_end(span) - span.start_ns) / 1e3,
        "args": {"run_id": span.run_id, **{name: value for name, value in more.items() if value}},
    }


def _arrows(placed: Sequence[_Placed]) -> Iterator[list[_Placed]]:
    """Returns chains of spans that follow from each other."""
    by_run: dict[tuple[str, int], list[_Placed]] = defaultdict(list)
    sends: dict[tuple[int, int], list[_Placed]] = defaultdict(list)
    for item in placed:
        span = item.span
        if span.run_id:
            by_run[span.kind, span.run_id].append(item)
            if span.kind == "send" and span.edge_id is not None:
                sends[span.run_id, span.edge_id].append(item)
    for (kind, run_id), items in by_run.items():
        if kind == "receive":
            for item in items:
                yield from ([send, item] for send in sends.get((run_id, item.span.edge_id), ())[:1])
        elif kind == "compute":
            yield from _arrows_to(by_run, run_id, items)


def _arrows_to(
    by_run: Mapping[tuple[str, int], Sequence[_Placed]], run_id: int, computed: Iterable[_Placed]
) -> Iterator[list[_Placed]]:
    """Returns the chain from a run's dispatch to its first computation on each executor."""
    first: dict[str, _Placed] = {}
    for item in computed:
        if item.process not in first or item.span.start_ns < first[item.process].span.start_ns:
            first[item.process] = item
    for process, item in first.items():
        executor_id = process.rpartition(" ")[2]
        chain = list(by_run.get(("dispatch", run_id), ())[:1])
        for kind in ("held", "admitted"):
            of_executor = (
                other
                for other in by_run.get((kind, run_id), ())
                if executor_id in other.span.track.removesuffix(" held").split("/")
            )
            chain += itertools.islice(of_executor, 1)
        if chain:
            yield [*chain, item]


def _arrow_events(number: int, chain: Sequence[_Placed], origin: int) -> Iterator[dict[str, Any]]:
    kind = "transfer" if chain[0].span.kind == "send" else "run"
    time_ns = 0
    for position, item in enumerate(chain):
        phase = "s" if position == 0 else "f" if position == len(chain) - 1 else "t"
        time_ns = max(time_ns, item.span.start_ns)  # clocks of two machines differ by what measuring them leaves
        yield {
            "ph": phase,
            "id": number,
            "name": kind,
            "cat": kind,
            "pid": item.pid,
            "tid": item.tid,
            "ts": (time_ns - origin) / 1e3,
            **({"bp": "e"} if phase == "f" else {}),
        }


def write_chrome_trace(
    path: Path, spans: Mapping[str, Sequence[Any]], clients: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """Writes spans as a Chrome trace, compressed if the file's name ends with ".gz"; returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    trace = chrome_trace(spans, clients)
    text = json.dumps(trace)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return trace


def read_chrome_trace(path: Path) -> dict[str, Any]:
    """Reads a trace.

    Raises:
        ConfigError: the file is not there, or is none.
    """
    try:
        data = path.read_bytes()
        trace = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        if isinstance(trace, dict) and isinstance(trace.get("traceEvents"), list):
            return trace
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror or error}") from error
    except (ValueError, EOFError):
        pass
    raise ConfigError(f"{path} is no trace: name a file that tw.profile or `torchways trace -o` wrote")
