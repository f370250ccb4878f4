"""Trains a language model with a mixture of experts on bytes; the experts of a layer live on different islands.

    twrun --islands 2 --devices-per-island 1 recipes/sparse_moe.py                             # no token is dropped
    twrun --islands 2 --devices-per-island 1 recipes/sparse_moe.py model.capacity_factor=1.25  # as in Switch, GShard

Attention and routers are on island 0, expert i of each layer on island i modulo `parallel.islands`. The whole step is
one program: tokens go to the islands of their experts and back, forward and backward. `recipes/models/moe.py` describes
the two ways.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see train_lm.py

import torchways as tw
from recipes import metrics
from recipes.data import TextData
from recipes.flops import count_step_flops
from recipes.models.gpt import GPT, GPTConfig
from recipes.models.moe import MoEConfig, SparseGPT
from recipes.optim import build_optimizer, build_schedule
from recipes.settings import IslandsSettings
from recipes.streams import open_stream, windows
from recipes.training import Job, island_meshes, mean_of, next_token_loss, precision, read_text, run_recipe, train

log = logging.getLogger("sparse_moe")

BALANCE = "moe/balance_loss"
DROPPED = "moe/dropped(%)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(IslandsSettings):
    """All settings of a run of sparse_moe.py."""

    model: MoEConfig


@hydra.main(version_base="1.3", config_path="../configs", config_name="sparse_moe")
def main(cfg: DictConfig) -> None:
    run_recipe(cfg, Settings, train_sparse_moe, log=log, prepare=read_text)


def train_sparse_moe(settings: Settings, data: TextData, run_dir: Path) -> None:
    """Trains, evaluates and writes everything to `run_dir`."""
    config, num_microbatches = settings.train, settings.parallel.n_microbatches
    torch.manual_seed(config.seed)
    rows = settings.parallel.rows(config.batch_size)
    meshes = island_meshes(settings.parallel.islands, rows, setting="parallel.islands")
    model = place(SparseGPT(settings.model), meshes)
    log.info("model: %s parameters in %d layers", f"{model.num_parameters():,}", settings.model.n_layers)
    optimizer = build_optimizer(settings.optim, model.parameters())
    schedule = build_schedule(settings.optim, optimizer, num_steps=config.steps)

    def forward_backward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with precision(config):
            logits, routing = model(x)
            loss = next_token_loss(logits, y)
        ((loss + settings.model.balance_weight * routing.balance) / num_microbatches).backward()
        return loss, routing.balance, routing.dropped

    @tw.program
    def train_step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        losses, balances, dropped = tw.microbatch(forward_backward, x, y, n_microbatches=num_microbatches)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        return {
            metrics.TRAIN_LOSS: losses.mean(),
            metrics.GRAD_NORM: grad_norm,
            BALANCE: balances.mean(),
            DROPPED: 100 * dropped.mean(),
        }

    @tw.program
    @torch.no_grad()
    def eval_step(x: Tensor, y: Tensor) -> Tensor:
        with precision(config):
            return next_token_loss(model(x)[0], y)

    def evaluate() -> dict[str, float]:
        return {
            metrics.VALIDATION_LOSS: mean_of(eval_step, data.validation_batches(config.batch_size, config.eval_batches))
        }

    shape = (config.batch_size, settings.seq_len)
    job = Job(
        step=train_step,
        batches=open_stream(settings.data, data, meshes[0], windows, batch_size=config.batch_size, seed=config.seed),
        evaluate=evaluate,
        schedules=[schedule],
        state={"model": model, "optimizer": optimizer, "schedule": schedule},
        tokens_per_step=math.prod(shape),
        flops_per_step=count_step_flops(
            lambda: GPT(as_dense(settings.model)),
            lambda gpt, batch: next_token_loss(gpt(batch["x"]), batch["y"]),
            {"x": shape, "y": shape},
        ),
    )
    train(job, config, settings.checkpoint, run_dir)


def place(model: SparseGPT, meshes: list[tw.VirtualSlice]) -> SparseGPT:
    """Puts the model on the first slice, and expert i of each layer on slice i modulo their number."""
    tw.parallelize_module(model, meshes[0])
    for mixture in model.mixtures():
        for index, expert in enumerate(mixture.experts):
            tw.parallelize_module(expert, meshes[index % len(meshes)])
    return model


def as_dense(config: MoEConfig) -> GPTConfig:
    """Returns a model without experts that computes as much as each token's `top_k` experts do, but for the routers."""
    sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(GPTConfig)}
    return GPTConfig(**{**sizes, "ffn_multiple": config.top_k * config.ffn_multiple})


if __name__ == "__main__":
    main()
