"""Sums between executors: any order of messages, any number of members, failures and lost peers."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchways.errors import Failure
from torchways.executor.local_sums import LocalSums
from torchways.executor.reduce import Reducer
from torchways.ids import ClientId, RunId


class World:
    """Members whose messages are delivered in an order that a test draws."""

    def __init__(self, count):
        self.names = tuple(f"e{index}" for index in range(count))
        self.messages, self.results, self.sent_bytes = [], {}, Counter()
        self.members = {name: Reducer(name, self.sender(name)) for name in self.names}

    def sender(self, name):
        def send(peer, run_id, edge_id, phase, piece):
            if isinstance(piece, torch.Tensor):
                self.sent_bytes[run_id, name] += piece.numel() * piece.element_size()
                piece = piece.clone().view(torch.uint8)  # as it arrives: bytes
            self.messages.append((peer, name, run_id, edge_id, phase, piece))

        return send

    def start(self, name, value, shape, run_id=1, members=None):
        def done(total, failure, sent_bytes):
            assert sent_bytes == self.sent_bytes[run_id, name]
            assert (run_id, name) not in self.results
            self.results[run_id, name] = failure if failure is not None else total.reshape(shape)

        self.members[name].start(RunId(run_id), 0, members or self.names, value, shape, torch.float32, done)

    def deliver(self, index):
        peer, name, *rest = self.messages.pop(index)
        self.members[peer].arrived(name, *rest)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 8), st.sampled_from([(), (3, 2), (0,), (40_000,), (7, 5_000)]))
def test_every_member_gets_the_same_sum_in_any_order(data, count, shape):
    world = World(count)
    values = [torch.randn(shape) for _ in range(count)]
    waiting = list(range(count))
    while waiting or world.messages:
        if waiting and (not world.messages or data.draw(st.booleans())):
            index = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            world.start(world.names[index], values[index], shape)
        else:
            world.deliver(data.draw(st.integers(0, len(world.messages) - 1)))
    expected = torch.stack(values).sum(0)
    totals = [world.results[1, name] for name in world.names]
    assert all(torch.equal(total, totals[0]) for total in totals)
    torch.testing.assert_close(totals[0], expected)
    assert all(member.num_open == 0 for member in world.members.values())


def test_a_small_sum_may_be_over_before_its_value_is_sent():
    """Its buffer may be written to then."""
    sent = []
    reducer = Reducer("a", lambda peer, run_id, edge_id, phase, piece: sent.append(piece))
    value, totals = torch.ones(4), []
    reducer.arrived("b", RunId(1), 0, 1, torch.ones(4).view(torch.uint8))
    reducer.start(RunId(1), 0, ("a", "b"), value, (4,), torch.float32, lambda total, *_: totals.append(total))
    value.fill_(7)
    assert torch.equal(totals[0], torch.full((4,), 2.0))
    assert torch.equal(sent[0], torch.ones(4))


def test_what_cannot_be_added_fails_its_sum():
    value, found = torch.ones(4, dtype=torch.float8_e4m3fn), []
    with pytest.raises(NotImplementedError):
        value + value
    reducer = Reducer("a", lambda *_: None)
    reducer.arrived("b", RunId(1), 0, 1, value.view(torch.uint8))
    reducer.start(RunId(1), 0, ("a", "b"), value, (4,), value.dtype, lambda total, failure, _: found.append(failure))
    assert "the values of a sum cannot be added" in found[0].message
    assert reducer.num_open == 0
    sums = LocalSums("a")
    tasks = [SimpleNamespace(run=SimpleNamespace(run_id=RunId(1))) for _ in range(2)]
    assert sums.add(tasks[0], 0, torch.ones(2), 2) is None
    failure = sums.add(tasks[1], 0, torch.ones(3), 2).total
    assert "the values of a sum cannot be added" in failure.message


@pytest.mark.parametrize("count", [2, 4, 8])
def test_no_member_sends_more_than_twice_the_value(count):
    world = World(count)
    numel = 1 << 20
    for name in world.names:
        world.start(name, torch.ones(numel), (numel,))
    while world.messages:
        world.deliver(0)
    assert torch.equal(world.results[1, "e0"], torch.full((numel,), float(count)))
    assert max(world.sent_bytes.values()) <= 2 * 4 * numel  # a star's centre would send count - 1 times


@pytest.mark.parametrize(("count", "messages"), [(2, 1), (3, 2), (4, 2), (6, 5), (8, 3)])
def test_a_small_sum_takes_a_logarithm_of_messages_where_it_can(count, messages):
    world = World(count)
    for name in world.names:
        world.start(name, torch.ones(2), (2,))
    while world.messages:
        world.deliver(0)
    assert all(world.results[1, name].tolist() == [count, count] for name in world.names)
    assert set(world.sent_bytes.values()) == {8 * messages}


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("given_total", [torch.arange(40_000.0), Failure(kind="RemoteError", message="boom")])
def test_an_executor_that_is_no_member_is_given_the_sum(early, given_total):
    world = World(2)

    def start():
        world.start("e1", torch.zeros(40_000), (40_000,), members=("e0",))

    if not early:
        start()
    world.members["e0"].give("e1", RunId(1), 0, given_total)
    world.deliver(0)
    if early:
        start()
    total = world.results[1, "e1"]
    assert total == given_total if isinstance(given_total, Failure) else torch.equal(total, given_total)
    assert world.messages == []
    assert world.members["e1"].num_open == 0


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(2, 8), st.sampled_from([(), (40_000,)]))
def test_a_poisoned_value_poisons_the_sum_everywhere(data, count, shape):
    world = World(count)
    failure = Failure(kind="RemoteError", message="boom")
    for index, name in enumerate(world.names):
        world.start(name, failure if index == count - 1 else torch.ones(shape), shape)
    while world.messages:
        world.deliver(data.draw(st.integers(0, len(world.messages) - 1)))
    assert all(world.results[1, name] == failure for name in world.names)
    assert all(member.num_open == 0 for member in world.members.values())


@pytest.mark.parametrize("shape", [(), (40_000,)])
@pytest.mark.parametrize("count", [3, 4, 8])
def test_a_lost_member_fails_sums_now_and_later(count, shape):
    world = World(count)
    lost = Failure(kind="ExecutorLost", message="executor e2 is lost")
    others = [name for name in world.names if name != "e2"]
    for name in others:
        world.start(name, torch.ones(shape), shape)
    for name in others:
        world.members[name].lose("e2", {ClientId(0): RunId(2)}, lost)
        world.start(name, torch.ones(shape), shape, run_id=2)
    while world.messages:
        peer, name, *rest = world.messages.pop(0)
        if peer != "e2":
            world.members[peer].arrived(name, *rest)
    assert all(world.results[run_id, name] == lost for run_id in (1, 2) for name in others)


def test_a_client_that_is_gone_leaves_nothing():
    world = World(2)
    run_id = (3 << 40) + 1
    world.start("e0", torch.ones(2), (2,), run_id=run_id)
    world.deliver(0)
    assert world.members["e1"].num_open == 1
    gone = Failure(kind="SessionClosed", message="the client is gone")
    world.members["e1"].drop_client(ClientId(3), gone)
    assert world.members["e1"].num_open == 0
    world.members["e0"].drop_client(ClientId(3), gone)  # "e1" will not bring its part
    assert world.results[run_id, "e0"] == gone
    world.start("e0", torch.ones(2), (2,), run_id=run_id + 1)  # it was on its way
    assert world.results[run_id + 1, "e0"] == gone
    while world.messages:  # what comes late is for nobody
        world.deliver(0)
    assert [member.num_open for member in world.members.values()] == [0, 0]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 5), st.sampled_from([(3,), (40_000,)]), st.integers(0, 300_000))
def test_a_piece_of_the_wrong_size_fails_its_sum_and_nothing_else(data, count, shape, size):
    """In any round; to the other members it is a failure like any other."""
    world = World(count)
    values = [torch.ones(shape) for _ in range(count)]
    for name, value in zip(world.names, values, strict=True):
        world.start(name, value, shape)
    wrong = data.draw(st.integers(0, 2 * count))
    number = 0
    changed = None
    while world.messages:
        index = data.draw(st.integers(0, len(world.messages) - 1))
        peer, name, run_id, edge_id, phase, piece = world.messages[index]
        if number == wrong and isinstance(piece, torch.Tensor) and piece.numel() != size:
            world.messages[index] = (peer, name, run_id, edge_id, phase, torch.zeros(size, dtype=torch.uint8))
            changed = peer
        number += 1
        world.deliver(index)
    assert all((1, name) in world.results for name in world.names)
    if changed is not None:
        result = world.results[1, changed]
        assert isinstance(result, Failure)
        assert f"brought {size} bytes into round" in result.message
