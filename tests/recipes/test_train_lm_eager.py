"""The recipe as plain PyTorch in one process: as its users run it, and what settings do to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipes import train_lm
from recipes.settings import Settings, read_settings
from recipes.training import read_text
from torchways.errors import ConfigError

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
TEXT = "To be, or not to be, that is the question. " * 100
FAST = ["model.d_model=16", "model.n_heads=2", "model.seq_len=16", "train.batch_size=4", "train.eval_batches=2"]


def train(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Runs the script in `folder`, on a short text there."""
    (folder / "text.txt").write_text(TEXT)
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
    assert set(config) == {"model", "data", "optim", "parallel", "cluster", "train", "checkpoint"}
    assert config["train"]["steps"] == 7
    assert config["optim"]["name"] == "adamw"

    assert "sha256" in done.stdout
    assert f"train loss       {losses_of(tmp_path)[-1]:.4f} nats/byte (step 7)" in done.stdout
    assert f"validation loss  {lines[-1]['validation_metrics/loss']:.4f} nats/byte" in done.stdout
    assert "tokens/s" in done.stdout
    assert str(run) in done.stdout
    assert "7/7" in done.stderr


def settings_of(folder: Path, *overrides: str) -> Settings:
    (folder / "text.txt").write_text(TEXT)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(SCRIPT.parents[1] / "configs")):
        cfg = hydra.compose("train_lm", overrides=[f"data.path={folder / 'text.txt'}", *FAST, *overrides])
    return read_settings(Settings, cfg)


def train_here(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[float]:
    """Trains as the script does, in this process: a new one takes longer to start than to train."""
    monkeypatch.setenv("TORCHWAYS_EAGER", "1")
    settings = settings_of(folder, "train.trace_step=null", *overrides)
    run = folder / "run"
    run.mkdir()
    train_lm.train_lm(settings, read_text(settings, train_lm.log), run)
    return losses_of(folder)


@pytest.mark.parametrize("optim", ["adamw", "adam", "sgd"])
def test_loss_falls_with_every_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str) -> None:
    losses = train_here(
        tmp_path, monkeypatch, "train.steps=30", "parallel=one_island", f"optim={optim}", "optim.warmup_steps=2"
    )
    assert losses[-1] < losses[0] - 0.3


def test_a_run_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        losses.append(train_here(folder, monkeypatch, "train.steps=3"))
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=0"], "train.steps is 0 but must be at least 1"),
        (["train.steps=many"], "train.steps: Value 'many' of type 'str' could not be converted"),
        (["optim.lr=-1"], "optim.lr is -1.0 but must be above 0; try 3e-3"),
        (["model.n_heads=3"], "model.n_heads is 3 and does not divide d_model, 16"),
        (["data.path=nowhere.txt"], "data.path=nowhere.txt is no file and no folder"),
        (["parallel.pipeline_stages=9"], "parallel.pipeline_stages is 9 but model.n_layers is 4"),
        (["parallel.devices_per_stage=3"], "train.batch_size is 4 but the 3 devices of mesh axis 'dp'"),
        (
            ["parallel.devices_per_stage=4", "parallel.tensor_parallel=3"],
            "parallel.tensor_parallel is 3 but a stage has 4 devices",
        ),
        (["train.precision=fp8"], "train.precision"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_text(settings_of(tmp_path, *overrides), train_lm.log)
    assert str(caught.value).startswith(message)


def test_a_bad_value_ends_the_run_with_one_line(tmp_path: Path) -> None:
    done = train(tmp_path, "train.steps=0")
    assert done.returncode == 1
    assert done.stderr.startswith("ConfigError: train.steps is 0 but must be at least 1")
    assert done.stderr.count("\n") == 1


def test_unknown_key_is_hydras_error(tmp_path: Path) -> None:
    done = train(tmp_path, "train.stepz=3")
    assert done.returncode == 1
    assert "Could not override 'train.stepz'" in done.stderr
    assert "Traceback" not in done.stderr


def test_text_data_asks_for_its_path() -> None:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(SCRIPT.parents[1] / "configs")):
        cfg = hydra.compose("train_lm", overrides=["data=text"])
    with pytest.raises(ConfigError, match=r"^data\.path has no value and no default; give one: data\.path=<value>$"):
        read_settings(Settings, cfg)
