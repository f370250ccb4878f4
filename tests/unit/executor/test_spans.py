"""An executor's spans: what a computation took, and what it waited for: inputs, memory, its grant."""

from types import SimpleNamespace

import pytest

from tests.unit.executor.test_stalls import double, enqueue, load, put
from tests.unit.executor.test_state import BASE, SLICE, train_parts
from torchways.errors import Failure
from torchways.executor import events
from torchways.executor import spans as module
from torchways.executor.spans import Spans
from torchways.executor.state import ExecutorState
from torchways.ids import BufferId, RunId, RunPart

RUN = RunId(BASE + 1)


class Computation:
    """What spans use of a task: whose run it is of."""

    def __init__(self, client_id, device_ns=0):
        self.run = SimpleNamespace(client_id=client_id, device_ns=device_ns)


@pytest.fixture
def clock(monkeypatch):
    """Sets the time, in nanoseconds."""
    now = [0]
    monkeypatch.setattr(module.time, "time_ns", lambda: now[0])
    return lambda value: now.__setitem__(0, value)


def shown(spans):
    return [(span.kind, span.name, span.start_ns, span.end_ns) for span in spans.log.since(0)]


def test_runs_that_go_on_have_device_time_until_now():
    spans = Spans()
    first, second = Computation(1, device_ns=7), Computation(2)
    runs = [first.run, second.run]
    spans.note_issued(first, 10)
    spans.note_issued(second, 15)  # behind it
    assert spans.unended_ns(runs, 30) == {1: 7 + 20, 2: 0}
    spans.note_ended(first)
    spans.note_computed("f", 1, 10, 40, RUN)
    assert spans.unended_ns(runs, 45) == {1: 7, 2: 5}
    spans.note_ended(second)
    assert spans.unended_ns([], 50) == {}


def test_computations_that_follow_each_other_share_no_time():
    spans = Spans()
    assert spans.note_computed("f", 2, 10, 30, RUN) == 20
    assert spans.note_computed("g", 1, 15, 40, RUN) == 10  # issued behind it
    assert [(span.track, *span[2:4]) for span in spans.log.since(0)] == [
        ("device 0", 10, 30),
        ("device 1", 10, 30),
        ("device 0", 30, 40),
    ]
    assert {span.client_id for span in spans.log.since(0)} == {1}


@pytest.mark.parametrize(
    ("awaited_since", "free_at", "waited_from"),
    [
        (0, 5, None),  # its inputs were there
        (12, 5, 12),  # the run came, then its input
        (12, 20, 20),  # until then the devices computed something else
        (12, 50, None),  # they always had something to do
    ],
)
def test_a_wait_for_inputs_is_what_the_devices_had_nothing_to_do_for(awaited_since, free_at, waited_from):
    spans = Spans()
    spans.note_computed("before", 1, 1, free_at, RUN)
    spans.note_computed("f", 1, 50, 60, RUN, awaited_since_ns=awaited_since)
    waits = [(span.name, span.track, span.start_ns, span.end_ns) for span in spans.log.since(0) if span.kind == "input"]
    assert waits == ([("inputs of f", "input", waited_from, 50)] if waited_from else [])


def test_a_task_knows_whether_it_awaited_its_inputs():
    state = ExecutorState("a")
    load(state, train_parts()["a"])
    put(state, BASE + 2)
    put(state, BASE + 3)
    commands = enqueue(state, 1, [BufferId(BASE + 2), BufferId(BASE + 3)])
    commands += state.handle(events.TransferArrived(peer="b", run_id=RUN, edge_id=1, data=b""))
    executed = [command.task for command in commands if isinstance(command, events.Execute)]
    # The first had its arguments; the second's came from another executor.
    assert [task.awaited_input for task in executed] == [False, True]


def test_a_wait_for_memory_lasts_until_it_is_there(clock):
    state, spans = ExecutorState("a", budget_bytes=30), Spans()
    load(state, double(size=10))
    for number in (5, 6):
        put(state, BASE + number)
    first = enqueue(state, 1, [BufferId(BASE + 5)])
    enqueue(state, 2, [BufferId(BASE + 6)])
    clock(10)
    spans.note_waits(state.memory.starved)
    clock(20)
    spans.note_waits(state.memory.starved)
    assert shown(spans) == []
    [execute] = [command for command in first if isinstance(command, events.Execute)]
    state.handle(events.UnitFinished(task=execute.task))
    state.handle(events.BuffersDropped(buffer_ids=[BufferId(BASE + 5), BufferId(BASE + 1000)]))
    clock(30)
    spans.note_waits(state.memory.starved)
    assert shown(spans) == [("memory", f"waits for memory: unit 0 of run {BASE + 2} of double", 10, 30)]


def test_a_wait_for_a_grant_has_the_schedulers_reason(clock):
    state, spans = ExecutorState("a"), Spans()
    state.handle(events.GrantsNeeded(needed=True, epoch=1))
    load(state, double())
    put(state, BASE + 5)
    for number in (1, 2, 3):
        enqueue(state, number, [BufferId(BASE + 5)])
    clock(10)
    spans.note_asking(state.grants.waiting)
    clock(20)
    spans.note_asking(state.grants.waiting)
    for number, reason in ((1, ""), (2, "b/c on devices that they share")):
        run = RunPart(RunId(BASE + number), SLICE)
        [execute, *_] = state.handle(events.UnitGranted(run=run, unit=0, held_for=reason))
        spans.note_granted(execute.task, 20 + number)
    third = RunPart(RunId(BASE + 3), SLICE)
    state.handle(events.RunCancelled(run=third, failure=Failure(kind="RunCancelled", message="cancelled")))
    assert state.handle(events.UnitGranted(run=third, unit=0)) == [events.ReportPassed(run=third, unit=0)]
    clock(30)
    spans.note_asking(state.grants.waiting)
    assert shown(spans) == [
        ("grant", f"waits for its grant: unit 0 of run {BASE + 1} of double: its scheduler's answer", 10, 21),
        ("grant", f"waits for its grant: unit 0 of run {BASE + 2} of double: b/c on devices that they share", 10, 22),
        ("grant", f"waits for its grant: unit 0 of run {BASE + 3} of double: its scheduler's answer", 10, 30),
    ]
    assert {span.client_id for span in spans.log.since(0)} == {1}


def test_what_is_issued_as_it_is_granted_has_not_waited(clock):
    state, spans = ExecutorState("a"), Spans()
    state.handle(events.GrantsNeeded(needed=True, epoch=1))
    load(state, double())
    put(state, BASE + 5)
    state.handle(events.UnitGranted(run=RunPart(RUN, SLICE), unit=0))
    commands = enqueue(state, 1, [BufferId(BASE + 5)])
    for command in commands:
        if isinstance(command, events.Execute):
            spans.note_granted(command.task, 10)
    spans.note_asking(state.grants.waiting)
    assert shown(spans) == []
