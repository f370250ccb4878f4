"""The benchmarks' pictures of pipelines: what they read of a trace, and what they draw."""

import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from benchmarks.timelines import COLORS, TRANSFER_COLOR, Bar, LaneTimes, Move, draw_lanes, figure_of_runs, lane_times
from torchways.errors import ConfigError
from torchways.observability.trace import chrome_trace
from torchways.rpc.spans import Span
from torchways.schedules.actions import Kind, parse_action

MS = 1_000_000


def spans(*rows):
    return [Span(name=name, track="t", start_ns=start * MS, end_ns=end * MS, run_id=1) for name, start, end in rows]


#: Two stages for one microbatch, from millisecond 10 on; the second slice's process comes first by its name.
TRACE = chrome_trace(
    {
        "i1.e0": spans(
            ("receive edge 3", 23, 23),
            ("stage1/2 1F0", 23, 33),
            ("stage1/5 and 1 more 1B0", 33, 53),
            ("send edge 4 to i9.e0", 53, 54),
        ),
        "i9.e0": spans(
            ("send edge 9 to i1.e0", 1, 2),
            ("receive edge 8", 5, 5),
            ("stage0/1 0F0", 10, 20),
            ("send edge 3 to i1.e0", 21, 22),
            ("receive edge 4", 55, 55),
            ("stage0/4 0I0", 55, 65),
            ("stage0/7 0W0", 65, 75),
            ("update/9", 75, 80),
        ),
    }
)


def test_actions_and_transfers_of_a_trace():
    times = lane_times(TRACE, {0: 0, 1: 1})
    assert [(bar.lane, str(bar.action), bar.start, bar.end) for bar in times.bars] == [
        (0, "0F0", 0, 10),
        (1, "1F0", 13, 23),
        (1, "1B0", 23, 43),
        (0, "0I0", 45, 55),
        (0, "0W0", 55, 65),
    ]
    # Neither what came before the first action, nor what nobody sent.
    assert times.moves == (Move(0, 1, 11, 13), Move(1, 0, 43, 45))
    assert times.end == 65


def test_a_trace_without_a_pipeline():
    with pytest.raises(ConfigError, match="no action of a schedule: trace a call of a program"):
        lane_times(chrome_trace({"i0.e0": spans(("update/9", 75, 80))}), {0: 0})


def test_each_kind_and_transfers_have_their_colors():
    times = lane_times(TRACE, {0: 0, 1: 1})
    figure, axes = plt.subplots()
    draw_lanes(axes, times, "two slices")
    drawn = [(to_hex(bar.get_facecolor()), bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert drawn == [(COLORS[bar.action.kind], bar.start, bar.end - bar.start) for bar in times.bars]
    assert {bar.action.kind for bar in times.bars} == set(Kind)
    assert [line.get_color() for line in axes.lines] == [TRANSFER_COLOR] * 2
    assert [label.get_text() for label in axes.get_yticklabels()] == ["slice 0", "slice 1"]
    assert [text.get_text() for text in axes.texts] == ["0"] * 5
    plt.close(figure)


def test_second_stages_are_lighter_and_narrow_bars_have_no_number():
    bars = (Bar(0, parse_action("0F7"), 0, 1000), Bar(0, parse_action("1F7"), 1000, 1001))
    figure, axes = plt.subplots()
    draw_lanes(axes, LaneTimes(bars, ()), "")
    assert [bar.get_alpha() for bar in axes.patches] == [1.0, 0.6]
    assert [text.get_text() for text in axes.texts] == ["7"]
    plt.close(figure)


def test_runs_of_one_figure_have_one_axis_of_time():
    times = lane_times(TRACE, {0: 0, 1: 1})
    figure = figure_of_runs([("one", times), ("two", times)], "simulated")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "two"]
    assert {axes.get_xlim() for axes in figure.axes} == {(0, 65)}
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "transfer"
    plt.close(figure)
