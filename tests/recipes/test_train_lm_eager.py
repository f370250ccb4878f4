"""The recipe as plain PyTorch in one process, run as its users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(__file__).parents[2] / "recipes" / "train_lm.py"
TAGS = {
    "loss_metrics/global_avg_loss",
    "validation_metrics/loss",
    "grad_norm",
    "lr",
    "throughput(tps)",
    "time_metrics/end_to_end(s)",
    "time_metrics/data_loading(s)",
    "tflops",
}
FAST = ["model.d_model=16", "model.n_heads=2", "model.seq_len=16", "train.batch_size=4", "train.eval_batches=2"]


def train(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Runs the script in `folder`, on a short text there."""
    (folder / "text.txt").write_text("To be, or not to be, that is the question. " * 100)
    return subprocess.run(
        [sys.executable, str(SCRIPT), "data.path=text.txt", "hydra.run.dir=run", *FAST, *overrides],
        cwd=folder,
        env={**os.environ, "TORCHWAYS_EAGER": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> list[float]:
    return [line["loss_metrics/global_avg_loss"] for line in lines_of(folder) if "grad_norm" in line]


def test_run_leaves_its_files(tmp_path: Path) -> None:
    done = train(tmp_path, "train.steps=7", "train.log_every=3", "train.eval_every=4", "optim.warmup_steps=2")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert {"config.yaml", "loss.png", "metrics.jsonl", "tensorboard", "train_lm.log"} <= {
        p.name for p in run.iterdir()
    }
    assert not (run / "trace.json").exists()

    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines if "grad_norm" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in lines if "throughput(tps)" in line] == [3, 6, 7]
    assert [line["step"] for line in lines if "validation_metrics/loss" in line] == [4, 7]
    assert [line["lr"] for line in lines if "lr" in line][:3] == pytest.approx([1.5e-3, 3e-3, 3e-3])
    assert set(EventAccumulator(str(run / "tensorboard")).Reload().Tags()["scalars"]) == TAGS

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert set(config) == {"model", "data", "optim", "parallel", "cluster", "train"}
    assert config["train"]["steps"] == 7
    assert config["optim"]["name"] == "adamw"

    assert "sha256" in done.stdout
    assert f"train loss       {losses_of(tmp_path)[-1]:.4f} nats/byte (step 7)" in done.stdout
    assert f"validation loss  {lines[-1]['validation_metrics/loss']:.4f} nats/byte" in done.stdout
    assert "tokens/s" in done.stdout
    assert str(run) in done.stdout
    assert "7/7" in done.stderr


@pytest.mark.parametrize("optim", ["adamw", "adam", "sgd"])
def test_loss_falls_with_every_optimizer(tmp_path: Path, optim: str) -> None:
    done = train(tmp_path, "train.steps=30", "parallel=one_island", f"optim={optim}", "optim.warmup_steps=2")
    assert done.returncode == 0, done.stderr
    losses = losses_of(tmp_path)
    assert losses[-1] < losses[0] - 0.3


def test_a_run_can_be_repeated(tmp_path: Path) -> None:
    losses = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        assert train(folder, "train.steps=3").returncode == 0
        losses.append(losses_of(folder))
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=0"], "ConfigError: train.steps is 0 but must be at least 1"),
        (["train.steps=many"], "ConfigError: train.steps: Value 'many' of type 'str' could not be converted"),
        (["optim.lr=-1"], "ConfigError: optim.lr is -1.0 but must be above 0; try 3e-3"),
        (["model.n_heads=3"], "ConfigError: model.n_heads is 3 and does not divide d_model, 16"),
        (["data.path=nowhere.txt"], "ConfigError: data.path=nowhere.txt is no file and no folder"),
        (["parallel.pipeline_stages=9"], "ConfigError: parallel.pipeline_stages is 9 but model.n_layers is 4"),
        (["parallel.devices_per_stage=3"], "ConfigError: train.batch_size is 4 but the 3 devices of mesh axis 'dp'"),
        (
            ["parallel.devices_per_stage=4", "parallel.tensor_parallel=3"],
            "ConfigError: parallel.tensor_parallel is 3 but a stage has 4 devices",
        ),
        (["train.precision=fp8"], "ConfigError: train.precision"),
    ],
)
def test_bad_values_end_the_run_with_one_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    done = train(tmp_path, *overrides)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_unknown_key_is_hydras_error(tmp_path: Path) -> None:
    done = train(tmp_path, "train.stepz=3")
    assert done.returncode == 1
    assert "Could not override 'train.stepz'" in done.stderr
    assert "Traceback" not in done.stderr


def test_text_data_asks_for_its_path(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "data=text", "hydra.run.dir=run"],
        cwd=tmp_path,
        env={**os.environ, "TORCHWAYS_EAGER": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "ConfigError: data.path has no value and no default; give one: data.path=<value>\n"
