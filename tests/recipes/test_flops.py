"""The FLOPs of a step are those of its products, as formulas have them, and counting leaves no trace."""

from __future__ import annotations

import dataclasses

import torch

from recipes.flops import count_step_flops
from recipes.models.gpt import GPT, GPTConfig
from recipes.training import next_token_loss

CONFIG = GPTConfig(seq_len=32, d_model=16, n_layers=3, n_heads=2)


def flops_of(config: GPTConfig, batch_size: int) -> int:
    shape = (batch_size, config.seq_len)
    return count_step_flops(
        lambda: GPT(config),
        lambda model, batch: next_token_loss(model(batch["x"]), batch["y"]),
        {"x": shape, "y": shape},
    )


def test_a_transformer_has_six_flops_per_token_and_weight_and_those_of_attention() -> None:
    model = GPT(CONFIG)
    weights = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and name != "tok_embeddings.weight"
    )
    tokens = 4 * CONFIG.seq_len
    attention = 12 * CONFIG.n_layers * CONFIG.d_model * CONFIG.seq_len * tokens
    assert flops_of(CONFIG, 4) == 6 * weights * tokens + attention
    assert flops_of(CONFIG, 8) == 2 * flops_of(CONFIG, 4)
    assert flops_of(dataclasses.replace(CONFIG, d_model=1024), 4) > 100 * flops_of(CONFIG, 4)


def test_counting_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    flops_of(CONFIG, 2)
    assert torch.equal(torch.get_rng_state(), state)
