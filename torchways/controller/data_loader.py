"""`tw.data_loader`: batches that are read beside a slice's executors and never pass the controller.

The controller asks a data process (torchways/data/server.py) for batches by number, some ahead of those that the user
takes. The process puts each on the slice's executors, under ids that the controller names, and answers with shapes and
structure. So a batch costs the controller one small message and its answer, whatever its size.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol

import grpc
import grpc.aio
import torch

from torchways.array import Array
from torchways.controller.buffers import RemoteBuffer
from torchways.controller.session import Session
from torchways.data.batches import NO_STATE, Batches
from torchways.data.spec import MAX_TENSORS, LoaderSpec, Position
from torchways.data.trees import flatten, unflatten
from torchways.errors import (
    ConfigError,
    DataError,
    DataProcessLost,
    InfraError,
    PlacementError,
    TorchwaysError,
    UserError,
)
from torchways.ids import BufferId, SliceId
from torchways.ir.sizes import logical_bytes
from torchways.mesh import VirtualSlice, normalize_placements
from torchways.rpc.clients import DataProcessClient
from torchways.signals import result_of, uninterrupted

logger = logging.getLogger(__name__)

#: Batches that runs in flight may still read: so many bytes, but at least and at most so many batches.
_BYTES_IN_USE = 256 << 20
_BATCHES_IN_USE = (2, 64)
#: How long an error waits for word of how a data process ended.
_REASON_SECONDS = 3.0
#: How much later than of a data process's end word of its executor's end may come: on another stream.
_LATER_SECONDS = 0.5
_LOG_SECONDS = 10.0


class Source(Protocol):
    """Where an `ArrayLoader` has its batches from.

    Attributes:
        num_batches: of a pass; None: not known.
    """

    num_batches: int | None

    def begin(self, position: Position) -> None:
        """Starts a pass at a position; what is left of the pass before is given up."""

    def take(self) -> tuple[Any, Position] | None:
        """Waits for the next batch; returns it with the position behind it, or None at the end of the pass."""

    def close(self) -> None:
        """Ends its processes."""


class ArrayLoader:
    """An iterable over a dataset's batches, as arrays on a slice. Made by `tw.data_loader`.

    Each `iter()` starts a new pass over the dataset: an epoch. The first has the number 0. With ``shuffle=True`` each
    epoch has another order, which depends on the seed and the number alone.
    """

    def __init__(self, source: Source, spec: LoaderSpec) -> None:
        self._source = source
        self._spec = spec
        #: Behind the last batch that was taken.
        self._position = Position()
        #: Where the next pass begins, if it was loaded.
        self._resumed: Position | None = None
        #: Whether `set_epoch` named its epoch since: the next pass is then the rest of that epoch, even if it is empty.
        self._is_named = False
        self._next_epoch = 0
        #: Rises with each pass: an iterator of an earlier one is of no use any more.
        self._pass_number = 0
        self._closed = False

    def __iter__(self) -> Iterator[Any]:
        if self._closed:
            raise UserError("this data loader is closed; make a new one with tw.data_loader")
        position = self._resumed or Position(epoch=self._next_epoch)
        if self._is_over(position) and not self._is_named:
            position = Position(epoch=position.epoch + 1)
        iterator = _PassIterator(self, self._pass_number + 1, is_resumed=position.batch > 0 and not self._is_named)
        self._pass_number += 1
        if self._is_over(position):
            iterator.is_over = True
            self._next_epoch = position.epoch + 1
        else:
            self._begin(position)
        self._resumed = None
        return iterator

    def _is_over(self, position: Position) -> bool:
        """Whether a position is known to be behind the last batch of its epoch."""
        if self._source.num_batches is None:  # within a pass, an iterable dataset's loader always has a state
            return position.batch > 0 and position.state is None
        return position.batch >= self._source.num_batches > 0

    def _begin(self, position: Position) -> None:
        self._source.begin(position)
        self._position = position
        self._next_epoch = position.epoch + 1

    def __len__(self) -> int:
        """Returns the number of batches of an epoch.

        Raises:
            TypeError: nobody knows, as of an IterableDataset.
        """
        if self._source.num_batches is None:
            raise TypeError(f"the number of batches of dataset {self._spec.dataset!r} is not known")
        return self._source.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Sets the number of the next pass, as a DistributedSampler has it.

        If a position in this epoch was loaded, the next pass still begins there: with nothing to yield, if that is
        behind the last batch.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ConfigError(f"set_epoch takes a whole number of at least 0, not {epoch!r}")
        if self._resumed is not None and self._resumed.epoch != epoch:
            self._resumed = None
        self._is_named = self._resumed is not None
        self._next_epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Returns the position behind the last batch that was taken: plain values, for a checkpoint.

        Raises:
            DataError: an iterable dataset's own state cannot be written down.
        """
        position = self._position
        if isinstance(position.state, dict) and NO_STATE in position.state:
            raise DataError(f"the position in dataset {self._spec.dataset!r} is not known: {position.state[NO_STATE]}")
        place = {"epoch": position.epoch, "batch": position.batch, "state": position.state}
        return {**self._spec.identity(), "num_workers": self._spec.num_workers, **place}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Makes the next `iter()` go on where `state_dict` was called: its first batch is the one that came next then.

        Behind the last batch of an epoch that is the first of the next, unless `set_epoch` names the epoch that is
        over: its pass is then empty.

        Raises:
            ConfigError: it is the position of another loader: of another dataset, seed or batch size, or in an iterable
                dataset of another number of workers.
        """
        mine = self._spec.identity()
        if not isinstance(state_dict, Mapping):
            raise ConfigError(f"this is no data loader's state_dict: {state_dict!r}")
        missing = {*mine, "epoch", "batch", "state"} - set(state_dict)
        if missing:
            raise ConfigError(f"this is no data loader's state_dict: it has no {', '.join(sorted(missing))}")
        if state_dict.get("state") is not None and "num_workers" in state_dict:
            mine = {**mine, "num_workers": self._spec.num_workers}
        for name, value in mine.items():
            if state_dict[name] != value:
                raise ConfigError(
                    f"the position is that of a data loader with {name}={state_dict[name]!r}, but this one has "
                    f"{name}={value!r}: batches would not be those that come next. Make the loader with the same {name}"
                )
        position = Position.from_json(json.dumps({key: state_dict[key] for key in ("epoch", "batch", "state")}))
        self._pass_number += 1
        self._position = self._resumed = position
        self._is_named = False
        self._next_epoch = position.epoch

    def close(self) -> None:
        """Ends the processes of the loader. Its arrays stay. A second call does nothing."""
        self._closed = True
        self._pass_number += 1
        self._source.close()

    def _take(self, iterator: _PassIterator) -> Any:
        if iterator.number != self._pass_number:
            raise UserError(
                "this iterator of a data loader is of no use any more: another iter(), load_state_dict() or close() "
                "came after it. Use one iterator at a time"
            )
        found = self._source.take()
        if found is None and iterator.is_resumed:  # the position was behind the last batch of an epoch
            self._begin(Position(epoch=self._position.epoch + 1))
            found = self._source.take()
        iterator.is_resumed = False
        if found is None:
            self._position = replace(self._position, state=None)  # the epoch is over
            iterator.is_over = True
            raise StopIteration
        batch, self._position = found
        return batch


class _PassIterator:
    """The batches of one pass.

    Attributes:
        number: of the pass.
        is_resumed: it began in the middle of an epoch, and nothing was taken yet.
        is_over: it came to the end.
    """

    def __init__(self, loader: ArrayLoader, number: int, *, is_resumed: bool) -> None:
        self._loader = loader
        self.number = number
        self.is_resumed = is_resumed
        self.is_over = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.is_over:
            raise StopIteration
        return self._loader._take(self)


def normalized_rules(placements: Any, meshes: Sequence[VirtualSlice]) -> dict[str, tuple[Any, ...]]:
    """Returns the argument `placements` of `tw.data_loader` as plain values, on the axes of whole slices.

    Raises:
        PlacementError: a placement is unknown, or there is not one for each axis.
    """
    if placements is None:
        return {}
    by_key = placements if isinstance(placements, Mapping) else {"": placements}
    return {str(key): _rule(entry, meshes) for key, entry in by_key.items()}


def _rule(entry: Any, meshes: Sequence[VirtualSlice]) -> tuple[Any, ...]:
    if not isinstance(entry, (list, tuple)):
        raise PlacementError(
            "placements of a data loader's tensors must be a list with one placement per mesh axis, or a partition "
            f"spec, not {entry!r}; to give them by key, use a dict of such lists"
        )
    # Of a tensor with all the dimensions that are named: a partition spec has no more, and Shard(-1) has no meaning.
    if all(item is None or isinstance(item, (tuple, list)) for item in entry) or any(
        isinstance(item, str) and item in mesh.mesh_dim_names for item in entry for mesh in meshes
    ):
        return tuple(tuple(item) if isinstance(item, list) else item for item in entry)
    texts: list[str] = []
    for item in entry:
        dim = getattr(item, "dim", None)
        if isinstance(dim, int) and dim < 0:
            raise PlacementError(
                f"{item!r} of a data loader: batches differ in shape, so count dimensions from the first"
            )
        texts.append(item if isinstance(item, str) else f"S({dim})" if getattr(item, "is_shard", bool)() else "R")
        if not isinstance(item, str) and not hasattr(item, "is_replicate"):
            raise PlacementError(
                f"unknown placement {item!r}: use Shard(dim) or Replicate() of torch.distributed.tensor"
            )
    dims = [int(text[2:-1]) for text in texts if text != "R" and text[2:-1].isdigit()]
    sizes = [1] * (max(dims, default=-1) + 1)
    for mesh in meshes:
        for dim in dims:
            sizes[dim] *= mesh.size()
        # Says what is wrong, and gives the axes that a sub-mesh leaves out.
        found = normalize_placements(texts, mesh, sizes)
    return found


class EagerSource:
    """The batches in this process, as plain tensors; one loader a part."""

    def __init__(self, specs: Sequence[LoaderSpec], *, is_list: bool) -> None:
        self._batches = [Batches(spec) for spec in specs]
        self._is_list = is_list
        self._items: list[Iterator[tuple[Any, Position]]] = []
        #: Of the pass under way: it stays, as that of a data process does.
        self._failure: TorchwaysError | None = None
        self.num_batches = self._batches[0].num_batches

    def begin(self, position: Position) -> None:
        """See `Source`."""
        self.close()
        self._failure = None
        self._items = [batches.begin(position) for batches in self._batches]

    def take(self) -> tuple[Any, Position] | None:
        """See `Source`."""
        if self._failure is not None:
            raise self._failure
        batches = []
        try:
            found = [next(items, None) for items in self._items]
            if found[0] is None:
                return None
            for item in found:
                assert item is not None
                structure, tensors, _ = flatten(item[0])
                batches.append(unflatten(structure, tensors))
        except TorchwaysError as error:
            self._failure = error
            raise
        return batches if self._is_list else batches[0], found[0][1]

    def close(self) -> None:
        """See `Source`."""
        items, self._items = self._items, []
        for iterator in items:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()


@dataclass(slots=True)
class _OnSlice:
    """A batch that is on its slice."""

    structure: Any
    buffers: list[tuple[RemoteBuffer, tuple[int, ...], torch.dtype]]
    state: Any
    nbytes: int

    def arrays(self) -> Any:
        """Returns the batch, with new arrays for its tensors."""
        return unflatten(self.structure, [Array(buffer, shape, dtype) for buffer, shape, dtype in self.buffers])


class _Part:
    """The data process of one slice. Coroutines are for the session's loop."""

    def __init__(self, spec: LoaderSpec, mesh: VirtualSlice, session: Session) -> None:
        self.spec = spec
        self.mesh = mesh.root
        self._session = session
        self._process_id: int | None = None
        self._client: DataProcessClient | None = None
        #: Where the process is; a slice that is moved has another.
        self._slice_id: SliceId | None = None
        self._pass_number = 0

    @property
    def is_moved(self) -> bool:
        """Whether the slice is somewhere else since the process was started."""
        return self._slice_id != self.mesh.slice_id

    async def start(self) -> int | None:
        """Starts the process and makes the dataset; returns the number of batches, if it is known."""
        session, manager = self._session, self._session.connections.manager
        self._slice_id = self.mesh.slice_id
        self._process_id = await manager.start_data_process(self._slice_id)
        address = await manager.wait_data_process(self._process_id, session.slices.start_timeout)
        self._client = DataProcessClient(address, manager.metadata)
        try:
            return await self._client.open(self.spec.to_json())
        except grpc.aio.AioRpcError as error:
            raise await self._lost(error) from error

    async def begin(self, position: Position) -> None:
        """Starts a pass."""
        assert self._client is not None
        assert self._slice_id is not None
        address = self._session.slices.address_now(self.mesh)
        paths = [executor.local_address for executor in address.executors]
        self._pass_number += 1
        try:
            await self._client.begin(self._pass_number, position.to_json(), self._slice_id, self.mesh, paths)
        except grpc.aio.AioRpcError as error:
            raise await self._lost(error) from error

    async def take(self, pass_number: int, number: int) -> _OnSlice | None:
        """Waits for a batch of a pass; returns None at the end."""
        assert self._client is not None
        assert self._slice_id is not None
        session, slice_id = self._session, self._slice_id
        first = session.new_ids(MAX_TENSORS)
        try:
            taken = await self._client.take(pass_number, number, first)
        except (grpc.aio.AioRpcError, TorchwaysError) as error:
            self._release(slice_id, first)
            if isinstance(error, grpc.aio.AioRpcError) or type(error) is InfraError:
                raise await self._lost(error) from error
            raise
        except BaseException:  # the channel was closed: nobody waits any more
            self._release(slice_id, first)
            raise
        if taken is None:
            return None
        buffers, nbytes = [], 0
        for index, (dtype, shape, placements) in enumerate(taken.tensors):
            buffer = RemoteBuffer(session, self.mesh, placements, BufferId(first + index))
            buffers.append((buffer, shape, getattr(torch, dtype)))
            nbytes += logical_bytes(dtype, shape)
        return _OnSlice(json.loads(taken.structure), buffers, json.loads(taken.state), nbytes)

    def _release(self, slice_id: SliceId, first: int) -> None:
        """Gives back the buffers of a batch of which some may be on the slice."""
        for buffer_id in range(first, first + MAX_TENSORS):
            self._session.values.release(slice_id, BufferId(buffer_id))

    def take_later(self, number: int) -> concurrent.futures.Future[_OnSlice | None]:
        """Starts waiting for a batch of the pass under way."""
        return self._session.connections.loop.start(self.take(self._pass_number, number))

    async def _lost(self, error: Exception) -> TorchwaysError:
        """Returns the error for a process or executor that cannot be reached, with the reason if word of it comes."""
        session = self._session
        deadline = time.monotonic() + _REASON_SECONDS
        process_id = self._process_id or 0  # 0: its loader was closed
        reason: TorchwaysError | None = None
        while True:
            if session.connections.broken is not None:
                return session.connections.broken
            if (lost := session.slices.lost_executor_error(self.mesh)) is not None:
                return lost
            if isinstance(reason, DataProcessLost):  # of an executor's end, which ends it too, we had heard by now
                return DataProcessLost(
                    f"the data process of dataset {self.spec.dataset!r} is gone: {reason}. Make the loader anew and "
                    "load its position"
                )
            try:
                await session.connections.manager.wait_data_process(process_id, timedelta(seconds=_REASON_SECONDS))
            except TorchwaysError as found:
                reason = found
            if isinstance(reason, DataProcessLost):
                await asyncio.sleep(_LATER_SECONDS)
                continue
            if time.monotonic() > deadline:
                text = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else error
                return DataProcessLost(f"the data process of dataset {self.spec.dataset!r} cannot be reached ({text})")
            await asyncio.sleep(0.05)

    async def end(self) -> None:
        """Ends the process."""
        process_id, self._process_id = self._process_id, None
        client, self._client = self._client, None
        if client is not None:
            await client.close()
        if process_id is not None:
            with contextlib.suppress(TorchwaysError):  # with the cluster, it is gone
                await self._session.connections.manager.end_data_process(process_id)

    def __del__(self) -> None:
        if self._process_id is not None and self._session.is_usable():
            with contextlib.suppress(RuntimeError):  # the loop is closed: the interpreter is shutting down
                self._session.connections.loop.start(_end(self._session, self._process_id, self._client))


async def _end(session: Session, process_id: int, client: DataProcessClient | None) -> None:
    """Ends a process whose loader is gone."""
    if client is not None:
        await client.close()
    with contextlib.suppress(TorchwaysError):
        await session.connections.manager.end_data_process(process_id)


class ClusterSource:
    """The batches of data processes, as arrays on their slices."""

    def __init__(
        self,
        specs: Sequence[LoaderSpec],
        meshes: Sequence[VirtualSlice],
        prefetch: int,
        session: Session,
        *,
        is_list: bool,
    ) -> None:
        """Starts the processes and makes the datasets.

        Raises:
            DataError: a dataset cannot be made.
            ConfigError: an option does not fit, or the cluster runs no code of clients.
        """
        self._session = session
        self._prefetch = prefetch
        self._is_list = is_list
        self._parts = [_Part(spec, mesh, session) for spec, mesh in zip(specs, meshes, strict=True)]
        self.num_batches: int | None = None
        self._position = Position()
        #: Of the pass under way: futures of the batches that were asked for, one a part.
        self._ahead: collections.deque[list[concurrent.futures.Future[_OnSlice | None]]] = collections.deque()
        self._next_number = 0
        #: Ids that the session had not given out when each of the last batches was taken.
        self._marks: collections.deque[int] = collections.deque()
        self._max_in_use = _BATCHES_IN_USE[0]
        self._start()

    def _start(self) -> None:
        try:
            counts = self._wait(self._on_all(_Part.start), "a dataset")
        except BaseException:
            self.close()
            raise
        self.num_batches = counts[0]

    def _on_all(self, call: Callable[[_Part], Any]) -> concurrent.futures.Future[list[Any]]:
        async def run() -> list[Any]:
            results = await asyncio.gather(*map(call, self._parts), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            return results

        return self._session.connections.loop.start(run())

    def _wait(self, future: concurrent.futures.Future[Any], what: str) -> Any:
        """Waits for what a data process answers; it ends if the process does, or the session."""
        while True:
            try:
                return result_of(future, _LOG_SECONDS)
            except concurrent.futures.TimeoutError:
                if future.done():
                    raise
                logger.info("waiting for %s of %r", what, self._parts[0].spec.dataset)
            except concurrent.futures.CancelledError:
                self._session.check()
                raise

    def begin(self, position: Position) -> None:
        """See `Source`."""
        self._session.check()
        self._ahead.clear()
        self._position = position
        for part in self._parts:
            self._session.slices.address(part.mesh)  # its executors are ready
        if any(part.is_moved for part in self._parts):
            self._wait(self._on_all(_Part.end), "the end")
            self._start()
        self._wait(self._on_all(lambda part: part.begin(position)), "a pass")
        self._next_number = position.batch
        self._ask(self._prefetch)

    def _ask(self, count: int) -> None:
        """Asks for the next batches, as far as they were not asked for."""
        while len(self._ahead) < count:
            self._ahead.append([part.take_later(self._next_number) for part in self._parts])
            self._next_number += 1

    def take(self) -> tuple[Any, Position] | None:
        """See `Source`."""
        session = self._session
        session.check()
        for part in self._parts:
            session.slices.address(part.mesh)  # raises where it is closed
            if part.is_moved:
                self.begin(self._position)
                break
        while len(self._marks) > self._max_in_use:
            # Runs that were sent before the second-oldest batch was taken may read the oldest; none younger does.
            session.runs.wait_for_those_before(self._marks[1])
            self._marks.popleft()
        self._ask(1 + self._prefetch)
        futures = self._ahead[0]
        found = [self._wait(future, f"batch {self._position.batch}") for future in futures]
        if any(batch is None for batch in found):
            self._ahead.clear()
            return None
        largest = max(sum(batch.nbytes for batch in found), 1)
        least, most = _BATCHES_IN_USE
        self._max_in_use = max(least, min(most, _BYTES_IN_USE // largest))
        self._marks.append(session.new_ids(1))
        position = Position(epoch=self._position.epoch, batch=self._position.batch + 1, state=found[0].state)
        with uninterrupted():
            self._ahead.popleft()
            self._position = position
        arrays = [batch.arrays() for batch in found]
        return arrays if self._is_list else arrays[0], self._position

    def close(self) -> None:
        """See `Source`."""
        self._ahead.clear()
        if self._session.is_usable():
            self._wait(self._on_all(_Part.end), "the end")


def make_loader(
    spec: LoaderSpec,
    mesh: VirtualSlice | Sequence[VirtualSlice],
    placements: Any,
    prefetch: int,
    get_session: Callable[[], Session] | None,
) -> ArrayLoader:
    """See `tw.data_loader`; `get_session` is None in eager mode."""
    is_list = not isinstance(mesh, VirtualSlice)
    meshes = [mesh] if isinstance(mesh, VirtualSlice) else list(mesh)
    if not meshes:
        raise PlacementError("tw.data_loader needs a slice, or several; the list is empty")
    if isinstance(prefetch, bool) or not isinstance(prefetch, int) or prefetch < 0:
        raise ConfigError(f"prefetch must be a whole number of at least 0, not {prefetch!r}")
    rules = normalized_rules(placements, meshes)
    whole = replace(spec, num_parts=len(meshes), rules=rules)
    # As other processes would have it: what JSON changes (tuples) is the same in eager mode.
    specs = [LoaderSpec.from_json(replace(whole, part_index=index).to_json()) for index in range(len(meshes))]
    source: Source
    if get_session is None:
        source = EagerSource(specs, is_list=is_list)
    else:
        source = ClusterSource(specs, meshes, prefetch, get_session(), is_list=is_list)
    return ArrayLoader(source, specs[0])
