"""The handshake: both ends prove that they know the link's secret, and nothing else is taken for a proof."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchways.link.handshake import ADMITTED, REFUSED, Accepting, Connecting, HandshakeError
from torchways.link.key import checked_address, link_secret, signed_address

KEY = bytes(range(32))
ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


def key_of(peer):
    if peer == "stranger":
        raise HandshakeError("nobody knows it")
    return KEY


def feed(end, data):
    """Gives an end bytes as a shell does, never more than it wants; returns what it sends."""
    sent = b""
    while data and end.num_wanted:
        piece, data = data[: end.num_wanted], data[end.num_wanted :]
        sent += end.receive(piece)
    assert not data
    return sent


def meet(connecting, accepting):
    """Plays a handshake to its end; returns all that either end sent."""
    first = connecting.first
    second = feed(accepting, first)
    third = feed(connecting, second)
    assert feed(accepting, third) == b""
    feed(connecting, ADMITTED)
    return first, second, third


@given(ids, ids, st.integers(0, 255), st.data())
def test_ends_with_one_key_meet(one, other, channel, data):
    smaller, larger = sorted((one, other))
    if smaller == larger:
        larger += "x"
    connecting, accepting = Connecting(larger, smaller, channel, KEY), Accepting(smaller, key_of)
    messages = meet(connecting, accepting)
    assert connecting.is_done
    assert accepting.is_done
    assert (accepting.peer, accepting.channel) == (larger, channel)
    assert (connecting.num_wanted, accepting.num_wanted) == (0, 0)
    # In pieces of any size it is the same.
    again = Accepting(smaller, key_of)
    left, answer = messages[0], b""
    while left:
        size = data.draw(st.integers(1, min(len(left), again.num_wanted)))
        answer += again.receive(left[:size])
        left = left[size:]
    assert len(answer) == len(messages[1])
    assert answer != messages[1]  # its nonce is new


def test_an_end_that_has_ended_takes_nothing_more():
    connecting, accepting = Connecting("b", "a", 0, KEY), Accepting("a", key_of)
    meet(connecting, accepting)
    for end in (connecting, accepting):
        with pytest.raises(HandshakeError, match="more than a handshake has"):
            end.receive(b"x")


def test_a_connection_that_is_refused():
    connecting, accepting = Connecting("b", "a", 0, KEY), Accepting("a", key_of)
    feed(connecting, feed(accepting, connecting.first))
    with pytest.raises(HandshakeError, match="refuses another connection of b"):
        connecting.receive(REFUSED)


@given(st.binary(max_size=700))
def test_arbitrary_bytes_never_pass_and_raise_nothing_else(data):
    for end in (Accepting("a", key_of), Connecting("b", "a", 0, KEY)):
        left = data
        try:
            while left and end.num_wanted:
                end.receive(left[: end.num_wanted])
                left = left[end.num_wanted :]
        except HandshakeError:
            pass
        assert not end.is_done


@given(st.integers(0, 100_000))
@settings(max_examples=400)
def test_a_flipped_bit_in_any_message_fails_it(bit):
    connecting, accepting = Connecting("b", "a", 1, KEY), Accepting("a", key_of)
    turn, ends = 0, (accepting, connecting)
    sizes = (len(connecting.first), 64, 32, 1)
    bit %= 8 * sum(sizes)
    start, message = 0, connecting.first
    try:
        for turn, size in enumerate(sizes):
            assert len(message) == size
            if start <= bit // 8 < start + size:
                changed = bytearray(message)
                changed[bit // 8 - start] ^= 1 << bit % 8
                message = bytes(changed)
            start += size
            message = feed(ends[turn % 2], message) or ADMITTED
    except (HandshakeError, AssertionError):
        pass
    # The last byte is said by an end that has proved who it is: the other knows that already.
    assert not connecting.is_done
    assert turn == 3 or not accepting.is_done


def test_another_key_is_no_proof_for_either_end():
    connecting, accepting = Connecting("b", "a", 0, bytes(32)), Accepting("a", key_of)
    answer = feed(accepting, connecting.first)
    with pytest.raises(HandshakeError, match="does not know the link's secret"):
        feed(connecting, answer)
    with pytest.raises(HandshakeError, match="does not know the link's secret"):
        accepting.receive(connecting._proof(b"connecting"))


def test_a_proof_serves_for_no_other_connection():
    first, second, third = meet(Connecting("b", "a", 0, KEY), Accepting("a", key_of))
    replayed = Accepting("a", key_of)
    feed(replayed, first)
    with pytest.raises(HandshakeError, match="secret"):
        replayed.receive(third)
    connecting = Connecting("b", "a", 0, KEY)
    with pytest.raises(HandshakeError, match="secret"):
        connecting.receive(second)


def test_an_end_is_not_fooled_by_what_it_said_itself():
    accepting = Accepting("a", key_of)
    answer = feed(accepting, Connecting("b", "a", 0, KEY).first)
    with pytest.raises(HandshakeError, match="secret"):
        accepting.receive(answer[32:])  # its own proof, of the other role
    connecting = Connecting("b", "a", 0, KEY)
    with pytest.raises(HandshakeError, match="secret"):
        feed(connecting, connecting.first[-32:] + connecting._proof(b"connecting"))
    # Nor by what another of its connections said: each has a nonce of its own.
    other = Accepting("a", key_of)
    first = Connecting("b", "a", 0, KEY).first
    proofs = [feed(end, first)[32:] for end in (other, Accepting("a", key_of))]
    assert proofs[0] != proofs[1]
    with pytest.raises(HandshakeError, match="secret"):
        other.receive(proofs[1])


@pytest.mark.parametrize(
    ("me", "peer", "text"),
    [
        ("b", "c", "looks for another process"),
        ("stranger", "a", "nobody knows it"),
    ],
)
def test_wrong_ids(me, peer, text):
    with pytest.raises(HandshakeError, match=text):
        feed(Accepting("a", key_of), Connecting(me, peer, 0, KEY).first)


def test_wrong_beginnings():
    with pytest.raises(HandshakeError, match="does not speak this protocol"):
        feed(Accepting("a", key_of), b"GET / HTTP/")
    first = bytearray(Connecting("b", "a", 0, KEY).first)
    first[11] = 0xFF  # of its id
    with pytest.raises(HandshakeError, match="not UTF-8"):
        feed(Accepting("a", key_of), bytes(first))


def test_every_pair_has_its_own_secret():
    secrets = {link_secret(KEY, *pair) for pair in (("a", "b"), ("a", "c"), ("b", "c"), ("ab", "c"))}
    assert len(secrets) == 4
    assert link_secret(KEY, "b", "a") in secrets


def test_an_address_is_good_for_the_process_that_signed_it():
    signed = signed_address(KEY, "a", "127.0.0.1:5")
    assert checked_address(KEY, "a", signed) == "127.0.0.1:5"
    proof = signed.rpartition("/")[2]
    for forged in ("127.0.0.1:5", f"127.0.0.1:6/{proof}", "127.0.0.1:5/", "", "/", "127.0.0.1:5/\ud800", f"{signed} "):
        assert checked_address(KEY, "a", forged) is None
    assert checked_address(KEY, "b", signed) is None
    assert checked_address(bytes(32), "a", signed) is None
