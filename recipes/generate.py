"""Generates text with a causal language model of `transformers` on the devices of one island.

    twrun --islands 1 --devices-per-island 2 recipes/generate.py model.path=DIRECTORY "generate.prompt='def main('"

A directory has the form of `save_pretrained`, as recipes/finetune_hf.py writes it, or is one where train_lm.py keeps
its checkpoints (outputs/train_lm/checkpoints). The devices' process reads it; this one does not. Without one, the model
is made of settings with weights that were just drawn, so the text means nothing. The layers' products and the key-value
cache are split over the devices.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see train_lm.py

import torchways as tw
from recipes.models.hugging_face import Bytes, HuggingFaceConfig, Tokenizer
from recipes.settings import ClusterConfig, at_least
from recipes.training import run_recipe
from torchways.errors import ConfigError

log = logging.getLogger("generate")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """What to generate."""

    prompt: str = "def main("
    """Text to go on from."""

    max_new_tokens: int = 64
    """Tokens to add, unless the model ends the text before."""

    do_sample: bool = False
    """Whether tokens are drawn; otherwise each is the most likely one."""

    temperature: float = 1.0
    """Above 1, draws are more even; below, less. For draws only."""

    top_k: int | None = None
    """How many of the most likely tokens a draw is from; null: all."""

    top_p: float | None = None
    """A draw is from the most likely tokens that have this probability together; null: all."""

    num_return_sequences: int = 1
    """Continuations of the prompt; more than one for draws only."""

    seed: int = 0
    """Seed of new weights, and of draws."""

    def __post_init__(self) -> None:
        at_least(
            1, max_new_tokens=self.max_new_tokens, top_k=self.top_k, num_return_sequences=self.num_return_sequences
        )
        at_least(0, seed=self.seed)
        if not self.prompt:
            raise ValueError("prompt is empty; give a text to go on from")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature is {self.temperature} but must be above 0; 1 leaves the model's as they are")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p} but must be above 0 and at most 1; null turns it off")
        if not self.do_sample and (self.num_return_sequences > 1 or self.top_k or self.top_p or self.temperature != 1):
            raise ValueError(
                "do_sample is false, but temperature, top_k, top_p and num_return_sequences are for draws; "
                "set it to true"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of a run of generate.py."""

    model: HuggingFaceConfig
    generate: GenerateConfig
    cluster: ClusterConfig


@hydra.main(version_base="1.3", config_path="../configs", config_name="generate")
def main(cfg: DictConfig) -> None:
    run_recipe(cfg, Settings, generate, log=log, prepare=read_prompt)


def read_prompt(settings: Settings, log: logging.Logger) -> tuple[Bytes | Tokenizer, torch.Tensor]:
    """Returns what makes text of tokens, and the prompt's tokens, int64 [1, length]."""
    codec = settings.model.codec()
    tokens = torch.from_numpy(codec.encode(settings.generate.prompt.encode()).astype("int64"))[None]
    positions = getattr(settings.model.transformers_config(), "max_position_embeddings", None)
    length = tokens.shape[1] + settings.generate.max_new_tokens
    if positions is not None and length > positions:
        raise ConfigError(
            f"the prompt's {tokens.shape[1]} tokens and generate.max_new_tokens={settings.generate.max_new_tokens} are "
            f"more than the model's {positions} positions; lower the one or the other"
        )
    return codec, tokens


def generate(settings: Settings, prompt: tuple[Bytes | Tokenizer, torch.Tensor], run_dir: Path) -> None:
    """Prints each continuation after the prompt, and writes them to `text.txt` in `run_dir`."""
    (codec, tokens), config = prompt, settings.generate
    torch.manual_seed(config.seed)
    num_devices = 1 if tw.is_eager() else tw.cluster_info().islands[0].num_devices
    mesh = tw.init_device_mesh((num_devices,), mesh_dim_names=("tp",), island=0)
    has_weights = settings.model.path is not None
    made = settings.model.empty_model if has_weights else settings.model.new_model()
    model = tw.parallelize_module(made, mesh, tw.tensor_parallel).eval()
    if has_weights:
        settings.model.load_weights(model)
        model.generation_config = settings.model.generation_config() or model.generation_config
    draws = (
        {"temperature": config.temperature, "top_k": config.top_k or 0, "top_p": config.top_p}
        if config.do_sample
        else {}
    )
    started = time.perf_counter()
    rows = tw.generate(
        model,
        tokens,
        max_new_tokens=config.max_new_tokens,
        do_sample=config.do_sample,
        num_return_sequences=config.num_return_sequences,
        pad_token_id=model.generation_config.pad_token_id or 0,
        **{name: value for name, value in draws.items() if value is not None},
    )
    seconds = time.perf_counter() - started
    texts = [codec.decode(row.tolist()) for row in rows]
    (run_dir / "text.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    print("\n".join(texts), flush=True)
    log.info("%d tokens in %.1f s, compilation included", rows.numel() - rows.shape[0] * tokens.shape[1], seconds)


if __name__ == "__main__":
    main()
