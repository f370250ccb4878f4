"""The resource manager's core: islands, slices, clients.

Pure: events in, commands out; no clock, no socket. A slice is reserved on the least used devices of its island, its
executor is started by the island's node, and it is ready when the island's scheduler knows the executor. An event
that cannot follow what came before it raises `InternalError` with the slice's history.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias, assert_never

from torchways.errors import ClusterLost, Failure, InternalError, PlacementError, ResourceExhausted
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
class SliceReleased:
    """A client gives a slice back."""

    slice_id: SliceId


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientGone:
    """A client's stream ended."""

    client_id: ClientId


Event: TypeAlias = (
    NodeJoined | NodeLost | SchedulerReady | ExecutorReady | SliceConnected | ProcessExited | SliceReleased | ClientGone
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartScheduler:
    """Have a node start an island's scheduler."""

    node_id: int
    name: str
    island_id: IslandId


@dataclass(frozen=True, slots=True, kw_only=True)
class StartExecutor:
    """Have a node start an executor of a slice, with the given devices of the island."""

    node_id: int
    name: str
    slice: Slice
    executor_id: str
    device_indices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndProcess:
    """Have a node end a process."""

    node_id: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectSlice:
    """Have the island's scheduler connect to a slice's executor; answer with SliceConnected."""

    slice: Slice
    scheduler_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DisconnectSlice:
    """Have the island's scheduler forget a slice."""

    slice: Slice
    scheduler_address: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SettleSlice:
    """A slice is ready, or failed: answer who waits for it."""

    slice_id: SliceId


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
    StartScheduler | StartExecutor | EndProcess | ConnectSlice | DisconnectSlice | SettleSlice | TellLost | TellClosing
)


@dataclass(slots=True)
class Island:
    """Devices that one XLA computation can span."""

    island_id: IslandId
    node_id: int
    platform: str
    host: str
    #: Slices on each device.
    load: list[int]
    num_hosts: int = 1
    scheduler_address: str = ""
    scheduler_pid: int = 0


#: What a slice can become, by what it is.
_SLICE_STATES = {"starting": ("ready", "failed"), "ready": ("failed",), "failed": ()}

#: Platforms on which several processes can have a PJRT client with the same device.
_SHARING_PLATFORMS = ("cpu", "simulated")


@dataclass(slots=True)
class Slice:
    """A reserved virtual slice."""

    slice_id: SliceId
    client_id: ClientId
    island_id: IslandId
    shape: tuple[int, ...]
    axis_names: tuple[str, ...]
    device_indices: tuple[int, ...]
    #: The devices of each host that has some, by executor id.
    devices_of: dict[str, tuple[int, ...]]
    #: "starting", "ready" or "failed".
    state: str = "starting"
    #: What is known of the executors that are ready, by id.
    executors: dict[str, Any] = field(default_factory=dict)
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
    def executor_ids(self) -> tuple[str, ...]:
        """Its executors, one for each host; the first leads the gang."""
        return tuple(self.devices_of)

    @property
    def has_all(self) -> bool:
        """Whether all executors are ready."""
        return len(self.executors) == len(self.devices_of)


def process_name(executor_id: str) -> str:
    """Returns what an executor's process is called."""
    return f"executor {executor_id}"


@dataclass(slots=True)
class ClusterState:
    """See the module's docstring."""

    islands: dict[IslandId, Island] = field(default_factory=dict)
    slices: dict[SliceId, Slice] = field(default_factory=dict)
    #: Why the cluster cannot go on; empty while it can. Then nothing can be reserved.
    closing: str = ""
    _next_slice: int = 1
    _next_client: int = 1

    def attach(self) -> ClientId:
        """Returns the id of a new client."""
        client_id, self._next_client = ClientId(self._next_client), self._next_client + 1
        return client_id

    def reserve(
        self, client_id: ClientId, shape: tuple[int, ...], axis_names: tuple[str, ...], island_id: int | None
    ) -> tuple[Slice, list[Command]]:
        """Reserves a slice.

        Raises:
            PlacementError: shape, names or island make no sense.
            ResourceExhausted: no island is large enough, or (TPU) none has that many free devices.
            ClusterLost: the cluster is closing.
        """
        if self.closing:
            raise ClusterLost(f"the cluster is closing: {self.closing}")
        check_mesh(shape, axis_names)
        size = math.prod(shape)
        if island_id is not None and IslandId(island_id) not in self.islands:
            raise PlacementError(f"there is no island {island_id}; the cluster has islands {sorted(self.islands)}")
        candidates = [self.islands[IslandId(island_id)]] if island_id is not None else list(self.islands.values())
        fitting = [island for island in candidates if len(island.load) >= size]
        if not fitting:
            have = ", ".join(
                f"island {i.island_id} has {len(i.load)} ({i.load.count(0)} free)" for i in self.islands.values()
            )
            raise ResourceExhausted(
                f"a slice {mesh_text(shape, axis_names)} needs {size} devices of one island; {have}. Ask for a smaller "
                "mesh, or start the cluster with more --devices-per-island"
            )
        usable = [i for i in fitting if i.platform in _SHARING_PLATFORMS or i.load.count(0) >= size]
        if not usable:
            free = ", ".join(f"island {i.island_id} has {i.load.count(0)} of {len(i.load)} free" for i in fitting)
            raise ResourceExhausted(
                f"a slice {mesh_text(shape, axis_names)} needs {size} free devices of one island; {free}. Close a mesh "
                f"that is no longer used: a {fitting[0].platform} device belongs to one slice at a time"
            )
        island = min(usable, key=lambda item: (sum(sorted(item.load)[:size]), item.island_id))
        devices = sorted(sorted(range(len(island.load)), key=lambda device: (island.load[device], device))[:size])
        for device in devices:
            island.load[device] += 1
        slice_id = SliceId(self._next_slice)
        devices_of = _hosts(island, slice_id, devices)
        new = Slice(slice_id, client_id, island.island_id, shape, axis_names, tuple(devices), devices_of)
        self._next_slice += 1
        self.slices[new.slice_id] = new
        return new, [
            StartExecutor(
                node_id=island.node_id,
                name=process_name(executor_id),
                slice=new,
                executor_id=executor_id,
                device_indices=owned,
            )
            for executor_id, owned in devices_of.items()
        ]

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
                return [
                    ConnectSlice(slice=item, scheduler_address=event.address)
                    for item in self.slices.values()
                    if item.island_id == event.island_id and item.has_all and item.state == "starting"
                ]
            case ExecutorReady():
                return self._executor_ready(event)
            case SliceConnected():
                item = self.slices.get(event.slice_id)
                if item is None or item.state == "failed":
                    return []  # released, or its executor died, while the scheduler was connecting
                item.become("ready")
                return [SettleSlice(slice_id=event.slice_id)]
            case ProcessExited():
                return self._exited(event)
            case SliceReleased():
                return self._release(event.slice_id, "it was released")
            case ClientGone():
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
                island_id, event.node_id, event.platform, event.host, [0] * num_devices, event.hosts_per_island
            )
            name = f"scheduler i{island_id}"
            commands.append(StartScheduler(node_id=event.node_id, name=name, island_id=island_id))
        return commands

    def _executor_ready(self, event: ExecutorReady) -> list[Command]:
        for item in self.slices.values():
            if event.executor_id in item.devices_of:
                if event.executor_id in item.executors or item.state == "ready":
                    raise InternalError(f"executor {event.executor_id} is ready again; {' -> '.join(item.history)}")
                item.executors[event.executor_id] = event.info
                address = self.islands[item.island_id].scheduler_address
                complete = item.has_all and item.state == "starting" and address
                return [ConnectSlice(slice=item, scheduler_address=address)] if complete else []
        return []  # released meanwhile; its process is being ended

    def _exited(self, event: ProcessExited) -> list[Command]:
        for item in self.slices.values():
            executor_id = event.name.removeprefix(process_name(""))
            if executor_id in item.devices_of and item.state != "failed":
                message = f"executor {executor_id} is lost: {event.reason}"
                if item.state == "starting" and event.log_tail:
                    message += f"; the last lines that it wrote:\n{event.log_tail.rstrip()}"
                item.failure = Failure(kind="ExecutorLost", message=message)
                item.become("failed")
                address = self.islands[item.island_id].scheduler_address
                return [
                    TellLost(
                        client_id=item.client_id,
                        executor_id=executor_id,
                        slice_id=item.slice_id,
                        reason=event.reason,
                    ),
                    *([DisconnectSlice(slice=item, scheduler_address=address, reason=event.reason)] if address else []),
                    SettleSlice(slice_id=item.slice_id),
                ]
        if event.name.startswith("scheduler"):
            return self.close(f"{event.name} ended: {event.reason}")
        return []

    def _release(self, slice_id: SliceId, reason: str) -> list[Command]:
        item = self.slices.pop(slice_id, None)
        if item is None:
            return []
        island = self.islands[item.island_id]
        for device in item.device_indices:
            island.load[device] -= 1
        commands: list[Command] = [SettleSlice(slice_id=slice_id)]
        if item.state != "failed" and island.scheduler_address:
            commands.append(DisconnectSlice(slice=item, scheduler_address=island.scheduler_address, reason=reason))
        # Also where the slice failed: executors may live, and only their scheduler be out of reach.
        for executor_id in item.executor_ids:
            commands.append(EndProcess(node_id=island.node_id, name=process_name(executor_id)))
        return commands


def _hosts(island: Island, slice_id: SliceId, devices: list[int]) -> dict[str, tuple[int, ...]]:
    """Returns the devices that each host of a slice has, by executor id."""
    name = f"i{island.island_id}.s{slice_id}"
    if island.num_hosts == 1:
        return {name: tuple(devices)}
    per_host = len(island.load) // island.num_hosts
    found: dict[str, tuple[int, ...]] = {}
    for device in devices:
        key = f"{name}.h{device // per_host}"
        found[key] = (*found.get(key, ()), device)
    return found
