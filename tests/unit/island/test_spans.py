"""A scheduler's spans: how long runs were held and why, and how long they were admitted."""

from torchways.ids import client_range
from torchways.island.spans import RunSpans

ONE, TWO = client_range(1)[0] + 1, client_range(2)[0] + 1


def shown(spans):
    return [(span.name, span.track, span.start_ns, span.end_ns, span.kind, span.client_id) for span in spans]


def test_a_run_is_held_and_then_admitted_on_each_of_its_sets():
    spans = RunSpans()
    spans.requested(ONE, "step", [("a", "b"), ("c",)], 10)
    spans.admitted(ONE, "its turn", 20)
    spans.admitted(ONE, "its turn", 21)  # to the next executor
    spans.ended(ONE, 30)
    spans.ended(ONE, 40)
    assert shown(spans.since(0, 50)) == [
        ("step held: its turn", "a/b held", 10, 20, "held", 1),
        ("step", "a/b", 20, 30, "admitted", 1),
        ("step held: its turn", "c held", 10, 20, "held", 1),
        ("step", "c", 20, 30, "admitted", 1),
    ]
    assert shown(spans.since(25, 50)) == [("step", "a/b", 20, 30, "admitted", 1), ("step", "c", 20, 30, "admitted", 1)]


def test_what_has_not_ended_is_shown_as_far_as_it_is():
    spans = RunSpans()
    spans.requested(ONE, "f", [("a",)], 10)
    spans.requested(TWO, "g", [("a",)], 10)
    spans.admitted(TWO, "", 15)
    assert shown(spans.since(0, 20)) == [
        ("f held", "a held", 10, 20, "held", 1),
        ("g held", "a held", 10, 15, "held", 2),
        ("g", "a", 15, 20, "admitted", 2),
    ]


def test_a_client_that_is_gone_leaves_nothing_open():
    spans = RunSpans()
    spans.requested(ONE, "f", [("a",)], 10)
    spans.requested(ONE + 1, "f", [("a",)], 10)
    spans.admitted(ONE, "", 12)
    spans.client_gone(1, 20)
    spans.ended(ONE, 30)
    assert len(spans.since(0, 100)) == 3
    assert all(span.end_ns <= 30 for span in spans.since(0, 100))
