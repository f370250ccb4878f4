"""Frames as bytes: a header of fixed size, then a payload of the size that the header announces.

Pure. Nothing that a peer announces is believed before it is checked against what this end takes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

_HEADER = struct.Struct("<BBQQQ")  # kind, the label's three numbers, size of the payload

HEADER_BYTES = _HEADER.size

#: Three numbers whose meaning is the users' own: less than 2**8, 2**64 and 2**64.
Label: TypeAlias = tuple[int, int, int]
#: The kinds of frames that an end takes, and the largest payload of each, bytes.
Limits: TypeAlias = Mapping[int, int]


class FrameError(Exception):
    """What came is not a frame, or not one that this end takes."""


class Header(NamedTuple):
    """What stands before a payload.

    Attributes:
        kind: says what the payload is; less than 2**8.
        label: whose it is.
        size: of the payload, bytes.
    """

    kind: int
    label: Label
    size: int


def encode_header(header: Header) -> bytes:
    """Returns a header as `HEADER_BYTES` bytes."""
    return _HEADER.pack(header.kind, *header.label, header.size)


def decode_header(data: bytes | bytearray | memoryview, limits: Limits, offset: int = 0) -> Header:
    """Reads the header at `offset`.

    Raises:
        FrameError: `data` ends before it does, its kind is unknown, or its payload is too large.
    """
    try:
        kind, first, second, third, size = _HEADER.unpack_from(data, offset)
    except struct.error:
        raise FrameError(f"it sent {len(data) - offset} bytes where a header has {HEADER_BYTES}") from None
    limit = limits.get(kind)
    if limit is None:
        raise FrameError(f"it sent a frame of unknown kind {kind}")
    if size > limit:
        raise FrameError(f"it announced {size} bytes, but a frame of kind {kind} has at most {limit}")
    return Header(kind, (first, second, third), size)


class FrameReader:
    """Takes bytes as they come, in pieces of any size, and returns frames. It holds at most one unfinished frame."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._unread = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[tuple[Header, bytearray]]:
        """Yields the frames that are complete with `data`. The iterator must be used up before the next call.

        Raises:
            FrameError: what follows the frames so far is wrong. No more can be read.
        """
        unread = self._unread
        unread += data
        offset = 0
        while len(unread) - offset >= HEADER_BYTES:
            header = decode_header(unread, self._limits, offset)
            start = offset + HEADER_BYTES
            if len(unread) - start < header.size:
                break
            offset = start + header.size
            yield header, unread[start:offset]
        del unread[:offset]
