"""Reads of buffers: what waits until a value is there, and the stream that carries values to a client."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import torch

from torchways.errors import Failure, TorchwaysError, failure_from
from torchways.executor.engine import Engine
from torchways.ids import BufferId, ClientId, owner
from torchways.link.handshake import HandshakeError
from torchways.link.stream import LoopStream
from torchways.rpc import convert
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.identity import check_owner
from torchways.rpc.streams import parsing

logger = logging.getLogger(__name__)

#: A large value goes in chunks.
_CHUNK_BYTES = 1 << 20
#: What may wait to be sent to a client: nothing more of a value is added.
_MAX_UNSENT_BYTES = 8 << 20
#: Of one client.
_MAX_STREAMS = 8
#: Reads of one client that may wait for their values; more are taken when some have them.
_MAX_READS = 100_000
#: A read may overtake the run that makes its buffer; longer than this it waits only for a run that is known.
_UNKNOWN_BUFFER_SECONDS = 60.0


class Reads:
    """Reads of an executor's buffers; all methods are for its loop.

    Attributes:
        clients_with_held_runs: those whose buffers may be named in reads long before the run that makes them is here.
    """

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._engine = engine
        self.clients_with_held_runs: set[ClientId] = set()
        self._num_streams: Counter[ClientId] = Counter()

    def start(
        self, buffer_id: BufferId, copy: Callable[[torch.Tensor], Any] = torch.clone
    ) -> Coroutine[Any, Any, Any | Failure]:
        """Asks for a copy of a buffer's value, as it is after the runs that are here; await what it returns."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def fetched(value: torch.Tensor | Failure) -> None:
            # Copied on the engine's thread: the buffer may be donated next.
            try:
                copied = copy(value) if isinstance(value, torch.Tensor) else value
            except TorchwaysError as error:
                copied = self.failure(error)
            loop.call_soon_threadsafe(_set_if_waiting, future, copied)

        return self._value(buffer_id, self._engine().fetch(buffer_id, fetched), future)

    async def _value(self, buffer_id: BufferId, fetch_id: int, future: asyncio.Future[Any]) -> Any:
        engine = self._engine()
        try:
            while True:
                done, _ = await asyncio.wait({future}, timeout=_UNKNOWN_BUFFER_SECONDS)
                if done:
                    return future.result()
                runs = engine.core.waiting_for()
                if not runs and owner(buffer_id) not in self.clients_with_held_runs:
                    message = f"buffer {buffer_id} was awaited for {_UNKNOWN_BUFFER_SECONDS:g} s but no run makes it"
                    return engine.failure("DeadlineExceeded", message)
                logger.info("a read of buffer %d waits; runs: %s", buffer_id, runs[:4])
        finally:  # also if the client does not wait any longer
            engine.cancel_fetch(fetch_id)

    def open(self, client_id: ClientId) -> LoopStream:
        """Returns a stream of a client's reads, which answers them as their values come.

        Raises:
            HandshakeError: the client has too many.
        """
        if self._num_streams[client_id] >= _MAX_STREAMS:
            raise HandshakeError(f"client {client_id} has {_MAX_STREAMS} streams of reads")
        self._num_streams[client_id] += 1
        return _Client(self, client_id).stream

    def ended(self, client_id: ClientId) -> None:
        """Forgets a stream."""
        self._num_streams[client_id] -= 1
        if not self._num_streams[client_id]:
            del self._num_streams[client_id]

    def failure(self, error: Exception) -> Failure:
        """Returns what a read fails with."""
        return failure_from(error, process=f"executor {self._engine().executor_id}")

    async def is_computed(self, buffer_id: BufferId) -> bool:
        """Whether a buffer's value is there."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()

        def computed() -> None:
            loop.call_soon_threadsafe(_set_if_waiting, future, True)

        self._engine().ask_computed(buffer_id, computed)
        done, _ = await asyncio.wait({future}, timeout=0.02)
        return bool(done)


class _Client:
    """A stream of a client's reads."""

    def __init__(self, reads: Reads, client_id: ClientId) -> None:
        self._reads = reads
        self._client_id = client_id
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.stream = LoopStream(parsing(pb.ReadRequest, self._take), self._lost, max_unsent=_MAX_UNSENT_BYTES)

    def _take(self, request: pb.ReadRequest) -> None:
        task = self._tasks.get(request.read_id)
        if request.give_up:
            if task is not None:
                task.cancel()
        elif task is None:  # else it gave two reads one number, and has the answer to the first
            task = self._tasks[request.read_id] = asyncio.create_task(self._answer(request))
            task.add_done_callback(functools.partial(self._done, request.read_id))
            if len(self._tasks) == _MAX_READS:
                self.stream.pause()

    def _done(self, read_id: int, task: asyncio.Task[None]) -> None:
        del self._tasks[read_id]
        if len(self._tasks) == _MAX_READS - 1:
            self.stream.resume()
        if not task.cancelled() and (error := task.exception()) is not None:
            self.stream.lose(f"a read failed: {error}")

    def _lost(self, reason: str) -> None:
        logger.info("the reads of client %d end: %s", self._client_id, reason)
        for task in self._tasks.values():
            task.cancel()
        self._reads.ended(self._client_id)

    async def _answer(self, request: pb.ReadRequest) -> None:
        read_id, buffer_id = request.read_id, BufferId(request.buffer_id)
        try:
            check_owner(self._client_id, ids=[buffer_id])
            if request.only_ready:
                ready = await self._reads.is_computed(buffer_id)
                self._send(pb.ReadAnswer(read_id=read_id, ready=ready, is_last=True))
                return
            value = await self._reads.start(buffer_id)
            if not isinstance(value, Failure):
                spec = pb.TensorSpec(dtype=str(value.dtype).removeprefix("torch."), shape=value.shape)
                data = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        except Exception as error:  # whatever happens, the client waits for an answer
            value = self._reads.failure(error)
        if isinstance(value, Failure):
            self._send(pb.ReadAnswer(read_id=read_id, failure=convert.failure_to_proto(value), is_last=True))
            return
        for start in range(0, max(len(data), 1), _CHUNK_BYTES):
            end = start + _CHUNK_BYTES
            answer = pb.ReadAnswer(read_id=read_id, data=bytes(data[start:end]), is_last=end >= len(data))
            if not start:
                answer.spec.CopyFrom(spec)
            await self.stream.room()
            self._send(answer)

    def _send(self, answer: pb.ReadAnswer) -> None:
        self.stream.send(answer.SerializeToString())


def _set_if_waiting(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)
