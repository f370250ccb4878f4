"""`program.report()` without processes, its text, its page, and what has changed."""

import dataclasses
import functools
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from torch import nn

import torchways as tw
from tests.local_session import LocalSession
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction
from torchways.controller.reports.html import page_of
from torchways.controller.reports.items import MemoryReport, NodeReport, TimelineBar, TransferReport, WaitReport
from torchways.controller.reports.measured import lines_of
from torchways.controller.reports.report import ProgramReport
from torchways.controller.reports.tables import Table, change_text, table_lines
from torchways.errors import ConfigError, UserError
from torchways.ir.loops import unrolled
from torchways.ir.part import SendInstruction
from torchways.passes.split import edges_of


def make_report(factor=1.0, **more):
    """A report of a program of two slices, whose times are multiples of `factor`."""
    nodes = (
        NodeReport(
            kind="compute",
            name="<lambda>/0",
            slices=(0,),
            source="a&b.py:1 in <lambda>",
            num_runs=1,
            time_us=2000 * factor,
            share=0.5,
        ),
        NodeReport(
            kind="transfer",
            name="fp32[4][R]",
            slices=(0, 1),
            source="a&b.py:1 in <lambda>",
            num_runs=3,
            time_us=1000 * factor,
            share=0.25,
        ),
    )
    values = {
        "program": "<lambda>",
        "slices": ("('dp'=1)", "('dp'=1)"),
        "num_calls": 5,
        "call_us": 4000 * factor,
        "interval_us": 4100.0,
        "send_us": 300.0,
        "trace_seconds": 0.5,
        "compile_seconds": 1.25,
        "nodes": nodes,
        "lines": lines_of(nodes, 4000 * factor),
        "waits": (WaitReport(reason="device memory", where="@1", mean_us=100 * factor, longest_us=500.0, num_calls=1),),
        "transfers": (
            TransferReport(
                kind="transfer",
                value="fp32[4][R]",
                slices=(0, 1),
                source="a&b.py:1 in <lambda>",
                num_runs=3,
                value_bytes=48,
                sent_bytes=48.0,
                time_us=1000 * factor,
            ),
        ),
        "memory": (
            MemoryReport(
                slice_index=0,
                peak_bytes=123456,
                budget_bytes=0,
                function="<lambda>/0",
                source="a&b.py:1 in <lambda>",
                largest="fp32[4][R]",
                largest_bytes=16,
            ),
        ),
        "timeline": (
            TimelineBar(
                kind="compute",
                name="<lambda>/0 0F0",
                source="a&b.py:1 in <lambda>",
                slice_index=0,
                start_us=0.0,
                end_us=2000.0,
            ),
            TimelineBar(
                kind="transfer", name="transfer fp32[4][R]", source="", slice_index=0, start_us=2000.0, end_us=3000.0
            ),
        ),
    }
    return ProgramReport(**{**values, **more})


# ---- text


def test_the_text_has_all_tables():
    assert str(make_report()) == (
        "<lambda> on @0 ('dp'=1), @1 ('dp'=1)\n"
        "5 calls were measured\n"
        "from start to end 4.00 ms\n"
        "from end to end   4.10 ms\n"
        "sent in           0.30 ms\n"
        "traced in 0.5 s, compiled in 1.2 s\n"
        "\n"
        "time by node, in a call\n"
        "  node                 slice     runs     time  share  line\n"
        "  <lambda>/0           @0           1  2.00 ms  50.0%  a&b.py:1 in <lambda>\n"
        "  transfer fp32[4][R]  @0 -> @1     3  1.00 ms  25.0%  a&b.py:1 in <lambda>\n"
        "\n"
        "time by line, in a call\n"
        "  line                  computing  transfers  share\n"
        "  a&b.py:1 in <lambda>    2.00 ms    1.00 ms  75.0%\n"
        "\n"
        "waits, in a call\n"
        "  reason         where     mean  longest   calls\n"
        "  device memory  @1     0.10 ms  0.50 ms  1 of 5\n"
        "\n"
        "bytes by transfer, in a call\n"
        "  transfer  value       runs  bytes  sent     time  made at\n"
        "  @0 -> @1  fp32[4][R]     3     48    48  1.00 ms  a&b.py:1 in <lambda>\n"
        "\n"
        "memory, bytes per device\n"
        "  slice     peak  budget  at                               largest value  its bytes\n"
        "  @0     123,456    none  <lambda>/0 a&b.py:1 in <lambda>  fp32[4][R]            16"
    )


def test_a_long_table_is_cut_in_the_text():
    table = Table(
        title="numbers", header=("name", "number"), rows=[(f"n{n}", str(n)) for n in range(12)], notes=["end"]
    )
    expected = [
        "numbers",
        "  name  number",
        "  n0         0",
        "  n1         1",
        "  and 10 more, which the HTML page has",
    ]
    assert list(table_lines(table, 2)) == [*expected, "  end"]


def test_a_program_without_measured_calls_says_why():
    text = str(ProgramReport(program="f", slices=("('dp'=1)",)))
    assert text.splitlines() == [
        "f on @0 ('dp'=1)",
        "no call was measured: its last calls failed, ran in parity mode or too long ago, or TORCHWAYS_SPANS=0",
    ]


# ---- changes


@pytest.mark.parametrize(
    ("now", "before", "text"),
    [(112.0, 100.0, "+12%"), (50.0, 100.0, "-50%"), (3, 3, "same"), (1, 0, "new"), (None, 1.0, ""), (1.0, None, "")],
)
def test_changes_are_in_percent(now, before, text):
    assert change_text(now, before) == text


def test_a_report_is_compared_with_an_earlier_one():
    report = make_report(1.5).against(make_report().against(make_report(2.0)))
    assert report.earlier == make_report()  # it does not keep the ones before
    lines = str(report).splitlines()
    assert lines[1:5] == [
        "5 calls were measured, and 5 for the report before",
        "from start to end 6.00 ms  +50%",
        "from end to end   4.10 ms  same",
        "sent in           0.30 ms  same",
    ]
    assert "  <lambda>/0           @0           1  3.00 ms    +50%  50.0%  a&b.py:1 in <lambda>" in lines
    assert "  @0 -> @1  fp32[4][R]     3     48    same    48  1.50 ms  a&b.py:1 in <lambda>" in lines
    assert "  device memory  @1     0.15 ms    +50%  0.50 ms  1 of 5" in lines


def test_what_is_new_and_what_is_gone_is_named():
    other = dataclasses.replace(make_report().nodes[0], name="f/1")
    report = make_report(nodes=(other,)).against(make_report())
    text = str(report)
    assert re.search(r"f/1 +@0 +1 +2.00 ms +new", text)
    assert "  no longer there: <lambda>/0; fp32[4][R]" in text


# ---- the page


@pytest.mark.parametrize("report", [make_report(), make_report(1.5).against(make_report())], ids=["alone", "compared"])
def test_the_page_is_well_formed_escaped_and_needs_nothing_else(report):
    page = page_of(report)
    tree = ET.fromstring(page.removeprefix("<!DOCTYPE html>"))
    assert "<lambda>" not in page
    texts = list(tree.itertext())
    assert "Report of <lambda>" in texts
    assert "<lambda>/0" in texts
    assert "a&b.py:1 in <lambda>" in texts
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|\bsrc=|\bhref=|@import|url\(|<script", page)
    assert [element.text for element in tree.iter("h2")] == [
        "timeline of the call in the middle",
        "time by node, in a call",
        "time by line, in a call",
        "waits, in a call",
        "bytes by transfer, in a call",
        "memory, bytes per device",
    ]
    assert ("+50%" in texts) is (report.earlier is not None)


def test_the_timeline_has_a_bar_for_each_thing_that_a_slice_did():
    tree = ET.fromstring(page_of(make_report()).removeprefix("<!DOCTYPE html>"))
    svg = "{http://www.w3.org/2000/svg}"
    titles = [element.text for element in tree.iter(f"{svg}title")]
    assert titles == ["<lambda>/0 0F0, 2.00 ms, a&b.py:1 in <lambda>", "transfer fp32[4][R], 1.00 ms"]
    bars = [element for group in tree.iter(f"{svg}g") for element in group.iter(f"{svg}rect")]
    widths = [float(bar.get("width")) for bar in bars]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)


def test_control_characters_do_not_break_the_page():
    ET.fromstring(page_of(make_report(program="a\x00b\x1bc")).removeprefix("<!DOCTYPE html>"))


def test_a_page_that_cannot_be_written_is_an_error_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(ConfigError, match=rf"cannot write the report {path}: "):
            make_report().write_html(path)
    make_report().write_html(tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


# ---- of programs


def two_slices(session):
    first, second = session.mesh(), session.mesh()
    stages = [
        make_function(nn.Linear(4, 8), first, lambda: session),
        make_function(nn.Linear(8, 2), second, lambda: session),
    ]

    def forward(x):
        return stages[1](stages[0](x))

    return ProgramFunction(forward, None, lambda: session)


def test_a_program_of_two_slices():
    program = two_slices(LocalSession())
    for _ in range(7):
        program(torch.ones(3, 4))
    report = program.report()
    assert (report.program, report.num_calls, report.loops, report.earlier) == ("forward", 5, (), None)
    computed = sorted((node for node in report.nodes if node.kind == "compute"), key=lambda node: node.slices)
    assert [(node.slices, node.num_runs) for node in computed] == [((0,), 1), ((1,), 1)]
    assert all("test_report.py" in node.source for node in computed)
    [transfer] = report.transfers
    assert (transfer.kind, transfer.slices, transfer.num_runs) == ("transfer", (0, 1), 1)
    assert (transfer.value_bytes, transfer.sent_bytes) == (3 * 8 * 4, 3 * 8 * 4)
    assert transfer.source == computed[0].source
    # Of slice 0: the batch, the layer's parameters and its output. Of slice 1 likewise.
    assert [item.peak_bytes for item in report.memory] == [
        4 * (3 * 4 + 8 * 4 + 8 + 3 * 8),
        4 * (3 * 8 + 2 * 8 + 2 + 3 * 2),
    ]
    assert {bar.slice_index for bar in report.timeline} == {0, 1}
    assert sum(line.compute_us for line in report.lines) == pytest.approx(sum(node.time_us for node in computed))


def test_a_report_shows_what_has_changed_since_the_one_before():
    program = two_slices(LocalSession())
    program(torch.ones(3, 4))
    first = program.report()
    assert program.report().earlier is None  # nothing was called since
    program(torch.ones(3, 4))
    second = program.report()
    assert second.earlier == first
    assert program.report().earlier == first
    program(torch.ones(5, 4))  # another trace
    third = program.report()
    assert third.earlier == dataclasses.replace(second, earlier=None)
    assert third.transfers[0].value_bytes == 5 * 8 * 4
    assert "new" in str(third)


def test_sequential_dispatch_has_the_nodes_of_all_pieces():
    session = LocalSession()
    program = two_slices(session)
    program._dispatch = "sequential"
    program(torch.ones(3, 4))
    report = program.report()
    assert sorted(node.kind for node in report.nodes) == ["compute", "compute", "transfer"]
    [transfer] = report.transfers
    assert (transfer.value_bytes, transfer.sent_bytes) == (96, 96)
    assert "test_report.py" in transfer.source


def test_microbatches_count_each_transfer_once_a_turn():
    session = LocalSession()
    meshes = session.mesh(), session.mesh()
    stages = [make_function(nn.Linear(4, 4), mesh, lambda: session) for mesh in meshes]

    def loss_of(x):
        return stages[1](stages[0](x)).sum()

    def step(x, y):
        with torch.no_grad():
            first = tw.microbatch(loss_of, x, n_microbatches=3)
            whole = loss_of(y)
            return first, whole, tw.microbatch(loss_of, y, n_microbatches=2)

    program = ProgramFunction(step, None, lambda: session)
    program(torch.ones(8, 4), torch.ones(6, 4))  # 3, 3 and 2 rows; 6; 3 and 3
    report = program.report()
    assert sum(item.num_runs for item in report.transfers) == 3 + 1 + 2
    assert sum(item.value_bytes for item in report.transfers) == (8 + 6 + 6) * 4 * 4
    assert sum(item.sent_bytes for item in report.transfers) == (8 + 6 + 6) * 4 * 4
    lowered = program._last.lowered
    sent = [
        instruction.edge_id
        for part in lowered.parts
        for instruction in unrolled(part).instructions
        if isinstance(instruction, SendInstruction)
    ]
    assert sorted(edge for edges in edges_of(lowered.program) for edge in edges.edge_ids) == sorted(sent)


def test_a_program_that_was_not_called_says_so():
    with pytest.raises(UserError, match=r"forward: not traced yet; call it once before report\(\)"):
        two_slices(LocalSession()).report()


def test_a_program_that_cannot_be_traced_says_so():
    session = LocalSession()
    double = make_function(lambda x: 2 * x, session.mesh(), lambda: session)

    def until_large(x):
        while float(x.sum()) < 10:
            x = double(x)
        return x

    program = ProgramFunction(until_large, None, lambda: session)
    x = double(torch.ones(2))
    assert float(program(x).sum()) >= 10
    with pytest.raises(UserError, match="until_large depends on values and runs node by node, so it has no report"):
        program.report()


def test_eager_mode_has_an_empty_report(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHWAYS_EAGER", "1")

    @tw.program
    def double(x):
        return 2 * x

    assert double(torch.ones(1)).item() == 2
    assert double.report().loops == ()
    assert str(double.report()) == "double runs in eager mode, as plain PyTorch: nothing is measured"
    double.report().write_html(tmp_path / "page.html")
    assert "double runs in eager mode" in (tmp_path / "page.html").read_text()


def test_a_method_has_a_report():
    session = LocalSession()

    class Trainer:
        model = make_function(nn.Linear(2, 2), session.mesh(), lambda: session)

        def forward(self, x):
            return self.model(x)

        step = ProgramFunction(forward, None, lambda: session)

    trainer = Trainer()
    trainer.step(torch.ones(1, 2))
    assert isinstance(trainer.step, functools.partial)
    assert [node.num_runs for node in trainer.step.report().nodes] == [1]
