"""What recipes have in common, in plain PyTorch in this process."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
import pytest

from recipes import metrics, multi_task, sparse_moe, train_lm, train_t5
from recipes.settings import Settings, read_settings
from recipes.training import read_text
from torchways.errors import ConfigError

ROOT = Path(__file__).parents[2]
SMALL = [
    *("train.steps=2", "train.batch_size=4", "train.eval_batches=2", "train.trace_step=null", "train.log_every=1"),
    *("optim.warmup_steps=1", "model.seq_len=16", "model.d_model=16"),
]
GPT = ["model.n_heads=2", "model.n_layers=2"]
T5 = ["model.d_kv=8", "model.d_ff=32", "model.num_heads=2", "model.num_layers=1"]
RECIPES = {
    train_lm: (train_lm.train_lm, GPT),
    sparse_moe: (sparse_moe.train_sparse_moe, GPT),
    multi_task: (multi_task.train_multi_task, GPT),
    train_t5: (train_t5.train_t5, T5),
}


def settings_of(recipe: ModuleType, overrides: list[str]) -> Any:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        cfg = hydra.compose(recipe.__name__.rpartition(".")[2], overrides=[*SMALL, *RECIPES[recipe][1], *overrides])
    return read_settings(Settings if recipe is train_lm else recipe.Settings, cfg)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__)
def test_evaluation_has_no_dropout(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHWAYS_EAGER", "1")
    (tmp_path / "text.txt").write_text("To be, or not to be,\nthat is the question.\n" * 100)
    dropout = "model.dropout_rate=0.5" if recipe is train_t5 else "model.dropout=0.5"
    overrides = ["train.eval_every=1", "optim.lr=1e-30", "optim.weight_decay=0"]  # the weights stay as they are
    settings = settings_of(recipe, [dropout, *overrides, f"data.path={tmp_path / 'text.txt'}"])
    RECIPES[recipe][0](settings, read_text(settings, recipe.log), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, second = [line[metrics.VALIDATION_LOSS] for line in lines if metrics.VALIDATION_LOSS in line]
    assert first == second


@pytest.mark.parametrize("recipe", [train_lm, sparse_moe, multi_task], ids=lambda recipe: recipe.__name__)
def test_a_vocabulary_has_room_for_every_byte(recipe: ModuleType) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size is 255 but tokens are bytes, of which there are 256; set"
    ):
        settings_of(recipe, ["model.vocab_size=255"])
    assert settings_of(recipe, ["model.vocab_size=257"]).model.vocab_size == 257
