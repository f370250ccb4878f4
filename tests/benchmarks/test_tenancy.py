"""Pure parts of benchmarks.tenancy."""

import pytest

from benchmarks.tenancy import Computed, quantile, throughput, time_by_client, windows

TURNS = ((0.0, 0.25, 1), (0.25, 1.0, 2))


def test_windows_have_what_lies_in_them():
    # Turns of 0.25 s and 0.75 s; windows of five seconds begin every half second.
    spans = [Computed(t + start, t + end, client) for t in range(8) for start, end, client in TURNS]
    found = windows(spans, 0.0, 8.0)
    assert len(found) == 7
    for window in found:
        assert window == pytest.approx({1: 0.25, 2: 0.75})
    assert time_by_client(spans, 1.1, 1.5) == pytest.approx({1: 0.15, 2: 0.25})


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
