"""Random numbers of gamma distributions, their gradients and the trigamma function: torch-xla has none of them.

Formulas and coefficients are those of PyTorch's own kernels (ATen/native/Distributions.h, Math.h), element by element.
"""

from __future__ import annotations

import math
from typing import Any

import torch

aten = torch.ops.aten

#: Numbers that are proposed for each element. Each is taken with a probability of 0.95 at least.
_PROPOSALS = 10

#: Of numerator and denominator, by the power of log(alpha), for the powers 0, 1 and 2 of log(x / alpha).
_RATIONAL = (
    (
        (0.16009398, -0.094634809, 0.025146376, -0.0030648343),
        (0.53487893, 0.1298071, 0.065735949, -0.0015649758),
        (0.040121004, -0.0065914022, -0.0026286047, -0.0013441777),
    ),
    (
        (1, 0.32668115, 0.10406089, 0.0014179084),
        (0.16639465, 0.020070113, -0.0035938915, -0.00058392623),
        (0.017050642, -0.0021309326, 0.00085092367, -1.5247877e-07),
    ),
)


def _standard_gamma(alpha: torch.Tensor, generator: Any = None) -> torch.Tensor:
    """Marsaglia and Tsang's method, with a fixed number of proposals, of which the first good one is taken."""
    is_small = alpha < 1
    shape = torch.where(is_small, alpha + 1, alpha)
    d = shape - 1 / 3
    x = torch.randn((_PROPOSALS, *alpha.shape), dtype=alpha.dtype)
    v = (1 + x / (9 * d).sqrt()) ** 3
    log_u = torch.log1p(-torch.rand((_PROPOSALS, *alpha.shape), dtype=alpha.dtype))
    is_good = (v > 0) & (log_u < 0.5 * x * x + d * (1 - v + v.clamp(min=1e-30).log()))
    first = is_good.to(torch.int32).argmax(0, keepdim=True)
    chosen = torch.where(is_good.any(0), v.gather(0, first).squeeze(0), 1.0)
    boost = torch.log1p(-torch.rand(alpha.shape, dtype=alpha.dtype)) / alpha
    sample = d * chosen * torch.where(is_small, boost, 0.0).exp()
    return sample.clamp(min=torch.finfo(alpha.dtype).tiny)


def _sample_dirichlet(alpha: torch.Tensor, generator: Any = None) -> torch.Tensor:
    sample = _standard_gamma(alpha)
    return (sample / sample.sum(-1, keepdim=True)).clamp(min=torch.finfo(alpha.dtype).tiny)


def _standard_gamma_grad(alpha: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    small = _of_small(alpha, x)
    large = torch.where((0.9 * alpha <= x) & (x <= 1.1 * alpha), _near_mean(alpha, x), _saddle_point(alpha, x))
    result = torch.where(alpha > 8, large, _rational(alpha, x))
    return torch.where(x < 0.8, torch.where(small.isnan(), 0.0, small), result)


def _of_small(alpha: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A Taylor series for small x."""
    numerator, denominator = torch.ones_like(x), alpha
    first, second = 1 / denominator, 1 / denominator.square()
    for i in range(1, 6):
        numerator = numerator * (-x / i)
        denominator = denominator + 1
        first, second = first + numerator / denominator, second + numerator / denominator.square()
    power = x**alpha
    density = x ** (alpha - 1) * (-x).exp()
    slope = (x.log() - alpha.digamma()) * power * first - power * second
    return -slope / density


def _near_mean(alpha: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    left = 1 + 24 * alpha * (1 + 12 * alpha)
    right = 1440 * alpha.square() + 6 * x * (53 - 120 * x) - 65 * x * x / alpha + alpha * (107 + 3600 * x)
    return left * right / (1244160 * alpha.square().square())


def _saddle_point(alpha: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Rice's expansion for large alpha."""
    denominator, log_ratio = (8 * alpha).sqrt(), (x / alpha).log()
    term2 = denominator / (alpha - x)
    term3 = (x - alpha - alpha * log_ratio) ** -1.5
    term23 = torch.where(x < alpha, term2 - term3, term2 + term3)
    term1 = log_ratio * term23 - (2 / alpha).sqrt() * (alpha + x) / (alpha - x).square()
    return -(1 + 1 / (12 * alpha) * (1 + 1 / (24 * alpha))) * x * term1 / denominator


def _rational(alpha: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    u, v = (x / alpha).log(), alpha.log()
    values = []
    for table in _RATIONAL:
        a, b, c, d = (zero + u * (one + u * two) for zero, one, two in zip(*table, strict=True))
        values.append(a + v * (b + v * (c + v * d)))
    return (values[0] / values[1]).exp()


def _polygamma(n: int, value: torch.Tensor) -> Any:
    """The trigamma function; of higher derivatives there is no form that could be compiled."""
    if n == 0:
        return value.digamma()
    if n != 1:
        return NotImplemented
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    is_reflected = value < 0.5
    x = torch.where(is_reflected, 1 - value, value)
    total = torch.zeros_like(x)
    for _ in range(6):
        total, x = total + x.square().reciprocal(), x + 1
    square = x.square().reciprocal()
    total = total + (1 + 1 / (2 * x) + square * (1 / 6 - square * (1 / 30 - square * (1 / 42)))) / x
    sine = (math.pi * (value - value.round())).sin()
    return torch.where(is_reflected, (math.pi / sine).square() - total, total)


def gamma_decompositions() -> dict[Any, Any]:
    """Returns decompositions of the operators of gamma distributions."""
    return {
        aten._standard_gamma.default: _standard_gamma,
        aten._standard_gamma_grad.default: _standard_gamma_grad,
        aten._sample_dirichlet.default: _sample_dirichlet,
        aten.polygamma.default: _polygamma,
    }
