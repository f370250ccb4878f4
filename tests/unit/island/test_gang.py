"""Gang scheduling, simulated: the scheduler's real core in front of device queues that deadlock if hosts disagree."""

import functools
import random
from collections import defaultdict, deque

import pytest

from torchways.errors import Failure, InternalError
from torchways.ids import RunPart
from torchways.island import events as core
from torchways.island.state import SchedulerState
from torchways.runtime.fifo_devices import FifoDevices

NUM_HOSTS = 4
FAILURE = Failure(kind="ExecutorLost", message="on this host alone")


def part(executor_id, run_id):
    """The run on the slice whose number is in the executor's id."""
    return RunPart(run_id, int(executor_id[1:].split(".")[0]))


class Island:
    """Hosts of one device each, slices over some of them, and messages that arrive when the dice say so.

    Messages of one sender to one receiver keep their order, as on a stream; nothing else does. Of a gang's computations
    some fail on one of the hosts, before it has what they need; of some, a host does not even know.
    """

    def __init__(self, seed, gang, failing=0.0):
        self.random = random.Random(seed)
        self.gang = gang
        self.failing = failing
        self.scheduler = SchedulerState()
        self.devices = FifoDevices()
        self.wires = {}
        self.slices = {}
        self.running = deque()
        self.num_done = 0
        #: By run and slice: the hosts that have told of its computation; that have enqueued it; on which it failed.
        self.reported, self.enqueued, self.failed = defaultdict(set), defaultdict(set), defaultdict(set)

    def add_slice(self, slice_id, hosts):
        self.slices[slice_id] = hosts
        ids = tuple(f"s{slice_id}.h{host}" for host in hosts)
        self.scheduler.handle(core.SliceAdded(slice_id=slice_id, client_id=1, executor_ids=ids, device_indices=hosts))

    def post(self, sender, receiver, action):
        self.wires.setdefault((sender, receiver), deque()).append(action)

    def ready(self, slice_id, run_id):
        """The hosts of a slice have all that a computation needs, each at its time; or one has not."""
        hosts = self.slices[slice_id]
        arrive = self.report if self.gang else self.enqueue
        odd = self.random.choice(hosts) if self.random.random() < self.failing else None
        for host in hosts:
            # That host fails it, or has no program for it.
            action = self.random.choice([self.fail, self.end]) if host == odd else arrive
            self.post(
                ("client", slice_id),
                ("executor", slice_id, host),
                functools.partial(action, RunPart(run_id, slice_id), host),
            )

    # ---- what executors do

    def report(self, run, host, failure=None):
        """Says once that a host is ready, or has failed."""
        if host not in self.reported[run]:
            self.reported[run].add(host)
            event = core.UnitReady(executor_id=f"s{run.slice_id}.h{host}", run=run, unit=0, failure=failure)
            self.post(("executor", run.slice_id, host), "scheduler", lambda: self.handle(event))

    def fail(self, run, host, failure=FAILURE):
        if host not in self.failed[run]:
            self.report(run, host, failure)
            self.end(run, host, failure)

    def enqueue(self, run, host):
        key = f"{run.slice_id}:{run.run_id}"
        self.enqueued[run].add(host)
        self.running.extend(self.devices.enqueue(key, [host], len(self.slices[run.slice_id])))
        if self.gang:
            event = core.UnitPassed(executor_id=f"s{run.slice_id}.h{host}", run=run, unit=0)
            self.post(("executor", run.slice_id, host), "scheduler", lambda: self.handle(event))
            self.end(run, host, None)

    def end(self, run, host, failure=FAILURE):
        """A host's part of the run is over, also if it has not said anything of its computation."""
        if failure is not None:
            self.reported[run].add(host)
            self.failed[run].add(host)
        executor_id = f"s{run.slice_id}.h{host}"
        self.post(
            ("executor", run.slice_id, host),
            "scheduler",
            lambda: self.carry_out(self.scheduler.turns.ended(executor_id, run, failure)),
        )

    def handle(self, event):
        self.carry_out(self.scheduler.handle(event))

    def carry_out(self, commands):
        for command in commands:
            slice_id, host = (int(part[1:]) for part in command.executor_id.split("."))
            action = self.enqueue if isinstance(command, core.SendGrant) else self.fail
            self.post("scheduler", ("executor", slice_id, host), functools.partial(action, command.run, host))

    def run(self):
        """Delivers messages and ends computations in random order until nothing moves."""
        while True:
            wires = [key for key, wire in self.wires.items() if wire]
            if not wires and not self.running:
                return
            if self.running and (not wires or self.random.random() < 0.3):
                self.running.extend(self.devices.finish(self.running.popleft()))
                self.num_done += 1
            else:
                self.wires[self.random.choice(wires)].popleft()()


def simulate(seed, gang, num_clients=3, num_computations=1000, failing=0.0):
    island = Island(seed, gang, failing)
    slices = []
    for client in range(num_clients):
        for _ in range(4):
            hosts = tuple(sorted(island.random.sample(range(NUM_HOSTS), island.random.randint(2, NUM_HOSTS))))
            island.add_slice(len(slices) + 1, hosts)
            slices.append((client, len(slices) + 1))
    for number in range(num_computations):
        for client in range(num_clients):
            mine = [slice_id for owner, slice_id in slices if owner == client]
            island.ready(island.random.choice(mine), number * num_clients + client)
    island.run()
    return island


@pytest.mark.parametrize("failing", [0.0, 0.3])
@pytest.mark.parametrize(
    ("seed", "num_computations"),
    [(0, 200), *(pytest.param(seed, 1000, marks=pytest.mark.slow) for seed in range(5))],
)
def test_four_hosts_three_clients_a_thousand_computations_never_deadlock(seed, num_computations, failing):
    island = simulate(seed, gang=True, num_computations=num_computations, failing=failing)
    assert len(island.reported) == 3 * num_computations
    for run in island.reported:
        hosts = set(island.slices[run.slice_id])
        # On all hosts it was computed, or on all it failed.
        assert (island.enqueued[run], island.failed[run]) in ((hosts, set()), (set(), hosts))
    assert island.num_done == sum(1 for hosts in island.enqueued.values() if hosts)
    assert (island.num_done < 3 * num_computations) == bool(failing)
    assert island.devices.num_waiting == 0
    assert island.scheduler.turns._parts == {}
    assert island.scheduler.turns._waiting == []
    assert island.scheduler.turns._granted == {}


@pytest.mark.parametrize("seed", range(5))
def test_they_do_deadlock_in_the_order_of_arrival(seed):
    """The negative control: the same computations without the scheduler."""
    island = simulate(seed, gang=False)
    assert island.num_done < 3000
    assert len(island.devices.deadlock()) > 1


def overlapping(sets):
    """A scheduler of slices, and what says that all hosts of one are ready, or one of them is."""
    scheduler = SchedulerState()
    for slice_id, devices in sets.items():
        ids = tuple(f"s{slice_id}.{device}" for device in devices)
        scheduler.handle(core.SliceAdded(slice_id=slice_id, client_id=1, executor_ids=ids, device_indices=devices))

    def ready(slice_id, run_id, *devices, failure=None):
        return [
            command
            for device in devices or sets[slice_id]
            for command in scheduler.handle(
                core.UnitReady(
                    executor_id=f"s{slice_id}.{device}", run=RunPart(run_id, slice_id), unit=0, failure=failure
                )
            )
        ]

    return scheduler, ready


def test_one_slices_computations_are_granted_ahead_and_anothers_wait():
    scheduler, ready_on_all = overlapping({1: (0, 1), 2: (1, 2), 3: (3, 4), 4: (2, 5)})

    def ready(slice_id, run_id):
        return [(command.executor_id, command.run.run_id) for command in ready_on_all(slice_id, run_id)]

    def enqueued(executor_id, run_id):
        commands = scheduler.handle(core.UnitPassed(executor_id=executor_id, run=part(executor_id, run_id), unit=0))
        return [(command.executor_id, command.run.run_id) for command in commands]

    assert ready(1, 1) == [("s1.0", 1), ("s1.1", 1)]
    assert ready(1, 2) == [("s1.0", 2), ("s1.1", 2)]  # one slice's own order is its hosts' order
    assert ready(2, 3) == []  # shares device 1
    assert ready(4, 4) == []  # shares device 2 with what waits, and must not overtake it
    assert ready(3, 5) == [("s3.3", 5), ("s3.4", 5)]
    assert [enqueued(executor, run) for run in (1, 2) for executor in ("s1.0", "s1.1")][:3] == [[], [], []]
    with pytest.raises(InternalError, match="which was not granted to it"):
        enqueued("s1.0", 1)


def test_what_not_all_hosts_are_ready_for_holds_up_nobody():
    _, ready = overlapping({1: (0, 1, 2), 2: (1, 2)})
    assert ready(1, 1, 0, 1) == []
    assert ready(2, 2) == [core.SendGrant(executor_id=f"s2.{device}", run=RunPart(2, 2), unit=0) for device in (1, 2)]
    with pytest.raises(InternalError, match=r"executor s1\.0 reported unit 0 of run 1 twice"):
        ready(1, 1, 0)


def test_what_fails_on_one_host_is_refused_to_the_others_once():
    scheduler, ready = overlapping({1: (0, 1, 2)})
    refused = {
        device: core.SendRefusal(executor_id=f"s1.{device}", run=RunPart(1, 1), unit=0, failure=FAILURE)
        for device in range(3)
    }
    assert ready(1, 1, 0) == []
    assert ready(1, 1, 1, failure=FAILURE) == [refused[0], refused[2]]
    assert ready(1, 1, 2) == []  # said before it knew
    assert scheduler.turns._parts == {}


def test_a_host_whose_part_is_over_will_not_be_ready():
    scheduler, ready = overlapping({1: (0, 1)})
    run = RunPart(1, 1)
    assert ready(1, 1, 0) == []
    assert scheduler.turns.ended("s1.1", run, FAILURE) == [
        core.SendRefusal(executor_id="s1.0", run=run, unit=0, failure=FAILURE)
    ]
    later = core.UnitReady(executor_id="s1.0", run=run, unit=1)
    assert scheduler.handle(later) == [core.SendRefusal(executor_id="s1.0", run=run, unit=1, failure=FAILURE)]
    assert scheduler.turns.ended("s1.0", run, FAILURE) == []
    assert scheduler.turns._parts == {}


def test_a_grant_says_who_came_first():
    sets = {1: (0, 1), 2: (1, 2), 3: (2, 3)}
    scheduler, ready_on_all = overlapping(sets)

    def grants(commands):
        return [(item.run.slice_id, item.held_for) for item in commands[:1]]

    def ready(slice_id):
        return grants(ready_on_all(slice_id, slice_id))

    def passed(slice_id):
        events = [
            core.UnitPassed(executor_id=f"s{slice_id}.{device}", run=RunPart(slice_id, slice_id), unit=0)
            for device in sets[slice_id]
        ]
        return [grant for event in events for grant in grants(scheduler.handle(event))]

    assert ready(1) == [(1, "")]
    assert ready(2) == []
    assert ready(3) == []  # behind what waits
    assert passed(1) == [(2, "s1.0/s1.1 on devices that they share")]
    assert passed(2) == [(3, "s2.1/s2.2 on devices that they share")]


def test_a_slice_that_is_gone_lets_the_others_on():
    scheduler, ready = overlapping({1: (0, 1), 2: (1, 2)})
    ready(1, 1)
    assert ready(1, 3, 0) == []
    assert ready(2, 2) == []
    commands = scheduler.handle(core.ExecutorRemoved(executor_id="s1.0", reason="lost"))
    assert commands == [core.SendGrant(executor_id=f"s2.{device}", run=RunPart(2, 2), unit=0) for device in (1, 2)]
    late = core.UnitPassed(executor_id="s1.0", run=RunPart(1, 1), unit=0)
    assert scheduler.handle(late) == []
    assert ready(1, 3, 1) == []
    assert scheduler.turns._parts == {}


def test_fifo_devices_run_one_at_a_time_and_wait_for_all_hosts():
    devices = FifoDevices()
    assert devices.enqueue("a", [0], 2) == []
    assert devices.enqueue("b", [0], 1) == []
    assert devices.enqueue("a", [1], 2) == ["a"]
    assert devices.enqueue("c", [1], 1) == []
    assert sorted(devices.finish("a")) == ["b", "c"]
    assert devices.finish("b") == devices.finish("c") == []
    devices.enqueue("x", [0], 2)
    devices.enqueue("y", [1], 2)
    assert devices.enqueue("x", [1], 2) == devices.enqueue("y", [0], 2) == []
    assert sorted(devices.deadlock()) == ["x", "y"]
