"""What is logged can be read back from each of the files."""

from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipes import metrics
from recipes.metrics import MetricLogger, draw_loss
from recipes.progress import Progress

PNG = b"\x89PNG\r\n"
ROOT = Path(__file__).parents[2]


def test_every_file_holds_what_was_logged(tmp_path: Path) -> None:
    with MetricLogger(tmp_path) as logger:
        logger.log(1, {metrics.TRAIN_LOSS: 5.5, metrics.GRAD_NORM: 2.0})
        logger.log(2, {metrics.TRAIN_LOSS: 4.5})
        logger.log(2, {metrics.VALIDATION_LOSS: 4.75})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss_metrics/global_avg_loss": 5.5, "grad_norm": 2.0},
        {"step": 2, "loss_metrics/global_avg_loss": 4.5},
        {"step": 2, "validation_metrics/loss": 4.75},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars(metrics.TRAIN_LOSS)] == [(1, 5.5), (2, 4.5)]
    assert [(e.step, e.value) for e in events.Scalars(metrics.VALIDATION_LOSS)] == [(2, 4.75)]
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_lines_are_readable_before_the_end_and_close_is_idempotent(tmp_path: Path) -> None:
    logger = MetricLogger(tmp_path)
    logger.log(1, {metrics.TRAIN_LOSS: 5.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
    logger.close()
    logger.close()


def test_a_run_that_goes_on_keeps_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricLogger(tmp_path) as logger:
        for step in (1, 2, 3):
            logger.log(step, {metrics.TRAIN_LOSS: 6.0 - step})
        logger.log(2, {metrics.VALIDATION_LOSS: 5.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss')  # killed while it wrote
    drawn: dict[str, list[tuple[int, float]]] = {}
    monkeypatch.setattr(metrics, "draw_loss", lambda path, **curves: drawn.update(curves))
    with MetricLogger(tmp_path, done=2) as logger:  # step 3 was made after the last checkpoint
        logger.log(3, {metrics.TRAIN_LOSS: 2.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], *list(line.values())[1:]) for line in lines] == [(1, 5.0), (2, 4.0), (2, 5.0), (3, 2.5)]
    assert drawn == {"train": [(1, 5.0), (2, 4.0), (3, 2.5)], "validation": [(2, 5.0)]}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars(metrics.TRAIN_LOSS)] == [(1, 5.0), (2, 4.0), (3, 2.5)]
    assert not (tmp_path / "metrics.new").exists()

    with MetricLogger(tmp_path) as logger:  # a new run
        logger.log(1, {metrics.TRAIN_LOSS: 7.0})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def test_loss_is_drawn_also_after_a_failure(tmp_path: Path) -> None:
    def fail() -> None:
        with MetricLogger(tmp_path) as logger:
            logger.log(1, {metrics.TRAIN_LOSS: 5.5})
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        fail()
    assert (tmp_path / "loss.png").exists()


def test_nothing_logged_draws_nothing(tmp_path: Path) -> None:
    MetricLogger(tmp_path).close()
    assert not (tmp_path / "loss.png").exists()


def test_one_curve_is_enough_to_draw(tmp_path: Path) -> None:
    draw_loss(tmp_path / "loss.png", train=[], validation=[(1, 2.0)])
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_neither_tensorflow_nor_a_display_is_imported(tmp_path: Path) -> None:
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('tensorflow was imported')")
    code = (
        "import sys; from pathlib import Path; from recipes.metrics import *\n"
        "assert 'tensorboard' not in sys.modules\n"
        f"logger = MetricLogger(Path({str(tmp_path)!r})); logger.log(1, {{TRAIN_LOSS: 1.0}}); logger.close()\n"
        "assert 'tensorflow' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_progress_prints_a_line_a_read_when_not_on_a_terminal() -> None:
    out = io.StringIO()
    progress = Progress(num_steps=4, tokens_per_step=100, file=out)
    progress.advance(2, loss=5.0)
    step_time_s = progress.advance(2, loss=4.25)
    progress.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert "\r" not in out.getvalue()
    assert "2/4" in lines[0]
    assert "4/4" in lines[1]
    assert "loss 4.250" in lines[1]
    assert progress.step_time_s == step_time_s  # the first read, which holds compilation, is left out
    assert progress.tokens_per_s == pytest.approx(100 / step_time_s)


def test_a_single_read_gives_the_step_time() -> None:
    progress = Progress(num_steps=2, tokens_per_step=100, file=io.StringIO())
    step_time_s = progress.advance(2, loss=5.0)
    assert progress.step_time_s == step_time_s


@pytest.mark.parametrize(("rows", "redraws"), [(40, True), (0, False)])
def test_progress_redraws_on_a_terminal_that_has_a_size(rows: int, redraws: bool) -> None:
    reader, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (rows, 120))
    with os.fdopen(terminal, "w") as out:
        progress = Progress(num_steps=4, tokens_per_step=100, file=out)
        progress.advance(2, loss=5.0)
        progress.advance(2, loss=4.25)
        progress.close()
        written = ""
        while "loss 4.250" not in written and select.select([reader], [], [], 10)[0]:
            written += os.read(reader, 100_000).decode()  # a terminal gives what it has so far
    os.close(reader)
    assert "loss 4.250" in written
    assert ("\r" in written.replace("\r\n", "\n")) == redraws
