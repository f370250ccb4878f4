"""A scheduler's part of the trace: how long each run was held, why, and how long it was admitted.

Fed by the shell (server.py) with what the core decided, and with the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchways.ids import ClientId, RunId, owner
from torchways.island.admission import DeviceSet
from torchways.rpc.spans import Span, SpanLog


@dataclass(slots=True)
class _OpenRun:
    """A run that is held, or admitted since `admitted_ns`."""

    name: str
    devices: Sequence[DeviceSet]
    came_ns: int
    admitted_ns: int = 0
    reason: str = ""


class RunSpans:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._log = SpanLog()
        self._open: dict[RunId, _OpenRun] = {}

    def requested(self, run_id: RunId, name: str, devices: Sequence[DeviceSet], now_ns: int) -> None:
        """A run has come for some sets of devices."""
        if self._log.is_on:
            self._open[run_id] = _OpenRun(name, devices, now_ns)

    def admitted(self, run_id: RunId, reason: str, now_ns: int) -> None:
        """A run was sent to its executors, each of which this may be called for; `reason`: what it was held for."""
        run = self._open.get(run_id)
        if run is not None and not run.admitted_ns:
            run.admitted_ns, run.reason = now_ns, reason

    def ended(self, run_id: RunId, now_ns: int) -> None:
        """A run is over."""
        run = self._open.pop(run_id, None)
        for span in self._spans_of(run_id, run, now_ns) if run is not None else ():
            self._log.note(span)

    def client_gone(self, client_id: ClientId, now_ns: int) -> None:
        """What was held for a client is dropped; what is admitted ends by itself."""
        for run_id in [run_id for run_id, run in self._open.items() if owner(run_id) == client_id]:
            if not self._open[run_id].admitted_ns:
                self.ended(run_id, now_ns)

    def since(self, start_ns: int, now_ns: int) -> list[Span]:
        """Returns the spans that ended at a time or later, and those that have not ended, as far as they are."""
        going_on = [span for run_id, run in self._open.items() for span in self._spans_of(run_id, run, now_ns)]
        return [*self._log.since(start_ns), *going_on]

    @staticmethod
    def _spans_of(run_id: RunId, run: _OpenRun, now_ns: int) -> list[Span]:
        client, spans = owner(run_id), []
        reason = f"{run.name} held: {run.reason}" if run.reason else f"{run.name} held"
        for devices in run.devices:
            where, held_until = "/".join(devices), run.admitted_ns or now_ns
            held = Span(reason, f"{where} held", run.came_ns, held_until, run_id, kind="held", client_id=client)
            spans.append(held)
            if run.admitted_ns:
                spans.append(Span(run.name, where, run.admitted_ns, now_ns, run_id, kind="admitted", client_id=client))
        return spans
