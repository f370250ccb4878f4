"""Trains a small language model on bytes, as a pipeline over islands.

    twrun --islands 2 --devices-per-island 2 recipes/train_lm.py model=tiny train.steps=200
    TORCHWAYS_EAGER=1 python recipes/train_lm.py            # the same script as plain PyTorch in one process

Settings are composed by Hydra from `configs/`; `recipes/settings.py` says what each of them means.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

# The repository's root, not this script's folder, is where imports start: a module then has one name, `recipes.data`,
# in the script and in tests, and no top-level `data` or `metrics` hides a package of that name.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torchways as tw
from recipes import metrics
from recipes.data import TextData
from recipes.metrics import MetricLogger
from recipes.models.gpt import GPT
from recipes.optim import build_optimizer, build_schedule
from recipes.progress import Progress
from recipes.settings import Precision, Settings, read_settings
from torchways.errors import ConfigError, InternalError, TorchwaysError

log = logging.getLogger("train_lm")


@hydra.main(version_base="1.3", config_path="../configs", config_name="train_lm")
def main(cfg: DictConfig) -> None:
    try:
        settings = read_settings(cfg)
        data = TextData(settings.data, seq_len=settings.model.seq_len)
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)
        log.info("data: %s", data.summary)
        with tw.init():
            train(settings, data, run_dir)
    except InternalError:
        raise  # our bug: its traceback is worth reading
    except TorchwaysError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def train(settings: Settings, data: TextData, run_dir: Path) -> None:
    """Trains, evaluates and writes everything to `run_dir`."""
    config = settings.train
    torch.manual_seed(config.seed)
    model = build_model(settings)
    log.info("model: %s parameters in %d layers", f"{model.num_parameters():,}", settings.model.n_layers)
    optimizer = build_optimizer(settings.optim, model.parameters())
    schedule = build_schedule(settings.optim, optimizer, num_steps=config.steps)

    num_microbatches, order = settings.parallel.total_microbatches, settings.parallel.schedule

    def forward_backward(x: Tensor, y: Tensor) -> Tensor:
        with precision(settings):
            loss = next_byte_loss(model, x, y) / num_microbatches
        loss.backward()
        return loss

    @tw.program
    def train_step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        losses = tw.microbatch(forward_backward, x, y, n_microbatches=num_microbatches, schedule=order)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        return losses.sum(), grad_norm

    @tw.program
    @torch.no_grad()
    def eval_step(x: Tensor, y: Tensor) -> Tensor:
        with precision(settings):
            return next_byte_loss(model, x, y)

    batches = data.train_batches(config.batch_size, seed=config.seed)
    tokens_per_step = config.batch_size * settings.model.seq_len
    progress = Progress(num_steps=config.steps, tokens_per_step=tokens_per_step)
    pending: list[PendingStep] = []
    with MetricLogger(run_dir) as logger, contextlib.closing(progress):
        for step in range(1, config.steps + 1):
            started = time.perf_counter()
            x, y = next(batches)
            data_time_s = time.perf_counter() - started
            lr = schedule.get_last_lr()[0]
            with tw.profile(run_dir / "trace.json") if step == config.trace_step else contextlib.nullcontext():
                loss, grad_norm = train_step(x, y)  # returns at once: futures
            schedule.step()
            pending.append(PendingStep(step=step, loss=loss, grad_norm=grad_norm, lr=lr, data_time_s=data_time_s))
            if step % config.log_every == 0 or step == config.steps:
                train_loss = read_pending(pending, progress, logger)
            if step == config.steps or (config.eval_every and step % config.eval_every == 0):
                validation_loss = evaluate(eval_step, data, settings)
                logger.log(step, {metrics.VALIDATION_LOSS: validation_loss})
                progress.restart_clock()
    print(
        f"train loss       {train_loss:.4f} nats/byte (step {config.steps})\n"
        f"validation loss  {validation_loss:.4f} nats/byte\n"
        f"throughput       {progress.tokens_per_s:,.0f} tokens/s ({1e3 * progress.step_time_s:.1f} ms/step)\n"
        f"files            {run_dir}: {', '.join(sorted(path.name for path in run_dir.iterdir()))}",
        flush=True,
    )


def build_model(settings: Settings) -> Any:
    """Returns the model, its stages and replicas on their slices."""
    parallel = settings.parallel
    module = (lambda: GPT(settings.model)) if parallel.init_on_slices else GPT(settings.model)
    split_spec = {f"layers.{start}": tw.SplitPoint.BEGINNING for start in settings.stage_starts()}
    meshes = stage_meshes(settings)

    def plan(module: nn.Module, mesh: tw.VirtualSlice) -> Mapping[str, Any]:
        return sharding_plan(settings, module, mesh)

    if parallel.replicas == 1:
        return tw.pipeline(module, split_spec=split_spec, meshes=meshes[0], plan=plan)
    return tw.replicate(
        module,
        meshes,
        split_spec=split_spec,
        plan=plan,
        bucket_cap_mb=parallel.bucket_cap_mb,
        reduce_dtype=torch.bfloat16 if parallel.reduce_dtype is Precision.bf16 else None,
    )


def stage_meshes(settings: Settings) -> list[list[tw.VirtualSlice]]:
    """Returns the slices of each replica's stages, one slice for each island.

    Their mesh axis "dp" shares the batch, "tp" each layer's products.
    """
    parallel = settings.parallel
    count, devices = parallel.num_islands, parallel.devices_per_stage
    if tw.is_eager():  # no cluster to measure
        sizes = [devices or 1] * count
    else:
        islands = tw.cluster_info().islands
        if count > len(islands):
            raise ConfigError(
                f"parallel.pipeline_stages is {parallel.pipeline_stages} but the cluster has {len(islands)} islands, "
                f"with parallel.stages_per_island={parallel.stages_per_island} and "
                f"parallel.replicas={parallel.replicas}; start it with twrun --islands {count}, or lower the stages"
            )
        sizes = [devices or island.num_devices for island in islands[:count]]
    shapes = [settings.mesh_shape(size) for size in sizes]
    meshes = [tw.init_device_mesh(shape, mesh_dim_names=("dp", "tp"), island=i) for i, shape in enumerate(shapes)]
    return [
        [meshes[parallel.island_of(replica, stage)] for stage in range(parallel.pipeline_stages)]
        for replica in range(parallel.replicas)
    ]


def sharding_plan(settings: Settings, module: nn.Module, mesh: tw.VirtualSlice) -> Mapping[str, Any]:
    """Returns how parameters are split over their stage's devices."""
    plan = tw.tensor_parallel(module, mesh)
    return tw.fully_shard(module, mesh, plan=plan) if settings.parallel.fully_shard else plan


def precision(settings: Settings) -> contextlib.AbstractContextManager[None]:
    """Returns the context of the forward pass."""
    if settings.train.precision is Precision.bf16:
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def next_byte_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Returns the mean negative log-likelihood of bytes `y` after bytes `x`, both [B, S], in nats."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingStep:
    """A step that was dispatched, and whose results may not be computed yet."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    lr: float
    data_time_s: float


def read_pending(pending: list[PendingStep], progress: Progress, logger: MetricLogger) -> float:
    """Waits for all of `pending`, logs and forgets them; returns the last loss."""
    for p in pending:
        loss, grad_norm = p.loss.item(), p.grad_norm.item()  # the only place of training that waits
        logger.log(p.step, {metrics.TRAIN_LOSS: loss, metrics.GRAD_NORM: grad_norm, metrics.LEARNING_RATE: p.lr})
    step_time_s = progress.advance(len(pending), loss=loss)
    data_time_s = sum(p.data_time_s for p in pending) / len(pending)
    throughput = progress.tokens_per_step / step_time_s
    logger.log(
        pending[-1].step,
        {metrics.THROUGHPUT: throughput, metrics.STEP_TIME: step_time_s, metrics.DATA_TIME: data_time_s},
    )
    pending.clear()
    return loss


def evaluate(eval_step: Callable[[Tensor, Tensor], Tensor], data: TextData, settings: Settings) -> float:
    """Returns the mean validation loss in nats a byte; dispatches every batch before it waits."""
    batches = data.validation_batches(settings.train.batch_size, settings.train.eval_batches)
    losses = [eval_step(x, y) for x, y in batches]
    return sum(loss.item() for loss in losses) / len(losses)


if __name__ == "__main__":
    main()
