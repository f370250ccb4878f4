"""The data plane: two real ends in this process, and ends whose peer is gone."""

import json
import queue
import socket
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.link.inboxes import serve
from torchways.errors import Failure
from torchways.executor.transfer import DataPlane, Outgoing, decode_failure, encode_failure
from torchways.ids import ClientId, RunId
from torchways.link.connection import Frame
from torchways.link.frames import FrameError
from torchways.link.inbox import Inbox
from torchways.link.link import SMALL_BYTES

KEY = bytes(range(32))


class End:
    """An executor's data plane whose events are put into queues."""

    def __init__(self, name):
        self.arrived, self.lost, self.sent = queue.Queue(), queue.Queue(), queue.Queue()
        self.name, self.inbox = name, Inbox()
        self.newest, self.broken = {}, queue.Queue()
        self.plane = DataPlane(
            name,
            "127.0.0.1",
            KEY,
            self.inbox,
            lambda *event: self.arrived.put(event),
            self.note_lost,
            lambda peer: self.newest.get(peer, {}),
            lambda *event: self.broken.put(event),
        )
        serve(self.inbox, self.plane.flush)

    def connect(self, peer, address):
        self.inbox.put(lambda: self.plane.connect(peer, address))

    def note_lost(self, peer, reason):
        self.lost.put((peer, reason))

    def send(self, peer, run_id, value):
        outgoing = Outgoing(run_id=RunId(run_id), edge_id=7, phase=1, value=value, on_sent=self.sent.put)
        self.inbox.put(lambda: self.plane.send(peer, outgoing))


def test_values_and_failures_arrive_in_both_directions():
    a, b = End("a"), End("b")
    a.connect("b", b.plane.address)
    b.connect("a", a.plane.address)
    values = [torch.tensor(3.5), torch.empty(0, 2), torch.arange(1_000_000), torch.tensor([True, False])]
    for sender, peer, receiver in ((a, "b", b), (b, "a", a)):
        for run_id, value in enumerate(values):
            sender.send(peer, run_id, value)
        failure = Failure(kind="RemoteError", message="m" * 10_000, run_id=5)
        sender.send(peer, 99, failure)
        arrived = {}
        for _ in range(len(values) + 1):
            assert sender.sent.get(timeout=20) is None
            origin, run_id, edge_id, phase, data = receiver.arrived.get(timeout=20)
            assert (origin, edge_id, phase) == (sender.name, 7, 1)
            arrived[run_id] = data
        for run_id, value in enumerate(values):
            assert torch.equal(arrived[run_id].view(value.dtype).reshape(value.shape), value)
        assert (arrived[99].kind, arrived[99].run_id) == ("RemoteError", 5)
        assert failure.message.startswith(arrived[99].message)


def test_more_than_the_socket_takes_at_once():
    """Nothing blocks and nothing is lost where both ends write far more than they read."""
    a, b = End("a"), End("b")
    a.connect("b", b.plane.address)
    b.connect("a", a.plane.address)
    value = torch.arange(1000, dtype=torch.int32)

    def send_all(end, peer):
        for run_id in range(5000):
            end.plane.send(peer, Outgoing(run_id=RunId(run_id), edge_id=0, phase=0, value=value + run_id))

    a.inbox.put(lambda: send_all(a, "b"))
    b.inbox.put(lambda: send_all(b, "a"))
    for end in (a, b):
        for expected in range(5000):
            _, run_id, _, _, data = end.arrived.get(timeout=30)
            assert run_id == expected
            assert int(data.view(torch.int32)[-1]) == 999 + run_id


def test_a_peer_that_is_gone_before_the_link_is_up():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for name, peer in (("a", "b"), ("b", "a")):  # the end that hosts the rendezvous, and the end that does not
        end = End(name)
        end.connect(peer, address)
        end.send(peer, 1, torch.ones(2))
        assert end.lost.get(timeout=20) == (peer, "it is gone")
        assert end.sent.get(timeout=20).kind == "ExecutorLost"


PEER = """
import sys, time, torch
from tests.unit.executor.test_transfer import End
end = End("b")
print(end.plane.address, flush=True)
end.connect("a", sys.stdin.readline().strip())
end.send("a", 1, torch.ones(2))
time.sleep(100)
"""


def test_a_peer_that_is_killed_ends_a_wait_for_it():
    a = End("a")
    peer = subprocess.Popen(
        [sys.executable, "-c", PEER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    try:
        address = peer.stdout.readline().strip()
        print(a.plane.address, file=peer.stdin, flush=True)
        a.connect("b", address)
        assert a.arrived.get(timeout=30)[:2] == ("b", 1)
        peer.kill()
        assert a.lost.get(timeout=10)[0] == "b"
    finally:
        peer.kill()
        peer.wait()


def test_large_values_in_both_directions_at_once():
    a, b = End("a"), End("b")
    a.connect("b", b.plane.address)
    b.connect("a", a.plane.address)
    value = torch.arange(16 << 20, dtype=torch.int32)
    for run_id in range(3):
        a.send("b", run_id, value + run_id)
        b.send("a", run_id, value - run_id)
    for end, sign in ((a, -1), (b, 1)):
        for run_id in range(3):
            _, arrived, _, _, data = end.arrived.get(timeout=30)
            assert arrived == run_id
            assert torch.equal(data.view(torch.int32), value + sign * run_id)


@given(
    st.builds(
        Failure, kind=st.text(), message=st.text(), traceback=st.text(max_size=20), run_id=st.integers(0, 2**64 - 1)
    ),
    st.sampled_from(["a", "\0", "\U0001f600", '"']),
    st.sampled_from([1, 5_000, 20_000]),
)
def test_failures_come_out_as_they_went_in_but_for_their_length(failure, character, count):
    assert decode_failure(encode_failure(failure)) == failure
    texts = dict.fromkeys(("kind", "message", "function", "source", "traceback", "process"), character * count)
    data = encode_failure(Failure(**texts))
    assert len(data) <= SMALL_BYTES
    assert texts["message"].startswith(decode_failure(data).message)


def test_a_failure_in_no_script_is_still_a_failure():
    assert decode_failure(encode_failure(Failure(kind="RemoteError", message="a\ud800b"))).message == "a?b"


def good_failure(**fields):
    return json.dumps({**asdict(Failure(kind="RemoteError", message="m")), **fields}).encode()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 60_000, "not JSON"),
        (b"1" * 10_000, "not JSON"),
        (b"[]", "without the fields kind, message"),
        (b'{"kind": "RemoteError"}', "without the fields"),
        (good_failure(more=1), "without the fields"),
        (good_failure(message=1), "whose message is wrong"),
        (good_failure(message="\ud800"), "whose message is wrong"),
        (good_failure(run_id=-1), "whose run_id is wrong"),
        (good_failure(run_id=1 << 64), "whose run_id is wrong"),
        (good_failure(run_id=True), "whose run_id is wrong"),
        (good_failure(run_id="1"), "whose run_id is wrong"),
    ],
)
def test_a_failure_that_is_none(data, text):
    with pytest.raises(FrameError, match=text):
        decode_failure(data)


@given(st.binary(max_size=200) | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(json.dumps))
def test_arbitrary_failures_raise_nothing_else(data):
    try:
        decode_failure(data if isinstance(data, bytes) else data.encode())
    except FrameError:
        pass


def test_a_wrong_failure_loses_the_link_and_nothing_else():
    a, b = End("a"), End("b")
    a.connect("b", b.plane.address)
    b.connect("a", a.plane.address)
    frame = Frame(kind=1, label=(0, 1, 2), payload=memoryview(b"{}"))
    b.inbox.put(lambda: b.plane._links["a"].send(frame))
    peer, reason = a.lost.get(timeout=20)
    assert peer == "b"
    assert "a failure without the fields kind" in reason
    c = End("c")
    a.connect("c", c.plane.address)
    c.connect("a", a.plane.address)
    a.send("c", 1, torch.ones(2))
    assert c.arrived.get(timeout=20)[:2] == ("a", 1)


def linked():
    """Returns two ends whose link has carried a value."""
    a, b = End("a"), End("b")
    a.connect("b", b.plane.address)
    b.connect("a", a.plane.address)
    a.send("b", 1, torch.ones(2))
    assert b.arrived.get(timeout=20)[:2] == ("a", 1)
    return a, b


def break_link(end, peer):
    """Breaks a link as a network does."""
    broken = threading.Event()

    def shutdown():
        end.plane._links[peer]._prompt._socket.shutdown(socket.SHUT_RDWR)
        broken.set()

    end.inbox.put(shutdown)
    assert broken.wait(20)


@pytest.mark.parametrize("times", [1, 5])
def test_a_link_that_broke_is_opened_anew_and_leaves_nothing(times):
    a, b = End("a"), End("b")
    a.newest["b"] = {ClientId(3): RunId(7)}
    for _ in range(times):
        a.connect("b", b.plane.address)
        b.connect("a", a.plane.address)
        for sender, peer, receiver in ((a, "b", b), (b, "a", a)):
            sender.send(peer, 1, torch.ones(2))
            assert receiver.arrived.get(timeout=20)[:2] == (sender.name, 1)
            assert sender.sent.get(timeout=20) is None
        assert b.broken.get(timeout=20) == ("a", {ClientId(3): RunId(7)})
        break_link(a, "b")
        assert [a.lost.get(timeout=20)[0], b.lost.get(timeout=20)[0]] == ["b", "a"]
    assert a.plane._links.keys() <= {"b"}
    assert a.broken.empty()


def test_the_end_that_connects_looks_for_its_peer_by_itself():
    """What the peer waits for may have failed here, and only a link tells."""
    a, b = linked()
    b.newest["a"] = {ClientId(3): RunId(7)}
    b.inbox.put(lambda: b.plane._opened.update(dict.fromkeys(b.plane._opened, 0.0)))  # it was good for a while
    break_link(b, "a")
    assert a.lost.get(timeout=20)[0] == "b"
    a.connect("b", b.plane.address)
    assert a.broken.get(timeout=20) == ("b", {ClientId(3): RunId(7)})


def test_the_end_that_waits_for_its_peer_tells_it_what_has_failed_by_itself():
    """A run may have failed here alone, and no later one need a link: the peer would wait for its values for ever."""
    a, b = linked()
    a.newest["b"] = {ClientId(3): RunId(7)}
    for end in (a, b):
        end.inbox.put(lambda end=end: end.plane._opened.update(dict.fromkeys(end.plane._opened, 0.0)))
    break_link(a, "b")
    assert b.broken.get(timeout=20) == ("a", {ClientId(3): RunId(7)})


def test_an_end_that_has_noticed_nothing_takes_the_new_link():
    a, _b = linked()
    silent = End("b")  # as if nothing of the old link's end had come to `a`
    silent.connect("a", a.plane.address)
    assert a.lost.get(timeout=20) == ("b", "its peer has given it up")
    silent.send("a", 2, torch.ones(2))
    assert a.arrived.get(timeout=20)[:2] == ("b", 2)


def test_a_link_that_no_thread_can_be_started_for_is_lost(monkeypatch):
    a = End("a")
    started = threading.Event()

    def connect():
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            a.plane.connect("b", "127.0.0.1:1")
            a.plane.send("b", outgoing)
        started.set()

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    outgoing = Outgoing(run_id=RunId(1), edge_id=7, phase=1, value=torch.ones(100_000), on_sent=a.sent.put)
    a.inbox.put(connect)
    assert started.wait(20)
    assert a.lost.get(timeout=20) == ("b", "no link could be opened: can't start new thread")
    assert a.sent.get(timeout=20).kind == "ExecutorLost"
