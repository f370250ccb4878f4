"""A client's reads of an executor's buffers, over one stream: a call for each would take twice as long."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import itertools
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import grpc.aio

from torchways.errors import SessionClosed, TorchwaysError
from torchways.ids import BufferId
from torchways.link.connection import LoopWaiter
from torchways.link.opening import LinkError
from torchways.link.stream import Stream
from torchways.rpc import convert
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.streams import open_offered, parsing
from torchways.signals import uninterrupted

_T = TypeVar("_T")


@dataclass(eq=False, slots=True)
class ReadValue:
    """What a read brought: a value's dtype, shape and row-major elements, or only whether it is computed."""

    dtype: str = ""
    shape: tuple[int, ...] = ()
    data: bytearray = field(default_factory=bytearray)
    ready: bool = True


@dataclass(eq=False, slots=True)
class _Read:
    value: ReadValue
    future: concurrent.futures.Future[Any]
    finish: Callable[[ReadValue], Any]


class ReadStream:
    """The stream, which the first read opens, and the next one after it was lost. Made on the loop that it is for.

    Args:
        stub: of the executor.
        metadata: who reads.
        explain: returns what reads raise when the executor cannot be reached.
    """

    def __init__(
        self, stub: Any, metadata: Any, explain: Callable[[grpc.aio.AioRpcError], Awaitable[TorchwaysError]]
    ) -> None:
        self._stub = stub
        self._metadata = metadata
        self._explain = explain
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        #: Held, without interruption, while the next three change.
        self._changing = threading.Lock()
        self._waiting: dict[int, _Read] = {}
        self._stream: Stream | None = None
        self._closed: TorchwaysError | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def read(
        self, buffer_id: BufferId, finish: Callable[[ReadValue], _T], *, only_ready: bool = False
    ) -> concurrent.futures.Future[_T]:
        """Starts to wait for a buffer's value; with `only_ready`, for whether it is computed. On any thread.

        Args:
            buffer_id: the buffer.
            finish: makes the result of what came; on the loop.
            only_ready: see above.

        Returns:
            The result, or the failure that the buffer is poisoned with. To cancel it gives the read up.
        """
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()
        with uninterrupted():
            with self._changing:
                if self._closed is not None:
                    future.set_exception(self._closed)
                    return future
                stream = self._stream
                if stream is None:
                    waiter = LoopWaiter(self._loop)
                    stream = Stream(waiter, parsing(pb.ReadAnswer, self._take), self._lost)
                    self._loop.call_soon_threadsafe(self._start, self._open, stream)
                    self._stream = stream
                number = next(self._numbers)
                self._waiting[number] = _Read(ReadValue(), future, finish)
                request = pb.ReadRequest(read_id=number, buffer_id=buffer_id, only_ready=only_ready)
                stream.send(request.SerializeToString())
            stream.flush()
            future.add_done_callback(functools.partial(self._given_up, stream, number))
        return future

    def close(self, error: TorchwaysError) -> None:
        """Ends the reads that wait, and those to come, with an error; on the loop."""
        with self._changing:
            self._closed = self._closed or error
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
        for task in self._tasks:
            task.cancel()
        self._end(self._closed)

    def _start(self, work: Callable[..., Any], *args: Any) -> None:
        task = asyncio.create_task(work(*args), name="reads")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open(self, stream: Stream) -> None:
        try:
            await open_offered(self._stub.ReadBuffers(pb.OpenStream(), metadata=self._metadata), stream)
        except grpc.aio.AioRpcError as error:
            stream.close()
            await self._fail(error)
        except LinkError as error:
            stream.lose(str(error))

    def _lost(self, reason: str) -> None:
        none = grpc.aio.Metadata()
        self._start(self._fail, grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, none, none, reason, None))

    async def _fail(self, error: grpc.aio.AioRpcError) -> None:
        """Ends the reads that wait where the executor cannot be reached."""
        with self._changing:
            self._stream = None
            waiting, self._waiting = self._waiting, {}
        try:
            self._end(await self._explain(error), waiting)
        except asyncio.CancelledError:
            self._end(self._closed or SessionClosed("the session is over"), waiting)
            raise

    def _end(self, error: TorchwaysError, waiting: dict[int, _Read] | None = None) -> None:
        if waiting is None:
            with self._changing:
                waiting, self._waiting = self._waiting, {}
        for read in waiting.values():
            if read.future.set_running_or_notify_cancel():
                read.future.set_exception(error)

    def _given_up(self, stream: Stream, number: int, future: concurrent.futures.Future[Any]) -> None:
        """On any thread."""
        if future.cancelled() and self._waiting.pop(number, None) is not None:
            stream.send(pb.ReadRequest(read_id=number, give_up=True).SerializeToString())
            stream.flush()

    def _take(self, answer: pb.ReadAnswer) -> None:
        read = self._waiting.get(answer.read_id)
        if read is None:
            return  # given up meanwhile
        value, future = read.value, read.future
        if answer.HasField("spec"):
            value.dtype, value.shape = answer.spec.dtype, tuple(answer.spec.shape)
        value.data += answer.data
        if not answer.is_last:
            return
        self._waiting.pop(answer.read_id, None)
        if not future.set_running_or_notify_cancel():
            return
        if answer.HasField("failure"):
            future.set_exception(convert.failure_from_proto(answer.failure).to_error())
            return
        if not value.dtype:
            value.ready = answer.ready
        future.set_result(read.finish(value))
