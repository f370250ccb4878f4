"""What a run leaves behind: JSON lines, TensorBoard scalars under torchtitan's names, and a picture of the loss."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

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
    """

    def __init__(self, run_dir: Path) -> None:
        self.jsonl_path = run_dir / "metrics.jsonl"
        self.plot_path = run_dir / "loss.png"
        self.tensorboard_dir = run_dir / "tensorboard"
        self._curves: dict[str, list[tuple[int, float]]] = {TRAIN_LOSS: [], VALIDATION_LOSS: []}
        self._jsonl = self.jsonl_path.open("w", encoding="utf-8", buffering=1)
        self._writer = _summary_writer(self.tensorboard_dir)

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes `values`, by tag, of `step`, which counts from 1."""
        self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
            if tag in self._curves:
                self._curves[tag].append((step, value))

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


def _summary_writer(folder: Path) -> SummaryWriter:
    # TensorBoard imports tensorflow (seconds, gigabytes) where it is installed, unless a module of this name exists.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
