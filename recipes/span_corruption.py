"""T5's training task on bytes: spans of the text are cut out, and the model writes them.

    text     The quick brown fox jumps over
    input    The <s0>ck brown fox ju<s1>over <end>
    target   <s0>qui<s1>mps <end>

Tokens: 0 pads and starts the decoder, 1 is the end, then the bytes, then a sentinel for each span. Sizes depend on
settings only, so that all batches have one shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PAD, END, FIRST_BYTE = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanConfig:
    """How much of a window is cut out."""

    noise_density: float = 0.15
    """Part of the bytes that is cut out."""

    mean_span: float = 3.0
    """Mean length of a span in bytes."""

    def __post_init__(self) -> None:
        if not 0.0 < self.noise_density < 1.0:
            raise ValueError(f"noise_density is {self.noise_density} but must be between 0 and 1; 0.15 is T5's")
        if not self.mean_span >= 1.0:
            raise ValueError(f"mean_span is {self.mean_span} but must be at least 1; 3 is T5's")

    def num_cut(self, seq_len: int) -> int:
        """Returns how many bytes of a window are cut out."""
        return min(seq_len - 1, max(1, round(seq_len * self.noise_density)))

    def num_spans(self, seq_len: int) -> int:
        """Returns how many spans these are."""
        cut = self.num_cut(seq_len)
        return max(1, min(round(cut / self.mean_span), seq_len - cut))

    def vocab_size(self, seq_len: int) -> int:
        """Returns the number of tokens."""
        return FIRST_BYTE + 256 + self.num_spans(seq_len)

    def lengths(self, seq_len: int) -> tuple[int, int]:
        """Returns the lengths of inputs and targets."""
        cut, spans = self.num_cut(seq_len), self.num_spans(seq_len)
        return seq_len - cut + spans + 1, cut + spans + 1


def corrupted(batches: Iterable[Tensor], config: SpanConfig, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields inputs and targets, int64 [B, lengths[0]] and [B, lengths[1]], for windows of bytes, int64 [B, S]."""
    rng = np.random.default_rng(seed)
    for batch in batches:
        pairs = [corrupt(window, config, rng) for window in batch.numpy()]
        inputs, targets = (torch.from_numpy(np.stack(rows)) for rows in zip(*pairs, strict=True))
        yield inputs, targets


def corrupt(window: np.ndarray, config: SpanConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns the input and the target of one window of bytes; text and spans take turns, text first."""
    seq_len = len(window)
    cut, spans = config.num_cut(seq_len), config.num_spans(seq_len)
    kept_lengths, cut_lengths = _parts(seq_len - cut, spans, rng), _parts(cut, spans, rng)
    tokens = window + FIRST_BYTE
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    start = 0
    for index, (kept_length, cut_length) in enumerate(zip(kept_lengths, cut_lengths, strict=True)):
        sentinel = np.array([FIRST_BYTE + 256 + index])
        middle, end = start + kept_length, start + kept_length + cut_length
        inputs += [tokens[start:middle], sentinel]
        targets += [sentinel, tokens[middle:end]]
        start = end
    return np.concatenate([*inputs, [END]]), np.concatenate([*targets, [END]])


def _parts(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns `count` random lengths of at least 1 that add up to `total`."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff([0, *cuts, total])
