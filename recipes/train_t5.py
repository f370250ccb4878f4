"""Trains a T5 of `transformers` on bytes: the encoder on one island, the decoder on another.

    twrun --islands 2 --devices-per-island 1 recipes/train_t5.py

The task is T5's own, span corruption, on bytes of the text (`recipes/span_corruption.py`). The model is built from
settings; nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
import transformers
from omegaconf import DictConfig
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see train_lm.py

import torchways as tw
from recipes import metrics
from recipes.data import TextData
from recipes.flops import count_step_flops
from recipes.optim import build_optimizer, build_schedule
from recipes.settings import IslandsSettings, at_least
from recipes.span_corruption import END, PAD, SpanConfig, corrupted
from recipes.streams import open_stream, spans
from recipes.training import Job, island_meshes, mean_of, precision, read_text, run_recipe, train

log = logging.getLogger("train_t5")


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Settings:
    """Sizes of the model, under the names of transformers' T5Config."""

    seq_len: int = 128
    """Bytes of a window of text, before spans are cut out."""

    d_model: int = 128
    """Width of the residual stream."""

    d_kv: int = 32
    """Width of an attention head."""

    d_ff: int = 512
    """Hidden width of an MLP."""

    num_layers: int = 2
    """Blocks of the encoder, and of the decoder."""

    num_heads: int = 4
    """Attention heads of a block."""

    dropout_rate: float = 0.0
    """Probability that dropout zeroes an element."""

    def __post_init__(self) -> None:
        at_least(2, seq_len=self.seq_len)
        at_least(
            1,
            d_model=self.d_model,
            d_kv=self.d_kv,
            d_ff=self.d_ff,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
        )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"dropout_rate is {self.dropout_rate} but must be at least 0 and below 1; 0 turns it off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(IslandsSettings):
    """All settings of a run of train_t5.py."""

    model: T5Settings
    spans: SpanConfig


@hydra.main(version_base="1.3", config_path="../configs", config_name="train_t5")
def main(cfg: DictConfig) -> None:
    run_recipe(cfg, Settings, train_t5, log=log, prepare=read_text)


def train_t5(settings: Settings, data: TextData, run_dir: Path) -> None:
    """Trains, evaluates and writes everything to `run_dir`."""
    config, num_microbatches = settings.train, settings.parallel.n_microbatches
    torch.manual_seed(config.seed)
    rows = settings.parallel.rows(config.batch_size)
    encoder_mesh, *others = island_meshes(settings.parallel.islands, rows, setting="parallel.islands")
    order = "1F1B" if others else "LoopedBFS"  # which has several stages on one slice
    model = tw.pipeline(
        make_model(settings),
        split_spec={"decoder": tw.SplitPoint.BEGINNING},
        meshes=[encoder_mesh, others[0] if others else encoder_mesh],
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    log.info("model: %s parameters in 2 times %d layers", f"{num_parameters:,}", settings.model.num_layers)
    optimizer = build_optimizer(settings.optim, model.parameters())
    schedule = build_schedule(settings.optim, optimizer, num_steps=config.steps)

    def forward_backward(inputs: Tensor, targets: Tensor) -> Tensor:
        with precision(config):
            loss = loss_of(model, {"inputs": inputs, "targets": targets})
        (loss / num_microbatches).backward()
        return loss

    @tw.program
    def train_step(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        losses = tw.microbatch(forward_backward, inputs, targets, n_microbatches=num_microbatches, schedule=order)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        return {metrics.TRAIN_LOSS: losses.mean(), metrics.GRAD_NORM: grad_norm}

    @tw.program
    @torch.no_grad()
    def eval_step(inputs: Tensor, targets: Tensor) -> Tensor:
        with precision(config):
            return loss_of(model, {"inputs": inputs, "targets": targets})

    def evaluate() -> dict[str, float]:
        windows = (x for x, _ in data.validation_batches(config.batch_size, config.eval_batches))
        return {metrics.VALIDATION_LOSS: mean_of(eval_step, corrupted(windows, settings.spans, seed=config.seed))}

    input_length, target_length = settings.spans.lengths(settings.seq_len)
    job = Job(
        step=train_step,
        batches=open_stream(
            *(settings.data, data, encoder_mesh, spans),
            batch_size=config.batch_size,
            seed=config.seed,
            **dataclasses.asdict(settings.spans),
        ),
        evaluate=evaluate,
        schedules=[schedule],
        state={"model": model, "optimizer": optimizer, "schedule": schedule},
        tokens_per_step=config.batch_size * (input_length + target_length),
        flops_per_step=count_step_flops(
            lambda: make_model(settings),
            loss_of,
            {"inputs": (config.batch_size, input_length), "targets": (config.batch_size, target_length)},
        ),
        unit="nats/token",
    )
    train(job, config, settings.checkpoint, run_dir)


def make_model(settings: Settings) -> transformers.T5ForConditionalGeneration:
    """Returns the model on the host."""
    sizes = settings.model
    config = transformers.T5Config(
        vocab_size=settings.spans.vocab_size(sizes.seq_len),
        d_model=sizes.d_model,
        d_kv=sizes.d_kv,
        d_ff=sizes.d_ff,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        dropout_rate=sizes.dropout_rate,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=END,
        use_cache=False,
    )
    return transformers.T5ForConditionalGeneration(config)


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns the mean negative log-likelihood of the target's tokens in nats."""
    return model(input_ids=batch["inputs"], labels=batch["targets"]).loss


if __name__ == "__main__":
    main()
