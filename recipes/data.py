"""Text as bytes: where it is read, how it is split, and the order of its windows.

A token is a byte, so there is no tokenizer and a loss in nats a token is one in nats a byte, unless a recipe brings a
tokenizer. Everything is a function of the files and the seed: two runs see the same batches.
"""

from __future__ import annotations

import enum
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchways.errors import ConfigError

#: Folders of the standard library that hold no library source: packages of others, tests and what they read.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})

#: From this many files on, whole files are held out for validation; below, the tail of the text is.
_FILES_TO_SPLIT_BY_FILE = 40


class Loader(enum.Enum):
    """Who reads the batches of the training."""

    controller = "controller"
    hosts = "hosts"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which text to train on."""

    path: str | None = None
    """A text file or a folder of them; null means the sources of Python's standard library."""

    pattern: str = "*"
    """Files of a folder to read, as a glob of their names."""

    validation_fraction: float = 0.05
    """Part of the text that is held out."""

    loader: Loader = Loader.controller
    """controller: this process reads batches and sends them with each step. hosts: `tw.data_loader` reads them beside
    the executors of the first slice, which must find the text under the same path. The batches are the same."""

    num_workers: int = 0
    """With loader=hosts: processes that read batches; 0: the slice's data process does."""

    def __post_init__(self) -> None:
        if self.path == "":
            raise ValueError("path is empty; give a text file, a folder of them, or null for Python's standard library")
        if not self.pattern or self.pattern.startswith("/"):
            raise ValueError(f"pattern is {self.pattern!r} but must be a glob of file names; try '*.txt' or '*'")
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers} but must be at least 0; 0 needs no further process")
        if not 0.0 < self.validation_fraction <= 0.5:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction} but must be above 0 and at most 0.5; try 0.05"
            )


class TextData:
    """Training and validation bytes, and batches of them.

    Attributes:
        train: tokens to train on; bytes as uint8.
        validation: tokens held out.
        seq_len: length of a window, in tokens.
        summary: one line for the log: source, sizes, checksum.
    """

    def __init__(
        self, config: DataConfig, *, seq_len: int, encode: Callable[[bytes], np.ndarray] | None = None
    ) -> None:
        """Reads the text.

        Args:
            config: which text.
            seq_len: length of a window, in tokens.
            encode: makes integer tokens of text; None: a token is a byte.

        Raises:
            ConfigError: there is no such path, it cannot be read, or it is too short for one window of `seq_len`.
        """
        files = _find_files(config)
        texts = [_read(path) for path in files]
        train, validation = _split(texts, config.validation_fraction)
        checksum = hashlib.sha256(train + validation).hexdigest()[:12]
        sizes = f"{len(train):,} training and {len(validation):,} validation bytes"
        source = config.path or f"{sysconfig.get_paths()['stdlib']} (Python's standard library)"
        encode = encode or _as_bytes
        self.train, self.validation = encode(train), encode(validation)
        unit = "bytes" if encode is _as_bytes else "tokens"
        for part, tokens in (("training", self.train), ("validation", self.validation)):
            if len(tokens) < seq_len + 1:
                raise ConfigError(
                    f"data.path={source} gives {len(tokens)} {unit} of {part} text, but one window takes "
                    f"model.seq_len + 1 = {seq_len + 1}; give more text or a smaller model.seq_len"
                )
        self.seq_len = seq_len
        self.summary = f"{source}: {len(files)} files, {sizes}, sha256 {checksum}"

    def train_batches(self, batch_size: int, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (x, y) for ever, int64 [batch_size, seq_len]; y is x one token later.

        An epoch is a shuffle of the text's windows, cut at an offset of its own; a batch may span two epochs.
        """
        starts = self._shuffled_starts(np.random.default_rng(seed))
        while True:
            yield self._windows(self.train, np.array([next(starts) for _ in range(batch_size)]))

    def validation_batches(self, batch_size: int, num_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields `num_batches` batches of windows spread evenly over the validation text, the same at every call."""
        last_start = len(self.validation) - self.seq_len - 1
        starts = np.linspace(0, last_start, num_batches * batch_size).astype(np.int64)
        for batch_starts in starts.reshape(num_batches, batch_size):
            yield self._windows(self.validation, batch_starts)

    def _shuffled_starts(self, rng: np.random.Generator) -> Iterator[int]:
        last_start = len(self.train) - self.seq_len - 1
        while True:
            offset = int(rng.integers(min(self.seq_len, last_start + 1)))
            yield from rng.permutation(np.arange(offset, last_start + 1, self.seq_len))

    def _windows(self, text: np.ndarray, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        windows = torch.from_numpy(text[starts[:, None] + np.arange(self.seq_len + 1)].astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _as_bytes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8)


def _find_files(config: DataConfig) -> list[Path]:
    if config.path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [path for path in root.rglob("*.py") if not _NOT_LIBRARY & set(path.relative_to(root).parts)]
        rule = "holds no Python sources; set data.path to a text file or folder"
    else:
        root = Path(config.path).expanduser()
        try:
            if root.is_file():
                return [root]
            if not root.is_dir():
                raise ConfigError(
                    f"data.path={config.path} is no file and no folder (seen from {Path.cwd()}); "
                    "give a text file, a folder of them, or null for Python's standard library"
                )
        except OSError as error:
            raise ConfigError(f"data.path={config.path}: {error.strerror}; give a path that can be read") from error
        files = [path for path in root.rglob(config.pattern) if path.is_file()]
        rule = f"holds no file that matches data.pattern={config.pattern}; change the one or the other"
    if not files:
        raise ConfigError(f"data.path={root} {rule}")
    return sorted(files)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; make it readable, or set data.path to other text"
        ) from error


def _split(texts: list[bytes], validation_fraction: float) -> tuple[bytes, bytes]:
    """Returns training and validation text: every n-th of many files is held out, else the tail of all."""
    if len(texts) >= _FILES_TO_SPLIT_BY_FILE:
        every = round(1 / validation_fraction)
        held_out = [index % every == every - 1 for index in range(len(texts))]
        return (
            b"".join(text for text, out in zip(texts, held_out, strict=True) if not out),
            b"".join(text for text, out in zip(texts, held_out, strict=True) if out),
        )
    text = b"".join(texts)
    cut = round(len(text) * (1 - validation_fraction))
    return text[:cut], text[cut:]
