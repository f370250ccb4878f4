"""What the actions of a loop's schedule took in recent runs, from the executors' spans; in microseconds."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torchways.controller.variant import CallRuns, Variant
from torchways.ids import RunId
from torchways.ir.part import LoopInstruction, SendInstruction, SlicePart
from torchways.ir.program import Loop
from torchways.rpc.spans import Span
from torchways.schedules.actions import Action
from torchways.schedules.dry_run import Span as ActionSpan
from torchways.schedules.measured import MeasuredRun

_ARRIVAL = re.compile(r"receive edge (\d+)")


def measure(variant: Variant, calls: Sequence[CallRuns]) -> dict[int, list[MeasuredRun]]:
    """Returns how each loop of a variant ran in some of its calls, by the loop's number; waits until these are over.

    Runs that failed, and those whose spans an executor no longer has, are left out or incomplete: see `is_whole`.
    """
    return measured_loops(variant, calls, spans_of(variant, calls))


def spans_of(variant: Variant, calls: Sequence[CallRuns]) -> dict[str, list[Span]]:
    """Returns the spans of all processes since the first of some calls, by process; waits until these are over."""
    if not calls:
        return {}
    for call in calls:
        for run_id in call.run_ids:
            variant.session.runs.wait_for(run_id)
    return variant.session.collect_spans(min(call.started_ns for call in calls))


def measured_loops(
    variant: Variant, calls: Sequence[CallRuns], spans: Mapping[str, Sequence[Span]]
) -> dict[int, list[MeasuredRun]]:
    """Returns how each loop of a variant ran in some of its calls, given the spans of these; see `measure`."""
    if not calls:
        return {}
    found: dict[int, list[MeasuredRun]] = {}
    for position, piece in enumerate(variant.pieces):
        call_of = {call.run_ids[position]: number for number, call in enumerate(calls)}
        for loop in piece.lowered.program.nodes:
            if isinstance(loop, Loop):
                made_by = _made_by(piece.lowered.parts, loop.number)
                runs = _runs_of_loop(spans, call_of, loop.number, made_by)
                found[loop.number] = [run for _, run in sorted(runs.items())]
    return found


def is_whole(runs: Sequence[MeasuredRun], num_turns: int) -> bool:
    """Whether some runs, at least one, have spans of all turns of every stage and kind that any of them has."""
    actions = [{span.action for span in run.spans} for run in runs]
    kinds = {(action.stage, action.kind) for found in actions for action in found}
    return bool(kinds) and all(len(found) == len(kinds) * num_turns for found in actions)


def _runs_of_loop(
    spans: Mapping[str, Sequence[Span]], call_of: Mapping[RunId, int], number: int, made_by: Mapping[int, Action]
) -> dict[int, MeasuredRun]:
    """Returns how a loop ran, by call."""
    #: By call, action and process: the hosts of a slice all have spans of its actions.
    computed: dict[int, dict[Action, dict[str, list[ActionSpan]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    arrived: dict[int, list[tuple[Action, float]]] = defaultdict(list)
    for process, of_process in spans.items():
        for span in of_process:
            call = call_of.get(RunId(span.run_id))
            if call is None:
                continue
            if span.part_of is not None and span.part_of.loop == number and span.track == "device 0":
                action = span.part_of.action
                computed[call][action][process].append(ActionSpan(action, span.start_ns / 1e3, span.end_ns / 1e3))
            elif (edge := _ARRIVAL.fullmatch(span.name)) and int(edge[1]) in made_by:
                arrived[call].append((made_by[int(edge[1])], span.end_ns / 1e3))
    return {
        call: MeasuredRun(
            spans=tuple(span for processes in actions.values() for span in _slowest(processes.values())),
            transfers=tuple(
                max(0.0, time - max(span.end for span in _slowest(actions[action].values())))
                for action, time in arrived[call]
                if action in actions
            ),
        )
        for call, actions in computed.items()
    }


def _slowest(of_processes: Iterable[list[ActionSpan]]) -> list[ActionSpan]:
    return max(of_processes, key=lambda spans: spans[-1].end)


def _made_by(parts: Sequence[SlicePart], number: int) -> dict[int, Action]:
    """Returns the action that makes what each edge of a loop takes to another slice, for all turns."""
    found: dict[int, Action] = {}
    for part in parts:
        for loop in part.instructions:
            if not isinstance(loop, LoopInstruction) or loop.number != number:
                continue
            for turn in range(loop.num_turns):
                body = loop.bodies[-1] if turn == loop.num_turns - 1 else loop.bodies[0]
                for item in body.instructions:
                    if isinstance(item.instruction, SendInstruction):
                        edge = item.instruction.edge_id + turn * loop.edge_stride
                        found[edge] = Action(item.stage, item.kind, turn)
    return found
