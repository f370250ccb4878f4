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
from torchways.executor.fetches import Fetched
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
#: Copies of values that a client may have on this executor before they are sent; one value may have more. Further
#: values stay where they are, and donations of these wait. Of each client: who takes nothing holds up no other.
_MAX_COPIED_BYTES = 64 << 20
#: Of one client.
_MAX_STREAMS = 8
#: Reads of one stream that may wait for their values; more are taken when some have them.
_MAX_READS = 100_000
#: How long to wait for word that a value is computed, which may be under way.
_WORD_SECONDS = 0.02


class Reads:
    """Reads of an executor's buffers; for the engine's thread.

    Args:
        engine: returns it.
    """

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._engine = engine
        self._num_streams: Counter[ClientId] = Counter()
        self._copies: dict[ClientId, _Copies] = {}

    def open(self, client_id: ClientId) -> Stream:
        """Returns a stream of a client's reads, which answers them as their values come.

        Raises:
            HandshakeError: the client has too many.
        """
        if self._num_streams[client_id] >= _MAX_STREAMS:
            raise HandshakeError(f"client {client_id} has {_MAX_STREAMS} streams of reads")
        self._num_streams[client_id] += 1
        copies = self._copies.setdefault(client_id, _Copies())
        return _ClientReads(self._engine(), client_id, copies, self._ended)

    def _ended(self, client_id: ClientId) -> None:
        self._num_streams[client_id] -= 1
        if not self._num_streams[client_id]:
            del self._num_streams[client_id], self._copies[client_id]


class _Copies:
    """How much of a client's values is copied and not sent."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._waiting: collections.deque[tuple[int, Callable[[], None]]] = collections.deque()
        self._is_starting = False

    def wait(self, nbytes: int, start: Callable[[], None]) -> None:
        """Calls `start` when there is room for so many bytes, which count from then on; after who came before."""
        self._waiting.append((nbytes, start))
        self._start()

    def give_back(self, nbytes: int) -> None:
        """Counts bytes no more."""
        self._num_bytes -= nbytes
        self._start()

    def _start(self) -> None:
        if self._is_starting:  # what starts may be sent, or given up, at once
            return
        self._is_starting = True
        while self._waiting and (not self._num_bytes or self._num_bytes + self._waiting[0][0] <= _MAX_COPIED_BYTES):
            nbytes, start = self._waiting.popleft()
            self._num_bytes += nbytes
            start()
        self._is_starting = False


class _Read:
    """A read whose answer is not sent whole.

    Attributes:
        fetch_id: of the engine's fetch, where it waits for a value.
        fetched: a value that waits to be copied.
        copied_bytes: what counts for it among the copies of its client.
    """

    def __init__(self) -> None:
        self.fetch_id: int | None = None
        self.fetched: Fetched | None = None
        self.copied_bytes = 0


class _ClientReads(Stream):
    """A stream of a client's reads."""

    def __init__(self, engine: Engine, client_id: ClientId, copies: _Copies, ended: Callable[[ClientId], None]) -> None:
        super().__init__(engine.inbox, parsing(pb.ReadRequest, self._on_request), self._on_lost)
        self._engine = engine
        self._client_id = client_id
        self._copies = copies
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
            read.fetch_id = self._engine.fetch(buffer_id, lambda found: self._answer(read_id, read, found))

    def _give_up(self, read_id: int) -> None:
        read = self._done(read_id)
        if read is None:
            return
        if read.fetch_id is not None:
            self._engine.cancel_fetch(read.fetch_id)
        if read.fetched is not None:
            read.fetched.end()
            read.fetched = None

    def _give_back(self, read: _Read) -> None:
        nbytes, read.copied_bytes = read.copied_bytes, 0
        self._copies.give_back(nbytes)

    def _done(self, read_id: int) -> _Read | None:
        read = self._reads.pop(read_id, None)
        if read is not None and len(self._reads) == _MAX_READS - 1:
            self.resume()
        return read

    def _on_lost(self, reason: str) -> None:
        logger.info("the reads of client %d end: %s", self._client_id, reason)
        for read_id in list(self._reads):
            self._give_up(read_id)
        sending, self._sending = self._sending, collections.deque()
        for _, read, _ in sending:
            self._give_back(read)
        self._on_end(self._client_id)

    # ---- answers

    def _answer_ready(self, read_id: int, read: _Read, ready: bool) -> None:
        if self._reads.get(read_id) is read:
            self._send(read_id, read, iter([pb.ReadAnswer(read_id=read_id, ready=ready, is_last=True)]))

    def _answer(self, read_id: int, read: _Read, found: Fetched | Failure) -> None:
        if isinstance(found, Failure):
            if self._reads.get(read_id) is read:
                self._send(read_id, read, _failed(read_id, found))
            return
        if self._reads.get(read_id) is not read:
            found.end()
            return
        read.fetched = found
        nbytes = found.nbytes
        self._copies.wait(nbytes, lambda: self._copy(read_id, read, nbytes))

    def _copy(self, read_id: int, read: _Read, nbytes: int) -> None:
        found, read.fetched, read.copied_bytes = read.fetched, None, nbytes
        if found is None:  # given up meanwhile
            self._give_back(read)
            return
        try:
            value = found.read()
            if isinstance(value, torch.Tensor) and self._engine.runtime.shares_memory:
                value = value.clone()  # the buffer may be donated next
            answers = _failed(read_id, value) if isinstance(value, Failure) else _chunks(read_id, value)
        except Exception as error:
            answers = _failed(read_id, self._failure(error))
        finally:
            found.end()
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
            if self._reads.get(read_id) is not read:  # given up meanwhile
                del answers
                self._give_back(read)
                continue
            answer = next(answers)
            message = answer.SerializeToString()
            self._num_unsent += len(message)
            self.send(message, functools.partial(self._on_sent, len(message)))
            if answer.is_last:
                self._done(read_id)
                del answers, answer, message  # the value is let go before another is copied
                self._give_back(read)
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
