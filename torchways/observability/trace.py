"""Traces in Chrome's JSON format, which Perfetto and chrome://tracing open: a row for each device."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class TraceSpan(Protocol):
    """Something that took time; times are Unix nanoseconds. `sent_bytes` went to other executors."""

    name: str
    track: str
    start_ns: int
    end_ns: int
    run_id: int
    sent_bytes: int


def chrome_trace(spans: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Returns spans as a Chrome trace.

    Args:
        spans: of each process, by its name; each a `TraceSpan`.
    """
    starts = [span.start_ns for process in spans.values() for span in process]
    origin = min(starts, default=0)
    events: list[dict[str, Any]] = []
    for pid, (process, process_spans) in enumerate(sorted(spans.items())):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}})
        tracks = {track: tid for tid, track in enumerate(sorted({span.track for span in process_spans}))}
        for track, tid in tracks.items():
            events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": track}})
        for span in process_spans:
            events.append(
                {
                    "ph": "X",
                    "name": span.name,
                    "pid": pid,
                    "tid": tracks[span.track],
                    "ts": (span.start_ns - origin) / 1e3,
                    "dur": (span.end_ns - span.start_ns) / 1e3,
                    "args": {"run_id": span.run_id, **({"sent_bytes": span.sent_bytes} if span.sent_bytes else {})},
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_chrome_trace(path: Path, spans: Mapping[str, Sequence[Any]]) -> None:
    """Writes spans as a Chrome trace, compressed if the file's name ends with ".gz"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(chrome_trace(spans))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
