"""The data plane: two real ends in this process, and ends whose peer is gone."""

import queue
import socket
import subprocess
import sys
from pathlib import Path

import torch

from torchways.errors import Failure
from torchways.executor.transfer import DataPlane, Outgoing
from torchways.ids import RunId


class End:
    """An executor's data plane whose events are put into queues."""

    def __init__(self, name):
        self.arrived, self.lost, self.sent = queue.Queue(), queue.Queue(), queue.Queue()
        self.plane = DataPlane(name, "127.0.0.1", lambda *event: self.arrived.put(event), self.note_lost)

    def note_lost(self, peer, reason):
        self.lost.put((peer, reason))

    def send(self, peer, run_id, value):
        self.plane.send(peer, Outgoing(run_id=RunId(run_id), edge_id=7, phase=1, value=value, on_sent=self.sent.put))
        self.plane.flush()


def test_values_and_failures_arrive_in_both_directions():
    a, b = End("a"), End("b")
    a.plane.connect("b", b.plane.address)
    b.plane.connect("a", a.plane.address)
    values = [torch.tensor(3.5), torch.empty(0, 2), torch.arange(1_000_000), torch.tensor([True, False])]
    for sender, peer, receiver in ((a, "b", b), (b, "a", a)):
        for run_id, value in enumerate(values):
            sender.send(peer, run_id, value)
        failure = Failure(kind="RemoteError", message="m" * 10_000, run_id=5)
        sender.send(peer, 99, failure)
        for expected_id, value in enumerate(values):
            origin, run_id, edge_id, phase, data = receiver.arrived.get(timeout=20)
            assert (origin, run_id, edge_id, phase) == (sender.plane.executor_id, expected_id, 7, 1)
            assert torch.equal(data.view(value.dtype).reshape(value.shape), value)
            assert sender.sent.get(timeout=20) is None
        *_, received = receiver.arrived.get(timeout=20)
        assert (received.kind, received.run_id) == ("RemoteError", 5)
        assert failure.message.startswith(received.message)


def test_small_values_that_are_ready_together_share_a_frame():
    a, b = End("a"), End("b")
    a.plane.connect("b", b.plane.address)
    b.plane.connect("a", a.plane.address)
    for run_id in range(1000):
        a.plane.send("b", Outgoing(run_id=RunId(run_id), edge_id=0, phase=0, value=torch.tensor(run_id)))
    link = a.plane._links["b"]
    assert link._settled.wait(20)
    frames = []
    link._start = lambda data, tag, items, start=link._start: (frames.append(tag), start(data, tag, items))
    a.plane.flush()
    arrived = [b.arrived.get(timeout=20) for _ in range(1000)]
    assert [int(value.view(torch.int64)) for *_, value in arrived] == list(range(1000))
    assert len(frames) < 10


def test_a_peer_that_is_gone_before_the_link_is_up():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for name, peer in (("a", "b"), ("b", "a")):  # the end that hosts the rendezvous, and the end that does not
        end = End(name)
        end.plane.connect(peer, address)
        end.send(peer, 1, torch.ones(2))
        assert end.lost.get(timeout=20) == (peer, "it is gone")
        assert end.sent.get(timeout=20).kind == "ExecutorLost"


PEER = """
import sys, time, torch
from tests.unit.executor.test_transfer import End
end = End("b")
print(end.plane.address, flush=True)
end.plane.connect("a", sys.stdin.readline().strip())
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
        a.plane.connect("b", address)
        assert a.arrived.get(timeout=30)[:2] == ("b", 1)
        peer.kill()
        assert a.lost.get(timeout=10)[0] == "b"
    finally:
        peer.kill()
        peer.wait()
