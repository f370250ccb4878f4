"""The executor's core over event orders: two executors, their links and devices, all simulated in one loop.

Buffers are `_Buffer`s that know whether a donation has overwritten them: reading one that is dead fails the test.
"""

import random
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sizes import sizes
from torchways.errors import Failure
from torchways.executor import events
from torchways.executor.plan import load_program
from torchways.executor.routes import Routes
from torchways.executor.runs import lowest
from torchways.executor.stalls import waiting_for
from torchways.executor.state import ExecutorState
from torchways.ids import BufferId, ClientId, PartId, ProgramId, RunId, RunPart, SliceId
from torchways.ir.part import NO_BUFFER, Arguments, ComputeInstruction, ReceiveInstruction, SendInstruction

CLIENT = 1
BASE = CLIENT << 40
SLICE = SliceId(3)
PART = PartId(ProgramId(BASE + 1), SLICE)


@dataclass(eq=False)
class _Buffer:
    value: int
    alive: bool = True

    def read(self):
        assert self.alive, "a donated buffer is read"
        return self.value


def train_parts():
    """Two executors, one step: a: y = w + x, send y; b: v' = v + y (v donated), send v'; a: w' = w + v' (w donated)."""
    a = load_program(
        PART,
        "step",
        2,
        [10] * 5,  # w, x, y, v', w'
        (
            ComputeInstruction(function_index=0, inputs=(0, 1), outputs=(2,), donated=()),
            SendInstruction(slot=2, edge_id=0, peer=1),
            ReceiveInstruction(slot=3, edge_id=1, peer=1),
            ComputeInstruction(function_index=0, inputs=(0, 3), outputs=(4,), donated=(0,)),
        ),
        ((4, 0), (2, 1)),
        routes=Routes(targets={0: ("b",)}, senders={1: "b"}),
    )
    b = load_program(
        PART,
        "step",
        1,
        [10] * 3,  # v, y, v'
        (
            ReceiveInstruction(slot=1, edge_id=0, peer=0),
            ComputeInstruction(function_index=0, inputs=(0, 1), outputs=(2,), donated=(0,)),
            SendInstruction(slot=2, edge_id=1, peer=0),
        ),
        ((2, 2),),
        routes=Routes(targets={1: ("a",)}, senders={0: "a"}),
    )
    return {"a": a, "b": b}


def enqueued(run, first, arguments, *, sequence, cancelled=None):
    """The event of a run of PART; `run` and `first` (of its results) count from BASE."""
    return events.RunEnqueued(
        part=PART,
        run_id=RunId(BASE + run),
        sequence=sequence,
        first_buffer_id=BufferId(BASE + first),
        arguments=Arguments(arguments),
        cancelled=cancelled,
    )


class World:
    """Executors, and everything that is under way between them, in no particular order."""

    def __init__(self, pick, budget=0, max_remembered=1000):
        self.pick = pick
        self.states = {name: ExecutorState(name, budget_bytes=budget, max_remembered=max_remembered) for name in "ab"}
        self.pending = []  # (queue, executor, event or work): within a queue, order is kept
        self.ended = {name: [] for name in "ab"}
        self.unloaded = {name: [] for name in "ab"}
        self.delivered = {}
        self.executed = 0
        self.fail_at = None
        self.uncompilable = None
        self.peak = 0

    def post(self, queue, name, event):
        self.pending.append((queue, name, event))

    def run(self):
        while self.pending:
            firsts, seen = [], set()
            for index, (queue, _, _) in enumerate(self.pending):
                if queue is None or queue not in seen:
                    seen.add(queue)
                    firsts.append(index)
            _, name, event = self.pending.pop(self.pick(firsts))
            if callable(event):
                event()
                continue
            for command in self.states[name].handle(event):
                self.carry_out(name, command)
            self.peak = max(self.peak, *(state.memory.used_bytes for state in self.states.values()))

    def carry_out(self, name, command):
        match command:
            case events.Compile():
                failure = Failure(kind="CaptureError", message="injected") if name == self.uncompilable else None
                self.post(None, name, events.ProgramCompiled(part=command.program.part, failure=failure))
            case events.Place():
                data = command.data
                command.cell.buffer = data if isinstance(data, _Buffer) else _Buffer(int(data[1:]))
            case events.Execute():
                self.execute(name, command)
            case events.Send():  # the value is read when it is computed, which is later
                self.post(f"device {name}", name, lambda: self.send(name, command))
            case events.Deliver():
                self.post(f"device {name}", name, lambda: self.deliver(name, command))
            case events.ReportEnded():
                self.ended[name].append((command.run.run_id, command.failure))
            case events.Unload():
                assert not any(run.program.part == command.part for run in self.states[name].runs.values())
                self.unloaded[name].append(command.part)

    def send(self, name, command):
        other = "b" if name == "a" else "a"
        failure = command.cell.failure
        data = None if failure else _Buffer(command.cell.buffer.read())
        edge_id = command.instruction.edge_id
        run_id = command.task.run.run_id
        arrived = events.TransferArrived(peer=name, run_id=run_id, edge_id=edge_id, data=data, failure=failure)
        self.post(f"link to {other}", other, arrived)
        self.post(None, name, events.UnitFinished(task=command.task))

    def deliver(self, name, command):
        cell = command.cell
        self.delivered[command.fetch_id] = cell.failure or cell.buffer.read()
        self.post(None, name, events.FetchEnded(cell=cell))

    def execute(self, name, command):
        task = command.task
        self.executed += 1
        failure = lowest([cell.failure for cell in command.inputs])
        if self.executed == self.fail_at:
            failure = Failure(kind="RemoteError", message="injected", run_id=task.run.run_id)
        total = 0 if failure else sum(cell.buffer.read() for cell in command.inputs)
        for slot in () if failure else task.unit.donated:
            command.inputs[task.unit.reads.index(slot)].buffer.alive = False
        for cell in command.outputs:
            cell.buffer, cell.failure = None if failure else _Buffer(total), failure
        self.post(f"device {name}", name, events.UnitFinished(task=task, failure=failure))


def drive(draw, num_runs, fail_at=None, uncompilable=None, lost=(), drop_program=False, budget=0, cancelled=()):
    """Runs the step `num_runs` times with state carried on, in an order that hypothesis draws."""
    world = World(lambda items: draw(st.sampled_from(items)), budget)
    world.fail_at = fail_at
    world.uncompilable = uncompilable
    for name in lost:
        failure = Failure(kind="ExecutorLost", message="injected")
        world.post(None, "b" if name == "a" else "a", events.PeerLost(peer=name, failure=failure))
    for name, program in train_parts().items():
        world.post(f"scheduler of {name}", name, events.ProgramArrived(program=program))
    w, v = BufferId(BASE + 2), BufferId(BASE + 3)
    world.post(None, "a", events.BufferPut(buffer_id=w, data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=10))
    world.post(None, "b", events.BufferPut(buffer_id=v, data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=10))
    for number in range(num_runs):
        first = BASE + 100 + 10 * number
        run = {"part": PART, "run_id": RunId(first + 9), "sequence": number}
        run["first_buffer_id"] = BufferId(first)
        of_a = Arguments([w, NO_BUFFER], [f"={number}"])
        cancel = Failure(kind="RunCancelled", message=f"cancelled {number}")
        for name, how in cancelled.get(number, {}).items() if cancelled else ():
            if how == "held":  # the scheduler held it, and sends it for its failures
                run = {**run, "cancelled": cancel}
            else:
                stop = events.RunCancelled(run=RunPart(run["run_id"], SLICE), failure=cancel)
                world.post(None if how == "at any time" else f"scheduler of {name}", name, stop)
        world.post("scheduler of a", "a", events.RunEnqueued(arguments=of_a, **run))
        world.post("scheduler of b", "b", events.RunEnqueued(arguments=Arguments([v]), **run))
        world.post(None, "a", events.FetchRequested(fetch_id=number, buffer_id=BufferId(first + 1)))
        w, v = BufferId(first), BufferId(first + 2)
    world.post(None, "a", events.FetchRequested(fetch_id=1000, buffer_id=w))
    if drop_program:  # in the stream's order: behind the last run, maybe before the compilation ends
        for name in "ab":
            world.post(f"scheduler of {name}", name, events.ProgramDropped(program_id=ProgramId(BASE + 1)))
    world.run()
    return world


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 4), st.booleans())
def test_any_order_of_events_gives_the_same_values(data, num_runs, drop_program):
    world = drive(data.draw, num_runs, drop_program=drop_program)
    w, v = 1, 1
    for number in range(num_runs):
        y = w + number
        v = v + y
        w = w + v
        assert world.delivered[number] == y
    assert world.delivered[1000] == w
    for name in "ab":
        assert sorted(run_id for run_id, _ in world.ended[name]) == [
            BASE + 109 + 10 * number for number in range(num_runs)
        ]
        assert all(failure is None for _, failure in world.ended[name])
        assert world.states[name].runs == {}
        assert list(world.states[name].programs.known) == ([] if drop_program else [PART])
        assert world.unloaded[name] == ([PART] if drop_program else [])
        # Donated state is gone: what is named is what the last run left, and the y's that were not dropped.
        assert len(world.states[name].names.cells) == (num_runs + 1 if name == "a" else 1)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, 4), st.integers(1, 6))
def test_a_failure_poisons_what_follows_and_every_run_still_ends(data, num_runs, fail_at):
    world = drive(data.draw, num_runs, fail_at)
    assert isinstance(world.delivered[1000], Failure)
    assert world.delivered[1000].message == "injected"
    for name in "ab":
        assert len(world.ended[name]) == num_runs
        assert world.states[name].runs == {}


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 3), st.sampled_from("ab"), st.booleans())
def test_a_program_that_does_not_compile_fails_all_its_runs(data, num_runs, uncompilable, peers_are_lost):
    world = drive(data.draw, num_runs, uncompilable=uncompilable, lost="ab" if peers_are_lost else "")
    assert world.delivered[1000].message == "injected"
    for name in "ab":
        assert len(world.ended[name]) == num_runs


@settings(max_examples=150, deadline=None)
@given(
    st.data(),
    st.integers(1, 4),
    st.dictionaries(
        st.integers(0, 3), st.sampled_from([{"a": "held", "b": "held"}, {"a": "at any time", "b": "at any time"}])
    ),
    st.sampled_from([0, 60]),
)
def test_cancelled_runs_end_and_what_they_would_have_made_says_so(data, num_runs, cancelled, budget):
    """On both executors, before a run has come or at any time. Each ends, and leaves nothing behind."""
    world = drive(data.draw, num_runs, cancelled=cancelled, budget=budget)
    held = [number for number, how in cancelled.items() if number < num_runs and how["a"] == "held"]
    for name in "ab":
        assert len(world.ended[name]) == num_runs
        assert world.states[name].runs == {}
        assert world.states[name].memory.starved == []
    for number in range(num_runs):
        earlier = [other for other in held if other <= number]
        if earlier:  # the state that it would have updated is a failure, too
            assert world.delivered[number].kind == "RunCancelled"
            assert int(world.delivered[number].message.removeprefix("cancelled ")) <= number
    if not any(number < num_runs for number in cancelled):
        assert not isinstance(world.delivered[1000], Failure)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 3))
def test_a_dropped_client_leaves_nothing(data, num_runs):
    world = drive(data.draw, num_runs)
    for state in world.states.values():
        state.handle(events.ClientDropped(client_id=ClientId(CLIENT)))
        assert state.names.cells == {}
        assert state.programs.known == {}


def test_a_broken_link_fails_the_runs_that_either_end_had_and_no_later_one():
    state = ExecutorState("b")
    state.handle(events.ProgramArrived(program=train_parts()["b"]))
    state.handle(events.ProgramCompiled(part=PART, failure=None))
    v = BufferId(BASE + 3)
    state.handle(events.BufferPut(buffer_id=v, data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=10))
    ours, theirs = (Failure(kind="ExecutorLost", message=f"noticed {where}") for where in ("here", "there"))
    commands = []

    def enqueue(number):
        return state.handle(
            enqueued(
                50 + number,
                60 + 10 * number,
                [v if number == 0 else BufferId(BASE + 52 + 10 * number)],
                sequence=number,
            )
        )

    def arrive(number):
        item = events.TransferArrived(peer="a", run_id=RunId(BASE + 50 + number), edge_id=0, data=_Buffer(5))
        return state.handle(item)

    def ended():
        return {c.run.run_id - BASE - 50: c.failure for c in commands if isinstance(c, events.ReportEnded)}

    def send_all(begin):
        for command in [command for command in commands[begin:] if isinstance(command, events.Send)]:
            commands.extend(state.handle(events.UnitFinished(task=command.task)))

    commands += enqueue(0)
    commands += state.handle(events.PeerLost(peer="a", failure=ours))
    commands += enqueue(1)  # waits for the next link
    begin = len(commands)
    send_all(0)
    assert ended() == {0: ours}
    newest = {ClientId(CLIENT): RunId(BASE + 52)}  # the peer had one more, whose value is lost
    commands += state.handle(events.PeerReopened(peer="a", newest=newest, failure=theirs))
    commands += enqueue(2)
    send_all(begin)
    assert ended() == {0: ours, 1: theirs, 2: theirs}
    assert arrive(1) == []
    assert state.num_entries()["arrived"] == 0  # nobody would take it
    assert state.mailbox.broken.failure("a", RunId(BASE + 53)) is None
    state.handle(events.ClientDropped(client_id=ClientId(CLIENT)))
    assert (state.mailbox.broken.newest("a"), state.newest_runs) == ({}, {})


def test_a_program_that_cannot_be_compiled_donates_nothing():
    state = ExecutorState("b")
    state.handle(events.ProgramArrived(program=train_parts()["b"]))
    v, refused = BufferId(BASE + 3), Failure(kind="CaptureError", message="no lowering")
    state.handle(events.BufferPut(buffer_id=v, data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=10))

    def run(number, argument):
        first = BASE + 50 + 10 * number
        return events.RunEnqueued(
            part=PART,
            run_id=RunId(first),
            sequence=number,
            first_buffer_id=BufferId(first + 1),
            arguments=Arguments([argument]),
        )

    state.handle(run(0, v))  # these wait for the compilation, the second for what the first makes
    state.handle(run(1, BufferId(BASE + 53)))
    state.handle(events.ProgramCompiled(part=PART, failure=refused))
    state.handle(run(2, v))  # this comes when it is known
    for fetch_id, (buffer_id, failure) in enumerate({v: None, BASE + 53: refused, BASE + 73: refused}.items()):
        [delivered] = state.handle(events.FetchRequested(fetch_id=fetch_id, buffer_id=BufferId(buffer_id)))
        assert delivered.cell.failure == failure
        state.handle(events.FetchEnded(cell=delivered.cell))
    assert state.names.cells[v].buffer is not None or state.names.cells[v].scheduled
    assert state.memory.used_bytes == 10


def test_a_run_that_comes_cancelled_gives_up_what_it_would_have_donated():
    """The controller gave it up when it made the call: a step that is cancelled would keep a copy of the state."""
    for is_compiled in (True, False):
        state = ExecutorState("b")
        state.handle(events.ProgramArrived(program=train_parts()["b"]))
        if is_compiled:
            state.handle(events.ProgramCompiled(part=PART, failure=None))
        v = BufferId(BASE + 3)
        state.handle(events.BufferPut(buffer_id=v, data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=10))
        run = enqueued(50, 51, [v], sequence=1, cancelled=Failure(kind="RunCancelled", message="cancelled"))
        state.handle(run)
        assert state.memory.used_bytes == 0
        [delivered] = state.handle(events.FetchRequested(fetch_id=1, buffer_id=BufferId(BASE + 53)))
        assert delivered.cell.failure.kind == "RunCancelled"


def test_a_program_that_is_dropped_before_it_is_compiled_leaves_nothing():
    state = ExecutorState("b")
    before = sizes(state)
    state.handle(events.ProgramArrived(program=train_parts()["b"]))
    assert state.handle(events.ProgramDropped(program_id=PART.program_id)) == [events.Unload(part=PART)]
    assert sizes(state) == before
    # Its compilation may have been under way.
    state.handle(events.ProgramCompiled(part=PART, failure=None))
    assert sizes(state) == before


def test_a_run_of_a_dropped_program_is_refused_while_an_earlier_one_goes_on():
    state = ExecutorState("b")
    state.handle(events.ProgramArrived(program=train_parts()["b"]))
    state.handle(events.ProgramCompiled(part=PART, failure=None))

    def run(number):
        return enqueued(50 + number, 60 + 10 * number, [BufferId(BASE + 3)], sequence=number)

    state.handle(events.BufferPut(buffer_id=BufferId(BASE + 3), data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=10))
    state.handle(run(0))
    assert state.handle(events.ProgramDropped(program_id=PART.program_id)) == []
    [refused] = state.handle(run(1))
    assert "is not loaded" in refused.failure.message
    lost = events.PeerLost(peer="a", failure=Failure(kind="ExecutorLost", message="executor a is lost"))
    [sent] = state.handle(lost)
    ended, unload = state.handle(events.UnitFinished(task=sent.task))
    assert (type(ended), unload) == (events.ReportEnded, events.Unload(part=PART))


def test_a_donated_buffer_cannot_be_read_again():
    state = ExecutorState("b")
    state.handle(events.ProgramArrived(program=train_parts()["b"]))
    state.handle(events.ProgramCompiled(part=PART, failure=None))
    state.handle(events.BufferPut(buffer_id=BufferId(BASE + 3), data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=10))
    run = enqueued(50, 60, [BufferId(BASE + 3)], sequence=0)
    state.handle(run)
    [delivered] = state.handle(events.FetchRequested(fetch_id=1, buffer_id=BufferId(BASE + 3)))
    assert "was donated to a later computation" in delivered.cell.failure.message


def test_status_says_what_a_run_waits_for():
    state = ExecutorState("b")
    state.handle(events.ProgramArrived(program=train_parts()["b"]))
    run = enqueued(7, 60, [BufferId(BASE + 3)], sequence=0)
    state.handle(run)
    assert waiting_for(state) == [f"run {BASE + 7} of step: its compilation"]
    state.handle(events.ProgramCompiled(part=PART, failure=None))
    assert "receives edges [0]" in waiting_for(state)[0]


def test_status_tells_a_client_of_its_own_waits_alone():
    state, _ = _starving(100, [50, 60])
    other = 2 << 40
    part = PartId(ProgramId(other + 1), SLICE)
    state.handle(events.ProgramArrived(program=replace(train_parts()["b"], part=part, name="theirs")))
    run = events.RunEnqueued(
        part=part,
        run_id=RunId(other + 7),
        sequence=9,
        first_buffer_id=BufferId(other + 60),
        arguments=Arguments([BufferId(other + 3)]),
    )
    state.handle(run)
    state.handle(events.BufferPut(buffer_id=BufferId(other + 3), data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=70))
    state.handle(events.BufferPut(buffer_id=BufferId(other + 4), data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=80))
    mine, theirs = waiting_for(state, CLIENT), waiting_for(state, 2)
    assert [line.partition(" waits")[0].partition(":")[0] for line in theirs] == [
        "a value from a host",
        "a value from a host",
        f"run {other + 7} of theirs",
    ]
    assert len(mine) == 2
    assert not any("theirs" in line or "a value" in line for line in mine)
    assert sorted(waiting_for(state)) == sorted(mine + theirs)
    assert waiting_for(state, 3) == []


def test_an_argument_of_another_dtype_fails_its_run_and_what_waits_for_it_elsewhere():
    for kind in (ComputeInstruction(function_index=0, inputs=(0,), outputs=(1,), donated=()), None):
        item = kind or SendInstruction(slot=0, edge_id=0, peer=1)
        program = load_program(PART, "step", 1, [8, 8], [item], [], ["float32[2]", "float32[2]"])
        state = ExecutorState("a")
        state.handle(events.ProgramArrived(program=program))
        state.handle(events.ProgramCompiled(part=PART, failure=None))
        put = events.BufferPut(
            buffer_id=BufferId(BASE + 2), data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=8, form="float16[2]"
        )
        state.handle(put)
        run = enqueued(7, 60, [BufferId(BASE + 2)], sequence=0)
        [command] = state.handle(run)
        failure = command.failure if kind else command.cell.failure
        assert failure.kind == "UserError"
        assert "is an array of float16[2], and the program was traced for float32[2]" in failure.message


# ---- memory


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(0, 80))
def test_a_budget_delays_computations_and_is_never_exceeded(data, num_runs, spare):
    budget = 40 + 10 * num_runs + spare  # state, what one run makes, and every run's argument
    world = drive(data.draw, num_runs, budget=budget)
    stalled = True
    while stalled:  # the controller reads, and drops what it has read
        stalled = False
        for name, state in world.states.items():
            names = [b for b, cell in state.names.cells.items() if cell.buffer is not None and (b - BASE) % 10 == 1]
            if state.memory.starved and names:
                world.post(None, name, events.BuffersDropped(buffer_ids=names))
                stalled = True
        world.run()
    assert not any(state.memory.starved for state in world.states.values())
    assert world.peak <= budget
    assert world.delivered[1000] == drive(data.draw, num_runs).delivered[1000]
    for name, state in world.states.items():
        assert len(world.ended[name]) == num_runs
        state.handle(events.ClientDropped(client_id=ClientId(CLIENT)))
        assert state.memory.used_bytes == 0


def _one_call(slot_bytes, num_args=1):
    call = ComputeInstruction(function_index=0, inputs=(0,), outputs=(1,), donated=())
    return load_program(PART, "grow", num_args, slot_bytes, [call], [(1, 0)])


def _starving(budget, slot_bytes):
    state = ExecutorState("a", budget_bytes=budget)
    state.handle(events.ProgramArrived(program=_one_call(slot_bytes)))
    state.handle(events.ProgramCompiled(part=PART, failure=None))
    state.handle(
        events.BufferPut(buffer_id=BufferId(BASE + 2), data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=slot_bytes[0])
    )
    run = enqueued(3, 4, [BufferId(BASE + 2)], sequence=1)
    return state, state.handle(run)


def test_a_computation_larger_than_the_budget_is_refused_at_once_with_sizes():
    state, commands = _starving(100, [50, 101])
    [ended] = commands
    assert ended.failure.kind == "ResourceExhausted"
    assert "101 bytes" in ended.failure.message
    assert "100 bytes" in ended.failure.message
    assert state.memory.starved == []


def test_a_computation_waits_for_memory_and_status_says_so():
    state, commands = _starving(100, [50, 60])
    assert commands == []
    assert "waits for 60 bytes of device memory: 50 of 100 are used" in waiting_for(state)[0]
    # Its input stays in memory until it has run: only another array's end can help. There is none, so it fails.
    [ended] = state.handle(events.MemoryStalled(seconds=3))
    assert ended.failure.kind == "ResourceExhausted"
    assert f"client {CLIENT}: 50 bytes" in ended.failure.message


def test_a_released_array_lets_the_next_computation_go():
    state, _ = _starving(100, [50, 10])
    state.handle(events.BufferPut(buffer_id=BufferId(BASE + 20), data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=40))
    run = enqueued(21, 22, [BufferId(BASE + 2)], sequence=2)
    assert state.handle(run) == []
    commands = state.handle(events.BuffersDropped(buffer_ids=[BufferId(BASE + 20)]))
    assert [type(command) for command in commands] == [events.Execute]


def test_a_value_for_a_run_has_a_place_when_the_run_has_come():
    state, _ = _starving(200, [50, 10])
    used = state.memory.used_bytes
    value = BufferId(BASE + 20)
    put = events.BufferPut(buffer_id=value, data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=50, for_run=True)
    assert state.handle(put) == []
    assert state.memory.used_bytes == used
    run = enqueued(21, 22, [value], sequence=2)
    placed, executed = state.handle(run)
    assert (type(placed), type(executed)) == (events.Place, events.Execute)
    assert state.memory.used_bytes == used + 60
    state.handle(events.UnitFinished(task=executed.task))
    assert state.memory.used_bytes == used + 10  # it needs no word from its client
    state.handle(events.BuffersDropped(buffer_ids=[value]))
    # The same with a run that comes first.
    value = BufferId(BASE + 30)
    run = replace(
        run, run_id=RunId(BASE + 31), first_buffer_id=BufferId(BASE + 32), sequence=3, arguments=Arguments([value])
    )
    assert state.handle(run) == []
    placed, executed = state.handle(replace(put, buffer_id=value))
    state.handle(events.UnitFinished(task=executed.task))
    assert state.memory.used_bytes == used + 20


def test_a_value_whose_run_never_comes_goes_with_its_name_and_what_is_kept_has_a_limit(monkeypatch):
    monkeypatch.setattr("torchways.executor.cells._MAX_KEPT_BYTES", 100)
    state = ExecutorState("a", budget_bytes=1000)
    puts = [
        events.BufferPut(
            buffer_id=BufferId(BASE + number), data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=60, for_run=True
        )
        for number in range(3)
    ]
    assert state.handle(puts[0]) == []
    assert [type(command) for command in state.handle(puts[1])] == [events.Place]  # it would be more than is kept
    state.handle(events.BuffersDropped(buffer_ids=[puts[0].buffer_id, puts[1].buffer_id]))
    assert state.memory.used_bytes == 0
    assert state.handle(puts[2]) == []
    state.handle(events.ClientDropped(client_id=CLIENT))
    assert state.num_entries()["kept_bytes"] == 0


def test_values_without_elements_that_wait_for_runs_go_as_others():
    state = ExecutorState("a", budget_bytes=1000)
    for number in range(3):
        put = events.BufferPut(
            buffer_id=BufferId(BASE + number), data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=0, for_run=True
        )
        assert state.handle(put) == []
    state.handle(events.BuffersDropped(buffer_ids=[BufferId(BASE)]))
    state.handle(events.ClientDropped(client_id=CLIENT))
    assert state.num_entries()["kept_bytes"] == 0


def _put(number, nbytes, came_ns=0):
    return events.BufferPut(
        buffer_id=BufferId(BASE + number), data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=nbytes, time_ns=came_ns
    )


def test_values_that_wait_for_memory_fail_together():
    """None of them makes room for another; one that came late has its time."""
    state = ExecutorState("a", budget_bytes=100)
    state.handle(_put(1, 90))
    for number in range(2, 12):
        assert state.handle(_put(number, 20)) == []
    state.handle(_put(12, 20, came_ns=9_000_000_000))
    state.handle(events.MemoryStalled(seconds=3, time_ns=10_000_000_000))
    failures = [state.names.find(BufferId(BASE + number)).failure for number in range(1, 13)]
    assert [failure is not None for failure in failures] == [False, *[True] * 10, False]
    assert {failure.kind for failure in failures if failure is not None} == {"ResourceExhausted"}
    state.handle(events.BuffersDropped(buffer_ids=[BufferId(BASE + 1)]))
    assert state.memory.used_bytes == 20


def test_a_client_cannot_fill_the_hosts_memory_with_values_that_wait(monkeypatch):
    monkeypatch.setattr("torchways.executor.state._MAX_WAITING_BYTES", 100)
    state = ExecutorState("a", budget_bytes=100)
    state.handle(_put(1, 90))
    for number in range(2, 20):
        state.handle(_put(number, 30))
    refused = [state.names.find(BufferId(BASE + number)).failure is not None for number in range(2, 20)]
    assert refused == [False] * 3 + [True] * 15
    assert len(state.memory.starved) == 3


def test_a_value_that_is_released_while_it_waits_counts_no_more(monkeypatch):
    monkeypatch.setattr("torchways.executor.state._MAX_WAITING_BYTES", 100)
    state = ExecutorState("a", budget_bytes=100)
    state.handle(_put(1, 90))
    state.handle(_put(2, 80))
    state.handle(events.BuffersDropped(buffer_ids=[BufferId(BASE + 2)]))
    assert state.memory.starved == []
    state.handle(_put(3, 90))
    assert state.names.find(BufferId(BASE + 3)).failure is None
    assert len(state.memory.starved) == 1


def test_a_buffer_is_put_once_and_a_run_makes_new_ones():
    """Whatever a client sends, what it had is given back when it is gone, and nothing ends the executor."""
    state = ExecutorState("a", budget_bytes=1000)
    put = replace(_put(1, 100), for_run=True)
    for event in (put, replace(put, buffer_id=BufferId(BASE + 2)), replace(put, nbytes=200)):
        assert state.handle(event) == []
    state.handle(events.BuffersDropped(buffer_ids=[BufferId(BASE + 1), BufferId(BASE + 2)]))
    assert state.num_entries()["kept_bytes"] == 0
    state.handle(_put(3, 300))
    assert state.handle(_put(3, 1)) == []
    assert state.memory.used_bytes == 300
    state.handle(events.ProgramArrived(program=_one_call([300, 100])))
    state.handle(events.ProgramCompiled(part=PART, failure=None))
    run = enqueued(10, 3, [BufferId(BASE + 3)], sequence=1)
    [ended] = state.handle(run)
    assert "it makes buffers that are there already" in ended.failure.message
    state.handle(events.ClientDropped(client_id=CLIENT))
    assert state.memory.used_bytes == 0


def test_a_run_that_gives_up_what_it_also_reads_as_another_argument_is_refused():
    """It would wait for its own reading."""
    state = ExecutorState("a")
    call = ComputeInstruction(function_index=0, inputs=(0, 1), outputs=(2,), donated=(0,))
    state.handle(events.ProgramArrived(program=load_program(PART, "step", 2, [10] * 3, [call], [(2, 0)])))
    state.handle(events.ProgramCompiled(part=PART, failure=None))
    state.handle(_put(1, 10))
    state.handle(_put(2, 10))
    [ended] = state.handle(enqueued(30, 40, [BufferId(BASE + 1), BufferId(BASE + 1)], sequence=1))
    assert "gives up a buffer that is another of its arguments" in ended.failure.message
    commands = state.handle(enqueued(31, 41, [BufferId(BASE + 1), BufferId(BASE + 2)], sequence=2))
    assert [type(command) for command in commands] == [events.Execute]


def test_runs_that_can_never_go_on_end_with_their_client():
    """One reads what a run makes that comes after it, as no honest client has it; another waits for a value."""
    state = ExecutorState("a", budget_bytes=1000)
    state.handle(events.ProgramArrived(program=_one_call([10, 10])))
    state.handle(events.ProgramCompiled(part=PART, failure=None))
    state.handle(enqueued(30, 40, [BufferId(BASE + 50)], sequence=1))
    state.handle(enqueued(31, 50, [BufferId(BASE + 1)], sequence=2))
    assert len(state.runs) == 2
    ended = [
        item for item in state.handle(events.ClientDropped(client_id=CLIENT)) if isinstance(item, events.ReportEnded)
    ]
    assert len(ended) == 2
    assert not state.runs
    assert state.memory.used_bytes == 0


# ---- gangs


def received_in_a_gang():
    """A host of a gang, and a run that receives a value, makes another of it, sends that and makes a third."""
    state = ExecutorState("a", gang=True)
    instructions = [
        ReceiveInstruction(slot=0, edge_id=3, peer=1),
        ComputeInstruction(function_index=0, inputs=(0,), outputs=(1,), donated=()),
        SendInstruction(slot=1, edge_id=4, peer=1),
        ComputeInstruction(function_index=0, inputs=(1,), outputs=(2,), donated=()),
    ]
    routes = Routes(senders={3: "b"}, targets={4: ("b",)})
    program = load_program(PART, "step", 0, [1] * 3, instructions, [(2, 0)], routes=routes)
    state.handle(events.ProgramArrived(program=program))
    state.handle(events.ProgramCompiled(part=PART, failure=None))
    run = RunPart(RunId(BASE + 30), SLICE)
    state.handle(
        events.RunEnqueued(
            part=PART,
            run_id=run.run_id,
            sequence=1,
            first_buffer_id=BufferId(BASE + 40),
            arguments=Arguments([]),
        )
    )
    arrived = events.TransferArrived(peer="b", run_id=run.run_id, edge_id=3, data=_Buffer(1))
    cancelled = events.RunCancelled(run=run, failure=Failure(kind="RunCancelled", message="cancelled"))
    return state, run, arrived, cancelled


def test_a_gang_computes_what_was_reported_ready_though_it_is_cancelled_then_and_no_more():
    """It may be granted at any moment: a host that left it out would keep the others waiting for ever."""
    state, run, arrived, cancelled = received_in_a_gang()
    placed, ready = state.handle(arrived)
    assert (type(placed), ready.unit, ready.inputs, ready.failure) == (events.Place, 1, [placed.cell], None)
    assert state.handle(cancelled) == []
    executed, passed, sent, failed = state.handle(events.UnitGranted(run=run, unit=1))
    assert passed == events.ReportPassed(run=run, unit=1)
    assert (sent.cell, sent.cell.failure) == (executed.outputs[0], None)
    assert failed == events.ReportReady(run=run, unit=3, failure=cancelled.failure)
    state.handle(events.UnitFinished(task=sent.task))
    [ended] = state.handle(events.UnitFinished(task=executed.task))
    assert ended.failure == cancelled.failure


def test_a_gang_reports_what_is_cancelled_before_it_was_ready():
    state, run, arrived, cancelled = received_in_a_gang()
    commands = state.handle(cancelled)
    reported = [command for command in commands if isinstance(command, events.ReportReady)]
    assert reported == [events.ReportReady(run=run, unit=unit, failure=cancelled.failure) for unit in (1, 3)]
    [sent] = [command for command in commands if isinstance(command, events.Send)]
    assert sent.cell.failure == cancelled.failure
    assert state.handle(arrived) == []
    [ended] = state.handle(events.UnitFinished(task=sent.task))
    assert ended.failure == cancelled.failure


def test_what_another_host_cannot_compute_fails_in_a_gang_and_is_reported_once():
    failure = Failure(kind="ExecutorLost", message="elsewhere")
    for is_ready in (True, False):
        state, run, arrived, _ = received_in_a_gang()
        if is_ready:
            state.handle(arrived)
        commands = state.handle(events.UnitRefused(run=run, unit=1, failure=failure))
        reported = [command for command in commands if isinstance(command, events.ReportReady)]
        assert reported == [
            events.ReportReady(run=run, unit=unit, failure=failure) for unit in ((3,) if is_ready else (1, 3))
        ]
        assert state.handle(events.UnitRefused(run=run, unit=1, failure=failure)) == []
        assert state.num_entries()["asking"] == 0
        if not is_ready:
            assert state.handle(arrived) == []
        [sent] = [command for command in commands if isinstance(command, events.Send)]
        assert sent.cell.failure == failure
        [ended] = state.handle(events.UnitFinished(task=sent.task))
        assert (ended.failure, state.runs) == (failure, {})


def test_a_gang_computes_all_of_a_unit_or_nothing():
    """Another host may have what is poisoned here. Without other hosts, what can be computed is."""
    calls = [ComputeInstruction(function_index=0, inputs=(n,), outputs=(n + 2,), donated=()) for n in (0, 1)]
    program = load_program(PART, "step", 2, [1] * 4, calls, [(2, 0), (3, 1)])
    assert len(program.units) == 1
    for is_gang in (True, False):
        state = ExecutorState("a", gang=is_gang)
        state.handle(events.ProgramArrived(program=program))
        state.handle(events.ProgramCompiled(part=PART, failure=None))
        state.handle(_put(1, 1))
        state.handle(events.BuffersDropped(buffer_ids=[BufferId(BASE + 2)]))
        first, *_ = state.handle(enqueued(30, 40, [BufferId(BASE + 1), BufferId(BASE + 2)], sequence=1))
        if is_gang:
            assert first.failure.kind == "UserError"
        else:
            assert isinstance(first, events.Execute)


def test_what_a_gang_was_told_is_ready_is_not_refused_for_lack_of_memory():
    state = ExecutorState("a", gang=True, budget_bytes=100)
    state.handle(events.ProgramArrived(program=_one_call([10, 10])))
    state.handle(events.ProgramCompiled(part=PART, failure=None))
    state.handle(_put(1, 10))
    [ready] = state.handle(enqueued(30, 40, [BufferId(BASE + 1)], sequence=1))
    task = state.grants.asking((ready.run, ready.unit))
    state.memory.starved.append(task)  # it had waited, and got room
    assert state.handle(events.MemoryStalled(seconds=1, time_ns=10**12)) == []
    commands = state.handle(events.UnitGranted(run=ready.run, unit=ready.unit))
    assert [type(command) for command in commands] == [events.Execute, events.ReportPassed]


def test_a_gang_issues_in_the_order_of_grants():
    state = ExecutorState("a", gang=True)
    state.handle(events.ProgramArrived(program=_one_call([1, 1])))
    state.handle(events.ProgramCompiled(part=PART, failure=None))
    state.handle(_put(2, 1))
    asked = []
    for number in range(2):
        asked += state.handle(enqueued(30 + number, 40 + number, [BufferId(BASE + 2)], sequence=number))
    assert [type(command) for command in asked] == [events.ReportReady] * 2
    # Granted the other way round.
    commands = state.handle(events.UnitGranted(run=RunPart(RunId(BASE + 31), SLICE), unit=0))
    commands += state.handle(events.UnitGranted(run=RunPart(RunId(BASE + 30), SLICE), unit=0))
    ran = [command.task.run.run_id for command in commands if isinstance(command, events.Execute)]
    assert ran == [BASE + 31, BASE + 30]
    assert sum(isinstance(command, events.ReportPassed) for command in commands) == 2


def test_an_argument_that_is_a_result_answers_a_read_that_overtook_its_run():
    state = ExecutorState("b")
    call = ComputeInstruction(function_index=0, inputs=(0,), outputs=(1,), donated=())
    state.handle(events.ProgramArrived(program=load_program(PART, "step", 1, [10, 10], [call], [(0, 0)])))
    state.handle(events.ProgramCompiled(part=PART, failure=None))
    state.handle(events.BufferPut(buffer_id=BufferId(BASE + 3), data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=10))
    assert state.handle(events.FetchRequested(fetch_id=1, buffer_id=BufferId(BASE + 60))) == []
    run = enqueued(7, 60, [BufferId(BASE + 3)], sequence=0)
    delivered = [command for command in state.handle(run) if isinstance(command, events.Deliver)]
    assert [command.fetch_id for command in delivered] == [1]


# ---- leaks


def _round(world, number, client_id, fails):
    """A client's program: runs that are chained by donated state, reads, values put and released, in any order."""
    base = (client_id << 40) + 10_000 * number
    names = [BufferId(base + 2), BufferId(base + 3), BufferId(base + 4)]
    world.fail_at = world.executed + world.pick(range(1, 20)) if fails == "run" else None
    world.uncompilable = world.pick("ab") if fails == "compilation" else None
    for name, program in train_parts().items():
        world.post(
            f"scheduler of {name}",
            name,
            events.ProgramArrived(program=replace(program, part=PartId(ProgramId(base + 1), SLICE))),
        )
    for name, buffer_id in zip("aba", names, strict=True):
        if (name, fails) != ("a", "put"):  # a client that dies before it has sent its values
            world.post(
                None, name, events.BufferPut(buffer_id=buffer_id, data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=10)
            )
    w, v, unused = names
    for step in range(4):
        first = base + 100 + 10 * step
        run = {"part": PartId(ProgramId(base + 1), SLICE), "run_id": RunId(first + 9), "sequence": number}
        run["first_buffer_id"] = BufferId(first)
        world.post("scheduler of a", "a", events.RunEnqueued(arguments=Arguments([w, NO_BUFFER], [f"={step}"]), **run))
        world.post("scheduler of b", "b", events.RunEnqueued(arguments=Arguments([v]), **run))
        world.post(None, "a", events.FetchRequested(fetch_id=first, buffer_id=BufferId(first + world.pick((0, 1)))))
        for given_up in range(first + 1, first + 4):
            read = events.FetchRequested(fetch_id=given_up, buffer_id=BufferId(first + world.pick((0, 1))))
            world.post(f"read {given_up}", "a", read)
            world.post(f"read {given_up}", "a", events.FetchCancelled(fetch_id=given_up))
        world.post("scheduler of a", "a", events.BuffersDropped(buffer_ids=[BufferId(first + 1)]))
        w, v = BufferId(first), BufferId(first + 2)
    world.post("scheduler of a", "a", events.BuffersDropped(buffer_ids=[w, unused]))
    world.post("scheduler of b", "b", events.BuffersDropped(buffer_ids=[v]))
    for name in "ab":
        world.post(f"scheduler of {name}", name, events.ProgramDropped(program_id=ProgramId(base + 1)))
    if fails != "put":
        world.run()
    for name in "ab":  # whatever is still under way
        world.post(f"scheduler of {name}", name, events.ClientDropped(client_id=ClientId(client_id)))
    world.run()
    world.delivered.clear()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["", "run", "compilation", "put"]), st.sampled_from([0, 200]))
def test_after_many_steps_every_collection_is_as_large_as_after_a_few(seed, fails, budget):
    world = World(random.Random(seed).choice, budget, max_remembered=2)
    after = []
    for number in range(20):
        _round(world, number, CLIENT + number, fails)
        after.append({name: sizes(state) for name, state in world.states.items()})
    assert after[-1] == after[1]
    assert {name: state.memory.used_bytes for name, state in world.states.items()} == {"a": 0, "b": 0}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_a_client_that_goes_on_for_ever_leaves_nothing_behind_either(seed):
    world = World(random.Random(seed).choice, max_remembered=2)
    for name, program in train_parts().items():
        world.post(f"scheduler of {name}", name, events.ProgramArrived(program=program))
    names = {"a": BufferId(BASE + 2), "b": BufferId(BASE + 3)}
    for name, buffer_id in names.items():
        world.post(
            None, name, events.BufferPut(buffer_id=buffer_id, data=_Buffer(1), spec=None, slice_id=SLICE, nbytes=10)
        )
    after = []
    for step in range(40):
        first = BASE + 100 + 10 * step
        run = {"part": PART, "run_id": RunId(first + 9), "sequence": step}
        run["first_buffer_id"] = BufferId(first)
        of_a = Arguments([names["a"], NO_BUFFER], [f"={step}"])
        world.post("scheduler of a", "a", events.RunEnqueued(arguments=of_a, **run))
        world.post("scheduler of b", "b", events.RunEnqueued(arguments=Arguments([names["b"]]), **run))
        world.post("scheduler of a", "a", events.BuffersDropped(buffer_ids=[BufferId(first + 1)]))
        names = {"a": BufferId(first), "b": BufferId(first + 2)}
        if step % 4 == 3:  # the controller runs ahead in between
            world.run()
            after.append({name: sizes(state) for name, state in world.states.items()})
    assert after[-1] == after[1]


def test_a_cancelled_fetch_leaves_nothing_behind():
    state = ExecutorState("a", budget_bytes=100)
    buffer_id = BufferId(BASE + 60)
    before = state.num_entries()
    assert state.handle(events.FetchRequested(fetch_id=1, buffer_id=buffer_id)) == []
    assert state.handle(events.FetchRequested(fetch_id=2, buffer_id=buffer_id)) == []
    assert state.handle(events.FetchCancelled(fetch_id=1)) == []
    put = events.BufferPut(buffer_id=buffer_id, data=_Buffer(4), spec=None, nbytes=10, slice_id=SliceId(1))
    placed, delivered = state.handle(put)
    assert (type(placed), delivered.fetch_id) == (events.Place, 2)
    state.handle(events.FetchCancelled(fetch_id=2))  # too late
    state.handle(events.FetchEnded(cell=delivered.cell))
    state.handle(events.BuffersDropped(buffer_ids=[buffer_id]))
    assert state.memory.used_bytes == 0
    assert state.num_entries()["fetching"] == before["fetching"] == 0
