"""Trains a causal language model of `transformers` on text files, on one island or as a pipeline over several.

    twrun --islands 2 --devices-per-island 1 recipes/finetune_hf.py                             # a new, small Llama
    twrun --islands 2 --devices-per-island 1 recipes/finetune_hf.py model.path=DIRECTORY data=text data.path=FILES

A directory has the form of `save_pretrained`, or is one where train_lm.py keeps its checkpoints. The executors read
their parts of it: no process holds all of them. The result, the folder `model` of the run, has the form of
`save_pretrained`. Nothing is downloaded. Stages begin at layers of the model, wherever its class keeps them.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see train_lm.py

import torchways as tw
from recipes import metrics, settings
from recipes.data import TextData
from recipes.flops import count_step_flops
from recipes.models.hugging_face import Bytes, HuggingFaceConfig, layers_name, write_model
from recipes.optim import build_optimizer, build_schedule
from recipes.streams import open_stream, windows
from recipes.train_lm import place_model, stage_meshes
from recipes.training import Job, mean_of, next_token_loss, precision, run_recipe, train
from torchways.errors import ConfigError

log = logging.getLogger("finetune_hf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(settings.Settings):
    """All settings of a run of finetune_hf.py."""

    model: HuggingFaceConfig

    def __post_init__(self) -> None:
        settings.Settings.__post_init__(self)
        if self.model.path is not None and self.parallel.init_on_slices:
            raise ConfigError(
                "parallel.init_on_slices makes new weights, but those of model.path are wanted; set it to false"
            )


@hydra.main(version_base="1.3", config_path="../configs", config_name="finetune_hf")
def main(cfg: DictConfig) -> None:
    run_recipe(cfg, Settings, finetune_hf, log=log, prepare=read_tokens)


def read_tokens(settings: Settings, log: logging.Logger) -> TextData:
    """Returns the text as tokens of the model."""
    data = TextData(settings.data, seq_len=settings.seq_len, encode=settings.model.codec().encode)
    log.info("data: %s", data.summary)
    return data


def finetune_hf(settings: Settings, data: TextData, run_dir: Path) -> None:
    """Trains, evaluates and writes everything to `run_dir`, the model too."""
    config, parallel = settings.train, settings.parallel
    torch.manual_seed(config.seed)
    meshes = stage_meshes(settings)
    model = make_model(settings, meshes)
    model.train()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    log.info(
        "model: %s, %s parameters in %d layers", type(model).__name__, f"{num_parameters:,}", settings.model.n_layers
    )
    optimizer = build_optimizer(settings.optim, model.parameters())
    schedule = build_schedule(settings.optim, optimizer, num_steps=config.steps)

    def forward_backward(x: Tensor, y: Tensor) -> Tensor:
        with precision(config):
            loss = loss_of(model, {"x": x, "y": y})
        (loss / parallel.total_microbatches).backward()
        return loss

    @tw.program
    def train_step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        losses = tw.microbatch(
            forward_backward, x, y, n_microbatches=parallel.total_microbatches, schedule=parallel.schedule
        )
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        return {metrics.TRAIN_LOSS: losses.mean(), metrics.GRAD_NORM: grad_norm}

    @tw.program
    @torch.no_grad()
    def eval_step(x: Tensor, y: Tensor) -> Tensor:
        with precision(config):
            return loss_of(model, {"x": x, "y": y})

    def evaluate() -> dict[str, float]:
        return {
            metrics.VALIDATION_LOSS: mean_of(eval_step, data.validation_batches(config.batch_size, config.eval_batches))
        }

    shape = (config.batch_size, settings.seq_len)
    codec = settings.model.codec()
    job = Job(
        step=train_step,
        batches=open_stream(
            *(settings.data, data, meshes[0][0], windows),
            tokens_of=None if isinstance(codec, Bytes) else settings.model.path,
            batch_size=config.batch_size,
            seed=config.seed,
        ),
        evaluate=evaluate,
        schedules=[schedule],
        state={"model": model, "optimizer": optimizer, "schedule": schedule},
        tokens_per_step=math.prod(shape),
        flops_per_step=count_step_flops(settings.model.new_model, loss_of, {"x": shape, "y": shape}),
        unit=codec.unit,
    )
    train(job, config, settings.checkpoint, run_dir)
    write_model(model, settings.model, run_dir / "model")
    codec.save(run_dir / "model")
    log.info("model: written to %s", run_dir / "model")


def make_model(settings: Settings, meshes: Sequence[Sequence[tw.VirtualSlice]]) -> Any:
    """Returns the model on its slices, in fp32: that of the directory, or a new one."""
    config = settings.model
    with torch.device("meta"):
        layers = layers_name(config.new_model(), config.n_layers) if settings.stage_starts() else ""
    if config.path is None:
        return place_model(
            settings, config.new_model if settings.parallel.init_on_slices else config.new_model(), layers, meshes
        )
    model = place_model(settings, lambda: config.empty_model(torch.float32), layers, meshes)
    config.load_weights(model)
    return model


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns the mean negative log-likelihood in nats of tokens `y`, each after tokens `x`, both [B, S]."""
    return next_token_loss(model(input_ids=batch["x"], use_cache=False).logits, batch["y"])


if __name__ == "__main__":
    main()
