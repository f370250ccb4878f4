"""Opaque identities, as types of their own so that a checker tells them apart."""

from __future__ import annotations

from typing import NewType

IslandId = NewType("IslandId", int)
SliceId = NewType("SliceId", int)
ClientId = NewType("ClientId", int)
#: Unique in the cluster: the client's id is in the top bits (see `client_range`).
ProgramId = NewType("ProgramId", int)
RunId = NewType("RunId", int)
BufferId = NewType("BufferId", int)
#: "i0.s1": island 0, slice 1; ".h2" is added for host 2 of a slice of several hosts.
ExecutorId = NewType("ExecutorId", str)

_CLIENT_SHIFT = 40


def client_range(client_id: ClientId) -> tuple[int, int]:
    """Returns the half-open range of program, run and buffer ids that a client may name."""
    return client_id << _CLIENT_SHIFT, (client_id + 1) << _CLIENT_SHIFT


def owner(identity: int) -> ClientId:
    """Returns the client that made a program, run or buffer id."""
    return ClientId(identity >> _CLIENT_SHIFT)
