"""Directories of weights come to slices without passing the controller, as do the checkpoints of train_lm.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import torch.distributed.checkpoint as dcp
import transformers

import torchways as tw
from recipes import finetune_hf, generate, train_lm
from recipes.data import DataConfig
from recipes.models.gpt import GPT, GPTConfig
from recipes.models.hugging_face import HuggingFaceConfig, write_model
from recipes.optim import OptimConfig
from recipes.settings import ClusterConfig, ParallelConfig, TrainConfig
from torchways.controller.buffers import HostBuffer
from torchways.errors import CheckpointError

ROOT = Path(__file__).parents[2]
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def islands():
    """A cluster of two islands with two devices each."""
    with tw.init(islands=2, devices_per_island=2):
        yield


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists the tensors that this process reads from safetensors; executors are processes of their own."""
    read: list[str] = []
    plain = safetensors.safe_open

    class Watched:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = plain(*args, **kwargs)

        def __enter__(self) -> Watched:
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_tensor(self, name: str) -> Any:
            read.append(name)
            return self._file.get_tensor(name)

        def get_slice(self, name: str) -> Any:
            found = self._file.get_slice(name)

            class Slice:
                def __getattr__(self, kind: str) -> Any:  # shape and dtype are in the file's header
                    return getattr(found, kind)

                def __getitem__(self, index: Any) -> Any:
                    read.append(name)
                    return found[index]

            return Slice()

    monkeypatch.setattr(safetensors, "safe_open", Watched)
    return read


def saved(folder: Path, *, dtype: torch.dtype = torch.float32, **fields: Any) -> transformers.PreTrainedModel:
    """Returns a Llama that was written to `folder` in several files."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **fields})).to(dtype).eval()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").is_file()
    return model


def text_of(folder: Path, path: Path) -> tuple[str, torch.Tensor]:
    """Runs generate.py's work in this process; returns the text, and the prompt's tokens."""
    settings = generate.Settings(
        model=HuggingFaceConfig(path=str(path), seq_len=16),
        generate=generate.GenerateConfig(prompt="To be", max_new_tokens=8),
        cluster=ClusterConfig(),
    )
    codec, tokens = generate.read_prompt(settings, generate.log)
    generate.generate(settings, (codec, tokens), folder)
    return (folder / "text.txt").read_text(), tokens


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_files_are_read_by_the_executors_alone(islands, tmp_path, no_reads, tied):
    plain = saved(tmp_path / "model", tie_word_embeddings=tied)
    config = HuggingFaceConfig(path=str(tmp_path / "model"), seq_len=16)
    mesh = tw.init_device_mesh((2,), mesh_dim_names=("tp",), island=0)
    model = tw.parallelize_module(config.empty_model, mesh, tw.tensor_parallel).eval()
    assert bytes_here(model) == 0
    config.load_weights(model)
    assert no_reads == []
    assert bytes_here(model) == 0
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    x = torch.randint(0, 256, (2, 8))
    torch.testing.assert_close(model(input_ids=x).logits.cpu(), plain(x).logits, rtol=1e-4, atol=1e-5)


def bytes_here(model: torch.nn.Module) -> int:
    """Returns how many bytes of a model's values this process holds."""
    buffers = [tensor._buffer for tensor in (*model.parameters(), *model.buffers())]
    contents = [buffer.value.content for buffer in buffers if isinstance(buffer, HostBuffer)]
    return sum(content.nbytes for content in contents if isinstance(content, torch.Tensor))


def test_a_model_without_its_head_has_other_names(islands, tmp_path):
    """GPT-2 is distributed so; its buffers are in no file."""
    config = transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    plain = transformers.GPT2LMHeadModel(config).eval()
    plain.config.architectures = ["GPT2LMHeadModel"]
    plain.transformer.save_pretrained(tmp_path, max_shard_size="20KB")
    ours = HuggingFaceConfig(path=str(tmp_path), seq_len=16)
    mesh = tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=0)
    model = tw.parallelize_module(ours.empty_model, mesh).eval()
    ours.load_weights(model)
    x = torch.randint(0, 256, (2, 8))
    torch.testing.assert_close(model(input_ids=x).logits.cpu(), plain(x).logits, rtol=1e-4, atol=1e-5)


def test_a_model_is_generated_with_in_the_type_of_its_files(islands, tmp_path, no_reads):
    saved(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True)
    config = HuggingFaceConfig(path=str(tmp_path / "model"), seq_len=16)
    with torch.device("meta"):
        assert {p.dtype for p in config.empty_model().parameters()} == {torch.bfloat16}
        assert {p.dtype for p in config.empty_model(torch.float32).parameters()} == {torch.float32}
        assert config.empty_model().model.rotary_emb.inv_freq.dtype == torch.float32
    text, _ = text_of(tmp_path, tmp_path / "model")
    assert text.startswith("To be")
    assert no_reads == []


def test_text_is_that_of_transformers(islands, tmp_path):
    plain = saved(tmp_path / "model", tie_word_embeddings=True)
    text, tokens = text_of(tmp_path, tmp_path / "model")
    expected = plain.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False)
    assert text == generate.Bytes().decode(expected[0].tolist()) + "\n"


def finetuning(path: Path, folder: Path, **parallel: Any) -> finetune_hf.Settings:
    (folder / "text.txt").write_text("to be or not to be " * 100)
    return finetune_hf.Settings(
        model=HuggingFaceConfig(path=str(path), seq_len=16),
        data=DataConfig(path=str(folder / "text.txt"), validation_fraction=0.2),
        optim=OptimConfig(lr=1e-3),
        parallel=ParallelConfig(**parallel),
        cluster=ClusterConfig(),
        train=TrainConfig(steps=2, batch_size=4, eval_batches=1, trace_step=None),
    )


def test_a_directory_is_loaded_to_stages_and_replicas_and_written_in_several_files(
    islands, tmp_path, no_reads, monkeypatch
):
    plain = saved(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True).float()
    monkeypatch.setattr("recipes.models.hugging_face._FILE_BYTES", 20_000)
    x = torch.randint(0, 256, (4, 8))
    for parallel in ({"pipeline_stages": 2, "fully_shard": True}, {"pipeline_stages": 1, "replicas": 2}):
        settings = finetuning(tmp_path / "model", tmp_path, **parallel)
        model = finetune_hf.make_model(settings, train_lm.stage_meshes(settings)).eval()
        assert no_reads == []
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # what an optimizer changes
        logits = tw.program(lambda x, model=model: model(input_ids=x).logits)
        with torch.no_grad():
            torch.testing.assert_close(logits(x).cpu(), plain(x).logits, rtol=1e-4, atol=1e-4)
        write_model(model, settings.model, tmp_path / "written")
        assert len(list((tmp_path / "written").glob("*.safetensors"))) > 2
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "written", dtype=torch.float32)
        for name, value in plain.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name


def test_what_is_missing_in_a_directory_is_named(islands, tmp_path):
    saved(tmp_path / "model")
    [first, *_] = sorted((tmp_path / "model").glob("*.safetensors"))
    first.unlink()
    config = HuggingFaceConfig(path=str(tmp_path / "model"), seq_len=16)
    mesh = tw.init_device_mesh((2,), mesh_dim_names=("tp",), island=0)
    model = tw.parallelize_module(config.empty_model, mesh)
    with pytest.raises(CheckpointError, match=r"does not have model\.embed_tokens\.weight"):
        config.load_weights(model)


TINY = GPTConfig(seq_len=32, d_model=16, n_layers=2, n_heads=2)


def trained(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Runs train_lm.py for some steps as plain PyTorch; its checkpoints are below `folder`."""
    (folder / "text.txt").write_text("To be, or not to be, that is the question. " * 100)
    return subprocess.run(
        [
            *(sys.executable, str(ROOT / "recipes" / "train_lm.py"), "data.path=text.txt", "train.steps=4"),
            *("model.seq_len=32", "model.d_model=16", "model.n_layers=2", "model.n_heads=2", "train.batch_size=4"),
            *("train.eval_batches=1", "train.trace_step=null", "checkpoint.every=2", "hydra.run.dir=run", *more),
        ],
        cwd=folder,
        env={**os.environ, "TORCHWAYS_EAGER": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_checkpoints_of_train_lm_generate_and_are_trained_further(islands, tmp_path):
    done = trained(tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "train_lm" / "checkpoints"
    assert json.loads((folder / "model.json").read_text())["d_model"] == 16
    ours = GPT(TINY)
    dcp.load({"model": (state := ours.state_dict())}, checkpoint_id=folder / "step_00000004")
    ours.load_state_dict(state)

    for path in (folder, folder / "step_00000004"):
        text, tokens = text_of(tmp_path, path)
        while tokens.shape[1] < 13:
            tokens = torch.cat([tokens, ours(tokens)[:, -1:].argmax(-1)], dim=1)
        assert text == generate.Bytes().decode(tokens[0].tolist()) + "\n"

    settings = finetuning(folder, tmp_path, pipeline_stages=2)
    model = finetune_hf.make_model(settings, train_lm.stage_meshes(settings)).eval()
    x = torch.randint(0, 256, (4, 16))
    with torch.no_grad():
        found = tw.program(lambda x: model(input_ids=x).logits)(x).cpu()
        torch.testing.assert_close(found, ours(x), rtol=1e-4, atol=1e-5)
    write_model(model, settings.model, tmp_path / "written")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "written", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, ours(x), rtol=1e-4, atol=1e-5)


def test_a_folder_that_is_no_model_says_what_would_be(tmp_path):
    (tmp_path / "model.json").write_text("{}x")
    with pytest.raises(ValueError, match=r"model\.json does not describe a model of train_lm\.py"):
        HuggingFaceConfig(path=str(tmp_path), seq_len=16)
    transformers.LlamaConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no \*\.safetensors, .* write it again with save_pretrained"):
        HuggingFaceConfig(path=str(tmp_path), seq_len=16)
