"""What `torchways top` makes of two observations, and how a frame looks."""

import io
import itertools

import pytest
from rich.console import Console

from tests.unit.cli.observations import observation, share
from torchways.cli.top import SORTS
from torchways.cli.top_view import frame
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.activity import activity_between

BEFORE = observation(10, share(1, busy_seconds=5.0, num_finished=100), share(2, weight=3.0, busy_seconds=1.0))
AFTER = observation(
    12,
    share(1, busy_seconds=5.5, num_finished=120, num_admitted=1),
    share(2, weight=3.0, busy_seconds=2.5, num_finished=10, num_held=4, priority=2),
)


def test_shares_are_of_what_happened_between():
    activity = activity_between(BEFORE, AFTER)
    assert activity.seconds == pytest.approx(2)
    one, two = activity.clients
    assert (one.wanted, one.got) == (pytest.approx(0.25), pytest.approx(0.25))
    assert (two.wanted, two.got) == (pytest.approx(0.75), pytest.approx(0.75))
    assert (one.device_seconds, two.device_seconds) == (pytest.approx(1.0), pytest.approx(3.0))  # of two devices
    assert (one.runs_per_second, two.runs_per_second) == (pytest.approx(10), pytest.approx(5))
    assert (two.num_held, two.priority, two.buffer_bytes) == (4, 2, 3000)
    [island] = activity.islands
    assert island.utilisation == (pytest.approx(1.0), pytest.approx(1.0))
    assert (island.num_held, island.num_admitted, island.queue_seconds) == (4, 1, pytest.approx(0.004))
    [executor] = activity.executors
    assert (executor.num_programs, executor.num_compiling, executor.compiling) == (2, 1, pytest.approx(0.25))


def test_who_has_nothing_to_run_wants_no_share():
    after = observation(12, share(1, busy_seconds=5.5), share(2, weight=3.0, busy_seconds=1.0))
    one, two = activity_between(BEFORE, after).clients
    assert (one.wanted, one.got, two.wanted, two.got) == (1.0, 1.0, 0.0, 0.0)


def test_what_is_new_began_at_zero_and_what_is_gone_or_began_again_counts_nothing():
    first = observation(10)
    one, two = activity_between(first, AFTER).clients
    assert (one.device_seconds, two.device_seconds) == (pytest.approx(11.0), pytest.approx(5.0))
    assert all(client.device_seconds == 0 for client in activity_between(AFTER, BEFORE).clients)
    nothing = activity_between(pb.Observation(), pb.Observation())
    assert (nothing.islands, nothing.clients, nothing.executors) == ((), (), ())


def drawn(observed, **options):
    console = Console(width=130, record=True, file=io.StringIO())
    console.print(frame("host:1", observed, **options))
    return console.export_text()


@pytest.mark.parametrize("sort", SORTS)
def test_a_frame_has_everything(sort):
    text = drawn(activity_between(BEFORE, AFTER), sort=sort, is_paused=True, keys=True)
    for part in ("host:1", "PAUSED", f"Clients, by {sort}", "[b].py", "75.0%", "i0.e1", "4.0 kB", "10.0 kB", "100%"):
        assert part in text
    assert "island 0: run 7 of client 2: its turn" in text
    assert "executor i0.e1: run 9 of step: its compilation" in text
    assert "q quit" in text


def test_clients_are_sorted():
    activity = activity_between(BEFORE, AFTER)
    by_got = drawn(activity, sort="got")
    by_name = drawn(activity, sort="runs")
    assert by_got.index("[b].py") < by_got.index("a.py")
    assert by_name.index("a.py") < by_name.index("[b].py")


def test_a_frame_of_an_empty_cluster_says_so():
    text = drawn(activity_between(pb.Observation(), pb.Observation(unreachable=["scheduler i0"])))
    assert "scheduler i0 does not answer" in text
    assert "none" in text


def test_a_run_that_is_longer_than_the_interval_counts_as_it_goes_on():
    """Schedulers know of its device time only when it has ended."""

    def at(seconds, ended, unended):
        found = observation(seconds, share(1, busy_seconds=ended, num_admitted=1))
        found.executors[0].status.unended_seconds[1] = unended
        return found

    moments = [at(10, 5.0, 0.0), at(11, 5.0, 1.0), at(12, 5.0, 2.0), at(13, 8.0, 0.0)]
    for before, after in itertools.pairwise(moments):
        activity = activity_between(before, after)
        assert activity.islands[0].utilisation == (pytest.approx(1.0), pytest.approx(1.0))
        assert activity.clients[0].device_seconds == pytest.approx(2.0)  # of two devices
        assert activity.clients[0].got == 1.0
