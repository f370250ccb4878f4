"""Trains a small language model on bytes, as a pipeline over islands.

    twrun --islands 2 --devices-per-island 2 recipes/train_lm.py model=tiny train.steps=200
    TORCHWAYS_EAGER=1 python recipes/train_lm.py            # the same script as plain PyTorch in one process

Settings are composed by Hydra from `configs/`; `recipes/settings.py` says what each of them means.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

# The repository's root, not this script's folder, is where imports start: a module then has one name, `recipes.data`,
# in the script and in tests, and no top-level `data` or `metrics` hides a package of that name.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torchways as tw
from recipes import metrics
from recipes.data import TextData
from recipes.flops import count_step_flops
from recipes.models.gpt import GPT
from recipes.optim import build_optimizer, build_schedule
from recipes.settings import Precision, Settings
from recipes.streams import open_stream, windows
from recipes.training import Job, mean_of, next_token_loss, precision, read_text, run_recipe, train
from torchways.errors import ConfigError

log = logging.getLogger("train_lm")


@hydra.main(version_base="1.3", config_path="../configs", config_name="train_lm")
def main(cfg: DictConfig) -> None:
    run_recipe(cfg, Settings, train_lm, log=log, prepare=read_text)


def train_lm(settings: Settings, data: TextData, run_dir: Path) -> None:
    """Trains, evaluates and writes everything to `run_dir`."""
    config = settings.train
    torch.manual_seed(config.seed)
    module = (lambda: GPT(settings.model)) if settings.parallel.init_on_slices else GPT(settings.model)
    meshes = stage_meshes(settings)
    model = place_model(settings, module, "layers", meshes)
    log.info("model: %s parameters in %d layers", f"{model.num_parameters():,}", settings.model.n_layers)
    optimizer = build_optimizer(settings.optim, model.parameters())
    schedule = build_schedule(settings.optim, optimizer, num_steps=config.steps)

    num_microbatches, order = settings.parallel.total_microbatches, settings.parallel.schedule

    def forward_backward(x: Tensor, y: Tensor) -> Tensor:
        with precision(config):
            loss = next_token_loss(model(x), y) / num_microbatches
        loss.backward()
        return loss

    @tw.program
    def train_step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        losses = tw.microbatch(forward_backward, x, y, n_microbatches=num_microbatches, schedule=order)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        return {metrics.TRAIN_LOSS: losses.sum(), metrics.GRAD_NORM: grad_norm}

    @tw.program
    @torch.no_grad()
    def eval_step(x: Tensor, y: Tensor) -> Tensor:
        with precision(config):
            return next_token_loss(model(x), y)

    def evaluate() -> dict[str, float]:
        batches = data.validation_batches(config.batch_size, config.eval_batches)
        return {metrics.VALIDATION_LOSS: mean_of(eval_step, batches)}

    shape = (config.batch_size, settings.seq_len)
    job = Job(
        step=train_step,
        batches=open_stream(settings.data, data, meshes[0][0], windows, batch_size=config.batch_size, seed=config.seed),
        evaluate=evaluate,
        schedules=[schedule],
        tokens_per_step=math.prod(shape),
        flops_per_step=count_step_flops(
            lambda: GPT(settings.model),
            lambda gpt, batch: next_token_loss(gpt(batch["x"]), batch["y"]),
            {"x": shape, "y": shape},
        ),
        state={"model": model, "optimizer": optimizer, "schedule": schedule},
        description=dataclasses.asdict(settings.model),
    )
    train(job, config, settings.checkpoint, run_dir)


def place_model(
    settings: Settings,
    module: nn.Module | Callable[[], nn.Module],
    layers: str,
    meshes: Sequence[Sequence[tw.VirtualSlice]],
) -> Any:
    """Returns a model, or what `module` builds, with its stages and replicas on their slices.

    Args:
        settings: of the recipe.
        module: the model, or what builds it on the slices.
        layers: name of its list of layers.
        meshes: of `stage_meshes`.
    """
    parallel = settings.parallel
    split_spec = {f"{layers}.{start}": tw.SplitPoint.BEGINNING for start in settings.stage_starts()}

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


if __name__ == "__main__":
    main()
