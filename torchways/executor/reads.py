"""Reads of buffers: what waits until a value is there, and the stream that carries values to a client."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import torch

from torchways.errors import Failure, TorchwaysError, failure_from
from torchways.executor.engine import Engine
from torchways.ids import BufferId, ClientId, owner
from torchways.rpc import convert
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.identity import check_owner
from torchways.rpc.streams import CHUNK_BYTES

logger = logging.getLogger(__name__)

#: A message of answers has less than this and one more.
_BATCH_BYTES = 1 << 20
#: Answers that may wait to be sent to a client; whoever has more to say waits.
_MAX_ANSWERS = 64
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
                copied = self._failure(error)
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

    async def serve(
        self, client_id: ClientId, requests: AsyncIterator[pb.ReadRequests]
    ) -> AsyncIterator[pb.ReadAnswers]:
        """Answers a client's reads as their values come, several small ones in one message."""
        answers: asyncio.Queue[pb.ReadAnswer] = asyncio.Queue(_MAX_ANSWERS)
        reads: dict[int, asyncio.Task[None]] = {}

        async def take() -> None:
            async for batch in requests:
                for request in batch.reads:
                    if request.read_id in reads:
                        if request.give_up:
                            reads[request.read_id].cancel()
                        continue  # a client that gives two reads one number has the answer to the first
                    if request.give_up:
                        continue
                    while len(reads) >= _MAX_READS:
                        await asyncio.wait(reads.values(), return_when=asyncio.FIRST_COMPLETED)
                    read = asyncio.create_task(self._answer(client_id, request, answers))
                    reads[request.read_id] = read
                    read.add_done_callback(functools.partial(_forget, reads, request.read_id))
            if reads:
                await asyncio.wait(reads.values())

        taking = asyncio.create_task(take(), name="reads")
        getting = asyncio.ensure_future(answers.get())
        try:
            while True:
                await asyncio.wait({getting, taking}, return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    taking.result()
                    if answers.empty():
                        return
                    continue
                batch = [getting.result()]
                size = batch[0].ByteSize()
                while size < _BATCH_BYTES and not answers.empty():
                    batch.append(answers.get_nowait())
                    size += batch[-1].ByteSize()
                yield pb.ReadAnswers(answers=batch)
                getting = asyncio.ensure_future(answers.get())
        finally:
            for task in (taking, getting, *reads.values()):
                task.cancel()

    async def _answer(
        self, client_id: ClientId, request: pb.ReadRequest, answers: asyncio.Queue[pb.ReadAnswer]
    ) -> None:
        read_id, buffer_id = request.read_id, BufferId(request.buffer_id)
        try:
            check_owner(client_id, ids=[buffer_id])
            if request.only_ready:
                ready = await self._is_computed(buffer_id)
                await answers.put(pb.ReadAnswer(read_id=read_id, ready=ready, is_last=True))
                return
            value = await self.start(buffer_id)
            if not isinstance(value, Failure):
                spec = pb.TensorSpec(dtype=str(value.dtype).removeprefix("torch."), shape=value.shape)
                data = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        except Exception as error:  # whatever happens, the client waits for an answer
            value = self._failure(error)
        if isinstance(value, Failure):
            failure = convert.failure_to_proto(value)
            await answers.put(pb.ReadAnswer(read_id=read_id, failure=failure, is_last=True))
            return
        for start in range(0, max(len(data), 1), CHUNK_BYTES):
            end = start + CHUNK_BYTES
            answer = pb.ReadAnswer(read_id=read_id, data=bytes(data[start:end]), is_last=end >= len(data))
            if not start:
                answer.spec.CopyFrom(spec)
            await answers.put(answer)

    def _failure(self, error: Exception) -> Failure:
        return failure_from(error, process=f"executor {self._engine().executor_id}")

    async def _is_computed(self, buffer_id: BufferId) -> bool:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()

        def computed() -> None:
            loop.call_soon_threadsafe(_set_if_waiting, future, True)

        self._engine().ask_computed(buffer_id, computed)
        done, _ = await asyncio.wait({future}, timeout=0.02)
        return bool(done)


def _forget(reads: dict[int, asyncio.Task[None]], read_id: int, _: asyncio.Task[None]) -> None:
    del reads[read_id]


def _set_if_waiting(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)
