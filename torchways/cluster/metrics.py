"""The page /metrics of the resource manager: what the cluster does, for Prometheus.

Everything is asked for when the page is, with deadlines (operator.py). Who asks must show the cluster's token, as
`Authorization: Bearer TOKEN`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hmac
import logging
import socketserver
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any
from wsgiref import simple_server

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import make_wsgi_app

from torchways.rpc import torchways_pb2 as pb

logger = logging.getLogger(__name__)

#: Longest wait for the cluster's processes, and for a request to arrive.
_SCRAPE_SECONDS = 5.0
_REQUEST_SECONDS = 5.0
#: Requests at a time; more are refused.
_MAX_REQUESTS = 8

_Observe = Callable[[], Awaitable[pb.Observation]]


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


class MetricsServer:
    """Serves /metrics on threads of its own."""

    def __init__(self, host: str, port: int, token: str, observe: _Observe) -> None:
        self._token = token
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(observe, asyncio.get_running_loop()))
        self._page = make_wsgi_app(registry)
        self._server = simple_server.make_server(host, port, self._answer, _HttpServer, _Handler)
        self.address = f"{host}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, name="torchways-metrics", daemon=True).start()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        given = environ.get("HTTP_AUTHORIZATION", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            headers = [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")]
            return _refuse(start_response, "401 Unauthorized", "send the header Authorization: Bearer TOKEN\n", headers)
        if environ.get("PATH_INFO") != "/metrics" or environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return _refuse(
                start_response, "404 Not Found", "there is /metrics only\n", [("Content-Type", "text/plain")]
            )
        try:
            return self._page(environ, start_response)
        except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            message = "the cluster's processes did not answer in time\n"
            return _refuse(start_response, "503 Service Unavailable", message, [("Content-Type", "text/plain")])


def _refuse(
    start_response: Callable[..., Any], status: str, message: str, headers: list[tuple[str, str]]
) -> Iterable[bytes]:
    start_response(status, headers)
    return [message.encode()]


class _Collector:
    """Asks the cluster, on the resource manager's event loop, each time that the page is asked for."""

    def __init__(self, observe: _Observe, loop: asyncio.AbstractEventLoop) -> None:
        self._observe = observe
        self._loop = loop

    def collect(self) -> Iterable[Metric]:
        """Called by the registry, on a thread of the server."""

        async def observe() -> pb.Observation:
            return await asyncio.wait_for(self._observe(), _SCRAPE_SECONDS)

        return metric_families(asyncio.run_coroutine_threadsafe(observe(), self._loop).result(2 * _SCRAPE_SECONDS))


class _HttpServer(socketserver.ThreadingMixIn, simple_server.WSGIServer):
    """A thread for each request, up to a number."""

    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        self._free = threading.BoundedSemaphore(_MAX_REQUESTS)
        super().__init__(*args)

    def server_bind(self) -> None:
        """Binds without looking up the host's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread, or closes the connection where there are too many."""
        if not self._free.acquire(blocking=False):
            logger.warning("refused a request of %s for metrics: %d are under way", client_address, _MAX_REQUESTS)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Runs on the thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs what went wrong with a request."""
        logger.info("a request of %s for metrics failed", client_address, exc_info=True)


class _Handler(simple_server.WSGIRequestHandler):
    """Waits for a request for some seconds only."""

    timeout = _REQUEST_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Logs a request."""
        logger.debug("metrics: %s", format % args)
