"""Trains one encoder for two tasks at once; the encoder and the head of each task have slices of their own.

    twrun --islands 3 --devices-per-island 1 recipes/multi_task.py                          # both tasks in each step
    twrun --islands 3 --devices-per-island 1 recipes/multi_task.py tasks.order=alternate    # they take turns

The tasks, at each byte of the text: the next byte, and how far away the end of the line is (`line_classes`). The
encoder is on island 0, the heads on islands 1 and 2; with `parallel.islands=2` they share an island. Each of the three
has an optimizer of its own. A step is one program, whichever tasks it trains.
"""

from __future__ import annotations

import enum
import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see train_lm.py

import torchways as tw
from recipes import metrics
from recipes.data import TextData
from recipes.flops import count_step_flops
from recipes.models.gpt import GPTConfig
from recipes.models.multi_task import MultiTaskModel
from recipes.optim import build_optimizer, build_schedule
from recipes.settings import IslandsSettings
from recipes.streams import line_ends, open_stream
from recipes.training import Job, island_meshes, precision, read_text, run_recipe, train

log = logging.getLogger("multi_task")

NEXT_BYTE, LINE_END = TASKS = ("next_byte", "line_end")

#: Classes of the distance to the end of the line: 0, 1, 2 to 3, 4 to 7, 8 to 15, 16 and more.
NUM_LINE_CLASSES = 6
#: Class of positions that are nearer to the end of the window than a class tells: no loss.
UNKNOWN = -100


class Order(enum.Enum):
    """Which tasks a step trains."""

    together = "together"
    alternate = "alternate"


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksConfig:
    """The tasks."""

    order: Order = Order.together
    """together: each step trains both tasks, on the sum of their losses. alternate: steps train one task in turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(IslandsSettings):
    """All settings of a run of multi_task.py."""

    model: GPTConfig
    tasks: TasksConfig


@hydra.main(version_base="1.3", config_path="../configs", config_name="multi_task")
def main(cfg: DictConfig) -> None:
    run_recipe(cfg, Settings, train_multi_task, log=log, prepare=read_text)


def train_multi_task(settings: Settings, data: TextData, run_dir: Path) -> None:
    """Trains, evaluates and writes everything to `run_dir`."""
    config, num_microbatches = settings.train, settings.parallel.n_microbatches
    torch.manual_seed(config.seed)
    rows = settings.parallel.rows(config.batch_size)
    meshes = island_meshes(settings.parallel.islands, rows, setting="parallel.islands")
    model = place(make_model(settings), meshes)
    log.info("model: %s parameters in an encoder and %d heads", f"{model.num_parameters():,}", len(TASKS))
    parts: dict[str, nn.Module] = {"encoder": model.encoder, **model.heads}
    optimizers = {name: build_optimizer(settings.optim, part.parameters()) for name, part in parts.items()}
    turns = [(task,) for task in TASKS] if settings.tasks.order is Order.alternate else [TASKS]
    num_turns = math.ceil(config.steps / len(turns))  # of a head
    schedules = {
        name: build_schedule(settings.optim, optimizer, num_steps=config.steps if name == "encoder" else num_turns)
        for name, optimizer in optimizers.items()
    }

    def make_step(tasks: tuple[str, ...]) -> Callable[..., dict[str, Tensor]]:
        trained = ("encoder", *tasks)
        parameters = [parameter for name in trained for parameter in parts[name].parameters()]

        def forward_backward(x: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
            with precision(config):
                losses = losses_of(model, x, targets, tasks)
            (sum(losses.values()) / num_microbatches).backward()
            return losses

        @tw.program
        def train_step(x: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
            losses = tw.microbatch(forward_backward, x, targets, n_microbatches=num_microbatches)
            means = {f"loss_metrics/{task}": loss.mean() for task, loss in losses.items()}
            grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_norm)
            for name in trained:
                optimizers[name].step()
                optimizers[name].zero_grad()
            return {metrics.TRAIN_LOSS: sum(means.values()), metrics.GRAD_NORM: grad_norm, **means}

        return train_step

    steps = {tasks: make_step(tasks) for tasks in turns}

    def step(tasks: Sequence[str], x: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        results = steps[tuple(tasks)](x, {task: targets[task] for task in tasks})
        for task in tasks:
            schedules[task].step()
        return results

    @tw.program
    @torch.no_grad()
    def eval_step(x: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with precision(config):
            return losses_of(model, x, targets, TASKS)

    def evaluate() -> dict[str, float]:
        batches = with_targets(data.validation_batches(config.batch_size, config.eval_batches))
        found = [eval_step(x, targets) for x, targets in batches]
        means = {task: sum(losses[task].item() for losses in found) / len(found) for task in TASKS}
        named = {f"validation_metrics/{task}": mean for task, mean in means.items()}
        return {metrics.VALIDATION_LOSS: sum(means.values()), **named}

    shape = (config.batch_size, settings.seq_len)
    flops = [
        count_step_flops(
            lambda: make_model(settings),
            lambda meta, batch, tasks=tasks: sum(losses_of(meta, batch["x"], batch, tasks).values()),
            dict.fromkeys(("x", *TASKS), shape),
        )
        for tasks in turns
    ]
    job = Job(
        step=step,
        batches=open_stream(
            settings.data, data, meshes[0], line_ends, batch_size=config.batch_size, seed=config.seed, turns=turns
        ),
        evaluate=evaluate,
        schedules=[schedules["encoder"]],  # heads have theirs in `step`
        tokens_per_step=math.prod(shape),
        flops_per_step=sum(flops) // len(flops),
        state={"model": model, "optimizers": optimizers, "schedules": schedules},
        unit="nats",
    )
    train(job, config, settings.checkpoint, run_dir)


def make_model(settings: Settings) -> MultiTaskModel:
    """Returns the model on the host."""
    return MultiTaskModel(settings.model, {NEXT_BYTE: settings.model.vocab_size, LINE_END: NUM_LINE_CLASSES})


def place(model: MultiTaskModel, meshes: list[tw.VirtualSlice]) -> MultiTaskModel:
    """Puts the encoder on the first slice, and the heads on the others, in turn."""
    tw.parallelize_module(model, meshes[0])
    others = itertools.cycle(meshes[1:] or meshes)
    for head in model.heads.values():
        tw.parallelize_module(head, next(others))
    return model


def losses_of(
    model: MultiTaskModel, x: Tensor, targets: Mapping[str, Tensor], tasks: tuple[str, ...]
) -> dict[str, Tensor]:
    """Returns the mean loss of each task in nats, given bytes `x` and classes `targets[task]`, all [B, S]."""
    logits = model(x, tasks)
    return {
        task: F.cross_entropy(logits[task].flatten(0, 1), targets[task].flatten(), ignore_index=UNKNOWN)
        for task in tasks
    }


def with_targets(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yields each batch with the targets of both tasks."""
    for x, y in batches:
        yield x, {NEXT_BYTE: y, LINE_END: line_classes(y)}


def line_classes(y: Tensor) -> Tensor:
    """Returns how many bytes stand before the next newline, as a class (`NUM_LINE_CLASSES`), int64 [B, S].

    Args:
        y: the bytes that follow each position, int64 [B, S].
    """
    length = y.shape[1]
    places = torch.arange(length).expand_as(y)
    ends = torch.where(y == ord("\n"), places, length)
    next_end = ends.flip(1).cummin(1).values.flip(1)
    distance = next_end - places
    classes = (distance + 0.5).log2().floor().add(1).clamp(0, NUM_LINE_CLASSES - 1).long()
    is_known = (next_end < length) | (classes == NUM_LINE_CLASSES - 1)
    return torch.where(is_known, classes, UNKNOWN)


if __name__ == "__main__":
    main()
