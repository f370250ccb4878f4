"""Sums over several executors, without a star: each sums its own part and gives it to all the others.

A large value is split into one part for each member (reduce-scatter), and the sums of the parts are exchanged
(all-gather), so every member sends and receives about twice the value, however many there are. A small one, which is
latency and not bytes, goes whole to everybody. Sums are taken in the order of the members: all have the same bits.

Members say nothing to each other about when: what comes early is kept until this end starts.

A slice may have more hosts than another. Those that have no counterpart everywhere are no members: a member of their
slice gives them the sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from torchways.errors import Failure
from torchways.ids import ClientId, RunId, owner

#: Phases, as messages carry them: a member's addend, and the sum of a part.
ADDEND, SUM = 1, 2
_SMALL_BYTES = 64 << 10

_Key: TypeAlias = tuple[RunId, int]
_Piece: TypeAlias = torch.Tensor | Failure
#: Sends a piece to a peer: (peer, run, edge, phase, piece).
SendPiece: TypeAlias = Callable[[str, RunId, int, int, _Piece], None]


@dataclass(slots=True)
class _Reduction:
    """One sum under way. Before its start only what came early is known."""

    members: tuple[str, ...] = ()
    value: _Piece | None = None
    numel: int = 0
    dtype: torch.dtype = torch.float32
    done: Callable[[torch.Tensor | None, Failure | None], None] | None = None
    addends: dict[str, _Piece] = field(default_factory=dict)
    sums: dict[str, _Piece] = field(default_factory=dict)
    #: A thread has taken the addends to sum them.
    is_summed: bool = False

    @property
    def is_large(self) -> bool:
        """Whether it goes in two phases."""
        return len(self.members) > 1 and self.numel * self.dtype.itemsize > _SMALL_BYTES

    def piece_of(self, value: _Piece, index: int) -> _Piece:
        """Returns what member `index` sums of a flat value."""
        if not self.is_large or isinstance(value, Failure):
            return value
        size = -(-self.numel // len(self.members))
        return value[min(index * size, self.numel) : min((index + 1) * size, self.numel)]


class Reducer:
    """This executor's end of all sums. Methods may be called on any thread."""

    def __init__(self, executor_id: str, send: SendPiece) -> None:
        self._me = executor_id
        self._send = send
        self._reductions: dict[_Key, _Reduction] = {}
        self._lost: dict[str, Failure] = {}
        self._lock = threading.Lock()

    def start(
        self,
        run_id: RunId,
        edge_id: int,
        members: tuple[str, ...],
        value: _Piece,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        done: Callable[[torch.Tensor | None, Failure | None], None],
    ) -> None:
        """Adds this executor's value.

        Args:
            run_id, edge_id: which sum.
            members: all executors that take part, in one order everywhere; or, for an executor that only gets the sum,
                the one that gives it (`give`).
            value: CPU tensor, or why there is none. Must not change until `done`.
            shape, dtype: of the value.
            done: called once with the sum, or with the failure of a member.
        """
        is_member = self._me in members
        numel = torch.Size(shape).numel()
        flat = value.reshape(-1) if isinstance(value, torch.Tensor) else value
        with self._lock:
            item = self._reductions.setdefault((run_id, edge_id), _Reduction())
            item.members, item.value, item.numel, item.dtype, item.done = members, flat, numel, dtype, done
            if is_member:
                item.addends[self._me] = item.piece_of(flat, members.index(self._me))
            for peer in members:
                if peer in self._lost:
                    item.addends.setdefault(peer, self._lost[peer])
                    item.sums.setdefault(peer, self._lost[peer])
        for index, peer in enumerate(members):
            if is_member and peer != self._me and peer not in self._lost:
                self._send(peer, run_id, edge_id, ADDEND, item.piece_of(flat, index))
        self._go_on((run_id, edge_id))

    def give(self, peer: str, run_id: RunId, edge_id: int, total: torch.Tensor | Failure) -> None:
        """Gives a sum to an executor that is no member."""
        self._send(peer, run_id, edge_id, ADDEND, total)

    def arrived(self, peer: str, run_id: RunId, edge_id: int, phase: int, piece: torch.Tensor | Failure) -> None:
        """Takes a peer's piece: bytes, or a failure."""
        with self._lock:
            item = self._reductions.setdefault((run_id, edge_id), _Reduction())
            (item.addends if phase == ADDEND else item.sums)[peer] = piece
        self._go_on((run_id, edge_id))

    def lose(self, peer: str, failure: Failure) -> None:
        """Fails every sum that still waits for a peer."""
        with self._lock:
            self._lost[peer] = failure
            keys = [key for key, item in self._reductions.items() if peer in item.members]
            for key in keys:
                self._reductions[key].addends.setdefault(peer, failure)
                self._reductions[key].sums.setdefault(peer, failure)
        for key in keys:
            self._go_on(key)

    def drop_client(self, client_id: ClientId) -> None:
        """Forgets what came for a client's sums that never started."""
        with self._lock:
            for key in [k for k, item in self._reductions.items() if not item.members and owner(k[0]) == client_id]:
                del self._reductions[key]

    @property
    def num_open(self) -> int:
        """Sums that are not over."""
        return len(self._reductions)

    def _go_on(self, key: _Key) -> None:
        """Does what can be done; whoever brings the last piece does the sum, on its own thread."""
        with self._lock:
            item = self._reductions.get(key)
            if item is None or not item.members or len(item.addends) < len(item.members):
                return
            first, item.is_summed = not item.is_summed, True
        if first:
            total = _total(item)
            with self._lock:
                item.sums[self._me] = total
                if not item.is_large:
                    item.sums.update({peer: total for peer in item.members})
            if item.is_large:
                for peer in item.members:
                    if peer != self._me and peer not in self._lost:
                        self._send(peer, *key, SUM, total)
            item.addends[self._me] = total
            item.value = None
        with self._lock:
            ready = item.value is None and item.sums.keys() >= set(item.members) and key in self._reductions
            if not ready:
                return
            del self._reductions[key]
        assert item.done is not None
        pieces = [item.sums[peer] for peer in item.members]
        failures = [piece for piece in pieces if isinstance(piece, Failure)]
        if failures:
            item.done(None, failures[0])
        elif item.is_large:
            item.done(torch.cat([_typed(piece, item.dtype) for piece in pieces]), None)  # type: ignore[arg-type]
        else:
            item.done(_typed(pieces[0], item.dtype), None)  # type: ignore[arg-type]


def _total(item: _Reduction) -> _Piece:
    addends = [item.addends[peer] for peer in item.members]
    for addend in addends:
        if isinstance(addend, Failure):
            return addend
    total = _typed(addends[0], item.dtype).clone()  # type: ignore[arg-type]
    for addend in addends[1:]:
        total += _typed(addend, item.dtype)  # type: ignore[arg-type]
    return total


def _typed(piece: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return piece if piece.dtype == dtype else piece.view(dtype)
