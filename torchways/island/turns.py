"""Turns of computations on devices where several sets of them overlap, or where a set has several hosts.

Computations of a set of several hosts (a gang) are enqueued on the devices only as granted, and granted once all of the
hosts are ready: each would wait for ever for one that failed alone. If a host fails one before, it fails on all.

Every host gets its grants in one order; one that shares a device with another set's is granted when all hosts have
enqueued the other's. So all device queues of the island agree on the order, and no two computations can wait for each
other. Where two sets of one host each share a device, they compute as granted too, while both have slices: one at a
time, each until it has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torchways.errors import Failure, InternalError
from torchways.ids import RunPart
from torchways.island.admission import DeviceSet
from torchways.island.events import Command, SendGrant, SendGrantsNeeded, SendRefusal


@dataclass(slots=True)
class _Turn:
    """A computation that waits for its turn on devices, or has it.

    `left` are the hosts that have not passed it; `held_for` is what it waited for, for people.
    """

    devices: DeviceSet
    run: RunPart
    unit: int
    left: set[str]
    held_for: str = ""


@dataclass(slots=True)
class _Reports:
    """What the hosts of a gang have said of a computation.

    `left` are the hosts that have said nothing; with a `failure` it will not be granted.
    """

    left: set[str]
    failure: Failure | None = None


@dataclass(slots=True)
class _Part:
    """A run's part on a gang of which some hosts have said more than others.

    `units` are the computations of which not all hosts have said something; `ended` are the hosts whose part is over,
    with its failure: that of all computations of which they have said nothing.
    """

    devices: DeviceSet
    units: dict[int, _Reports] = field(default_factory=dict)
    ended: dict[str, Failure | None] = field(default_factory=dict)


@dataclass(slots=True)
class Turns:
    """See the module's docstring."""

    #: Of sets that have slices, or compute still: the island's devices.
    devices: dict[DeviceSet, frozenset[int]] = field(default_factory=dict)
    #: Sets whose computations need grants though they have one host.
    _needs_grants: set[DeviceSet] = field(default_factory=set)
    #: Runs' parts on gangs of which some hosts have said more than others.
    _parts: dict[RunPart, _Part] = field(default_factory=dict)
    #: Waiting for their turn, oldest first.
    _waiting: list[_Turn] = field(default_factory=list)
    #: Granted, and not passed by all hosts.
    _granted: dict[tuple[RunPart, int], _Turn] = field(default_factory=dict)
    #: Sets whose executor still computes what it issued before it needed grants, with the epoch of the need.
    _not_idle: dict[DeviceSet, int] = field(default_factory=dict)
    #: Changes of who needs grants.
    _epoch: int = 0

    def add(self, devices: DeviceSet, device_indices: frozenset[int]) -> list[Command]:
        """A set of devices has a slice."""
        self.devices[devices] = device_indices
        return self.share()

    def remove(self, devices: DeviceSet, *, is_lost: bool = False) -> list[Command]:
        """A set of devices has no slice any more, and computes nothing, or is lost. `share` and `grant` come next."""
        commands: list[Command] = []
        if devices in self._needs_grants and not is_lost:
            self._epoch += 1
            commands.append(SendGrantsNeeded(executor_id=devices[0], needed=False, epoch=self._epoch))
        del self.devices[devices]
        self._forget(devices)
        return commands

    def idle(self, executor_id: str, epoch: int) -> list[Command]:
        """What an executor computed before it needed grants has ended."""
        devices = self.set_of(executor_id)
        if devices is not None and self._not_idle.get(devices) == epoch:
            del self._not_idle[devices]
        return self.grant()

    def share(self) -> list[Command]:
        """Has the executors of sets that share a device with another wait for grants, and no others."""
        commands: list[Command] = []
        alone = [devices for devices in self.devices if len(devices) == 1]
        for devices in alone:
            mine = self.devices[devices]
            needed = any(mine & self.devices[other] for other in self.devices if other != devices)
            if needed != (devices in self._needs_grants):
                self._epoch += 1
                commands.append(SendGrantsNeeded(executor_id=devices[0], needed=needed, epoch=self._epoch))
                if needed:
                    self._needs_grants.add(devices)
                    self._not_idle[devices] = self._epoch
                else:
                    self._forget(devices)
        return commands

    def _forget(self, devices: DeviceSet) -> None:
        self._needs_grants.discard(devices)
        self._not_idle.pop(devices, None)
        self._parts = {run: part for run, part in self._parts.items() if part.devices != devices}
        self._waiting = [item for item in self._waiting if item.devices != devices]
        self._granted = {key: item for key, item in self._granted.items() if item.devices != devices}

    def ready(self, executor_id: str, run: RunPart, unit: int, failure: Failure | None = None) -> list[Command]:
        """A computation waits for nothing but its grant; or, with a failure, a host of a gang cannot compute it."""
        devices = self.set_of(executor_id)
        if devices is None or (len(devices) == 1 and devices not in self._needs_grants):
            return []  # it is gone, or was told meanwhile that it needs no grants
        if len(devices) == 1:
            self._waiting.append(_Turn(devices, run, unit, set(devices)))
            return self.grant()
        commands: list[Command] = []
        part = self._part(run, devices)
        if unit not in part.units:
            part.units[unit] = _Reports(set(devices))
            for host in part.ended:
                commands += self._report_ended(part, host, run, unit)
        return [*commands, *self._report(part, executor_id, run, unit, failure)]

    def ended(self, executor_id: str, run: RunPart, failure: Failure | None) -> list[Command]:
        """A run's part is over on an executor: of a gang's computations that it did not report it never will."""
        devices = self.set_of(executor_id)
        if devices is None or len(devices) == 1:
            return []
        part = self._part(run, devices)
        part.ended[executor_id] = failure
        commands: list[Command] = []
        for unit in [unit for unit, reports in part.units.items() if executor_id in reports.left]:
            commands += self._report_ended(part, executor_id, run, unit)
        self._tidy(part, run)
        return commands

    def _part(self, run: RunPart, devices: DeviceSet) -> _Part:
        part = self._parts.get(run)
        if part is None:
            part = self._parts[run] = _Part(devices)
        return part

    def _report_ended(self, part: _Part, executor_id: str, run: RunPart, unit: int) -> list[Command]:
        """Takes note that a host will say nothing of a computation."""
        message = f"executor {executor_id} has ended its part of run {run.run_id}, but not computed unit {unit}"
        failure = part.ended[executor_id] or Failure(kind="InternalError", message=message)
        return self._report(part, executor_id, run, unit, failure)

    def _report(self, part: _Part, executor_id: str, run: RunPart, unit: int, failure: Failure | None) -> list[Command]:
        """Takes what a host of a gang says of a computation."""
        reports = part.units[unit]
        if executor_id not in reports.left:
            raise InternalError(f"executor {executor_id} reported unit {unit} of run {run.run_id} twice")
        reports.left.discard(executor_id)
        commands: list[Command] = []
        if failure is not None and reports.failure is None:
            reports.failure = failure
            others = [other for other in part.devices if other != executor_id]
            commands += [SendRefusal(executor_id=other, run=run, unit=unit, failure=failure) for other in others]
        if reports.left:
            return commands
        del part.units[unit]
        self._tidy(part, run)
        if reports.failure is not None:
            return commands
        self._waiting.append(_Turn(part.devices, run, unit, set(part.devices)))
        return [*commands, *self.grant()]

    def _tidy(self, part: _Part, run: RunPart) -> None:
        """Forgets a run's part if there is nothing to remember."""
        if not part.units and len(part.ended) in (0, len(part.devices)):
            self._parts.pop(run, None)

    def passed(self, executor_id: str, run: RunPart, unit: int) -> list[Command]:
        """A granted computation needs its turn no more: it is in a host's queues (gang), or it has ended."""
        devices = self.set_of(executor_id)
        if devices is None or (len(devices) == 1 and devices not in self._needs_grants):
            return []
        key = (run, unit)
        item = self._granted.get(key)
        if item is None and len(devices) == 1:
            return []  # granted before grants were not needed for a while
        if item is None or executor_id not in item.left:
            raise InternalError(
                f"executor {executor_id} passed unit {unit} of run {run.run_id}, which was not granted to it"
            )
        item.left.discard(executor_id)
        if item.left:
            return []
        del self._granted[key]
        return self.grant()

    def set_of(self, executor_id: str) -> DeviceSet | None:
        """Returns the set that an executor is of."""
        return next((devices for devices in self.devices if executor_id in devices), None)

    def grant(self) -> list[Command]:
        """Grants all that no other set's computation, granted or older, is in the way of."""
        commands: list[Command] = []
        waiting: list[_Turn] = []
        #: Who computes on a device, or waits for it; None: several sets do.
        users: dict[int, DeviceSet | None] = {}
        for devices in (*dict.fromkeys(item.devices for item in self._granted.values()), *self._not_idle):
            self._use(users, devices)
        for item in self._waiting:
            if self._use(users, item.devices):
                self._granted[item.run, item.unit] = item
                commands += [
                    SendGrant(executor_id=executor_id, run=item.run, unit=item.unit, held_for=item.held_for)
                    for executor_id in item.devices
                ]
            else:
                item.held_for = item.held_for or self._held_for(item.devices, waiting)
                waiting.append(item)
        self._waiting = waiting
        return commands

    def _held_for(self, devices: DeviceSet, waiting: Sequence[_Turn]) -> str:
        """Returns, for people, which sets come before a computation of another: those that compute or wait already."""
        mine = self.devices[devices]
        first = [item.devices for item in (*self._granted.values(), *waiting)]
        others = [other for other in (*first, *self._not_idle) if other != devices and mine & self.devices[other]]
        named = " and ".join(dict.fromkeys("/".join(other) for other in others))
        return f"{named} on devices that they share"

    def _use(self, users: dict[int, DeviceSet | None], devices: DeviceSet) -> bool:
        """Adds a set to the users of its devices; returns whether it is the only one on all of them."""
        is_alone = True
        for number in self.devices[devices]:
            if users.setdefault(number, devices) != devices:
                users[number] = None
                is_alone = False
        return is_alone
