"""An executor's part of the trace: what its devices, transfers and compilations did when."""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Iterable, Sequence

from torchways.executor.memory import Taker
from torchways.ir.part import LoopAction
from torchways.rpc.clients import Span

logger = logging.getLogger(__name__)


_MAX_SPANS = 50_000


class Spans:
    """The newest spans. All methods but `since` and `note` are for the engine's thread."""

    def __init__(self) -> None:
        self._spans: collections.deque[Span] = collections.deque(maxlen=_MAX_SPANS)
        self._device_free_ns = 0
        #: Waits for memory that are not over, by the identity of what waits.
        self._waits: dict[int, tuple[str, int]] = {}

    def since(self, start_ns: int) -> list[Span]:
        """Returns the spans that ended at a time or later."""
        return [span for span in list(self._spans) if span.end_ns >= start_ns]

    def note(
        self,
        name: str,
        track: str,
        start_ns: int,
        end_ns: int,
        run_id: int = 0,
        part_of: LoopAction | None = None,
        sent_bytes: int = 0,
    ) -> None:
        """Keeps a span."""
        self._spans.append(Span(name, track, start_ns, end_ns, run_id, part_of, sent_bytes))

    def note_computed(
        self,
        name: str,
        num_devices: int,
        issued_ns: int,
        ended_ns: int,
        run_id: int,
        part_of: LoopAction | None = None,
    ) -> int:
        """Keeps a computation's span for each device; returns its nanoseconds.

        It began when it was issued, or behind the one before it: what several share is counted once.
        """
        started = max(issued_ns, self._device_free_ns)
        self._device_free_ns = ended_ns
        for device in range(num_devices):
            self.note(name, f"device {device}", started, ended_ns, run_id, part_of)
        return ended_ns - started

    def note_waits(self, starved: Sequence[Taker]) -> None:
        """Keeps a span of every wait for memory that is over, given those that are not."""
        if not starved and not self._waits:
            return
        now = time.time_ns()
        waiting = {id(item) for item in starved}
        for item in starved:
            if id(item) not in self._waits:
                logger.info("%s waits for %d bytes of device memory", item, item.need_bytes)
                self._waits[id(item)] = (f"waits for memory: {item}", now)
        self._end_waits([key for key in self._waits if key not in waiting], now)

    def _end_waits(self, keys: Iterable[int], now: int) -> None:
        for key in keys:
            name, started = self._waits.pop(key)
            self.note(name, "memory", started, now)
