"""Which runs are admitted to the devices: shares, room, order, and no two islands that wait for each other.

Devices are simulated: each lane takes what is admitted in order, and the time is the simulation's.
"""

import heapq
import math
from collections import defaultdict, deque
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchways.cluster.run_order import RunOrder
from torchways.config import POLICIES
from torchways.errors import Failure
from torchways.ids import PartId, RunPart
from torchways.island import events as core
from torchways.island.policy import (
    FirstComeFirstServed,
    ProportionalShare,
    Share,
    StrictPriority,
    find_policy,
)
from torchways.island.state import SchedulerState

WINDOW = 0.005
#: What is admitted while one client alone uses the devices.
ALONE = 50 * WINDOW


class Cluster:
    """Schedulers of islands, the order of runs that span them, and devices that take time.

    `seconds` says what a run takes on an executor. A spanning run is computed when all of its parts are at the head of
    their executors: what waits for another island keeps its devices.
    """

    def __init__(self, *islands, policy=ProportionalShare, window=WINDOW, delay=0.0):
        self.now = 0.0
        self.delay = delay
        self.schedulers = [SchedulerState(policy, window) for _ in islands]
        self.order = RunOrder()
        self.events = []  # heap of (time, number, what happens)
        self.queues = {executor: deque() for executors in islands for executor in executors}
        self.busy = defaultdict(float)
        self.computing = set()
        self.arrived = defaultdict(list)  # executor -> run ids, in order
        self.cancelled = set()  # runs, of which parts that arrive fail at once
        self.island_of = {}
        self.seconds = {}
        self.admitted = defaultdict(list)  # island -> run ids, in order
        self.computed = []  # (start, end, executor, run)
        self.finished = defaultdict(set)
        self.islands_of = {}
        self.slices = {}
        self.num = 0
        self.wakes = {}
        self.lost = set()
        self.stuck = {}  # client -> what arrived of it and waits for something else than devices
        self.unfinished = defaultdict(int)  # client -> its runs
        for number, executors in enumerate(islands):
            self.order.join(number)
            for executor in executors:
                self.island_of[executor] = number

    def at(self, time, action):
        self.num += 1
        heapq.heappush(self.events, (time, self.num, action))

    def join(self, client, *executors, weight=1.0, priority=0):
        """A client with a slice of each executor, and a program over each set of them that it will run."""
        for executor in executors:
            slice_id = self.slices[client, executor] = len(self.slices) + 1
            island = self.island_of[executor]
            share = Share(client_id=client, weight=weight, priority=priority)
            device = (list(self.queues).index(executor),)
            added = core.SliceAdded(
                slice_id=slice_id, client_id=client, executor_ids=(executor,), device_indices=device, share=share
            )
            self.handle(island, added)

    def program(self, client, number, *executors):
        program_id = client * 1000 + number
        islands = tuple(sorted({self.island_of[executor] for executor in executors}))
        for island in islands:
            slices = [self.slices[client, e] for e in executors if self.island_of[e] == island]
            parts = {slice_id: None for slice_id in slices}
            registered = core.ProgramRegistered(
                client_id=client, program_id=program_id, name="step", parts=parts, islands=islands
            )
            self.handle(island, registered)
            for executor in executors:
                if self.island_of[executor] == island:
                    part = PartId(program_id, self.slices[client, executor])
                    self.handle(island, core.ProgramLoaded(executor_id=executor, part=part, failure=None))
        return program_id, executors, islands

    def run(self, program, run_id, seconds):
        program_id, executors, islands = program
        self.seconds[run_id] = seconds
        self.islands_of[run_id] = set(islands)
        self.unfinished[run_id // 10**6] += 1
        for island in islands:
            slices = [self.slices[program_id // 1000, e] for e in executors if self.island_of[e] == island]
            arguments = {slice_id: (run_id, executors) for slice_id in slices}
            self.handle(
                island,
                core.RunRequested(
                    client_id=program_id // 1000,
                    program_id=program_id,
                    run_id=run_id,
                    first_buffer_id=0,
                    arguments=arguments,
                ),
            )

    def handle(self, island, event):
        for command in self.schedulers[island].handle(event, self.now):
            match command:
                case core.SendCancel():
                    self.at(self.now + self.delay, self.start)
                case core.SendEnqueue():
                    if not self.admitted[island] or self.admitted[island][-1] != command.run.run_id:
                        self.admitted[island].append(command.run.run_id)
                    item = (command.run.run_id, command.slice_id, command.arguments[1])
                    self.at(self.now + self.delay, lambda e=command.executor_id, i=item: self.arrive(e, i))
                case core.AskOrder():
                    ordered = self.order.ask(
                        island, command.run_id, command.client_id, command.islands, is_withdrawn=command.is_withdrawn
                    )
                    for item in ordered:
                        self.at(self.now + self.delay, lambda i=item: self.place(i))
                case core.TellFinished():
                    assert island not in self.finished[command.run_id]
                    self.finished[command.run_id].add(island)
                    if self.finished[command.run_id] == self.islands_of[command.run_id]:
                        self.unfinished[command.run_id // 10**6] -= 1
        wake = self.schedulers[island].wake_time(self.now)
        if wake is not None and self.wakes.get(island, math.inf) > wake:
            self.wakes[island] = wake
            self.at(max(wake, self.now) + 1e-9, lambda: self.wake(island))

    def wake(self, island):
        self.wakes.pop(island, None)
        self.handle(island, core.TimePassed())

    def place(self, item):
        self.handle(item.island_id, core.RunOrdered(run_id=item.run_id))

    def arrive(self, executor, item):
        if (waiting := self.stuck.get(item[0] // 10**6)) is not None:
            waiting.append((executor, item))
            return
        self.arrived[executor].append(item[0])
        self.queues[executor].append(item)
        self.start()

    def cancel(self, run_id):
        """A client cancels a run on all of its islands."""
        self.cancelled.add(run_id)
        failure = Failure(kind="RunCancelled", message="cancelled")
        for island in self.islands_of[run_id]:
            self.handle(island, core.RunsCancelled(run_ids=[run_id], failure=failure))

    def go_on(self, client):
        for executor, item in self.stuck.pop(client):
            self.arrive(executor, item)

    def start(self):
        """Starts all runs whose parts are first everywhere; ends those that are cancelled."""
        for executor, queue in self.queues.items():
            while queue and queue[0][0] in self.cancelled - self.computing:
                self.report(executor, queue.popleft(), 0.0)
        for queue in self.queues.values():
            if not queue:
                continue
            run_id, _, executors = queue[0]
            heads = [self.queues[other][0][0] if self.queues[other] else None for other in executors]
            if run_id not in self.computing and all(head == run_id for head in heads):
                self.computing.add(run_id)
                began, end = self.now, self.now + self.seconds[run_id]
                for executor in executors:
                    self.computed.append((began, end, executor, run_id))
                self.at(end, lambda r=run_id, e=executors: self.end(r, e))

    def lose(self, executor):
        self.lost.add(executor)
        self.handle(self.island_of[executor], core.ExecutorRemoved(executor_id=executor, reason="signal 9"))

    def end(self, run_id, executors):
        ended = [(executor, self.queues[executor].popleft()) for executor in executors]
        self.computing.discard(run_id)
        for executor, item in ended:
            self.report(executor, item, self.seconds[run_id])
        self.start()

    def report(self, executor, item, seconds):
        if executor in self.lost:
            return
        part = RunPart(item[0], item[1])
        report = core.RunEnded(executor_id=executor, run=part, failure=None, device_seconds=seconds)
        self.at(self.now + self.delay, lambda: self.handle(self.island_of[executor], report))

    def go(self, until=math.inf):
        while self.events and self.events[0][0] <= until:
            self.now, _, action = heapq.heappop(self.events)
            action()

    def num_unfinished(self):
        """How many runs the first island has admitted that have not been computed."""
        return len(self.admitted[0]) - len(self.computed)

    def all_finished(self):
        return all(self.finished[run_id] == islands for run_id, islands in self.islands_of.items())


def flood(cluster, client, program, seconds, until, ahead=10):
    """A client that keeps `ahead` runs asked for."""
    count = 0

    def more():
        nonlocal count
        while cluster.unfinished[client] < ahead and cluster.now < until:
            count += 1
            cluster.run(program, client * 10**6 + count, seconds)
        if cluster.now < until:
            cluster.at(cluster.now + seconds / 2, more)

    more()


def device_time(cluster, client, since=0.0, until=math.inf):
    return sum(
        min(end, until) - max(start, since)
        for start, end, _, run_id in cluster.computed
        if run_id // 10**6 == client and end > since and start < until
    )


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 2, 4, 8)])
def test_device_time_is_in_proportion_to_weights(weights):
    cluster = Cluster(["a"], delay=0.0005)
    for client, weight in enumerate(weights, 1):
        cluster.join(client, "a", weight=weight)
    for client in range(1, 5):
        flood(cluster, client, cluster.program(client, 0, "a"), 0.0003 * client, until=3.0, ahead=40)
    cluster.go(3.0)
    times = [device_time(cluster, client, 0.5, 3.0) for client in range(1, 5)]
    assert sum(times) == pytest.approx(2.5, rel=0.001)  # no gap
    for seconds, weight in zip(times, weights, strict=True):
        assert seconds / 2.5 == pytest.approx(weight / sum(weights), abs=0.005)


def test_a_short_run_beside_long_ones_waits_for_two_of_them_at_most():
    cluster = Cluster(["a"], delay=0.0005)
    for client in (1, 2, 3, 4):
        cluster.join(client, "a")
    for client in (1, 2, 3):
        flood(cluster, client, cluster.program(client, 0, "a"), 0.010, until=5.0)
    mine = cluster.program(4, 0, "a")
    asked = {}

    def ask(number=1):
        asked[4 * 10**6 + number] = cluster.now
        cluster.run(mine, 4 * 10**6 + number, 0.001)
        if cluster.now < 4.5:
            cluster.at(cluster.now + 0.0507, lambda: ask(number + 1))

    cluster.at(0.5, ask)
    cluster.go(5.0)
    ends = {run_id: end for _, end, _, run_id in cluster.computed if run_id in asked}
    waits = [ends[run_id] - asked[run_id] for run_id in ends]
    assert len(waits) > 70
    assert max(waits) <= 0.021


def test_the_contrast_is_first_come_first_served():
    cluster = Cluster(["a"], policy=FirstComeFirstServed)
    for client in (1, 2):
        cluster.join(client, "a")
    flood(cluster, 1, cluster.program(1, 0, "a"), 0.010, until=1.0, ahead=20)
    mine = cluster.program(2, 0, "a")
    cluster.at(0.5, lambda: cluster.run(mine, 2 * 10**6, 0.001))
    cluster.go(2.0)
    [end] = [end for _, end, _, run_id in cluster.computed if run_id == 2 * 10**6]
    assert end > 0.5 + 0.15


_ARRIVALS = st.lists(
    st.tuples(st.integers(1, 4), st.floats(0, 0.2), st.sampled_from([0.0003, 0.001, 0.01])), min_size=1, max_size=60
)


@settings(max_examples=60, deadline=None)
@given(_ARRIVALS, st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=4, max_size=4), st.sampled_from(list(POLICIES)))
def test_any_arrivals_keep_the_device_busy_and_each_clients_order(arrivals, weights, name):
    cluster = Cluster(["a"], policy=find_policy(name))
    for client in range(1, 5):
        cluster.join(client, "a", weight=weights[client - 1], priority=client)
    programs = {
        (client, seconds): cluster.program(client, round(seconds * 10_000), "a")
        for client in range(1, 5)
        for seconds in (0.0003, 0.001, 0.01)
    }
    for number, (client, time, seconds) in enumerate(sorted(arrivals, key=lambda item: item[1])):
        run_id = client * 10**6 + number
        cluster.at(time, lambda c=client, s=seconds, r=run_id: cluster.run(programs[c, s], r, s))
    cluster.go()
    assert cluster.all_finished()
    # Work-conserving: it has ended when a device that never waits would have.
    end = 0.0
    for _, time, seconds in sorted(arrivals, key=lambda item: item[1]):
        end = max(end, time) + seconds
    assert max(end for _, end, _, _ in cluster.computed) == pytest.approx(end)
    for client in range(1, 5):
        mine = [run_id for _, _, _, run_id in cluster.computed if run_id // 10**6 == client]
        assert mine == sorted(mine)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.sampled_from([1.0, 2.0, 3.0, 8.0]), min_size=2, max_size=5),
    st.lists(st.sampled_from([0.0003, 0.001, 0.004]), min_size=5, max_size=5),
    st.sampled_from([0.0, 0.3]),
)
def test_shares_are_within_one_computation_of_ideal(weights, lengths, late):
    """While the same clients have something to run: of each, the device time over its weight, since the last has come,
    differs from the others' by no more than what is admitted ahead and one computation of each."""
    cluster = Cluster(["a"])
    clients = range(1, len(weights) + 1)
    for client in clients:
        cluster.join(client, "a", weight=weights[client - 1])
        program = cluster.program(client, 0, "a")
        begin = late if client == 1 else 0.0
        cluster.at(
            begin, lambda c=client, p=program: flood(cluster, c, p, lengths[c - 1], until=1.5, ahead=int(0.02 / 0.0003))
        )
    cluster.go(1.5)
    begin = late + ALONE + 0.05 if late and len(weights) == 2 else late + 0.05
    for until in (0.8, 1.1, 1.5):
        passes = [device_time(cluster, c, begin, until) / weights[c - 1] for c in clients]
        slack = max((2 * lengths[c - 1] + WINDOW) / weights[c - 1] for c in clients)
        assert max(passes) - min(passes) <= 2 * slack


def test_while_a_client_is_alone_more_is_admitted():
    cluster = Cluster(["a"])
    cluster.join(1, "a")
    cluster.join(2, "a")
    alone, other = cluster.program(1, 0, "a"), cluster.program(2, 0, "a")
    flood(cluster, 1, alone, 0.01, until=2.0, ahead=64)
    cluster.go(1.0)
    assert ALONE <= 0.01 * cluster.num_unfinished() <= ALONE + 0.02
    cluster.at(1.0, lambda: cluster.run(other, 2 * 10**6, 0.01))
    cluster.go(2.0)
    [start] = [start for start, _, _, run_id in cluster.computed if run_id == 2 * 10**6]
    assert start <= 1.0 + ALONE + 0.02
    assert 0.01 * cluster.num_unfinished() <= WINDOW + 0.02  # the other may come again


def test_who_has_no_slice_of_devices_any_more_does_not_share_them():
    cluster = Cluster(["a"])
    cluster.join(1, "a")
    cluster.join(2, "a")
    mine, other = cluster.program(1, 0, "a"), cluster.program(2, 0, "a")
    cluster.run(other, 2 * 10**6, 0.01)
    flood(cluster, 1, mine, 0.01, until=3.0, ahead=64)
    cluster.go(1.0)
    assert 0.01 * cluster.num_unfinished() <= WINDOW + 0.02
    cluster.handle(0, core.SliceClosed(slice_id=cluster.slices[2, "a"], reason="it was closed", is_in_order=True))
    cluster.go(2.0)
    assert ALONE <= 0.01 * cluster.num_unfinished() <= ALONE + 0.02


def test_who_computes_in_turn_with_overlapping_devices_is_not_alone():
    """Each has its own lane; a unit of one waits until what was granted to the other has ended."""
    cluster = Cluster(["a", "b"])
    cluster.join(1, "a")
    cluster.join(2, "b")
    program = cluster.program(1, 0, "a")
    flood(cluster, 1, program, 0.01, until=4.0, ahead=64)
    cluster.go(1.0)
    assert ALONE <= 0.01 * cluster.num_unfinished() <= ALONE + 0.02
    both = core.SliceAdded(slice_id=9, client_id=2, executor_ids=("ab",), device_indices=(0, 1))
    cluster.handle(0, both)
    cluster.go(2.0)
    assert 0.01 * cluster.num_unfinished() <= WINDOW + 0.02
    cluster.handle(0, core.SliceClosed(slice_id=9, reason="it was closed", is_in_order=True))
    cluster.go(3.0)
    assert ALONE <= 0.01 * cluster.num_unfinished() <= ALONE + 0.02
    assert 0.01 * len(cluster.admitted[0]) > 0.25


def test_of_programs_of_unknown_time_a_lone_client_gets_few_runs():
    cluster = Cluster(["a"])
    cluster.join(1, "a")
    for number in range(40):  # each its first run, of a second
        cluster.run(cluster.program(1, number, "a"), 10**6 + number, 1.0)
    cluster.go(0.5)
    assert 1 <= len(cluster.admitted[0]) <= 8


def test_with_ageing_nobody_starves():
    cluster = Cluster(["a"], policy=StrictPriority)
    cluster.join(1, "a", priority=3)
    cluster.join(2, "a", priority=0)
    flood(cluster, 1, cluster.program(1, 0, "a"), 0.01, until=10.0)
    mine = cluster.program(2, 0, "a")
    cluster.at(0.5, lambda: cluster.run(mine, 2 * 10**6, 0.01))
    cluster.go(10.0)
    [start] = [start for start, _, _, run_id in cluster.computed if run_id == 2 * 10**6]
    assert 3.0 < start < 4.0  # three levels, one a second


def test_a_client_that_runs_ahead_does_not_age():
    """What waits behind 64 runs of its own client is no older than the one before it."""
    cluster = Cluster(["a"], policy=StrictPriority, delay=0.0005)
    cluster.join(1, "a", priority=10)
    cluster.join(2, "a", priority=0)
    flood(cluster, 2, cluster.program(2, 0, "a"), 0.2, until=40.0, ahead=64)
    mine = cluster.program(1, 0, "a")
    cluster.at(15.0, lambda: flood(cluster, 1, mine, 0.2, until=40.0, ahead=1))
    cluster.go(40.0)
    starts = [start for start, _, _, run_id in cluster.computed if run_id // 10**6 == 1]
    assert starts[0] - 15.0 < 0.21 + ALONE  # what was admitted while the other was alone
    assert device_time(cluster, 1, 15.5, 40.0) >= 0.49 * 24.5  # every other run: it asks for one at a time
    assert len(starts) > 40


def test_with_ageing_a_client_that_runs_ahead_does_not_starve_either():
    cluster = Cluster(["a"], policy=StrictPriority, delay=0.0005)
    cluster.join(1, "a", priority=3)
    cluster.join(2, "a", priority=0)
    for client in (1, 2):
        flood(cluster, client, cluster.program(client, 0, "a"), 0.1, until=30.0, ahead=64)
    cluster.go(30.0)
    starts = [start for start, _, _, run_id in cluster.computed if run_id // 10**6 == 2]
    pauses = [later - start for start, later in pairwise(starts)]
    assert len(pauses) > 5
    assert max(pauses) < 3.5
    assert min(pauses[1:]) > 2.5


def test_what_has_no_devices_here_any_more_waits_for_its_order_alone():
    """Spanning runs of a client, on slices of island 0 that go one after the other while both are held."""
    cluster = Cluster("ab", "c", window=0.0)
    cluster.join(1, *"abc")
    cluster.join(2, "a", "b")
    long = [cluster.program(2, 0, "a"), cluster.program(2, 1, "b")]
    cluster.run(long[0], 2 * 10**6, 1.0)
    cluster.run(long[1], 2 * 10**6 + 1, 1.0)
    first, second = cluster.program(1, 0, "a", "c"), cluster.program(1, 1, "b", "c")
    cluster.run(first, 10**6, 0.01)
    cluster.run(second, 10**6 + 1, 0.01)
    scheduler = cluster.schedulers[0]
    assert set(scheduler.admission.runs) == {10**6, 10**6 + 1}
    for executor in "ba":
        cluster.lose(executor)
    assert not scheduler.admission.runs or all(run.is_asked for run in scheduler.admission.runs.values())
    cluster.go(5.0)
    assert not scheduler.admission.runs
    assert not cluster.order.runs
    assert cluster.finished[10**6] >= {0}
    assert cluster.finished[10**6 + 1] >= {0}


def test_a_cancelled_run_comes_after_its_clients_earlier_ones_and_needs_no_room():
    """It may give up what they read. Others do not wait for more than before."""
    cluster = Cluster(["a"])
    cluster.join(1, "a")
    cluster.join(2, "a")
    mine, other = cluster.program(1, 0, "a"), cluster.program(2, 0, "a")
    for number in range(3):  # their time is known, and the first of mine fills the window
        cluster.run(other, 2 * 10**6 + number, 0.001)
        cluster.go()
    for number in range(6):
        cluster.run(mine, 10**6 + number, 0.02)
    for run_id in (10**6 + 5, 10**6 + 3):
        cluster.cancel(run_id)
        cluster.cancel(run_id)
    assert 10**6 + 3 not in cluster.arrived["a"]
    cluster.go()
    assert cluster.all_finished()
    assert [run_id for run_id in cluster.arrived["a"] if run_id < 2 * 10**6] == [10**6 + n for n in range(6)]
    assert {run_id for _, _, _, run_id in cluster.computed if run_id < 2 * 10**6} == {10**6 + n for n in (0, 1, 2, 4)}
    assert not cluster.schedulers[0].admission.runs
    cluster.run(mine, 10**6 + 9, 1.0)
    cluster.run(mine, 10**6 + 10, 1.0)
    cluster.run(mine, 10**6 + 11, 1.0)
    cluster.cancel(10**6 + 11)
    cluster.cancel(10**6 + 10)
    cluster.go(cluster.now + 0.001)
    assert cluster.arrived["a"][-3:] == [10**6 + 9, 10**6 + 10, 10**6 + 11], "nothing of its client is held before them"


@pytest.mark.parametrize("cancelled_at", [0.0005, 0.0015, 0.0025, 0.0035])
def test_a_cancelled_run_leaves_nothing_in_the_order_of_islands(cancelled_at):
    """Cancelled before its place is known, or when one island knows it, or all do."""
    cluster = Cluster("a", "b", delay=0.002)
    cluster.join(1, "a", "b")
    program = cluster.program(1, 0, "a", "b")
    cluster.at(0.001, lambda: cluster.run(program, 10**6, 0.01))
    failure = Failure(kind="RunCancelled", message="cancelled")
    for island in (0, 1):
        cancel = core.RunsCancelled(run_ids=[10**6], failure=failure)
        cluster.at(cancelled_at + 0.0007 * island, lambda i=island, c=cancel: cluster.handle(i, c))
    cluster.go(1.0)
    assert not cluster.order.runs
    assert not cluster.order._queues
    assert not any(scheduler.admission.runs or scheduler.runs for scheduler in cluster.schedulers)


_SETS = ("a", "b", "c", "ab", "bc", "ac", "abc", "aA", "bB", "Bc", "AB")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from(_SETS), st.floats(0, 0.05)), min_size=1, max_size=40),
    st.sampled_from([0.0, WINDOW]),
    st.sampled_from([0.0, 0.002]),
    st.sampled_from(list(POLICIES)),
    st.dictionaries(st.integers(0, 39), st.floats(0, 0.02), max_size=8),
)
def test_runs_over_islands_never_wait_for_each_other(runs, window, delay, name, cancelled):
    """Three islands; a and A are sets of devices of one. With a window of 0, one run at a time is admitted.

    Some are cancelled, a while after they were asked for.
    """
    cluster = Cluster("aA", "bB", "c", policy=find_policy(name), window=window, delay=delay)
    programs = {}
    for client in (1, 2, 3):
        cluster.join(client, *"aAbBc", weight=client, priority=client)
        for number, executors in enumerate(_SETS):
            programs[client, executors] = cluster.program(client, number, *executors)
    last = defaultdict(float)
    for number, (client, executors, pause) in enumerate(runs):
        last[client] += pause
        run_id = client * 10**6 + number
        cluster.at(last[client], lambda c=client, e=executors, r=run_id: cluster.run(programs[c, e], r, 0.003))
        if number in cancelled:
            cluster.at(last[client] + cancelled[number], lambda r=run_id: cluster.cancel(r))
    cluster.go(60.0)
    assert cluster.all_finished()
    assert not cluster.order.runs
    spanning = {run_id for run_id, islands in cluster.islands_of.items() if len(islands) > 1}
    spanning -= cluster.cancelled
    orders = [[run_id for run_id in order if run_id in spanning] for order in cluster.admitted.values()]
    for order in orders:
        for other in orders:
            common = set(order) & set(other)
            assert [r for r in order if r in common] == [r for r in other if r in common]
    for order in cluster.arrived.values():
        for client in (1, 2, 3):
            assert (own := [r for r in order if r // 10**6 == client]) == sorted(own)
    for scheduler in cluster.schedulers:
        assert not scheduler.admission.runs
        assert not scheduler.runs
        assert all(not lane.admitted and not lane.queues for lane in scheduler.admission.lanes.values())


@pytest.mark.parametrize("client_ends", [False, True])
def test_held_runs_of_a_slice_that_was_removed_slow_nobody(client_ends):
    """The resource manager removes the slice of a client that is gone before the client's stream ends here, if ever."""
    cluster = Cluster(["a"], delay=0.0005)
    cluster.join(1, "a")
    cluster.join(2, "a")
    flood(cluster, 2, cluster.program(2, 0, "a"), 0.005, until=15.0)
    flood(cluster, 1, cluster.program(1, 0, "a"), 1.0, until=5.0, ahead=64)
    removed = core.SliceClosed(slice_id=cluster.slices[1, "a"], reason="its client is gone")
    cluster.at(5.2, lambda: cluster.handle(0, removed))
    if client_ends:
        cluster.at(5.3, lambda: cluster.handle(0, core.ClientGone(client_id=1)))
    cluster.go(15.0)
    assert device_time(cluster, 2, 10.0, 15.0) == pytest.approx(5.0, rel=0.001)
    [lane] = cluster.schedulers[0].admission.lanes.values()
    assert set(lane.admitted) <= {2}
    assert set(lane.queues) <= {2}
    assert all(run.client_id == 2 for run in cluster.schedulers[0].runs.values())


def test_room_that_runs_of_a_removed_slice_leave_is_used_at_once():
    """The removed slice's runs are the last that happen on the devices: no end, and no time, asks again."""
    cluster = Cluster("ab", window=0.0)
    cluster.join(1, "a", "b")
    cluster.join(2, "a", "b")
    both, other = cluster.program(1, 0, "a", "b"), cluster.program(2, 0, "a")
    cluster.run(cluster.program(2, 1, "a"), 2 * 10**6, 1.0)
    for number in range(3):
        cluster.run(both, 10**6 + number, 1.0)
    cluster.run(other, 2 * 10**6 + 1, 1.0)
    for executor in "ab":
        cluster.handle(0, core.SliceClosed(slice_id=cluster.slices[1, executor], reason="its client is gone"))
    cluster.go(10.0)
    assert cluster.all_finished()
    assert max(end for _, end, _, _ in cluster.computed) == pytest.approx(2.0)


def test_a_chosen_run_whose_devices_all_go_is_asked_for_once():
    cluster = Cluster("ab", "c")
    cluster.join(1, *"abc")
    cluster.join(2, "a", "b")
    long, mine = cluster.program(2, 0, "b"), cluster.program(1, 0, *"abc")
    cluster.schedulers[0].programs[long[0]].times.measured(("b",), 1.0)
    cluster.run(long, 2 * 10**6, 1.0)
    cluster.run(mine, 10**6, 0.01)
    assert cluster.schedulers[0].waits(0.0)[0].endswith("room on its other devices")  # chosen: a has room, b has none
    for executor in "ab":
        cluster.lose(executor)
    cluster.go(5.0)
    assert not cluster.schedulers[0].admission.runs
    assert not cluster.order.runs
    assert cluster.finished[10**6] >= {0}


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("seconds", [0.0005, 0.001, 0.02])
def test_runs_that_wait_for_something_else_leave_the_devices_to_others(seconds, is_known):
    """Of client 1, whose program is compiled (not known), or which waits for memory (known), until 2 s."""
    cluster = Cluster(["a"], delay=0.0005)
    cluster.join(1, "a")
    cluster.join(2, "a")
    flood(cluster, 2, cluster.program(2, 0, "a"), seconds, until=4.0, ahead=64)
    mine = cluster.program(1, 0, "a")
    if is_known:
        cluster.schedulers[0].programs[mine[0]].times.measured(("a",), 0.01)
    cluster.stuck[1] = []
    cluster.at(0.5, lambda: flood(cluster, 1, mine, 0.01, until=4.0, ahead=64))
    cluster.at(2.0, lambda: cluster.go_on(1))
    cluster.go(4.0)
    assert device_time(cluster, 1, 0.0, 2.0) == 0
    assert device_time(cluster, 2, 1.0, 2.0) == pytest.approx(1.0, abs=0.001)
    assert device_time(cluster, 1, 3.0, 4.0) == pytest.approx(0.5, abs=0.03)
    assert device_time(cluster, 2, 3.0, 4.0) == pytest.approx(0.5, abs=0.03)


def test_a_program_of_unknown_time_gets_one_run_while_others_wait():
    cluster = Cluster(["a"], delay=0.0005)
    cluster.join(1, "a")
    cluster.join(2, "a")
    flood(cluster, 2, cluster.program(2, 0, "a"), 0.001, until=4.0, ahead=64)
    cluster.at(0.5, lambda: flood(cluster, 1, cluster.program(1, 0, "a"), 1.0, until=4.0, ahead=64))
    cluster.go(4.0)
    computed = [run_id // 10**6 for _, _, _, run_id in cluster.computed]
    first = computed.index(1)
    assert computed[first + 1 : first + 41] == [2] * 40
    assert not any(one == other == 1 for one, other in pairwise(computed[first:]))


def test_who_comes_after_a_program_of_unknown_time_waits_for_two_runs_at_most():
    cluster = Cluster(["a"], delay=0.0005)
    cluster.join(1, "a")
    cluster.join(2, "a")
    flood(cluster, 1, cluster.program(1, 0, "a"), 1.0, until=9.0, ahead=64)
    mine = cluster.program(2, 0, "a")
    for number in range(100):  # more than it may have admitted
        cluster.at(0.5 + 0.01 * number, lambda r=2 * 10**6 + number: cluster.run(mine, r, 0.001))
    cluster.go(10.0)
    ends = [end for _, end, _, run_id in cluster.computed if run_id // 10**6 == 2]
    assert len(ends) == 100
    assert ends[0] <= 2.1
    assert ends[-1] <= 3.2


def test_a_lone_client_keeps_devices_busy_with_runs_of_unknown_time():
    cluster = Cluster(["a"], delay=0.0005)
    cluster.join(1, "a")
    program = cluster.program(1, 0, "a")
    for number in range(20):
        cluster.run(program, 10**6 + number, 0.01)
    cluster.go()
    assert cluster.computed[-1][1] == pytest.approx(20 * 0.01 + cluster.delay)


def test_held_runs_over_islands_go_with_the_slices_of_a_client_that_is_stopped():
    """Its streams to the schedulers do not end: the resource manager removes its slices on all islands."""
    cluster = Cluster("a", "b", delay=0.0005)
    for client in (1, 2):
        cluster.join(client, "a", "b")
    mine = cluster.program(1, 0, "a", "b")
    flood(cluster, 2, cluster.program(2, 0, "a"), 0.005, until=3.0)
    cluster.at(1.0, lambda: flood(cluster, 1, mine, 0.1, until=1.01, ahead=20))
    for island, executor in enumerate("ab"):
        removed = core.SliceClosed(slice_id=cluster.slices[1, executor], reason="its client is gone")
        cluster.at(1.5, lambda i=island, r=removed: cluster.handle(i, r))
    cluster.go()
    assert cluster.all_finished()
    assert not cluster.order.runs
    assert not any(scheduler.admission.runs or scheduler.runs for scheduler in cluster.schedulers)
