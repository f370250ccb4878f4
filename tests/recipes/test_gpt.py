"""The model is causal, seeded, sized as it says, and named as torchtitan names its modules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from recipes.models.gpt import GPT, GPTConfig

SMALL = GPTConfig(seq_len=16, d_model=32, n_layers=2, n_heads=4)


def tokens(batch: int = 2, seq_len: int = 16) -> torch.Tensor:
    return torch.randint(256, (batch, seq_len), generator=torch.Generator().manual_seed(1))


def test_logits_have_a_row_for_each_token() -> None:
    assert GPT(SMALL)(tokens()).shape == (2, 16, 256)
    assert GPT(SMALL)(tokens(seq_len=5)).shape == (2, 5, 256)


def test_later_tokens_do_not_reach_earlier_logits() -> None:
    model, x = GPT(SMALL), tokens()
    changed = x.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 256
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_order_of_earlier_tokens_matters() -> None:
    model, x = GPT(SMALL), tokens(batch=1)
    swapped = x.clone()
    swapped[:, [0, 1]] = x[:, [1, 0]]
    assert not torch.allclose(model(x)[:, -1], model(swapped)[:, -1], atol=0, rtol=1e-6)


def test_one_seed_gives_one_model() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in GPT(SMALL).parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_untrained_loss_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    loss = F.cross_entropy(GPT(SMALL)(tokens()).flatten(0, 1), tokens().flatten())
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


def test_default_has_about_a_million_parameters() -> None:
    model = GPT(GPTConfig())
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) == 854_272


def test_modules_are_named_as_in_torchtitan() -> None:
    model = GPT(SMALL)
    assert [name for name, _ in model.named_children()] == ["tok_embeddings", "layers", "norm", "output"]
    assert list(model.layers) == ["0", "1"]
    assert "layers.1.attention.wq.weight" in model.state_dict()
    assert not [name for name in model.state_dict() if "rotary" in name]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 100, "n_heads": 3}, "n_heads is 3 and does not divide d_model, 100; .* e.g. 102"),
        ({"d_model": 12, "n_heads": 4}, "a head has 3 features"),
        ({"n_layers": 0}, "n_layers is 0 but must be at least 1"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0 but must be above 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_sizes_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**fields)


def test_dropout_is_off_unless_asked_for() -> None:
    assert not [m for m in GPT(SMALL).modules() if isinstance(m, torch.nn.Dropout)]
    torch.manual_seed(0)
    model = GPT(GPTConfig(seq_len=16, d_model=32, n_layers=2, n_heads=4, dropout=0.5))
    assert not torch.equal(model(tokens()), model(tokens()))
