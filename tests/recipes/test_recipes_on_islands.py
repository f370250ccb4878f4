"""Each recipe trains on islands to the losses that the same recipe has as plain PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
import pytest
import torch

import torchways as tw
from recipes import finetune_hf, generate, metrics, multi_task, sparse_moe, train_t5
from recipes.settings import read_settings
from recipes.training import read_text
from torchways.errors import ConfigError

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


LLAMA = [
    *("model.seq_len=16", "model.config.hidden_size=16", "model.config.intermediate_size=32"),
    *("model.config.num_hidden_layers=2", "model.config.num_attention_heads=2"),
]
GPT2 = [
    *("model.seq_len=16", "model.architecture=GPT2LMHeadModel", "~model.config", "+model.config.vocab_size=256"),
    *("+model.config.n_embd=16", "+model.config.n_layer=4", "+model.config.n_head=2", "+model.config.n_positions=64"),
    *("+model.config.resid_pdrop=0.0", "+model.config.embd_pdrop=0.0", "+model.config.attn_pdrop=0.0"),
]
TRAIN = {
    sparse_moe: sparse_moe.train_sparse_moe,
    multi_task: multi_task.train_multi_task,
    train_t5: train_t5.train_t5,
    finetune_hf: finetune_hf.finetune_hf,
}


@pytest.fixture(scope="module")
def islands():
    """A cluster of three islands with a device each."""
    with tw.init(islands=3, devices_per_island=1):
        yield


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be,\nthat is the question.\n" * 100)
    return path


def settings_of(recipe: ModuleType, overrides: list[str]) -> Any:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        cfg = hydra.compose(recipe.__name__.rpartition(".")[2], overrides=overrides)
    return read_settings(recipe.Settings, cfg)


def losses_of(recipe: ModuleType, folder: Path, overrides: list[str]) -> list[dict[str, float]]:
    """Runs a recipe and returns what it logged of each step, and of the evaluation."""
    folder.mkdir()
    settings = settings_of(recipe, [*SMALL, *overrides])
    prepare = finetune_hf.read_tokens if recipe is finetune_hf else read_text
    TRAIN[recipe](settings, prepare(settings, recipe.log), folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    used = [line for line in lines if metrics.UTILISATION in line]
    assert [line["step"] for line in used] == [2, 4]
    assert all(line[metrics.UTILISATION] == pytest.approx(100 * line[metrics.TFLOPS]) for line in used)  # peak: 1e12
    return [line for line in lines if metrics.GRAD_NORM in line or metrics.VALIDATION_LOSS in line]


def check_losses(recipe: ModuleType, folder: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares a recipe on islands with the same recipe in eager PyTorch."""
    found = losses_of(recipe, folder / "islands", overrides)
    with monkeypatch.context() as patch:
        patch.setenv("TORCHWAYS_EAGER", "1")
        expected = losses_of(recipe, folder / "eager", overrides)
    assert len(found) == STEPS + 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert found[3][metrics.TRAIN_LOSS] < found[0][metrics.TRAIN_LOSS]


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        pytest.param(sparse_moe, [*GPT, "model.n_experts=3"], id="sparse_moe"),
        pytest.param(
            sparse_moe,
            [*GPT, "model.n_experts=2", "model.capacity_factor=0.75", "data.loader=hosts"],
            id="sparse_moe_capacity",
            marks=pytest.mark.slow,
        ),
        pytest.param(multi_task, GPT, id="multi_task"),
        pytest.param(
            multi_task,
            [*GPT, "tasks.order=alternate", "parallel.n_microbatches=2", "optim=adamw", "data.loader=hosts"],
            id="multi_task_alternate",
            marks=pytest.mark.slow,
        ),
        pytest.param(train_t5, [*T5, "data.loader=hosts"], id="train_t5"),
        pytest.param(
            train_t5,
            [*T5, "parallel.islands=1", "parallel.n_microbatches=2"],
            id="train_t5_one_island",
            marks=pytest.mark.slow,
        ),
        pytest.param(finetune_hf, [*LLAMA, "data.loader=hosts"], id="finetune_hf", marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_eager(islands, recipe, overrides, text, tmp_path, monkeypatch):
    check_losses(recipe, tmp_path, [*overrides, f"data.path={text}"], monkeypatch)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "parallel.islands=4",
            r"parallel\.islands is 4 but the cluster has 3 islands; start it with twrun",
        ),
        ("parallel.n_microbatches=3", r"train\.batch_size is 4 but parallel\.n_microbatches is 3; set the one"),
    ],
)
def test_islands_and_microbatches_that_do_not_fit_are_refused(islands, override, message, text, tmp_path):
    settings = settings_of(multi_task, [*SMALL, *GPT, override, f"data.path={text}"])
    with pytest.raises(ConfigError, match=message):
        multi_task.train_multi_task(settings, read_text(settings, multi_task.log), tmp_path)


def test_text_is_that_of_transformers(islands, tmp_path):
    torch.manual_seed(0)
    model = settings_of(generate, LLAMA).model.new_model().eval()
    model.save_pretrained(tmp_path / "model")
    settings = settings_of(
        generate, [f"model.path={tmp_path / 'model'}", "generate.prompt='To be'", "generate.max_new_tokens=8"]
    )
    codec, tokens = generate.read_prompt(settings, generate.log)
    generate.generate(settings, (codec, tokens), tmp_path)
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False)
    assert (tmp_path / "text.txt").read_text() == codec.decode(expected[0].tolist()) + "\n"


@pytest.mark.slow
def test_a_directory_is_trained_as_a_pipeline(islands, text, tmp_path, monkeypatch):
    model = settings_of(finetune_hf, [*SMALL, *GPT2, f"data.path={text}"]).model.new_model()
    model.save_pretrained(tmp_path / "pretrained")
    overrides = [f"model.path={tmp_path / 'pretrained'}", "model.seq_len=16", f"data.path={text}"]
    pipeline = ["parallel=pipeline", "parallel.schedule=Interleaved1F1B", "parallel.pipeline_stages=4"]
    check_losses(finetune_hf, tmp_path, [*overrides, *pipeline, "parallel.stages_per_island=2"], monkeypatch)
