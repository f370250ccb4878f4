"""From spans to times of nodes and lines, waits and bytes: spans made by hand."""

import pytest

from torchways.controller.reports.measured import measured
from torchways.controller.reports.planned import Plan, PlannedTransfer
from torchways.controller.variant import CallRuns
from torchways.ir.part import LoopAction
from torchways.rpc.spans import Span
from torchways.schedules.actions import parse_action

TRANSFER = PlannedTransfer(kind="transfer", value="fp32[4][R]", slices=(0, 1), source="a.py:1 in f")
SUM = PlannedTransfer(kind="sum", value="fp32[2][R]", slices=(0, 1), source="a.py:3 in f")


def make_plan():
    return Plan(
        slice_of={"f/0": 0, "f/1": 0, "f/2": 0, "f/3": 1},
        called=[["f/0", "f/1", "", "f/0", "f/2"], ["", "f/3"]],
        source_of={"f/0": "a.py:1 in f", "f/1": "a.py:2 in f", "f/2": "a.py:1 in f", "f/3": "b.py:7 in g"},
        sizes={TRANSFER: (1, 16), SUM: (2, 16)},
        edges=[{0: TRANSFER, 1: SUM, 3: SUM}],
        slices_of={"executor a": (0,), "executor b": (1,), "executor c": (1,)},
    )


def us(kind, name, start, end, run_id=1, **more):
    track = "device 0" if kind == "compute" else kind
    return Span(name, track, int(start * 1e3), int(end * 1e3), run_id, kind=kind, **more)


def call_at(start, run_id):
    return CallRuns((run_id,), int(start * 1e3), int((start + 2) * 1e3))


def test_a_node_has_the_median_over_calls_of_what_its_runs_take_together():
    calls = [call_at(100 * number, number + 1) for number in range(3)]
    spans = []
    for number, seconds in enumerate((10, 50, 20)):
        begin = 100 * number + 5
        spans += [us("compute", "f/0", begin, begin + seconds, number + 1)]
        spans += [us("compute", "f/0", begin + 60, begin + 60 + seconds / 2, number + 1)]
    found = measured("f", calls, {"executor a": spans}, make_plan())
    [node, *_] = found.nodes
    assert (node.name, node.kind, node.slices, node.source) == ("f/0", "compute", (0,), "a.py:1 in f")
    assert (node.num_runs, node.time_us) == (2, 30)
    assert found.call_us == 70  # from the first start to the last end: 65, 85 and 70
    assert found.interval_us == pytest.approx(102.5)  # ends at 70, 190 and 275
    assert node.share == pytest.approx(30 / 70)
    assert (found.num_calls, found.send_us) == (3, 2)


def test_of_several_hosts_the_slowest_counts_and_of_several_devices_the_first():
    other = us("compute", "f/3", 0, 9)._replace(track="device 1")
    spans = {
        "executor b": [us("compute", "f/3", 0, 4), other],
        "executor c": [us("compute", "f/3", 0, 5)],
    }
    found = measured("f", [call_at(0, 1)], spans, make_plan())
    assert [(node.name, node.slices, node.num_runs, node.time_us) for node in found.nodes[:1]] == [("f/3", (1,), 1, 5)]
    assert [bar.end_us for bar in found.timeline] == [4]  # a slice's lane is that of its first host


def test_computations_that_are_issued_as_one_have_the_lines_of_all():
    spans = [us("compute", "f/0 and 1 more", 0, 4)]
    plan = make_plan()
    plan.called = [["f/0", "", "f/0", "f/1"]]
    [node, *_] = measured("f", [call_at(0, 1)], {"executor a": spans}, plan).nodes
    assert node.source == "a.py:1 in f, a.py:2 in f"
    plan.called = [["f/0", "f/2"]]
    [node, *_] = measured("f", [call_at(0, 1)], {"executor a": spans}, plan).nodes
    assert node.source == "a.py:1 in f"


def test_microbatches_of_a_stage_are_one_node():
    names = {"f/0 0F0": (0, 1), "f/0 0F1": (1, 3), "f/1 0B0": (3, 7)}
    spans = [
        us("compute", name, *when, part_of=LoopAction(0, parse_action(name.split()[1]))) for name, when in names.items()
    ]
    spans.append(us("input", "inputs of f/1 0B0", 0, 2))
    found = measured("f", [call_at(0, 1)], {"executor a": spans}, make_plan())
    nodes = [(node.name, node.num_runs, node.time_us, node.slices, node.source) for node in found.nodes[:2]]
    assert nodes == [("f/1 0B", 1, 4, (0,), "a.py:2 in f"), ("f/0 0F", 2, 3, (0,), "a.py:1 in f")]
    assert [bar.name for bar in found.timeline] == list(names)
    [wait] = found.waits
    assert (wait.reason, wait.where) == ("idle until the inputs of f/1 0B come", "@0")


def test_transfers_and_sums_have_times_and_the_bytes_that_were_sent():
    spans = {
        "executor a": [
            us("compute", "f/0", 0, 1),
            us("send", "send edge 0 to b", 1, 4, edge_id=0, sent_bytes=16),
            us("sum", "sum edge 1", 5, 6, edge_id=1, sent_bytes=8),
            us("sum", "sum edge 3", 6, 8, edge_id=3, sent_bytes=8),
        ],
        "executor b": [
            us("receive", "receive edge 0", 11, 11, edge_id=0),
            us("sum", "sum edge 1", 4, 6, edge_id=1, sent_bytes=8),
            us("sum", "sum edge 3", 6, 8, edge_id=3, sent_bytes=8),
        ],
    }
    found = measured("f", [call_at(0, 1)], spans, make_plan())
    assert found.transfer_us == {TRANSFER: 3, SUM: 4}
    assert found.sent_bytes == {TRANSFER: 16, SUM: 32}
    assert found.call_us == 11
    assert [(node.kind, node.num_runs, node.time_us) for node in found.nodes] == [
        ("sum", 2, 4),
        ("transfer", 1, 3),
        ("compute", 1, 1),
    ]
    lines = [(line.source, line.compute_us, line.transfer_us) for line in found.lines]
    assert lines == [("a.py:3 in f", 0, 4), ("a.py:1 in f", 1, 3)]
    assert [(bar.kind, bar.slice_index) for bar in found.timeline if bar.kind != "compute"] == [
        ("transfer", 0),
        ("sum", 1),
        ("sum", 0),
        ("sum", 0),
        ("sum", 1),
    ]


def test_waits_by_reason_are_means_over_calls():
    calls = [call_at(0, 1), call_at(100, 2)]
    spans = {
        "executor a": [
            us("compute", "f/0", 10, 11, 1),
            us("compute", "f/0", 110, 111, 2),
            us("memory", "waits for memory: unit 1 of run 2 of f", 105, 109, 2),
            us("memory", "waits for memory: a value from a host", 105, 109, 0),  # of no run
        ],
        "scheduler i0": [
            us("held", "f held", 0, 1, 1),
            us("held", "f held: its turn", 100, 108, 2),
            us("held", "f held: its turn", 100, 106, 2)._replace(track="other devices held"),
            us("held", "g held: its turn", 0, 50, 3),  # of another program
        ],
        "controller": [
            us("room", "f waits for room", 100.5, 101.5, 0),
            us("room", "g waits for room", 60, 70, 0),
            us("read", "read an array", 50, 80, 0),
            us("read", "read an array", 85, 95, 0),
            us("read", "read an array", 120, 121, 0),
        ],
    }
    found = measured("f", calls, spans, make_plan())
    waits = [(wait.reason, wait.where, wait.mean_us, wait.longest_us, wait.num_calls) for wait in found.waits]
    assert waits == [
        ("reads of arrays, until the next call", "script", 20.5, 30, 2),
        ("held by the scheduler for its turn", "scheduler i0", 4, 8, 1),
        ("device memory", "@0", 2, 4, 1),
        ("held by the scheduler for room on its devices", "scheduler i0", 0.5, 1, 1),
        ("too many runs in flight", "script", 0.5, 1, 1),
    ]


def test_calls_whose_spans_are_incomplete_are_left_out():
    calls = [call_at(0, 1), call_at(100, 2)]
    spans = [us("compute", "f/0", 0, 1, 1), us("compute", "f/0", 100, 105, 2), us("compute", "f/1", 105, 106, 2)]
    found = measured("f", calls, {"executor a": spans}, make_plan())
    assert found.num_calls == 1
    assert found.nodes[0].time_us == 5
    assert found.interval_us is None
    assert measured("f", calls, {"executor a": []}, make_plan()).num_calls == 0
    assert measured("f", [], {}, make_plan()).call_us is None
