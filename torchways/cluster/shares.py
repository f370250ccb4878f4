"""What a client may ask for of the devices that it shares with others. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from torchways.config import LEAST_WEIGHT


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareLimits:
    """The most that a cluster's clients may ask for."""

    max_weight: float
    max_priority: int

    def refusal(self, weight: float, priority: int) -> str | None:
        """Returns why a client may not have a share, if so. A weight of 0: it asked for none."""
        if weight and not LEAST_WEIGHT <= weight <= self.max_weight:
            return f"weight must be from {LEAST_WEIGHT:g} to {self.max_weight:g}, this cluster's limit, not {weight:g}"
        if not -self.max_priority <= priority <= self.max_priority:
            limit = self.max_priority
            return f"priority must be from {-limit} to {limit}, this cluster's limit, not {priority}"
        return None
