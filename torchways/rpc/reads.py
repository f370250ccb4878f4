"""A client's reads of an executor's buffers, over one stream: a call for each would take twice as long."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from torchways.ids import BufferId
from torchways.link.opening import LinkError
from torchways.link.stream import LoopStream
from torchways.rpc import convert
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.streams import open_offered, parsing


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
        self._stream: LoopStream | None = None
        self._opening: asyncio.Task[None] | None = None

    async def read(self, buffer_id: BufferId, *, only_ready: bool = False) -> ReadValue:
        """Waits for a buffer's value; with `only_ready`, for whether it is computed.

        Raises:
            TorchwaysError: the failure that the buffer is poisoned with.
            grpc.aio.AioRpcError: the executor cannot be reached.
        """
        stream = self._stream
        if stream is None:
            stream = self._stream = LoopStream(parsing(pb.ReadAnswer, self._take), self._lost)
            self._opening = asyncio.create_task(self._open(stream), name="reads")
        number = next(self._numbers)
        future: asyncio.Future[ReadValue] = asyncio.get_running_loop().create_future()
        self._waiting[number] = ReadValue(), future
        stream.send(pb.ReadRequest(read_id=number, buffer_id=buffer_id, only_ready=only_ready).SerializeToString())
        try:
            return await future
        finally:
            if self._waiting.pop(number, None) is not None:  # who waits gave up
                stream.send(pb.ReadRequest(read_id=number, give_up=True).SerializeToString())

    def close(self) -> None:
        """Ends the stream, and the reads that wait."""
        if self._opening is not None:
            self._opening.cancel()
        if self._stream is not None:
            self._stream.close()
        self._end(None)

    async def _open(self, stream: LoopStream) -> None:
        try:
            await open_offered(self._stub.ReadBuffers(pb.OpenStream(), metadata=self._metadata), stream)
        except grpc.aio.AioRpcError as error:
            self._end(error)
        except LinkError as error:
            self._lost(str(error))

    def _lost(self, reason: str) -> None:
        none = grpc.aio.Metadata()
        self._end(grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, none, none, reason, None))

    def _end(self, error: grpc.aio.AioRpcError | None) -> None:
        """Ends the reads that wait: with an error, or as cancelled."""
        self._stream = None
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
