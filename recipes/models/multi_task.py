"""A shared encoder with a head for each of several tasks, in plain PyTorch.

Shape suffixes: B batch, S sequence, D model width, C classes of a task.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from recipes.models.gpt import GPT, GPTConfig


class Encoder(GPT):
    """Maps tokens [B, S] to features [B, S, D], each of which knows the tokens up to its own."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        del self.output

    def forward(self, tokens_BS: Tensor) -> Tensor:
        h_BSD = self.tok_embeddings(tokens_BS)
        for layer in self.layers.values():
            h_BSD = layer(h_BSD)
        return self.norm(h_BSD)


class Head(nn.Module):
    """Maps features [B, S, D] to logits [B, S, C]."""

    def __init__(self, config: GPTConfig, num_classes: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.ffn_multiple * config.d_model)
        self.w2 = nn.Linear(config.ffn_multiple * config.d_model, num_classes)

    def forward(self, h_BSD: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(h_BSD)))


class MultiTaskModel(nn.Module):
    """Maps tokens [B, S] to the logits of each task that is asked for."""

    def __init__(self, config: GPTConfig, num_classes: Mapping[str, int]) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.heads = nn.ModuleDict({task: Head(config, count) for task, count in num_classes.items()})

    def forward(self, tokens_BS: Tensor, tasks: tuple[str, ...]) -> dict[str, Tensor]:
        h_BSD = self.encoder(tokens_BS)
        return {task: self.heads[task](h_BSD) for task in tasks}

    def num_parameters(self) -> int:
        """Number of trained scalars."""
        return sum(parameter.numel() for parameter in self.parameters())
