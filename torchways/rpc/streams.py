"""The messages of a stream: several small ones go as one, a large one goes in chunks, and queues have an end.

gRPC refuses a message above its limit before it is parsed (channel.py), so nothing larger is ever sent: an `Outbox`
cuts what is, and the other end's `Joiner` puts it together again.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError

from torchways.errors import InternalError
from torchways.rpc import torchways_pb2 as pb

#: Most messages of a batch, and bytes at which it is full.
_MAX_BATCH = 256
_BATCH_BYTES = 1 << 20
CHUNK_BYTES = 1 << 20
#: The most that chunks may come to: protobuf's own limit.
MAX_JOINED_BYTES = (1 << 31) - 1


_T = TypeVar("_T")
_M = TypeVar("_M", pb.ClientMessage, pb.SchedulerMessage, pb.ExecutorCommand, pb.ExecutorEvent)


class Outbox(Generic[_M]):
    """What is to be sent on a stream, in order.

    Args:
        kind: class of its messages.
        max_bytes: what may wait to be sent. `put` takes more all the same; whoever puts on behalf of a client waits
            for `room` before it reads more from that client.
    """

    def __init__(self, kind: type[_M], *, max_bytes: int = 256 << 20) -> None:
        self._kind: type[_M] = kind
        self._max_bytes = max_bytes
        self._messages: collections.deque[tuple[_M, int]] = collections.deque()
        self._closed = False
        self._has_some = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self.num_bytes = 0

    def put(self, message: _M) -> None:
        """Queues a message."""
        size = message.ByteSize()
        self._messages.append((message, size))
        self.num_bytes += size
        if self.num_bytes > self._max_bytes:
            self._has_room.clear()
        self._has_some.set()

    def close(self) -> None:
        """Ends the stream behind what is queued."""
        self._closed = True
        self._has_some.set()
        self._has_room.set()

    @property
    def is_full(self) -> bool:
        """Whether more waits to be sent than should."""
        return not self._has_room.is_set()

    async def room(self) -> None:
        """Waits until less than `max_bytes` wait to be sent."""
        await self._has_room.wait()

    async def batches(self) -> AsyncIterator[list[_M]]:
        """Yields what there is to send, as lists that fit into one message: what is queued meanwhile is the next."""
        while True:
            await self._has_some.wait()
            if not self._messages:
                if self._closed:
                    return
                self._has_some.clear()
                continue
            if self._messages[0][1] > CHUNK_BYTES:
                message, size = self._take()
                for chunk in _chunks(message.SerializeToString()):
                    yield [self._kind(chunk=chunk)]
                continue
            batch: list[_M] = []
            batch_bytes = 0
            while self._messages and len(batch) < _MAX_BATCH and self._messages[0][1] + batch_bytes <= _BATCH_BYTES:
                message, size = self._take()
                batch.append(message)
                batch_bytes += size
            yield batch

    def _take(self) -> tuple[_M, int]:
        message, size = self._messages.popleft()
        self.num_bytes -= size
        if self.num_bytes <= self._max_bytes:
            self._has_room.set()
        return message, size


async def drained(queue: asyncio.Queue[_T | None]) -> AsyncIterator[list[_T]]:
    """Yields what there is in a queue, all at a time, until None comes: for messages that are always small."""
    is_over = False
    while not is_over:
        items = [await queue.get()]
        while not queue.empty():
            items.append(queue.get_nowait())
        is_over = any(item is None for item in items)
        if found := [item for item in items if item is not None]:
            yield found


def _chunks(data: bytes) -> list[pb.Chunk]:
    ends = range(CHUNK_BYTES, len(data) + CHUNK_BYTES, CHUNK_BYTES)
    return [pb.Chunk(data=data[end - CHUNK_BYTES : end], is_last=end >= len(data)) for end in ends]


class Joiner(Generic[_M]):
    """Puts together what an `Outbox` at the other end of a stream has cut.

    Args:
        kind: class of its messages.
    """

    def __init__(self, kind: type[_M]) -> None:
        self._kind: type[_M] = kind
        self._data = bytearray()

    def join(self, message: _M) -> _M | None:
        """Returns the message that one that came completes; None: chunks are missing.

        Raises:
            InternalError: the chunks are no message, or too large a one; the stream cannot go on.
        """
        if not message.HasField("chunk"):
            if self._data:
                raise InternalError("a message came between the chunks of another")
            return message
        chunk = message.chunk
        if len(self._data) + len(chunk.data) > MAX_JOINED_BYTES:
            raise InternalError(f"a message has more than {MAX_JOINED_BYTES:,} bytes")
        self._data += chunk.data
        if not chunk.is_last:
            return None
        data, self._data = bytes(self._data), bytearray()
        whole = self._kind()
        try:
            whole.ParseFromString(data)
        except DecodeError as error:
            raise InternalError(f"{len(data):,} bytes that came in chunks are no message: {error}") from error
        if whole.HasField("chunk"):
            raise InternalError("a chunk holds chunks")
        return whole
