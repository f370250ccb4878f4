"""A scheduler's stream to the resource manager, which gives runs over several islands their places in one order."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torchways.ids import ClientId, IslandId, RunId
from torchways.island.events import AskOrder
from torchways.link.stream import LoopStream
from torchways.rpc import channel
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.streams import open_offered, parsing

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
        self._metadata = metadata
        self._island_id = island_id
        self._on_ordered = on_ordered
        self._stub = pb_grpc.RunOrderStub(channel.open_channel(address))
        self._stream = LoopStream(parsing(pb.OrderedRun, self._take), self._lost)

    async def join(self) -> None:
        """Waits until the resource manager knows the island."""
        request = pb.OrderRunsRequest(island_id=self._island_id)
        joining = self._stub.OrderRuns(request, metadata=self._metadata)
        await open_offered(joining, self._stream, _JOIN_SECONDS)

    def ask(self, command: AskOrder) -> None:
        """Asks for a run's place."""
        ask = pb.AskOrder(
            run_id=command.run_id,
            client_id=command.client_id,
            islands=command.islands,
            is_withdrawn=command.is_withdrawn,
        )
        self._stream.send(pb.OrderEvent(ask=ask).SerializeToString())

    def client_gone(self, client_id: ClientId) -> None:
        """A client will ask for nothing here any more."""
        self._stream.send(pb.OrderEvent(client_gone=client_id).SerializeToString())

    def _take(self, message: pb.OrderedRun) -> None:
        self._on_ordered(RunId(message.run_id))

    def _lost(self, reason: str) -> None:
        # The cluster is ending: our node agent sees the same, or the resource manager, which takes us for lost.
        logger.warning("the resource manager gives runs no places any more (%s)", reason)
