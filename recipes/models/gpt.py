"""A decoder-only transformer over bytes, in plain PyTorch; modules are named as torchtitan names them.

Shape suffixes: B batch, S sequence, D model width, H heads, K width of a head, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTConfig:
    """Sizes of a `GPT`."""

    vocab_size: int = 256
    """Number of tokens; 256 when tokens are bytes."""

    seq_len: int = 128
    """Longest sequence, and the one trained on."""

    d_model: int = 128
    """Width of the residual stream."""

    n_layers: int = 4
    """Number of blocks."""

    n_heads: int = 4
    """Attention heads of a block; they divide `d_model`."""

    ffn_multiple: int = 4
    """Hidden width of the MLP in units of `d_model`."""

    rope_theta: float = 10_000.0
    """Base of the rotary positions: the slowest pair of features turns once in about 2 pi times this many tokens."""

    dropout: float = 0.0
    """Probability that dropout zeroes an element of a block's outputs; 0 leaves dropout out."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "seq_len", "d_model", "n_layers", "n_heads", "ffn_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1; set it to a positive number")
        if self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads is {self.n_heads} and does not divide d_model, {self.d_model}; "
                f"set d_model to a multiple of n_heads, e.g. {math.ceil(self.d_model / self.n_heads) * self.n_heads}"
            )
        if self.d_model // self.n_heads % 2:
            raise ValueError(
                f"a head has {self.d_model // self.n_heads} features (d_model {self.d_model} / n_heads {self.n_heads}) "
                "but rotary positions turn pairs of them; change d_model or n_heads so that it is even"
            )
        if self.rope_theta <= 0.0:
            raise ValueError(f"rope_theta is {self.rope_theta} but must be above 0; 10000 is usual")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout} but must be at least 0 and below 1; 0 turns it off")


class RotaryPositions(nn.Module):
    """Turns each pair of features of a query or key by an angle that grows with its position.

    Every attention holds its own tables, so that no stage of a pipeline needs a buffer of another.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.d_model // config.n_heads
        frequencies = config.rope_theta ** -(torch.arange(0, width, 2) / width)
        angles_SK = torch.outer(torch.arange(config.seq_len), frequencies)  # K is half a head's width here
        self.register_buffer("cos", angles_SK.cos(), persistent=False)
        self.register_buffer("sin", angles_SK.sin(), persistent=False)

    def forward(self, x_BHSK: Tensor) -> Tensor:
        seq_len = x_BHSK.shape[2]
        cos, sin = self.cos[:seq_len], self.sin[:seq_len]
        first, second = x_BHSK.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.wq = nn.Linear(config.d_model, config.d_model, bias=False)
        self.wk = nn.Linear(config.d_model, config.d_model, bias=False)
        self.wv = nn.Linear(config.d_model, config.d_model, bias=False)
        self.wo = nn.Linear(config.d_model, config.d_model, bias=False)
        self.rotary = RotaryPositions(config)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q_BHSK, k_BHSK, v_BHSK = (self._split_heads(w(x_BSD)) for w in (self.wq, self.wk, self.wv))
        out_BHSK = F.scaled_dot_product_attention(self.rotary(q_BHSK), self.rotary(k_BHSK), v_BHSK, is_causal=True)
        return self.wo(out_BHSK.transpose(1, 2).flatten(2))

    def _split_heads(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden = config.ffn_multiple * config.d_model
        self.w1 = nn.Linear(config.d_model, hidden, bias=False)
        self.w2 = nn.Linear(hidden, config.d_model, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x_BSD)))


class TransformerBlock(nn.Module):
    """Attention, then the MLP; each reads the normalised residual stream and adds to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.attention = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD)))
        return x_BSD + self.dropout(self.feed_forward(self.ffn_norm(x_BSD)))


class GPT(nn.Module):
    """Maps tokens [B, S] to logits [B, S, V] of each next token."""

    block: type[nn.Module] = TransformerBlock

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleDict({str(index): self.block(config) for index in range(config.n_layers)})
        self.norm = nn.LayerNorm(config.d_model)
        self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.init_weights()

    def forward(self, tokens_BS: Tensor) -> Tensor:
        h_BSD = self.tok_embeddings(tokens_BS)
        for layer in self.layers.values():
            h_BSD = layer(h_BSD)
        return self.output(self.norm(h_BSD))

    def init_weights(self) -> None:
        """Draws the weights anew from torch's global generator: one seed, one model.

        Matrices are normal with deviation 0.02, as in GPT-2; those that write to the residual stream are divided by
        the root of their number, so that its variance does not grow with depth.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=residual_std if name.endswith(("wo.weight", "w2.weight")) else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)

    def num_parameters(self) -> int:
        """Number of trained scalars."""
        return sum(parameter.numel() for parameter in self.parameters())
