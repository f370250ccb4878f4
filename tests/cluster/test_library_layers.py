"""Layers, losses and distributions of PyTorch's library, trained for some steps on real executors and in eager PyTorch.

Only XLA shows a wrong lowering; what can be seen without is in tests/unit/capture.
"""

import copy

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torchways as tw


class Tagger(nn.Module):
    """A recurrent layer over sequences of several lengths, and one over whole ones."""

    def __init__(self):
        super().__init__()
        self.packed = nn.LSTM(3, 2, batch_first=True, bidirectional=True)
        self.whole = nn.GRU(4, 2, batch_first=True)

    def forward(self, x):
        lengths = torch.tensor([1, 2, 2, 1])
        packed = pack_padded_sequence(x.reshape(4, 2, 3), lengths, batch_first=True, enforce_sorted=False)
        output, _ = self.packed(packed)
        return self.whole(pad_packed_sequence(output, batch_first=True)[0])[0].flatten(1)


def positive(h):
    return F.softplus(h) + 0.1


def normal(h):
    return D.Normal(h[:, :2], positive(h[:, 2:4]))


def multivariate(h):
    return D.MultivariateNormal(h[:, :2], torch.eye(2) + torch.diag_embed(positive(h[:, 2:4])))


class Bags(nn.Module):
    """Sums and maxima of embeddings that an array chooses."""

    def __init__(self):
        super().__init__()
        self.sums, self.largest = nn.EmbeddingBag(6, 3, mode="sum", max_norm=1.0), nn.EmbeddingBag(6, 3, mode="max")

    def forward(self, x):
        chosen = x.argsort(1)
        return self.sums(chosen) + self.largest(chosen.reshape(-1), torch.arange(0, 24, 6))


class Warp(nn.Module):
    """An image sampled at places that are learnt."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        image = x.reshape(4, 1, 2, 3)
        sampled = F.grid_sample(image, self.places, padding_mode="reflection", align_corners=False)
        return sampled + F.grid_sample(image * self.places.mean(), self.places, mode="nearest", align_corners=True)


def cumulative():
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2))


def masked(h):
    rows = torch.tensor([True, False, True, True])
    return F.cross_entropy(h[rows], torch.arange(4)[rows], reduction="none")


def pooled(h):
    return F.max_pool2d(h.reshape(2, 1, 3, 4), 2, ceil_mode=True).square()


def transcription(h):
    log_probs = h.reshape(4, 2, 3).log_softmax(-1)
    return F.ctc_loss(log_probs, torch.tensor([[1, 1], [2, 0]]), torch.tensor([4, 3]), torch.tensor([2, 1]))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
CASES = {
    "recurrent layers": (Tagger, lambda h: h.square()),
    "divergence of normals": (nn.Linear, lambda h: D.kl_divergence(normal(h), D.Normal(0.0, 1.0))),
    "a policy": (nn.Linear, lambda h: -D.Categorical(logits=h).log_prob(torch.arange(4)) * 0.5),
    "a multivariate normal": (nn.Linear, lambda h: -multivariate(h).log_prob(X[:, :2])),
    "pools that are rounded up": (nn.Linear, pooled),
    "bags of embeddings": (Bags, lambda h: h.square()),
    "sampled images": (Warp, lambda h: h.square()),
    "cumulative statistics": (cumulative, lambda h: h.square() + h),
    "losses of selected rows": (nn.Linear, masked),
    "transcriptions": (nn.Linear, transcription),
    "gamma's divergence": (
        nn.Linear,
        lambda h: D.kl_divergence(D.Gamma(positive(h), torch.ones(())), D.Gamma(torch.tensor(2.0), torch.tensor(1.0))),
    ),
}


def train(model, wrap, loss_of):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x):
        loss = loss_of(model(x)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step = wrap(step)
    return [step(X).detach().cpu() for _ in range(3)], [value.cpu() for value in model.state_dict().values()]


@pytest.mark.parametrize("name", CASES)
def test_training_is_as_in_eager(cluster, meshes, name):
    torch.manual_seed(0)
    make, loss_of = CASES[name]
    eager = make(6, 6) if make is nn.Linear else make()
    found = train(tw.function(copy.deepcopy(eager), mesh=meshes[0]), tw.program, loss_of)
    torch.testing.assert_close(found, train(eager, lambda f: f, loss_of), rtol=1e-4, atol=1e-5)


def test_samples_are_drawn_on_the_slice_and_have_gradients(cluster, meshes):
    def run(alpha):
        alpha = alpha.clone().requires_grad_()
        sample = D.Gamma(alpha, torch.ones_like(alpha)).rsample()
        return sample, torch.autograd.grad(sample.sum(), alpha)[0]

    alpha = torch.tensor([0.1, 0.5, 1.0, 3.0, 9.0, 40.0]).repeat(500)
    sample, grad = tw.function(run, mesh=meshes[0])(alpha)
    sample = sample.cpu()
    torch.testing.assert_close(grad.cpu(), torch._standard_gamma_grad(alpha, sample), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(sample.reshape(500, 6).mean(0), alpha[:6], rtol=0.2, atol=0.02)


def test_rows_in_the_order_of_a_sorted_key(cluster, meshes):
    select = tw.function(lambda x, key: x.index_select(0, key.argsort()), mesh=meshes[0])
    x, key = torch.randn(4, 2), torch.tensor([3, 1, 2, 0])
    torch.testing.assert_close(select(x, key).cpu(), x[key.argsort()])


def gradient_of(function):
    def gradient(x):
        x = x.detach().requires_grad_()
        result = function(x)
        weights = (torch.arange(result.numel()) % 7 + 1).reshape(result.shape).to(x.dtype)
        return torch.autograd.grad((result * weights).sum(), x)[0]

    return gradient


def parameters_of_normalization(x):
    weight, bias = (torch.ones(512, dtype=x.dtype, requires_grad=True) for _ in range(2))
    return torch.cat(torch.autograd.grad((F.layer_norm(x, (512,), weight, bias) * x).sum(), [weight, bias]))


def bias_of_convolution(x):
    bias = torch.zeros(8, dtype=x.dtype, requires_grad=True)
    return torch.autograd.grad(F.conv2d(x.reshape(2, 1, 128, 128), x[:8, :9].reshape(8, 1, 3, 3), bias).sum(), bias)[0]


#: Functions that add up many elements.
SUMS = {
    "sum": torch.sum,
    "mean": lambda x: x.mean(0),
    "norm": torch.Tensor.norm,
    "std": torch.std,
    "cumsum": lambda x: x.cumsum(1),
    "average": lambda x: F.avg_pool1d(x.unsqueeze(0), 256),
    "index_add": lambda x: torch.zeros(2, 512, dtype=x.dtype).index_add(0, torch.arange(64) % 2, x),
    "index_put": lambda x: torch.zeros(2, 512, dtype=x.dtype).index_put((torch.arange(64) % 2,), x, accumulate=True),
    "softmax": lambda x: x.reshape(-1).softmax(0),
    "mean square": lambda x: F.mse_loss(x, torch.zeros_like(x)),
    "cross entropy": lambda x: F.cross_entropy(x, torch.zeros(64, dtype=torch.int64)),
    "normalization": lambda x: F.layer_norm(x, (512,)),
    "products": lambda x: torch.addmm(x @ x.T, x, x.T, beta=0.3, alpha=0.7),
    "gradient of softmax": gradient_of(lambda x: x.softmax(1)),
    "gradient of normalization": gradient_of(lambda x: F.group_norm(x.reshape(1, 64, 512), 2)),
    "parameters of normalization": parameters_of_normalization,
    "bias of convolution": bias_of_convolution,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_16_bits_are_as_near_to_float64_as_eager(cluster, meshes, dtype):
    """XLA on CPU rounds each partial sum to 16 bits: a sum of 32,768 numbers was half of what it should be."""
    x = (torch.rand(64, 512, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    for name, function in SUMS.items():
        found = tw.program(tw.function(function, mesh=meshes[0]), mesh=meshes[0])(x).cpu()
        eager, exact = function(x), function(x.double())
        assert found.dtype == dtype
        assert (found - exact).norm() <= 1.5 * (eager - exact).norm() + torch.finfo(dtype).eps * exact.norm(), name
