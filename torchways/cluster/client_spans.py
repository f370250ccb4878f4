"""Clients' own spans, for who runs the cluster: when a client dispatched runs, waited for room, and read values.

A client serves nothing. It is asked on the stream that it is attached by, and answers with a call. It may be stopped,
gone or malicious. So it has a deadline, what it may send is limited, and a span is believed only as far as it concerns
the client itself: a kind that clients have, the client's own number and runs, and times at which it was attached.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import NamedTuple

from torchways.errors import AccessDenied, DeadlineExceeded, SessionClosed, TorchwaysError, UserError
from torchways.ids import ClientId, RunId, owner
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.spans import FORGOTTEN, Span, collect

#: How long a client may take for all that it is asked in one trace, and for one answer.
ANSWER_SECONDS = 5.0
#: The most that one answer may have. A client keeps 20,000 spans (controller/session/spans.py); one more tells that it
#: had others.
_MAX_BYTES = 8 << 20
_MAX_SPANS = 20_001
_MAX_NAME = 200
#: The kinds of a client's spans; each has its own track.
_KINDS = frozenset({"dispatch", "room", "read", FORGOTTEN})
#: Times that a client may claim, in nanoseconds: those with which we can reckon.
_MAX_NS = 1 << 62


class _Question(NamedTuple):
    client_id: ClientId
    number: int


class ClientSpans:
    """See the module's docstring.

    Args:
        tell: sends an event to a client that is attached.
    """

    def __init__(self, tell: Callable[[ClientId, pb.ClusterEvent], None]) -> None:
        self._tell = tell
        self._numbers = itertools.count(1)
        #: Questions that nobody has begun to answer.
        self._open: dict[_Question, asyncio.Future[list[pb.TraceResponse]]] = {}
        self._attached_ns: dict[ClientId, int] = {}

    def attached(self, client_id: ClientId) -> None:
        """A client has come."""
        self._attached_ns[client_id] = time.time_ns()

    def gone(self, client_id: ClientId) -> None:
        """A client has left; it will not answer."""
        del self._attached_ns[client_id]
        for question, answer in self._open.items():
            if question.client_id == client_id and not answer.done():
                answer.set_exception(SessionClosed("it has left"))

    async def collect(self, client_id: ClientId, since_ns: int) -> list[Span]:
        """Returns the spans of a client that ended at a time or later, by this process's clock.

        Raises:
            TorchwaysError: there are none; the message says why, of "it".
        """
        begin = max(self._attached_ns.get(client_id, 0), min(since_ns, time.time_ns()))
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                found = await collect(lambda request: self._ask(client_id, request), begin, _read)
        except TimeoutError:
            raise DeadlineExceeded(f"it did not answer within {ANSWER_SECONDS:g} s") from None
        return list(accepted(client_id, found, begin, time.time_ns()))

    async def _ask(self, client_id: ClientId, request: pb.TraceRequest) -> AsyncIterator[pb.TraceResponse]:
        if client_id not in self._attached_ns:
            raise SessionClosed("it has left")
        question = _Question(client_id, next(self._numbers))
        answer = self._open[question] = asyncio.get_running_loop().create_future()
        try:
            wanted = pb.TraceWanted(number=question.number, request=request)
            self._tell(client_id, pb.ClusterEvent(trace_wanted=wanted))
            responses = await answer
        finally:
            self._open.pop(question, None)
        for response in responses:
            yield response

    async def take(self, client_id: ClientId, answers: AsyncIterator[pb.TraceAnswer]) -> None:
        """Takes a client's answer to one question.

        Raises:
            TorchwaysError: nobody has asked, or it is no answer.
            TimeoutError: it does not end.
        """
        async with asyncio.timeout(ANSWER_SECONDS):
            first = await anext(answers, None)
            number = first.number if first is not None else 0
            answer = self._open.pop(_Question(client_id, number), None)
            if first is None or answer is None:
                raise AccessDenied(f"nobody waits for answer {number} of client {client_id}")
            try:
                responses = await _read_answer(first, answers)
            except BaseException as error:
                why = error if isinstance(error, TorchwaysError) else SessionClosed("its answer broke off")
                if not answer.done():
                    answer.set_exception(why)
                raise
        if not answer.done():
            answer.set_result(responses)


async def _read_answer(first: pb.TraceAnswer, answers: AsyncIterator[pb.TraceAnswer]) -> list[pb.TraceResponse]:
    if not 0 <= first.response.now_ns < _MAX_NS:
        raise UserError("it has no time that could be")
    responses = [first.response]
    num_bytes, num_spans = first.ByteSize(), len(first.response.spans)
    async for item in answers:
        num_bytes, num_spans = num_bytes + item.ByteSize(), num_spans + len(item.response.spans)
        if num_bytes > _MAX_BYTES or num_spans > _MAX_SPANS:
            raise UserError(f"it sent more than {_MAX_SPANS:,} spans or {_MAX_BYTES:,} bytes")
        responses.append(item.response)
    return responses


def _read(message: pb.Span) -> Span:
    """Returns a span as a client sent it: of no action, which could not be one."""
    return Span(message.name, message.kind, message.start_ns, message.end_ns, message.run_id, kind=message.kind)


def accepted(client_id: ClientId, spans: Iterable[Span], begin_ns: int, end_ns: int) -> Iterator[Span]:
    """Returns what is believed of a client's spans: what is within a time, and the client's own."""
    for span in spans:
        start, end = max(span.start_ns, begin_ns), min(span.end_ns, end_ns)
        if span.kind in _KINDS and start <= end:
            run_id = span.run_id if owner(RunId(span.run_id)) == client_id else 0
            yield Span(span.name[:_MAX_NAME], span.kind, start, end, run_id, kind=span.kind, client_id=client_id)
