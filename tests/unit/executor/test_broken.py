"""Two executors whose link breaks and is opened anew, at any time: every run ends at both, and nothing is wrong."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.executor.test_state import BASE, PART, SLICE, World, _Buffer, train_parts
from torchways.errors import Failure
from torchways.executor import events
from torchways.executor.broken import BrokenLinks
from torchways.ids import BufferId, ClientId, RunId
from torchways.ir.part import NO_BUFFER, Arguments

LOST = Failure(kind="ExecutorLost", message="injected")


class BreakingWorld(World):
    """A link is a number here: each end counts the links that it has given up."""

    def __init__(self, pick):
        super().__init__(pick)
        self.links = {"a": 0, "b": 0}

    def break_link(self, name):
        """An end notices first; the other does at any time, or when something comes over the next link."""
        number = self.links[name] + 1
        self.give_up(name, number)
        self.post(None, other(name), lambda: self.give_up(other(name), number))

    def give_up(self, name, number):
        if self.links[name] >= number:
            return
        self.links[name] = number
        peer, state = other(name), self.states[name]
        self.tell(name, events.PeerLost(peer=peer, failure=LOST))
        newest = dict(state.mailbox.broken.newest(peer))  # as the next link begins
        reopened = events.PeerReopened(peer=name, newest=newest, failure=LOST)
        self.post(None, peer, lambda: self.come(peer, number, reopened))

    def come(self, name, number, event):
        self.give_up(name, number)
        if self.links[name] == number:  # else it went down with its link
            self.tell(name, event)

    def tell(self, name, event):
        for command in self.states[name].handle(event):
            self.carry_out(name, command)

    def send(self, name, command):
        run_id, peer = command.task.run.run_id, other(name)
        broken = self.states[name].mailbox.broken.failure(peer, run_id)
        if broken is None:
            failure = command.cell.failure
            data = None if failure else _Buffer(command.cell.buffer.read())
            edge_id, number = command.instruction.edge_id, self.links[name]
            came = events.TransferArrived(peer=name, run_id=run_id, edge_id=edge_id, data=data, failure=failure)
            self.post(None, peer, lambda: self.come(peer, number, came))
        self.post(None, name, events.UnitFinished(task=command.task, failure=broken))


def other(name):
    return "b" if name == "a" else "a"


def put(world, name, buffer_id, value):
    item = events.BufferPut(buffer_id=BufferId(buffer_id), data=_Buffer(value), spec=None, slice_id=SLICE, nbytes=10)
    world.post(f"scheduler of {name}", name, item)


def enqueue(world, number, w, v):
    """Posts a run to both; returns where the state is after it."""
    first = BASE + 100 + 10 * number
    run = {"part": PART, "run_id": RunId(first + 9), "sequence": number, "first_buffer_id": BufferId(first)}
    of_a = Arguments([BufferId(w), NO_BUFFER], [f"={number}"])
    world.post("scheduler of a", "a", events.RunEnqueued(arguments=of_a, **run))
    world.post("scheduler of b", "b", events.RunEnqueued(arguments=Arguments([BufferId(v)]), **run))
    world.post(None, "a", events.FetchRequested(fetch_id=number, buffer_id=BufferId(first + 1)))
    return first, first + 2


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 5), st.lists(st.sampled_from("ab"), max_size=3))
def test_every_run_ends_at_both_ends_of_a_link_that_breaks(data, num_runs, breaks):
    world = BreakingWorld(lambda items: data.draw(st.sampled_from(items)))
    for name, program in train_parts().items():
        world.post(f"scheduler of {name}", name, events.ProgramArrived(program=program))
    for name in breaks:
        world.post(None, name, lambda name=name: world.break_link(name))
    state = BASE + 2, BASE + 3
    put(world, "a", state[0], 1)
    put(world, "b", state[1], 1)
    for number in range(num_runs):
        state = enqueue(world, number, *state)
    world.run()
    w, v = 1, 1
    for number in range(num_runs):
        y = w + number
        v = v + y
        w = w + v
        assert world.delivered[number] in (y, LOST)
        assert breaks or world.delivered[number] == y
    # What comes behind it is as if nothing had been.
    put(world, "a", BASE + 4, 5)
    put(world, "b", BASE + 5, 7)
    w, _ = enqueue(world, num_runs, BASE + 4, BASE + 5)
    world.post(None, "a", events.FetchRequested(fetch_id=1000, buffer_id=BufferId(w)))
    world.run()
    assert world.delivered[num_runs] == 5 + num_runs
    assert world.delivered[1000] == 5 + 7 + 5 + num_runs
    assert world.links["a"] == world.links["b"]
    for name in "ab":
        assert len(world.ended[name]) == num_runs + 1
        assert world.ended[name][-1] == (RunId(BASE + 109 + 10 * num_runs), None)
        assert world.states[name].runs == {}
        entries = world.states[name].num_entries()
        assert (entries["arrived"], entries["receiving"]) == (0, 0)


def test_a_run_is_broken_up_to_the_newest_of_its_client_until_that_is_gone():
    broken = BrokenLinks()
    broken.note("a", {}, LOST)
    broken.note("a", {ClientId(1): RunId(BASE + 5)}, LOST)
    broken.note("a", {ClientId(1): RunId(BASE + 3)}, LOST)
    runs = [RunId(BASE + number) for number in (3, 5, 6)] + [RunId((2 << 40) + 1)]
    assert [broken.failure("a", run_id) for run_id in runs] == [LOST, LOST, None, None]
    assert broken.failure("b", runs[0]) is None
    broken.drop_client(ClientId(1))
    assert broken.failure("a", runs[0]) is None
    assert vars(broken) == {"_newest": {}, "_failures": {}}
