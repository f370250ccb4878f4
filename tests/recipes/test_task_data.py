"""What recipes make of windows of text: spans that are cut out, and distances to the ends of lines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recipes.multi_task import UNKNOWN, line_classes
from recipes.span_corruption import END, FIRST_BYTE, SpanConfig, corrupt, corrupted


def restored(inputs: np.ndarray, targets: np.ndarray) -> bytes:
    """Puts the spans of a target back into its input."""
    assert inputs[-1] == targets[-1] == END
    spans: list[list[int]] = []
    for token in targets[:-1]:
        if token >= FIRST_BYTE + 256:
            assert token == FIRST_BYTE + 256 + len(spans)
            spans.append([])
        else:
            spans[-1].append(token)
    found: list[int] = []
    for token in inputs[:-1]:
        found += spans[token - FIRST_BYTE - 256] if token >= FIRST_BYTE + 256 else [token]
    assert all(spans)
    return bytes(token - FIRST_BYTE for token in found)


@pytest.mark.parametrize(
    ("length", "fields"),
    [
        (128, {}),
        (2, {}),
        (9, {"noise_density": 0.9}),
        (64, {"noise_density": 0.5, "mean_span": 1.0}),
        (64, {"mean_span": 50.0}),
    ],
)
def test_spans_are_cut_out_and_can_be_put_back(length: int, fields: dict[str, float]) -> None:
    config = SpanConfig(**fields)
    rng = np.random.default_rng(0)
    for _ in range(20):
        window = rng.integers(0, 256, length)
        inputs, targets = corrupt(window, config, rng)
        assert (len(inputs), len(targets)) == config.lengths(length)
        assert max(inputs.max(), targets.max()) < config.vocab_size(length)
        assert restored(inputs, targets) == bytes(window.tolist())


def test_sizes_are_those_of_t5_for_its_rates() -> None:
    assert SpanConfig().lengths(128) == (116, 26)  # 19 bytes in 6 spans
    assert SpanConfig().vocab_size(128) == 2 + 256 + 6


def test_batches_of_spans_repeat_with_their_seed() -> None:
    batches = [torch.randint(256, (3, 32)) for _ in range(2)]
    first, second = (list(corrupted(batches, SpanConfig(), seed=1)) for _ in range(2))
    for (x, y), (x2, y2) in zip(first, second, strict=True):
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    assert not torch.equal(first[0][0], next(corrupted(batches, SpanConfig(), seed=2))[0])


def test_classes_of_the_distance_to_the_end_of_the_line() -> None:
    text = b"x" * 20 + b"\n\nab\nabcdef"
    classes = line_classes(torch.tensor([list(text)]))[0].tolist()
    assert classes[:20] == [5] * 5 + [4] * 8 + [3] * 4 + [2] * 2 + [1]
    assert classes[20:25] == [0, 0, 2, 1, 0]
    assert classes[25:] == [UNKNOWN] * 6
    assert line_classes(torch.full((1, 20), 120))[0].tolist() == [5] * 5 + [UNKNOWN] * 15


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"noise_density": 1.0}, "noise_density is 1.0"), ({"mean_span": 0.5}, "mean_span is 0.5")],
)
def test_span_settings_are_checked(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpanConfig(**fields)
