"""Models of transformers by settings, their tokens, and what is refused before a cluster is used; eager PyTorch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from recipes import finetune_hf
from recipes.data import DataConfig
from recipes.generate import GenerateConfig, Settings, log, read_prompt
from recipes.models.hugging_face import Bytes, HuggingFaceConfig, Tokenizer, layers_name
from recipes.optim import OptimConfig
from recipes.settings import ClusterConfig, ParallelConfig, TrainConfig
from recipes.training import next_token_loss
from torchways.errors import ConfigError

ROOT = Path(__file__).parents[2]
SMALL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def small(**fields: object) -> HuggingFaceConfig:
    return HuggingFaceConfig(**{"config": SMALL, "seq_len": 16, **fields})


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("LlamaForCausalLM", "model.layers"),
        ("Qwen2ForCausalLM", "model.layers"),
        ("GPTNeoXForCausalLM", "gpt_neox.layers"),
        ("OPTForCausalLM", "model.decoder.layers"),
        ("GPT2LMHeadModel", "transformer.h"),
    ],
)
def test_models_are_made_by_class_name_and_their_layers_found(architecture: str, name: str) -> None:
    fields = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = small(architecture=architecture, config=fields)
    with torch.device("meta"):
        model = config.new_model()
    assert type(model).__name__ == architecture
    assert layers_name(model, config.n_layers) == name
    assert len(model.get_submodule(name)) == config.n_layers == 2


def test_a_directory_gives_its_weights_and_its_tokenizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small().new_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert isinstance(small(path=str(tmp_path)).codec(), Bytes)
    save_tokenizer(tmp_path)
    config = HuggingFaceConfig(path=str(tmp_path), seq_len=16)
    loaded, fresh = load(config), config.new_model()
    for ours, theirs, other in zip(loaded.parameters(), model.parameters(), fresh.parameters(), strict=True):
        assert ours.dtype == other.dtype == torch.float32
        assert torch.equal(ours, theirs.float())
    codec = config.codec()
    assert isinstance(codec, Tokenizer)
    assert codec.vocab_size == 260
    tokens = codec.encode(b"not to be")
    assert tokens.dtype == np.int64
    assert len(tokens) < len(b"not to be")
    assert codec.decode(tokens.tolist()) == "not to be"


def load(config: HuggingFaceConfig) -> transformers.PreTrainedModel:
    model = config.empty_model(torch.float32)
    config.load_weights(model)
    return model


def save_tokenizer(folder: Path) -> None:
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["to be or not to be"] * 9, vocab_size=260, min_frequency=2)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)


def test_a_directory_is_trained_further_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHWAYS_EAGER", "1")
    (tmp_path / "text.txt").write_text("to be or not to be " * 100)
    small().new_model().save_pretrained(tmp_path / "before")
    save_tokenizer(tmp_path / "before")
    settings = finetune_hf.Settings(
        model=HuggingFaceConfig(path=str(tmp_path / "before"), seq_len=16),
        data=DataConfig(path=str(tmp_path / "text.txt"), validation_fraction=0.2),
        optim=OptimConfig(lr=1e-2),
        parallel=ParallelConfig(n_microbatches=2),
        cluster=ClusterConfig(),
        train=TrainConfig(steps=10, batch_size=4, eval_batches=1, trace_step=None),
    )
    data = finetune_hf.read_tokens(settings, log)
    finetune_hf.finetune_hf(settings, data, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_metrics/global_avg_loss"] for line in lines if "grad_norm" in line]
    assert losses[-1] < losses[0] - 0.3

    written = HuggingFaceConfig(path=str(tmp_path / "model"), seq_len=16)
    assert isinstance(written.codec(), Tokenizer)
    [(x, y)] = data.validation_batches(4, 1)
    with torch.no_grad():
        loss = next_token_loss(load(written).eval()(input_ids=x).logits, y)
    assert loss.item() == pytest.approx(lines[-1]["validation_metrics/loss"], rel=1e-5)


def test_new_weights_on_slices_and_those_of_a_directory_exclude_each_other(tmp_path: Path) -> None:
    small().new_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"parallel\.init_on_slices makes new weights"):
        finetune_hf.Settings(
            model=HuggingFaceConfig(path=str(tmp_path), seq_len=16),
            data=DataConfig(),
            optim=OptimConfig(),
            parallel=ParallelConfig(init_on_slices=True),
            cluster=ClusterConfig(),
            train=TrainConfig(),
        )


def test_bytes_are_tokens_where_there_is_no_tokenizer() -> None:
    codec = Bytes()
    text = "für"
    assert codec.decode(codec.encode(text.encode()).tolist()) == text
    assert codec.decode([ord("a"), 299, ord("b")]) == "ab"  # 299 is no byte


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "nowhere"}, "path=nowhere is no directory with a config.json"),
        ({"architecture": "LlamaModel"}, "architecture is 'LlamaModel' but must be a causal language model"),
        ({"architecture": "NoSuchForCausalLM"}, "architecture is 'NoSuchForCausalLM' but must be"),
        ({"config": {"hidden": 3}}, "config.hidden is no field of LlamaConfig; it has .*'hidden_size'"),
        ({"seq_len": 65}, "seq_len is 65 but the model has 64 positions"),
        ({"seq_len": 0}, "seq_len is 0 but must be at least 1"),
        ({"config": {**SMALL, "vocab_size": 100}}, "config.vocab_size is 100 but there are 256 tokens"),
    ],
)
def test_settings_of_models_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0 but must be at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0 but must be above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 3}, "do_sample is false, but"),
        ({"num_return_sequences": 2}, "do_sample is false, but"),
    ],
)
def test_settings_of_generation_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        GenerateConfig(**fields)


def start(folder: Path, recipe: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / recipe), *overrides],
        cwd=folder,
        env={**os.environ, "TORCHWAYS_EAGER": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_text_is_drawn_from_the_command_line(tmp_path: Path) -> None:
    model = ["model.config.num_hidden_layers=1", "model.config.hidden_size=16", "model.config.intermediate_size=32"]
    draws = ["generate.do_sample=true", "generate.top_k=5", "generate.num_return_sequences=2"]
    done = start(tmp_path, "generate.py", *model, *draws, "generate.max_new_tokens=4", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert "8 tokens in" in done.stdout
    written = (tmp_path / "run" / "text.txt").read_text()
    assert written.count("def main(") == 2
    assert written in done.stdout.replace("\r", "\n")


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    settings = Settings(model=small(), generate=GenerateConfig(max_new_tokens=60), cluster=ClusterConfig())
    with pytest.raises(ConfigError, match=r"the prompt's 9 tokens and generate\.max_new_tokens=60 are more than the"):
        read_prompt(settings, log)


def test_multirun_trains_each_combination(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 100)
    fast = ["model.d_model=16", "model.n_heads=2", "model.seq_len=16", "train.batch_size=4", "train.eval_batches=1"]
    done = start(
        *(tmp_path, "train_lm.py", "--multirun", "data.path=text.txt", *fast, "train.steps=2", "train.trace_step=null"),
        *("parallel=one_island", "optim.lr=0.1,0.001", "hydra.sweep.dir=sweep"),
    )
    assert done.returncode == 0, done.stderr
    losses = []
    for number, lr in enumerate((0.1, 0.001)):
        folder = tmp_path / "sweep" / str(number)
        assert f"lr: {lr}\n" in (folder / "config.yaml").read_text()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss_metrics/global_avg_loss"] for line in lines if "grad_norm" in line])
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]
    assert done.stdout.count("validation loss") == 2
