"""The service that gives runs over several islands their places: the shell around run_order.py."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence

import grpc.aio

from torchways.cluster.run_order import Ordered, RunOrder
from torchways.ids import ClientId, IslandId, RunId
from torchways.link.stream import LoopStream, StreamServer
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.streams import offer, parsing


class RunOrderServer(pb_grpc.RunOrderServicer):
    """See the module's docstring.

    Args:
        streams: where streams are offered.
        on_lost: called with an island whose scheduler's stream has ended, and why.
    """

    def __init__(self, streams: StreamServer, on_lost: Callable[[IslandId, str], None]) -> None:
        self._order = RunOrder()
        self._server = streams
        self._on_lost = on_lost
        #: Of each island's scheduler.
        self._streams: dict[IslandId, LoopStream] = {}

    async def OrderRuns(self, request: pb.OrderRunsRequest, context: grpc.aio.ServicerContext) -> None:
        """A scheduler's stream."""
        join = functools.partial(self._join, IslandId(request.island_id))
        await offer(context, self._server, asyncio.get_running_loop(), join)

    def _join(self, island_id: IslandId) -> LoopStream:
        stream = self._streams[island_id] = LoopStream(
            parsing(pb.OrderEvent, functools.partial(self._take, island_id)),
            lambda reason: self._leave(island_id, stream, reason),
        )
        self._order.join(island_id)
        return stream

    def _leave(self, island_id: IslandId, stream: LoopStream, reason: str) -> None:
        if self._streams.get(island_id) is stream:
            del self._streams[island_id]
            self._tell(self._order.leave(island_id))
            self._on_lost(island_id, reason)

    def _take(self, island_id: IslandId, event: pb.OrderEvent) -> None:
        if event.HasField("ask"):
            ask = event.ask
            islands = [IslandId(number) for number in ask.islands]
            client_id, run_id = ClientId(ask.client_id), RunId(ask.run_id)
            self._tell(self._order.ask(island_id, run_id, client_id, islands, is_withdrawn=ask.is_withdrawn))
        elif event.HasField("client_gone"):
            self._tell(self._order.client_gone(island_id, ClientId(event.client_gone)))

    def _tell(self, ordered: Sequence[Ordered]) -> None:
        for item in ordered:
            if item.island_id in self._streams:
                self._streams[item.island_id].send(pb.OrderedRun(run_id=item.run_id).SerializeToString())
