"""What a program's plan says of its calls: where its functions run, what its transfers move, what its slices hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torchways.controller.reports.items import MemoryReport
from torchways.controller.variant import Variant, budgets_of
from torchways.ir.loops import unrolled
from torchways.ir.part import ComputeInstruction, EdgeId, LoopInstruction, SlicePart
from torchways.ir.program import (
    AllReduce,
    Arg,
    Compute,
    Loop,
    Node,
    Program,
    Transfer,
    ValueIndex,
    node_inputs,
    node_outputs,
)
from torchways.ir.sizes import logical_bytes
from torchways.passes.preflight import Peak, peak_memory
from torchways.passes.split import edges_of

#: How executors name what they issue as one: the first function, and how many more.
_UNIT = re.compile(r"(?P<first>.*) and (?P<more>\d+) more")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTransfer:
    """A transfer or a sum: all that are alike and have the same line; see `TransferReport`."""

    kind: Literal["transfer", "sum"]
    value: str
    slices: tuple[int, ...]
    source: str


@dataclass(slots=True)
class Plan:
    """What the spans of a program's runs mean.

    Attributes:
        slice_of: the slice of each compiled function, by its name.
        called: what each slice calls, in the order of its part: functions' names, with "" between those that an
            executor never issues as one.
        source_of: the line of each compiled function.
        sizes: the number of each planned transfer's runs in a call, and the bytes of their values.
        edges: for each piece of the program, the transfer that each edge belongs to.
        slices_of: the slices of each process with executors, "executor e1".
    """

    slice_of: dict[str, int] = field(default_factory=dict)
    called: list[list[str]] = field(default_factory=list)
    source_of: dict[str, str] = field(default_factory=dict)
    sizes: dict[PlannedTransfer, tuple[int, int]] = field(default_factory=dict)
    edges: list[dict[EdgeId, PlannedTransfer]] = field(default_factory=list)
    slices_of: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def place_of(self, name: str) -> tuple[int | None, str]:
        """Returns the slice and the lines of computations that executors issue as one, given their span's name."""
        found = _UNIT.fullmatch(name)
        first, num_more = (found["first"], int(found["more"])) if found else (name, 0)
        index = self.slice_of.get(first)
        if index is None:
            return None, ""
        names = [first]
        for called in self.called:
            for position, function in enumerate(called):
                unit = called[position : position + 1 + num_more]
                if function == first and len(unit) == 1 + num_more and "" not in unit:
                    names = unit
                    break
        lines = dict.fromkeys(self.source_of.get(name, "") for name in names)
        return index, ", ".join(line for line in lines if line)


def plan_of(variant: Variant) -> Plan:
    """Returns the plan of a variant, for the pieces that it dispatches."""
    plan = Plan()
    whole = variant.captured.program
    for index, mesh in enumerate(variant.meshes):
        for executor in variant.session.slices.address(mesh).executors:
            process = f"executor {executor.executor_id}"
            plan.slices_of[process] = (*plan.slices_of.get(process, ()), index)
    for piece in variant.pieces:
        program = piece.lowered.program
        for part in piece.lowered.parts:
            plan.slice_of.update((function.name, part.slice_index) for function in part.functions)
            plan.source_of.update((function.name, function.source) for function in part.functions)
            plan.called += _called(part)
        lines = {**_lines_of_values(whole), **_lines_of_values(program)}
        plan.edges.append(_planned_edges(program, lines, plan.sizes))
    return plan


def peaks_of(variant: Variant) -> tuple[MemoryReport, ...]:
    """Returns the most that each slice holds at a time; of pieces that run one after the other, the one with most."""
    peaks: dict[int, Peak] = {}
    for piece in variant.pieces:
        for part in piece.lowered.parts:
            if part.slots or part.instructions:
                peak = peak_memory(unrolled(part), piece.lowered.program.slices[part.slice_index])
                if part.slice_index not in peaks or peak.nbytes > peaks[part.slice_index].nbytes:
                    peaks[part.slice_index] = peak
    budgets, _ = budgets_of(variant.meshes, variant.session)
    return tuple(
        MemoryReport(
            slice_index=index,
            peak_bytes=peak.nbytes,
            budget_bytes=budgets.get(index, 0),
            function=peak.function,
            source=peak.source,
            largest=str(peak.largest),
            largest_bytes=peak.largest_nbytes,
        )
        for index, peak in sorted(peaks.items())
    )


def _called(part: SlicePart) -> Iterator[list[str]]:
    """Yields the names of the functions that a part calls, in order: its own, and those of each action of its loops."""
    names = [function.name for function in part.functions]

    def name_of(instruction: object) -> str:
        return names[instruction.function_index] if isinstance(instruction, ComputeInstruction) else ""

    yield [name_of(instruction) for instruction in part.instructions]
    for loop in part.instructions:
        if isinstance(loop, LoopInstruction):
            for body in loop.bodies:
                actions = dict.fromkeys((item.stage, item.kind) for item in body.instructions)
                for action in actions:
                    yield [name_of(item.instruction) for item in body.instructions if (item.stage, item.kind) == action]


# ---- transfers


def _planned_edges(
    program: Program, lines: Mapping[ValueIndex, str], sizes: dict[PlannedTransfer, tuple[int, int]]
) -> dict[EdgeId, PlannedTransfer]:
    """Returns the transfer that each edge of a program belongs to, and adds their numbers and bytes to `sizes`."""
    found: dict[EdgeId, PlannedTransfer] = {}
    readers = _readers(program)
    for edges in edges_of(program):
        node = edges.node
        value = program.values[node_inputs(node)[0]]
        match node:
            case Transfer():
                planned = PlannedTransfer(
                    kind="transfer",
                    value=str(value),
                    slices=(value.slice_index, program.values[node.output].slice_index),
                    source=lines.get(node.input) or readers.get(node.output, ""),
                )
            case AllReduce():
                planned = PlannedTransfer(
                    kind="sum",
                    value=str(value),
                    slices=tuple(program.values[item].slice_index for item in node.inputs),
                    source=node.source or lines.get(node.inputs[0], ""),
                )
        count, nbytes = sizes.get(planned, (0, 0))
        num_runs = len(edges.edge_ids)
        sizes[planned] = (count + num_runs, nbytes + num_runs * logical_bytes(value.dtype, value.shape))
        found.update(dict.fromkeys(edges.edge_ids, planned))
    return found


def _lines_of_values(program: Program) -> dict[ValueIndex, str]:
    """Returns the line that makes each value; none for arguments and what is moved."""
    found: dict[ValueIndex, str] = {}
    for node in _flat(program.nodes):
        match node:
            case Compute():
                line = program.functions[node.function_index].source
            case AllReduce() | Loop():
                line = node.source
            case _:
                continue
        found.update(dict.fromkeys(node_outputs(node), line))
    return found


def _readers(program: Program) -> dict[ValueIndex, str]:
    """Returns the line of the first computation that reads each value."""
    found: dict[ValueIndex, str] = {}
    for node in _flat(program.nodes):
        if isinstance(node, Compute):
            for value in node.inputs:
                found.setdefault(value, program.functions[node.function_index].source)
    return found


def _flat(nodes: Sequence[Node]) -> Iterator[Node]:
    """Yields nodes, and behind a loop those of its bodies."""
    for node in nodes:
        if not isinstance(node, Arg):
            yield node
        if isinstance(node, Loop):
            yield from (item.node for body in node.bodies for item in body.nodes)
