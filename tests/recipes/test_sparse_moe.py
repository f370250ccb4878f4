"""The mixture of experts by itself, in eager PyTorch: against the dense computation, and a plain loop over tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

import torchways as tw
from recipes.models.gpt import GPT
from recipes.models.moe import MixtureOfExperts, MoEConfig, SparseGPT
from recipes.sparse_moe import as_dense
from recipes.training import next_token_loss
from tests.local_session import LocalSession
from torchways.controller.function import make_parallel
from torchways.controller.program import ProgramFunction

SIZES = {"seq_len": 16, "d_model": 8, "n_layers": 2, "n_heads": 2}


def mixture(**fields: object) -> MixtureOfExperts:
    torch.manual_seed(0)
    return MixtureOfExperts(MoEConfig(**SIZES, **fields))


def dense(module: MixtureOfExperts, x_TD: torch.Tensor) -> torch.Tensor:
    """Every expert computes every token; the weights of those that were not chosen are zero."""
    probabilities = module.router(x_TD).softmax(-1)
    weights, choices = probabilities.topk(module.config.top_k)
    if module.config.top_k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    of_experts = torch.zeros_like(probabilities).scatter(1, choices, weights)
    return sum(of_experts[:, [index]] * expert(x_TD) for index, expert in enumerate(module.experts))


def by_token(module: MixtureOfExperts, x_TD: torch.Tensor, capacity: int) -> tuple[torch.Tensor, float]:
    """Switch's and GShard's rule: first choices in order of the tokens, then second choices, while there is room."""
    config = module.config
    weights, choices = module.router(x_TD).softmax(-1).topk(config.top_k)
    if config.top_k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    used, dropped, rows = [0] * config.n_experts, 0, [torch.zeros(config.d_model) for _ in x_TD]
    for choice in range(config.top_k):
        for token in range(len(x_TD)):
            index = int(choices[token, choice])
            if used[index] == capacity:
                dropped += 1
                continue
            used[index] += 1
            rows[token] = rows[token] + weights[token, choice] * module.experts[index](x_TD[token])
    return torch.stack(rows), dropped / (config.top_k * len(x_TD))


def gradients(module: MixtureOfExperts, y: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    target = torch.linspace(-1, 1, y.numel()).view_as(y)
    found = torch.autograd.grad((y * target).sum(), [x, *module.parameters()], allow_unused=True)
    return [torch.zeros(()) if grad is None or not grad.any() else grad for grad in found]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("capacity_factor", [None, 100.0])
def test_without_dropped_tokens_it_is_the_dense_computation(top_k: int, capacity_factor: float | None) -> None:
    module = mixture(top_k=top_k, capacity_factor=capacity_factor)
    x = torch.randn(3, 16, 8, requires_grad=True)
    y, routing = module(x)
    expected = dense(module, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(module, y, x), gradients(module, expected, x))
    assert routing.dropped == 0


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("capacity_factor", [0.1, 0.5, 1.0])
def test_tokens_above_the_capacity_are_dropped_in_order(top_k: int, capacity_factor: float) -> None:
    module = mixture(top_k=top_k, capacity_factor=capacity_factor)
    x = torch.randn(2, 16, 8, requires_grad=True)
    y, routing = module(x)
    expected, dropped = by_token(module, x.flatten(0, 1), module.config.capacity(32))
    torch.testing.assert_close(y.flatten(0, 1), expected)
    torch.testing.assert_close(gradients(module, y, x), gradients(module, expected, x))
    assert routing.dropped.item() == pytest.approx(dropped)
    assert dropped > 0


@pytest.mark.parametrize("capacity_factor", [None, 0.75])
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_over_two_slices_are_those_of_eager(capacity_factor: float | None, count: int) -> None:
    torch.manual_seed(0)
    expected = SparseGPT(MoEConfig(**{**SIZES, "n_layers": 1}, n_experts=3, capacity_factor=capacity_factor))
    model, session = copy.deepcopy(expected), LocalSession()
    slices = [session.mesh(), session.mesh()]
    make_parallel(model, slices[0], {}, lambda: session)
    for index, expert in enumerate(model.mixtures()[0].experts):
        make_parallel(expert, slices[index % 2], {}, lambda: session)

    def step_of(module: SparseGPT) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward_backward(x: torch.Tensor) -> torch.Tensor:
            logits, routing = module(x)
            loss = (next_token_loss(logits[:, :-1], x[:, 1:]) + routing.balance) / count
            loss.backward()
            return loss

        return lambda x: tw.microbatch(forward_backward, x, n_microbatches=count).sum()

    x = torch.randint(256, (4, 16))
    loss = ProgramFunction(step_of(model), None, lambda: session)(x)
    torch.testing.assert_close(loss.cpu(), step_of(expected)(x))
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
        assert ours.mesh is slices["experts.1." in name]


def test_balance_is_one_if_experts_are_equally_likely_and_grows_if_they_are_not() -> None:
    module = mixture(top_k=1)
    torch.nn.init.zeros_(module.router.weight)
    x = torch.rand(2, 16, 8)
    assert module(x)[1].balance.item() == pytest.approx(1.0)
    with torch.no_grad():
        module.router.weight[2] = 10.0
    assert module(x)[1].balance.item() > 3.0


def test_the_model_returns_the_means_of_its_layers() -> None:
    torch.manual_seed(0)
    model = SparseGPT(MoEConfig(**SIZES, capacity_factor=0.5))
    logits, routing = model(torch.randint(256, (2, 16)))
    assert logits.shape == (2, 16, 256)
    assert 0 < routing.dropped < 1
    assert len(model.mixtures()) == 2


def test_the_dense_model_of_equal_work_has_the_products_of_the_chosen_experts() -> None:
    config = MoEConfig(**SIZES, n_experts=4, top_k=2)
    sparse, equal = SparseGPT(config), GPT(as_dense(config))
    of_layer = sum(parameter.numel() for parameter in sparse.mixtures()[0].parameters())
    router, expert = 4 * 8, 2 * 4 * 8 * 8
    assert of_layer == router + 4 * expert
    assert sparse.num_parameters() - equal.num_parameters() == 2 * (router + 2 * expert)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_experts": 0}, "n_experts is 0 but must be at least 1"),
        ({"top_k": 5}, "top_k is 5 but must be between 1 and n_experts, 4"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0 but must be above 0"),
        ({"balance_weight": -1.0}, "balance_weight is -1.0"),
        ({"n_heads": 3}, "n_heads is 3 and does not divide"),
    ],
)
def test_sizes_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{**SIZES, **fields})
