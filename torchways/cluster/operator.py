"""The service for who runs the cluster: what all processes do, their stacks, and a trace of all clients.

The resource manager asks schedulers, executors, clients and node agents when it is asked, each with a deadline: one
that does not answer is named, and holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import grpc
import grpc.aio

from torchways.cluster import state as core
from torchways.errors import TorchwaysError
from torchways.ids import ClientId, ProgramId
from torchways.observability.text import printable
from torchways.rpc import channel
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.identity import Caller, ClusterKey, Role, metadata
from torchways.rpc.spans import Span, collect, span_to_proto

logger = logging.getLogger(__name__)

#: How long a process may take to say how it does.
_STATUS_SECONDS = 2.0
#: ... to send its spans, and its stacks.
_TRACE_SECONDS = 20.0
_STACKS_SECONDS = 8.0
_SPANS_PER_MESSAGE = 2000


class _Spans(NamedTuple):
    """A process's spans, or why there are none."""

    spans: Sequence[Span] = ()
    missing: str = ""


class OperatorServer(pb_grpc.OperatorServicer):
    """See the module's docstring.

    Args:
        state: the resource manager's core.
        describe: returns what the cluster consists of.
        order_all: sends a command to every node; returns how many there are.
        client_spans: returns a client's own spans since a time; what it raises says why it has none.
    """

    #: host:port of the page /metrics.
    metrics_address = ""

    def __init__(
        self,
        state: core.ClusterState,
        describe: Callable[[], pb.ClusterInfo],
        order_all: Callable[[pb.NodeCommand], int],
        client_spans: Callable[[ClientId, int], Awaitable[list[Span]]],
        token: str,
        key: ClusterKey,
    ) -> None:
        self._core = state
        self._describe = describe
        self._order_all = order_all
        self._client_spans = client_spans
        self._token = token
        self._key = key
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._observing: asyncio.Task[pb.Observation] | None = None
        self._requests = itertools.count(1)
        #: Answers to requests for stacks, until their end.
        self._stacks: dict[int, asyncio.Queue[pb.StacksDumped]] = {}

    # ---- what the cluster does

    async def Observe(self, request: pb.ObserveRequest, context: grpc.aio.ServicerContext) -> pb.Observation:
        """Says what the cluster does now."""
        found = await self.observe()
        if channel.caller(context, self._key).role is not Role.OPERATOR:
            hide_names(found)
        return found

    async def observe(self) -> pb.Observation:
        """Asks all schedulers and executors; several who ask at a time share the answers."""
        if self._observing is None:
            self._observing = asyncio.create_task(self._ask_all(), name="observing")
            self._observing.add_done_callback(self._observed)
        found = pb.Observation()
        found.CopyFrom(await asyncio.shield(self._observing))
        return found

    def _observed(self, task: asyncio.Task[pb.Observation]) -> None:
        self._observing = None

    async def _ask_all(self) -> pb.Observation:
        found = pb.Observation(cluster=self._describe(), metrics_address=self.metrics_address)
        for client_id, name in self._core.clients.items():
            found.clients.add(client_id=client_id, name=name)
        await self._forget_channels(list(self._addresses()))
        islands = [island for island in self._core.islands.values() if island.scheduler_address]
        executors = list(self._executors())
        answers = await asyncio.gather(
            *(self.scheduler_status(island.scheduler_address) for island in islands),
            *(self._executor_status(info.address) for _, info in executors),
        )
        for island, status in zip(islands, answers, strict=False):
            if isinstance(status, pb.SchedulerStatus):
                _name_clients(status, self._core.clients)
                found.schedulers.add(island_id=island.island_id, status=status)
            else:
                found.unreachable.append(f"scheduler i{island.island_id}")
        for (item, info), status in zip(executors, answers[len(islands) :], strict=True):
            if isinstance(status, pb.ExecutorStatus):
                indices = item.devices_of[info.executor_id]
                found.executors.add(island_id=item.island_id, device_indices=indices, status=status)
            else:
                found.unreachable.append(core.process_name(info.executor_id))
        found.time_ns = time.time_ns()
        make_printable(found)
        return found

    def _executors(self) -> Iterable[tuple[core.DeviceSet, pb.ExecutorInfo]]:
        for item in self._core.device_sets.values():
            for info in item.executors.values():
                yield item, info

    def _addresses(self) -> Iterable[str]:
        yield from (island.scheduler_address for island in self._core.islands.values())
        yield from (info.address for _, info in self._executors())

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = channel.open_channel(address)
        return self._channels[address]

    async def _forget_channels(self, used: Sequence[str]) -> None:
        gone = [self._channels.pop(address) for address in list(self._channels) if address not in used]
        for old in gone:
            await old.close(None)

    def _as(self, caller: Caller) -> tuple[tuple[str, str], ...]:
        return metadata(self._token, caller, self._key.secret_of(caller))

    async def scheduler_status(self, address: str) -> pb.SchedulerStatus | None:
        """Returns what a scheduler says of itself; None: it does not answer."""
        stub = pb_grpc.SchedulerStub(self._channel(address))
        return await self._ask(stub.GetStatus, pb.SchedulerStatusRequest(), address)

    async def _executor_status(self, address: str) -> pb.ExecutorStatus | None:
        return await self._ask(pb_grpc.ExecutorStub(self._channel(address)).GetStatus, pb.StatusRequest(), address)

    async def _ask(self, method: Callable[..., Any], request: Any, address: str, role: Role = Role.MANAGER) -> Any:
        try:
            return await method(request, metadata=self._as(Caller(role)), timeout=_STATUS_SECONDS)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:  # the second: its channel was closed meanwhile
            logger.info("%s does not say how it does: %s", address, error)
            return None

    # ---- programs

    async def programs(self, program_ids: Sequence[ProgramId] = ()) -> list[pb.ProgramOutline]:
        """Returns which programs there are on each island, or what some consist of; for operators.

        Schedulers that do not answer in time are left out.
        """
        request = pb.ProgramsRequest(program_ids=program_ids)
        addresses = [i.scheduler_address for i in self._core.islands.values() if i.scheduler_address]
        found = await asyncio.gather(
            *(
                self._ask(
                    pb_grpc.SchedulerStub(self._channel(address)).DescribePrograms, request, address, Role.OPERATOR
                )
                for address in addresses
            )
        )
        return [outline for answer in found if answer is not None for outline in answer.programs]

    # ---- traces

    async def CollectTrace(
        self, request: pb.TraceRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ProcessSpans]:
        """Returns the spans of all schedulers, executors and clients, by this process's clock."""
        tasks: dict[str, asyncio.Task[_Spans]] = {}
        devices: dict[str, Sequence[int]] = {}

        def begin(name: str, collecting: Coroutine[Any, Any, _Spans]) -> None:
            tasks[name] = asyncio.create_task(collecting, name=f"trace of {name}")

        for island in self._core.islands.values():
            if island.scheduler_address:
                stub: Any = pb_grpc.SchedulerStub(self._channel(island.scheduler_address))
                begin(f"scheduler i{island.island_id}", self._spans(stub, request.since_ns))
        for item, info in self._executors():
            stub, name = pb_grpc.ExecutorStub(self._channel(info.address)), core.process_name(info.executor_id)
            devices[name] = item.devices_of[info.executor_id]
            begin(name, self._spans(stub, request.since_ns))
        for client_id in self._core.clients:
            begin(f"client {client_id}", self._spans_of_client(client_id, request.since_ns))
        try:
            for name, task in tasks.items():
                found = await task
                if found.missing:
                    logger.warning("%s has no trace: %s", name, found.missing)
                for start in range(0, max(1, len(found.spans)), _SPANS_PER_MESSAGE):
                    part = map(span_to_proto, found.spans[start : start + _SPANS_PER_MESSAGE])
                    yield pb.ProcessSpans(
                        name=name, spans=part, device_indices=devices.get(name, ()), missing=found.missing
                    )
        finally:
            for task in tasks.values():
                task.cancel()

    async def _spans(self, stub: Any, since_ns: int) -> _Spans:
        mine = self._as(Caller(Role.MANAGER))
        try:
            return _Spans(
                await collect(
                    lambda request: stub.CollectTrace(request, metadata=mine, timeout=_TRACE_SECONDS), since_ns
                )
            )
        except grpc.aio.AioRpcError as error:
            return _Spans(missing=f"it does not answer ({error.code().name})")
        except grpc.aio.UsageError:  # its channel was closed meanwhile
            return _Spans(missing="it has ended")

    async def _spans_of_client(self, client_id: ClientId, since_ns: int) -> _Spans:
        try:
            return _Spans(await self._client_spans(client_id, since_ns))
        except TorchwaysError as error:
            return _Spans(missing=str(error))

    # ---- stacks

    async def DumpStacks(
        self, request: pb.DumpStacksRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ProcessStacks]:
        """Has every node's processes print their stacks."""
        request_id = next(self._requests)
        answers: asyncio.Queue[pb.StacksDumped] = asyncio.Queue()
        self._stacks[request_id] = answers
        try:
            command = pb.NodeCommand(dump_stacks=pb.DumpStacks(request_id=request_id, which=request))
            num_open = self._order_all(command)
            deadline = time.monotonic() + _STACKS_SECONDS
            with contextlib.suppress(TimeoutError):
                while num_open:
                    answer = await asyncio.wait_for(answers.get(), max(0.0, deadline - time.monotonic()))
                    if answer.HasField("stacks"):
                        yield answer.stacks
                    num_open -= answer.is_last
        finally:
            del self._stacks[request_id]

    def on_stacks(self, answer: pb.StacksDumped) -> None:
        """Takes what a node reports."""
        if answer.request_id in self._stacks:
            self._stacks[answer.request_id].put_nowait(answer)


def _name_clients(status: pb.SchedulerStatus, names: Mapping[ClientId, str]) -> None:
    for item in status.device_sets:
        for share in item.clients:
            share.name = share.name or names.get(ClientId(share.client_id), "")


def make_printable(found: pb.Observation) -> None:
    """Takes away what clients could steer a terminal with: names of their functions and files are in these lines."""
    for island in found.schedulers:
        island.status.waits[:] = map(printable, list(island.status.waits))
    for executor in found.executors:
        executor.status.waiting_for[:] = map(printable, list(executor.status.waiting_for))
        executor.status.stalls[:] = map(printable, list(executor.status.stalls))


def hide_names(found: pb.Observation) -> None:
    """Takes away what tells a caller that is no operator what clients do."""
    for client in found.clients:
        client.ClearField("name")
    for island in found.schedulers:
        island.status.ClearField("waits")
        for item in island.status.device_sets:
            for share in item.clients:
                share.ClearField("name")
    for executor in found.executors:
        executor.status.ClearField("waiting_for")
        executor.status.ClearField("stalls")
        executor.status.ClearField("fallback_counters")
