"""What a run leaves behind: JSON lines, TensorBoard scalars under torchtitan's names, and a picture of the loss."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TRAIN_LOSS = "loss_metrics/global_avg_loss"
VALIDATION_LOSS = "validation_metrics/loss"
GRAD_NORM = "grad_norm"
LEARNING_RATE = "lr"
THROUGHPUT = "throughput(tps)"
STEP_TIME = "time_metrics/end_to_end(s)"
DATA_TIME = "time_metrics/data_loading(s)"
TFLOPS = "tflops"
UTILISATION = "mfu(%)"


class MetricLogger:
    """Writes the metrics of steps to `metrics.jsonl` and `tensorboard/` in a run's folder.

    A line holds ``step`` and whatever became known together, so a step may have several. Close it, or use it in a
    ``with`` statement: closing draws `loss.png` of what was logged, also when training failed.

    Args:
        run_dir: the run's folder.
        done: steps that were made before. What the folder has of them stays; what it has of later ones, made after the
            checkpoint that the run goes on from, does not.
    """

    def __init__(self, run_dir: Path, *, done: int = 0) -> None:
        self.jsonl_path = run_dir / "metrics.jsonl"
        self.plot_path = run_dir / "loss.png"
        self.tensorboard_dir = run_dir / "tensorboard"
        self._curves: dict[str, list[tuple[int, float]]] = {TRAIN_LOSS: [], VALIDATION_LOSS: []}
        earlier = _read_lines(self.jsonl_path, done)
        for line in earlier:
            self._note(line["step"], line)
        rewritten = self.jsonl_path.with_suffix(".new")  # a run that is killed meanwhile loses nothing
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in earlier), encoding="utf-8")
        rewritten.replace(self.jsonl_path)
        self._jsonl = self.jsonl_path.open("a", encoding="utf-8", buffering=1)
        self._writer = _summary_writer(self.tensorboard_dir, done)

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes `values`, by tag, of `step`, which counts from 1."""
        self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._note(step, values)

    def _note(self, step: int, values: Mapping[str, float]) -> None:
        for tag, curve in self._curves.items():
            if tag in values:
                curve.append((step, values[tag]))

    def close(self) -> None:
        """Flushes the files and draws the loss; a second call does nothing."""
        if self._jsonl.closed:
            return
        self._jsonl.close()
        self._writer.close()
        if any(self._curves.values()):
            draw_loss(self.plot_path, train=self._curves[TRAIN_LOSS], validation=self._curves[VALIDATION_LOSS])


def draw_loss(path: Path, *, train: list[tuple[int, float]], validation: list[tuple[int, float]]) -> None:
    """Draws (step, nats a byte) of training and validation as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, once a run
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per byte)")
    if train:
        axes.plot(*zip(*train, strict=True), label="train", linewidth=1)
    if validation:
        axes.plot(*zip(*validation, strict=True), label="validation", marker="o")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _read_lines(path: Path, done: int) -> list[dict[str, Any]]:
    """Returns the lines of the steps up to `done`."""
    if not done or not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the last one, of a run that was killed
            continue
        if line["step"] <= done:
            lines.append(line)
    return lines


def _summary_writer(folder: Path, done: int) -> SummaryWriter:
    # TensorBoard imports tensorflow (seconds, gigabytes) where it is installed, unless a module of this name exists.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=done + 1 if done else None)
