"""What the page /metrics says of the cluster to Prometheus; web/server.py serves it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from torchways.rpc import torchways_pb2 as pb


def page(found: pb.Observation, accept: str) -> tuple[bytes, str]:
    """Returns the page and its content type, in the form that a header `Accept` asks for."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Observed(found))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Observed:
    """A collector of what was observed."""

    def __init__(self, found: pb.Observation) -> None:
        self._found = found

    def collect(self) -> Iterable[Metric]:
        """Called by the registry."""
        return metric_families(self._found)


def metric_families(found: pb.Observation) -> list[Metric]:
    """Returns what was observed, as Prometheus's metrics."""
    return [*_of_cluster(found), *_of_schedulers(found), *_of_executors(found)]


def _of_cluster(found: pb.Observation) -> Iterator[Metric]:
    devices = _gauge("devices", "Devices of an island.", "island")
    slices = _gauge("slices", "Slices of an island, by state.", "island", "state")
    for island in found.cluster.islands:
        devices.add_metric([str(island.island_id)], island.num_devices)
        by_state = {"starting": 0, "ready": 0, "failed": 0}
        for item in island.slices:
            by_state[item.state] = by_state.get(item.state, 0) + 1
        for state, count in by_state.items():
            slices.add_metric([str(island.island_id), state], count)
    memory = _gauge("process_resident_memory_bytes", "Resident memory of a process.", "process", "pid")
    for process in found.cluster.processes:
        if process.rss_bytes:
            memory.add_metric([process.name, str(process.pid)], process.rss_bytes)
    clients = _gauge("clients", "Clients that are attached.")
    clients.add_metric([], len(found.clients))
    silent = _gauge("unreachable_processes", "Processes that did not answer this scrape in time.")
    silent.add_metric([], len(found.unreachable))
    yield from (devices, slices, memory, clients, silent)


def _of_schedulers(found: pb.Observation) -> Iterator[Metric]:
    busy = _counter("device_busy_seconds", "Time that a device computed for a client.", "island", "device", "client")
    queue = _gauge("queue_seconds", "Device time of admitted runs that have not finished.", "island", "devices")
    held = _gauge("runs_held", "Runs that wait for admission.", "island", "client")
    running = _gauge("runs_in_flight", "Runs that are admitted and have not finished.", "island", "client")
    finished = _counter("runs_finished", "Runs that have finished.", "island", "client")
    weight = _gauge("client_weight", "The client's weight.", "island", "client")
    busy_seconds: dict[tuple[str, str, str], float] = defaultdict(float)
    for scheduler in found.schedulers:
        island = str(scheduler.island_id)
        counts: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0])
        for item in scheduler.status.device_sets:
            queue.add_metric([island, " ".join(map(str, item.device_indices))], item.admitted_seconds)
            for share in item.clients:
                client = str(share.client_id)
                for device in item.device_indices:
                    busy_seconds[island, str(device), client] += share.busy_seconds
                of_set = (share.num_held, share.num_admitted, share.num_finished)
                counts[client] = [*map(sum, zip(counts[client][:3], of_set, strict=True)), share.weight]
        for client, values in counts.items():
            for family, value in zip((held, running, weight), (values[0], values[1], values[3]), strict=True):
                family.add_metric([island, client], value)
            finished.add_metric([island, client], values[2])
    for labels, seconds in busy_seconds.items():
        busy.add_metric(labels, seconds)
    yield from (busy, queue, held, running, finished, weight)


def _of_executors(found: pb.Observation) -> Iterator[Metric]:
    buffers = _gauge("buffer_bytes", "Bytes per device of a client's buffers.", "island", "executor", "client")
    used = _gauge("memory_used_bytes", "Device memory in use, per device.", "island", "executor")
    budget = _gauge("memory_budget_bytes", "Limit of device memory, per device; 0: none.", "island", "executor")
    runs = _gauge("executor_runs_in_flight", "Runs that an executor has and has not finished.", "island", "executor")
    compiled = _counter("functions_compiled", "Functions that an executor compiled.", "island", "executor")
    seconds = _counter("compile_seconds", "Time that compiling took.", "island", "executor")
    for executor in found.executors:
        status = executor.status
        labels = [str(executor.island_id), status.executor_id]
        for client, size in sorted(status.client_bytes.items()):
            buffers.add_metric([*labels, str(client)], size)
        used.add_metric(labels, status.used_bytes)
        budget.add_metric(labels, status.budget_bytes)
        runs.add_metric(labels, status.num_runs_in_flight)
        compiled.add_metric(labels, status.num_compiled)
        seconds.add_metric(labels, status.compile_seconds)
    yield from (buffers, used, budget, runs, compiled, seconds)


def _gauge(name: str, help_text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"torchways_{name}", help_text, labels=labels)


def _counter(name: str, help_text: str, *labels: str) -> CounterMetricFamily:
    """Returns a counter; `prometheus_client` adds "_total" to its name."""
    return CounterMetricFamily(f"torchways_{name}", help_text, labels=labels)
