"""The resource manager's core: islands, device sets, slices, clients.

Pure: events in, commands out; no clock, no socket. A slice is reserved on the least used devices of its island. All
slices of the same devices share one device set: the executors that own these devices, one on each host. They are
started by the island's node with the first slice, and ended when none was left for a while. A slice is ready when the
island's scheduler knows it and its executors.

On CPU, sets may overlap: each has virtual devices of its own, and the scheduler lets one compute at a time. On
platforms where a process owns its devices, a device belongs to one set at a time. An event that cannot follow what came
before it raises `InternalError` with the slice's history.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias, assert_never

from torchways.errors import (
    ClusterLost,
    ConfigError,
    Failure,
    InternalError,
    PlacementError,
    ResourceExhausted,
    SessionClosed,
)
from torchways.ids import ClientId, IslandId, SliceId
from torchways.mesh import check_mesh, mesh_text


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeJoined:
    """A node agent offers islands."""

    node_id: int
    host: str
    platform: str
    devices_per_island: tuple[int, ...]
    hosts_per_island: int = 1
    has_data_processes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLost:
    """A node agent's stream broke."""

    node_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerReady:
    """An island's scheduler serves."""

    island_id: IslandId
    address: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorReady:
    """An executor serves; `info` is opaque here."""

    executor_id: str
    info: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DataProcessReady:
    """A data process serves."""

    name: str
    address: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceConnected:
    """The island's scheduler has connected to a slice's executor."""

    slice_id: SliceId


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessExited:
    """A process that a node started has ended, unasked."""

    name: str
    reason: str
    #: The last lines that it wrote.
    log_tail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorCutOff:
    """An executor is of no use, though its process may live: its scheduler does not reach it."""

    executor_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerCutOff:
    """An island's scheduler is of no use, though its process may live: it does not answer."""

    island_id: IslandId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceReleased:
    """A client gives a slice back. `scheduler_knows` from the client, behind the slice's last run."""

    slice_id: SliceId
    scheduler_knows: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleOver:
    """A device set that had no slice when its time began has waited long enough. `period`: that of `WaitIdle`."""

    name: str
    period: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientGone:
    """A client's stream ended."""

    client_id: ClientId


Event: TypeAlias = (
    NodeJoined
    | NodeLost
    | SchedulerReady
    | ExecutorReady
    | DataProcessReady
    | SliceConnected
    | ProcessExited
    | ExecutorCutOff
    | SchedulerCutOff
    | SliceReleased
    | IdleOver
    | ClientGone
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartScheduler:
    """Have a node start an island's scheduler."""

    node_id: int
    name: str
    island_id: IslandId


@dataclass(frozen=True, slots=True, kw_only=True)
class StartExecutor:
    """Have a node start an executor of a device set, with the given devices of the island."""

    node_id: int
    name: str
    device_set: DeviceSet
    executor_id: str
    device_indices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartData:
    """Have a node start a data process, with a client's identity."""

    node_id: int
    name: str
    client_id: ClientId


@dataclass(frozen=True, slots=True, kw_only=True)
class EndProcess:
    """Have a node end a process."""

    node_id: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectSlice:
    """Tell the island's scheduler of a slice and its executors; answer with SliceConnected."""

    slice: Slice
    scheduler_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DisconnectSlice:
    """Have the island's scheduler forget a slice."""

    slice: Slice
    scheduler_address: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DisconnectExecutor:
    """Have the island's scheduler forget an executor, and its slices."""

    executor_id: str
    scheduler_address: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitIdle:
    """A device set has no slice: answer with IdleOver after a while. `period`: which time without one it is."""

    name: str
    period: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SettleSlice:
    """A slice is ready, or failed: answer who waits for it."""

    slice_id: SliceId


@dataclass(frozen=True, slots=True, kw_only=True)
class SettleDataProcess:
    """A data process is ready, or has ended: answer who waits for it."""

    process_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TellLost:
    """Tell a client that an executor is gone."""

    client_id: ClientId
    executor_id: str
    slice_id: SliceId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TellClosing:
    """Tell all clients that the cluster cannot go on."""

    reason: str


Command: TypeAlias = (
    StartScheduler
    | StartExecutor
    | StartData
    | EndProcess
    | ConnectSlice
    | DisconnectSlice
    | DisconnectExecutor
    | WaitIdle
    | SettleSlice
    | SettleDataProcess
    | TellLost
    | TellClosing
)


@dataclass(slots=True)
class Island:
    """Devices that one XLA computation can span."""

    island_id: IslandId
    node_id: int
    platform: str
    host: str
    #: Slices on each device that have not failed.
    load: list[int]
    num_hosts: int = 1
    has_data_processes: bool = False
    scheduler_address: str = ""
    scheduler_pid: int = 0
    #: Device sets that were started here so far.
    num_sets: int = 0

    @property
    def is_shared(self) -> bool:
        """Whether a device can belong to several sets at a time."""
        return self.platform in _SHARING_PLATFORMS

    @property
    def num_free(self) -> int:
        """Devices that no slice has."""
        return self.load.count(0)

    def count(self, devices: tuple[int, ...], change: int) -> None:
        """Adds to the number of slices on some devices."""
        for device in devices:
            self.load[device] += change


#: What a slice can become, by what it is.
_SLICE_STATES = {"starting": ("ready", "failed"), "ready": ("failed",), "failed": ()}

#: Platforms on which several processes can have a PJRT client with the same device.
_SHARING_PLATFORMS = ("cpu", "simulated")


@dataclass(slots=True)
class DeviceSet:
    """Devices and the executors that own them.

    Attributes:
        name: "i0.e1", the first that island 0 started.
        number: of those that its island started.
        devices_of: the devices of each host that has some, by executor id.
        executors: what is known of those that are ready, by id.
        slices: that have these devices.
        num_idle: how many times it has had none.
    """

    name: str
    number: int
    island_id: IslandId
    device_indices: tuple[int, ...]
    devices_of: dict[str, tuple[int, ...]]
    executors: dict[str, Any] = field(default_factory=dict)
    slices: set[SliceId] = field(default_factory=set)
    num_idle: int = 0

    @property
    def is_ready(self) -> bool:
        """Whether all executors are ready."""
        return len(self.executors) == len(self.devices_of)


@dataclass(slots=True)
class Slice:
    """A reserved virtual slice."""

    slice_id: SliceId
    client_id: ClientId
    device_set: DeviceSet
    shape: tuple[int, ...]
    axis_names: tuple[str, ...]
    #: "starting", "ready" or "failed".
    state: str = "starting"
    #: The scheduler was told of it.
    is_connecting: bool = False
    failure: Failure | None = None
    #: The states that it went through, for error messages.
    history: list[str] = field(default_factory=lambda: ["starting"])

    def become(self, state: str) -> None:
        """Changes its state.

        Raises:
            InternalError: it cannot go from where it is to `state`.
        """
        if state not in _SLICE_STATES[self.state]:
            raise InternalError(f"slice {self.slice_id} cannot become {state}; it was {' -> '.join(self.history)}")
        self.state = state
        self.history.append(state)

    @property
    def island_id(self) -> IslandId:
        """Its island."""
        return self.device_set.island_id

    @property
    def device_indices(self) -> tuple[int, ...]:
        """Its devices, by the island's numbers."""
        return self.device_set.device_indices

    @property
    def executor_ids(self) -> tuple[str, ...]:
        """Its executors, one for each host."""
        return tuple(self.device_set.devices_of)


@dataclass(slots=True)
class DataProcess:
    """A process of an input pipeline, for as long as its slice lives.

    Attributes:
        failure: how it ended; such a one is kept, to be asked for.
    """

    process_id: int
    client_id: ClientId
    slice_id: SliceId
    node_id: int
    host: str
    address: str = ""
    pid: int = 0
    failure: Failure | None = None

    @property
    def name(self) -> str:
        """What its process is called."""
        return f"data process {self.process_id}"

    @property
    def is_settled(self) -> bool:
        """Whether it is ready, or has ended."""
        return bool(self.address) or self.failure is not None


#: Data processes of a slice, those that have ended among them.
_MAX_DATA_PROCESSES = 64


def process_name(executor_id: str) -> str:
    """Returns what an executor's process is called."""
    return f"executor {executor_id}"


@dataclass(slots=True)
class ClusterState:
    """See the module's docstring."""

    islands: dict[IslandId, Island] = field(default_factory=dict)
    slices: dict[SliceId, Slice] = field(default_factory=dict)
    device_sets: dict[str, DeviceSet] = field(default_factory=dict)
    #: Names of the clients that are attached.
    clients: dict[ClientId, str] = field(default_factory=dict)
    #: Why the cluster cannot go on; empty while it can. Then nothing can be reserved.
    closing: str = ""
    data_processes: dict[int, DataProcess] = field(default_factory=dict)
    _next_slice: int = 1
    _next_data_process: int = 1
    _next_client: int = 1

    def attach(self, name: str) -> ClientId:
        """Returns the id of a new client."""
        client_id, self._next_client = ClientId(self._next_client), self._next_client + 1
        self.clients[client_id] = name
        return client_id

    def reserve(
        self, client_id: ClientId, shape: tuple[int, ...], axis_names: tuple[str, ...], island_id: int | None
    ) -> tuple[Slice, list[Command]]:
        """Reserves a slice.

        Raises:
            PlacementError: shape, names or island make no sense.
            ResourceExhausted: no island is large enough, or (TPU) none has such a set of devices to give.
            SessionClosed: the client is gone.
            ClusterLost: the cluster is closing.
        """
        if self.closing:
            raise ClusterLost(f"the cluster is closing: {self.closing}")
        if client_id not in self.clients:
            raise SessionClosed(f"client {client_id} is not attached")
        check_mesh(shape, axis_names)
        size = math.prod(shape)
        if island_id is not None and IslandId(island_id) not in self.islands:
            raise PlacementError(f"there is no island {island_id}; the cluster has islands {sorted(self.islands)}")
        candidates = [self.islands[IslandId(island_id)]] if island_id is not None else list(self.islands.values())
        fitting = [island for island in candidates if len(island.load) >= size]
        if not fitting:
            have = ", ".join(
                f"island {i.island_id} has {len(i.load)} ({i.num_free} free)" for i in self.islands.values()
            )
            raise ResourceExhausted(
                f"a slice {mesh_text(shape, axis_names)} needs {size} devices of one island; {have}. Ask for a smaller "
                "mesh, or start the cluster with more --devices-per-island"
            )
        choices = {i.island_id: found for i in fitting if (found := self._choose(i, size)) is not None}
        if not choices:
            raise ResourceExhausted(
                f"a slice {mesh_text(shape, axis_names)} needs {size} free devices of one island, or devices that are "
                f"in use together; {'; '.join(self._holders(i) for i in fitting)}. Close a mesh that is no longer used"
            )
        island = min(
            (self.islands[key] for key in choices),
            key=lambda item: (sum(item.load[device] for device in choices[item.island_id]), item.island_id),
        )
        devices = choices[island.island_id]
        island.count(devices, 1)
        commands: list[Command] = []
        used = self._set_with(island, devices)
        if used is None:
            if not island.is_shared:
                for idle in [item for item in self._sets_of(island) if set(item.device_indices) & set(devices)]:
                    commands += self._end_set(idle, "another has its devices now")
            used, starting = self._start_set(island, devices)
            commands += starting
        slice_id, self._next_slice = SliceId(self._next_slice), self._next_slice + 1
        new = self.slices[slice_id] = Slice(slice_id, client_id, used, shape, axis_names)
        used.slices.add(slice_id)
        return new, [*commands, *self._connect(used)]

    def start_data_process(self, client_id: ClientId, slice_id: SliceId) -> tuple[DataProcess, list[Command]]:
        """Starts a process for an input pipeline of a slice, which its owner has checked to be the client's.

        Raises:
            ClusterLost: the cluster is closing.
            PlacementError: the slice is not reserved any more, or failed.
            ConfigError: the slice's machine runs no code of clients.
            ResourceExhausted: the slice has had too many.
        """
        if self.closing:
            raise ClusterLost(f"the cluster is closing: {self.closing}")
        item = self.slices.get(slice_id)
        if item is None or item.state == "failed":
            raise PlacementError(f"slice {slice_id} is closed or lost: make a new mesh")
        island = self.islands[item.island_id]
        if not island.has_data_processes:
            raise ConfigError(
                f"the machine of island {island.island_id} runs no input pipelines of clients, which could run any "
                "code there: start its node agent with --data-path (docs/data.md), or read data in the controller"
            )
        mine = [process for process in self.data_processes.values() if process.slice_id == slice_id]
        ended = [process for process in mine if process.failure is not None]
        if len(mine) - len(ended) >= _MAX_DATA_PROCESSES:
            raise ResourceExhausted(
                f"slice {slice_id} has {_MAX_DATA_PROCESSES} data processes, the most that one may have: close loaders"
            )
        forgotten = self.end_data_process(ended[0].process_id) if len(mine) >= _MAX_DATA_PROCESSES else []
        process_id, self._next_data_process = self._next_data_process, self._next_data_process + 1
        new = DataProcess(process_id, client_id, slice_id, island.node_id, island.host)
        self.data_processes[process_id] = new
        return new, [*forgotten, StartData(node_id=new.node_id, name=new.name, client_id=client_id)]

    def end_data_process(self, process_id: int) -> list[Command]:
        """Ends a data process and forgets it."""
        process = self.data_processes.pop(process_id, None)
        if process is None:
            return []
        settle = SettleDataProcess(process_id=process_id)
        if process.failure is not None:
            return [settle]
        return [settle, EndProcess(node_id=process.node_id, name=process.name)]

    def _end_data_processes(self, slice_id: SliceId) -> list[Command]:
        """Ends the data processes of a slice that is gone."""
        commands: list[Command] = []
        for process in list(self.data_processes.values()):
            if process.slice_id == slice_id:
                commands += self.end_data_process(process.process_id)
        return commands

    def _choose(self, island: Island, size: int) -> tuple[int, ...] | None:
        """Returns the least used devices; of several, those that have executors. None: all are taken."""
        same_size = [item.device_indices for item in self._sets_of(island) if len(item.device_indices) == size]
        if not island.is_shared and island.num_free < size:
            return min(same_size, key=lambda devices: island.load[devices[0]], default=None)
        ranked = sorted(range(len(island.load)), key=lambda device: (island.load[device], device))
        least = tuple(sorted(ranked[:size]))
        load = sum(island.load[device] for device in least)
        return next((devices for devices in same_size if sum(island.load[d] for d in devices) == load), least)

    def _sets_of(self, island: Island) -> list[DeviceSet]:
        return [item for item in self.device_sets.values() if item.island_id == island.island_id]

    def _set_with(self, island: Island, devices: tuple[int, ...]) -> DeviceSet | None:
        return next((item for item in self._sets_of(island) if item.device_indices == devices), None)

    def _holders(self, island: Island) -> str:
        """Says who has which devices of an island."""
        held = ", ".join(
            f"{mesh_text(item.shape, item.axis_names)} of {self.clients.get(item.client_id, 'a client')} has "
            f"{list(item.device_indices)}"
            for item in self.slices.values()
            if item.island_id == island.island_id and item.state != "failed"
        )
        return f"island {island.island_id} has {island.num_free} of {len(island.load)} free: {held}"

    def _start_set(self, island: Island, devices: tuple[int, ...]) -> tuple[DeviceSet, list[Command]]:
        island.num_sets += 1
        name = f"i{island.island_id}.e{island.num_sets}"
        new = DeviceSet(name, island.num_sets, island.island_id, devices, _hosts(island, name, devices))
        self.device_sets[name] = new
        return new, [
            StartExecutor(
                node_id=island.node_id,
                name=process_name(executor_id),
                device_set=new,
                executor_id=executor_id,
                device_indices=owned,
            )
            for executor_id, owned in new.devices_of.items()
        ]

    def _end_set(self, item: DeviceSet, reason: str, without: str = "") -> list[Command]:
        """Ends a set's executors; `without` is one that has ended by itself."""
        del self.device_sets[item.name]
        island = self.islands[item.island_id]
        commands: list[Command] = []
        for executor_id in item.devices_of:
            if island.scheduler_address and executor_id in item.executors:
                commands.append(
                    DisconnectExecutor(
                        executor_id=executor_id, scheduler_address=island.scheduler_address, reason=reason
                    )
                )
            if executor_id != without:
                commands.append(EndProcess(node_id=island.node_id, name=process_name(executor_id)))
        return commands

    def _connect(self, item: DeviceSet) -> list[Command]:
        """Tells the scheduler of a set's new slices, where both are ready."""
        address = self.islands[item.island_id].scheduler_address
        if not item.is_ready or not address:
            return []
        new = [self.slices[key] for key in sorted(item.slices) if not self.slices[key].is_connecting]
        for entry in new:
            entry.is_connecting = True
        return [ConnectSlice(slice=entry, scheduler_address=address) for entry in new]

    def handle(self, event: Event) -> list[Command]:
        """Takes an event; returns what to do."""
        match event:
            case NodeJoined():
                return self._join(event)
            case NodeLost():
                return self.close(f"node agent {event.node_id} is gone")
            case SchedulerReady():
                island = self.islands[event.island_id]
                island.scheduler_address, island.scheduler_pid = event.address, event.pid
                return [command for item in self._sets_of(island) for command in self._connect(item)]
            case ExecutorReady():
                return self._executor_ready(event)
            case DataProcessReady():
                process = self._data_process(event.name)
                if process is None:
                    return []  # given up meanwhile; it is being ended
                process.address, process.pid = event.address, event.pid
                return [SettleDataProcess(process_id=process.process_id)]
            case SliceConnected():
                item = self.slices.get(event.slice_id)
                if item is None or item.state == "failed":
                    return []  # released, or its executor died, while the scheduler was told
                item.become("ready")
                return [SettleSlice(slice_id=event.slice_id)]
            case ProcessExited():
                return self._exited(event)
            case ExecutorCutOff():
                return self._lose(event.executor_id, event.reason, has_ended=False)
            case SchedulerCutOff():
                if self.closing or event.island_id not in self.islands:
                    return []
                return self.close(f"scheduler i{event.island_id} cannot be reached: {event.reason}")
            case SliceReleased():
                return self._release(event.slice_id, "it was released", event.scheduler_knows)
            case IdleOver():
                idle = self.device_sets.get(event.name)
                if idle is None or idle.slices or idle.num_idle != event.period:
                    return []
                return self._end_set(idle, "it was idle")
            case ClientGone():
                self.clients.pop(event.client_id, None)
                mine = [item.slice_id for item in self.slices.values() if item.client_id == event.client_id]
                return [command for slice_id in mine for command in self._release(slice_id, "its client is gone")]
            case _:
                assert_never(event)

    def close(self, reason: str) -> list[Command]:
        """Refuses reservations from here on, and tells all clients why."""
        self.closing = self.closing or reason
        return [TellClosing(reason=reason)]

    def _join(self, event: NodeJoined) -> list[Command]:
        commands: list[Command] = []
        for num_devices in event.devices_per_island:
            island_id = IslandId(len(self.islands))
            self.islands[island_id] = Island(
                island_id,
                event.node_id,
                event.platform,
                event.host,
                [0] * num_devices,
                event.hosts_per_island,
                event.has_data_processes,
            )
            name = f"scheduler i{island_id}"
            commands.append(StartScheduler(node_id=event.node_id, name=name, island_id=island_id))
        return commands

    def _executor_ready(self, event: ExecutorReady) -> list[Command]:
        item = self._set_of(event.executor_id)
        if item is None:
            return []  # given up meanwhile; its process is being ended
        if event.executor_id in item.executors:
            raise InternalError(f"executor {event.executor_id} is ready again")
        item.executors[event.executor_id] = event.info
        return self._connect(item)

    def _set_of(self, executor_id: str) -> DeviceSet | None:
        return next((item for item in self.device_sets.values() if executor_id in item.devices_of), None)

    def _data_process(self, name: str) -> DataProcess | None:
        return next((process for process in self.data_processes.values() if process.name == name), None)

    def _exited(self, event: ProcessExited) -> list[Command]:
        process = self._data_process(event.name)
        if process is not None:
            message = f"{process.name} is lost: {event.reason}"
            if event.log_tail:
                message += f"; the last lines that it wrote:\n{event.log_tail.rstrip()}"
            process.failure = Failure(kind="DataProcessLost", message=message)
            return [SettleDataProcess(process_id=process.process_id)]
        if event.name.startswith("scheduler"):
            return self.close(f"{event.name} ended: {event.reason}")
        executor_id = event.name.removeprefix(process_name(""))
        return self._lose(executor_id, event.reason, event.log_tail, has_ended=True)

    def _lose(self, executor_id: str, reason: str, log_tail: str = "", *, has_ended: bool) -> list[Command]:
        """Gives up an executor, with the others of its set and all slices that it has."""
        lost = self._set_of(executor_id)
        if lost is None:
            return []
        commands: list[Command] = []
        for slice_id in sorted(lost.slices):
            item = self.slices[slice_id]
            message = f"executor {executor_id} is lost: {reason}"
            if item.state == "starting" and log_tail:
                message += f"; the last lines that it wrote:\n{log_tail.rstrip()}"
            item.failure = Failure(kind="ExecutorLost", message=message)
            item.become("failed")
            # Now, not when its client closes it: the others that have lost these devices may ask for them before that.
            self.islands[item.island_id].count(item.device_indices, -1)
            commands.append(
                TellLost(client_id=item.client_id, executor_id=executor_id, slice_id=slice_id, reason=reason)
            )
            commands.append(SettleSlice(slice_id=slice_id))
            commands += self._end_data_processes(slice_id)
        return [*commands, *self._end_set(lost, reason, without=executor_id if has_ended else "")]

    def _release(self, slice_id: SliceId, reason: str, scheduler_knows: bool = False) -> list[Command]:
        item = self.slices.pop(slice_id, None)
        if item is None:
            return []
        island, used = self.islands[item.island_id], item.device_set
        if item.state != "failed":
            island.count(item.device_indices, -1)
        used.slices.discard(slice_id)
        commands: list[Command] = [SettleSlice(slice_id=slice_id), *self._end_data_processes(slice_id)]
        if item.is_connecting and item.state != "failed" and not scheduler_knows:
            commands.append(DisconnectSlice(slice=item, scheduler_address=island.scheduler_address, reason=reason))
        if not used.slices and used.name in self.device_sets:
            used.num_idle += 1
            commands.append(WaitIdle(name=used.name, period=used.num_idle))
        return commands


def _hosts(island: Island, name: str, devices: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Returns the devices that each host of a set has, by executor id."""
    if island.num_hosts == 1:
        return {name: devices}
    per_host = len(island.load) // island.num_hosts
    found: dict[str, tuple[int, ...]] = {}
    for device in devices:
        key = f"{name}.h{device // per_host}"
        found[key] = (*found.get(key, ()), device)
    return found
