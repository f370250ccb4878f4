"""The gang scheduler's core: one order, one completion a run, nothing left behind."""

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sizes import sizes
from torchways.errors import Failure, InternalError
from torchways.ids import PartId, RunPart
from torchways.island import events as core
from torchways.island.state import SchedulerState


def make_scheduler(*slices, owner=1):
    """Each of `slices` is a tuple of executor ids; slice ids count from 1. `owner`: their client."""
    scheduler = SchedulerState()
    for slice_id, executor_ids in enumerate(slices, start=1):
        added = core.SliceAdded(
            slice_id=slice_id, client_id=owner, executor_ids=executor_ids, device_indices=tuple(map(ord, executor_ids))
        )
        scheduler.handle(added)
    return scheduler


def register(scheduler, program_id, *slices, client=1, compiled=False, islands=()):
    parts = {slice_id: f"part {slice_id}" for slice_id in slices}
    registered = core.ProgramRegistered(
        client_id=client, program_id=program_id, name="step", parts=parts, islands=islands
    )
    commands = scheduler.handle(registered)
    for command in commands if compiled else ():
        if isinstance(command, core.SendLoad):
            part = command.part_id
            scheduler.handle(core.ProgramLoaded(executor_id=command.executor_id, part=part, failure=None))
    return commands


def run(scheduler, run_id, *slices, client=1, program_id=5):
    return scheduler.handle(
        core.RunRequested(
            client_id=client,
            program_id=program_id,
            run_id=run_id,
            first_buffer_id=100 * run_id,
            arguments={slice_id: f"arguments {slice_id}" for slice_id in slices},
        )
    )


def slice_of(scheduler, executor_id):
    return next(slice_id for slice_id, members in scheduler.slices.items() if executor_id in members)


def end(scheduler, executor_id, run_id, failure=None):
    part = RunPart(run_id, slice_of(scheduler, executor_id))
    return scheduler.handle(core.RunEnded(executor_id=executor_id, run=part, failure=failure))


def loaded(scheduler, executor_id, program_id, failure=None):
    part = PartId(program_id, slice_of(scheduler, executor_id))
    return scheduler.handle(core.ProgramLoaded(executor_id=executor_id, part=part, failure=failure))


def failure(message, run_id=0):
    return Failure(kind="RemoteError", message=message, run_id=run_id)


def test_a_program_goes_to_the_executors_of_its_slices_and_is_ready_once():
    scheduler = make_scheduler(("a", "b"), ("c",), ("d",))
    commands = register(scheduler, 5, 1, 2)
    assert [(c.executor_id, c.part) for c in commands] == [("a", "part 1"), ("b", "part 1"), ("c", "part 2")]
    first = failure("first")
    for executor_id, problem in (("b", None), ("a", first)):
        assert loaded(scheduler, executor_id, 5, problem) == []
    commands = loaded(scheduler, "c", 5, failure("second"))
    assert commands == [core.TellLoaded(client_id=1, program_id=5, failure=first)]


def test_a_run_has_one_sequence_on_all_its_executors():
    scheduler = make_scheduler(("a", "b"), ("c",))
    register(scheduler, 5, 1, 2, compiled=True)
    assert [(c.executor_id, c.sequence, c.arguments) for c in run(scheduler, 1, 1, 2)] == [
        ("a", 1, "arguments 1"),
        ("b", 1, "arguments 1"),
        ("c", 1, "arguments 2"),
    ]
    assert [(c.executor_id, c.sequence) for c in run(scheduler, 2, 2)] == [("c", 2)]
    assert end(scheduler, "a", 1) == []
    assert end(scheduler, "c", 2) == [core.TellFinished(client_id=1, run_id=2, failure=None)]
    assert end(scheduler, "b", 1) == []
    assert end(scheduler, "c", 1) == [core.TellFinished(client_id=1, run_id=1, failure=None)]
    assert not scheduler.runs


@pytest.mark.parametrize(
    ("failures", "kept"),
    [
        ((None, failure("only", 3)), "only"),
        ((failure("first", 3), failure("second", 3)), "first"),
        ((failure("late", 3), failure("cause", 2)), "cause"),
        ((failure("own"), failure("inherited", 1)), "inherited"),
    ],
)
def test_the_failure_of_the_lowest_run_is_kept(failures, kept):
    scheduler = make_scheduler(("a", "b"))
    register(scheduler, 5, 1, compiled=True)
    run(scheduler, 3, 1)
    end(scheduler, "a", 3, failures[0])
    (finished,) = end(scheduler, "b", 3, failures[1])
    assert finished.failure.message == kept


def test_a_lost_executor_finishes_its_runs_and_its_slice():
    scheduler = make_scheduler(("a",), ("c",))
    register(scheduler, 5, 1, 2, compiled=True)
    run(scheduler, 1, 1, 2)
    run(scheduler, 2, 1)
    run(scheduler, 3, 2)
    finished = scheduler.handle(core.ExecutorRemoved(executor_id="a", reason="signal 9 (SIGKILL)"))
    assert [c.run_id for c in finished] == [2]  # run 1 still has a part on c
    assert finished[0].failure.kind == "ExecutorLost"
    assert finished[0].failure.message == "executor a is lost: signal 9 (SIGKILL)"
    (first,) = end(scheduler, "c", 1)
    assert (first.run_id, first.failure.kind) == (1, "ExecutorLost")
    (later,) = run(scheduler, 4, 1)
    assert (later.failure.kind, later.failure.message) == (
        "ExecutorLost",
        "slice 1 is not on this island: signal 9 (SIGKILL)",
    )
    assert set(scheduler.runs) == {3}


def test_a_program_that_is_compiled_does_not_hold_up_its_clients_other_runs():
    scheduler = make_scheduler(("a",))
    register(scheduler, 5, 1)
    register(scheduler, 6, 1, compiled=True)
    assert [c.run.run_id for c in run(scheduler, 1, 1, program_id=5)] == [1]
    assert [c.run.run_id for c in run(scheduler, 2, 1, program_id=6)] == [2]


def test_a_program_that_loads_on_a_lost_executor_fails():
    scheduler = make_scheduler(("a",), ("c",))
    register(scheduler, 5, 1, 2)
    assert scheduler.handle(core.ExecutorRemoved(executor_id="a", reason="signal 9")) == []
    (told,) = loaded(scheduler, "c", 5)
    assert (told.program_id, told.failure.kind) == (5, "ExecutorLost")


def test_what_is_not_known_fails_for_who_sent_it():
    scheduler = make_scheduler(("a",))
    with pytest.raises(InternalError, match="run 1 names program 5, which is not registered"):
        run(scheduler, 1, 1)
    (told,) = register(scheduler, 5, 9)
    assert told.failure.message == "slice 9 is not on this island: it was never added"
    (finished,) = run(scheduler, 2, 9)
    assert finished.failure.message == "slice 9 is not on this island: it was never added"
    (finished,) = run(scheduler, 3)
    assert "must have a slice" in finished.failure.message
    assert not scheduler.runs


def test_the_slices_that_are_left_run_their_parts_of_what_names_a_gone_one():
    scheduler = make_scheduler(("a",))
    (load,) = register(scheduler, 5, 1, 9)
    assert load.executor_id == "a"
    (told,) = loaded(scheduler, "a", 5)
    assert told.failure.message == "slice 9 is not on this island: it was never added"
    assert [c.executor_id for c in run(scheduler, 1, 1, 9)] == ["a"]
    (finished,) = end(scheduler, "a", 1)
    assert finished.failure.message == "slice 9 is not on this island: it was never added"


def test_dropping_a_client_leaves_nothing_of_it():
    scheduler = make_scheduler(("a", "b"), ("c",), owner=2)
    register(scheduler, 5, 1, 2, client=1, compiled=True)
    register(scheduler, 6, 2, client=2, compiled=True)
    run(scheduler, 1, 1, 2, client=1)
    run(scheduler, 2, 2, client=2, program_id=6)
    commands = scheduler.handle(core.ClientGone(client_id=1))
    assert commands == [core.SendDrop(executor_id=e, client_id=1) for e in ("a", "b", "c")]
    assert set(scheduler.programs) == {6}
    for executor_id in ("a", "b", "c"):  # its runs end by themselves
        end(scheduler, executor_id, 1)
    assert set(scheduler.runs) == {2}
    assert loaded(scheduler, "a", 5) == []


def test_a_client_that_is_gone_has_no_slice_left_even_if_it_closed_one_behind_runs_that_are_held():
    scheduler = SchedulerState(window=0.0)
    for slice_id, executor_id in ((1, "a"), (2, "b")):
        scheduler.handle(core.SliceAdded(slice_id=slice_id, client_id=1, executor_ids=(executor_id,)))
    register(scheduler, 5, 1, 2, compiled=True)
    run(scheduler, 1, 1, 2)
    run(scheduler, 2, 1, 2)
    assert scheduler.handle(core.SliceClosed(slice_id=1, reason="it was closed", is_in_order=True)) == []
    assert set(scheduler.slices) == {1, 2}  # behind run 2
    drops = scheduler.handle(core.ClientGone(client_id=1))
    assert drops == [
        *[core.SendDrop(executor_id=executor_id, client_id=1) for executor_id in "ab"],
        core.SendDrop(executor_id="a", slice_id=1),
        core.SendDrop(executor_id="b", slice_id=2),
    ]
    assert scheduler.handle(core.SliceClosed(slice_id=2, reason="its client is gone")) == []  # the resource manager
    for executor_id, slice_id in (("a", 1), ("b", 2)):  # run 1 has its devices until it ends
        assert (executor_id,) in scheduler.admission.lanes
        scheduler.handle(core.RunEnded(executor_id=executor_id, run=RunPart(1, slice_id), failure=None))
    left = [scheduler.slices, scheduler.owners, scheduler.admission.lanes, scheduler.turns.devices]
    left += [scheduler.runs, scheduler.admission.runs, scheduler.programs]
    assert not any(left)


def _totals(scheduler):
    """By client: the runs that have finished, and the device time, over all sets of devices."""
    found = defaultdict(lambda: (0, 0.0))
    for totals in [*(lane.totals for lane in scheduler.admission.lanes.values()), *scheduler.totals.values()]:
        for client_id, usage in totals.usage.items():
            num, seconds = found[client_id]
            found[client_id] = (num + usage.num_finished, seconds + usage.seconds)
    return dict(found)


@pytest.mark.parametrize("is_lost", [False, True])
def test_what_a_client_had_of_devices_is_counted_until_it_is_gone(is_lost):
    """Counters do not fall when the last slice of devices goes, and go on when they have another executor."""
    scheduler = make_scheduler(("a",), ("b",))
    register(scheduler, 5, 1, 2, compiled=True)
    for run_id, slice_id, executor_id in ((1, 1, "a"), (2, 2, "b"), (3, 2, "b")):
        run(scheduler, run_id, slice_id)
        part = RunPart(run_id, slice_id)
        scheduler.handle(core.RunEnded(executor_id=executor_id, run=part, failure=None, device_seconds=1.0))
    assert _totals(scheduler) == {1: (3, 3.0)}
    if is_lost:
        scheduler.handle(core.ExecutorRemoved(executor_id="b", reason="signal 9"))
    else:
        scheduler.handle(core.SliceClosed(slice_id=2, reason="it was closed", is_in_order=True))
    assert _totals(scheduler) == {1: (3, 3.0)}
    assert [totals.seconds for totals in scheduler.totals.values()] == [2.0]
    scheduler.handle(core.SliceAdded(slice_id=3, client_id=2, executor_ids=("c",), device_indices=(ord("b"),)))
    assert not scheduler.totals
    assert scheduler.admission.lanes["c",].totals.seconds == 2.0
    scheduler.handle(core.SliceClosed(slice_id=3, reason="it was closed"))
    assert _totals(scheduler) == {1: (3, 3.0)}
    scheduler.handle(core.ClientGone(client_id=1))
    assert not _totals(scheduler)
    assert sum(totals.seconds for totals in scheduler.totals.values()) == 3.0


def test_a_host_that_ends_a_run_after_another_of_its_gang_is_lost_is_not_at_fault():
    scheduler = make_scheduler(("a", "b"), ("c",))
    register(scheduler, 5, 1, 2, compiled=True)
    run(scheduler, 1, 1, 2)
    run(scheduler, 2, 1)
    scheduler.handle(core.ExecutorRemoved(executor_id="b", reason="signal 9"))
    for run_id in (1, 2):  # run 1 has a part on c, run 2 is over
        late = core.RunEnded(executor_id="a", run=RunPart(run_id, 1), failure=None, device_seconds=1.0)
        assert scheduler.handle(late) == []
    (finished,) = end(scheduler, "c", 1)
    assert (finished.run_id, finished.failure.kind) == (1, "ExecutorLost")


def test_releases_and_forgotten_programs_go_to_the_executors_concerned():
    scheduler = make_scheduler(("a", "b"), ("c",))
    register(scheduler, 5, 1)
    commands = scheduler.handle(core.BuffersReleased(slice_id=1, buffer_ids=[7, 8]))
    assert [(c.executor_id, c.buffer_ids) for c in commands] == [("a", [7, 8]), ("b", [7, 8])]
    assert scheduler.handle(core.BuffersReleased(slice_id=9, buffer_ids=[7])) == []
    commands = scheduler.handle(core.ProgramForgotten(program_id=5))
    assert [(c.executor_id, c.program_id) for c in commands] == [("a", 5), ("b", 5)]
    assert not scheduler.programs
    assert scheduler.handle(core.ProgramForgotten(program_id=5)) == []


def test_an_impossible_event_shows_the_history():
    scheduler = make_scheduler(("a", "b"))
    register(scheduler, 5, 1, compiled=True)
    run(scheduler, 1, 1)
    end(scheduler, "a", 1)
    with pytest.raises(InternalError, match=r"run 1 ended for slice 1 on a, not running it; enqueued as sequence 1"):
        end(scheduler, "a", 1)
    with pytest.raises(InternalError, match=r"run 1 was requested twice; .* running on \[\('b', 1\)\]"):
        run(scheduler, 1, 1)
    with pytest.raises(InternalError, match=r"program 5 .* was registered twice"):
        register(scheduler, 5, 1)
    with pytest.raises(InternalError, match="slice 1 was added twice"):
        scheduler.handle(core.SliceAdded(slice_id=1, client_id=1, executor_ids=("a",)))
    scheduler.handle(core.SliceClosed(slice_id=1, reason="it was closed"))
    with pytest.raises(InternalError, match="added again after it was removed: it was closed"):
        scheduler.handle(core.SliceAdded(slice_id=1, client_id=1, executor_ids=("a",)))


def test_slices_of_one_executor_are_parts_of_their_own():
    scheduler = SchedulerState()
    for slice_id in (1, 2):
        assert not scheduler.handle(
            core.SliceAdded(slice_id=slice_id, client_id=1, executor_ids=("a",), device_indices=(0,))
        )
    assert [(c.executor_id, c.part) for c in register(scheduler, 5, 1, 2, compiled=True)] == [
        ("a", "part 1"),
        ("a", "part 2"),
    ]
    assert [(c.executor_id, c.slice_id) for c in run(scheduler, 1, 1, 2)] == [("a", 1), ("a", 2)]
    drops = scheduler.handle(core.SliceClosed(slice_id=1, reason="it was closed"))
    assert core.SendDrop(executor_id="a", slice_id=1) in drops
    assert scheduler.handle(core.RunEnded(executor_id="a", run=RunPart(1, 1), failure=None)) == []
    finished = scheduler.handle(core.RunEnded(executor_id="a", run=RunPart(1, 2), failure=None))
    assert finished == [core.TellFinished(client_id=1, run_id=1, failure=None)]  # what was in flight has run
    (later,) = run(scheduler, 2, 1)
    assert later.failure.message == "slice 1 is not on this island: it was closed"


def test_overlapping_executors_compute_one_at_a_time_while_both_have_slices():
    scheduler = SchedulerState()

    def add(slice_id, executor_id, *devices):
        added = core.SliceAdded(slice_id=slice_id, client_id=1, executor_ids=(executor_id,), device_indices=devices)
        return scheduler.handle(added)

    def ready(executor_id, run_id):
        slice_id = slice_of(scheduler, executor_id)
        return scheduler.handle(core.UnitReady(executor_id=executor_id, run=RunPart(run_id, slice_id), unit=0))

    def passed(executor_id, run_id):
        slice_id = slice_of(scheduler, executor_id)
        return scheduler.handle(core.UnitPassed(executor_id=executor_id, run=RunPart(run_id, slice_id), unit=0))

    assert add(1, "a", 0, 1) == []
    assert add(2, "c", 3) == []
    needed = [core.SendGrantsNeeded(executor_id=name, needed=True, epoch=epoch) for epoch, name in enumerate("ab", 1)]
    assert add(3, "b", 1, 2) == needed
    assert ready("b", 7) == []  # what a computes may have no end yet
    assert scheduler.handle(core.ExecutorIdle(executor_id="a", epoch=0)) == []  # of an earlier need
    assert scheduler.handle(core.ExecutorIdle(executor_id="a", epoch=1)) == [
        core.SendGrant(executor_id="b", run=RunPart(7, 3), unit=0)
    ]
    scheduler.handle(core.ExecutorIdle(executor_id="b", epoch=2))
    assert ready("a", 8) == []
    assert ready("b", 9) == []  # behind what waits
    assert passed("b", 7) == [core.SendGrant(executor_id="a", run=RunPart(8, 1), unit=0)]
    assert passed("a", 8) == [core.SendGrant(executor_id="b", run=RunPart(9, 3), unit=0)]
    free = scheduler.handle(core.SliceClosed(slice_id=3, reason="it was closed"))
    assert core.SendGrantsNeeded(executor_id="b", needed=False, epoch=3) in free
    assert core.SendGrantsNeeded(executor_id="a", needed=False, epoch=4) in free
    assert ready("a", 10) == []  # said before it knew


class Simulation:
    """Clients and executors around a scheduler, with executors that report in any order."""

    SLICES = (("a", "b"), ("c",), ("d", "e", "f"))

    def __init__(self):
        self.scheduler = make_scheduler(*self.SLICES, owner=3)  # whoever has slices, they outlive both clients
        self.clients = {1, 2}
        for client in self.clients:
            self.carry_out(register(self.scheduler, client, 1, 2, 3, client=client, compiled=True))
        self.enqueued = defaultdict(list)  # executor -> sequences, in order
        self.sequences = defaultdict(set)  # run -> its sequences
        self.running = []  # (executor, run)
        self.requested = {}  # run -> client
        self.finished = []
        self.lost = set()

    def carry_out(self, commands):
        for command in commands:
            match command:
                case core.SendEnqueue():
                    assert command.executor_id not in self.lost
                    self.enqueued[command.executor_id].append(command.sequence)
                    self.sequences[command.run.run_id].add(command.sequence)
                    self.running.append((command.executor_id, command.run.run_id))
                case core.TellFinished():
                    assert command.client_id == self.requested[command.run_id]
                    self.finished.append(command.run_id)

    def request(self, client, slices):
        run_id = len(self.requested) + 1
        self.requested[run_id] = client
        self.carry_out(run(self.scheduler, run_id, *slices, client=client, program_id=client))

    def report(self, position):
        executor_id, run_id = self.running.pop(position % len(self.running))
        if executor_id not in self.lost:
            self.carry_out(end(self.scheduler, executor_id, run_id))

    def lose(self, slice_id):
        self.lost |= set(self.SLICES[slice_id - 1])
        executor_id = self.SLICES[slice_id - 1][0]
        self.carry_out(self.scheduler.handle(core.ExecutorRemoved(executor_id=executor_id, reason="signal 9")))

    def drop(self, client):
        self.clients.discard(client)
        self.carry_out(self.scheduler.handle(core.ClientGone(client_id=client)))
        assert all(p.client_id != client for p in self.scheduler.programs.values())


_SLICE_SETS = st.lists(st.integers(1, 3), min_size=1, max_size=3, unique=True)
_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("request"), st.integers(1, 2), _SLICE_SETS),
        st.tuples(st.just("report"), st.integers(0, 1000)),
        st.tuples(st.just("report"), st.integers(0, 1000)),
        st.tuples(st.just("lose"), st.integers(1, 3)),
        st.tuples(st.just("drop"), st.integers(1, 2)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(_EVENTS)
def test_any_order_of_events_keeps_one_order_and_finishes_each_run_once(events):
    simulation = Simulation()
    for event in events:
        match event:
            case ("request", client, slices) if client in simulation.clients:
                simulation.request(client, slices)
            case ("report", position) if simulation.running:
                simulation.report(position)
            case ("lose", slice_id):
                simulation.lose(slice_id)
            case ("drop", client):
                simulation.drop(client)
    while simulation.running:
        simulation.report(0)
    for sequences in simulation.enqueued.values():
        assert sequences == sorted(set(sequences))
    assert all(len(sequences) == 1 for sequences in simulation.sequences.values())
    assert sorted(simulation.finished) == sorted(set(simulation.requested))
    assert not simulation.scheduler.runs


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_after_many_steps_every_collection_is_as_large_as_after_a_few(seed):
    """Each step: a slice more, a client's program and runs on some slices, which end, are lost or dropped midway."""
    dice = random.Random(seed)
    scheduler = SchedulerState(max_gone_slices=2)
    scheduler.handle(core.SliceAdded(slice_id=1, client_id=0, executor_ids=("a",), device_indices=(0,)))
    after = []
    for step in range(1, 31):
        mine, executors = 1 + step, (f"b{step}", f"c{step}")
        scheduler.handle(core.SliceAdded(slice_id=mine, client_id=step, executor_ids=executors, device_indices=(0, 1)))
        register(scheduler, step, 1, mine, client=step, compiled=True)
        for number in range(5):
            run(scheduler, 100 * step + number, 1, mine, client=step, program_id=step)
        events = []
        for executor_id, slice_id in [("a", 1), *((executor_id, mine) for executor_id in executors)]:
            reports = []
            for part in (RunPart(100 * step + n, slice_id) for n in range(5)):
                failure = dice.choice([None, None, Failure(kind="ExecutorLost", message="on this host alone")])
                if slice_id == mine and dice.random() < 0.8:
                    reports.append(core.UnitReady(executor_id=executor_id, run=part, unit=0, failure=failure))
                reports.append(core.RunEnded(executor_id=executor_id, run=part, failure=failure))
            # In the order of each executor.
            positions = sorted(dice.randrange(len(events) + 1) for _ in reports)
            for number, (where, report) in enumerate(zip(positions, reports, strict=True)):
                events.insert(where + number, report)
        ends = [core.ClientGone(client_id=step), core.SliceClosed(slice_id=mine, reason="it was closed")]
        ends += [core.ProgramForgotten(program_id=step)]
        dice.shuffle(ends)
        position = dice.randrange(len(events))
        granted = []
        for event in [*events[:position], *ends, *events[position:]]:
            granted += [c for c in scheduler.handle(event) if isinstance(c, core.SendGrant)]
            if granted and dice.random() < 0.5:
                item = granted.pop(0)
                scheduler.handle(core.UnitPassed(executor_id=item.executor_id, run=item.run, unit=item.unit))
        for executor_id in executors:
            scheduler.handle(core.ExecutorRemoved(executor_id=executor_id, reason="it was idle"))
        after.append(sizes(scheduler))
    assert after[-1] == after[2]


def test_a_clients_programs_are_counted_until_they_are_forgotten():
    scheduler = make_scheduler(("a",))
    for program_id, client_id in ((5, 1), (6, 1), (7, 2)):
        register(scheduler, program_id, 1, client=client_id, compiled=True)
    assert [scheduler.num_programs(client_id) for client_id in (1, 2, 3)] == [2, 1, 0]
    run(scheduler, 1, 1)
    scheduler.handle(core.ProgramForgotten(program_id=5))
    scheduler.handle(core.ProgramForgotten(program_id=6))
    assert [scheduler.num_programs(client_id) for client_id in (1, 2)] == [0, 1]
    scheduler.handle(core.ClientGone(client_id=2))
    assert scheduler.num_programs(2) == 0


def test_runs_without_end_are_refused_and_hold_up_nobody_else():
    scheduler = make_scheduler(("a",))
    scheduler.max_runs_of_client = 2
    register(scheduler, 5, 1, compiled=True)
    run(scheduler, 1, 1)
    run(scheduler, 2, 1)
    [refusal] = run(scheduler, 3, 1)
    assert refusal.failure.kind == "ResourceExhausted"
    assert any(isinstance(command, core.SendEnqueue) for command in run(scheduler, 4, 1, client=2))
    end(scheduler, "a", 1)
    assert any(isinstance(command, core.SendEnqueue) for command in run(scheduler, 6, 1))
