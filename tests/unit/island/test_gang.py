"""Gang scheduling, simulated: the scheduler's real core in front of device queues that deadlock if hosts disagree."""

import random
from collections import deque

import pytest

from torchways.errors import InternalError
from torchways.ids import RunPart
from torchways.island import events as core
from torchways.island.state import SchedulerState
from torchways.runtime.fifo_devices import FifoDevices

NUM_HOSTS = 4


def part(executor_id, run_id):
    """The run on the slice whose number is in the executor's id."""
    return RunPart(run_id, int(executor_id[1:].split(".")[0]))


class Island:
    """Hosts of one device each, slices over some of them, and messages that arrive when the dice say so.

    Messages of one sender to one receiver keep their order, as on a stream; nothing else does.
    """

    def __init__(self, seed, gang):
        self.random = random.Random(seed)
        self.gang = gang
        self.scheduler = SchedulerState()
        self.devices = FifoDevices()
        self.wires = {}
        self.slices = {}
        self.running = deque()
        self.num_done = 0

    def add_slice(self, slice_id, hosts):
        self.slices[slice_id] = hosts
        ids = tuple(f"s{slice_id}.h{host}" for host in hosts)
        self.scheduler.handle(core.SliceAdded(slice_id=slice_id, client_id=1, executor_ids=ids, device_indices=hosts))

    def post(self, sender, receiver, action):
        self.wires.setdefault((sender, receiver), deque()).append(action)

    def ready(self, slice_id, run_id):
        """The hosts of a slice have all that a computation needs."""
        hosts = self.slices[slice_id]
        if not self.gang:
            for host in hosts:
                self.post(
                    ("client", slice_id), ("executor", slice_id, host), lambda h=host: self.enqueue(slice_id, run_id, h)
                )
            return
        event = core.UnitReady(executor_id=f"s{slice_id}.h{hosts[0]}", run=RunPart(run_id, slice_id), unit=0)
        self.post(("executor", slice_id, hosts[0]), "scheduler", lambda: self.handle(event))

    def handle(self, event):
        for command in self.scheduler.handle(event):
            slice_id, host = (int(part[1:]) for part in command.executor_id.split("."))
            self.post(
                "scheduler",
                ("executor", slice_id, host),
                lambda s=slice_id, h=host, r=command.run.run_id: self.enqueue(s, r, h),
            )

    def enqueue(self, slice_id, run_id, host):
        self.running.extend(self.devices.enqueue(f"{slice_id}:{run_id}", [host], len(self.slices[slice_id])))
        if self.gang:
            event = core.UnitPassed(executor_id=f"s{slice_id}.h{host}", run=RunPart(run_id, slice_id), unit=0)
            self.post(("executor", slice_id, host), "scheduler", lambda: self.handle(event))

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


def simulate(seed, gang, num_clients=3, num_computations=1000):
    island = Island(seed, gang)
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


@pytest.mark.parametrize(
    ("seed", "num_computations"),
    [(0, 200), *(pytest.param(seed, 1000, marks=pytest.mark.slow) for seed in range(5))],
)
def test_four_hosts_three_clients_a_thousand_computations_never_deadlock(seed, num_computations):
    island = simulate(seed, gang=True, num_computations=num_computations)
    assert island.num_done == 3 * num_computations
    assert island.devices.num_waiting == 0
    assert island.scheduler.turns._waiting == []
    assert island.scheduler.turns._granted == {}


@pytest.mark.parametrize("seed", range(5))
def test_they_do_deadlock_in_the_order_of_arrival(seed):
    """The negative control: the same computations without the scheduler."""
    island = simulate(seed, gang=False)
    assert island.num_done < 3000
    assert len(island.devices.deadlock()) > 1


def test_one_slices_computations_are_granted_ahead_and_anothers_wait():
    scheduler = SchedulerState()
    for slice_id, devices in ((1, (0, 1)), (2, (1, 2)), (3, (3, 4)), (4, (2, 5))):
        ids = tuple(f"s{slice_id}.{device}" for device in devices)
        scheduler.handle(core.SliceAdded(slice_id=slice_id, client_id=1, executor_ids=ids, device_indices=devices))

    def ready(executor_id, run_id):
        commands = scheduler.handle(core.UnitReady(executor_id=executor_id, run=part(executor_id, run_id), unit=0))
        return [(command.executor_id, command.run.run_id) for command in commands]

    def enqueued(executor_id, run_id):
        commands = scheduler.handle(core.UnitPassed(executor_id=executor_id, run=part(executor_id, run_id), unit=0))
        return [(command.executor_id, command.run.run_id) for command in commands]

    assert ready("s1.0", 1) == [("s1.0", 1), ("s1.1", 1)]
    assert ready("s1.0", 2) == [("s1.0", 2), ("s1.1", 2)]  # one slice's own order is its hosts' order
    assert ready("s2.1", 3) == []  # shares device 1
    assert ready("s4.2", 4) == []  # shares device 2 with what waits, and must not overtake it
    assert ready("s3.3", 5) == [("s3.3", 5), ("s3.4", 5)]
    assert [enqueued(executor, run) for run in (1, 2) for executor in ("s1.0", "s1.1")][:3] == [[], [], []]
    with pytest.raises(InternalError, match="which was not granted to it"):
        enqueued("s1.0", 1)


def test_a_grant_says_who_came_first():
    scheduler = SchedulerState()
    sets = {1: (0, 1), 2: (1, 2), 3: (2, 3)}
    for slice_id, devices in sets.items():
        ids = tuple(f"s{slice_id}.{device}" for device in devices)
        scheduler.handle(core.SliceAdded(slice_id=slice_id, client_id=1, executor_ids=ids, device_indices=devices))

    def grants(event):
        return [(item.run.slice_id, item.held_for) for item in scheduler.handle(event)[:1]]

    def ready(slice_id):
        leader = f"s{slice_id}.{sets[slice_id][0]}"
        return grants(core.UnitReady(executor_id=leader, run=RunPart(slice_id, slice_id), unit=0))

    def passed(slice_id):
        events = [
            core.UnitPassed(executor_id=f"s{slice_id}.{device}", run=RunPart(slice_id, slice_id), unit=0)
            for device in sets[slice_id]
        ]
        return [grant for event in events for grant in grants(event)]

    assert ready(1) == [(1, "")]
    assert ready(2) == []
    assert ready(3) == []  # behind what waits
    assert passed(1) == [(2, "s1.0/s1.1 on devices that they share")]
    assert passed(2) == [(3, "s2.1/s2.2 on devices that they share")]


def test_a_slice_that_is_gone_lets_the_others_on():
    scheduler = SchedulerState()
    for slice_id, devices in ((1, (0, 1)), (2, (1, 2))):
        ids = tuple(f"s{slice_id}.{device}" for device in devices)
        scheduler.handle(core.SliceAdded(slice_id=slice_id, client_id=1, executor_ids=ids, device_indices=devices))
    scheduler.handle(core.UnitReady(executor_id="s1.0", run=RunPart(1, 1), unit=0))
    assert scheduler.handle(core.UnitReady(executor_id="s2.1", run=RunPart(2, 2), unit=0)) == []
    commands = scheduler.handle(core.ExecutorRemoved(executor_id="s1.0", reason="lost"))
    assert commands == [core.SendGrant(executor_id=f"s2.{device}", run=RunPart(2, 2), unit=0) for device in (1, 2)]
    late = core.UnitPassed(executor_id="s1.0", run=RunPart(1, 1), unit=0)
    assert scheduler.handle(late) == []


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
