"""The resource manager process: the gRPC shell around state.py."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, assert_never

import grpc
import grpc.aio
import psutil

from torchways.addresses import address_of
from torchways.cluster import state as core
from torchways.cluster.client_spans import ClientSpans
from torchways.cluster.operator import OperatorServer
from torchways.cluster.order_server import RunOrderServer
from torchways.cluster.shares import ShareLimits
from torchways.errors import AccessDenied, Failure, TorchwaysError, failure_from
from torchways.ids import ClientId, IslandId, SliceId
from torchways.link.stream import StreamServer
from torchways.observability.process import die_with_parent, setup_process
from torchways.observability.text import printable_name
from torchways.rpc import channel, convert
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.identity import Caller, ClusterKey, Role, check_owner, metadata, take_cluster_key

logger = logging.getLogger(__name__)

_CALL_SECONDS = 30.0
#: How long streams may take to end once their clients were told that the cluster is closing.
_CLOSING_SECONDS = 0.5
#: After that time a cluster that cannot go on ends: its clients know why.
_END_SECONDS = 1.0
#: A scheduler or an executor that is not reached may have ended. How it ended says more, and is known after that time.
#: An executor ends itself five seconds after its scheduler's stream has ended.
_SCHEDULER_ENDS_SECONDS = 2.0
_EXECUTOR_ENDS_SECONDS = 8.0


class ResourceManagerServer(pb_grpc.ResourceManagerServicer):
    """See the module's docstring."""

    def __init__(
        self, token: str, key: ClusterKey, *, executor_idle: float, max_weight: float, max_priority: int
    ) -> None:
        self._executor_idle = executor_idle
        self._limits = ShareLimits(max_weight=max_weight, max_priority=max_priority)
        #: What each client has of devices; fields of AddSliceRequest.
        self._shares: dict[ClientId, dict[str, Any]] = {}
        self.core = core.ClusterState()
        self._key = key
        me = Caller(Role.MANAGER)
        self._metadata = metadata(token, me, key.secret_of(me))
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._clients: dict[ClientId, asyncio.Queue[pb.ClusterEvent]] = {}
        #: None: the node's stream has ended.
        self._nodes: dict[int, asyncio.Queue[pb.NodeCommand | None]] = {}
        self._agents: dict[int, pb.NodeJoined] = {}
        self._settled: dict[SliceId, asyncio.Event] = defaultdict(asyncio.Event)
        self._data_settled: dict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self._tasks: set[asyncio.Task[None]] = set()
        #: Set when the cluster is to end.
        self.ending = asyncio.Event()
        #: For who runs the cluster.
        self._client_spans = ClientSpans(self._tell)
        self.operator = OperatorServer(
            self.core, self.describe, self._order_all, self._client_spans.collect, token, key
        )

    def handle(self, event: core.Event) -> None:
        """Gives the core an event and carries out its commands."""
        self._carry_out(self.core.handle(event))

    def _carry_out(self, commands: list[core.Command]) -> None:
        for command in commands:
            match command:
                case core.StartScheduler():
                    start = pb.StartScheduler(name=command.name, island_id=command.island_id)
                    self._order(command.node_id, pb.NodeCommand(start_scheduler=start))
                case core.StartExecutor():
                    self._order(command.node_id, pb.NodeCommand(start_executor=_start_executor(command)))
                case core.StartData():
                    start_data = pb.StartData(name=command.name, client_id=command.client_id)
                    self._order(command.node_id, pb.NodeCommand(start_data=start_data))
                case core.EndProcess():
                    self._order(command.node_id, pb.NodeCommand(end_process=pb.EndProcess(name=command.name)))
                case core.ConnectSlice():
                    self._start(self._connect(command), f"connect slice {command.slice.slice_id}")
                case core.DisconnectSlice():
                    self._start(self._disconnect_slice(command), f"disconnect slice {command.slice.slice_id}")
                case core.DisconnectExecutor():
                    self._start(self._disconnect_executor(command), f"disconnect executor {command.executor_id}")
                case core.WaitIdle():
                    self._start(self._wait_idle(command.name, command.period), f"idle {command.name}")
                case core.SettleSlice():
                    self._settled[command.slice_id].set()
                    if command.slice_id not in self.core.slices:
                        del self._settled[command.slice_id]  # released; who waits holds the event
                case core.SettleDataProcess():
                    self._data_settled[command.process_id].set()
                    if command.process_id not in self.core.data_processes:
                        del self._data_settled[command.process_id]  # ended; who waits holds the event
                case core.TellLost():
                    lost = pb.ExecutorLost(
                        executor_id=command.executor_id, slice_id=command.slice_id, reason=command.reason
                    )
                    self._tell(command.client_id, pb.ClusterEvent(executor_lost=lost))
                case core.TellClosing():
                    self.tell_closing(command.reason)
                    if not self.ending.is_set():
                        logger.error("the cluster cannot go on and ends: %s", command.reason)
                        asyncio.get_running_loop().call_later(_END_SECONDS, self.ending.set)
                case _:
                    assert_never(command)

    def close(self, reason: str) -> None:
        """Ends all streams, of clients with a reason."""
        self._carry_out(self.core.close(reason))
        for queue in self._nodes.values():
            queue.put_nowait(None)

    def tell_closing(self, reason: str) -> None:
        """Tells every client that the cluster cannot go on."""
        for client_id in self._clients:
            self._tell(client_id, pb.ClusterEvent(closing=pb.ClusterClosing(reason=reason)))

    def _start(self, coroutine: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)

    def _order(self, node_id: int, command: pb.NodeCommand) -> None:
        if node_id in self._nodes:
            self._nodes[node_id].put_nowait(command)

    def _order_all(self, command: pb.NodeCommand) -> int:
        """Sends a command to every node; returns how many there are."""
        for node_id in self._nodes:
            self._order(node_id, command)
        return len(self._nodes)

    def _tell(self, client_id: ClientId, event: pb.ClusterEvent) -> None:
        if client_id in self._clients:
            self._clients[client_id].put_nowait(event)

    # ---- schedulers

    def _scheduler(self, address: str) -> pb_grpc.SchedulerStub:
        if address not in self._channels:
            self._channels[address] = channel.open_channel(address)
        return pb_grpc.SchedulerStub(self._channels[address])

    async def _connect(self, command: core.ConnectSlice) -> None:
        item = command.slice
        request = pb.AddSliceRequest(
            slice_id=item.slice_id,
            client_id=item.client_id,
            executors=[item.device_set.executors[key] for key in item.executor_ids],
            device_indices=item.device_indices,
            client_name=self.core.clients.get(item.client_id, ""),
            **self._shares.get(item.client_id, {}),
        )
        try:
            stub = self._scheduler(command.scheduler_address)
            await stub.AddSlice(request, metadata=self._metadata, timeout=_CALL_SECONDS)
            self.handle(core.SliceConnected(slice_id=item.slice_id))
        except grpc.aio.AioRpcError as error:
            # Of a scheduler or an executor that has died its node tells, too.
            is_gone = error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE)
            level = logging.INFO if is_gone else logging.ERROR
            logger.log(level, "the scheduler of island %d refused slice %d: %s", item.island_id, item.slice_id, error)
            reason = f"its scheduler does not reach it ({error.details() or error.code().name})"
            self.handle(core.ExecutorCutOff(executor_id=item.executor_ids[0], reason=reason))

    async def _disconnect_slice(self, command: core.DisconnectSlice) -> None:
        request = pb.RemoveSliceRequest(slice_id=command.slice.slice_id, reason=command.reason)
        await self._tell_scheduler(self._scheduler(command.scheduler_address).RemoveSlice, request)

    async def _disconnect_executor(self, command: core.DisconnectExecutor) -> None:
        request = pb.RemoveExecutorRequest(executor_id=command.executor_id, reason=command.reason)
        await self._tell_scheduler(self._scheduler(command.scheduler_address).RemoveExecutor, request)

    async def _tell_scheduler(self, call: Callable[..., Awaitable[Any]], request: Any) -> None:
        try:
            await call(request, metadata=self._metadata, timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            # If it died, its node reports that; if the cluster is ending, this is how it should be.
            logger.info("a scheduler cannot be reached: %s", error.code())

    def scheduler_lost(self, island_id: IslandId, reason: str) -> None:
        """Gives up an island whose scheduler's stream has ended."""
        event = core.SchedulerCutOff(island_id=island_id, reason=reason)
        self._start(self._handle_later(event, _SCHEDULER_ENDS_SECONDS), f"giving up scheduler i{island_id}")

    async def CutOffExecutor(
        self, request: pb.CutOffExecutorRequest, context: grpc.aio.ServicerContext
    ) -> pb.CutOffExecutorResponse:
        """Gives up an executor that its scheduler does not reach, if it does not end by itself."""
        reason = f"its scheduler does not reach it: {request.reason}"
        event = core.ExecutorCutOff(executor_id=request.executor_id, reason=reason)
        logger.info("waiting for the end of executor %s: %s", request.executor_id, reason)
        self._start(self._handle_later(event, _EXECUTOR_ENDS_SECONDS), f"giving up executor {request.executor_id}")
        return pb.CutOffExecutorResponse()

    async def _handle_later(self, event: core.Event, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.handle(event)

    async def _wait_idle(self, name: str, period: int) -> None:
        await asyncio.sleep(self._executor_idle)
        while (found := self.core.device_sets.get(name)) is not None and found.num_idle == period and not found.slices:
            # What was sent before its last slice was closed runs to its end; the scheduler has the set till then.
            status = await self.operator.scheduler_status(self.core.islands[found.island_id].scheduler_address)
            if status is None or all(set(item.executor_ids) != set(found.devices_of) for item in status.device_sets):
                break
            await asyncio.sleep(min(1.0, self._executor_idle))
        self.handle(core.IdleOver(name=name, period=period))

    # ---- clients

    async def Attach(
        self, request: pb.AttachRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ClusterEvent]:
        """A client's lease: it lasts as long as this stream."""
        if (refused := self._limits.refusal(request.weight, request.priority)) is not None:
            failure = Failure(kind="ConfigError", message=refused)
            yield pb.ClusterEvent(attached=pb.Attached(failure=convert.failure_to_proto(failure)))
            return
        name = printable_name(request.name)
        client_id = self.core.attach(name)
        self._shares[client_id] = {"weight": request.weight or 1.0, "priority": request.priority}
        queue: asyncio.Queue[pb.ClusterEvent] = asyncio.Queue()
        self._clients[client_id] = queue
        self._client_spans.attached(client_id)
        logger.info("client %d attached: %s", client_id, name)
        try:
            secret = self._key.secret_of(Caller(Role.CLIENT, client_id))
            yield pb.ClusterEvent(attached=pb.Attached(client_id=client_id, secret=secret))
            if self.core.closing:
                self.tell_closing(self.core.closing)
            closing = False
            while not closing:
                event = await queue.get()
                closing = event.HasField("closing")
                yield event
        finally:
            del self._clients[client_id], self._shares[client_id]
            self._client_spans.gone(client_id)
            logger.info("client %d is gone", client_id)
            self.handle(core.ClientGone(client_id=client_id))

    async def AnswerTrace(
        self, request_iterator: AsyncIterator[pb.TraceAnswer], context: grpc.aio.ServicerContext
    ) -> pb.TraceAnswered:
        """Takes what a client answers when it is asked for its spans."""
        try:
            await self._client_spans.take(channel.caller(context, self._key).client_id, aiter(request_iterator))
        except (TorchwaysError, TimeoutError) as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error) or "it takes too long")
        return pb.TraceAnswered()

    async def ReserveSlice(
        self, request: pb.ReserveSliceRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReserveSliceResponse:
        """Reserves devices and has executors started."""
        island_id = request.island_id if request.HasField("island_id") else None
        try:
            item, commands = self.core.reserve(
                channel.caller(context, self._key).client_id, tuple(request.shape), tuple(request.axis_names), island_id
            )
        except TorchwaysError as error:
            return pb.ReserveSliceResponse(failure=convert.failure_to_proto(failure_from(error)))
        self._carry_out(commands)
        reservation = pb.SliceReservation(slice_id=item.slice_id, island_id=item.island_id)
        return pb.ReserveSliceResponse(reservation=reservation)

    async def WaitSlice(self, request: pb.WaitSliceRequest, context: grpc.aio.ServicerContext) -> pb.SliceInfo:
        """Waits until a slice is ready or failed; the caller's deadline bounds the wait."""
        slice_id = SliceId(request.slice_id)
        try:
            self._check_owner(context, slice_id)
        except AccessDenied as error:
            return pb.SliceInfo(slice_id=slice_id, failure=convert.failure_to_proto(failure_from(error)))
        if slice_id in self.core.slices:
            await self._settled[slice_id].wait()
        item = self.core.slices.get(slice_id)
        if item is None or item.failure is not None:
            failure = item.failure if item is not None else None
            failure = failure or Failure(kind="PlacementError", message=f"slice {slice_id} is not reserved any more")
            return pb.SliceInfo(slice_id=slice_id, failure=convert.failure_to_proto(failure))
        return pb.SliceInfo(
            slice_id=slice_id,
            island_id=item.island_id,
            scheduler_address=self.core.islands[item.island_id].scheduler_address,
            executors=[item.device_set.executors[key] for key in item.executor_ids],
        )

    def _check_owner(self, context: grpc.aio.ServicerContext, slice_id: SliceId) -> None:
        item = self.core.slices.get(slice_id)
        owners = {slice_id: item.client_id} if item is not None else {}
        check_owner(channel.caller(context, self._key).client_id, slices=[slice_id], owners=owners)

    async def ReleaseSlice(
        self, request: pb.ReleaseSliceRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReleaseSliceResponse:
        """Gives a slice back."""
        slice_id = SliceId(request.slice_id)
        try:
            self._check_owner(context, slice_id)
        except AccessDenied as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        self.handle(core.SliceReleased(slice_id=slice_id, scheduler_knows=request.scheduler_knows))
        return pb.ReleaseSliceResponse()

    # ---- data processes

    async def StartDataProcess(
        self, request: pb.StartDataProcessRequest, context: grpc.aio.ServicerContext
    ) -> pb.StartDataProcessResponse:
        """Has a process started for an input pipeline of a slice."""
        slice_id = SliceId(request.slice_id)
        try:
            self._check_owner(context, slice_id)
            client_id = channel.caller(context, self._key).client_id
            process, commands = self.core.start_data_process(client_id, slice_id)
        except TorchwaysError as error:
            return pb.StartDataProcessResponse(failure=convert.failure_to_proto(failure_from(error)))
        self._carry_out(commands)
        return pb.StartDataProcessResponse(process_id=process.process_id)

    def _own_data_process(self, context: grpc.aio.ServicerContext, process_id: int) -> core.DataProcess | None:
        """Returns a data process of the caller's; None: there is none of this number, for all that it may know."""
        process = self.core.data_processes.get(process_id)
        mine = channel.caller(context, self._key).client_id
        return process if process is not None and process.client_id == mine else None

    async def WaitDataProcess(
        self, request: pb.WaitDataProcessRequest, context: grpc.aio.ServicerContext
    ) -> pb.DataProcessInfo:
        """Waits until a data process is ready or has ended; the caller's deadline bounds the wait."""
        process = self._own_data_process(context, request.process_id)
        if process is not None and not process.is_settled:
            await self._data_settled[process.process_id].wait()
            process = self._own_data_process(context, request.process_id)
        if process is None:
            reason = f"data process {request.process_id} has ended with its slice or its loader"
            failure = Failure(kind="DataProcessLost", message=reason)
            return pb.DataProcessInfo(failure=convert.failure_to_proto(failure))
        failed = convert.failure_to_proto(process.failure) if process.failure is not None else None
        return pb.DataProcessInfo(address=process.address, pid=process.pid, failure=failed)

    async def EndDataProcess(
        self, request: pb.EndDataProcessRequest, context: grpc.aio.ServicerContext
    ) -> pb.EndDataProcessResponse:
        """Ends a data process."""
        if self._own_data_process(context, request.process_id) is not None:
            self._carry_out(self.core.end_data_process(request.process_id))
        return pb.EndDataProcessResponse()

    async def DescribeCluster(
        self, request: pb.DescribeClusterRequest, context: grpc.aio.ServicerContext
    ) -> pb.ClusterInfo:
        """Says what there is."""
        return self.describe()

    def describe(self) -> pb.ClusterInfo:
        """Returns what there is; resident memory of the processes of this host."""
        info = self._parts()
        for process in info.processes:
            if process.pid and process.host == socket.gethostname():
                with contextlib.suppress(psutil.Error):
                    process.rss_bytes = psutil.Process(process.pid).memory_info().rss
        return info

    def _parts(self) -> pb.ClusterInfo:
        info = pb.ClusterInfo()
        info.processes.add(name="resource manager", pid=os.getpid(), host=socket.gethostname())
        for agent in self._agents.values():
            info.processes.add(name="node agent", pid=agent.pid, host=agent.host)
        for island in self.core.islands.values():
            info.islands.add(
                island_id=island.island_id,
                platform=island.platform,
                num_devices=len(island.load),
                scheduler_address=island.scheduler_address,
                slices=[_summary(item) for item in self.core.slices.values() if item.island_id == island.island_id],
            )
            name = f"scheduler i{island.island_id}"
            info.processes.add(name=name, pid=island.scheduler_pid, host=island.host)
        for item in self.core.device_sets.values():
            for executor_id, executor in item.executors.items():
                info.processes.add(name=core.process_name(executor_id), pid=executor.pid, host=executor.host)
        for process in self.core.data_processes.values():
            if process.address and process.failure is None:
                info.processes.add(name=process.name, pid=process.pid, host=process.host)
        return info

    # ---- nodes

    async def JoinNode(
        self, request_iterator: AsyncIterator[pb.NodeEvent], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.NodeCommand]:
        """A node agent's stream."""
        first = await anext(aiter(request_iterator), None)
        if first is None or not first.HasField("joined"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a node is `joined`")
            return
        node_id = len(self._agents)
        queue: asyncio.Queue[pb.NodeCommand | None] = asyncio.Queue()
        self._nodes[node_id], self._agents[node_id] = queue, first.joined
        first_island = len(self.core.islands)
        joined = first.joined
        self.handle(
            core.NodeJoined(
                node_id=node_id,
                host=joined.host,
                platform=joined.platform,
                devices_per_island=tuple(joined.devices_per_island),
                hosts_per_island=max(1, joined.hosts_per_island),
                has_data_processes=joined.has_data_processes,
            )
        )
        island_ids = range(first_island, first_island + len(joined.devices_per_island))
        reading = asyncio.create_task(self._read_node(request_iterator), name=f"node {node_id}")
        reading.add_done_callback(self._task_ended)
        reading.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            yield pb.NodeCommand(accepted=pb.NodeAccepted(island_ids=island_ids))
            while (command := await queue.get()) is not None:
                yield command
        finally:
            reading.cancel()
            del self._nodes[node_id]
            self.handle(core.NodeLost(node_id=node_id))

    async def _read_node(self, events: AsyncIterator[pb.NodeEvent]) -> None:
        async for event in events:
            match event.WhichOneof("event"):
                case "ready":
                    self._process_ready(event.ready)
                case "stacks":
                    self.operator.on_stacks(event.stacks)
                case "exited":
                    exited = event.exited
                    if exited.pid:
                        reason = f"process {exited.pid} ended by {exited.reason}"
                    else:
                        reason = f"it could not be started: {exited.reason}"
                    logger.warning("%s: %s", exited.name, reason)
                    self.handle(core.ProcessExited(name=exited.name, reason=reason, log_tail=exited.log_tail))

    def _process_ready(self, ready: pb.ProcessReady) -> None:
        if ready.HasField("executor"):
            self.handle(core.ExecutorReady(executor_id=ready.executor.executor_id, info=ready.executor))
        elif ready.HasField("data"):
            self.handle(core.DataProcessReady(name=ready.name, address=ready.data.address, pid=ready.pid))
        else:
            named = [i for i in self.core.islands.values() if f"scheduler i{i.island_id}" == ready.name]
            if not named:
                logger.warning("a node says that %s is ready, which nobody asked for", ready.name)
                return
            [island] = named
            self.handle(core.SchedulerReady(island_id=island.island_id, address=ready.scheduler.address, pid=ready.pid))


def _start_executor(command: core.StartExecutor) -> pb.StartExecutor:
    item = command.device_set
    return pb.StartExecutor(
        name=command.name,
        executor_id=command.executor_id,
        island_id=item.island_id,
        set_number=item.number,
        set_size=len(item.device_indices),
        device_indices=command.device_indices,
        gang=item.devices_of,
    )


def _summary(item: core.Slice) -> pb.SliceSummary:
    return pb.SliceSummary(
        slice_id=item.slice_id,
        shape=item.shape,
        axis_names=map(printable_name, item.axis_names),
        client_id=item.client_id,
        device_indices=item.device_indices,
        state=item.state,
    )


async def serve(arguments: argparse.Namespace) -> None:
    """Runs the resource manager until it is told to end."""
    token = channel.cluster_token()
    key = take_cluster_key()
    server = channel.make_server(token, key)
    manager = ResourceManagerServer(
        token,
        key,
        executor_idle=arguments.executor_idle,
        max_weight=arguments.max_weight,
        max_priority=arguments.max_priority,
    )
    streams = StreamServer(arguments.host)
    pb_grpc.add_ResourceManagerServicer_to_server(manager, server)
    pb_grpc.add_RunOrderServicer_to_server(RunOrderServer(streams, manager.scheduler_lost), server)
    pb_grpc.add_OperatorServicer_to_server(manager.operator, server)
    web_server = None
    if arguments.metrics_port is not None:
        from torchways.cluster.web.server import WebServer  # its libraries are needed only here

        host, port = arguments.host, arguments.metrics_port
        operator = manager.operator
        web_server = WebServer(host, port, token, key, operator.observe, operator.programs)
        try:
            await web_server.start()
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            reason = f"/metrics cannot be served at {address_of(host, port)} ({why}); choose another metrics port"
            with os.fdopen(arguments.ready_fd, "w") as pipe:
                pipe.write(json.dumps({"error": reason}) + "\n")
            return
        operator.metrics_address = web_server.address
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, manager.ending.set)
    address = await channel.start_server(server, arguments.host)
    if web_server is not None:
        web_server.cluster_address = address
    with os.fdopen(arguments.ready_fd, "w") as pipe:
        ready = {"address": address, "metrics_address": manager.operator.metrics_address}
        pipe.write(json.dumps(ready) + "\n")
    logger.info("ready at %s; waiting for nodes", address)
    await manager.ending.wait()
    manager.close("it was told to end")
    if web_server is not None:
        web_server.stop_listening()
    await server.stop(_CLOSING_SECONDS)
    os._exit(0)  # do not wait for gRPC's threads


def main() -> None:
    """Entry point of `python -m torchways.cluster`; started by a node agent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--executor-idle", type=float, default=60.0, help="seconds that executors stay without a slice")
    parser.add_argument("--max-weight", type=float, default=16.0, help="the largest weight that a client may ask for")
    parser.add_argument("--max-priority", type=int, default=10, help="the highest priority that a client may ask for")
    parser.add_argument(
        "--metrics-port", type=int, help="of the web page and /metrics; 0 chooses one; without it there are none"
    )
    parser.add_argument("--parent-pid", type=int, required=True)
    arguments = parser.parse_args()
    setup_process("resource manager")
    die_with_parent(arguments.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(serve(arguments))
