"""In which order an island runs what its clients ask for."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from torchways.ids import ClientId


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingRun:
    """A run that was not ordered yet."""

    client_id: ClientId
    request: Any


@dataclass(slots=True)
class FirstComeFirstServed:
    """Runs go in the order in which they arrive."""

    _queue: deque[PendingRun] = field(default_factory=deque)

    def add(self, run: PendingRun) -> None:
        """Takes a run that a client asked for."""
        self._queue.append(run)

    def next(self) -> PendingRun | None:
        """Returns the run to order next, or None to wait."""
        return self._queue.popleft() if self._queue else None

    def drop_client(self, client_id: ClientId) -> None:
        """Forgets the runs of a client that is gone."""
        self._queue = deque(run for run in self._queue if run.client_id != client_id)
