"""What one client may have of a device: it holds up that client alone, and nobody waits for ever."""

from hypothesis import given, settings
from hypothesis import strategies as st

from torchways.executor import events
from torchways.executor.plan import load_program
from torchways.executor.stalls import waiting_for
from torchways.executor.state import ExecutorState
from torchways.ids import BufferId, ClientId, PartId, ProgramId, RunId, SliceId, client_range
from torchways.ir.part import Arguments, ComputeInstruction

LIMIT, BUDGET = 100, 1000
SECOND = 1_000_000_000


class _Client:
    """A client with programs of one computation, from an array of `argument` bytes to one of `result` bytes."""

    def __init__(self, state, number):
        self.state = state
        self.id = ClientId(number)
        self.slice_id = SliceId(number)
        self._next = client_range(self.id)[0] + 1

    def new_id(self):
        self._next += 1
        return self._next

    def put(self, nbytes):
        buffer_id = BufferId(self.new_id())
        commands = self.state.handle(
            events.BufferPut(
                buffer_id=buffer_id, data=object(), spec=None, slice_id=self.slice_id, nbytes=nbytes, form=""
            )
        )
        return buffer_id, commands

    def load(self, argument, result):
        part = PartId(ProgramId(self.new_id()), self.slice_id)
        call = ComputeInstruction(function_index=0, inputs=(0,), outputs=(1,), donated=())
        program = load_program(part, "grow", 1, [argument, result], [call], [(1, 0)])
        self.state.handle(events.ProgramArrived(program=program))
        self.state.handle(events.ProgramCompiled(part=part, failure=None))
        return part

    def run(self, part, argument, sequence, time_ns=0):
        result = BufferId(self.new_id())
        commands = self.state.handle(
            events.RunEnqueued(
                part=part,
                run_id=RunId(self.new_id()),
                sequence=sequence,
                first_buffer_id=result,
                arguments=Arguments([argument]),
                time_ns=time_ns,
            )
        )
        return result, commands

    def drop(self, *buffer_ids):
        return self.state.handle(events.BuffersDropped(buffer_ids=list(buffer_ids)))


def _two_clients():
    state = ExecutorState("a", budget_bytes=BUDGET, client_bytes=LIMIT)
    return state, _Client(state, 1), _Client(state, 2)


def _finish(state, commands):
    """Ends what was issued, and what that lets be issued; returns all commands."""
    found = list(commands)
    for command in found:
        if isinstance(command, events.Execute):
            found += state.handle(events.UnitFinished(task=command.task, failure=None))
    return found


def _kinds(commands):
    return [type(command).__name__ for command in commands]


def test_a_client_at_its_limit_waits_and_others_go_on():
    state, one, two = _two_clients()
    mine, _ = one.put(60)
    part = one.load(60, 50)
    result, commands = one.run(part, mine, 1)
    assert commands == []
    other, _ = two.put(60)
    _, commands = two.run(two.load(60, 30), other, 2)
    assert "Execute" in _kinds(_finish(state, commands))
    assert any("its own client" in line or "waits for 50 bytes" in line for line in waiting_for(state))
    # It never fits beside its own argument. Its client gives nothing back: it is refused, after a while.
    assert state.handle(events.MemoryStalled(seconds=3, time_ns=2 * SECOND)) == []
    [ended] = state.handle(events.MemoryStalled(seconds=3, time_ns=4 * SECOND))
    assert ended.failure.kind == "ResourceExhausted"
    assert "60 of the 100 that this cluster allows one client" in ended.failure.message
    assert state.names.cells[result].failure is not None
    assert state.memory.starved == []


def test_what_a_client_gives_back_lets_its_next_run_go():
    _, one, _ = _two_clients()
    kept, _ = one.put(50)
    mine, _ = one.put(20)
    _, commands = one.run(one.load(20, 40), mine, 1)
    assert commands == []
    assert _kinds(one.drop(kept)) == ["Execute"]


def test_a_value_beyond_the_limit_is_refused_at_once_and_one_beside_others_waits():
    state, one, two = _two_clients()
    large, commands = one.put(101)
    assert commands == []
    assert "what one client may have is 100 bytes" in state.names.cells[large].failure.message
    kept, _ = one.put(80)
    late, commands = one.put(30)
    assert commands == []
    assert _kinds(two.put(30)[1]) == ["Place"]
    assert _kinds(one.drop(kept)) == ["Place"]
    assert state.names.cells[late].failure is None


def test_a_value_that_is_released_before_it_had_room_is_forgotten():
    state, one, _ = _two_clients()
    kept, _ = one.put(80)
    late, _ = one.put(30)
    assert one.drop(late) == []
    assert one.drop(kept) == []
    assert state.memory.starved == []
    assert state.memory.used_by_client == {}
    assert state.memory.used_bytes == 0


def test_without_a_limit_nothing_is_counted_by_client():
    state = ExecutorState("a", budget_bytes=BUDGET)
    _Client(state, 1).put(900)
    assert state.memory.used_by_client == {}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 60), st.integers(1, 60), st.booleans()), min_size=1, max_size=25
    )
)
def test_no_client_has_more_than_its_limit_and_every_run_ends(actions):
    state = ExecutorState("a", budget_bytes=250, client_bytes=LIMIT)
    clients = {number: _Client(state, number) for number in (1, 2, 3)}
    waiting, ended, names = [], [], []

    def take(commands):
        for command in commands:
            if isinstance(command, events.Execute):
                waiting.append(command.task)
            elif isinstance(command, events.ReportEnded):
                ended.append(command.run)
        assert all(size <= LIMIT for size in state.memory.used_by_client.values())
        assert sum(state.memory.used_by_client.values()) == state.memory.used_bytes <= 250

    for sequence, (number, argument, result, keeps) in enumerate(actions):
        client = clients[number]
        buffer_id, commands = client.put(argument)
        take(commands)
        made, commands = client.run(client.load(argument, result), buffer_id, sequence)
        take(commands)
        if keeps:
            names.append((client, made))
        else:
            take(client.drop(made))
        take(client.drop(buffer_id))
        if waiting and sequence % 2:
            take(state.handle(events.UnitFinished(task=waiting.pop(0), failure=None)))
    for _ in range(4 * len(actions) + 4):
        while waiting:
            take(state.handle(events.UnitFinished(task=waiting.pop(0), failure=None)))
        take(state.handle(events.MemoryStalled(seconds=1, time_ns=10 * SECOND)))
    assert len(ended) == len(actions)
    assert not state.runs
    for client, made in names:
        take(client.drop(made))
    assert state.memory.used_bytes == 0
    assert state.memory.used_by_client == {}
    assert state.memory.starved == []
