"""A decoder-only transformer whose MLPs are mixtures of experts, in plain PyTorch.

Each token goes to the `top_k` experts that a router likes best. There are two ways to compute them:

- exact: each expert computes the tokens that were sent to it, however many they are: sizes that depend on the data.
- with a capacity, as in Switch and GShard: each expert computes a fixed number of tokens. Of an expert that is sent
  more, the first ones in order are kept: first choices before second choices, then by position in the batch. The others
  go without that expert.

Shape suffixes: B batch, S sequence, T tokens (B * S), K choices of a token, E experts, C capacity, D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.models.gpt import GPT, FeedForward, GPTConfig, TransformerBlock


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig(GPTConfig):
    """Sizes of a `SparseGPT`."""

    n_experts: int = 4
    """Experts of a layer."""

    top_k: int = 2
    """Experts that compute a token: 1 as in Switch, 2 as in GShard."""

    capacity_factor: float | None = None
    """Tokens that an expert computes, in units of an even share (top_k * tokens / n_experts); tokens above it go
    without that expert. Null is the exact way: each expert computes all tokens that are sent to it."""

    balance_weight: float = 0.01
    """Weight in the loss of the term that keeps experts equally busy."""

    def __post_init__(self) -> None:
        GPTConfig.__post_init__(self)
        if self.n_experts < 1:
            raise ValueError(f"n_experts is {self.n_experts} but must be at least 1; set it to a positive number")
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(
                f"top_k is {self.top_k} but must be between 1 and n_experts, {self.n_experts}; 1 and 2 are usual"
            )
        if self.capacity_factor is not None and not self.capacity_factor > 0.0:
            raise ValueError(
                f"capacity_factor is {self.capacity_factor} but must be above 0; 1.25 is usual, null drops no token"
            )
        if self.balance_weight < 0.0:
            raise ValueError(f"balance_weight is {self.balance_weight} but must not be negative; 0 turns it off")

    def capacity(self, num_tokens: int) -> int | None:
        """Returns how many tokens an expert computes at most; None: all that are sent to it."""
        if self.capacity_factor is None:
            return None
        return min(num_tokens, math.ceil(self.capacity_factor * self.top_k * num_tokens / self.n_experts))


class Routing(NamedTuple):
    """What the routers of a model did with a batch."""

    balance: Tensor
    """Switch's load-balancing loss, fp32 without dimensions: the mean over layers, 1 if experts are equally busy."""

    dropped: Tensor
    """Part of the choices that no expert computed, fp32 without dimensions, mean over layers; 0 in the exact way."""


class MixtureOfExperts(nn.Module):
    """An MLP that computes each token with `top_k` of its experts, weighted by the router's probabilities."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.d_model, config.n_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_experts))

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Routing]:
        x_TD = x_BSD.flatten(0, 1)
        probabilities_TE = self.router(x_TD).float().softmax(-1)
        weights_TK, choices_TK = probabilities_TE.topk(self.config.top_k)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True) if self.config.top_k > 1 else weights_TK
        busy_E = F.one_hot(choices_TK, self.config.n_experts).sum(1).float().mean(0) / self.config.top_k
        balance = self.config.n_experts * (busy_E * probabilities_TE.mean(0)).sum()
        capacity = self.config.capacity(len(x_TD))
        if capacity is None:
            y_TD, dropped = self._exact(x_TD, weights_TK, choices_TK), torch.zeros_like(balance)
        else:
            y_TD, dropped = self._with_capacity(x_TD, weights_TK, choices_TK, capacity)
        return y_TD.view_as(x_BSD), Routing(balance, dropped)

    def _exact(self, x_TD: Tensor, weights_TK: Tensor, choices_TK: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for index, expert in enumerate(self.experts):
            is_mine_TK = choices_TK == index
            [mine] = is_mine_TK.any(-1).nonzero(as_tuple=True)
            weights_T = (weights_TK * is_mine_TK).sum(-1)
            y_TD = y_TD.index_add(0, mine, expert(x_TD[mine]) * weights_T[mine, None].to(x_TD.dtype))
        return y_TD

    def _with_capacity(
        self, x_TD: Tensor, weights_TK: Tensor, choices_TK: Tensor, capacity: int
    ) -> tuple[Tensor, Tensor]:
        n_experts, top_k, (num_tokens, d_model) = self.config.n_experts, self.config.top_k, x_TD.shape
        choices = choices_TK.T.flatten()  # [K * T]: first choices before second choices
        is_sent = F.one_hot(choices, n_experts)
        place = (is_sent.cumsum(0) * is_sent).sum(-1) - 1  # among those that are sent to the same expert
        is_kept = place < capacity
        slot = torch.where(is_kept, choices * capacity + place, n_experts * capacity)  # the last slot is thrown away
        sent = x_TD.new_zeros(n_experts * capacity + 1, d_model).index_add(0, slot, x_TD.repeat(top_k, 1))
        sent_ECD = sent[:-1].view(n_experts, capacity, d_model)
        back = torch.cat(
            [*(expert(sent_ECD[index]) for index, expert in enumerate(self.experts)), sent.new_zeros(1, d_model)]
        )
        weights = (weights_TK.T.flatten() * is_kept).to(x_TD.dtype)
        y_TD = (back[slot] * weights[:, None]).view(top_k, num_tokens, d_model).sum(0)
        return y_TD, 1.0 - is_kept.float().mean()


class SparseBlock(TransformerBlock):
    """A transformer block with a `MixtureOfExperts` as its MLP; returns what its router did, too."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.feed_forward = MixtureOfExperts(config)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Routing]:
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD)))
        y_BSD, routing = self.feed_forward(self.ffn_norm(x_BSD))
        return x_BSD + self.dropout(y_BSD), routing


class SparseGPT(GPT):
    """Maps tokens [B, S] to logits [B, S, V] of each next token, and what the routers did."""

    block = SparseBlock

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, Routing]:
        h_BSD, routings = self.tok_embeddings(tokens_BS), []
        for layer in self.layers.values():
            h_BSD, routing = layer(h_BSD)
            routings.append(routing)
        return self.output(self.norm(h_BSD)), Routing(
            *(torch.stack(values).mean() for values in zip(*routings, strict=True))
        )

    def mixtures(self) -> list[MixtureOfExperts]:
        """Returns the mixtures of experts, from first to last layer."""
        return [layer.feed_forward for layer in self.layers.values()]
