"""Loops over microbatches: cuts their bodies into the actions of a pipeline's schedule.

Each operator of a body belongs to a stage and a kind: forward, or backward. Of backward, operators that another stage
waits for are input gradients (I), all others weight gradients (W); a schedule that does not tell them apart has them
as one (B). The operators of one action are one compiled function, but for regions that are functions of their own.
Bodies that no pipeline has split are one action; their turns run one after the other.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from torchways.capture.partitioning.cutting import Group, GroupKey, call_of
from torchways.capture.partitioning.placed_graph import PlacedGraph
from torchways.capture.regions import BACKWARD_KEY, LOOP_KEY, REGION_KEY, LoopLabel
from torchways.errors import ConfigError
from torchways.ir.program import ONE_AFTER_THE_OTHER
from torchways.schedules import UNIT_COSTS, Kind, Repeat, Schedule, compact, dry_run, find_schedule, make_schedule
from torchways.schedules.actions import Action


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopPlan:
    """How a loop runs.

    Attributes:
        label: the loop.
        bodies: the groups of each of its bodies.
        orders: the actions of each slice that takes part, by slice.
        schedule: the schedule's name, or ONE_AFTER_THE_OTHER.
        number: of the loop, in the order of the trace.
    """

    number: int
    label: LoopLabel
    bodies: list[list[Group]]
    orders: dict[int, tuple[Repeat, ...]]
    schedule: str


def plan_loops(placed: PlacedGraph, schedules: Mapping[int, Schedule] | None = None) -> list[LoopPlan]:
    """Returns the plans of all loops of a placed graph.

    Args:
        schedules: those of loops whose schedule is searched for, by number. One that has none yet gets the best for
            actions that all take the same time, with input and weight gradients apart.

    Raises:
        ConfigError: a schedule does not fit the stages.
    """
    nodes: dict[LoopLabel, dict[int, list[torch.fx.Node]]] = defaultdict(lambda: defaultdict(list))
    for node in placed.operators:
        if (loop := node.meta.get(LOOP_KEY)) is not None and node not in placed.apart and node in placed.slice_of:
            nodes[loop[0]][loop[1]].append(node)
    chosen = schedules or {}
    return [
        _plan(placed, label, [bodies[body] for body in sorted(bodies)], number, chosen.get(number))
        for number, (label, bodies) in enumerate(nodes.items())
    ]


def _plan(
    placed: PlacedGraph, label: LoopLabel, bodies: list[list[torch.fx.Node]], number: int, chosen: Schedule | None
) -> LoopPlan:
    slices = sorted({placed.slice_of[node] for nodes in bodies for node in nodes})
    stages = [_stages(placed, nodes) for nodes in bodies]
    if any(found is None for found in stages):
        order = tuple(compact([Action(0, Kind.FORWARD, turn) for turn in range(label.num_turns)]))
        groups = [_cut(placed, nodes, dict.fromkeys(nodes, (0, Kind.FORWARD))) for nodes in bodies]
        orders = dict.fromkeys(slices, order)
        return LoopPlan(number=number, label=label, bodies=groups, orders=orders, schedule=ONE_AFTER_THE_OTHER)
    replicas = _replicas(placed, [node for body in bodies for node in body])
    schedule = _schedule(label, {stage: homes[0] for stage, homes in replicas.items()}, chosen)
    has_backward = any(BACKWARD_KEY in node.meta for nodes in bodies for node in nodes)
    if has_backward and not schedule.has_backward:
        raise ConfigError(f"schedule {schedule.name} has no backward passes, but microbatches at {label.line} have")
    splits = schedule.splits_backward
    if not has_backward:
        schedule = schedule.forward()
    cut = []
    for nodes, found in zip(bodies, stages, strict=True):
        assert found is not None
        cut.append(_cut(placed, nodes, _actions(placed, nodes, found, splits=splits)))
    orders = {}
    for row in schedule.rows:
        orders.update(dict.fromkeys(replicas[row[0].stage], tuple(compact(row))))
    return LoopPlan(number=number, label=label, bodies=cut, orders=orders, schedule=schedule.name)


def _schedule(label: LoopLabel, homes: dict[int, int], chosen: Schedule | None) -> Schedule:
    """Returns the schedule of a loop, whose stages are on these slices."""
    num_stages, num_slices = len(homes), len(set(homes.values()))
    made: str | Schedule = label.schedule if chosen is None else chosen
    if label.is_automatic and chosen is None:
        rows = {home: row for row, home in enumerate(dict.fromkeys(homes[stage] for stage in range(num_stages)))}
        places = [rows[homes[stage]] for stage in range(num_stages)]
        made = find_schedule(places, label.num_turns, UNIT_COSTS, apart=True).schedule
    if isinstance(made, str):
        try:
            made = make_schedule(made, num_stages, num_slices, label.num_turns)
        except ConfigError as error:
            raise ConfigError(f"{error}, at {label.line}") from error
    if (made.num_stages, made.num_microbatches) != (num_stages, label.num_turns):
        raise ConfigError(
            f"schedule {made.name} has {made.num_stages} stages and {made.num_microbatches} microbatches, but the "
            f"pipeline at {label.line} has {num_stages} and {label.num_turns}"
        )
    row_of = made.slice_of_stage
    if len({(row_of[stage], home) for stage, home in homes.items()}) != max(num_slices, len(made.rows)):
        wanted = [[stage for stage, row in sorted(row_of.items()) if row == index] for index in range(len(made.rows))]
        raise ConfigError(
            f"schedule {made.name} needs stages {' and '.join(map(str, wanted))} on one slice each: give tw.pipeline "
            "its meshes in that order"
        )
    dry_run(made)
    return made


def _replicas(placed: PlacedGraph, nodes: list[torch.fx.Node]) -> dict[int, list[int]]:
    """Returns the slices of each stage of a body: one for each replica of the pipeline."""
    homes: dict[int, dict[int, int]] = defaultdict(dict)
    for node in nodes:
        region = node.meta.get(REGION_KEY)
        if region is not None and region.stage >= 0:
            homes[region.stage].setdefault(region.replica, placed.slice_of[node])
    return {stage: list(slices.values()) for stage, slices in homes.items()}


def _stages(placed: PlacedGraph, nodes: list[torch.fx.Node]) -> dict[torch.fx.Node, int] | None:
    """Returns the stage of each operator of a body; None: it is no pipeline.

    An operator that no stage has (of the loss, or of autograd's sums) belongs to the last stage on its slice that it
    reads from.
    """
    homes = _replicas(placed, nodes)
    if len(homes) < 2 or sorted(homes) != list(range(len(homes))):
        return None
    last_on = {home: stage for stage in sorted(homes) for home in homes[stage]}
    found: dict[torch.fx.Node, int] = {}
    for node in nodes:
        region = node.meta.get(REGION_KEY)
        home = placed.slice_of[node]
        if region is not None and home in homes.get(region.stage, ()):
            found[node] = region.stage
            continue
        read = [found[item] for item in placed.placed_inputs(node) if item in found and placed.slice_of[item] == home]
        if not read and home not in last_on:
            return None
        found[node] = max(read, default=last_on.get(home, 0))
    return found


def _actions(
    placed: PlacedGraph, nodes: list[torch.fx.Node], stages: dict[torch.fx.Node, int], *, splits: bool
) -> dict[torch.fx.Node, tuple[int, Kind]]:
    """Returns the stage and kind of each operator of a body."""
    backward: set[torch.fx.Node] = set()
    for node in nodes:
        if BACKWARD_KEY in node.meta or any(item in backward for item in placed.placed_inputs(node)):
            backward.add(node)
    awaited: set[torch.fx.Node] = set()
    readers: dict[torch.fx.Node, list[torch.fx.Node]] = defaultdict(list)
    for node in nodes:
        for item in placed.placed_inputs(node):
            readers[item].append(node)
    for node in reversed(nodes):
        if any(user in awaited or stages[user] != stages[node] for user in readers[node]):
            awaited.add(node)
    found = {}
    for node in nodes:
        kind = Kind.FORWARD
        if node in backward:
            kind = Kind.BACKWARD if not splits else Kind.INPUT if node in awaited else Kind.WEIGHT
        found[node] = (stages[node], kind)
    return found


def _cut(
    placed: PlacedGraph, nodes: list[torch.fx.Node], actions: dict[torch.fx.Node, tuple[int, Kind]]
) -> list[Group]:
    """Returns the groups of a body: one for each action and slice, unless that would make two wait for each other."""
    for by_phase in (False, True):
        groups = _grouped(placed, nodes, actions, by_phase=by_phase)
        ordered = _in_order(placed, groups)
        if ordered is not None:
            return ordered
    raise AssertionError("phases are an order")


def _grouped(
    placed: PlacedGraph,
    nodes: list[torch.fx.Node],
    actions: dict[torch.fx.Node, tuple[int, Kind]],
    *,
    by_phase: bool,
) -> list[Group]:
    phases = _phases(placed, nodes, actions) if by_phase else {}
    groups: dict[tuple[object, ...], Group] = {}
    group_of: dict[torch.fx.Node, Group] = {}
    for node in nodes:
        maker = node.args[0] if node.target is operator.getitem else None
        if isinstance(maker, torch.fx.Node) and maker in group_of:  # an item is made where its tuple is
            group = group_of[maker]
        else:
            call, home = call_of(node), placed.slice_of[node]
            key = (actions[node], home, call, phases.get(node, 0))
            group = groups.setdefault(
                key,
                Group(GroupKey(len(groups), False, False, home, call), loop=node.meta[LOOP_KEY], action=actions[node]),
            )
        group.nodes.append(node)
        group_of[node] = group
    return list(groups.values())


def _phases(
    placed: PlacedGraph, nodes: list[torch.fx.Node], actions: dict[torch.fx.Node, tuple[int, Kind]]
) -> dict[torch.fx.Node, int]:
    """Returns a number for each operator, above that of what it needs from another action, slice or call."""
    phases: dict[torch.fx.Node, int] = {}
    call_phase: dict[int, int] = {}
    members: dict[int, list[torch.fx.Node]] = defaultdict(list)
    for node in nodes:
        call, phase = call_of(node), 0
        for item in placed.placed_inputs(node):
            if item not in phases or (call >= 0 and call_of(item) == call):
                continue
            crosses = placed.slice_of[item] != placed.slice_of[node] or actions[item] != actions[node]
            phase = max(phase, phases[item] + (crosses or call >= 0 or call_of(item) >= 0))
        if call >= 0:
            call_phase[call] = phase = max(phase, call_phase.get(call, 0))
            members[call].append(node)
            phases.update(dict.fromkeys(members[call], phase))
        phases[node] = phase
    return phases


def _in_order(placed: PlacedGraph, groups: list[Group]) -> list[Group] | None:
    """Returns groups in an order in which they can run; None: there is none."""
    group_of = {node: index for index, group in enumerate(groups) for node in group.nodes}
    needs = [
        {group_of[item] for node in group.nodes for item in placed.placed_inputs(node) if item in group_of} - {index}
        for index, group in enumerate(groups)
    ]
    ordered: list[int] = []
    left = list(range(len(groups)))
    done: set[int] = set()
    while left:
        ready = next((index for index in left if needs[index] <= done), None)
        if ready is None:
            return None
        left.remove(ready)
        done.add(ready)
        ordered.append(ready)
    return [groups[index] for index in ordered]
