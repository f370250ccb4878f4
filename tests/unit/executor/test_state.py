"""The executor's core over event orders: two executors, their links and devices, all simulated in one loop.

Buffers are `_Buffer`s that know whether a donation has overwritten them: reading one that is dead fails the test.
"""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from torchways.errors import Failure
from torchways.executor import state as core
from torchways.ids import BufferId, ClientId, ProgramId, RunId

CLIENT = 1
BASE = CLIENT << 40


@dataclass(eq=False)
class _Buffer:
    value: int
    alive: bool = True

    def read(self):
        assert self.alive, "a donated buffer is read"
        return self.value


def train_parts():
    """Two executors, one step: a: y = w + x, send y; b: v' = v + y (v donated), send v'; a: w' = w + v' (w donated)."""
    a = core.LoadedProgram(
        program_id=ProgramId(BASE + 1),
        name="step",
        num_slots=5,  # w, x, y, v', w'
        num_args=2,
        instructions=(
            core.ComputeInstruction(function_index=0, inputs=(0, 1), outputs=(2,), donated=()),
            core.SendInstruction(slot=2, edge_id=0, peer="b"),
            core.ReceiveInstruction(slot=3, edge_id=1, peer="b"),
            core.ComputeInstruction(function_index=0, inputs=(0, 3), outputs=(4,), donated=(0,)),
        ),
        results=((4, 0), (2, 1)),
    )
    b = core.LoadedProgram(
        program_id=ProgramId(BASE + 1),
        name="step",
        num_slots=3,  # v, y, v'
        num_args=1,
        instructions=(
            core.ReceiveInstruction(slot=1, edge_id=0, peer="a"),
            core.ComputeInstruction(function_index=0, inputs=(0, 1), outputs=(2,), donated=(0,)),
            core.SendInstruction(slot=2, edge_id=1, peer="a"),
        ),
        results=((2, 2),),
    )
    return {"a": a, "b": b}


class World:
    """Executors, and everything that is under way between them, in no particular order."""

    def __init__(self, draw):
        self.draw = draw
        self.states = {name: core.ExecutorState(name) for name in "ab"}
        self.pending = []  # (queue, executor, event): within a queue, order is kept
        self.ended = {name: [] for name in "ab"}
        self.delivered = {}
        self.executed = 0
        self.fail_at = None
        self.uncompilable = None

    def post(self, queue, name, event):
        self.pending.append((queue, name, event))

    def run(self):
        while self.pending:
            firsts, seen = [], set()
            for index, (queue, _, _) in enumerate(self.pending):
                if queue is None or queue not in seen:
                    seen.add(queue)
                    firsts.append(index)
            _, name, event = self.pending.pop(self.draw(st.sampled_from(firsts)))
            for command in self.states[name].handle(event):
                self.carry_out(name, command)

    def carry_out(self, name, command):
        match command:
            case core.Compile():
                failure = Failure(kind="CaptureError", message="injected") if name == self.uncompilable else None
                self.post(None, name, core.ProgramCompiled(program_id=command.program_id, failure=failure))
            case core.Place():
                buffer = command.data if isinstance(command.data, _Buffer) else _Buffer(int(command.data[1:]))
                self.post(f"device {name}", name, core.CellFilled(cell=command.cell, buffer=buffer))
            case core.Execute():
                self.execute(name, command)
            case core.Send():
                other = "b" if name == "a" else "a"
                data = None if command.failure else _Buffer(command.buffer.read())
                arrived = core.TransferArrived(
                    run_id=command.run_id, edge_id=command.edge_id, data=data, failure=command.failure
                )
                self.post(f"link to {other}", other, arrived)
                self.post(None, name, core.TransferSent(step=command.step))
            case core.Deliver():
                self.delivered[command.fetch_id] = (
                    command.cell.failure if command.cell.failure else command.cell.buffer.read()
                )
                self.post(None, name, core.FetchEnded(fetch_id=command.fetch_id, cell=command.cell))
            case core.ReportEnded():
                self.ended[name].append((command.run_id, command.failure))

    def execute(self, name, command):
        self.executed += 1
        if self.executed == self.fail_at:
            failure = Failure(kind="RemoteError", message="injected", run_id=command.step.run.run_id)
            event = core.ComputationEnqueued(step=command.step, outputs=(), failure=failure)
            self.post(f"device {name}", name, event)
            return
        total = sum(buffer.read() for buffer in command.inputs)
        for position in command.step.instruction.donated:
            command.inputs[position].alive = False
        outputs = [_Buffer(total) for _ in command.step.instruction.outputs]
        self.post(f"device {name}", name, core.ComputationEnqueued(step=command.step, outputs=outputs))
        self.post(f"device {name}", name, core.ComputationFinished(step=command.step))


def drive(draw, num_runs, fail_at=None, uncompilable=None, lost=(), drop_program=False):
    """Runs the step `num_runs` times with state carried on, in an order that hypothesis draws."""
    world = World(draw)
    world.fail_at = fail_at
    world.uncompilable = uncompilable
    for name in lost:
        failure = Failure(kind="ExecutorLost", message="injected")
        world.post(None, "b" if name == "a" else "a", core.PeerLost(peer=name, failure=failure))
    for name, program in train_parts().items():
        world.post(f"scheduler of {name}", name, core.ProgramArrived(program=program))
    w, v = BufferId(BASE + 2), BufferId(BASE + 3)
    world.post(None, "a", core.BufferPut(buffer_id=w, buffer=_Buffer(1)))
    world.post(None, "b", core.BufferPut(buffer_id=v, buffer=_Buffer(1)))
    for number in range(num_runs):
        first = BASE + 100 + 10 * number
        run = {"program_id": ProgramId(BASE + 1), "run_id": RunId(first + 9), "sequence": number}
        run["first_buffer_id"] = BufferId(first)
        world.post("scheduler of a", "a", core.RunEnqueued(arguments=[w, f"={number}"], **run))
        world.post("scheduler of b", "b", core.RunEnqueued(arguments=[v], **run))
        world.post(None, "a", core.FetchRequested(fetch_id=number, buffer_id=BufferId(first + 1)))
        w, v = BufferId(first), BufferId(first + 2)
    world.post(None, "a", core.FetchRequested(fetch_id=1000, buffer_id=w))
    if drop_program:  # in the stream's order: behind the last run, maybe before the compilation ends
        for name in "ab":
            world.post(f"scheduler of {name}", name, core.ProgramDropped(program_id=ProgramId(BASE + 1)))
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
        assert world.states[name].is_needed(ProgramId(BASE + 1)) is not drop_program
        # Donated state is gone: what is named is what the last run left, and the y's that were not dropped.
        assert len(world.states[name].named) == (num_runs + 1 if name == "a" else 1)


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


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 3))
def test_a_dropped_client_leaves_nothing(data, num_runs):
    world = drive(data.draw, num_runs)
    for state in world.states.values():
        state.handle(core.ClientDropped(client_id=ClientId(CLIENT)))
        assert state.named == {}
        assert state.programs == {}


def test_a_lost_peer_fails_receives_now_and_later():
    state = core.ExecutorState("b")
    state.handle(core.ProgramArrived(program=train_parts()["b"]))
    state.handle(core.ProgramCompiled(program_id=ProgramId(BASE + 1), failure=None))
    state.handle(core.BufferPut(buffer_id=BufferId(BASE + 3), buffer=_Buffer(1)))
    lost = Failure(kind="ExecutorLost", message="executor a is lost")
    commands = []
    for number in range(2):
        run_id = RunId(BASE + 50 + number)
        commands += state.handle(
            core.RunEnqueued(
                program_id=ProgramId(BASE + 1),
                run_id=run_id,
                sequence=number,
                first_buffer_id=BufferId(BASE + 60 + 10 * number),
                arguments=[BufferId(BASE + 3 if number == 0 else BASE + 62)],
            )
        )
        if number == 0:
            commands += state.handle(core.PeerLost(peer="a", failure=lost))
    for command in [command for command in commands if isinstance(command, core.Send)]:
        assert command.failure == lost
        commands += state.handle(core.TransferSent(step=command.step))
    ended = [command for command in commands if isinstance(command, core.ReportEnded)]
    assert [command.failure for command in ended] == [lost, lost]


def test_a_donated_buffer_cannot_be_read_again():
    state = core.ExecutorState("b")
    state.handle(core.ProgramArrived(program=train_parts()["b"]))
    state.handle(core.BufferPut(buffer_id=BufferId(BASE + 3), buffer=_Buffer(1)))
    run = core.RunEnqueued(
        program_id=ProgramId(BASE + 1),
        run_id=RunId(BASE + 50),
        sequence=0,
        first_buffer_id=BufferId(BASE + 60),
        arguments=[BufferId(BASE + 3)],
    )
    state.handle(run)
    [delivered] = state.handle(core.FetchRequested(fetch_id=1, buffer_id=BufferId(BASE + 3)))
    assert "was donated to a later computation" in delivered.cell.failure.message


def test_status_says_what_a_run_waits_for():
    state = core.ExecutorState("b")
    state.handle(core.ProgramArrived(program=train_parts()["b"]))
    run = core.RunEnqueued(
        program_id=ProgramId(BASE + 1),
        run_id=RunId(7),
        sequence=0,
        first_buffer_id=BufferId(BASE + 60),
        arguments=[BufferId(BASE + 3)],
    )
    state.handle(run)
    assert state.waiting_for() == ["run 7 of step: its compilation"]
    state.handle(core.ProgramCompiled(program_id=ProgramId(BASE + 1), failure=None))
    assert "edge 0 from a" in state.waiting_for()[0]
