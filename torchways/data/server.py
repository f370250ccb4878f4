"""The data process: one input pipeline of one client, beside the executors of a slice.

The main thread makes batches: PyTorch's loader forks its workers there, and Python tells only that thread of a worker
that dies. gRPC's loop has a thread of its own and hands requests over. A batch that was asked for goes to the executors
as soon as it is there, and then the controller is told what it is like. Nothing is made that was not asked for, but
what PyTorch's workers prefetch.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import json
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import torch

from torchways.data.batches import Batches, failed
from torchways.data.spec import MAX_TENSORS, LoaderSpec, Position, Rule
from torchways.data.trees import flatten
from torchways.errors import ConfigError, DataError, Failure, TorchwaysError, failure_from
from torchways.ids import ClientId
from torchways.mesh import VirtualSlice, data_placements, normalize_placements
from torchways.observability.process import die_with_parent, setup_process
from torchways.rpc import channel, convert
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.identity import CLIENT_SECRET_VARIABLE, Caller, OneIdentity, Role
from torchways.rpc.local_values import LocalExecutors, shareable

logger = logging.getLogger(__name__)

#: Of a batch's containers and plain values, as JSON: one message has to hold them.
_MAX_STRUCTURE_BYTES = 1 << 20
#: Of a traceback, the end: errors cross processes in one message.
_MAX_TEXT = 1 << 16


class _WorkerDeaths:
    """Where PyTorch's loader may raise that a worker has died: while a batch is awaited.

    Its handler of SIGCHLD raises on the main thread, wherever that is: between two steps of ours, a request could be
    lost.
    """

    def __init__(self) -> None:
        self._theirs: Any = None
        self._is_awaited = False

    def confine(self) -> None:
        """Puts our handler before the one that PyTorch's loader has installed when it started its first worker."""
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and handler != self._on_signal:
            self._theirs = handler
            signal.signal(signal.SIGCHLD, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._is_awaited:
            self._theirs(number, frame)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Raises deaths inside, and at once those since the last time."""
        self._is_awaited = True
        try:
            if self._theirs is not None:
                self._theirs(signal.SIGCHLD, None)
            yield
        finally:
            self._is_awaited = False


class _Pass:
    """A pass over the dataset, for one slice.

    Attributes:
        number: of the pass.
        wanted: requests for batches that were not made yet, by the batch's number.
        next: number of the batch that the loader makes next.
        over: the answer to whatever is asked for from now on: the end, or the failure.
    """

    def __init__(
        self,
        request: pb.BeginPassRequest,
        batches: Batches,
        token: str,
        identity: OneIdentity,
        worker_deaths: _WorkerDeaths,
    ) -> None:
        position = Position.from_json(request.position)
        self.number = request.pass_number
        self.next = position.batch
        self.wanted: dict[int, tuple[pb.TakeBatchRequest, _Answer]] = {}
        self.over: pb.TakeBatchResponse | None = None
        self.mesh = VirtualSlice(shape=tuple(request.mesh_shape), mesh_dim_names=tuple(request.axis_names))
        self.slice_id = request.slice_id
        self._rules = batches.spec.rules
        self._executors = LocalExecutors(request.local_addresses, token, str(identity))
        self._items: Iterator[tuple[Any, Position]] = batches.begin(position)
        self._worker_deaths = worker_deaths
        worker_deaths.confine()

    def make_next(self, request: pb.TakeBatchRequest) -> pb.TakeBatchResponse:
        """Makes the next batch and brings it to the executors."""
        with self._worker_deaths.raised():
            found = next(self._items, None)
        if found is None:
            return pb.TakeBatchResponse(end=True)
        batch, position = found
        structure, tensors, keys = flatten(batch)
        if len(tensors) > MAX_TENSORS:
            raise DataError(f"batch {self.next} has {len(tensors)} tensors, but at most {MAX_TENSORS} are possible")
        specs = [self._spec(tensor, key) for tensor, key in zip(tensors, keys, strict=True)]
        puts = [
            (
                pb.PutChunk(
                    buffer_id=request.first_buffer_id + index,
                    value=pb.HostValue(spec=spec),
                    slice_id=self.slice_id,
                    mesh_shape=self.mesh.shape,
                ),
                shareable(tensor),
            )
            for index, (spec, tensor) in enumerate(zip(specs, tensors, strict=True))
        ]
        text = json.dumps(structure)
        if len(text) > _MAX_STRUCTURE_BYTES:
            raise DataError(
                f"batch {self.next} has {len(text):,} bytes of strings, numbers and keys, which go to the controller, "
                f"but at most {_MAX_STRUCTURE_BYTES:,} are possible: make tensors of them in collate_fn"
            )
        self._executors.put(puts)
        self.next += 1
        return pb.TakeBatchResponse(batch=pb.Batch(structure=text, tensors=specs, state=json.dumps(position.state)))

    def _spec(self, tensor: torch.Tensor, key: str) -> pb.TensorSpec:
        shape = tuple(tensor.shape)
        where = f"batch {self.next} of the data loader" + (f", {key!r}" if key else "")
        rule: Rule | None = self._rules.get(key, self._rules.get(""))
        if rule is None:
            placements = data_placements(shape, self.mesh.shape, self.mesh.mesh_dim_names, where)
        else:
            try:
                placements = normalize_placements(rule, self.mesh, shape)
            except TorchwaysError as error:
                raise type(error)(f"{where}: {error}") from error
        return pb.TensorSpec(dtype=str(tensor.dtype).removeprefix("torch."), shape=shape, placements=placements)

    def end(self) -> None:
        """Ends the workers and answers whoever waits."""
        # The iterator's end ends the workers; a worker that is to end may be killed, which is no failure any more.
        try:
            close: Callable[[], None] | None = getattr(self._items, "close", None)
            if close is not None:
                close()
        except Exception as error:
            logger.info("while ending a pass: %s", error)
        self._executors.close()
        for _, answer in self.wanted.values():
            _set(answer, pb.TakeBatchResponse(end=True))
        self.wanted.clear()


_Answer = concurrent.futures.Future


class DataProcess(pb_grpc.DataProcessServicer):
    """See the module's docstring."""

    def __init__(self, token: str, identity: OneIdentity) -> None:
        self._token = token
        self._identity = identity
        self._process = f"data process {os.getpid()}"
        #: What the main thread is to do next.
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._batches: Batches | None = None
        self._pass: _Pass | None = None
        self._worker_deaths = _WorkerDeaths()

    # ---- gRPC's loop

    async def OpenDataset(
        self, request: pb.OpenDatasetRequest, context: grpc.aio.ServicerContext
    ) -> pb.OpenDatasetResponse:
        """Imports and makes the dataset."""
        return await self._on_main(lambda answer: self._open(request, answer))

    async def BeginPass(self, request: pb.BeginPassRequest, context: grpc.aio.ServicerContext) -> pb.BeginPassResponse:
        """Starts a pass."""
        return await self._on_main(lambda answer: self._begin(request, answer))

    async def TakeBatch(self, request: pb.TakeBatchRequest, context: grpc.aio.ServicerContext) -> pb.TakeBatchResponse:
        """Waits for a batch."""
        return await self._on_main(lambda answer: self._want(request, answer))

    async def _on_main(self, work: Callable[[Any], None]) -> Any:
        answer: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._inbox.put(lambda: work(answer))
        return await asyncio.wrap_future(answer)

    # ---- the main thread

    def run(self) -> None:
        """Does what is asked for, for ever."""
        while True:
            try:
                self._make_wanted()
                self._inbox.get()()
            except Exception as error:
                logger.info("a pass fails: %s", error)
                self._fail(error)

    def _make_wanted(self) -> None:
        """Makes batches that are asked for, in their order, until there is something else to do."""
        current = self._pass
        while current is not None and current.over is None and current.next in current.wanted and self._inbox.empty():
            number = current.next
            request, answer = current.wanted[number]
            response = current.make_next(request)
            del current.wanted[number]
            if response.end:
                self._finish(current, response)
            _set(answer, response)

    def _finish(self, current: _Pass, response: pb.TakeBatchResponse) -> None:
        current.over = response
        for _, answer in current.wanted.values():
            _set(answer, response)
        current.wanted.clear()

    def _fail(self, error: Exception) -> None:
        current = self._pass
        if current is None or current.over is not None:
            return
        if not isinstance(error, TorchwaysError):
            error = failed(f"batch {current.next} cannot be read", error)
        self._finish(current, pb.TakeBatchResponse(failure=self._failure(error)))

    def _failure(self, error: TorchwaysError) -> pb.Failure:
        failure = failure_from(error, process=self._process)
        text = getattr(error, "remote_traceback", "")
        return convert.failure_to_proto(
            Failure(kind=failure.kind, message=failure.message, process=failure.process, traceback=text[-_MAX_TEXT:])
        )

    def _open(self, request: pb.OpenDatasetRequest, answer: Any) -> None:
        try:
            if self._batches is not None:
                raise ConfigError("this process has a dataset already")
            self._batches = Batches(LoaderSpec.from_json(request.spec))
            _set(answer, pb.OpenDatasetResponse(num_batches=self._batches.num_batches))
        except TorchwaysError as error:
            _set(answer, pb.OpenDatasetResponse(failure=self._failure(error)))
        except Exception as error:
            _set(answer, pb.OpenDatasetResponse(failure=self._failure(failed("the dataset cannot be made", error))))

    def _begin(self, request: pb.BeginPassRequest, answer: Any) -> None:
        old, self._pass = self._pass, None
        if old is not None:
            old.end()
        try:
            if self._batches is None:
                raise ConfigError("there is no dataset yet")
            self._pass = _Pass(request, self._batches, self._token, self._identity, self._worker_deaths)
            _set(answer, pb.BeginPassResponse())
        except TorchwaysError as error:
            _set(answer, pb.BeginPassResponse(failure=self._failure(error)))
        except Exception as error:
            _set(answer, pb.BeginPassResponse(failure=self._failure(failed("a pass cannot begin", error))))

    def _want(self, request: pb.TakeBatchRequest, answer: Any) -> None:
        current = self._pass
        if current is None or request.pass_number != current.number:
            _set(answer, pb.TakeBatchResponse(end=True))
        elif current.over is not None:
            _set(answer, current.over)
        elif request.number < current.next or request.number in current.wanted:
            error = ConfigError(f"batch {request.number} was asked for already")
            _set(answer, pb.TakeBatchResponse(failure=self._failure(error)))
        else:
            current.wanted[request.number] = (request, answer)


def _set(answer: Any, value: Any) -> None:
    """Answers, unless the caller has given up."""
    if not answer.cancelled():
        try:
            answer.set_result(value)
        except concurrent.futures.InvalidStateError:
            logger.info("a caller gave up")


def _serve(process: DataProcess, arguments: argparse.Namespace, token: str, identity: OneIdentity) -> None:
    """Runs gRPC's loop; on a thread of its own."""

    async def serve() -> None:
        server = channel.make_server(token, identity)
        pb_grpc.add_DataProcessServicer_to_server(process, server)
        address = await channel.start_server(server, arguments.host)
        with os.fdopen(arguments.ready_fd, "w") as pipe:
            pipe.write(json.dumps({"address": address}) + "\n")
        await server.wait_for_termination()

    try:
        asyncio.run(serve())
    except BaseException:
        logger.exception("the data process cannot serve; ending")
    os._exit(70)


def main() -> None:
    """Entry point of `python -m torchways.data`; started by a node agent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--client-id", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    arguments = parser.parse_args()
    setup_process(arguments.name)
    die_with_parent(arguments.parent_pid)
    os.setpgid(0, 0)  # the node agent ends the group: this process and its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # what datasets print goes where errors go
    torch.set_num_threads(1)
    identity = OneIdentity(Caller(Role.CLIENT, ClientId(arguments.client_id)), os.environ.pop(CLIENT_SECRET_VARIABLE))
    token = channel.cluster_token()
    process = DataProcess(token, identity)
    threading.Thread(target=_serve, args=(process, arguments, token, identity), name="grpc", daemon=True).start()
    process.run()
