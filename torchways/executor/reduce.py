"""Sums over several executors, without a star.

A large value is split into one part for each member: everybody sums its own part (reduce-scatter), and the sums of the
parts are exchanged (all-gather), so every member sends and receives about twice the value, however many there are. A
small one, which is latency and messages and not bytes, is exchanged whole: between pairs, in log2(n) rounds, where the
number of members is a power of two, else with everybody. All members add in one order: all have the same bits. (What
several slices of one executor bring is added before, as it comes: another run may have other last bits.)

Members say nothing to each other about when: what comes early is kept until this end starts.

A slice may have more hosts than another. Those that have no counterpart everywhere are no members: a member of their
slice gives them the sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from torchways.errors import Failure
from torchways.executor.broken import BrokenLinks
from torchways.executor.names import remember
from torchways.ids import ClientId, RunId, owner

_SMALL_BYTES = 64 << 10
#: Clients that are gone and are remembered, for pieces that come late.
_MAX_GONE = 100_000

_Key: TypeAlias = tuple[RunId, int]
_Piece: TypeAlias = torch.Tensor | Failure
#: Sends a piece to a peer: (peer, run, edge, phase, piece).
SendPiece: TypeAlias = Callable[[str, RunId, int, int, _Piece], None]


@dataclass(slots=True)
class _Reduction:
    """One sum under way. Before its start only what came early is known.

    Attributes:
        rounds: with whom this executor exchanges in each round, itself among them if it is a member.
        value: what it brings into the round that is under way.
        arrived: pieces by round and peer.
        is_claimed: a thread works on it.
        sent_bytes: that this executor sent to the others.
    """

    me: str = ""
    rounds: Sequence[tuple[str, ...]] = ()
    round: int = 0
    is_sent: bool = False
    value: _Piece | None = None
    is_large: bool = False
    numel: int = 0
    dtype: torch.dtype = torch.float32
    done: Callable[[torch.Tensor | None, Failure | None, int], None] | None = None
    arrived: dict[tuple[int, str], _Piece] = field(default_factory=dict)
    is_claimed: bool = False
    sent_bytes: int = 0

    def piece_for(self, peer: str) -> _Piece:
        """Returns what a peer gets in this round; for this executor itself, what it adds."""
        assert self.value is not None
        if not self.is_large or self.round > 0 or isinstance(self.value, Failure):
            return self.value
        return self.value[self._part(peer)]

    def _part(self, peer: str) -> slice:
        """Returns the part of a large value that a peer sums."""
        group = self.rounds[0]
        index, size = group.index(peer), -(-self.numel // len(group))
        return slice(min(index * size, self.numel), min((index + 1) * size, self.numel))

    def _checked(self, peer: str, piece: _Piece) -> _Piece:
        """Returns what a peer brings into this round, or a failure where its size is wrong."""
        if isinstance(piece, Failure):
            return piece
        numel = self.numel
        if self.is_large:
            part = self._part(self.me if self.round == 0 else peer)
            numel = part.stop - part.start
        expected = numel * self.dtype.itemsize
        if piece.nbytes == expected:
            return piece
        message = f"executor {peer} brought {piece.nbytes} bytes into round {self.round} of a sum, not {expected}"
        return Failure(kind="RemoteError", message=message, process=f"executor {self.me}")

    def fold(self, pieces: Mapping[str, _Piece]) -> None:
        """Ends a round; `pieces` has that of each member of its group, in order."""
        checked = [self._checked(peer, piece) for peer, piece in pieces.items()]
        failures = [piece for piece in checked if isinstance(piece, Failure)]
        if failures:
            self.value = failures[0]
        else:
            typed = [_typed(piece, self.dtype) for piece in checked]  # type: ignore[arg-type]
            try:
                self.value = torch.cat(typed) if self.is_large and self.round == 1 else _total(typed)
            except Exception as error:  # PyTorch cannot add what it is
                self.value = cannot_add(error, self.me)
        self.round, self.is_sent = self.round + 1, False


class Reducer:
    """This executor's end of all sums. Methods may be called on any thread."""

    def __init__(self, executor_id: str, send: SendPiece) -> None:
        self._me = executor_id
        self._send = send
        self._reductions: dict[_Key, _Reduction] = {}
        self._broken = BrokenLinks()
        self._gone: dict[ClientId, Failure] = {}
        self._lock = threading.Lock()

    def start(
        self,
        run_id: RunId,
        edge_id: int,
        members: tuple[str, ...],
        value: _Piece,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        done: Callable[[torch.Tensor | None, Failure | None, int], None],
    ) -> None:
        """Adds this executor's value.

        Args:
            run_id, edge_id: which sum.
            members: all executors that take part, in one order everywhere; or, for an executor that only gets the sum,
                the one that gives it (`give`).
            value: CPU tensor, or why there is none. Must not change until `done`: a small one is copied, of a large
                one all that is sent has arrived then.
            shape, dtype: of the value.
            done: called once with the sum, or with the failure of a member, and the bytes that this executor sent.
        """
        numel = torch.Size(shape).numel()
        is_large = self._me in members and len(members) > 1 and numel * dtype.itemsize > _SMALL_BYTES
        with self._lock:
            item = self._reductions.setdefault((run_id, edge_id), _Reduction())
            item.me, item.numel, item.dtype, item.done, item.is_large = self._me, numel, dtype, done, is_large
            item.value = value.reshape(-1) if isinstance(value, torch.Tensor) else value
            if not is_large and isinstance(item.value, torch.Tensor) and len(members) > 1:
                # The sum may be done while a frame still has the value, and then its buffer may be written to.
                item.value = item.value.clone()
            item.rounds = (members, members) if is_large else _small_rounds(members, self._me)
        self._go_on((run_id, edge_id))

    def give(self, peer: str, run_id: RunId, edge_id: int, total: torch.Tensor | Failure) -> None:
        """Gives a sum to an executor that is no member."""
        self._send(peer, run_id, edge_id, 1, total)

    def arrived(self, peer: str, run_id: RunId, edge_id: int, phase: int, piece: torch.Tensor | Failure) -> None:
        """Takes a peer's piece, bytes or a failure; `phase` counts its rounds from 1."""
        with self._lock:
            if self._broken.failure(peer, run_id) is not None:
                return  # its sum does not wait for it any more
            if owner(run_id) in self._gone and (run_id, edge_id) not in self._reductions:
                return  # no sum of this client starts any more, or it fails when it does
            self._reductions.setdefault((run_id, edge_id), _Reduction()).arrived[phase - 1, peer] = piece
        self._go_on((run_id, edge_id))

    def lose(self, peer: str, newest: Mapping[ClientId, RunId], failure: Failure) -> None:
        """Fails every sum that still waits for a peer, now and later, of runs up to these; see broken.py."""
        with self._lock:
            self._broken.note(peer, newest, failure)
            keys = list(self._reductions)
        for key in keys:
            self._go_on(key)

    def drop_client(self, client_id: ClientId, failure: Failure) -> None:
        """Fails a client's sums that wait for a piece, now and later, and forgets what came for those never started.

        Another executor may have learned of the client's end before it started its part, and will not.
        """
        with self._lock:
            self._broken.drop_client(client_id)
            remember(self._gone, client_id, failure, _MAX_GONE)
            keys = [key for key in self._reductions if owner(key[0]) == client_id]
            for key in [key for key in keys if not self._reductions[key].rounds]:
                del self._reductions[key]
        for key in keys:
            self._go_on(key)

    @property
    def num_open(self) -> int:
        """Sums that are not over."""
        return len(self._reductions)

    def _go_on(self, key: _Key) -> None:
        """Does what can be done; whoever brings the last piece of a round does its sum, on its own thread."""
        with self._lock:
            item = self._reductions.get(key)
            if item is None or not item.rounds or item.is_claimed:
                return  # a thread that has claimed it looks again
            item.is_claimed = True
        while True:
            group = item.rounds[item.round]
            others = [peer for peer in group if peer != item.me]
            if not item.is_sent:
                item.is_sent = True
                if item.me in group:
                    for peer in others:
                        if self._broken.failure(peer, key[0]) is None:
                            piece = item.piece_for(peer)
                            item.sent_bytes += piece.nbytes if isinstance(piece, torch.Tensor) else 0
                            self._send(peer, *key, 1 + item.round, piece)
            with self._lock:
                known = {peer: self._piece_of(item, peer, key[0]) for peer in others}
                if any(piece is None for piece in known.values()):
                    item.is_claimed = False
                    return
            item.fold({peer: item.piece_for(peer) if peer == item.me else known[peer] for peer in group})  # type: ignore[misc]
            if item.round == len(item.rounds):
                break
        with self._lock:
            del self._reductions[key]
        assert item.done is not None
        if isinstance(item.value, Failure):
            item.done(None, item.value, item.sent_bytes)
        else:
            item.done(item.value, None, item.sent_bytes)

    def _piece_of(self, item: _Reduction, peer: str, run_id: RunId) -> _Piece | None:
        piece = item.arrived.get((item.round, peer))
        if piece is not None:
            return piece
        return self._broken.failure(peer, run_id) or self._gone.get(owner(run_id))


def _small_rounds(members: tuple[str, ...], me: str) -> tuple[tuple[str, ...], ...]:
    """Returns the groups that exchange a small value: pairs at distances 1, 2, 4, ..., or all at once."""
    count = len(members)
    if me not in members or count < 4 or count & (count - 1):
        return (members,)
    index = members.index(me)
    pairs = [sorted((index, index ^ (1 << bit))) for bit in range(count.bit_length() - 1)]
    return tuple((members[low], members[high]) for low, high in pairs)


def cannot_add(error: Exception, executor_id: str) -> Failure:
    """Returns the failure of a sum whose values PyTorch does not add."""
    message = f"the values of a sum cannot be added: {error}"
    return Failure(kind="RemoteError", message=message, process=f"executor {executor_id}")


def _total(addends: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(addends) == 1:
        return addends[0].clone()
    total = addends[0] + addends[1]
    for addend in addends[2:]:
        total += addend
    return total


def _typed(piece: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return piece if piece.dtype == dtype else piece.view(dtype)
