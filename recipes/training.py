"""What the training recipes have in common: how a script runs, and the loop over steps.

A recipe gives the loop its step: a program that returns arrays at once. The loop reads them every few steps, evaluates,
and writes metrics, a trace and a picture of the loss into the run's folder.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

import torchways as tw
from recipes import metrics
from recipes.checkpoints import Checkpoints
from recipes.data import TextData
from recipes.metrics import MetricLogger
from recipes.progress import Progress
from recipes.settings import CheckpointConfig, ClusterConfig, Precision, TrainConfig, read_settings
from recipes.streams import Stream
from torchways.errors import ConfigError, InternalError, TorchwaysError

S = TypeVar("S")
D = TypeVar("D")


def run_recipe(
    cfg: DictConfig,
    settings_class: type[S],
    run: Callable[[S, D, Path], None],
    *,
    log: logging.Logger,
    prepare: Callable[[S, logging.Logger], D],
) -> None:
    """Reads the settings, starts or joins a cluster, and calls `run` with the run's folder.

    An error of the user's ends the process with one line.

    Args:
        cfg: what Hydra composed.
        settings_class: a frozen dataclass; its fields are the sections, `cluster` among them.
        run: what the recipe does.
        log: the recipe's logger.
        prepare: reads what `run` needs, before a cluster is used.
    """
    try:
        settings = read_settings(settings_class, cfg)
        prepared = prepare(settings, log)
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)
        cluster: ClusterConfig = settings.cluster
        with tw.init(islands=cluster.islands, devices_per_island=cluster.devices_per_island):
            run(settings, prepared, run_dir)
    except InternalError:
        raise  # our bug: its traceback is worth reading
    except TorchwaysError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def read_text(settings: Any, log: logging.Logger) -> TextData:
    """Returns the text of the section `data` as bytes, in windows of `seq_len`."""
    data = TextData(settings.data, seq_len=settings.seq_len)
    log.info("data: %s", data.summary)
    return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the loop trains.

    Attributes:
        step: computes an update of a batch; returns at once. Its results are scalars by metric tag, among them
            `metrics.TRAIN_LOSS`; those that are None are left out.
        batches: the batches, without end: the arguments of `step`. Checkpoints have their place.
        evaluate: returns metrics of the held-out text, among them `metrics.VALIDATION_LOSS`. The model is then in
            evaluation mode.
        schedules: learning rates; the first one is logged.
        tokens_per_step: tokens of a batch, for the throughput.
        flops_per_step: floating-point operations of a step, or None if they are not known.
        state: what a checkpoint holds: "model", optimizers, learning rates.
        description: of the model, for recipes that load its checkpoints: see recipes/models/trained_gpt.py.
        unit: of the loss.
    """

    step: Callable[..., Mapping[str, Tensor | None]]
    batches: Stream
    evaluate: Callable[[], Mapping[str, float]]
    schedules: Sequence[LRScheduler]
    tokens_per_step: int
    flops_per_step: int | None
    state: Mapping[str, Any]
    description: Mapping[str, Any] | None = None
    unit: str = "nats/byte"


def train(job: Job, config: TrainConfig, checkpoint: CheckpointConfig, run_dir: Path) -> None:
    """Trains, evaluates and writes everything to `run_dir`; prints the last losses and the throughput.

    Raises:
        SystemExit: a signal asked for the end, and a checkpoint is written.
    """
    checkpoints = Checkpoints(checkpoint, {**job.state, "data": job.batches}, job.description)
    done = checkpoints.resume()
    if done >= config.steps:
        print(f"nothing to do: the checkpoint is of step {done}, and train.steps is {config.steps}", flush=True)
        return
    progress = Progress(num_steps=config.steps, first=done, tokens_per_step=job.tokens_per_step)
    pending: list[_PendingStep] = []
    with MetricLogger(run_dir, done=done) as logger, contextlib.closing(progress), checkpoints:
        for step in range(done + 1, config.steps + 1):
            started = time.perf_counter()
            batch = next(job.batches)
            data_time_s = time.perf_counter() - started
            lr = job.schedules[0].get_last_lr()[0]
            with tw.profile(run_dir / "trace.json") if step == config.trace_step else contextlib.nullcontext():
                results = job.step(*batch)  # returns at once: futures
            for schedule in job.schedules:
                schedule.step()
            pending.append(_PendingStep(step=step, results=results, lr=lr, data_time_s=data_time_s))
            ending = checkpoints.signal  # one that comes later is for the next step, which saves
            checkpoints.after(step, is_last=step == config.steps or ending is not None)
            if step % config.log_every == 0 or step == config.steps or ending:
                train_loss, step_time_s = _read_pending(pending, progress, logger)
                _log_utilisation(step, job, config, step_time_s, logger)
            if step == config.steps or (config.eval_every and step % config.eval_every == 0):
                validation = _evaluate(job)
                logger.log(step, validation)
                progress.restart_clock()
            if ending and step < config.steps:
                sys.exit(128 + ending)
    print(
        f"train loss       {train_loss:.4f} {job.unit} (step {config.steps})\n"
        f"validation loss  {validation[metrics.VALIDATION_LOSS]:.4f} {job.unit}\n"
        f"throughput       {progress.tokens_per_s:,.0f} tokens/s ({1e3 * progress.step_time_s:.1f} ms/step)\n"
        f"files            {run_dir}: {', '.join(sorted(path.name for path in run_dir.iterdir()))}",
        flush=True,
    )


def _evaluate(job: Job) -> Mapping[str, float]:
    model = job.state["model"]
    model.eval()  # without dropout
    try:
        return job.evaluate()
    finally:
        model.train()


@dataclass(frozen=True, slots=True, kw_only=True)
class _PendingStep:
    """A step that was dispatched, and whose results may not be computed yet."""

    step: int
    results: Mapping[str, Tensor | None]
    lr: float
    data_time_s: float


def _read_pending(pending: list[_PendingStep], progress: Progress, logger: MetricLogger) -> tuple[float, float]:
    """Waits for all of `pending`, logs and forgets them; returns the last loss and the seconds of a step."""
    for p in pending:  # the only place of training that waits
        values = {tag: result.item() for tag, result in p.results.items() if result is not None}
        logger.log(p.step, {**values, metrics.LEARNING_RATE: p.lr})
    step_time_s = progress.advance(len(pending), loss=values[metrics.TRAIN_LOSS])
    data_time_s = sum(p.data_time_s for p in pending) / len(pending)
    throughput = progress.tokens_per_step / step_time_s
    logger.log(
        pending[-1].step,
        {metrics.THROUGHPUT: throughput, metrics.STEP_TIME: step_time_s, metrics.DATA_TIME: data_time_s},
    )
    pending.clear()
    return values[metrics.TRAIN_LOSS], step_time_s


def _log_utilisation(step: int, job: Job, config: TrainConfig, step_time_s: float, logger: MetricLogger) -> None:
    if job.flops_per_step is None:
        return
    flops_per_s = job.flops_per_step / step_time_s
    values = {metrics.TFLOPS: flops_per_s / 1e12}
    if config.peak_flops is not None:
        values[metrics.UTILISATION] = 100 * flops_per_s / config.peak_flops
    logger.log(step, values)


def island_meshes(count: int, batch_size: int, *, setting: str) -> list[tw.VirtualSlice]:
    """Returns one slice of each of `count` islands, of all its devices, in the mesh axis "dp"; eager: of one device.

    Args:
        count: number of islands.
        batch_size: of a microbatch; the devices of a slice share it.
        setting: name of the setting that asks for so many, for messages.

    Raises:
        ConfigError: the cluster has fewer islands, or their devices do not divide the batch.
    """
    if tw.is_eager():  # no cluster to measure
        sizes = [1] * count
    else:
        islands = tw.cluster_info().islands
        if count > len(islands):
            raise ConfigError(
                f"{setting} is {count} but the cluster has {len(islands)} islands; start it with twrun --islands "
                f"{count}, set cluster.islands={count}, or lower {setting}"
            )
        sizes = [island.num_devices for island in islands[:count]]
    for size in sizes:
        if batch_size % size:
            raise ConfigError(
                f"each of parallel.n_microbatches has {batch_size} of train.batch_size's sequences, which the {size} "
                f"devices of an island cannot share evenly; set train.batch_size to {size} times as many microbatches, "
                "or a multiple of that"
            )
    return [tw.init_device_mesh((size,), mesh_dim_names=("dp",), island=i) for i, size in enumerate(sizes)]


def precision(config: TrainConfig) -> contextlib.AbstractContextManager[None]:
    """Returns the context of the forward pass."""
    if config.precision is Precision.bf16:
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def next_token_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Returns the mean negative log-likelihood in nats of tokens `y` [B, S], given `logits` [B, S, V]."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def mean_of(eval_step: Callable[..., Tensor], batches: Iterable[tuple[Tensor, ...]]) -> float:
    """Returns the mean of a program's scalar over batches; dispatches every batch before it waits."""
    losses = [eval_step(*batch) for batch in batches]
    return sum(loss.item() for loss in losses) / len(losses)
