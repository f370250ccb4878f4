"""Spans: what is shown to whom, and how the clocks of machines are brought together."""

import asyncio
import time

from torchways.ids import client_range
from torchways.ir.part import LoopAction
from torchways.rpc import spans as module
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.spans import (
    FORGOTTEN,
    HIDDEN,
    Exchange,
    Span,
    SpanLog,
    clock_offset,
    collect,
    shown_to,
    span_from_proto,
    span_to_proto,
    trace_responses,
)
from torchways.schedules.actions import parse_action

ONE, TWO = client_range(1)[0] + 1, client_range(2)[0] + 1


def test_a_span_survives_the_wire():
    part_of = LoopAction(2, parse_action("1F3"))
    for span in (
        Span("f", "device 0", 1, 2, ONE, part_of, 7, "compute", 1),
        Span("send", "send", 1, 2, ONE, kind="send", client_id=1, edge_id=0),
        Span("compile f", "compile", 1, 2, 0),
    ):
        assert span_from_proto(span_to_proto(span)) == span


def test_a_client_sees_that_others_compute_and_not_what():
    mine = Span("mine", "device 0", 1, 2, ONE, kind="compute", client_id=1)
    theirs = Span("theirs", "device 0", 3, 4, TWO, sent_bytes=5, kind="compute", client_id=2, edge_id=1)
    compiled = Span("compile theirs", "compile", 5, 6, 0, kind="compile", client_id=2)
    own, other, compilation = shown_to(1, [mine, theirs, compiled])
    assert own == mine
    assert other == Span(HIDDEN, "device 0", 3, 4, 0, kind="compute")
    assert compilation == Span(HIDDEN, "compile", 5, 6, 0, kind="compile")


def test_the_oldest_spans_go_first(monkeypatch):
    log = SpanLog(max_spans=2)
    for end in (1, 2, 3):
        log.note(Span("f", "t", end - 1, end, 0))
    assert [(span.kind, *span[2:4]) for span in log.since(0)] == [(FORGOTTEN, 0, 1), ("", 1, 2), ("", 2, 3)]
    assert [span.end_ns for span in log.since(2)] == [2, 3]  # none is missing
    log.note(Span("f", "t", 3, 4, 0))
    assert [(span.kind, *span[2:4]) for span in log.since(1)] == [(FORGOTTEN, 1, 2), ("", 2, 3), ("", 3, 4)]
    assert [span.end_ns for span in log.since(3)] == [3, 4]
    monkeypatch.setenv("TORCHWAYS_SPANS", "0")
    off = SpanLog()
    off.note(Span("f", "t", 0, 1, 0))
    assert off.since(0) == []


def test_the_shortest_exchange_gives_the_offset():
    # 1,000 ahead; the way there takes longer than the way back in the slow ones.
    slow, fast = Exchange(0, 90 + 1_000, 100), Exchange(200, 205 + 1_000, 210)
    assert clock_offset([slow, fast, Exchange(300, 390 + 1_000, 400)]) == 1_000
    assert clock_offset([Exchange(0, -500 + 50, 100)]) == -500


def _asked(spans, ahead_ns, monkeypatch):
    """Collects from a process of another machine, whose clock is ahead."""
    asked = []

    async def ask(request):
        asked.append(request)
        for response in trace_responses(request, lambda since: [s for s in spans if s.end_ns >= since]):
            if response.clock_id:
                response.clock_id, response.now_ns = "another machine", response.now_ns + ahead_ns
            yield response

    return asyncio.run(collect(ask, 1_000)), asked


def test_spans_of_another_machine_are_moved_to_our_clock(monkeypatch):
    ahead = 3_600_000_000_000
    there = [Span("early", "t", 0, ahead - 10**9, 0), Span("late", "t", ahead + 5 * 10**9, ahead + 6 * 10**9, 0)]
    found, asked = _asked(there, ahead, monkeypatch)
    [late] = found
    assert late.name == "late"
    assert abs(late.start_ns - 5 * 10**9) < 10**9
    assert late.end_ns - late.start_ns == 10**9
    assert [request.only_clock for request in asked] == [True] * 5 + [False]


def test_processes_of_one_machine_share_a_clock():
    span, asked = Span("f", "t", time.time_ns(), time.time_ns(), 0), []

    async def ask(request):
        asked.append(request)
        for response in trace_responses(request, lambda since: [span]):
            yield response

    assert asyncio.run(collect(ask, 0)) == [span]
    assert len(asked) == 2
    assert isinstance(asked[0], pb.TraceRequest)
    assert module.clock_id() == module.clock_id() != ""
