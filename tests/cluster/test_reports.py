"""`program.report()` of programs on real executors."""

import re
import xml.etree.ElementTree as ET

import pytest
import torch

import torchways as tw

ROWS, WIDTH = 64, 32


@pytest.fixture(scope="module")
def slices(cluster):
    """One device of each island."""
    return [tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=island) for island in (0, 1)]


def make_step(slices):
    first, second = slices

    @tw.function(mesh=first)
    def embed(x):
        return torch.relu(x @ x.T @ x)

    @tw.function(mesh=second)
    def score(x):
        return (x * x).mean()

    @tw.program
    def step(x):
        return score(embed(x))

    return step


def test_a_program_of_two_slices(slices, tmp_path):
    step, x = make_step(slices), torch.ones(ROWS, WIDTH)
    for _ in range(3):
        step(x).cpu()
    report = step.report()
    assert (report.program, report.num_calls, report.earlier) == ("step", 3, None)
    assert report.call_us > 0
    assert report.interval_us > 0
    assert report.send_us > 0
    assert report.trace_seconds > 0
    assert report.compile_seconds > 0

    nodes = {node.slices: node for node in report.nodes}
    assert [nodes[key].kind for key in ((0,), (1,), (0, 1))] == ["compute", "compute", "transfer"]
    assert all(node.num_runs == 1 and node.time_us > 0 and 0 < node.share <= 1 for node in report.nodes)
    assert re.fullmatch(r"test_reports.py:\d+ in embed", nodes[0,].source)
    assert re.fullmatch(r"test_reports.py:\d+ in score", nodes[1,].source)
    assert nodes[0, 1].source == nodes[0,].source
    assert {line.source for line in report.lines} == {nodes[0,].source, nodes[1,].source}

    [transfer] = report.transfers
    assert (transfer.value_bytes, transfer.sent_bytes) == (ROWS * WIDTH * 4, ROWS * WIDTH * 4)
    assert [item.slice_index for item in report.memory] == [0, 1]
    # A batch and what is made of it; on slice 1 what came, and one number.
    assert report.memory[0].peak_bytes == 2 * ROWS * WIDTH * 4
    assert report.memory[1].peak_bytes == ROWS * WIDTH * 4 + 4
    assert {wait.where for wait in report.waits} >= {"scheduler i0", "scheduler i1", "script"}
    assert all(wait.num_calls <= report.num_calls for wait in report.waits)
    assert {(bar.kind, bar.slice_index) for bar in report.timeline} == {
        ("compute", 0),
        ("transfer", 0),
        ("compute", 1),
    }

    for _ in range(6):
        result = step(x)  # nothing is read between the calls
    result.cpu()
    again = step.report()
    assert again.num_calls == 5
    assert again.earlier == report
    assert "5 calls were measured, and 3 for the report before" in str(again)
    assert re.search(r"time by node, in a call\n  node +slice +runs +time +change +share +line\n", str(again))
    assert re.search(rf"@0 -> @1 .* {ROWS * WIDTH * 4:,} +same ", str(again))

    again.write_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    texts = list(ET.fromstring(page.removeprefix("<!DOCTYPE html>")).itertext())
    assert nodes[0,].source in texts
    assert not re.search(r"\bsrc=|\bhref=|url\(|<script", page)


def test_slices_of_the_same_devices_send_nothing(cluster):
    whole = [tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=0) for _ in range(2)]
    step = make_step(whole)
    step(torch.ones(ROWS, WIDTH)).cpu()
    [transfer] = step.report().transfers
    assert (transfer.value_bytes, transfer.sent_bytes) == (ROWS * WIDTH * 4, 0)


def test_a_sum_over_islands_has_its_bytes_and_line(slices):
    first, second = slices

    @tw.program
    def total(x, y):
        here = tw.redistribute(x, first, ("dp",)) * 2
        there = tw.redistribute(y, second, ("dp",)) * 3
        return tw.all_reduce([here, there])

    x, y = (tw.distribute_tensor(torch.ones(256), mesh) for mesh in slices)
    results = total(x, y)
    assert [value.cpu()[0].item() for value in results] == [5, 5]
    [item] = total.report().transfers
    assert (item.kind, item.slices, item.num_runs, item.value_bytes) == ("sum", (0, 1), 1, 1024)
    assert item.sent_bytes >= 1024
    assert re.fullmatch(r"test_reports.py:\d+ in total", item.source)
    assert item.time_us > 0


def test_a_program_whose_last_calls_were_compared_was_not_measured(slices):
    step = make_step(slices)
    with tw.parity():
        step(torch.ones(ROWS, WIDTH)).cpu()
    report = step.report()
    assert (report.num_calls, report.nodes) == (0, ())
    assert "no call was measured" in str(report)
    assert report.transfers[0].value_bytes == ROWS * WIDTH * 4
    assert report.transfers[0].sent_bytes is None
