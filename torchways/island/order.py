"""A scheduler's stream to the resource manager, which gives runs over several islands their places in one order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio

from torchways.ids import ClientId, IslandId, RunId
from torchways.island.events import AskOrder
from torchways.rpc import channel
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.streams import drained

logger = logging.getLogger(__name__)

#: For the resource manager to answer that it knows the island.
_JOIN_SECONDS = 30.0


class OrderStream:
    """See the module's docstring.

    Args:
        address: the resource manager's.
        metadata: of the scheduler's calls.
        island_id: the scheduler's island.
        on_ordered: called with the run that is next.
    """

    def __init__(
        self,
        address: str,
        metadata: tuple[tuple[str, str], ...],
        island_id: IslandId,
        on_ordered: Callable[[RunId], None],
    ) -> None:
        self._events: asyncio.Queue[pb.OrderEvent | None] = asyncio.Queue()
        self._events.put_nowait(pb.OrderEvent(joined=island_id))
        self._on_ordered = on_ordered
        stub = pb_grpc.RunOrderStub(channel.open_channel(address))
        self._stream = stub.OrderRuns(self._outgoing(), metadata=metadata)

    async def join(self) -> asyncio.Task[None]:
        """Waits until the resource manager knows the island; returns the task that reads the stream, to be held."""
        await asyncio.wait_for(self._stream.read(), _JOIN_SECONDS)
        return asyncio.create_task(self._read(), name="order of runs")

    def ask(self, command: AskOrder) -> None:
        """Asks for a run's place."""
        ask = pb.AskOrder(
            run_id=command.run_id,
            client_id=command.client_id,
            islands=command.islands,
            is_withdrawn=command.is_withdrawn,
        )
        self._events.put_nowait(pb.OrderEvent(ask=ask))

    def client_gone(self, client_id: ClientId) -> None:
        """A client will ask for nothing here any more."""
        self._events.put_nowait(pb.OrderEvent(client_gone=client_id))

    async def _outgoing(self) -> AsyncIterator[pb.OrderEvents]:
        async for events in drained(self._events):
            yield pb.OrderEvents(events=events)

    async def _read(self) -> None:
        try:
            while (batch := await self._stream.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                for run_id in batch.run_ids:
                    self._on_ordered(RunId(run_id))
            reason = "it closed the stream"
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        # The cluster is ending: our node agent sees the same.
        logger.warning("the resource manager gives runs no places any more (%s)", reason)
