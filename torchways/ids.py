"""Opaque identities, as types of their own so that a checker tells them apart."""

from __future__ import annotations

from typing import NamedTuple, NewType

IslandId = NewType("IslandId", int)
SliceId = NewType("SliceId", int)
ClientId = NewType("ClientId", int)
#: Unique in the cluster: the client's id is in the top bits (see `client_range`).
ProgramId = NewType("ProgramId", int)
RunId = NewType("RunId", int)
BufferId = NewType("BufferId", int)
#: "i0.e1": the first executor that island 0 started; ".h2" is added for host 2 of a set of devices of several hosts.
ExecutorId = NewType("ExecutorId", str)

_CLIENT_SHIFT = 40


class PartId(NamedTuple):
    """A program's part on one slice. An executor has several of one program where slices share its devices."""

    program_id: ProgramId
    slice_id: SliceId


class RunPart(NamedTuple):
    """A run of a part."""

    run_id: RunId
    slice_id: SliceId


def client_range(client_id: ClientId) -> tuple[int, int]:
    """Returns the half-open range of program, run and buffer ids that a client may name."""
    return client_id << _CLIENT_SHIFT, (client_id + 1) << _CLIENT_SHIFT


def owner(identity: int) -> ClientId:
    """Returns the client that made a program, run or buffer id."""
    return ClientId(identity >> _CLIENT_SHIFT)
