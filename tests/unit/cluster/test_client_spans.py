"""A client's own spans: what the resource manager asks for, what it believes, and what it does not wait for."""

import asyncio
import time

import pytest

from torchways.cluster import client_spans as module
from torchways.cluster.client_spans import ClientSpans, accepted
from torchways.errors import AccessDenied, DeadlineExceeded, SessionClosed, UserError
from torchways.ids import client_range
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.spans import Span, trace_responses

ME, OTHER = 1, 2
MINE, THEIRS = client_range(ME)[0] + 1, client_range(OTHER)[0] + 1
HOUR = 3_600_000_000_000


def span(name, start, end, run_id=MINE, kind="dispatch", client=ME, track=None, **more):
    return Span(name, kind if track is None else track, start, end, run_id, kind=kind, client_id=client, **more)


async def stream(*items):
    for item in items:
        yield item


class Client:
    """What a resource manager asks for spans; `answers` makes what it sends for a question."""

    def __init__(self, answers):
        self.manager = ClientSpans(self.tell)
        self.answers = answers
        self.asked = []
        self.tasks = []
        self.manager.attached(ME)

    def tell(self, client_id, event):
        assert client_id == ME
        wanted = event.trace_wanted
        self.asked.append(wanted.request)
        answers = self.answers(wanted)
        if answers is not None:
            self.tasks.append(asyncio.ensure_future(self.manager.take(ME, stream(*answers))))

    async def collect(self, since=0):
        try:
            return await self.manager.collect(ME, since)
        finally:
            self.results = await asyncio.gather(*self.tasks, return_exceptions=True)
            assert self.manager._open == {}


def honest(spans, ahead_ns=0, clock=None):
    """Answers as `ManagerClient` does, with a clock that is ahead."""

    def answers(wanted):
        for response in trace_responses(wanted.request, lambda since: [s for s in spans() if s.end_ns >= since]):
            if response.now_ns and clock:
                response.now_ns, response.clock_id = response.now_ns + ahead_ns, clock
            yield pb.TraceAnswer(number=wanted.number, response=response)

    return answers


def collect(answers, since=0):
    async def run():
        client = Client(answers)
        return await client.collect(since), client.asked

    return asyncio.run(run())


def test_a_client_sends_what_it_has_since_a_time():
    spans = []

    def now():
        spans[:] = [span("dispatch f", time.time_ns(), time.time_ns())]
        return spans

    found, asked = collect(honest(now))
    assert found == spans
    assert [request.only_clock for request in asked] == [True, False]  # of one machine: one clock


def test_a_client_of_another_machine_is_moved_to_our_clock():
    made = []

    def now():
        made.append(time.time_ns())
        return [span("f", made[-1] + HOUR, made[-1] + HOUR)]

    [found], asked = collect(honest(now, HOUR, "another machine"))
    assert abs(found.start_ns - made[-1]) < HOUR / 60
    assert [request.only_clock for request in asked] == [True] * 5 + [False]


def test_only_what_is_a_clients_own_is_believed():
    spans = [
        span("f", 15, 20),
        span("g", -(1 << 62), 1 << 62, THEIRS, client=OTHER, sent_bytes=7, edge_id=3),
        span("read", 11, 12, 0, kind="read", track="island 0 device 0"),
        span("before", 1, 9),
        span("later", 41, 50),
        span("backwards", 30, 20),
        span("forged", 12, 13, kind="compute", track="device 0"),
        span("x" * 1000, 20, 20, kind="room"),
    ]
    assert list(accepted(ME, spans, 10, 40)) == [
        span("f", 15, 20),
        span("g", 10, 40, 0),
        span("read", 11, 12, 0, kind="read"),
        span("x" * 200, 20, 20, kind="room"),
    ]


def test_a_client_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.05)
    with pytest.raises(DeadlineExceeded, match=r"it did not answer within 0.05 s"):
        collect(lambda wanted: None)


def test_a_client_that_leaves_meanwhile_is_not_waited_for():
    async def run():
        client = Client(lambda wanted: None)
        collecting = asyncio.ensure_future(client.collect())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        client.manager.gone(ME)
        with pytest.raises(SessionClosed, match="it has left"):
            await collecting
        with pytest.raises(SessionClosed, match="it has left"):
            await client.collect()

    asyncio.run(run())


def answer(wanted, number=None, **response):
    return pb.TraceAnswer(number=wanted.number if number is None else number, response=pb.TraceResponse(**response))


@pytest.mark.parametrize(
    ("answers", "error", "text"),
    [
        (
            lambda wanted: [answer(wanted)] + [answer(wanted, spans=[pb.Span()] * 5_000)] * 5,
            UserError,
            "more than 20,001",
        ),
        (
            lambda wanted: [answer(wanted)] + [answer(wanted, clock_id="x" * (1 << 20))] * 9,
            UserError,
            "8,388,608 bytes",
        ),
        (lambda wanted: [answer(wanted, now_ns=-1, clock_id="there")], UserError, "no time that could be"),
        (lambda wanted: [answer(wanted, now_ns=(1 << 63) - 1, clock_id="there")], UserError, "no time that could be"),
    ],
    ids=["spans", "bytes", "a time before all", "a time after all"],
)
def test_what_is_no_answer_is_refused(answers, error, text):
    with pytest.raises(error, match=text):
        collect(answers)


def test_times_that_could_just_be_are_reckoned_with():
    latest = (1 << 62) - 1

    def answers(wanted):
        spans = [pb.Span(name="f", kind="read", start_ns=-(1 << 63), end_ns=(1 << 63) - 1, action="no action")]
        return [answer(wanted, now_ns=latest, clock_id="there"), answer(wanted, spans=spans)]

    for since in (-(1 << 63), 0, (1 << 63) - 1):
        [found], _ = collect(answers, since)
        assert 0 < found.start_ns <= found.end_ns <= time.time_ns()


def test_an_answer_that_breaks_off_ends_the_question():
    class Broken(Client):
        def tell(self, client_id, event):
            async def broken():
                yield answer(event.trace_wanted)
                raise asyncio.CancelledError

            self.tasks.append(asyncio.ensure_future(self.manager.take(ME, broken())))

    async def run():
        with pytest.raises(SessionClosed, match="its answer broke off"):
            await Broken(None).collect()

    asyncio.run(run())


def test_nobody_answers_what_was_not_asked():
    async def run():
        asked = asyncio.Event()
        client = Client(lambda wanted: asked.set())
        client.manager.attached(OTHER)
        collecting = asyncio.ensure_future(client.collect())
        await asked.wait()
        [question] = client.manager._open
        for client_id, number in ((ME, question.number + 1), (OTHER, question.number)):
            with pytest.raises(AccessDenied, match=f"nobody waits for answer {number} of client {client_id}"):
                await client.manager.take(client_id, stream(pb.TraceAnswer(number=number)))
        with pytest.raises(AccessDenied):
            await client.manager.take(ME, stream())
        collecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collecting
        with pytest.raises(AccessDenied):  # nobody waits for it any more
            await client.manager.take(ME, stream(pb.TraceAnswer(number=question.number)))

    asyncio.run(run())
