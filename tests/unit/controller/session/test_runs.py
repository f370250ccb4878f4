"""Runs in flight: deadlines."""

import asyncio
from types import SimpleNamespace

import pytest

import torchways as tw
from torchways.controller.session.connections import Connections
from torchways.controller.session.loop import LoopThread
from torchways.controller.session.puts import Puts
from torchways.controller.session.runs import Runs
from torchways.errors import ClusterLost
from torchways.ir.part import Arguments


class Scheduler:
    """Keeps what is sent."""

    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message.WhichOneof("message"))

    def flush(self):
        pass


@pytest.fixture
def runs():
    connections = Connections(None, LoopThread("test"), schedulers={0: Scheduler()})
    slices = SimpleNamespace(are_open=lambda ids: True, island_of=lambda slice_id: 0)
    programs = SimpleNamespace(take_first_run=lambda program_id: None)
    puts = Puts(connections.loop.start, connections.wait, connections.look_again, lambda buffer_id: None)
    spans = SimpleNamespace(dispatched=lambda name, run_id, started_ns: None)
    yield Runs(connections, slices, programs, puts, spans, 64)
    connections.loop.close()


def send(runs):
    return runs.send(1, "f", range(1), {1: Arguments([], [])}, changes_state=False)


async def _nothing():
    pass


def settle(runs):
    """Waits for what the loop was told to call."""
    runs.connections.loop.run(_nothing())


def timers(runs):
    """Returns the timers of runs that wait on the loop."""
    found = [item for item in runs.connections.loop.loop._scheduled if not item.cancelled()]
    return [item for item in found if getattr(item._callback, "__self__", None) is runs]


def test_a_run_that_ends_leaves_no_timer_of_its_deadline(runs):
    with tw.deadline(3600):
        first, second, third = (send(runs) for _ in range(3))
    settle(runs)
    assert len(timers(runs)) == 3
    for run_id in (first, third):
        runs.connections.loop.call(runs.on_finished, run_id, None)
    settle(runs)
    [timer] = timers(runs)
    assert timer._args[0] == [second]
    with tw.deadline(3600):
        runs.connections.loop.call(lambda: runs.on_finished(send(runs), None))  # before it has its timer
    settle(runs)
    assert timers(runs) == [timer]


def test_a_run_whose_deadline_passes_is_cancelled(runs):
    with tw.deadline(0.01):
        send(runs)
    [scheduler] = runs.connections.schedulers.values()
    while len(scheduler.sent) < 2:
        runs.connections.loop.run(asyncio.sleep(0.01))
    assert scheduler.sent == ["run_program", "cancel_runs"]


@pytest.mark.parametrize("broken", [None, ClusterLost("it is gone")])
def test_nothing_is_cancelled_when_the_session_is_over(runs, broken):
    run_id = send(runs)
    runs.connections.broken = broken
    runs.connections.closed = broken is None
    runs.connections.loop.close()
    runs.cancel([run_id], "too late")
    [scheduler] = runs.connections.schedulers.values()
    assert scheduler.sent == ["run_program"]
