"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Which optimizer, and how its learning rate goes."""

    name: str = "adamw"
    """adamw, adam or sgd."""

    lr: float = 3e-3
    """Learning rate at the end of the warm-up."""

    weight_decay: float = 0.0
    """Decoupled for adamw, added to the gradient otherwise."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of gradient and squared gradient; adam and adamw only."""

    momentum: float = 0.0
    """Decay of the running sum of gradients; sgd only."""

    warmup_steps: int = 20
    """Steps over which the learning rate rises linearly."""

    min_lr_ratio: float = 0.1
    """Where the cosine ends at the last step, as a part of `lr`."""

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "adam", "sgd"):
            raise ValueError(f"name is {self.name!r} but only adamw, adam and sgd are known; choose with optim=<name>")
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr} but must be above 0; try 3e-3")
        if self.weight_decay < 0.0:
            raise ValueError(f"weight_decay is {self.weight_decay} but must not be negative; 0 turns it off")
        if len(self.betas) != 2:
            raise ValueError(f"betas is {self.betas} but must hold two numbers; 0.9 and 0.95 are usual")
        for name, values in (("betas", self.betas), ("momentum", (self.momentum,))):
            if not all(0.0 <= value < 1.0 for value in values):
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 0 and below 1")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps} but must not be negative; 0 starts at full lr")
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise ValueError(f"min_lr_ratio is {self.min_lr_ratio} but must be between 0 and 1")


def build_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Returns the torch optimizer that `config` names."""
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    cls = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return cls(parameters, lr=config.lr, betas=tuple(config.betas), weight_decay=config.weight_decay)


def build_schedule(config: OptimConfig, optimizer: torch.optim.Optimizer, *, num_steps: int) -> LambdaLR:
    """Returns linear warm-up, then half a cosine down to `min_lr_ratio` at step `num_steps`."""

    def ratio(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
        return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, ratio)
