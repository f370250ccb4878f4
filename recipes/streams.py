"""The batches of the training recipes, read by the controller or on the hosts of a slice (`data.loader`).

Both give the same batches, and count them in the same way: a run may go on with the other one. This is also the module
that a host's data process imports, so it knows the recipes only by what it is asked for.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a data process starts from the script's folder only

import torchways as tw
from recipes.data import DataConfig, Loader, TextData
from recipes.span_corruption import SpanConfig, corrupted

#: Batches that a data process can be asked for: the recipes end before.
_MANY = 1 << 40


class Stream:
    """An iterator over batches without end, whose place goes into checkpoints."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._batches: Iterator[Any] | None = None
        self._num_taken = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = iter(self._source)
        batch = next(self._batches)
        self._num_taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns how many batches were taken."""
        return {"batch": self._num_taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on behind so many batches."""
        self._num_taken = state["batch"]
        self._source.load_state_dict({**self._source.state_dict(), "epoch": 0, "batch": self._num_taken})
        self._batches = None


class Numbered(torch.utils.data.Dataset[Any]):
    """Batches by number, of an iterator that is the same each time it is made.

    Those between two that are asked for are made and dropped.
    """

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make
        self._batches: Iterator[Any] | None = None
        self._next = 0

    def __len__(self) -> int:
        return _MANY

    def __getitem__(self, index: int) -> Any:
        if self._batches is None or index < self._next:
            self._batches, self._next = self._make(), 0
        batch = next(itertools.islice(self._batches, index - self._next, None))
        self._next = index + 1
        return batch


class _Here:
    """The batches in this process, with the position of a `tw.data_loader`."""

    def __init__(self, batches: Numbered) -> None:
        self._batches = batches
        self._first = 0

    def __iter__(self) -> Iterator[Any]:
        return (self._batches[number] for number in itertools.count(self._first))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._first = state["batch"]


def open_stream(
    config: DataConfig,
    data: TextData,
    mesh: tw.VirtualSlice,
    batches: Callable[..., Iterator[Any]],
    *,
    tokens_of: str | None = None,
    **options: Any,
) -> Stream:
    """Returns the training batches of a recipe.

    Args:
        config: the section `data`.
        data: the text, as this process has it.
        mesh: where batches go with ``data.loader=hosts``, each split over the axis "dp"; a program moves on what other
            slices need. With ``controller``, programs place them.
        batches: a function of this module that makes them.
        tokens_of: directory of the tokenizer that `data` was read with; None: its tokens are bytes.
        options: further arguments of `batches`: plain values, which cross processes.

    Raises:
        ConfigError: the cluster runs no code of clients.
        DataError: the text cannot be read on the host.
    """
    if config.loader is Loader.controller:
        return Stream(_Here(Numbered(lambda: batches(data, **options))))
    path, folder = (
        None if name is None else str(Path(name).expanduser().absolute()) for name in (config.path, tokens_of)
    )
    # A data process imports from the script's own folder, whatever started the cluster.
    main = getattr(sys.modules["__main__"], "__file__", None)
    is_script = main is not None and Path(main).resolve().parent == Path(__file__).resolve().parent
    return Stream(
        tw.data_loader(
            "streams:on_host" if is_script else "recipes.streams:on_host",
            mesh,
            kwargs={
                "text": {"path": path, "pattern": config.pattern, "validation_fraction": config.validation_fraction},
                "seq_len": data.seq_len,
                "tokens_of": folder,
                "batches": batches.__name__,
                "options": options,
            },
            batch_size=None,
            num_workers=config.num_workers,
        )
    )


def on_host(
    text: Mapping[str, Any], seq_len: int, tokens_of: str | None, batches: str, options: Mapping[str, Any]
) -> Numbered:
    """Returns the batches that `open_stream` describes, in a data process.

    Raises:
        ConfigError: the text cannot be read.
    """
    encode = None
    if tokens_of is not None:
        from recipes.models.hugging_face import read_codec  # transformers, which other recipes do without

        encode = read_codec(Path(tokens_of)).encode
    data = TextData(DataConfig(**text), seq_len=seq_len, encode=encode)
    return Numbered(lambda: globals()[batches](data, **options))


def windows(data: TextData, *, batch_size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (x, y), int64 [batch_size, seq_len] each, y one token later."""
    return data.train_batches(batch_size, seed=seed)


def spans(
    data: TextData, *, batch_size: int, seed: int, noise_density: float, mean_span: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields what `recipes.span_corruption.corrupted` does."""
    texts = (x for x, _ in data.train_batches(batch_size, seed=seed))
    return corrupted(texts, SpanConfig(noise_density=noise_density, mean_span=mean_span), seed=seed)


def line_ends(
    data: TextData, *, batch_size: int, seed: int, turns: Sequence[Sequence[str]]
) -> Iterator[tuple[Sequence[str], torch.Tensor, dict[str, torch.Tensor]]]:
    """Yields (tasks, x, targets): tasks take turns; the rest is what `recipes.multi_task.with_targets` yields."""
    from recipes.multi_task import with_targets  # which imports this module

    batches = with_targets(data.train_batches(batch_size, seed=seed))
    for tasks, (x, targets) in zip(itertools.cycle(turns), batches, strict=False):
        yield tasks, x, targets
