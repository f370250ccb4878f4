"""Values for the executors of this host: each goes as an open file in memory, of which the executor reads its part.

Controllers copy their values into such files. PyTorch's workers write batches into them, which nobody copies here. The
executor's end is executor/local_values.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import torch

from torchways.errors import InfraError
from torchways.rpc import convert
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.local_socket import HEADER, short_name

#: A value of at most so many bytes is part of the message.
INLINE_BYTES = 16 << 10
_ANSWER_SECONDS = 600.0
#: Values that are sent before their answers are read: both ends must not wait for the other to read.
_IN_FLIGHT = 32


class LocalExecutors:
    """Connections to the executors of a slice.

    Args:
        paths: of their sockets.
        token, identity: what messages prove with whose they are.
    """

    def __init__(self, paths: Sequence[str], token: str, identity: str) -> None:
        self._token = token
        self._identity = identity
        self._sockets: list[socket.socket] = []
        for path in paths:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(_ANSWER_SECONDS)
            self._sockets.append(connection)
            try:
                with short_name(path) as name:
                    connection.connect(name)
            except OSError as error:
                self.close()
                raise InfraError(f"an executor of the slice cannot be reached at {path} ({error})") from error

    def close(self) -> None:
        """Closes the connections."""
        for connection in self._sockets:
            connection.close()

    def shut_down(self) -> None:
        """Ends the connections for whoever waits at them, too."""
        for connection in self._sockets:
            with contextlib.suppress(OSError):  # the other end has gone before
                connection.shutdown(socket.SHUT_RDWR)
        self.close()

    def put(self, puts: Sequence[tuple[pb.PutChunk, torch.Tensor]]) -> None:
        """Has all executors take values, and waits until they have them.

        Raises:
            TorchwaysError: one of them refuses, or cannot be reached.
        """
        self.send([self._message(put, tensor) for put, tensor in puts])

    def send(self, messages: Sequence[tuple[pb.LocalPut, int | None]]) -> None:
        """As `put`, of messages and the open files that go with them."""
        answers: list[pb.LocalPutResponse] = []
        try:
            for start in range(0, len(messages), _IN_FLIGHT):
                some = messages[start : start + _IN_FLIGHT]
                for connection in self._sockets:
                    for message, fd in some:
                        _send(connection, message, fd)
                # All answers are read, whatever they are: the next ones are those of the next batch.
                answers += [_answer(connection) for connection in self._sockets for _ in some]
        except OSError as error:
            raise InfraError(f"an executor of the slice cannot be reached ({error})") from error
        for answer in answers:
            if answer.HasField("failure"):
                raise convert.failure_from_proto(answer.failure).to_error()

    def message(self, put: pb.PutChunk) -> pb.LocalPut:
        """Returns what proves whose a value is."""
        return pb.LocalPut(token=self._token, identity=self._identity, put=put)

    def _message(self, put: pb.PutChunk, tensor: torch.Tensor) -> tuple[pb.LocalPut, int | None]:
        message = self.message(put)
        if tensor.nbytes <= INLINE_BYTES:
            message.put.value.data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return message, None
        fd, offset = file_of(tensor)
        message.offset = offset
        return message, fd


class ValueFile:
    """A copy of a tensor's elements, row-major, in a file in memory: not one in /dev/shm, which may be small.

    Attributes:
        fd: of the file, which lives as long as this.
        nbytes: its size.
    """

    def __init__(self, elements: memoryview) -> None:
        self.nbytes = elements.nbytes
        self.fd = os.memfd_create("torchways-value") if hasattr(os, "memfd_create") else _temporary_file()
        done = 0
        while done < self.nbytes:
            done += os.write(self.fd, elements[done:])

    def read(self, start: int, size: int) -> bytes:
        """Returns a part of it."""
        return os.pread(self.fd, size, start)

    def __del__(self) -> None:
        os.close(self.fd)


def _temporary_file() -> int:
    fd, path = tempfile.mkstemp()
    os.unlink(path)
    return fd


class LocalExecutor:
    """An executor that may be on this host; may be used on any thread.

    Args:
        path: of its socket, if it is here.
        token, identity: as of `LocalExecutors`.

    Attributes:
        is_here: it can be reached at its socket.
    """

    def __init__(self, path: str, token: str, identity: str) -> None:
        # Nobody but the user that a cluster runs as can enter its folders.
        self.is_here = bool(path) and os.access(path, os.W_OK)
        self._proof = token, identity
        self._path = path
        self._connection: LocalExecutors | None = None
        self._lock = threading.Lock()

    def put(self, put: pb.PutChunk, file: ValueFile | None) -> None:
        """Has the executor take a value, and waits until it has it.

        Args:
            put: whose value has content, unless that is in a file.
            file: what has the content.

        Raises:
            TorchwaysError: it refuses, or cannot be reached.
        """
        with self._lock:
            if self._connection is None:
                self._connection = LocalExecutors([self._path], *self._proof)
            self._connection.send([(self._connection.message(put), file.fd if file is not None else None)])

    def close(self) -> None:
        """Closes the connection; who waits for an answer is told that there is none."""
        if self._connection is not None:
            self._connection.shut_down()


def file_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns the open file in memory that a contiguous tensor is in, and where. It lives as long as the tensor.

    What a worker of PyTorch's made is in one; anything else is copied into one.
    """
    # What torch.multiprocessing calls to send a tensor; nothing public returns the file. It moves a storage that is not
    # shared yet into a file.
    storage: Any = tensor.untyped_storage()
    fd, _ = storage._share_fd_cpu_()
    return fd, int(tensor.storage_offset()) * tensor.element_size()


def shareable(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous tensor of the same values whose memory may be made a file: none that others use."""
    if tensor.is_contiguous() and (tensor.is_shared() or tensor.nbytes <= INLINE_BYTES):
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype).share_memory_()
    return copy.copy_(tensor)


def _send(connection: socket.socket, message: pb.LocalPut, fd: int | None) -> None:
    data = message.SerializeToString()
    socket.send_fds(connection, [HEADER.pack(len(data), fd is not None)], [fd] if fd is not None else [])
    connection.sendall(data)


def _answer(connection: socket.socket) -> pb.LocalPutResponse:
    size, _ = HEADER.unpack(receive(connection, HEADER.size))
    return pb.LocalPutResponse.FromString(receive(connection, size))


def receive(connection: socket.socket, size: int) -> bytes:
    """Reads so many bytes.

    Raises:
        ConnectionError: the other end closed the connection before.
    """
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionResetError("it closed the connection")
        data += piece
    return bytes(data)
