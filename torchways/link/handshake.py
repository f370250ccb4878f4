"""How two processes prove to each other that they know their link's secret. Pure: bytes in, bytes out.

Four messages go to and fro:

    connecting -> accepting    magic, channel, both ids, the link's number, a nonce
    connecting <- accepting    a nonce, proof
    connecting -> accepting    proof
    connecting <- accepting    whether the connection is admitted

A proof is an HMAC over the role of the end that gives it, the first message and both nonces. So it serves for no other
connection, no other channel, no other pair of processes, and never for the other end.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable

from torchways.link.key import link_secret

_MAGIC = b"tw-link2"
_FIXED = struct.Struct("<8sBBB")  # magic, channel, bytes of the connecting and of the accepting end's id
_NUMBER = struct.Struct("<Q")
_NONCE_BYTES = 32
_PROOF_BYTES = 32

ADMITTED, REFUSED = b"\x01", b"\x00"


class HandshakeError(Exception):
    """The other end did not prove who it is, or refuses the connection."""


class Handshake:
    """One end's part. Give `receive` what comes, never more than `num_wanted` bytes in all, until `is_done`.

    Attributes:
        peer: id of the other end; of an accepting end once it is known.
        channel: which of the link's connections this is; of an accepting end once it is known.
        number: the link's: the connecting end opens each under a higher one; of an accepting end once it is known.
        num_wanted: how many more bytes the message that comes next has, at least one until it is done.
        is_done: the other end has proved who it is.
    """

    def __init__(self, me: str, peer: str, channel: int, num_wanted: int) -> None:
        self.me = me
        self.peer = peer
        self.channel = channel
        self.number = 0
        self.num_wanted = num_wanted
        self.is_done = False
        self._secret = b""
        self._message = bytearray()
        self._hello = b""
        self._nonces = b""
        self._on_message: Callable[[bytes], bytes]

    def receive(self, data: bytes) -> bytes:
        """Takes the next bytes; returns those to send.

        Raises:
            HandshakeError: they are wrong. The connection must be closed.
        """
        if self.is_done or len(data) > self.num_wanted:
            raise HandshakeError("it sent more than a handshake has")
        self._message += data
        self.num_wanted -= len(data)
        if self.num_wanted:
            return b""
        message, self._message = bytes(self._message), bytearray()
        return self._on_message(message)

    def _expect(self, num_bytes: int, on_message: Callable[[bytes], bytes]) -> None:
        self.num_wanted, self._on_message = num_bytes, on_message

    def _end(self) -> None:
        self.is_done, self.num_wanted = True, 0

    def _proof(self, role: bytes) -> bytes:
        return hmac.digest(self._secret, role + self._hello + self._nonces, hashlib.sha256)

    def _check(self, role: bytes, proof: bytes) -> None:
        if not hmac.compare_digest(self._proof(role), proof):
            raise HandshakeError("it does not know the link's secret")


class Connecting(Handshake):
    """The end that connects; send `first` to begin."""

    def __init__(self, me: str, peer: str, channel: int, key: bytes, number: int = 0) -> None:
        super().__init__(me, peer, channel, 0)
        self.number = number
        self._secret = link_secret(key, me, peer)
        mine, theirs = me.encode(), peer.encode()
        self._hello = _FIXED.pack(_MAGIC, channel, len(mine), len(theirs)) + mine + theirs + _NUMBER.pack(number)
        self._nonces = secrets.token_bytes(_NONCE_BYTES)
        self.first = self._hello + self._nonces
        self._expect(_NONCE_BYTES + _PROOF_BYTES, self._answered)

    def _answered(self, message: bytes) -> bytes:
        self._nonces += message[:_NONCE_BYTES]
        self._check(b"accepting", message[_NONCE_BYTES:])
        self._expect(1, self._judged)
        return self._proof(b"connecting")

    def _judged(self, message: bytes) -> bytes:
        if message != ADMITTED:
            raise HandshakeError(f"it refuses another connection of {self.me}")
        self._end()
        return b""


class Accepting(Handshake):
    """The end that is connected to. Once it is done, its shell must send ADMITTED or REFUSED.

    Args:
        key_of: returns the key that it has in common with who names itself so; raises HandshakeError if it has none.
    """

    def __init__(self, me: str, key_of: Callable[[str], bytes]) -> None:
        super().__init__(me, "", 0, 0)
        self._key_of = key_of
        self._expect(_FIXED.size, self._greeted)

    def _greeted(self, message: bytes) -> bytes:
        magic, self.channel, num_theirs, num_mine = _FIXED.unpack(message)
        if magic != _MAGIC:
            raise HandshakeError("it does not speak this protocol")
        self._hello = message
        size = num_theirs + num_mine + _NUMBER.size + _NONCE_BYTES
        self._expect(size, lambda rest: self._named(rest, num_theirs, num_mine))
        return b""

    def _named(self, message: bytes, num_theirs: int, num_mine: int) -> bytes:
        named, self._nonces = message[:-_NONCE_BYTES], message[-_NONCE_BYTES:]
        self._hello += named
        ids = named[: -_NUMBER.size]
        [self.number] = _NUMBER.unpack(named[-_NUMBER.size :])
        if ids[num_theirs:] != self.me.encode():
            raise HandshakeError("it looks for another process")
        try:
            self.peer = ids[:num_theirs].decode()
        except UnicodeDecodeError:
            raise HandshakeError("its id is not UTF-8") from None
        self._secret = link_secret(self._key_of(self.peer), self.me, self.peer)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        self._nonces += nonce
        self._expect(_PROOF_BYTES, self._proved)
        return nonce + self._proof(b"accepting")

    def _proved(self, message: bytes) -> bytes:
        self._check(b"connecting", message)
        self._end()
        return b""
