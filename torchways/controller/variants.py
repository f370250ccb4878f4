"""The traces that a function keeps: so many, those used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torchways.controller.buckets import Padding
from torchways.errors import ConfigError

V = TypeVar("V")

#: Traces that a function keeps unless it is told otherwise.
MAX_VARIANTS = 32


@dataclass(frozen=True, slots=True)
class VariantOptions:
    """How many traces a function keeps, and how its arguments are padded so that it needs few."""

    max_variants: int = MAX_VARIANTS
    padding: Padding | None = None


DEFAULT_OPTIONS = VariantOptions()


class VariantCache(Generic[V]):
    """Variants by the key of their signature; one key may have several, for states of Python. The least recently used
    goes first, and with it what executors have of it.

    Args:
        max_variants: kept at most.

    Raises:
        ConfigError: that is less than one.
    """

    def __init__(self, max_variants: int) -> None:
        if max_variants < 1:
            raise ConfigError(f"max_variants={max_variants}: a function keeps one trace at least")
        self.max_variants = max_variants
        self._of_key: dict[Any, list[V]] = {}
        #: By identity of the variant, the one used last at the end.
        self._order: OrderedDict[int, tuple[Any, V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def keys(self) -> list[Any]:
        """Returns the keys of all variants, from the most to the least recently used."""
        return list(dict.fromkeys(key for key, _ in reversed(self._order.values())))

    def of_key(self, key: Any) -> list[V]:
        """Returns the variants of a key."""
        return self._of_key.get(key, [])

    def find(self, key: Any, fits: Callable[[V], bool]) -> V | None:
        """Returns the first variant of `key` that fits, which is now the one used last."""
        for variant in self._of_key.get(key, ()):
            if fits(variant):
                self._order.move_to_end(id(variant))
                return variant
        return None

    def add(self, key: Any, variant: V) -> None:
        """Keeps a variant, in place of the least recently used one if there are too many."""
        while len(self._order) >= self.max_variants:
            _, (old_key, old) = self._order.popitem(last=False)
            others = [item for item in self._of_key[old_key] if item is not old]
            if others:
                self._of_key[old_key] = others
            else:
                del self._of_key[old_key]
        self._of_key.setdefault(key, []).append(variant)
        self._order[id(variant)] = (key, variant)
