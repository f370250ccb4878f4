"""From the spans of a program's recent calls to what its nodes took, why it waited, and what one call looked like."""

from __future__ import annotations

import itertools
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torchways.controller.reports.items import LineReport, NodeKind, NodeReport, TimelineBar, WaitReport
from torchways.controller.reports.planned import Plan, PlannedTransfer
from torchways.controller.variant import CallRuns
from torchways.ids import RunId
from torchways.rpc.spans import Span

#: At the end of a name, an action of a pipeline's schedule, with its microbatch or without.
_ACTION = re.compile(r" (\d+[FBIW])\d*$")
#: The most bars of a timeline; the longest are kept.
_MAX_BARS = 2_000

_K = TypeVar("_K")
#: A process, and the track of it.
_Lane = tuple[str, str]


@dataclass(slots=True)
class _Taken:
    """What something took in a call, by process and track: of those of several hosts, the slowest counts."""

    total_ns: dict[_Lane, int] = field(default_factory=lambda: defaultdict(int))
    count: dict[_Lane, int] = field(default_factory=lambda: defaultdict(int))
    longest_ns: int = 0

    def add(self, lane: _Lane, nanoseconds: int) -> None:
        self.total_ns[lane] += nanoseconds
        self.count[lane] += 1
        self.longest_ns = max(self.longest_ns, nanoseconds)

    @property
    def us(self) -> float:
        return max(self.total_ns.values(), default=0) / 1e3

    @property
    def num_runs(self) -> int:
        return max(self.count.values(), default=0)


@dataclass(slots=True)
class _Call:
    """A call as its spans show it."""

    send_ns: int
    computed: dict[str, _Taken] = field(default_factory=lambda: defaultdict(_Taken))
    moved: dict[PlannedTransfer, _Taken] = field(default_factory=lambda: defaultdict(_Taken))
    sent_bytes: dict[PlannedTransfer, int] = field(default_factory=lambda: defaultdict(int))
    waits: dict[tuple[str, str], _Taken] = field(default_factory=lambda: defaultdict(_Taken))
    #: Its computations, transfers and sums: process, span, and the transfer or sum.
    work: list[tuple[str, Span, PlannedTransfer | None]] = field(default_factory=list)
    last_arrival_ns: int = 0

    @property
    def start_ns(self) -> int:
        return min(span.start_ns for _, span, _ in self.work)

    @property
    def end_ns(self) -> int:
        return max(self.last_arrival_ns, *(span.end_ns for _, span, _ in self.work))

    @property
    def us(self) -> float:
        return (self.end_ns - self.start_ns) / 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What recent calls took. See `ProgramReport`, whose attributes these are.

    Attributes:
        transfer_us, sent_bytes: of each planned transfer in a call, medians.
    """

    num_calls: int = 0
    call_us: float | None = None
    interval_us: float | None = None
    send_us: float | None = None
    nodes: tuple[NodeReport, ...] = ()
    lines: tuple[LineReport, ...] = ()
    waits: tuple[WaitReport, ...] = ()
    timeline: tuple[TimelineBar, ...] = ()
    transfer_us: Mapping[PlannedTransfer, float] = field(default_factory=dict)
    sent_bytes: Mapping[PlannedTransfer, float] = field(default_factory=dict)


def measured(name: str, calls: Sequence[CallRuns], spans: Mapping[str, Sequence[Span]], plan: Plan) -> Measured:
    """Returns what some calls of a program took.

    A call whose spans are incomplete is left out: a run of it failed, or a process no longer has them.

    Args:
        name: the program's.
        calls: in the order in which they were sent.
        spans: of all processes since the first of the calls, by process.
        plan: of the program.
    """
    found = [_Call(send_ns=call.sent_ns - call.started_ns) for call in calls]
    place = {
        run_id: (number, position) for number, call in enumerate(calls) for position, run_id in enumerate(call.run_ids)
    }
    for process, of_process in spans.items():
        for span in of_process:
            where = place.get(RunId(span.run_id))
            if where is not None:
                _take(found[where[0]], plan, where[1], process, span)
            elif not span.run_id and span.kind in ("room", "read"):
                _take_client_wait(name, calls, found, span)
    most = max((len(call.work) for call in found), default=0)
    whole = [call for call in found if most and len(call.work) == most]
    if not whole:
        return Measured()
    call_us = statistics.median(call.us for call in whole)
    transfer_us = {
        key: statistics.median(call.moved[key].us for call in whole) for key in _keys(c.moved for c in whole)
    }
    nodes = [*_computed(whole, plan, call_us), *_moved(plan, transfer_us, call_us)]
    nodes.sort(key=lambda node: -(node.time_us or 0))
    return Measured(
        num_calls=len(whole),
        call_us=call_us,
        interval_us=_interval_us(whole),
        send_us=statistics.median(call.send_ns for call in whole) / 1e3,
        nodes=tuple(nodes),
        lines=lines_of(nodes, call_us),
        waits=_waits(whole),
        timeline=_timeline(sorted(whole, key=lambda call: call.us)[(len(whole) - 1) // 2], plan),
        transfer_us=transfer_us,
        sent_bytes={key: statistics.median(call.sent_bytes[key] for call in whole) for key in transfer_us},
    )


def lines_of(nodes: Iterable[NodeReport], call_us: float) -> tuple[LineReport, ...]:
    """Returns what the nodes of each line take together, the most first."""
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for node in nodes:
        if node.time_us is not None:
            times[node.source][node.kind != "compute"] += node.time_us
    lines = [
        LineReport(
            source=source,
            compute_us=computing,
            transfer_us=moving,
            share=(computing + moving) / call_us if call_us else 0.0,
        )
        for source, (computing, moving) in times.items()
    ]
    return tuple(sorted(lines, key=lambda line: -line.share))


# ---- from spans


def _take(call: _Call, plan: Plan, piece: int, process: str, span: Span) -> None:
    """Counts a span of a run of a call."""
    taken_ns, lane = _length(span), (process, span.track)
    match span.kind:
        case "compute" if span.track == "device 0":  # the other devices do the same
            call.computed[_node_of(span.name)].add(lane, taken_ns)
            call.work.append((process, span, None))
        case "send" | "sum" if span.edge_id in plan.edges[piece]:
            planned = plan.edges[piece][span.edge_id]
            call.moved[planned].add(lane, taken_ns)
            call.sent_bytes[planned] += span.sent_bytes
            call.work.append((process, span, planned))
        case "receive":
            call.last_arrival_ns = max(call.last_arrival_ns, span.end_ns)
        case "held":
            reason = span.name.partition(" held: ")[2] or "room on its devices"
            call.waits[f"held by the scheduler for {reason}", process].add(lane, taken_ns)
        case "input":
            computation = span.name.removeprefix("inputs of ")
            index, _ = plan.place_of(_function_of(computation))
            reason = f"idle until the inputs of {_node_of(computation)} come"
            call.waits[reason, _slices(plan, process) if index is None else f"@{index}"].add(lane, taken_ns)
        case "grant":
            reason = span.name.rpartition(": ")[2]
            call.waits[f"their grants: {reason}", _slices(plan, process)].add(lane, taken_ns)
        case "memory":
            call.waits["device memory", _slices(plan, process)].add(lane, taken_ns)


def _take_client_wait(name: str, calls: Sequence[CallRuns], found: Sequence[_Call], span: Span) -> None:
    """Counts a wait of the script: for room while it sent a call, or for arrays until it sent the next one."""
    for number in reversed(range(len(calls))):
        if span.start_ns >= calls[number].started_ns:
            lane = ("controller", span.track)
            if span.kind == "read":
                found[number].waits["reads of arrays, until the next call", "script"].add(lane, _length(span))
            elif span.name.startswith(f"{name} ") and span.start_ns <= calls[number].sent_ns:
                found[number].waits["too many runs in flight", "script"].add(lane, _length(span))
            return


def _length(span: Span) -> int:
    return span.end_ns - span.start_ns


def _node_of(computation: str) -> str:
    """Returns the name of a computation without its microbatch."""
    return _ACTION.sub(r" \1", computation)


def _function_of(computation: str) -> str:
    """Returns the name of a computation without the action of a schedule."""
    return _ACTION.sub("", computation)


def _slices(plan: Plan, process: str) -> str:
    return ", ".join(f"@{index}" for index in plan.slices_of.get(process, ())) or process


# ---- to what is reported


def _keys(of_calls: Iterable[Mapping[_K, Any]]) -> list[_K]:
    return list(dict.fromkeys(key for found in of_calls for key in found))


def _interval_us(calls: Sequence[_Call]) -> float | None:
    pairs = itertools.pairwise(sorted(call.end_ns for call in calls))
    return statistics.median((later - earlier) / 1e3 for earlier, later in pairs) if len(calls) > 1 else None


def _computed(calls: Sequence[_Call], plan: Plan, call_us: float) -> Iterable[NodeReport]:
    for name in _keys(call.computed for call in calls):
        time_us = statistics.median(call.computed[name].us for call in calls)
        index, source = plan.place_of(_function_of(name))
        yield NodeReport(
            kind="compute",
            name=name,
            slices=() if index is None else (index,),
            source=source,
            num_runs=max(call.computed[name].num_runs for call in calls),
            time_us=time_us,
            share=time_us / call_us if call_us else None,
        )


def _moved(plan: Plan, transfer_us: Mapping[PlannedTransfer, float], call_us: float) -> Iterable[NodeReport]:
    for planned, (num_runs, _) in plan.sizes.items():
        time_us = transfer_us.get(planned)
        yield NodeReport(
            kind=planned.kind,
            name=planned.value,
            slices=planned.slices,
            source=planned.source,
            num_runs=num_runs,
            time_us=time_us,
            share=None if time_us is None or not call_us else time_us / call_us,
        )


def _waits(calls: Sequence[_Call]) -> tuple[WaitReport, ...]:
    reports = [
        WaitReport(
            reason=reason,
            where=where,
            mean_us=statistics.fmean(call.waits[reason, where].us for call in calls),
            longest_us=max(call.waits[reason, where].longest_ns for call in calls) / 1e3,
            num_calls=sum(call.waits[reason, where].num_runs > 0 for call in calls),
        )
        for reason, where in _keys([call.waits for call in calls])
    ]
    return tuple(sorted(reports, key=lambda wait: -wait.mean_us))


def _timeline(call: _Call, plan: Plan) -> tuple[TimelineBar, ...]:
    """Returns the bars of a call, those of the slice's first host, in the order of their starts."""
    bars: list[TimelineBar] = []
    shown: dict[int, str] = {}  # the host of each slice
    for process, span, planned in sorted(call.work, key=lambda item: item[0]):
        if planned is None:
            index, source = plan.place_of(_function_of(span.name))
            slices: tuple[int, ...] = () if index is None else (index,)
            kind: NodeKind = "compute"
            name = span.name
        else:
            here = plan.slices_of.get(process, ())
            slices = planned.slices[:1] if planned.kind == "transfer" else planned.slices
            slices = tuple(index for index in slices if index in here) or slices[:1]
            kind, name, source = planned.kind, f"{planned.kind} {planned.value}", planned.source
        bars += [
            TimelineBar(
                kind=kind,
                name=name,
                source=source,
                slice_index=index,
                start_us=(span.start_ns - call.start_ns) / 1e3,
                end_us=(span.end_ns - call.start_ns) / 1e3,
            )
            for index in slices
            if shown.setdefault(index, process) == process
        ]
    longest = sorted(bars, key=lambda bar: bar.start_us - bar.end_us)[:_MAX_BARS]
    return tuple(sorted(longest, key=lambda bar: (bar.start_us, bar.slice_index)))
