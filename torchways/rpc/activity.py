"""What a cluster did between two observations: shares, rates and utilisation. Pure; `torchways top` shows it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchways.rpc import torchways_pb2 as pb

_COMPILES = ": its compilation"


@dataclass(frozen=True, slots=True, kw_only=True)
class IslandActivity:
    """An island.

    Attributes:
        utilisation: of each device, the part of the time in which it computed.
        num_held, num_admitted: runs that wait for admission, and that have been admitted and not finished.
        queue_seconds: device time of what is admitted, in the longest of its queues.
        waits: what held runs wait for.
    """

    island: int
    platform: str
    num_slices: int
    utilisation: tuple[float, ...]
    num_held: int
    num_admitted: int
    queue_seconds: float
    waits: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientActivity:
    """A client.

    Attributes:
        wanted: its part of the weights of those that have something to run.
        got: its part of the device time that all clients got.
        device_seconds: device time that it got, each device counted.
        runs_per_second: that finished.
        buffer_bytes: of its buffers, per device, on all executors together.
    """

    client_id: int
    name: str
    weight: float
    priority: int
    wanted: float
    got: float
    device_seconds: float
    num_held: int
    num_admitted: int
    runs_per_second: float
    buffer_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorActivity:
    """An executor.

    Attributes:
        devices: of the island.
        used_bytes, budget_bytes: device memory per device; a budget of 0 is no limit.
        num_programs: that it has loaded.
        num_compiling: programs that runs wait for to be compiled.
        compiling: the part of the time in which it compiled.
        waits: what its runs wait for.
        stalls: its runs without progress for long, and why.
    """

    executor_id: str
    island: int
    devices: tuple[int, ...]
    used_bytes: int
    budget_bytes: int
    rss_bytes: int
    num_runs: int
    num_programs: int
    num_compiled: int
    num_compiling: int
    compiling: float
    waits: tuple[str, ...]
    stalls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What all did in `seconds`."""

    time_ns: int
    seconds: float
    islands: tuple[IslandActivity, ...]
    clients: tuple[ClientActivity, ...]
    executors: tuple[ExecutorActivity, ...]
    unreachable: tuple[str, ...]


def activity_between(before: pb.Observation, after: pb.Observation) -> Activity:
    """Returns what the cluster did between two observations; a counter that is not in the first began at zero."""
    seconds = max((after.time_ns - before.time_ns) / 1e9, 1e-6)
    return Activity(
        time_ns=after.time_ns,
        seconds=seconds,
        islands=tuple(_islands(before, after, seconds)),
        clients=tuple(_clients(before, after, seconds)),
        executors=tuple(_executors(before, after, seconds)),
        unreachable=tuple(after.unreachable),
    )


def _islands(before: pb.Observation, after: pb.Observation, seconds: float) -> Iterator[IslandActivity]:
    statuses = {item.island_id: item.status for item in after.schedulers}
    earlier, later = _busy_of_devices(before), _busy_of_devices(after)
    for island in after.cluster.islands:
        status = statuses.get(island.island_id)
        sets = list(status.device_sets) if status is not None else []
        shares = [share for item in sets for share in item.clients]
        places = [(island.island_id, device) for device in range(island.num_devices)]
        yield IslandActivity(
            island=island.island_id,
            platform=island.platform,
            num_slices=len(island.slices),
            utilisation=tuple(_part(later[place] - earlier[place], seconds) for place in places),
            num_held=sum(share.num_held for share in shares),
            num_admitted=sum(share.num_admitted for share in shares),
            queue_seconds=max((item.admitted_seconds for item in sets), default=0.0),
            waits=tuple(status.waits) if status is not None else (),
        )


def _busy_of_devices(found: pb.Observation) -> dict[tuple[int, int], float]:
    busy: dict[tuple[int, int], float] = defaultdict(float)
    for scheduler in found.schedulers:
        for item in scheduler.status.device_sets:
            for device in item.device_indices:
                busy[scheduler.island_id, device] += item.busy_seconds
    for executor in found.executors:  # schedulers know only of runs that have ended, which may be long ones
        for device in executor.device_indices:
            busy[executor.island_id, device] += sum(executor.status.unended_seconds.values())
    return busy


def _clients(before: pb.Observation, after: pb.Observation, seconds: float) -> Iterator[ClientActivity]:
    earlier, later = _totals(before), _totals(after)
    device_seconds = {key: max(0.0, total.busy - earlier[key].busy) for key, total in later.items()}
    all_seconds = sum(device_seconds.values())
    active = {key for key, total in later.items() if total.num_held or total.num_admitted or device_seconds[key]}
    all_weights = sum(later[key].weight for key in active)
    buffer_bytes: dict[int, int] = defaultdict(int)
    for executor in after.executors:
        for client_id, size in executor.status.client_bytes.items():
            buffer_bytes[client_id] += size
    for client in after.clients:
        key = client.client_id
        total = later[key]
        yield ClientActivity(
            client_id=key,
            name=client.name,
            weight=total.weight,
            priority=total.priority,
            wanted=total.weight / all_weights if key in active and all_weights else 0.0,
            got=device_seconds.get(key, 0.0) / all_seconds if all_seconds else 0.0,
            device_seconds=device_seconds.get(key, 0.0),
            num_held=total.num_held,
            num_admitted=total.num_admitted,
            runs_per_second=max(0, total.num_finished - earlier[key].num_finished) / seconds,
            buffer_bytes=buffer_bytes[key],
        )


@dataclass(slots=True)
class _Total:
    """Of one client, over all sets of devices."""

    weight: float = 0.0
    priority: int = 0
    busy: float = 0.0
    num_held: int = 0
    num_admitted: int = 0
    num_finished: int = 0


def _totals(found: pb.Observation) -> dict[int, _Total]:
    totals: dict[int, _Total] = defaultdict(_Total)
    for scheduler in found.schedulers:
        for item in scheduler.status.device_sets:
            for share in item.clients:
                total = totals[share.client_id]
                total.weight, total.priority = share.weight, share.priority
                total.busy += share.busy_seconds * len(item.device_indices)
                total.num_held += share.num_held
                total.num_admitted += share.num_admitted
                total.num_finished += share.num_finished
    for executor in found.executors:
        for client_id, seconds in executor.status.unended_seconds.items():
            totals[client_id].busy += seconds * len(executor.device_indices)
    return totals


def _executors(before: pb.Observation, after: pb.Observation, seconds: float) -> Iterator[ExecutorActivity]:
    earlier = {item.status.executor_id: item.status.compile_seconds for item in before.executors}
    for item in after.executors:
        status = item.status
        compile_seconds = status.compile_seconds - earlier.get(status.executor_id, 0.0)
        yield ExecutorActivity(
            executor_id=status.executor_id,
            island=item.island_id,
            devices=tuple(item.device_indices),
            used_bytes=status.used_bytes,
            budget_bytes=status.budget_bytes,
            rss_bytes=status.rss_bytes,
            num_runs=status.num_runs_in_flight,
            num_programs=status.num_entries.get("loaded", 0),
            num_compiled=status.num_compiled,
            num_compiling=len({line.rpartition(" of ")[2] for line in status.waiting_for if line.endswith(_COMPILES)}),
            compiling=_part(compile_seconds, seconds),
            waits=tuple(status.waiting_for),
            stalls=tuple(status.stalls),
        )


def _part(busy: float, seconds: float) -> float:
    return min(1.0, max(0.0, busy / seconds))
