"""Links over real sockets: strangers at the listener, wrong bytes of a peer, and large frames in both directions."""

import contextlib
import os
import queue
import random
import select
import socket
import threading

import psutil
import pytest

from tests.unit.link.inboxes import serve
from torchways.link.connection import Frame
from torchways.link.frames import FrameError, Header, encode_header
from torchways.link.handshake import Accepting, Connecting, HandshakeError
from torchways.link.inbox import Inbox
from torchways.link.link import SMALL_BYTES, Link
from torchways.link.opening import BULK, PROMPT, Listener, open_channels

KEY = bytes(range(32))
TIMEOUT = 30


class End:
    """A process's end: what arrives, and why links are lost, is put into queues."""

    limits = {1: 128 << 20, 2: 100}  # noqa: RUF012

    def __init__(self, name, **options):
        self.arrived, self.lost, self.sent = queue.Queue(), queue.Queue(), queue.Queue()
        self.inbox = Inbox()
        self.listener = Listener(name, "127.0.0.1", KEY, **options)
        self.links = {}
        serve(self.inbox, self.flush)

    def flush(self):
        for link in self.links.values():
            link.flush()

    def connect(self, peer, address):
        def connect():
            self.links[peer] = Link(self.listener, peer, address, self.inbox, self)

        self.inbox.put(connect)

    def send(self, peer, kind, label, payload):
        frame = Frame(kind=kind, label=label, payload=memoryview(payload), on_sent=self.sent.put)
        self.inbox.put(lambda: self.links[peer].send(frame))

    # the link's Receiver

    def allocate(self, size):
        payload = bytearray(size)
        return payload, memoryview(payload)

    def on_frame(self, peer, header, payload):
        if header.kind == 2 and payload[:3] == b"bad":
            raise FrameError("it sent something bad")
        self.arrived.put((peer, header, payload))

    def on_open(self, link):
        pass

    def on_lost(self, link, reason):
        self.lost.put((link.peer, reason))


def linked(one="a", other="b"):
    ends = End(one), End(other)
    ends[0].connect(other, ends[1].listener.address)
    ends[1].connect(one, ends[0].listener.address)
    return ends


def assert_linked(a, b):
    a.send("b", 1, (0, 0, 1), b"to b")
    b.send("a", 1, (0, 0, 2), b"to a")
    assert a.arrived.get(timeout=TIMEOUT)[2] == b"to a"
    assert b.arrived.get(timeout=TIMEOUT)[2] == b"to b"
    assert a.sent.get(timeout=TIMEOUT) is None
    assert a.lost.empty()
    assert b.lost.empty()


def dial(end):
    host, port = end.listener.address.split(":")
    return socket.create_connection((host, int(port)), TIMEOUT)


def is_closed(connection):
    """Waits until the other end has closed a connection."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(4096):
            pass
    return True


def listening():
    return {item.laddr for item in psutil.Process().net_connections("tcp") if item.status == psutil.CONN_LISTEN}


def test_it_listens_at_the_address_that_it_is_told_and_no_other():
    before = listening()
    listener = Listener("a", "127.0.0.2", KEY)
    ((host, port),) = listening() - before
    assert host == "127.0.0.2"
    assert f"{host}:{port}" == listener.address


def test_strangers_that_come_first_do_not_keep_the_peer_out():
    a = End("a", stranger_seconds=1000)
    silent = [dial(a) for _ in range(10)]
    garbage = dial(a)
    garbage.sendall(b"GET / HTTP/1.1\r\n\r\n")
    impostor = dial(a)  # knows the protocol and the ids, but not the key
    impostor.sendall(Connecting("b", "a", 0, bytes(32)).first)
    assert impostor.recv(64)
    impostor.sendall(bytes(32))
    b = End("b")
    a.connect("b", b.listener.address)
    b.connect("a", a.listener.address)
    assert_linked(a, b)
    assert is_closed(garbage)
    assert is_closed(impostor)
    assert not select.select(silent, [], [], 0)[0]  # they may still say who they are


def test_a_stranger_that_says_nothing_is_closed_in_the_end():
    a = End("a", stranger_seconds=0.05)
    silent, slow = dial(a), dial(a)
    slow.sendall(b"tw")
    assert is_closed(silent)
    assert is_closed(slow)
    b = End("b", stranger_seconds=1000)
    a.connect("b", b.listener.address)
    b.connect("a", a.listener.address)
    assert_linked(a, b)


def test_of_too_many_strangers_the_oldest_goes():
    a = End("a", stranger_seconds=1000)
    strangers = [dial(a) for _ in range(100)]
    assert is_closed(strangers[0])
    b = End("b")
    a.connect("b", b.listener.address)
    b.connect("a", a.listener.address)
    assert_linked(a, b)
    assert len(a.listener._strangers) <= 64


def test_a_replayed_handshake_opens_nothing():
    a = End("a")
    recorded = []
    real = dial(a)
    end = Connecting("b", "a", 0, KEY)
    recorded.append(end.first)
    real.sendall(end.first)
    recorded.append(end.receive(real.recv(64, socket.MSG_WAITALL)))
    real.sendall(recorded[1])
    end.receive(real.recv(1))
    assert end.is_done
    again = dial(a)
    again.sendall(b"".join(recorded))
    assert len(again.recv(64, socket.MSG_WAITALL)) == 64
    assert again.recv(1) == b""


def test_a_second_connection_for_a_link_that_is_up_is_refused():
    a, b = linked()
    assert_linked(a, b)
    [number] = {a.links["b"].number, b.links["a"].number}
    for channel, other in ((PROMPT, number), (BULK, number), (PROMPT, number - 1), (7, number), (7, number + 1)):
        connection, end = dial(a), Connecting("b", "a", channel, KEY, other)
        connection.sendall(end.first)
        connection.sendall(end.receive(connection.recv(64, socket.MSG_WAITALL)))
        with pytest.raises(HandshakeError, match="refuses"):
            end.receive(connection.recv(1))
    assert_linked(a, b)


def test_a_listener_that_is_not_the_peer_is_found_out():
    impostor = socket.create_server(("127.0.0.1", 0))

    def answer():
        connection, _ = impostor.accept()
        end = Accepting("a", lambda _: bytes(32))
        while end.num_wanted != 32 or not end.peer:
            connection.sendall(end.receive(connection.recv(end.num_wanted)))
        connection.recv(100)

    threading.Thread(target=answer, daemon=True).start()
    b = End("b")
    b.connect("a", f"127.0.0.1:{impostor.getsockname()[1]}")
    b.send("a", 1, (0, 0, 0), b"secret")
    assert b.lost.get(timeout=TIMEOUT) == ("a", "it does not know the link's secret")
    assert b.sent.get(timeout=TIMEOUT) == "it does not know the link's secret"


def test_a_link_that_is_opened_anew_is_not_mixed_with_the_one_before():
    a, b = linked()
    assert_linked(a, b)
    anew = []
    a.listener.on_anew = lambda *event: anew.append(event)
    given_up = open_channels(Listener("b", "127.0.0.1", KEY), "a", a.listener.address)
    second = open_channels(Listener("b", "127.0.0.1", KEY), "a", a.listener.address)
    assert is_closed(given_up.prompt)
    assert is_closed(given_up.bulk)
    taken = a.listener.take("b", TIMEOUT)
    assert taken.number == second.number
    second.bulk.sendall(b"bulk")
    assert taken.bulk.recv(4, socket.MSG_WAITALL) == b"bulk"
    assert anew == [("b", given_up.number)]  # nobody had taken the one before the second
    assert_linked(a, b)


@pytest.mark.parametrize("name", ["a", "A"])
def test_only_ends_with_larger_ids_connect(name):
    a = End("a")
    connection, end = dial(a), Connecting(name, "a", PROMPT, KEY)
    connection.sendall(end.first)
    assert is_closed(connection)


def raw_peer(a, name="b"):
    """Returns the authenticated connections of a peer that may say anything on them."""
    listener = Listener(name, "127.0.0.1", KEY)
    a.connect(name, listener.address)
    return open_channels(listener, "a", a.listener.address)


WRONG = [
    (PROMPT, b"\xff" * 100, "a frame of unknown kind 255"),
    (PROMPT, encode_header(Header(2, (0, 0, 0), 101)), "announced 101 bytes, but a frame of kind 2 has at most 100"),
    (PROMPT, encode_header(Header(1, (0, 0, 0), SMALL_BYTES + 1)), "announced 65537 bytes"),
    (PROMPT, encode_header(Header(2, (0, 0, 0), 3)) + b"bad", "something bad"),
    (BULK, b"\xff" * 100, "a frame of unknown kind 255"),
    (BULK, encode_header(Header(1, (0, 0, 0), 1 << 60)), "announced 1152921504606846976 bytes"),
    (BULK, encode_header(Header(1, (0, 0, 0), 5)), "5 bytes where only large frames go"),
    (BULK, encode_header(Header(2, (0, 0, 0), 100)), "100 bytes where only large frames go"),
]


@pytest.mark.parametrize(("channel", "data", "reason"), WRONG)
def test_wrong_bytes_of_a_peer_lose_its_link_and_no_other(channel, data, reason):
    a, c = linked("a", "c")
    wrong = raw_peer(a)
    a.send("b", 1, (0, 0, 0), b"small")
    assert a.sent.get(timeout=TIMEOUT) is None
    wrong[channel].sendall(data)
    peer, why = a.lost.get(timeout=TIMEOUT)
    assert peer == "b"
    assert reason in why
    assert is_closed(wrong[PROMPT])
    assert is_closed(wrong[BULK])
    for size in (5, 1 << 20):  # what is sent to it now fails with the same reason
        a.send("b", 1, (0, 0, 0), bytes(size))
        assert a.sent.get(timeout=TIMEOUT) == why
    a.send("c", 1, (0, 0, 1), b"to c")
    assert c.arrived.get(timeout=TIMEOUT)[2] == b"to c"
    assert a.lost.empty()


def fuzz(count, seed):
    """Peers whose connections carry right frames and one with random bits flipped; each loses at most its link."""
    dice = random.Random(seed)
    a, c = linked("a", "c")
    num_sent = 0
    for number in range(count // 100):
        channels = raw_peer(a, f"b{number}")
        with contextlib.suppress(OSError):
            for _ in range(100):
                kind = dice.choice((1, 2))
                data = bytearray(dice.randbytes(dice.randrange(100)))
                data[:0] = encode_header(Header(kind, (0, 0, 0), len(data)))
                if dice.random() < 0.02:
                    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
                channels[PROMPT].sendall(data)
                num_sent += 1
            large = bytearray(encode_header(Header(1, (0, 0, 0), 100_000)) + bytes(100_000))
            large[dice.randrange(34)] ^= 1 << dice.randrange(8)
            channels[BULK].sendall(large)
        for channel in (PROMPT, BULK):
            channels[channel].close()
        assert a.lost.get(timeout=TIMEOUT)[0] == f"b{number}"
    a.send("c", 1, (0, 0, 1), b"to c")
    assert c.arrived.get(timeout=TIMEOUT)[2] == b"to c"
    assert num_sent


def test_fuzzed_frames():
    fuzz(500, 1)


@pytest.mark.slow
def test_ten_thousand_fuzzed_frames():
    fuzz(10_000, 2)


def test_large_frames_in_both_directions_at_once():
    a, b = linked()
    payloads = [os.urandom(64 << 20) for _ in range(2)]
    for number, payload in enumerate(payloads):
        a.send("b", 1, (0, 7, number), payload)
        b.send("a", 1, (0, 8, number), payload)
    a.send("b", 2, (1, 2, 3), b"small")
    arrived = [b.arrived.get(timeout=TIMEOUT) for _ in range(3)]
    small = [item for item in arrived if item[1].kind == 2]
    assert [(item[1].label, item[2]) for item in small] == [((1, 2, 3), b"small")]
    large = [item for item in arrived if item[1].kind == 1]
    large += [a.arrived.get(timeout=TIMEOUT) for _ in range(2)]
    for index, (_, header, payload) in enumerate(large):
        assert header.label == (0, 7 + index // 2, index % 2)  # those of one direction keep their order
        assert payload == payloads[index % 2]
    assert all(end.sent.get(timeout=TIMEOUT) is None for end in (a, a, a, b, b))


def test_what_a_peer_sent_before_its_end_still_arrives():
    a = End("a")
    channels = raw_peer(a)
    channels[BULK].close()
    channels[PROMPT].sendall(encode_header(Header(2, (0, 0, 1), 4)) + b"last")
    channels[PROMPT].close()
    assert a.arrived.get(timeout=TIMEOUT)[2] == b"last"
    assert a.lost.get(timeout=TIMEOUT) == ("b", "the connection was closed")


def test_a_peer_that_closes_one_connection_loses_the_link():
    for channel in (PROMPT, BULK):
        a = End("a")
        channels = raw_peer(a)
        channels[channel].close()
        assert a.lost.get(timeout=TIMEOUT) == ("b", "the connection was closed")
