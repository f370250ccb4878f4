"""A client's part of the trace: when it dispatched runs, waited for room, and read values."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from torchways.ids import RunId, owner
from torchways.rpc.spans import Span, SpanLog

_MAX_SPANS = 20_000


class ClientSpans:
    """The newest spans of a session, on any thread."""

    def __init__(self) -> None:
        self._log = SpanLog(_MAX_SPANS)

    def since(self, start_ns: int) -> list[Span]:
        """Returns the spans that ended at a time or later."""
        return self._log.since(start_ns)

    def dispatched(self, name: str, run_id: RunId, start_ns: int) -> None:
        """A run was bound and sent."""
        client = owner(run_id)
        self._log.note(
            Span(f"dispatch {name}", "dispatch", start_ns, time.time_ns(), run_id, kind="dispatch", client_id=client)
        )

    @contextlib.contextmanager
    def waiting(self, kind: str, name: str, client_id: int) -> Iterator[None]:
        """Keeps a span of what is done inside."""
        start = time.time_ns()
        try:
            yield
        finally:
            self._log.note(Span(name, kind, start, time.time_ns(), 0, kind=kind, client_id=client_id))
