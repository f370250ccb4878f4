"""Reads of buffers: streams that carry values to clients, on the engine's thread."""

from __future__ import annotations

import collections
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from torchways.errors import Failure, failure_from
from torchways.executor.engine import Engine
from torchways.ids import BufferId, ClientId
from torchways.link.handshake import HandshakeError
from torchways.link.stream import Stream
from torchways.rpc import convert
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.identity import check_owner
from torchways.rpc.streams import parsing

logger = logging.getLogger(__name__)

#: A large value goes in chunks.
_CHUNK_BYTES = 1 << 20
#: What may wait to be sent to a client: nothing more of a value is added. Chunks are made on the engine's thread, which
#: has other work between them.
_MAX_UNSENT_BYTES = 2 << 20
#: Of one client.
_MAX_STREAMS = 8
#: Reads of one stream that may wait for their values; more are taken when some have them.
_MAX_READS = 100_000
#: How long to wait for word that a value is computed, which may be under way.
_WORD_SECONDS = 0.02


class Reads:
    """Reads of an executor's buffers; for the engine's thread.

    Args:
        engine: returns it; there is one once a client has a slice here.
    """

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._engine = engine
        self._num_streams: Counter[ClientId] = Counter()

    def open(self, client_id: ClientId) -> Stream:
        """Returns a stream of a client's reads, which answers them as their values come.

        Raises:
            HandshakeError: the client has too many.
        """
        if self._num_streams[client_id] >= _MAX_STREAMS:
            raise HandshakeError(f"client {client_id} has {_MAX_STREAMS} streams of reads")
        self._num_streams[client_id] += 1
        return _ClientReads(self._engine(), client_id, self._ended)

    def _ended(self, client_id: ClientId) -> None:
        self._num_streams[client_id] -= 1
        if not self._num_streams[client_id]:
            del self._num_streams[client_id]


class _Read:
    """A read whose answer is not sent whole.

    Attributes:
        fetch_id: of the engine's fetch, where it waits for a value.
    """

    fetch_id: int | None = None


class _ClientReads(Stream):
    """A stream of a client's reads."""

    def __init__(self, engine: Engine, client_id: ClientId, ended: Callable[[ClientId], None]) -> None:
        super().__init__(engine.inbox, parsing(pb.ReadRequest, self._on_request), self._on_lost)
        self._engine = engine
        self._client_id = client_id
        self._on_end = ended
        self._reads: dict[int, _Read] = {}
        #: What is left to be sent of values, which take turns.
        self._sending: collections.deque[tuple[int, _Read, Iterator[pb.ReadAnswer]]] = collections.deque()
        self._num_unsent = 0

    def _on_request(self, request: pb.ReadRequest) -> None:
        read_id, buffer_id = request.read_id, BufferId(request.buffer_id)
        if request.give_up:
            self._give_up(read_id)
            return
        if read_id in self._reads:  # it gave two reads one number, and has the answer to the first
            return
        read = self._reads[read_id] = _Read()
        if len(self._reads) == _MAX_READS:
            self.pause()
        try:
            check_owner(self._client_id, ids=[buffer_id])
        except Exception as error:  # whatever happens, the client waits for an answer
            self._answer(read_id, read, self._failure(error))
            return
        if request.only_ready:
            self._engine.ask_computed(
                buffer_id, lambda: self._engine.call(lambda: self._answer_ready(read_id, read, True))
            )
            self._engine.inbox.later(_WORD_SECONDS, lambda: self._answer_ready(read_id, read, False))
        else:
            read.fetch_id = self._engine.fetch(buffer_id, lambda value: self._answer(read_id, read, value))

    def _give_up(self, read_id: int) -> None:
        read = self._done(read_id)
        if read is not None and read.fetch_id is not None:
            self._engine.cancel_fetch(read.fetch_id)

    def _done(self, read_id: int) -> _Read | None:
        read = self._reads.pop(read_id, None)
        if read is not None and len(self._reads) == _MAX_READS - 1:
            self.resume()
        return read

    def _on_lost(self, reason: str) -> None:
        logger.info("the reads of client %d end: %s", self._client_id, reason)
        for read_id in list(self._reads):
            self._give_up(read_id)
        self._sending.clear()
        self._on_end(self._client_id)

    # ---- answers

    def _answer_ready(self, read_id: int, read: _Read, ready: bool) -> None:
        if self._reads.get(read_id) is read:
            self._send(read_id, read, iter([pb.ReadAnswer(read_id=read_id, ready=ready, is_last=True)]))

    def _answer(self, read_id: int, read: _Read, value: torch.Tensor | Failure) -> None:
        if self._reads.get(read_id) is not read:
            return
        try:
            # A copy: its memory may be a buffer's, which may be donated next.
            answers = _failed(read_id, value) if isinstance(value, Failure) else _chunks(read_id, value.clone())
        except Exception as error:
            answers = _failed(read_id, self._failure(error))
        self._send(read_id, read, answers)

    def _failure(self, error: Exception) -> Failure:
        return failure_from(error, process=f"executor {self._engine.executor_id}")

    def _send(self, read_id: int, read: _Read, answers: Iterator[pb.ReadAnswer]) -> None:
        self._sending.append((read_id, read, answers))
        self._fill()
        self.flush()

    def _fill(self) -> None:
        while self._sending and self._num_unsent <= _MAX_UNSENT_BYTES:
            read_id, read, answers = self._sending.popleft()
            if self._reads.get(read_id) is not read:
                continue  # given up meanwhile
            answer = next(answers)
            message = answer.SerializeToString()
            self._num_unsent += len(message)
            self.send(message, functools.partial(self._on_sent, len(message)))
            if answer.is_last:
                self._done(read_id)
            else:
                self._sending.append((read_id, read, answers))

    def _on_sent(self, size: int, _: str | None) -> None:
        self._num_unsent -= size
        if self._sending:
            self._fill()
            self._engine.call(self.flush)  # behind what else the engine has to do


def _failed(read_id: int, failure: Failure) -> Iterator[pb.ReadAnswer]:
    return iter([pb.ReadAnswer(read_id=read_id, failure=convert.failure_to_proto(failure), is_last=True)])


def _chunks(read_id: int, value: torch.Tensor) -> Iterator[pb.ReadAnswer]:
    spec = pb.TensorSpec(dtype=str(value.dtype).removeprefix("torch."), shape=value.shape)
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().data

    def chunk(start: int) -> pb.ReadAnswer:
        end = start + _CHUNK_BYTES
        return pb.ReadAnswer(
            read_id=read_id, spec=None if start else spec, data=bytes(data[start:end]), is_last=end >= len(data)
        )

    return map(chunk, range(0, max(len(data), 1), _CHUNK_BYTES))
