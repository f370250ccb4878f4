"""Cutting: the operators of a placed graph become groups, one for each compiled function.

Each call of a user's compiled function is a group of its own. All other operators of one slice form as few groups as
the transfers between slices allow. Operators that another slice waits for are cut from those that none waits for, so
an optimizer's update never delays the gradient that the stage before needs. An optimizer's update is a group of its
own, which works in place. A region that is compiled once is a group for each call; so is its backward, and so is the
update of the parameters that one call alone reads: equal groups share a function.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from torchways.capture.partitioning.placed_graph import PlacedGraph
from torchways.capture.regions import LOOP_KEY, PART_KEY, REGION_KEY, UPDATE_KEY, LoopLabel, Region
from torchways.operators import EXIT
from torchways.schedules import Kind

#: Stand in for the number of a call: an update that comes after those of single calls' parameters, and one that
#: concerns the parameters of several calls.
_AFTER_OWNERS, _SEVERAL = -2, -3


class GroupKey(NamedTuple):
    """Operators with one key make one compiled function; keys sort in an order in which they can run."""

    phase: int
    late: bool
    update: bool
    slice_index: int
    call: int


@dataclass(slots=True)
class Group:
    """The operators of one compiled function, in order.

    Attributes:
        key: see `GroupKey`.
        nodes: the operators.
        loop: the loop's body that they are part of, if they are of one, and the stage and kind of their action.
    """

    key: GroupKey
    nodes: list[torch.fx.Node] = field(default_factory=list)
    loop: tuple[LoopLabel, int] | None = None
    action: tuple[int, Kind] = (0, Kind.FORWARD)


def cut(placed: PlacedGraph) -> list[Group]:
    """Returns the groups of a placed graph, in an order in which they can run."""
    _dissolve_calls_of_several_slices(placed)
    awaited = _awaited_elsewhere(placed)
    updates = _updates(placed)
    phase_of: dict[torch.fx.Node, int] = {}
    call_phase = _call_phases(placed, phase_of)
    # Operators that nobody awaits are in their slice's last phase: one computation, and one for the updates of state.
    last_phase: dict[int, int] = {}
    for node, phase in phase_of.items():
        last_phase[placed.slice_of[node]] = max(last_phase.get(placed.slice_of[node], 0), phase)
    owners = _owners(placed, awaited)
    groups: dict[GroupKey, Group] = {}
    group_of: dict[Any, Group] = {}
    for node in placed.operators:
        if node not in placed.slice_of or node in placed.apart or LOOP_KEY in node.meta:
            continue
        if node.target is operator.getitem:  # an item is made where its tuple is
            maker = group_of[node.args[0]]
            maker.nodes.append(node)
            group_of[node] = maker
            continue
        call = call_of(node)
        late = call < 0 and node not in awaited
        phase = call_phase[call] if call >= 0 else phase_of[node]
        if late:
            phase = last_phase[placed.slice_of[node]]
            call = owners.get(node, call)
        key = GroupKey(phase, late, late and (node in updates or node in owners), placed.slice_of[node], call)
        group_of[node] = groups.setdefault(key, Group(key))
        group_of[node].nodes.append(node)
    return [groups[key] for key in sorted(groups)]


def _dissolve_calls_of_several_slices(placed: PlacedGraph) -> None:
    """Takes the labels off a repeated region whose operators are on several slices: it is cut like all the rest."""
    slices: dict[int, set[int]] = {}
    for node in placed.operators:
        if call_of(node) >= 0 and node in placed.slice_of:
            slices.setdefault(call_of(node), set()).add(placed.slice_of[node])
    for node in placed.operators:
        if len(slices.get(call_of(node), ())) > 1:
            del node.meta[REGION_KEY]


def _call_phases(placed: PlacedGraph, phase_of: dict[torch.fx.Node, int]) -> dict[int, int]:
    """Fills in the phase of every placed operator; returns that of each function call.

    The phase of a node is above that of every node that it needs from another slice or call, and above those of the
    part of backward before its own.
    """
    call_phase: dict[int, int] = {}
    members: dict[int, list[torch.fx.Node]] = {}
    loop_phase: dict[LoopLabel, int] = {}
    part_phase: dict[tuple[int, int], int] = {}
    for node in placed.operators:
        if LOOP_KEY in node.meta:  # all of a loop comes after what any of it needs
            label = node.meta[LOOP_KEY][0]
            needed = [phase_of[item] + 1 for item in placed.placed_inputs(node) if item in phase_of]
            loop_phase[label] = max([loop_phase.get(label, 0), *needed])
            continue
        if node.target is EXIT:
            phase_of[node] = loop_phase[node.args[0][0].meta[LOOP_KEY][0]]
            continue
        if node not in placed.slice_of:
            continue
        part = (placed.slice_of[node], node.meta.get(PART_KEY, 0))
        call, phase = call_of(node), part_phase.get((part[0], part[1] - 1), -1) + 1
        for argument in placed.placed_inputs(node):
            if argument.op == "placeholder":
                continue
            other = call_of(argument)
            if call >= 0 and other == call:
                continue
            crosses = placed.slice_of[argument] != placed.slice_of[node] or call >= 0 or other >= 0
            crosses = crosses or node in placed.of_sums
            phase = max(phase, phase_of[argument] + crosses)
        if call >= 0:
            if phase > call_phase.get(call, -1):
                call_phase[call] = phase
                phase_of.update(dict.fromkeys(members.get(call, ()), phase))
            members.setdefault(call, []).append(node)
            phase = call_phase[call]
        phase_of[node] = phase
        if PART_KEY in node.meta:
            part_phase[part] = max(phase, part_phase.get(part, 0))
    return call_phase


def _owners(placed: PlacedGraph, awaited: set[torch.fx.Node]) -> dict[torch.fx.Node, int]:
    """Returns the call of a repeated region whose parameters alone an operator of the last phase serves.

    An operator that serves several comes before these computations, and has no owner. One that depends on them comes
    after all, and has the number `_AFTER_OWNERS`.
    """
    owner_of = {
        node: calls.pop()
        for node, spec in zip(placed.placeholders, placed.inputs, strict=True)
        if spec.is_state and len(calls := _repeated_calls(placed, node)) == 1
    }
    served: dict[torch.fx.Node, int] = {}  # the call that each node is read for; nodes that serve none are absent

    def serve(node: torch.fx.Node, owner: int) -> None:
        served[node] = owner if served.get(node, owner) == owner else _SEVERAL

    for number, position in enumerate(placed.written, start=placed.num_returned):
        if (owner := owner_of.get(placed.placeholders[position])) is not None:
            serve(placed.outputs[number], owner)
    if not served:
        return {}
    for node in reversed(placed.operators):
        for user in node.users:
            if user in served:
                serve(node, served[user])
    owners: dict[torch.fx.Node, int] = {}
    for node in placed.operators:
        if node in awaited or call_of(node) >= 0 or node not in placed.slice_of:
            continue
        if served.get(node, _SEVERAL) != _SEVERAL:
            owners[node] = served[node]
        elif any(argument in owners for argument in placed.placed_inputs(node)):
            owners[node] = _AFTER_OWNERS
    return owners


def _repeated_calls(placed: PlacedGraph, node: torch.fx.Node) -> set[int]:
    """Returns the calls of repeated regions, forward, that read a node, as it is or through nodes that float."""
    calls: set[int] = set()
    seen, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            region: Region | None = user.meta.get(REGION_KEY)
            if user not in placed.slice_of and user not in seen:
                seen.add(user)
                waiting.append(user)
            elif region is not None and region.is_repeated and not region.backward:
                calls.add(region.call)
    return calls


def _awaited_elsewhere(placed: PlacedGraph) -> set[torch.fx.Node]:
    """Returns the operators that some other slice or function call needs, directly or not."""
    awaited: set[torch.fx.Node] = set()
    for node in reversed(placed.operators):
        for user in node.users:
            if (
                user in awaited
                or user in placed.sums
                or (LOOP_KEY in user.meta and LOOP_KEY not in node.meta)
                or (
                    user in placed.slice_of
                    and node in placed.slice_of
                    and (placed.slice_of[user] != placed.slice_of[node] or call_of(user) >= 0)
                )
            ):
                awaited.add(node)
                break
    return awaited


def _updates(placed: PlacedGraph) -> set[torch.fx.Node]:
    """Returns the operators of optimizers' steps and all that depends on them.

    They are kept apart from forward and backward, so that updates are done in place. Where one computation reads
    parameters and replaces them, XLA's CPU compiler cannot tell that the old values are no longer needed when the new
    ones are written, and copies the donated buffers first. It also pairs donated buffers and results by size alone, in
    order. That fits where the order of results decides that of arguments, as it does in an update apart.
    """
    updates: set[torch.fx.Node] = set()
    for node in placed.operators:
        if UPDATE_KEY in node.meta or not updates.isdisjoint(node.all_input_nodes):
            updates.add(node)
    return updates


def call_of(node: torch.fx.Node) -> int:
    """Returns the function call that an operator belongs to, or -1."""
    region: Region | None = node.meta.get(REGION_KEY)
    return -1 if region is None or (region.backward and not region.is_repeated) else region.call
