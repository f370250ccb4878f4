"""Traces as files: rows without overlaps, arrows with two ends, lanes of devices in a picture."""

import gzip
import json
from collections import defaultdict

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from torchways.errors import ConfigError
from torchways.ids import client_range
from torchways.observability.trace import chrome_trace, read_chrome_trace, write_chrome_trace
from torchways.observability.trace_picture import COLORS, draw_lanes, lanes_of, write_picture
from torchways.rpc.spans import Span

ONE, TWO = client_range(1)[0] + 1, client_range(2)[0] + 1
MS = 1_000_000


def span(kind, start, end, run_id, track, name="f", edge=None):
    client = run_id >> 40
    return Span(name, track, start * MS, end * MS, run_id, kind=kind, client_id=client, edge_id=edge)


SPANS = {
    "controller": [span("dispatch", 0, 1, ONE, "dispatch"), span("dispatch", 2, 3, ONE + 1, "dispatch")],
    "scheduler i0": [
        span("held", 1, 4, ONE, "i0.e0 held"),
        span("admitted", 4, 20, ONE, "i0.e0"),
        span("held", 1, 5, ONE, "i0.e1 held"),
        span("admitted", 5, 20, ONE, "i0.e1"),
        span("held", 3, 9, ONE + 1, "i0.e0 held"),
    ],
    "executor i0.e0": [
        span("compute", 5, 8, ONE, "island 0 device 0"),
        span("compute", 8, 9, ONE, "island 0 device 0"),
        span("send", 9, 10, ONE, "send", edge=3),
        span("compute", 10, 12, TWO, "island 0 device 0"),
    ],
    "executor i0.e1": [
        span("receive", 10, 10, ONE, "receive", edge=3),
        span("compute", 10, 15, ONE, "island 0 device 1"),
        span("compute", 11, 12, ONE, "island 0 device 10"),
    ],
}


def test_a_trace_that_viewers_open(tmp_path):
    path = tmp_path / "t.json.gz"
    write_chrome_trace(path, SPANS, {1: "a.py", 2: "b.py"})
    trace = json.loads(gzip.decompress(path.read_bytes()))
    assert trace == read_chrome_trace(path)
    events = trace["traceEvents"]
    named = {
        (event["name"], event["pid"], event.get("tid")): event["args"]["name"] for event in events if event["ph"] == "M"
    }
    timed = [event for event in events if event["ph"] != "M"]
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    free = defaultdict(float)
    for event in timed:
        assert ("process_name", event["pid"], None) in named
        row = ("thread_name", event["pid"], event["tid"])
        assert row in named
        if event["ph"] == "X":
            assert event["ts"] >= free[row]
            free[row] = event["ts"] + event["dur"]
    assert "i0.e0 held (2)" in named.values()


def test_arrows_have_both_ends_within_spans():
    trace = chrome_trace(SPANS)
    processes = {
        event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"
    }
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    arrows = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] in "stf":
            arrows[event["id"]].append(event)
            place = event["pid"], event["tid"]
            within = [
                s for s in spans if (s["pid"], s["tid"]) == place and s["ts"] <= event["ts"] <= s["ts"] + s["dur"]
            ]
            assert within
    found = set()
    for chain in arrows.values():
        assert [event["ph"] for event in chain] == ["s", *"t" * (len(chain) - 2), "f"]
        assert chain[-1]["bp"] == "e"
        found.add(tuple(processes[event["pid"]] for event in chain))
    scheduled = ("controller", "scheduler i0", "scheduler i0")
    assert found == {
        (*scheduled, "executor i0.e0"),
        (*scheduled, "executor i0.e1"),
        ("executor i0.e0", "executor i0.e1"),
    }


def test_lanes_are_devices_and_colours_are_clients(tmp_path):
    trace = chrome_trace(SPANS, {1: "a.py"})
    lanes = lanes_of(trace)
    assert list(lanes) == ["island 0 device 0", "island 0 device 1", "island 0 device 10"]
    assert lanes["island 0 device 0"] == {1: [(5, 3), (8, 1)], 2: [(10, 2)]}
    axes = Figure().add_subplot()
    draw_lanes(axes, trace)
    drawn = []
    for bars in axes.collections:
        for path in bars.get_paths():
            box = path.get_extents()
            drawn.append((round((box.y0 + box.y1) / 2), box.x0, box.x1, to_hex(bars.get_facecolor()[0])))
    assert sorted(drawn) == [
        (0, 0, 3, COLORS[0]),
        (0, 3, 4, COLORS[0]),
        (0, 5, 7, COLORS[1]),
        (1, 5, 10, COLORS[0]),
        (2, 6, 7, COLORS[0]),
    ]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["client 1: a.py", "client 2"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(lanes)
    write_picture(tmp_path / "p.png", trace)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_what_is_no_trace_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no computation to draw"):
        write_picture(tmp_path / "p.png", chrome_trace({"controller": []}))
    (tmp_path / "t.json.gz").write_bytes(b"no gzip")
    for name in ("t.json.gz", "missing.json"):
        with pytest.raises(ConfigError, match=name):
            read_chrome_trace(tmp_path / name)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no trace"):
        read_chrome_trace(tmp_path / "list.json")
