"""Spans of a trace as processes keep, send and collect them, on the clock of who collects.

Processes of one machine have one clock. That of another machine is measured while spans are collected: the process is
asked for its time a few times, and the exchange that took least is believed.
"""

from __future__ import annotations

import collections
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import NamedTuple

from torchways.ids import ClientId, owner
from torchways.ir.part import LoopAction
from torchways.rpc import torchways_pb2 as pb
from torchways.schedules.actions import parse_action

#: Set to 0, processes record no spans: for benchmarks of what recording costs.
SPANS_VARIABLE = "TORCHWAYS_SPANS"
HIDDEN = "of another client"
#: Kind and track of a span for the time of which a process has no spans any more.
FORGOTTEN = "forgotten"

_MAX_SPANS = 50_000
_SPANS_PER_MESSAGE = 5_000
_EXCHANGES = 5


class Span(NamedTuple):
    """Something that took time; times are Unix nanoseconds.

    Attributes:
        run_id: the run that it is part of; 0: of none.
        part_of: the action of a loop's schedule that it is part of.
        sent_bytes: that it sent to other executors.
        kind: "dispatch", "room", "read", "held", "admitted", "compute", "input", "memory", "grant", "compile", "send",
            "receive", "sum" or "forgotten".
        client_id: whose it is; 0: nobody's, or a client's that may not be named.
        edge_id: of a send, a receive or a sum.
    """

    name: str
    track: str
    start_ns: int
    end_ns: int
    run_id: int
    part_of: LoopAction | None = None
    sent_bytes: int = 0
    kind: str = ""
    client_id: int = 0
    edge_id: int | None = None


class SpanLog:
    """The newest spans of a process. `note` may be called on any thread."""

    def __init__(self, max_spans: int = _MAX_SPANS) -> None:
        self.is_on = os.environ.get(SPANS_VARIABLE) != "0"
        self._spans: collections.deque[Span] = collections.deque(maxlen=max_spans)
        #: From the first span's begin to the end of the newest that is not kept any more, once there is one.
        self._begin_ns = self._forgotten_ns = 0

    def note(self, span: Span) -> None:
        """Keeps a span."""
        if self.is_on:
            if not self._spans:
                self._begin_ns = span.start_ns
            elif len(self._spans) == self._spans.maxlen:
                self._forgotten_ns = max(self._forgotten_ns, self._spans[0].end_ns)
            self._spans.append(span)

    def since(self, start_ns: int) -> list[Span]:
        """Returns the spans that ended at a time or later; a first one, FORGOTTEN, is of those that are gone."""
        forgotten_ns = self._forgotten_ns
        found = [span for span in self._spans.copy() if span.end_ns >= start_ns]
        if forgotten_ns < max(start_ns, 1):
            return found
        begin_ns = max(start_ns, self._begin_ns)
        gone = Span("more spans than are kept", FORGOTTEN, min(begin_ns, forgotten_ns), forgotten_ns, 0, kind=FORGOTTEN)
        return [gone, *found]


def shown_to(client_id: ClientId, spans: Iterable[Span]) -> list[Span]:
    """Returns spans as a client may see them: those of others are there, and not what they are."""
    return [
        span
        if span.client_id in (client_id, 0) and owner(span.run_id) in (client_id, 0)
        else Span(HIDDEN, span.track, span.start_ns, span.end_ns, 0, kind=span.kind)
        for span in spans
    ]


def span_to_proto(span: Span) -> pb.Span:
    """Returns a span as a message."""
    return pb.Span(
        name=span.name,
        track=span.track,
        start_ns=span.start_ns,
        end_ns=span.end_ns,
        run_id=span.run_id,
        action=str(span.part_of.action) if span.part_of is not None else "",
        loop=span.part_of.loop if span.part_of is not None else 0,
        sent_bytes=span.sent_bytes,
        kind=span.kind,
        client_id=span.client_id,
        edge_id=span.edge_id,
    )


def span_from_proto(message: pb.Span) -> Span:
    """Returns the span of a message."""
    return Span(
        name=message.name,
        track=message.track,
        start_ns=message.start_ns,
        end_ns=message.end_ns,
        run_id=message.run_id,
        part_of=LoopAction(message.loop, parse_action(message.action)) if message.action else None,
        sent_bytes=message.sent_bytes,
        kind=message.kind,
        client_id=message.client_id,
        edge_id=message.edge_id if message.HasField("edge_id") else None,
    )


def trace_responses(request: pb.TraceRequest, spans: Callable[[int], Sequence[Span]]) -> Iterable[pb.TraceResponse]:
    """Answers a request for spans, given what returns those since a time; first of all with this process's time."""
    yield pb.TraceResponse(now_ns=time.time_ns(), clock_id=clock_id())
    if request.only_clock:
        return
    found = spans(request.since_ns)
    for start in range(0, len(found), _SPANS_PER_MESSAGE):
        yield pb.TraceResponse(spans=map(span_to_proto, found[start : start + _SPANS_PER_MESSAGE]))


# ---- clocks


class Exchange(NamedTuple):
    """A question for the time: when it was sent and answered, by the clock here, and the answer, by the clock there."""

    sent_ns: int
    there_ns: int
    received_ns: int


def clock_offset(exchanges: Sequence[Exchange]) -> int:
    """Returns how far another clock is ahead of ours, in nanoseconds.

    The answer is taken to have been made halfway between question and answer. So the error is at most half of what
    the shortest exchange took.
    """
    best = min(exchanges, key=lambda exchange: exchange.received_ns - exchange.sent_ns)
    return best.there_ns - (best.sent_ns + best.received_ns) // 2


def clock_id() -> str:
    """Returns what is the same for processes that share a clock: those of one running kernel."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


async def collect(
    ask: Callable[[pb.TraceRequest], AsyncIterator[pb.TraceResponse]],
    since_ns: int,
    read: Callable[[pb.Span], Span] = span_from_proto,
) -> list[Span]:
    """Returns the spans of a process that ended at a time of our clock or later, in times of our clock.

    Args:
        ask: calls the process's CollectTrace.
        since_ns: the time.
        read: returns the span of a message.

    Raises:
        grpc.aio.AioRpcError: the process cannot be reached.
    """
    offset = await _measured_offset(ask)
    request = pb.TraceRequest(since_ns=since_ns + offset)
    found = [read(message) async for response in ask(request) for message in response.spans]
    return [moved(span, -offset) for span in found] if offset else found


def moved(span: Span, by_ns: int) -> Span:
    """Returns a span at another time."""
    return span._replace(start_ns=span.start_ns + by_ns, end_ns=span.end_ns + by_ns)


async def _measured_offset(ask: Callable[[pb.TraceRequest], AsyncIterator[pb.TraceResponse]]) -> int:
    exchanges = []
    for _ in range(_EXCHANGES):
        sent = time.time_ns()
        answers = [response async for response in ask(pb.TraceRequest(only_clock=True))]
        received, answer = time.time_ns(), answers[0]
        if answer.clock_id == clock_id():
            return 0
        exchanges.append(Exchange(sent, answer.now_ns, received))
    return clock_offset(exchanges)
