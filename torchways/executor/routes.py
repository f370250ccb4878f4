"""Which hosts exchange the values of a part's edges.

A part names slices; a slice may have several hosts, each with an executor of its own. Every host of a slice holds all
values of the slice. So of the hosts of two slices, each receiving one needs a value from one sending host only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torchways.ir.part import (
    AllReduceInstruction,
    EdgeId,
    FlatPart,
    ReceiveInstruction,
    SendInstruction,
    SliceIndex,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SumRoute:
    """This executor's role in a sum.

    Attributes:
        members: the executors that add values, once for each slice that takes part. If this executor is not among
            them, it is the one executor that gives it the sum.
        followers: executors that get the sum from this one.
        num_local: how many of the slices that take part are on this executor's devices.
    """

    members: tuple[str, ...]
    followers: tuple[str, ...] = ()
    num_local: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """The executors at the other ends of a part's edges, as one host of the slice sees them.

    Attributes:
        targets: for each edge that the part sends over, the executors that get the value from this one; none if
            another host sends it.
        senders: for each edge that the part receives from, the executor that sends to this one.
        sums: for each sum, this executor's role.
    """

    targets: Mapping[EdgeId, tuple[str, ...]] = field(default_factory=dict)
    senders: Mapping[EdgeId, str] = field(default_factory=dict)
    sums: Mapping[EdgeId, SumRoute] = field(default_factory=dict)


def find_routes(part: FlatPart, executor_id: str, hosts: Mapping[SliceIndex, Sequence[str]]) -> Routes:
    """Returns the routes of one host of a part's slice.

    Host r of a receiving slice gets a value from host r, counted around, of the sending slice. Sums are taken between
    hosts of the same number. A host that has no counterpart in every slice gets sums from a host of its own slice.

    Args:
        part: names the edges.
        executor_id: the host's executor.
        hosts: the executors of each slice that the part names, in the order of its hosts.
    """
    mine = hosts[part.slice_index]
    me = mine.index(executor_id)
    targets: dict[EdgeId, tuple[str, ...]] = {}
    senders: dict[EdgeId, str] = {}
    sums: dict[EdgeId, SumRoute] = {}
    for instruction in part.instructions:
        match instruction:
            case SendInstruction():
                theirs = hosts[instruction.peer]
                targets[instruction.edge_id] = tuple(theirs[me :: len(mine)])
            case ReceiveInstruction():
                theirs = hosts[instruction.peer]
                senders[instruction.edge_id] = theirs[me % len(theirs)]
            case AllReduceInstruction():
                sums[instruction.edge_id] = _sum_route([hosts[member] for member in instruction.members], mine, me)
    return Routes(targets=targets, senders=senders, sums=sums)


def _sum_route(members: Sequence[Sequence[str]], mine: Sequence[str], me: int) -> SumRoute:
    count = min(map(len, members))
    return SumRoute(
        members=tuple(hosts[me] for hosts in members) if me < count else (mine[me % count],),
        followers=tuple(peer for r, peer in enumerate(mine) if r >= count and r % count == me),
        num_local=sum(mine[me] in hosts for hosts in members),
    )
