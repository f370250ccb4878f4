"""Hosts of a gang: their cores are real, as is what grants them their turns. Units fail on one host alone, at any time.

What one host puts on its devices, and another does not, would never end there, and hold up all that comes behind it.
"""

import random
from collections import defaultdict, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sizes import sizes
from torchways.errors import Failure, InternalError
from torchways.executor import events
from torchways.executor.plan import load_program
from torchways.executor.routes import Routes
from torchways.executor.runs import lowest
from torchways.executor.state import ExecutorState
from torchways.ids import BufferId, ClientId, PartId, ProgramId, RunId, RunPart, SliceId
from torchways.ir.part import Arguments, ComputeInstruction, ReceiveInstruction, SendInstruction
from torchways.island.events import SendGrant, SendRefusal
from torchways.island.turns import Turns
from torchways.runtime.fifo_devices import FifoDevices

#: Of the client whose runs fail, and of the one who wants nothing but to go on.
ONE, OTHER = ClientId(1), ClientId(2)
SLICES = {ONE: SliceId(3), OTHER: SliceId(4)}
LOST = Failure(kind="ExecutorLost", message="the link to p broke")
UNCOMPILED = Failure(kind="RemoteError", message="it could not be compiled here")
UNPLACED = Failure(kind="RemoteError", message="it could not be placed here")
CANCELLED = Failure(kind="RunCancelled", message="cancelled")


def base(client):
    return client << 40


def part_of(client):
    return PartId(ProgramId(base(client) + 1), SLICES[client])


def exchanging(client):
    """x and z come from p; y = w + x goes there, w' = w + z takes the place of w, v = f(w') is left."""
    return load_program(
        part_of(client),
        "exchanging",
        1,
        [10] * 6,  # w, x, y, z, w', v
        (
            ReceiveInstruction(slot=1, edge_id=0, peer=1),
            ComputeInstruction(function_index=0, inputs=(0, 1), outputs=(2,), donated=()),
            SendInstruction(slot=2, edge_id=1, peer=1),
            ReceiveInstruction(slot=3, edge_id=2, peer=1),
            ComputeInstruction(function_index=0, inputs=(0, 3), outputs=(4,), donated=(0,)),
            SendInstruction(slot=4, edge_id=3, peer=1),
            ComputeInstruction(function_index=0, inputs=(4,), outputs=(5,), donated=()),
        ),
        ((4, 0), (5, 1)),
        routes=Routes(targets={1: ("p",), 3: ("p",)}, senders={0: "p", 2: "p"}),
    )


def alone(client):
    """w' = f(w), and nothing from anywhere."""
    compute = ComputeInstruction(function_index=0, inputs=(0,), outputs=(1,), donated=(0,))
    return load_program(part_of(client), "alone", 1, [10] * 2, (compute,), ((1, 0),))


class Gang:
    """Hosts of a device each, the scheduler's turns, and a peer p with a link to each host.

    Messages of one sender to one receiver keep their order; nothing else does.
    """

    def __init__(self, pick, hosts="ab", budget=0):
        self.pick = pick
        self.states = {host: ExecutorState(host, gang=True, budget_bytes=budget) for host in hosts}
        self.turns = Turns()
        self.turns.add(tuple(hosts), frozenset(range(len(hosts))))
        self.devices = FifoDevices()
        self.wires = defaultdict(deque)
        self.on_devices = defaultdict(list)
        self.running = []
        self.executed = {host: [] for host in hosts}
        self.ended = {host: {} for host in hosts}
        self.granted = {host: [] for host in hosts}
        #: Hosts to which nothing comes from p.
        self.silent = set()
        #: Hosts that fail in a way of their own, with what the first client has.
        self.unloaded = self.uncompilable = self.unplaceable = None
        self.state_of = {}
        self.num_stalls = 0

    # ---- what happens

    def load(self, program):
        arrived = events.ProgramArrived(program=program)
        for host in self.states:
            if host != self.unloaded:
                self.post(("scheduler", host), lambda host=host: self.tell(host, arrived))

    def put(self, client):
        """The client's w comes to each host at a time of its own."""
        buffer_id = self.state_of[client] = BufferId(base(client) + 2)
        for host in self.states:
            put = events.BufferPut(buffer_id=buffer_id, data=1, spec=None, slice_id=SLICES[client], nbytes=10)
            self.post(("client", host), lambda host=host, put=put: self.tell(host, put))

    def enqueue(self, client, number):
        run_id, first = RunId(base(client) + 100 * number), BufferId(base(client) + 100 * number + 1)
        run = events.RunEnqueued(
            part=part_of(client),
            run_id=run_id,
            sequence=number,
            first_buffer_id=first,
            arguments=Arguments([self.state_of[client]]),
        )
        self.state_of[client] = first
        self.post_all(lambda host: self.tell(host, run))
        if client == ONE:
            for host in self.states:
                for edge_id in (0, 2):
                    self.post(("p", host, edge_id), lambda host=host, edge=edge_id: self.send(host, run_id, edge))
        return RunPart(run_id, SLICES[client])

    def cancel(self, run):
        self.post_all(lambda host: self.tell(host, events.RunCancelled(run=run, failure=CANCELLED)))

    def drop(self, client):
        self.post_all(lambda host: self.tell(host, events.ClientDropped(client_id=client)))

    def break_link(self, host):
        """The link of one host to p breaks: nothing comes of the runs that are here, but of later ones."""
        self.tell(host, events.PeerLost(peer="p", failure=LOST))

    # ---- how

    def post(self, wire, action):
        self.wires[wire].append(action)

    def post_all(self, tell):
        """The scheduler says something to all hosts."""
        for host in self.states:
            self.post(("scheduler", host), lambda host=host: tell(host))

    def run(self):
        """Lets everything happen, in any order, until nothing does, though what waits for memory has waited long."""
        while True:
            wires = [wire for wire, actions in self.wires.items() if actions]
            choices = [*wires, *(("computes", key) for key in self.running)]
            starved = [host for host, state in self.states.items() if state.memory.starved]
            if not choices and starved:
                self.num_stalls += 1
                assert self.num_stalls < 100, starved
            if choices:
                chosen = self.pick(choices)
                if chosen[0] == "computes":
                    self.running.remove(chosen[1])
                    self.finish(chosen[1])
                else:
                    self.wires[chosen].popleft()()
            elif starved:
                self.tell(self.pick(starved), events.MemoryStalled(seconds=1, time_ns=10**12))
            else:
                return

    def finish(self, key):
        self.running += self.devices.finish(key)
        for host, task in self.on_devices.pop(key):
            self.post(("device", host), lambda host=host, task=task: self.tell(host, events.UnitFinished(task=task)))

    def send(self, host, run_id, edge_id):
        if host not in self.silent:
            self.tell(host, events.TransferArrived(peer="p", run_id=run_id, edge_id=edge_id, data=1))

    def tell(self, host, event):
        for command in self.states[host].handle(event):
            self.carry_out(host, command)

    def carry_out(self, host, command):
        match command:
            case events.Compile():
                failure = UNCOMPILED if host == self.uncompilable and command.program.part == part_of(ONE) else None
                compiled = events.ProgramCompiled(part=command.program.part, failure=failure)
                self.post(("compiler", host), lambda: self.tell(host, compiled))
            case events.Place():
                command.cell.buffer = command.data
                if (host, command.part) == (self.unplaceable, part_of(ONE)):
                    command.cell.failure = UNPLACED
            case events.Execute():
                assert all(cell.failure is None for cell in command.inputs)
                key = f"{command.task.run.run_id}.{command.task.number}"
                self.executed[host].append(key)
                self.on_devices[key].append((host, command.task))
                self.running += self.devices.enqueue(key, [list(self.states).index(host)], len(self.states))
            case events.Send():
                self.post(("sending", host), lambda: self.tell(host, events.UnitFinished(task=command.task)))
            case events.ReportReady():
                self.report_ready(host, command)
            case events.ReportPassed():
                self.report(host, lambda: self.turns.passed(host, command.run, command.unit))
            case events.ReportEnded():
                assert command.run not in self.ended[host]
                self.ended[host][command.run] = command.failure
                self.report(host, lambda: self.turns.ended(host, command.run, command.failure))

    def report_ready(self, host, command):
        """As the engine does."""
        failure = command.failure or lowest([cell.failure for cell in command.inputs])
        if command.failure is None and failure is not None:
            refused = events.UnitRefused(run=command.run, unit=command.unit, failure=failure)
            self.post(("inbox", host), lambda: self.tell(host, refused))
        self.report(host, lambda: self.turns.ready(host, command.run, command.unit, failure))

    def report(self, host, report):
        def come():
            for command in report():
                match command:
                    case SendGrant():
                        event = events.UnitGranted(run=command.run, unit=command.unit)
                        self.granted[command.executor_id].append((command.run, command.unit))
                    case SendRefusal():
                        event = events.UnitRefused(run=command.run, unit=command.unit, failure=command.failure)
                self.post(
                    ("scheduler", command.executor_id),
                    lambda to=command.executor_id, event=event: self.tell(to, event),
                )

        self.post((host, "scheduler"), come)

    def check(self, runs):
        """Every run has ended on all hosts, which did the same in one order, and nothing is left of any."""
        for host, state in self.states.items():
            assert set(self.ended[host]) == set(runs)
            assert self.executed[host] == [f"{run.run_id}.{unit}" for run, unit in self.granted[host]]
            entries = state.num_entries()
            assert {name: entries[name] for name in ("runs", "asking", "granted", "computing", "receiving")} == {
                "runs": 0,
                "asking": 0,
                "granted": 0,
                "computing": 0,
                "receiving": 0,
            }
            assert state._in_flight == 0
        assert len({tuple(executed) for executed in self.executed.values()}) == 1
        assert (self.devices.num_waiting, self.running) == (0, [])
        assert sizes(self.turns) == sizes(Gang(self.pick, "".join(self.states)).turns)


def first(choices):
    return choices[0]


@pytest.mark.parametrize("failing", ["b", "a"])
def test_a_unit_that_fails_on_one_host_alone_fails_on_all_and_others_go_on(failing):
    """What the others issued, or waited for, would be there for ever; with it, all that comes behind it."""
    gang = Gang(first)
    for program in (exchanging(ONE), alone(OTHER)):
        gang.load(program)
    gang.put(ONE)
    gang.put(OTHER)
    run = gang.enqueue(ONE, 1)
    gang.silent.add(failing)
    gang.run()  # the other has the value
    gang.break_link(failing)
    gang.run()
    assert [gang.ended[host][run] for host in "ab"] == [LOST, LOST]
    later = gang.enqueue(OTHER, 2)
    gang.run()
    assert [gang.ended[host][later] for host in "ab"] == [None, None]
    gang.check([run, later])


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from(["ab", "abc"]),
    st.lists(st.sampled_from(["break", "cancel", "drop"]), max_size=3),
    st.sampled_from(["", "", "unloaded", "uncompilable", "unplaceable"]),
    st.sampled_from([0, 0, 50, 70]),
)
def test_whatever_fails_on_whichever_host_every_run_ends_on_all_and_another_client_goes_on(
    seed, hosts, failures, failing, budget
):
    dice = random.Random(seed)
    gang = Gang(dice.choice, hosts, budget)
    if failing:
        setattr(gang, failing, dice.choice(hosts))
    gang.load(exchanging(ONE))
    gang.unloaded = None
    gang.load(alone(OTHER))
    gang.put(ONE)
    gang.put(OTHER)
    mine, others = [], []
    for number in range(1, 5):
        mine.append(gang.enqueue(ONE, number))
        others.append(gang.enqueue(OTHER, number))
    for failure in failures:
        match failure:
            case "break":
                host = dice.choice(hosts)
                gang.post(("breaks", host), lambda host=host: gang.break_link(host))
            case "cancel":
                gang.cancel(dice.choice(mine))
            case "drop":
                gang.drop(ONE)
    gang.run()
    gang.check([*mine, *others])
    for host in hosts:
        assert budget or [gang.ended[host][run] for run in others] == [None] * 4
        if not (failures or failing or budget):
            assert [gang.ended[host][run] for run in mine] == [None] * 4


@pytest.mark.parametrize("unloaded", ["b", "a"])
def test_a_run_of_a_program_that_one_host_does_not_have_ends_on_the_others(unloaded):
    gang = Gang(first)
    gang.unloaded = unloaded
    gang.load(alone(OTHER))
    gang.put(OTHER)
    runs = [gang.enqueue(OTHER, number) for number in (1, 2)]
    gang.run()
    failures = [failure for ended in gang.ended.values() for failure in ended.values()]
    assert len(failures) == 4
    assert all("which is not loaded" in failure.message for failure in failures)
    gang.check(runs)


def test_a_host_ends_if_it_is_granted_what_it_did_not_report_ready():
    state = ExecutorState("a", gang=True)
    with pytest.raises(InternalError, match=r"unit 0 of run 7 is granted, but was not reported ready here"):
        state.handle(events.UnitGranted(run=RunPart(RunId(7), SLICES[ONE]), unit=0))
