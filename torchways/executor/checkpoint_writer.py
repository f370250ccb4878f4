"""The files of checkpoints are written by a process of low priority beside the executor.

Making a file takes as much processor time as some training steps, and Python's lock with it. A thread of the executor
would hold up computations; one of low priority even more, because it would keep the lock while others have the
processor. So the executor's part is one copy of each value, into a file in memory that both have.

Main parts: `Snapshot`, the values; `CheckpointWriter`, the executor's end; `main`, the process.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import gc
import json
import logging
import mmap
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import psutil
import torch

from torchways.errors import CheckpointError, TorchwaysError, UserError
from torchways.executor import checkpoint_files
from torchways.ids import BufferId
from torchways.observability.process import die_with_parent, setup_process
from torchways.rpc import torchways_pb2 as pb

logger = logging.getLogger(__name__)

#: Of 19, the lowest. A process of this priority has about a tenth of a core that a computation wants, too.
_NICENESS = 10
#: How long a checkpoint is written only with processor time that nobody else wants; then with that of `_NICENESS`, so
#: that it is complete one day where computations never pause.
_IDLE_SECONDS = 30.0
_HEADER = struct.Struct("<I")
#: In place of a value's name: the others will not come.
_GIVEN_UP = None
#: Where a value may begin: elements of any type lie well there.
_ALIGNMENT = 64
#: How long the memory of a snapshot is kept for the next one.
_SPARE_SECONDS = 600.0


class Snapshot:
    """Memory for copies of buffers, which the process that writes them has, too.

    Args:
        specs: form of each buffer.
        file: memory of an earlier snapshot, as an open file. Its pages are there already: most of the time of a first
            copy goes into making them.

    Attributes:
        file: the memory.
        places: where in it each buffer begins, in bytes.
    """

    def __init__(self, specs: Mapping[BufferId, pb.TensorSpec], file: IO[bytes] | None = None) -> None:
        self._specs = specs
        self.places: dict[BufferId, int] = {}
        size = 0
        for buffer_id, spec in specs.items():
            self.places[buffer_id] = size
            size += -(-_num_bytes(spec) // _ALIGNMENT) * _ALIGNMENT
        self.file = file or os.fdopen(os.memfd_create("torchways-checkpoint", os.MFD_CLOEXEC), "r+b", buffering=0)
        self.file.truncate(max(size, _ALIGNMENT))

    def keep(self, buffer_id: BufferId, value: torch.Tensor) -> None:
        """Copies a value to its place.

        Raises:
            UserError: it has another form than the client said.
            CheckpointError: there is no memory for it.
        """
        spec = self._specs[buffer_id]
        if tuple(value.shape) != tuple(spec.shape) or value.dtype != _dtype(spec):
            raise UserError(
                f"buffer {buffer_id} is {value.dtype}{list(value.shape)}, but {spec.dtype}{list(spec.shape)} is to be "
                "saved"
            )
        content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        done = 0
        try:
            while done < len(content):
                done += os.pwrite(self.file.fileno(), content[done:], self.places[buffer_id] + done)
        except OSError as error:
            raise CheckpointError(str(error)) from error


def _dtype(spec: pb.TensorSpec) -> torch.dtype:
    found = getattr(torch, spec.dtype, None)
    if not isinstance(found, torch.dtype):
        raise UserError(f"{spec.dtype!r} is no type of a tensor")
    return found


def _num_bytes(spec: pb.TensorSpec) -> int:
    return torch.Size(spec.shape).numel() * _dtype(spec).itemsize


class CheckpointWriter:
    """The executor's end. The process is started by the first checkpoint, and serves one at a time.

    All but `write` is for the executor's loop.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        #: Memory of the last snapshot, for the next one.
        self._spare: IO[bytes] | None = None
        self._forgetting: asyncio.TimerHandle | None = None

    def snapshot(self, specs: Mapping[BufferId, pb.TensorSpec]) -> Snapshot:
        """Returns memory for buffers of these forms; `give_back` it."""
        file, self._spare = self._spare, None
        return Snapshot(specs, file)

    def give_back(self, snapshot: Snapshot) -> None:
        """Takes back the memory of a snapshot that nobody reads or writes any more; keeps it for a while."""
        self._spare = snapshot.file
        if self._forgetting is not None:
            self._forgetting.cancel()
        self._forgetting = asyncio.get_running_loop().call_later(_SPARE_SECONDS, self._forget)

    def _forget(self) -> None:
        self._spare = None  # closed by whoever has it last

    def start(self) -> None:
        """Starts the process, if it does not run; it ends with the thread that starts it."""
        if self._process is not None and self._process.poll() is None:
            return
        if self._socket is not None:
            self._socket.close()
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "torchways.executor.checkpoint_writer", str(os.getpid())]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
            )
        _set_idle(self._process, True)  # at once: importing PyTorch takes longer than many a save

    def write(
        self,
        folder: str,
        prefix: str,
        buffers: Mapping[str, tuple[BufferId, pb.TensorSpec]],
        snapshot: Snapshot,
        wait_for: Callable[[str], None],
    ) -> list[pb.SavedTensor]:
        """Has values written to a new file of a checkpoint, and waits until the disk has it.

        Args:
            folder: the checkpoint's.
            prefix: of the file's name.
            buffers: by their names in the checkpoint.
            snapshot: has, or will have, their values.
            wait_for: waits until the snapshot has the value of a name.

        Returns:
            Where each of them is.

        Raises:
            CheckpointError: the file cannot be written, or the process ended.
            TorchwaysError: what `wait_for` raises.
        """
        request = {
            "folder": folder,
            "prefix": prefix,
            "tensors": {
                name: {"dtype": spec.dtype, "shape": list(spec.shape), "start": snapshot.places[buffer_id]}
                for name, (buffer_id, spec) in buffers.items()
            },
        }
        with self._lock, contextlib.ExitStack() as stack:
            connection, process = self._socket, self._process
            assert connection is not None
            assert process is not None
            file = snapshot.file.fileno()
            stack.enter_context(_with_idle_time(process))
            try:
                socket.send_fds(connection, [b"f"], [file])
                _send(connection, request)
                for name in buffers:
                    wait_for(name)
                    _send(connection, name)
                answer = _receive(connection)
            except OSError as error:
                code = process.wait()
                raise CheckpointError(f"the process that writes checkpoints has ended (exit code {code})") from error
            except BaseException:  # it waits for values that do not come; whoever is next needs it
                _give_up(connection)
                raise
        if "error" in answer:
            raise CheckpointError(answer["error"])
        return [pb.SavedTensor(**tensor) for tensor in answer["tensors"]]


def _give_up(connection: socket.socket) -> None:
    """Has the process leave the checkpoint that it writes, and waits until it has."""
    with contextlib.suppress(OSError):  # it has ended
        _send(connection, _GIVEN_UP)
        _receive(connection)


@contextlib.contextmanager
def _with_idle_time(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """While inside, for `_IDLE_SECONDS` at most, a process has only processor time that nobody else wants."""
    _set_idle(process, True)
    timer = threading.Timer(_IDLE_SECONDS, _set_idle, (process, False))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _set_idle(process: subprocess.Popen[bytes], idle: bool) -> None:
    if not hasattr(os, "SCHED_IDLE"):  # Linux has it
        return
    policy = os.SCHED_IDLE if idle else os.SCHED_OTHER
    with contextlib.suppress(OSError):  # it has ended
        for thread in os.listdir(f"/proc/{process.pid}/task"):
            os.sched_setscheduler(int(thread), policy, os.sched_param(0))


def _send(connection: socket.socket, message: Any) -> None:
    data = json.dumps(message).encode()
    connection.sendall(_HEADER.pack(len(data)) + data)


def _receive(connection: socket.socket) -> Any:
    [size] = _HEADER.unpack(_bytes(connection, _HEADER.size))
    return json.loads(_bytes(connection, size))


def _bytes(connection: socket.socket, size: int) -> bytes:
    data = connection.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise ConnectionResetError("the other end closed the connection")
    return data


class _Values:
    """The values of one checkpoint, in the process that writes them."""

    def __init__(self, connection: socket.socket, file: int, tensors: Mapping[str, Mapping[str, Any]]) -> None:
        self.specs = {name: pb.TensorSpec(dtype=item["dtype"], shape=item["shape"]) for name, item in tensors.items()}
        self._connection = connection
        self._memory = mmap.mmap(file, 0)
        self._starts = {name: item["start"] for name, item in tensors.items()}
        self._missing = set(tensors)

    def value_of(self, name: str) -> torch.Tensor:
        """Waits for a value."""
        while name in self._missing:
            self._take()
        spec, start = self.specs[name], self._starts[name]
        size = _num_bytes(spec)
        if not size:
            return torch.empty(tuple(spec.shape), dtype=_dtype(spec))
        content = torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=start)
        return content.view(_dtype(spec)).reshape(tuple(spec.shape))

    def take_rest(self) -> None:
        """Waits for word of all values."""
        with contextlib.suppress(CheckpointError):
            while self._missing:
                self._take()

    def _take(self) -> None:
        name = _receive(self._connection)
        if name is _GIVEN_UP:
            self._missing.clear()
            raise CheckpointError("the checkpoint was given up")
        self._missing.remove(name)


def _serve(connection: socket.socket) -> None:
    while True:
        sign, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(4))
        if not sign:
            return
        [(_, _, data)] = ancillary
        [file] = array.array("i", data)
        request = _receive(connection)
        values = _Values(connection, file, request["tensors"])
        os.close(file)
        try:
            written = checkpoint_files.write(request["folder"], request["prefix"], values.specs, values.value_of)
            answer: dict[str, Any] = {
                "tensors": [
                    {"name": item.name, "file": item.file, "offset": item.offset, "length": item.length}
                    for item in written
                ]
            }
        except ConnectionError:
            return  # the executor has ended, or given it up
        except (OSError, TorchwaysError) as error:
            answer = {"error": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        values.take_rest()
        del values  # and its mapping of the memory, which the storage writer's objects refer to in a cycle
        gc.collect()
        _send(connection, answer)


def main() -> None:
    """Entry point: the executor's pid, and the number of an open socket to it."""
    parent_pid, number = (int(argument) for argument in sys.argv[1:])
    die_with_parent(parent_pid)
    setup_process("checkpoint writer")
    os.nice(_NICENESS)
    with contextlib.suppress(OSError, AttributeError):  # not every system knows priorities of a disk
        psutil.Process().ionice(psutil.IOPRIO_CLASS_BE, 7)
    torch.set_num_threads(1)
    gc.freeze()  # the libraries' objects live for ever
    with contextlib.suppress(ConnectionError):
        _serve(socket.socket(fileno=number))


if __name__ == "__main__":
    main()
