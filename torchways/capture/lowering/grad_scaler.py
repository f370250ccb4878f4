"""Decompositions of the operators of `torch.amp.GradScaler`: the look for infinities, and the scale's growth."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten


def _check_and_unscale(grads: list[torch.Tensor], found_inf: torch.Tensor, inverse: torch.Tensor) -> None:
    for grad in grads:
        found_inf.copy_(torch.maximum(found_inf, (~grad.isfinite()).any().to(found_inf.dtype)))
        grad.copy_(grad * inverse)


def _update_scale(
    scale: torch.Tensor, growth: torch.Tensor, found_inf: torch.Tensor, factor: float, backoff: float, interval: int
) -> torch.Tensor:
    is_bad, count = found_inf > 0, growth + 1
    grows, grown = count == interval, scale * factor
    scale.copy_(torch.where(is_bad, scale * backoff, torch.where(grows & grown.isfinite(), grown, scale)))
    growth.copy_(torch.where(is_bad | grows, 0, count).to(growth.dtype))
    return scale


def scaler_decompositions() -> dict[Any, Any]:
    """Returns decompositions of the scaler's own operators."""
    return {
        aten._amp_foreach_non_finite_check_and_unscale_.default: _check_and_unscale,
        aten._amp_update_scale_.default: _update_scale,
    }
