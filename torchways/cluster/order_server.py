"""The service that gives runs over several islands their places: the gRPC shell around run_order.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio

from torchways.cluster.run_order import Ordered, RunOrder
from torchways.ids import ClientId, IslandId, RunId
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.streams import drained


class RunOrderServer(pb_grpc.RunOrderServicer):
    """See the module's docstring."""

    def __init__(self) -> None:
        self._order = RunOrder()
        #: Of each island's scheduler: the runs to tell it of. None: its stream has ended.
        self._queues: dict[IslandId, asyncio.Queue[RunId | None]] = {}

    async def OrderRuns(
        self, request_iterator: AsyncIterator[pb.OrderEvents], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.OrderedRuns]:
        """A scheduler's stream."""
        first = await anext(aiter(request_iterator), None)
        if first is None or not first.events or not first.events[0].HasField("joined"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a scheduler is `joined`")
            return
        island_id = IslandId(first.events[0].joined)
        queue: asyncio.Queue[RunId | None] = asyncio.Queue()
        self._queues[island_id] = queue
        self._order.join(island_id)
        reading = asyncio.create_task(self._read(island_id, first.events[1:], request_iterator))
        reading.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            yield pb.OrderedRuns()
            async for run_ids in drained(queue):
                yield pb.OrderedRuns(run_ids=run_ids)
            reading.result()  # what was not foreseen breaks the stream
        finally:
            reading.cancel()
            del self._queues[island_id]
            self._tell(self._order.leave(island_id))

    async def _read(
        self, island_id: IslandId, first: Sequence[pb.OrderEvent], batches: AsyncIterator[pb.OrderEvents]
    ) -> None:
        self._take(island_id, first)
        async for batch in batches:
            self._take(island_id, batch.events)

    def _take(self, island_id: IslandId, events: Sequence[pb.OrderEvent]) -> None:
        for event in events:
            if event.HasField("ask"):
                ask = event.ask
                islands = [IslandId(number) for number in ask.islands]
                client_id, run_id = ClientId(ask.client_id), RunId(ask.run_id)
                order = self._order
                self._tell(order.ask(island_id, run_id, client_id, islands, is_withdrawn=ask.is_withdrawn))
            elif event.HasField("client_gone"):
                self._tell(self._order.client_gone(island_id, ClientId(event.client_gone)))

    def _tell(self, ordered: Sequence[Ordered]) -> None:
        for item in ordered:
            if item.island_id in self._queues:
                self._queues[item.island_id].put_nowait(item.run_id)
