"""Copies of values that wait to be sent to clients."""

import pytest
import torch

from torchways.executor import reads as module
from torchways.executor.reads import Reads
from torchways.ids import client_range
from torchways.link.inbox import Inbox
from torchways.rpc import torchways_pb2 as pb

CLIENT = 1
FIRST_ID = client_range(CLIENT)[0]
VALUE_BYTES = 4 << 20


class Value:
    """What the engine gives who fetches."""

    nbytes = VALUE_BYTES

    def __init__(self):
        self.is_read = self.has_ended = False

    def read(self):
        assert not self.has_ended
        self.is_read = True
        return torch.zeros(VALUE_BYTES, dtype=torch.uint8)

    def end(self):
        self.has_ended = True


class EngineOfValues:
    """An engine whose fetches are answered by the test."""

    executor_id = "i0.e1"

    class runtime:
        shares_memory = True

    def __init__(self):
        self.inbox = Inbox()
        self.fetches = []

    def fetch(self, buffer_id, on_fetched):
        self.fetches.append(on_fetched)
        return len(self.fetches)

    def cancel_fetch(self, fetch_id):
        pass

    def call(self, work):
        pass


@pytest.fixture
def engine():
    return EngineOfValues()


def open_stream(reads, sent):
    stream = reads.open(CLIENT)
    stream.send = lambda message, on_sent: sent.append((pb.ReadAnswer.FromString(message), on_sent))
    stream.flush = lambda: None
    return stream


def request(stream, engine, read_id):
    stream._on_request(pb.ReadRequest(read_id=read_id, buffer_id=FIRST_ID))
    value = Value()
    engine.fetches[-1](value)
    return value


def take(sent):
    """The client takes all that was sent."""
    answers = []
    while sent:
        answer, on_sent = sent.pop(0)
        answers.append(answer)
        on_sent(None)
    return answers


def test_values_are_copied_as_those_before_are_sent(engine, monkeypatch):
    monkeypatch.setattr(module, "_MAX_COPIED_BYTES", 3 * VALUE_BYTES)
    sent = []
    stream = open_stream(Reads(lambda: engine), sent)
    values = [request(stream, engine, number) for number in range(10)]
    assert [value.is_read for value in values] == [True] * 3 + [False] * 7
    assert all(value.has_ended == value.is_read for value in values)  # the buffers of the others stay as they are
    answers = take(sent)
    assert sorted(answer.read_id for answer in answers if answer.is_last) == list(range(10))
    assert all(value.has_ended for value in values)


def test_one_value_may_be_larger_than_all_copies_may_be(engine, monkeypatch):
    monkeypatch.setattr(module, "_MAX_COPIED_BYTES", VALUE_BYTES // 2)
    sent = []
    stream = open_stream(Reads(lambda: engine), sent)
    values = [request(stream, engine, number) for number in range(2)]
    assert [value.is_read for value in values] == [True, False]
    assert sum(answer.is_last for answer in take(sent)) == 2


def test_what_is_given_up_holds_no_room_and_no_buffer(engine, monkeypatch):
    monkeypatch.setattr(module, "_MAX_COPIED_BYTES", VALUE_BYTES)
    sent = []
    reads = Reads(lambda: engine)
    lost, stream = open_stream(reads, []), open_stream(reads, sent)
    copied, waiting = request(lost, engine, 0), request(lost, engine, 1)
    kept, given_up, last = (request(stream, engine, number) for number in (2, 3, 4))
    assert copied.is_read
    assert not kept.is_read  # the client has its copies on another stream
    stream._on_request(pb.ReadRequest(read_id=3, give_up=True))
    assert given_up.has_ended
    lost._on_lost("for the test")
    assert waiting.has_ended
    assert not waiting.is_read
    assert kept.is_read
    assert {answer.read_id for answer in take(sent)} == {2, 4}
    assert last.has_ended
    stream._on_lost("for the test")
    assert not reads._copies
