"""Values on the host from which arrays are made when a slice first needs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False, slots=True)
class HostContent:
    """A value on the host: a tensor, or one number everywhere."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    content: torch.Tensor | float
