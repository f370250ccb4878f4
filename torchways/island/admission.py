"""Which runs are on the devices, and which are held until there is room.

A *lane* is a set of devices with a queue of runs for each client. A run is admitted, which sends it to its executors,
when it is the next of its client on all of its lanes, and these have room: less work is admitted than the *window*, in
device time, which covers the way to the executors and back. Which client is next, a lane's policy says. So devices
always have work, and what is decided is decided late. While only one client has slices of a lane's devices, or only one
of those that do has asked for runs, there is nothing to decide, and more is admitted: runs do not take exactly the time
that is expected, and a gap between two costs training steps on several devices up to a fifth.

What is admitted counts as done once its device time has passed, or once something that was admitted later has ended, so
what waits for anything but the devices (values from elsewhere, memory, its program's compilation) does not keep others
out. A client may have a few windows of work admitted that has not ended, and no more; alone, one of its larger windows.

Of a program of which no run has ended on a lane, a client may have one unfinished run there while others wait for the
lane, and two while none does: such a run may take any time, and all who come later wait behind it.

Runs that span islands are admitted in one order on all of them (cluster/run_order.py): a run whose turn has come is
*asked* for, and is admitted when its order comes, whatever has been admitted meanwhile. What its client sent behind it
for the same lanes waits for it.

Releases wait in the queues, too: they concern what was sent before them. So does a run that is cancelled, which may
give up what those before it read: it goes to its executors when it is the next of its client, and needs no room there.

Pure: time comes with calls, in seconds.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torchways.ids import ClientId, RunId
from torchways.island.policy import GuardedPolicy, PendingRun, Policy, PolicyFactory, Share

#: What a run is expected to take before any of its program has ended.
_UNKNOWN_SECONDS = 0.01
#: Windows of work that a client may have admitted beside its oldest run: enough for a way to the executors and back
#: that takes much longer than the window, on a machine that is overloaded.
_WINDOWS_OF_CLIENT = 8
#: Windows of work that are admitted while one client alone uses a lane: who comes then waits so long, once.
_WINDOWS_ALONE = 50
#: Unfinished runs that a client may have of a program whose time is not known: one that computes, and the next, so that
#: the devices have work until the end of the first is known here.
_MAX_UNKNOWN = 2
#: The least that a run counts as, so that those that compute nothing are bounded, too.
_LEAST_SECONDS = 20e-6
#: Part of what is known of a program's time that its last run makes up.
_LEARNING_RATE = 0.25
#: What a run may wait for, for people.
_EARLIER = "its client's earlier runs"
_OWN_RUNS = "its client's runs that are admitted, to end"
_ROOM = "room on its devices"
_OTHER_ROOM = "room on its other devices"
_TURN = "its turn"
_ORDER = "its place in the order of all islands"
#: Executors of a set of devices, one a host.
DeviceSet: TypeAlias = tuple[str, ...]


@dataclass(eq=False, slots=True, kw_only=True)
class HeldRun:
    """A run that was not admitted yet.

    Attributes:
        request: opaque.
        program: says what runs take.
        lanes: of its slices here; those that are gone are none.
        spans: it has parts on other islands.
        nbytes: that it takes while it is held.
        is_asked: its turn has come; it waits for its order.
        held_for: what it was last seen to wait for, for people; "": for nothing.
        cancelled: opaque: why it will not compute. It waits for its client's earlier runs alone.
    """

    run_id: RunId
    share: Share
    request: Any
    program: ProgramTimes
    lanes: list[Lane]
    arrived: float
    spans: bool = False
    nbytes: int = 0
    is_asked: bool = False
    held_for: str = ""
    cancelled: Any = None


@dataclass(eq=False, slots=True)
class HeldRelease:
    """What may be given back once all that its client sent before it is admitted. `request` is opaque."""

    request: Any


@dataclass(eq=False, slots=True)
class ProgramTimes:
    """The device time that a program's runs take, by lane."""

    seconds: dict[DeviceSet, float] = field(default_factory=dict)

    def expected(self, devices: DeviceSet) -> float:
        """Returns the device time that a run is expected to take."""
        return self.seconds.get(devices, _UNKNOWN_SECONDS)

    def is_known(self, devices: DeviceSet) -> bool:
        """Whether a run has ended on a lane."""
        return devices in self.seconds

    def measured(self, devices: DeviceSet, seconds: float) -> None:
        """Takes what a run took."""
        known = self.seconds.get(devices)
        self.seconds[devices] = seconds if known is None else known + _LEARNING_RATE * (seconds - known)


@dataclass(slots=True)
class Usage:
    """What a client has had of a lane. `seconds`: device time; `last_turn`: when a run of it had its turn."""

    share: Share
    seconds: float = 0.0
    num_finished: int = 0
    last_turn: float = -math.inf


@dataclass(slots=True)
class Totals:
    """What was had of devices. It outlives their lane: counters that monitoring reads must not fall.

    Attributes:
        seconds: device time, of all clients that there ever were.
        usage: of each client that is there.
    """

    seconds: float = 0.0
    usage: dict[ClientId, Usage] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class AdmittedRun:
    """A run that is admitted to a lane.

    Attributes:
        pending: as the policy has it.
        program: see `HeldRun`.
        number: rises with each that is admitted.
        seconds: device time that it should take, as far as is known by now.
    """

    pending: PendingRun
    program: ProgramTimes
    number: int
    seconds: float


@dataclass(slots=True)
class Admitted:
    """A client's runs that are admitted to a lane, oldest first, and the device time that they should take."""

    runs: dict[RunId, AdmittedRun] = field(default_factory=dict)
    seconds: float = 0.0
    #: Those that have parts on other devices: what is admitted behind them may wait, too.
    elsewhere: set[RunId] = field(default_factory=set)
    #: How many there are of each program.
    num_of: Counter[ProgramTimes] = field(default_factory=Counter)

    def add(self, run_id: RunId, run: AdmittedRun, *, is_elsewhere: bool) -> None:
        """A run is admitted."""
        self.runs[run_id] = run
        self.seconds += run.seconds
        self.num_of[run.program] += 1
        if is_elsewhere:
            self.elsewhere.add(run_id)

    def pop(self, run_id: RunId) -> AdmittedRun | None:
        """Takes a run out that has ended, if it is here."""
        run = self.runs.pop(run_id, None)
        if run is not None:
            self.seconds -= run.seconds
            self.elsewhere.discard(run_id)
            self.num_of[run.program] -= 1
            if not self.num_of[run.program]:
                del self.num_of[run.program]
        return run

    def seconds_after(self, number: int) -> float:
        """Returns the device time of what was admitted after a run that has ended, if it waits for devices alone."""
        if self.elsewhere or next(reversed(self.runs.values())).number < number:
            return 0.0
        seconds = self.seconds
        for run in self.runs.values():
            if run.number > number:
                break
            seconds -= run.seconds
        return seconds

    def learned(self, program: ProgramTimes, seconds: float) -> float:
        """Counts a program's runs as what its first took; returns by how much more that is."""
        more = 0.0
        for run in self.runs.values():
            if run.program is program:
                more += seconds - run.seconds
                run.seconds = seconds
        self.seconds += more
        return more


@dataclass(eq=False, slots=True)
class Lane:
    """One set of devices. See the module's docstring.

    Attributes:
        queues: of each client that has something here, in its order.
        admitted: of each client that has some, its runs that have not ended.
        busy_until: when what is admitted should have ended.
        totals: what clients have had.
        num_admitted: runs since the lane's beginning.
        owners: clients that have slices of these devices.
        overlaps: another set of devices has some of these, and computes on them in turn.
    """

    devices: DeviceSet
    policy: Policy
    queues: dict[ClientId, deque[HeldRun | HeldRelease]] = field(default_factory=dict)
    admitted: dict[ClientId, Admitted] = field(default_factory=dict)
    busy_until: float = 0.0
    totals: Totals = field(default_factory=Totals)
    num_admitted: int = 0
    owners: Collection[ClientId] = ()
    overlaps: bool = False

    @property
    def is_shared(self) -> bool:
        """Whether several clients may want the devices: that have slices of them, or work left, and asked for runs."""
        usage = self.totals.usage
        if self.overlaps or len(usage) < 2:
            return self.overlaps
        return sum(client_id in self.owners or self.uses(client_id) for client_id in usage) > 1

    def unfinished_seconds(self, now: float) -> float:
        """Returns the device time that should be left of what is admitted."""
        return max(0.0, self.busy_until - now) if self.admitted else 0.0

    def pending(self, run: HeldRun) -> PendingRun:
        """Returns a run as the policy sees it."""
        return PendingRun(
            share=run.share,
            run_id=run.run_id,
            arrived=run.arrived,
            first_since=max(run.arrived, self.totals.usage[run.share.client_id].last_turn),
            seconds=max(_LEAST_SECONDS, run.program.expected(self.devices)),
        )

    def uses(self, client_id: ClientId) -> bool:
        """Whether a client has something here."""
        return client_id in self.queues or client_id in self.admitted

    def num_held(self, client_id: ClientId) -> int:
        """Returns how many runs of a client wait for these devices."""
        return sum(isinstance(item, HeldRun) for item in self.queues.get(client_id, ()))

    def pop(self, client_id: ClientId, item: HeldRun | HeldRelease) -> None:
        """Takes an item out of a queue."""
        queue = self.queues[client_id]
        if queue[0] is item:
            queue.popleft()
        else:
            queue.remove(item)
        if not queue:
            del self.queues[client_id]


@dataclass(frozen=True, slots=True, kw_only=True)
class Admit:
    """Send a run to its executors."""

    run: HeldRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Send a run that is cancelled to its executors, for what depends on it."""

    run: HeldRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Ask for a spanning run's place in the order of all islands."""

    run: HeldRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Give something back."""

    request: Any


Decision: TypeAlias = Admit | Cancel | Ask | Release


class Admission:
    """See the module's docstring. Whoever changes something asks for `decisions` afterwards.

    Args:
        window: seconds of device time.
    """

    def __init__(self, window: float = math.inf) -> None:
        self.window = window
        self.lanes: dict[DeviceSet, Lane] = {}
        #: Those that are held.
        self.runs: dict[RunId, HeldRun] = {}
        #: Bytes that each client's held runs take.
        self.held_bytes: dict[ClientId, int] = {}
        #: Those that span islands and are not asked for, by client, in its order.
        self._spanning: dict[ClientId, deque[HeldRun]] = {}
        #: Chosen by a policy, and waiting until all of their lanes have room; nothing else is admitted there.
        self._chosen: list[HeldRun] = []
        #: Those whose slices here are gone: they have nothing to wait for but their order.
        self._without_lanes: list[HeldRun] = []
        #: Where something may be decided now.
        self._changed: dict[Lane, None] = {}

    # ---- what comes

    def add_lane(self, devices: DeviceSet, policy: PolicyFactory, totals: Totals) -> None:
        """Devices have a first slice. `totals`: of the lanes that they had before."""
        self.lanes[devices] = Lane(devices, GuardedPolicy(policy, "/".join(devices)), totals=totals)

    def remove_lane(self, devices: DeviceSet) -> Totals:
        """Devices have no slice any more; runs that are held for them run elsewhere only."""
        lane = self.lanes.pop(devices)
        self._changed.pop(lane, None)
        for run in [*self.runs.values()]:
            if lane in run.lanes:
                run.lanes.remove(lane)
                self._look_at(run.lanes)
                if not run.lanes:
                    if run in self._chosen:
                        self._chosen.remove(run)
                    self._without_lanes.append(run)
        return lane.totals

    def hold(self, run: HeldRun) -> None:
        """A client asked for a run."""
        client_id = run.share.client_id
        self.runs[run.run_id] = run
        self.held_bytes[client_id] = self.held_bytes.get(client_id, 0) + run.nbytes
        if run.spans:
            self._spanning.setdefault(client_id, deque()).append(run)
        if not run.lanes:
            self._without_lanes.append(run)
        if any(client_id in lane.queues for lane in run.lanes):
            run.held_for = _EARLIER
        elif not self._have_room(run, run.arrived):
            run.held_for = _ROOM
        for lane in run.lanes:
            was_idle = not lane.uses(client_id)
            lane.queues.setdefault(client_id, deque()).append(run)
            lane.totals.usage.setdefault(client_id, Usage(run.share))
            lane.policy.add(lane.pending(run), was_idle=was_idle)
        self._look_at(run.lanes)

    def release(self, client_id: ClientId, devices: DeviceSet, request: Any) -> bool:
        """Takes a release; returns whether it can be carried out at once."""
        lane = self.lanes.get(devices)
        if lane is None or client_id not in lane.queues:
            return True
        lane.queues[client_id].append(HeldRelease(request))
        return False

    def ordered(self, run_id: RunId, now: float) -> list[Decision]:
        """A spanning run has its place in the order: it is admitted now. None if it is held no more."""
        run = self.runs.get(run_id)
        if run is None or not run.is_asked or run.cancelled is not None:
            return []
        return [*self._admit(run, now)]

    def cancel(self, run_id: RunId, reason: Any) -> HeldRun | None:
        """A run will not compute: it goes when it is its client's next. Returns it, if it is held and was not before.

        It has no place in the order of all islands any more, if it had none yet.
        """
        run = self.runs.get(run_id)
        if run is None or run.cancelled is not None:
            return None
        run.cancelled = reason
        if run in self._chosen:
            self._chosen.remove(run)
        if run.spans and not run.is_asked:
            self._leave_order(run)
            if waiting := self._spanning.get(run.share.client_id):
                self._look_at(waiting[0].lanes)
        if not run.lanes and run not in self._without_lanes:  # it was asked for
            self._without_lanes.append(run)
        self._look_at(run.lanes)
        return run

    def ended(
        self,
        run_id: RunId,
        client_id: ClientId,
        devices: DeviceSet,
        seconds: float,
        now: float,
        *,
        is_typical: bool = False,
    ) -> None:
        """An admitted run has ended on a lane, where it took `seconds` of device time.

        Args:
            is_typical: it did all that its program does, so that others of it will take as long.
        """
        lane = self.lanes.get(devices)
        mine = lane.admitted.get(client_id) if lane is not None else None
        ended = mine.pop(run_id) if mine is not None else None
        if lane is None or mine is None or ended is None:
            return
        run, program = ended.pending, ended.program
        if is_typical:
            is_first = not program.is_known(devices)
            program.measured(devices, seconds)
            if is_first:
                lane.busy_until += mine.learned(program, max(_LEAST_SECONDS, seconds))
        if not mine.runs:
            del lane.admitted[client_id]
        # What waits for nothing but the devices is computed from now on at the earliest. What was admitted before this
        # run, and has not ended, waits for something else: its program may be compiled for a minute yet.
        sure = sum(item.seconds_after(ended.number) for item in lane.admitted.values())
        lane.busy_until = max(now + sure, lane.busy_until + seconds - ended.seconds) if lane.admitted else now
        lane.totals.seconds += seconds
        if (usage := lane.totals.usage.get(client_id)) is not None:
            usage.seconds += seconds
            usage.num_finished += 1
        lane.policy.finished(run, seconds)
        self._changed[lane] = None

    def drop_client(self, client_id: ClientId) -> list[HeldRun]:
        """Forgets what is held for a client that is gone; returns its runs. What is admitted ends by itself."""
        runs = [run for run in self.runs.values() if run.share.client_id == client_id]
        for run in runs:
            self._take_out(run)
        for lane in self.lanes.values():
            lane.queues.pop(client_id, None)  # releases: all that it has goes
            lane.totals.usage.pop(client_id, None)
            lane.policy.forget(client_id)
            self._changed[lane] = None
        return runs

    # ---- what is decided

    def decisions(self, now: float) -> list[Decision]:
        """Returns what can be done now, in order."""
        for lane in self.lanes.values():
            if lane.queues and self._has_room(lane, now):
                self._changed[lane] = None
        result: list[Decision] = []
        while self._changed or self._chosen or self._without_lanes:
            num_before = len(result)
            changed, self._changed = list(self._changed), {}
            for run in list(self._without_lanes):
                if run.cancelled is not None:
                    result += self._let_go(run)
                elif not run.spans:
                    result += self._admit(run, now)
                elif not run.is_asked and self._spanning[run.share.client_id][0] is run:
                    result += self._ask(run)
                    self._without_lanes.remove(run)
            for lane in changed:
                result += self._releases(lane)
            blocked: set[Lane] = set()
            for run in list(self._chosen):
                if blocked.isdisjoint(run.lanes) and self._have_room(run, now):
                    self._chosen.remove(run)
                    result += self._take(run, now)
                else:
                    blocked.update(run.lanes)
            for lane in changed:
                result += self._decide(lane, blocked, now)
            if len(result) == num_before:
                break
        return result

    def wake_time(self, now: float) -> float | None:
        """Returns when something may be decided that cannot be now, if nothing happens until then."""
        times = [
            lane.busy_until - self._window_of(lane)
            for lane in self.lanes.values()
            if lane.queues and not self._has_room(lane, now)
        ]
        return min(times, default=None)

    def waits(self, now: float) -> list[str]:
        """Returns, for people, what the first held run of each client waits for, on each lane."""
        lines = []
        for lane in self.lanes.values():
            for client_id, queue in lane.queues.items():
                run = next((item for item in queue if isinstance(item, HeldRun)), None)
                if run is not None:
                    where = "/".join(lane.devices)
                    waited = f"run {run.run_id} of client {client_id} waits {now - run.arrived:.1f} s for {where}"
                    lines.append(f"{waited}: {self._reason(run, lane, now)}")
        return lines

    def _reason(self, run: HeldRun, lane: Lane, now: float) -> str:
        if run.cancelled is not None:
            return _EARLIER
        if run.is_asked:
            return _ORDER
        if run in self._chosen:
            return _OTHER_ROOM
        if not self._has_room(lane, now):
            return f"{lane.unfinished_seconds(now) * 1e3:.1f} ms of work that is admitted"
        if not self._fits(run, lane):
            return _OWN_RUNS
        if self._next_of(run.share.client_id, lane) is not run:
            return "its client's earlier runs on its other devices"
        return _TURN

    def _decide(self, lane: Lane, blocked: set[Lane], now: float) -> Iterator[Decision]:
        while lane not in blocked and lane.queues and self._has_room(lane, now):
            runs = [run for client_id in lane.queues if (run := self._next_of(client_id, lane)) is not None]
            if not runs:
                return
            if len(runs) == 1:
                run = runs[0]
            else:
                pending = lane.policy.next([lane.pending(run) for run in runs], now)
                run = self.runs[pending.run_id]
                for other in runs:
                    if other is not run:
                        other.held_for = _TURN
            if blocked.isdisjoint(run.lanes) and self._have_room(run, now):
                yield from self._take(run, now)
            else:
                run.held_for = _OTHER_ROOM
                self._chosen.append(run)
                blocked.update(run.lanes)

    def _take(self, run: HeldRun, now: float) -> Iterator[Decision]:
        for lane in run.lanes:
            lane.totals.usage[run.share.client_id].last_turn = now
        if run.spans:
            yield from self._ask(run)
        else:
            yield from self._admit(run, now)

    def _ask(self, run: HeldRun) -> Iterator[Decision]:
        waiting = self._spanning[run.share.client_id]
        assert waiting[0] is run
        self._leave_order(run)
        run.is_asked, run.held_for = True, _ORDER
        yield Ask(run=run)
        self._look_at(run.lanes)
        if waiting:
            self._look_at(waiting[0].lanes)

    def _admit(self, run: HeldRun, now: float) -> Iterator[Decision]:
        client_id = run.share.client_id
        self._take_out(run)
        for lane in run.lanes:
            pending = lane.pending(run)
            lane.busy_until = (max(now, lane.busy_until) if lane.admitted else now) + pending.seconds
            mine = lane.admitted.setdefault(client_id, Admitted())
            lane.num_admitted += 1
            admitted = AdmittedRun(pending, run.program, lane.num_admitted, pending.seconds)
            mine.add(run.run_id, admitted, is_elsewhere=run.spans or len(run.lanes) > 1)
            lane.policy.admitted(pending)
        yield Admit(run=run)
        for lane in run.lanes:
            yield from self._releases_of(client_id, lane)
        self._look_at(run.lanes)

    def _let_go(self, run: HeldRun) -> Iterator[Decision]:
        """A cancelled run's turn has come."""
        self._take_out(run)
        yield Cancel(run=run)
        self._look_at(run.lanes)

    def _take_out(self, run: HeldRun) -> None:
        client_id = run.share.client_id
        del self.runs[run.run_id]
        left = self.held_bytes.pop(client_id, 0) - run.nbytes
        if left:
            self.held_bytes[client_id] = left
        for lane in run.lanes:
            lane.pop(client_id, run)
        for runs in (self._chosen, self._without_lanes):
            if run in runs:
                runs.remove(run)
        if run.spans and not run.is_asked and run.cancelled is None:
            self._leave_order(run)

    def _leave_order(self, run: HeldRun) -> None:
        """A spanning run is asked for, or will not be."""
        waiting = self._spanning[run.share.client_id]
        waiting.remove(run)
        if not waiting:
            del self._spanning[run.share.client_id]

    def _releases(self, lane: Lane) -> Iterator[Decision]:
        for client_id in list(lane.queues):
            yield from self._releases_of(client_id, lane)

    def _releases_of(self, client_id: ClientId, lane: Lane) -> Iterator[Decision]:
        """Lets go what waits for its client's earlier runs alone."""
        while (queue := lane.queues.get(client_id)) is not None:
            item = queue[0]
            if isinstance(item, HeldRelease):
                lane.pop(client_id, item)
                yield Release(request=item.request)
            elif item.cancelled is not None and all(other.queues[client_id][0] is item for other in item.lanes):
                yield from self._let_go(item)
            else:
                return

    def _next_of(self, client_id: ClientId, lane: Lane) -> HeldRun | None:
        """Returns the run of a client that may be admitted to a lane, or asked for, as far as the client goes."""
        run = self._first_unasked(lane.queues[client_id])
        if run is None or run.cancelled is not None or run in self._chosen:
            return None
        if run.spans and self._spanning[client_id][0] is not run:
            return None
        for other in run.lanes:
            queue = other.queues[client_id]
            if (self._first_unasked(queue) if run.spans else queue[0]) is not run:
                return None
            if not self._fits(run, other):
                run.held_for = _OWN_RUNS
                return None
        return run

    @staticmethod
    def _first_unasked(queue: Iterable[HeldRun | HeldRelease]) -> HeldRun | None:
        first = next((item for item in queue if not (isinstance(item, HeldRun) and item.is_asked)), None)
        return first if isinstance(first, HeldRun) else None

    def _fits(self, run: HeldRun, lane: Lane) -> bool:
        """Whether a client may have one more run on a lane, beside those that have not ended."""
        if self.window == math.inf:
            return True
        mine = lane.admitted.get(run.share.client_id)
        seconds = mine.seconds - next(iter(mine.runs.values())).seconds if mine is not None else 0.0
        num_unfinished = mine.num_of[run.program] if mine is not None else 0
        if run.spans:
            for item in lane.queues[run.share.client_id]:
                if not isinstance(item, HeldRun) or not item.is_asked:
                    break
                seconds += lane.pending(item).seconds
                num_unfinished += item.program is run.program
        most = _WINDOWS_OF_CLIENT * self.window
        if run.program.is_known(lane.devices):
            return seconds <= max(most, self._window_of(lane))
        others_wait = len(lane.queues) > 1
        return seconds <= most and num_unfinished < (1 if others_wait else _MAX_UNKNOWN)

    def _window_of(self, lane: Lane) -> float:
        """Returns the device time that may be admitted to a lane."""
        return self.window if lane.is_shared else _WINDOWS_ALONE * self.window

    def _has_room(self, lane: Lane, now: float) -> bool:
        return lane.unfinished_seconds(now) <= self._window_of(lane)

    def _have_room(self, run: HeldRun, now: float) -> bool:
        return all(self._has_room(lane, now) for lane in run.lanes)

    def _look_at(self, lanes: Iterable[Lane]) -> None:
        for lane in lanes:
            self._changed[lane] = None
