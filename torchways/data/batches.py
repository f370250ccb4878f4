"""A dataset and PyTorch's loaders over it: batches from any position on.

Their order, and random numbers in them, depend on seed, epoch and batch alone. It runs in a data process, and in the
user's own process in eager mode. It knows nothing of slices.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, default_convert

from torchways.data.spec import LoaderSpec, Position
from torchways.data.trees import decode_state, encode_state
from torchways.errors import ConfigError, DataError, ShapeError, TorchwaysError
from torchways.observability.process import die_with_parent

logger = logging.getLogger(__name__)

#: In place of the dataset's own state: why it has none, raised when somebody asks for the position.
NO_STATE = "no state"
#: Of the loader's state of an iterable dataset, as JSON: it comes with each batch.
_MAX_STATE_BYTES = 1 << 16


class Batches:
    """The batches of a dataset.

    Attributes:
        spec: what it was made of.
        num_batches: of a pass; None: nobody knows, or each pass has another number.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        """Makes the dataset.

        Raises:
            DataError: it, or `collate_fn`, cannot be imported, or its constructor raises.
            ConfigError: it is no dataset, or the options do not fit it.
        """
        self.spec = spec
        make = _imported("dataset", spec.dataset)
        try:
            self._dataset = make(*spec.args, **spec.kwargs)
        except Exception as error:
            raise failed(f"dataset {spec.dataset!r} cannot be made", error) from error
        plain = default_convert if spec.batch_size is None else default_collate
        self._collate = plain if spec.collate_fn is None else _imported("collate_fn", spec.collate_fn)
        self._is_iterable = isinstance(self._dataset, IterableDataset)
        self._check()
        self.num_batches = self._count()

    def begin(self, position: Position) -> Iterator[tuple[Any, Position]]:
        """Starts a pass at a position: starts workers, and returns the batches with the position behind each.

        Closing the iterator ends the workers.
        """
        loader = self._iterable_loader(position) if self._is_iterable else self._map_loader(position)
        generators: _Generators | None = None
        if self._is_iterable and not self.spec.num_workers:
            generators = _Generators(self._pass_seed(position))
        with generators or contextlib.nullcontext():
            items = iter(loader)  # PyTorch's workers start here, and not at the first batch
        return self._guarded(loader, items, position, generators)

    def _guarded(
        self, loader: Any, items: Iterator[Any], position: Position, generators: _Generators | None
    ) -> Iterator[tuple[Any, Position]]:
        number = position.batch
        try:
            while True:
                try:
                    with generators or contextlib.nullcontext():
                        batch = next(items)
                except StopIteration:
                    return
                except TorchwaysError:
                    raise
                except Exception as error:
                    raise failed(f"batch {number} of epoch {position.epoch} cannot be read", error) from error
                number += 1
                state = _state_of(loader) if self._is_iterable else None
                yield batch, Position(epoch=position.epoch, batch=number, state=state)
        finally:
            # The only way to end PyTorch's workers before the end of a pass but for the garbage collector's.
            shutdown = getattr(items, "_shutdown_workers", None)
            if shutdown is not None:
                shutdown()

    def _check(self) -> None:
        name = f"dataset {self.spec.dataset!r}, a {type(self._dataset).__name__},"
        if self._is_iterable:
            if self.spec.shuffle:
                raise ConfigError(f"{name} is an IterableDataset, which decides its own order: leave shuffle=False")
            if self.spec.num_parts > 1:
                raise ConfigError(
                    f"{name} is an IterableDataset, of which no part can be read alone: give one slice, or a dataset "
                    "with __getitem__ and __len__"
                )
        elif not (hasattr(self._dataset, "__getitem__") and hasattr(self._dataset, "__len__")):
            raise ConfigError(
                f"{name} has no __getitem__ and __len__; give it both, or make it a torch.utils.data.IterableDataset"
            )

    def _count(self) -> int | None:
        if self._is_iterable:
            return None
        try:
            return _Order(self.spec, len(self._dataset), Position()).num_batches
        except Exception as error:
            raise failed(f"the length of dataset {self.spec.dataset!r} cannot be known", error) from error

    def _pass_seed(self, position: Position) -> int:
        return _mixed(self.spec.seed, position.epoch, 0)

    def _options(self, position: Position) -> dict[str, Any]:
        spec = self.spec
        # PyTorch draws the seed of workers from it, and else from the process's own generator.
        generator = torch.Generator().manual_seed(self._pass_seed(position))
        options: dict[str, Any] = {"num_workers": spec.num_workers, "generator": generator}
        if spec.num_workers:
            options |= {"prefetch_factor": spec.prefetch_factor, "timeout": spec.timeout}
            options["worker_init_fn"] = _DieWith(os.getpid())
        return options

    def _map_loader(self, position: Position) -> Any:
        order = _Order(self.spec, len(self._dataset), position)
        batches: Dataset[Any] = _SeededBatches(
            self._dataset, self._collate, keeps_generators=self.spec.num_workers == 0
        )
        options = {**self._options(position), "collate_fn": _as_it_is}
        if self.spec.batch_size is None:
            return DataLoader(batches, batch_size=None, sampler=order, **options)
        return DataLoader(batches, batch_sampler=order, **options)

    def _iterable_loader(self, position: Position) -> Any:
        # Its import takes as long as PyTorch's own, of which it is part.
        from torchdata.stateful_dataloader import StatefulDataLoader

        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(position.epoch)
        loader: Any = StatefulDataLoader(
            self._dataset,
            batch_size=self.spec.batch_size,
            drop_last=self.spec.drop_last,
            collate_fn=self._collate,
            **self._options(position),
        )
        if position.state is not None:
            loader.load_state_dict(decode_state(position.state))
        return loader


class _Order:
    """The keys of the batches of a pass, from a position on: a sampler for PyTorch's loader.

    A key is the number that seeds the batch's random numbers, and the rows that are read here.
    """

    def __init__(self, spec: LoaderSpec, num_items: int, position: Position) -> None:
        self._spec = spec
        self._num_items = num_items
        self._position = position
        size = spec.batch_size or 1
        self.num_batches = num_items // size if spec.drop_last else -(-num_items // size)

    def __len__(self) -> int:
        return max(0, self.num_batches - self._position.batch)

    def __iter__(self) -> Iterator[Any]:
        spec, epoch = self._spec, self._position.epoch
        size = spec.batch_size or 1
        order = None
        if spec.shuffle:  # as torch.utils.data.distributed.DistributedSampler does
            order = torch.randperm(self._num_items, generator=torch.Generator().manual_seed(spec.seed + epoch))
        for number in range(self._position.batch, self.num_batches):
            start, end = number * size, min((number + 1) * size, self._num_items)
            rows = range(start, end) if order is None else order[start:end].tolist()
            seed = _mixed(spec.seed, epoch, number + 1)
            if spec.batch_size is None:
                yield (seed, rows[0])
            else:
                yield [seed, *self._part(rows, number)]

    def _part(self, rows: Sequence[int], number: int) -> Sequence[int]:
        parts = self._spec.num_parts
        if len(rows) % parts:
            raise ShapeError(
                f"batch {number} of epoch {self._position.epoch} has {len(rows)} rows, which cannot be split evenly "
                f"over {parts} slices: leave it out with drop_last=True"
            )
        size = len(rows) // parts
        return rows[self._spec.part_index * size : (self._spec.part_index + 1) * size]


class _SeededBatches(Dataset[Any]):
    """The batches of a dataset, collated: their random numbers depend on the batch alone, and errors name the item.

    Args:
        dataset: has `__getitem__`, and perhaps `__getitems__`.
        collate: makes a batch of what these return. It may draw random numbers too, so it is called here and not by
            PyTorch's loader.
        keeps_generators: leave the process's own random generators as they were: nothing else runs in a worker.
    """

    def __init__(self, dataset: Any, collate: Callable[[Any], Any], *, keeps_generators: bool) -> None:
        self._dataset = dataset
        self._collate = collate
        self._keeps_generators = keeps_generators

    def __getitems__(self, key: list[int]) -> Any:
        seed, *rows = key
        with self._seeded(seed):
            many = getattr(self._dataset, "__getitems__", None)
            if many is not None:
                return self._collate(self._read(many, rows, f"items {rows}"))
            return self._collate([self._read(self._dataset.__getitem__, row, f"item {row}") for row in rows])

    def __getitem__(self, key: tuple[int, int]) -> Any:
        seed, row = key
        with self._seeded(seed):
            return self._collate(self._read(self._dataset.__getitem__, row, f"item {row}"))

    def _seeded(self, seed: int) -> contextlib.AbstractContextManager[None]:
        if self._keeps_generators:
            return _Generators(seed)
        _seed_generators(seed)
        return contextlib.nullcontext()

    def _read(self, read: Callable[[Any], Any], rows: Any, what: str) -> Any:
        try:
            return read(rows)
        except StopIteration as error:  # would pass for the end of the dataset
            raise RuntimeError(f"{what} of the dataset raised StopIteration") from error
        except Exception as error:
            error.add_note(f"while reading {what} of the dataset")
            raise


def _as_it_is(batch: Any) -> Any:
    """A collate_fn: the batch is collated already."""
    return batch


class _Generators(contextlib.AbstractContextManager[None]):
    """Random generators for a part of this process's code, apart from those that the rest of it draws from.

    Within each ``with`` statement they go on where the one before left them.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: tuple[Any, ...] | None = None
        self._others: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        self._others = _generator_states()
        if self._states is None:
            _seed_generators(self._seed)
        else:
            _set_generator_states(self._states)

    def __exit__(self, *error: object) -> None:
        self._states = _generator_states()
        _set_generator_states(self._others)


def _seed_generators(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def _generator_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _set_generator_states(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


class _DieWith:
    """Has a worker die with the process that started it, however that ends."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def __call__(self, worker_id: int) -> None:
        if os.getppid() == self._pid:  # not so where workers are started by a server (forkserver)
            die_with_parent(self._pid)


def _imported(name: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise failed(
            f"{name} {path!r} cannot be imported (in {os.getcwd()}): it must be importable where the slice's "
            "executors run",
            error,
        ) from error
    if not callable(found):
        raise ConfigError(
            f"{name} {path!r} is a {type(found).__name__}, which cannot be called: give a class or function"
        )
    return found


def _state_of(loader: Any) -> Any:
    try:
        state = encode_state(loader.state_dict())
        size = len(json.dumps(state))
        if size <= _MAX_STATE_BYTES:
            return state
        return {NO_STATE: f"its state has {size:,} bytes of JSON, but at most {_MAX_STATE_BYTES:,} are possible"}
    except Exception as error:
        return {NO_STATE: f"{type(error).__name__}: {error}"}


def _mixed(*numbers: int) -> int:
    """Returns a number below 2**63 that neighbouring numbers do not have (SplitMix64's finalizer)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return mixed >> 1


def failed(what: str, error: BaseException) -> DataError:
    """Returns the error of a pipeline for one of the user's own code, with its traceback."""
    text = "".join(traceback.format_exception(error)).rstrip()
    lines = [*str(error).strip().splitlines(), *getattr(error, "__notes__", [])]
    if any(line.startswith("  ") for line in lines):  # of a worker: its traceback, as text, ends with the error
        last = max(index for index, line in enumerate(lines) if line.startswith("  "))
        lines = [lines[0], *lines[last + 1 :]]
    return DataError(f"{what}: {type(error).__name__}: {' '.join(lines)[:2000]}", remote_traceback=text)
