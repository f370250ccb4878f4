"""Pure parts of benchmarks.tenancy."""

import pytest

from benchmarks.tenancy import WINDOW_SECONDS, quantile, throughput, windows


def test_windows_are_differences_over_five_seconds():
    rows = [(float(t), {1: 0.25 * t, 2: 0.75 * t}, float(t)) for t in range(8)]
    found = windows(rows)
    assert len(found) == 8 - WINDOW_SECONDS
    for window in found:
        assert window == pytest.approx({1: 0.25, 2: 0.75})


def test_a_client_that_comes_in_a_window_has_what_it_used():
    rows = [(0.0, {1: 0.0}, 0.0), (5.0, {1: 3.0, 2: 1.0}, 4.0)]
    assert windows(rows) == [pytest.approx({1: 0.75, 2: 0.25})]


def test_throughput_is_over_the_time_from_the_first_to_the_last():
    answers = [
        {"computations": 10, "began": 1.0, "ended": 3.0},
        {"computations": 30, "began": 2.0, "ended": 5.0},
    ]
    assert throughput(answers) == 10


def test_quantiles():
    values = [float(n) for n in range(100)]
    assert quantile(values, 0.5) == 50
    assert quantile(values, 0.99) == 99
    assert quantile([1.0], 0.99) == 1
