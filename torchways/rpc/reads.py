"""A client's reads of an executor's buffers, over one stream: a call for each would take twice as long."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from torchways.ids import BufferId
from torchways.rpc import convert
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.streams import drained


@dataclass(eq=False, slots=True)
class ReadValue:
    """What a read brought: a value's dtype, shape and row-major elements, or only whether it is computed."""

    dtype: str = ""
    shape: tuple[int, ...] = ()
    data: bytearray = field(default_factory=bytearray)
    ready: bool = True


class ReadStream:
    """The stream, which the first read opens, and the next one after it was lost; for the session's loop.

    Args:
        stub: of the executor.
        metadata: who reads.
    """

    def __init__(self, stub: Any, metadata: Any) -> None:
        self._stub = stub
        self._metadata = metadata
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[ReadValue, asyncio.Future[ReadValue]]] = {}
        self._requests: asyncio.Queue[pb.ReadRequest | None] = asyncio.Queue()
        self._receiving: asyncio.Task[None] | None = None

    async def read(self, buffer_id: BufferId, *, only_ready: bool = False) -> ReadValue:
        """Waits for a buffer's value; with `only_ready`, for whether it is computed.

        Raises:
            TorchwaysError: the failure that the buffer is poisoned with.
            grpc.aio.AioRpcError: the executor cannot be reached.
        """
        if self._receiving is None:
            self._open()
        number = next(self._numbers)
        future: asyncio.Future[ReadValue] = asyncio.get_running_loop().create_future()
        self._waiting[number] = ReadValue(), future
        self._requests.put_nowait(pb.ReadRequest(read_id=number, buffer_id=buffer_id, only_ready=only_ready))
        try:
            return await future
        finally:
            if self._waiting.pop(number, None) is not None:  # who waits gave up
                self._requests.put_nowait(pb.ReadRequest(read_id=number, give_up=True))

    def close(self) -> None:
        """Ends the stream, and the reads that wait."""
        if self._receiving is not None:
            self._receiving.cancel()

    def _open(self) -> None:
        self._requests = asyncio.Queue()
        stream = self._stub.ReadBuffers(_batches(self._requests), metadata=self._metadata)
        self._receiving = asyncio.create_task(self._receive(stream))

    async def _receive(self, stream: Any) -> None:
        error: grpc.aio.AioRpcError | None = None
        try:
            async for batch in stream:
                for answer in batch.answers:
                    self._take(answer)
            none = grpc.aio.Metadata()
            error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, none, none, "the executor ended the stream", None)
        except grpc.aio.AioRpcError as caught:
            error = caught
        finally:
            stream.cancel()
            self._receiving = None
            self._requests.put_nowait(None)
            waiting, self._waiting = self._waiting, {}
            for _, future in waiting.values():
                if future.done():
                    continue
                if error is not None:
                    future.set_exception(error)
                else:
                    future.cancel()

    def _take(self, answer: pb.ReadAnswer) -> None:
        found = self._waiting.get(answer.read_id)
        if found is None:
            return  # given up meanwhile
        value, future = found
        if answer.HasField("spec"):
            value.dtype, value.shape = answer.spec.dtype, tuple(answer.spec.shape)
        value.data += answer.data
        if not answer.is_last:
            return
        del self._waiting[answer.read_id]
        if future.done():
            return
        if answer.HasField("failure"):
            future.set_exception(convert.failure_from_proto(answer.failure).to_error())
            return
        if not value.dtype:
            value.ready = answer.ready
        future.set_result(value)


async def _batches(requests: asyncio.Queue[pb.ReadRequest | None]) -> AsyncIterator[pb.ReadRequests]:
    async for batch in drained(requests):
        yield pb.ReadRequests(reads=batch)
