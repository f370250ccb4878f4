"""Values that processes of this host bring: controllers, and data processes, which read batches (torchways/data).

A value comes as an open file and a place in it, over a Unix socket in a folder that only this user can enter. Each
message proves whose it is, as a call does, and names only buffers of its own. The file is read, never mapped: whatever
its other users do to it, nobody but they comes to harm.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable

import torch
from google.protobuf.message import DecodeError

from torchways.errors import AccessDenied, Failure, TorchwaysError, UserError, failure_from
from torchways.executor.events import BufferPut
from torchways.executor.host_values import checked_put, put_event
from torchways.ids import BufferId, SliceId
from torchways.rpc import convert
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.channel import MAX_MESSAGE_BYTES
from torchways.rpc.identity import Identifies, Role
from torchways.rpc.local_socket import HEADER, short_name

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 0.1


class LocalValues:
    """Takes values at a socket, each connection on a thread of its own.

    Args:
        key: tells who brings a value.
        num_devices: of this executor's set, on all hosts.
        post: takes the values, on some thread.

    Attributes:
        address: path of the socket.
    """

    def __init__(self, token: str, key: Identifies, num_devices: int, post: Callable[[BufferPut], None]) -> None:
        self._token = token
        self._key = key
        self._num_devices = num_devices
        self._post = post
        self.address = os.path.join(tempfile.gettempdir(), "values.sock")
        self._socket = socket.socket(socket.AF_UNIX)
        with short_name(self.address) as name:
            self._socket.bind(name)
        self._socket.listen(16)
        threading.Thread(target=self._accept, name="local values", daemon=True).start()

    def close(self) -> None:
        """Takes no more connections; those that are open go on."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:  # it was closed, or there are no file descriptors left
                if self._socket.fileno() < 0 or error.errno == errno.EINVAL:
                    return
                logger.warning("a local connection could not be accepted: %s", error)
                time.sleep(_RETRY_SECONDS)
                continue
            threading.Thread(target=self._serve, args=(connection,), name="local values", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while (received := _receive_message(connection)) is not None:
                    data, fd = received
                    try:
                        failure = self._take(data, fd)
                    finally:
                        if fd is not None:
                            os.close(fd)
                    answer = pb.LocalPutResponse()
                    if failure is not None:
                        answer.failure.CopyFrom(convert.failure_to_proto(failure))
                    content = answer.SerializeToString()
                    connection.sendall(HEADER.pack(len(content), False) + content)
            except (OSError, ValueError) as error:
                logger.info("a local connection ended: %s", error)

    def _take(self, data: bytes, fd: int | None) -> Failure | None:
        """Takes a value; returns why not, if so."""
        try:
            message = pb.LocalPut.FromString(data)
            caller = self._key.identify(message.identity) if message.token == self._token else None
            if caller is None or caller.role is not Role.CLIENT:
                raise AccessDenied("a local value does not prove whose it is")
            put = message.put
            spec = checked_put(put, caller.client_id, self._num_devices)
            if fd is not None:
                value = _read(fd, message.offset, spec.nbytes)
            elif len(put.value.data) == spec.nbytes:
                value = torch.frombuffer(bytearray(put.value.data), dtype=torch.uint8) if put.value.data else _NOTHING
            else:
                raise UserError(f"{len(put.value.data):,} bytes came for the {spec.nbytes:,} bytes of {spec.form}")
        except DecodeError:
            return Failure(kind="UserError", message="a local value's message cannot be read")
        except TorchwaysError as error:
            return failure_from(error)
        except (OSError, RuntimeError) as error:  # the file is none of those that can be read, or there is no memory
            return Failure(kind="UserError", message=f"a local value cannot be read: {error}")
        self._post(put_event(BufferId(put.buffer_id), SliceId(put.slice_id), value, spec, for_run=put.for_run))
        return None


_NOTHING = torch.empty(0, dtype=torch.uint8)


def _read(fd: int, offset: int, size: int) -> torch.Tensor:
    if os.fstat(fd).st_size < offset + size:
        raise UserError(f"the file of a local value has fewer than {offset:,} + {size:,} bytes")
    value = torch.empty(size, dtype=torch.uint8)
    view = value.numpy().data
    done = 0
    while done < size:
        count = os.preadv(fd, [view[done:]], offset + done)
        if not count:
            raise UserError(f"the file of a local value ends after {done:,} of {size:,} bytes")
        done += count
    return value


def _receive_message(connection: socket.socket) -> tuple[bytes, int | None] | None:
    """Returns the next message and the file that came with it; None at the end of the connection."""
    head = b""
    fds: list[int] = []
    try:
        while len(head) < HEADER.size:
            piece, came, _, _ = socket.recv_fds(connection, HEADER.size - len(head), 1)
            fds += came
            if not piece:
                return None
            head += piece
        size, has_file = HEADER.unpack(head)
        if size > MAX_MESSAGE_BYTES or has_file != (len(fds) == 1):
            raise ValueError("it sent what is no message")
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            count = connection.recv_into(view[done:])
            if not count:
                return None
            done += count
        return bytes(data), fds.pop() if has_file else None
    finally:
        for fd in fds:
            os.close(fd)
