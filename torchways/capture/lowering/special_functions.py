"""Decompositions of functions of single elements: gamma functions, signs, rounding, NaNs in maxima and minima."""

from __future__ import annotations

import math
from typing import Any

import torch

aten = torch.ops.aten


def _of_numbers(operator: Any) -> Any:
    """torch-xla does not convert integers for it."""

    def convert(value: torch.Tensor) -> Any:
        is_number = value.is_floating_point() or value.is_complex()
        return NotImplemented if is_number else operator(value.to(torch.get_default_dtype()))

    return convert


def _signbit(value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        return value < 0
    return (value < 0) | ((value == 0) & (value.reciprocal() < 0))


def _copysign_number(value: torch.Tensor, sign: float) -> torch.Tensor:
    value = value.abs() if value.is_floating_point() else value.abs().to(torch.get_default_dtype())
    return -value if math.copysign(1.0, sign) < 0 else value


def _copysign(value: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    dtype = torch.result_type(value, sign)
    magnitude = value.abs().to(dtype if dtype.is_floating_point else torch.get_default_dtype())
    return torch.where(_signbit(sign), -magnitude, magnitude)


def _fmax(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.where(value.isnan(), other, torch.where(other.isnan(), value, value.maximum(other)))


def _fmin(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.where(value.isnan(), other, torch.where(other.isnan(), value, value.minimum(other)))


def _round_decimals(value: torch.Tensor, *, decimals: int) -> torch.Tensor:
    if decimals == 0 or not value.is_floating_point():
        return value.round()
    scale = 10.0 ** abs(decimals)
    return (value * scale).round() / scale if decimals > 0 else (value / scale).round() * scale


def _angle(value: torch.Tensor) -> Any:
    if value.is_complex():
        return NotImplemented
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    return torch.where(value < 0, math.pi, torch.where(value.isnan(), value, 0.0))


#: Of Lanczos' approximation, as XLA's own gamma functions have it; its g is 7.
_LANCZOS_BASE = 0.99999999999980993227684700473478
_LANCZOS = (
    676.520368121885098567009190444019,
    -1259.13921672240287047156078755283,
    771.3234287776530788486528258894,
    -176.61502916214059906584551354,
    12.507343278686904814458936853,
    -0.13857109526572011689554707,
    9.984369578019570859563e-6,
    1.50563273514931155834e-7,
)


def _lgamma(value: torch.Tensor) -> torch.Tensor:
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    is_reflected = value < 0.5
    z = torch.where(is_reflected, -value, value - 1)
    series = torch.full_like(z, _LANCZOS_BASE)
    for number, coefficient in enumerate(_LANCZOS):
        series = series + coefficient / (z + (number + 1))
    log_t = math.log(7.5) + torch.log1p(z / 7.5)
    right = math.log(2 * math.pi) / 2 + (z + 0.5 - (z + 7.5) / log_t) * log_t + series.log()
    fraction = value.abs() - value.abs().floor()
    fraction = torch.where(fraction > 0.5, 1 - fraction, fraction)
    log_sin = (math.pi * fraction).sin().log()
    left = torch.where(log_sin.isfinite(), math.log(math.pi) - log_sin - right, -log_sin)
    return torch.where(value.isinf(), math.inf, torch.where(is_reflected, left, right))


def _digamma(value: torch.Tensor) -> torch.Tensor:
    value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    is_reflected = value < 0.5
    z = torch.where(is_reflected, -value, value - 1)
    series, slope = torch.full_like(z, _LANCZOS_BASE), torch.zeros_like(z)
    for number, coefficient in enumerate(_LANCZOS):
        slope = slope - coefficient / (z + (number + 1)).square()
        series = series + coefficient / (z + (number + 1))
    right = math.log(7.5) + torch.log1p(z / 7.5) + slope / series - 7 / (z + 7.5)
    fraction = value - value.round()
    left = right - math.pi / (math.pi * fraction).tan()
    left = torch.where((value == value.floor()) & (value < 0), math.nan, left)
    left = torch.where(value == 0, torch.copysign(torch.full_like(value, math.inf), -value), left)
    return torch.where(is_reflected, left, right)


def function_decompositions() -> dict[Any, Any]:
    """Returns decompositions of functions of single elements."""
    return {
        aten.copysign.Tensor: _copysign,
        aten.copysign.Scalar: _copysign_number,
        aten.signbit.default: _signbit,
        aten.exp2.default: lambda value: torch.exp(value * math.log(2.0)),
        aten.fmax.default: _fmax,
        aten.fmin.default: _fmin,
        aten.hypot.default: lambda value, other: torch.sqrt(value * value + other * other),
        aten.erfc.default: _of_numbers(aten.erfc.default),
        aten.erfinv.default: _of_numbers(aten.erfinv.default),
        aten.round.decimals: _round_decimals,
        aten.angle.default: _angle,
        aten.lgamma.default: _lgamma,
        aten.digamma.default: _digamma,
    }
