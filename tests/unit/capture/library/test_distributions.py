"""torch.distributions in programs: log probabilities and divergences as in eager PyTorch, samples by their moments."""

import copy

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import nn
from torch.distributions import constraints

from tests.local_session import LocalSession
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction
from torchways.errors import CaptureError


@pytest.fixture(autouse=True)
def validated(monkeypatch):
    """torch.compile, which other tests of this process use, turns the checks off for good."""
    monkeypatch.setattr(D.Distribution, "_validate_args", True)


NOISE = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


def positive(h):
    return F.softplus(h) + 0.1


def normal(h):
    return D.Normal(h[:, :2], positive(h[:, 2:]), validate_args=True)


def multivariate(h):
    return D.MultivariateNormal(h[:, :2], torch.eye(2) + torch.diag_embed(positive(h[:, 2:])))


LOSSES = {
    "normal": lambda h: -normal(h).log_prob(NOISE) + normal(h).entropy(),
    "normal's divergence": lambda h: D.kl_divergence(normal(h), D.Normal(0.0, 1.0)),
    "categorical": lambda h: -D.Categorical(logits=h).log_prob(torch.tensor([0, 3, 1, 2])),
    "bernoulli": lambda h: -D.Bernoulli(probs=h.sigmoid()).log_prob(torch.ones(4, 4)),
    "beta": lambda h: -D.Beta(positive(h[:, :2]), positive(h[:, 2:])).log_prob(torch.full((4, 2), 0.3)),
    "gamma's divergence": lambda h: D.kl_divergence(
        D.Gamma(positive(h[:, :2]), positive(h[:, 2:])), D.Gamma(torch.tensor(2.0), torch.tensor(1.0))
    ),
    "dirichlet": lambda h: -D.Dirichlet(positive(h)).log_prob(torch.full((4, 4), 0.25)),
    "multivariate normal": lambda h: -multivariate(h).log_prob(NOISE),
    "independent": lambda h: -D.Independent(normal(h), 1).log_prob(NOISE),
}


@pytest.fixture
def session():
    return LocalSession()


def train(model, wrap, loss_of):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x):
        loss = loss_of(model(x)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step = wrap(step)
    x = torch.ones(4, 3) * torch.arange(4).unsqueeze(1)
    return [step(x).detach().cpu() for _ in range(2)], [value.cpu() for value in model.state_dict().values()]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_eager(session, name):
    torch.manual_seed(0)
    eager = nn.Linear(3, 4)
    ours = make_function(copy.deepcopy(eager), session.mesh(), lambda: session)
    found = train(ours, lambda f: ProgramFunction(f, None, lambda: session), LOSSES[name])
    torch.testing.assert_close(found, train(eager, lambda f: f, LOSSES[name]))


SAMPLES = {
    "normal": lambda p: D.Normal(p, p),
    "gamma": lambda p: D.Gamma(p, torch.ones_like(p)),
    "small gamma": lambda p: D.Gamma(p * 0.1, torch.ones_like(p)),
    "dirichlet": lambda p: D.Dirichlet(p),
    "categorical": lambda p: D.Categorical(p),
    "bernoulli": lambda p: D.Bernoulli(p / 5),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_have_the_moments_of_the_distribution(session, name):
    make = SAMPLES[name]
    torch.manual_seed(0)
    sample = make_function(lambda p: make(p).sample((20000,)), session.mesh(), lambda: session)
    p = torch.tensor([1.0, 4.0])
    found, expected = sample(p).cpu().double(), make(p).sample((20000,)).double()
    torch.testing.assert_close(found.mean(0), expected.mean(0), rtol=0.05, atol=0.02)
    torch.testing.assert_close(found.std(0), expected.std(0), rtol=0.1, atol=0.02)


def test_samples_of_gamma_have_gradients(session):
    def run(alpha):
        alpha = alpha.clone().requires_grad_()
        sample = D.Gamma(alpha, torch.ones_like(alpha)).rsample()
        return sample, torch.autograd.grad(sample.sum(), alpha)[0]

    alpha = torch.tensor([0.1, 0.5, 1.0, 3.0, 9.0, 40.0]).repeat(50)
    sample, grad = make_function(run, session.mesh(), lambda: session)(alpha)
    expected = torch._standard_gamma_grad(alpha, sample.cpu())
    torch.testing.assert_close(grad.cpu(), expected, rtol=1e-3, atol=1e-6)


def test_checks_hold_where_values_are_known_and_are_as_before_after_a_trace(session):
    check = constraints.positive_definite.check
    log_prob = make_function(lambda x, scale: D.Normal(x, scale).log_prob(x), session.mesh(), lambda: session)
    x = torch.ones(2)
    log_prob(x, torch.ones(2))
    with pytest.raises(CaptureError, match="Expected parameter scale"):
        log_prob(x, -torch.ones(2))
    with pytest.raises(ValueError, match="Expected parameter scale"):
        D.Normal(x, -torch.ones(2))
    assert constraints.positive_definite.check == check
    assert D.Distribution._validate_args


def test_arguments_that_are_computed_on_a_slice_are_taken_for_right(session):
    double = make_function(lambda x: x * 2, session.mesh(), lambda: session)
    log_prob = make_function(lambda x: D.Normal(x, x).log_prob(x), session.mesh(), lambda: session)
    assert log_prob(double(torch.ones(2))).cpu().isfinite().all()
    assert log_prob(double(-torch.ones(2))).cpu().isnan().all()
