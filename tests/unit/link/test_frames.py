"""Frames: what is written is read again however it is cut, and wrong bytes are one documented error."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from torchways.link.frames import HEADER_BYTES, FrameError, FrameReader, Header, decode_header, encode_header

LIMITS = {0: 300, 1: 40, 200: 0}

labels = st.tuples(st.integers(0, 2**8 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
frames = st.sampled_from(sorted(LIMITS)).flatmap(
    lambda kind: st.tuples(st.just(kind), labels, st.binary(max_size=LIMITS[kind]))
)


def encoded(items):
    return b"".join(encode_header(Header(kind, label, len(data))) + data for kind, label, data in items)


def read_in_pieces(data, cuts):
    """Returns the frames in `data`, fed to a reader in pieces, and the error that ended it."""
    reader, found = FrameReader(LIMITS), []
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    try:
        for start, end in itertools.pairwise(places):
            found.extend((header, bytes(payload)) for header, payload in reader.feed(data[start:end]))
    except FrameError as error:
        return found, error
    return found, None


@given(st.lists(frames, max_size=8), st.lists(st.integers(0, 10_000), max_size=12))
def test_frames_come_out_as_they_went_in(items, cuts):
    found, error = read_in_pieces(encoded(items), cuts)
    assert error is None
    assert found == [(Header(kind, label, len(data)), data) for kind, label, data in items]


@given(st.lists(frames, min_size=1, max_size=4), st.data())
def test_a_truncated_stream_gives_the_frames_before_the_cut(items, data):
    whole = encoded(items)
    cut = data.draw(st.integers(0, len(whole) - 1))
    found, error = read_in_pieces(whole[:cut], [])
    assert error is None
    assert [payload for _, payload in found] == [payload for *_, payload in items][: len(found)]
    assert len(found) < len(items)


def check_wrong_bytes(data, cuts):
    found, _ = read_in_pieces(data, cuts)
    assert all(header.kind in LIMITS and len(payload) == header.size for header, payload in found)
    assert all(header.size <= LIMITS[header.kind] for header, _ in found)


@given(st.binary(max_size=500), st.lists(st.integers(0, 500), max_size=5))
@example(b"\xff" * 100, [])
def test_arbitrary_bytes_raise_nothing_else(data, cuts):
    check_wrong_bytes(data, cuts)


@given(st.lists(frames, min_size=1, max_size=6), st.integers(0, 100_000), st.lists(st.integers(0, 2_000), max_size=5))
def test_a_flipped_bit_raises_nothing_else(items, bit, cuts):
    whole = bytearray(encoded(items))
    bit %= 8 * len(whole)
    whole[bit // 8] ^= 1 << bit % 8
    check_wrong_bytes(bytes(whole), cuts)


def test_what_is_refused_is_said():
    with pytest.raises(FrameError, match="unknown kind 7"):
        decode_header(encode_header(Header(7, (0, 0, 0), 1)), LIMITS)
    with pytest.raises(FrameError, match=r"announced 41 bytes, but a frame of kind 1 has at most 40"):
        decode_header(encode_header(Header(1, (0, 0, 0), 41)), LIMITS)
    with pytest.raises(FrameError, match=f"3 bytes where a header has {HEADER_BYTES}"):
        decode_header(b"abc", LIMITS)


def test_a_payload_that_is_too_large_is_refused_before_it_comes():
    reader = FrameReader(LIMITS)
    with pytest.raises(FrameError, match="announced"):
        list(reader.feed(encode_header(Header(0, (0, 0, 0), 2**63))))
