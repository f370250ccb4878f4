"""The gang scheduler's core: one order, one completion a run, nothing left behind."""

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sizes import sizes
from torchways.errors import Failure, InternalError
from torchways.island import state as core


def make_scheduler(*slices):
    """Each of `slices` is a tuple of executor ids; slice ids count from 1."""
    scheduler = core.SchedulerState()
    for slice_id, executor_ids in enumerate(slices, start=1):
        scheduler.handle(core.SliceAdded(slice_id=slice_id, executor_ids=executor_ids))
    return scheduler


def register(scheduler, program_id, *slices, client=1):
    parts = {slice_id: f"part {slice_id}" for slice_id in slices}
    return scheduler.handle(core.ProgramRegistered(client_id=client, program_id=program_id, name="step", parts=parts))


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


def end(scheduler, executor_id, run_id, failure=None):
    return scheduler.handle(core.RunEnded(executor_id=executor_id, run_id=run_id, failure=failure))


def failure(message, run_id=0):
    return Failure(kind="RemoteError", message=message, run_id=run_id)


def test_a_program_goes_to_the_executors_of_its_slices_and_is_ready_once():
    scheduler = make_scheduler(("a", "b"), ("c",), ("d",))
    commands = register(scheduler, 5, 1, 2)
    assert [(c.executor_id, c.part) for c in commands] == [("a", "part 1"), ("b", "part 1"), ("c", "part 2")]
    first = failure("first")
    for executor_id, problem in (("b", None), ("a", first)):
        loaded = core.ProgramLoaded(executor_id=executor_id, program_id=5, failure=problem)
        assert scheduler.handle(loaded) == []
    commands = scheduler.handle(core.ProgramLoaded(executor_id="c", program_id=5, failure=failure("second")))
    assert commands == [core.TellLoaded(client_id=1, program_id=5, failure=first)]


def test_a_run_has_one_sequence_on_all_its_executors():
    scheduler = make_scheduler(("a", "b"), ("c",))
    register(scheduler, 5, 1, 2)
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
    register(scheduler, 5, 1)
    run(scheduler, 3, 1)
    end(scheduler, "a", 3, failures[0])
    (finished,) = end(scheduler, "b", 3, failures[1])
    assert finished.failure.message == kept


def test_a_lost_executor_finishes_its_runs_and_its_slice():
    scheduler = make_scheduler(("a",), ("c",))
    register(scheduler, 5, 1, 2)
    run(scheduler, 1, 1, 2)
    run(scheduler, 2, 1)
    run(scheduler, 3, 2)
    finished = scheduler.handle(core.SliceRemoved(slice_id=1, reason="signal 9 (SIGKILL)"))
    assert [c.run_id for c in finished] == [2]  # run 1 still has a part on c
    assert finished[0].failure.kind == "ExecutorLost"
    assert finished[0].failure.message == "executor a is lost: signal 9 (SIGKILL)"
    (loaded,) = scheduler.handle(core.ProgramLoaded(executor_id="c", program_id=5, failure=None))
    assert (loaded.program_id, loaded.failure.kind) == (5, "ExecutorLost")
    (first,) = end(scheduler, "c", 1)
    assert (first.run_id, first.failure.kind) == (1, "ExecutorLost")
    (later,) = run(scheduler, 4, 1)
    assert (later.failure.kind, later.failure.message) == (
        "ExecutorLost",
        "slice 1 is not on this island: signal 9 (SIGKILL)",
    )
    assert set(scheduler.runs) == {3}


def test_what_is_not_known_fails_for_who_sent_it():
    scheduler = make_scheduler(("a",))
    with pytest.raises(InternalError, match="run 1 names program 5, which is not registered"):
        run(scheduler, 1, 1)
    (loaded,) = register(scheduler, 5, 9)
    assert loaded.failure.message == "slice 9 is not on this island: it was never added"
    (finished,) = run(scheduler, 2, 9)
    assert finished.failure.message == "slice 9 is not on this island: it was never added"
    (finished,) = run(scheduler, 3)
    assert "must have a slice" in finished.failure.message
    assert not scheduler.runs


def test_the_slices_that_are_left_run_their_parts_of_what_names_a_gone_one():
    scheduler = make_scheduler(("a",))
    (load,) = register(scheduler, 5, 1, 9)
    assert load.executor_id == "a"
    (loaded,) = scheduler.handle(core.ProgramLoaded(executor_id="a", program_id=5, failure=None))
    assert loaded.failure.message == "slice 9 is not on this island: it was never added"
    assert [c.executor_id for c in run(scheduler, 1, 1, 9)] == ["a"]
    (finished,) = end(scheduler, "a", 1)
    assert finished.failure.message == "slice 9 is not on this island: it was never added"


def test_dropping_a_client_leaves_nothing_of_it():
    scheduler = make_scheduler(("a", "b"), ("c",))
    register(scheduler, 5, 1, 2, client=1)
    register(scheduler, 6, 2, client=2)
    run(scheduler, 1, 1, 2, client=1)
    run(scheduler, 2, 2, client=2, program_id=6)
    commands = scheduler.handle(core.ClientGone(client_id=1))
    assert commands == [core.SendDrop(executor_id=e, client_id=1) for e in ("a", "b", "c")]
    assert (set(scheduler.programs), set(scheduler.runs)) == ({6}, {2})
    assert end(scheduler, "a", 1) == []
    assert scheduler.handle(core.ProgramLoaded(executor_id="a", program_id=5, failure=None)) == []


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
    register(scheduler, 5, 1)
    run(scheduler, 1, 1)
    end(scheduler, "a", 1)
    with pytest.raises(InternalError, match=r"run 1 ended on a, not running it; enqueued as sequence 1, ended on"):
        end(scheduler, "a", 1)
    with pytest.raises(InternalError, match=r"run 1 was requested twice; .* running on \['b'\]"):
        run(scheduler, 1, 1)
    with pytest.raises(InternalError, match=r"program 5 .* was registered twice"):
        register(scheduler, 5, 1)
    with pytest.raises(InternalError, match="slice 1 was added twice"):
        scheduler.handle(core.SliceAdded(slice_id=1, executor_ids=("a",)))
    scheduler.handle(core.SliceRemoved(slice_id=1, reason="it was released"))
    with pytest.raises(InternalError, match="added again after it was removed: it was released"):
        scheduler.handle(core.SliceAdded(slice_id=1, executor_ids=("a",)))


class Simulation:
    """Clients and executors around a scheduler, with executors that report in any order."""

    SLICES = (("a", "b"), ("c",), ("d", "e", "f"))

    def __init__(self):
        self.scheduler = make_scheduler(*self.SLICES)
        self.clients = {1, 2}
        for client in self.clients:
            self.carry_out(register(self.scheduler, client, 1, 2, 3, client=client))
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
        self.carry_out(self.scheduler.handle(core.SliceRemoved(slice_id=slice_id, reason="signal 9")))

    def drop(self, client):
        self.clients.discard(client)
        self.carry_out(self.scheduler.handle(core.ClientGone(client_id=client)))
        assert all(r.client_id != client for r in self.scheduler.runs.values())
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
    dropped_runs = set()
    for event in events:
        match event:
            case ("request", client, slices) if client in simulation.clients:
                simulation.request(client, slices)
            case ("report", position) if simulation.running:
                simulation.report(position)
            case ("lose", slice_id):
                simulation.lose(slice_id)
            case ("drop", client):
                mine = {r for r, owner in simulation.requested.items() if owner == client}
                dropped_runs |= mine - set(simulation.finished)
                simulation.drop(client)
    while simulation.running:
        simulation.report(0)
    for sequences in simulation.enqueued.values():
        assert sequences == sorted(set(sequences))
    assert all(len(sequences) == 1 for sequences in simulation.sequences.values())
    assert sorted(simulation.finished) == sorted(set(simulation.requested) - dropped_runs)
    assert not simulation.scheduler.runs


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_after_many_steps_every_collection_is_as_large_as_after_a_few(seed):
    """Each step: a slice more, a client's program and runs on some slices, which end, are lost or dropped midway."""
    dice = random.Random(seed)
    scheduler = core.SchedulerState(max_gone_slices=2)
    scheduler.handle(core.SliceAdded(slice_id=1, executor_ids=("a",), device_indices=(0,)))
    after = []
    for step in range(1, 31):
        mine, executors = 1 + step, (f"b{step}", f"c{step}")
        scheduler.handle(core.SliceAdded(slice_id=mine, executor_ids=executors, device_indices=(0, 1)))
        register(scheduler, step, 1, mine, client=step)
        for number in range(5):
            run(scheduler, 100 * step + number, 1, mine, client=step, program_id=step)
        events = [core.RunEnded(executor_id=e, run_id=100 * step + n, failure=None) for e in "a" for n in range(5)]
        events += [core.RunEnded(executor_id=e, run_id=100 * step + n, failure=None) for e in executors for n in (0, 1)]
        events += [core.ProgramLoaded(executor_id="a", program_id=step, failure=None)]
        events += [core.UnitReady(executor_id=executors[0], run_id=100 * step + n, unit=n) for n in range(3)]
        ends = [core.ClientGone(client_id=step), core.SliceRemoved(slice_id=mine, reason="it was released")]
        ends += [core.ProgramForgotten(program_id=step)]
        dice.shuffle(events)
        dice.shuffle(ends)
        granted = []
        for event in [*events[: dice.randrange(len(events))], *ends]:
            granted += [c for c in scheduler.handle(event) if isinstance(c, core.SendGrant)]
            if granted and dice.random() < 0.5:
                item = granted.pop(0)
                scheduler.handle(core.UnitEnqueued(executor_id=item.executor_id, run_id=item.run_id, unit=item.unit))
        after.append(sizes(scheduler))
    assert after[-1] == after[2]
