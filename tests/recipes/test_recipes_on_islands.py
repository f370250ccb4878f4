"""Each recipe trains on islands to the losses that the same recipe has as plain PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import hydra
import pytest

import torchways as tw
from recipes import metrics, multi_task, sparse_moe, train_t5
from recipes.data import TextData
from recipes.settings import read_settings

ROOT = Path(__file__).parents[2]
STEPS = 4
SMALL = [
    *("data=text", f"train.steps={STEPS}", "train.batch_size=4", "train.log_every=2", "train.eval_batches=1"),
    *("train.trace_step=null", "optim=sgd", "optim.lr=0.1", "optim.warmup_steps=1"),
    "train.peak_flops=1e12",
]
GPT = ["model.seq_len=16", "model.d_model=16", "model.n_heads=2", "model.n_layers=1"]
T5 = [
    "model.seq_len=24",
    "model.d_model=16",
    "model.d_kv=8",
    "model.d_ff=32",
    "model.num_heads=2",
    "model.num_layers=1",
]


@pytest.fixture(scope="module")
def islands():
    """A cluster of three islands with a device each."""
    with tw.init(islands=3, devices_per_island=1):
        yield


def losses_of(train: Callable, recipe: ModuleType, folder: Path, overrides: list[str]) -> list[dict[str, float]]:
    """Runs a recipe and returns what it logged of each step, and of the evaluation."""
    folder.mkdir()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        cfg = hydra.compose(recipe.__name__.rpartition(".")[2], overrides=[*SMALL, *overrides])
    settings = read_settings(recipe.Settings, cfg)
    train(settings, TextData(settings.data, seq_len=settings.seq_len), folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if metrics.UTILISATION in line] == [2, 4]
    return [line for line in lines if metrics.GRAD_NORM in line or metrics.VALIDATION_LOSS in line]


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        pytest.param(sparse_moe, [*GPT, "model.n_experts=3"], id="sparse_moe"),
        pytest.param(sparse_moe, [*GPT, "model.n_experts=2", "model.capacity_factor=0.75"], id="sparse_moe_capacity"),
        pytest.param(multi_task, GPT, id="multi_task"),
        pytest.param(
            multi_task,
            [*GPT, "tasks.order=alternate", "parallel.n_microbatches=2", "optim=adamw"],
            id="multi_task_alternate",
            marks=pytest.mark.slow,
        ),
        pytest.param(train_t5, T5, id="train_t5"),
    ],
)
def test_losses_are_those_of_eager(islands, recipe, overrides, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("To be, or not to be,\nthat is the question.\n" * 100)
    overrides = [*overrides, f"data.path={tmp_path / 'text.txt'}"]
    train = getattr(recipe, "train_" + recipe.__name__.rpartition(".")[2].removeprefix("train_"))
    found = losses_of(train, recipe, tmp_path / "islands", overrides)
    monkeypatch.setenv("TORCHWAYS_EAGER", "1")
    expected = losses_of(train, recipe, tmp_path / "eager", overrides)
    assert len(found) == STEPS + 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert found[3][metrics.TRAIN_LOSS] < found[0][metrics.TRAIN_LOSS]
