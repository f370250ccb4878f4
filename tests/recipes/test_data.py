"""Text is read, split and batched the same way at every run; text that cannot serve is refused with a remedy."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.data import DataConfig, TextData
from torchways.errors import ConfigError

SEQ_LEN = 8


def text_file(folder: Path, size: int) -> Path:
    path = folder / "text.txt"
    path.write_bytes(bytes(i % 251 for i in range(size)))
    return path


def read(path: Path, **fields: object) -> TextData:
    return TextData(DataConfig(path=str(path), **fields), seq_len=SEQ_LEN)


def test_batches_are_int64_and_y_is_the_next_byte(tmp_path: Path) -> None:
    data = read(text_file(tmp_path, 1000))
    for x, y in [next(data.train_batches(4, seed=0)), next(data.validation_batches(4, 1))]:
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == y.shape == (4, SEQ_LEN)
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert torch.equal(y, (x + 1) % 251)


def test_seed_decides_the_order(tmp_path: Path) -> None:
    data = read(text_file(tmp_path, 1000))

    def first_batches(seed: int) -> torch.Tensor:
        return torch.stack([x for x, _ in itertools.islice(data.train_batches(4, seed=seed), 5)])

    assert torch.equal(first_batches(0), first_batches(0))
    assert not torch.equal(first_batches(0), first_batches(1))


def test_an_epoch_visits_each_window_once(tmp_path: Path) -> None:
    data = read(text_file(tmp_path, 1000))
    epoch = list(itertools.islice(data.train_batches(1, seed=0), (len(data.train) - 1) // SEQ_LEN - 1))
    windows = {x.numpy().tobytes() for x, _ in epoch}
    assert len(windows) == len(epoch)


def test_tail_of_one_file_is_held_out(tmp_path: Path) -> None:
    path = text_file(tmp_path, 1000)
    data = read(path, validation_fraction=0.1)
    assert data.train.tobytes() + data.validation.tobytes() == path.read_bytes()
    assert len(data.validation) == 100


def test_whole_files_are_held_out_of_many(tmp_path: Path) -> None:
    for index in range(60):
        (tmp_path / f"{index:02}.txt").write_bytes(bytes([index]) * 100)
    data = read(tmp_path)
    assert set(np.unique(data.validation)) == {19, 39, 59}
    assert not set(np.unique(data.train)) & {19, 39, 59}


def test_pattern_chooses_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"a" * 500)
    (tmp_path / "b.txt").write_bytes(b"b" * 500)
    assert set(read(tmp_path, pattern="*.md").train.tobytes()) == {ord("a")}


def test_validation_batches_span_the_text_and_repeat(tmp_path: Path) -> None:
    data = read(text_file(tmp_path, 4000))
    first, second = (list(data.validation_batches(4, 3)) for _ in range(2))
    assert len(first) == 3
    assert all(torch.equal(x, x2) for (x, _), (x2, _) in zip(first, second, strict=True))
    assert bytes(first[0][0][0].tolist()) == data.validation.tobytes()[:SEQ_LEN]
    assert bytes(first[-1][1][-1].tolist()) == data.validation.tobytes()[-SEQ_LEN:]


def test_standard_library_is_the_default() -> None:
    data = TextData(DataConfig(), seq_len=128)
    assert len(data.train) > 2_000_000
    assert len(data.validation) > 100_000
    assert b"def " in data.validation.tobytes()
    assert "standard library" in data.summary
    assert f"{len(data.train):,} training" in data.summary


def test_summary_names_the_content(tmp_path: Path) -> None:
    path = text_file(tmp_path, 1000)
    before = read(path).summary
    assert before == read(path).summary
    path.write_bytes(b"x" * 1000)
    assert read(path).summary != before


def test_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path=.*nowhere is no file and no folder .*; give a text file"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(("size", "part"), [(0, "0 bytes of training"), (100, "5 bytes of validation")])
def test_short_text_is_refused(tmp_path: Path, size: int, part: str) -> None:
    with pytest.raises(ConfigError, match=rf"gives {part} text, .* model\.seq_len \+ 1 = 9; give more text"):
        read(text_file(tmp_path, size))


def test_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no file that matches data\.pattern=\*; change"):
        read(tmp_path)


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:  # permissions would not stop a test run as root
        raise PermissionError(13, "Permission denied", str(path))

    path = text_file(tmp_path, 1000)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"cannot read .*text\.txt: Permission denied; make it readable"):
        read(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "path is empty"),
        ({"pattern": "/etc/*"}, "pattern is '/etc/\\*'"),
        ({"validation_fraction": 0.0}, "validation_fraction is 0.0"),
        ({"validation_fraction": 0.9}, "validation_fraction is 0.9"),
    ],
)
def test_config_is_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)
