"""Random operators of a trace: the same state of PyTorch's generator gives the same numbers, as in eager PyTorch.

That holds within a trace. The numbers that a run draws come from its seed (operators.py, `MANUAL_SEED`); a program that
calls `torch.manual_seed` has the same seed in each run.

`torch.utils.checkpoint` computes a forward again in backward, and restores the generator's state before, so that
dropout drops the same elements. Traced operators draw no numbers. So each one advances the generator by hand, and one
that finds it in a state that another of the same kind found before returns that one's numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from torchways.capture.source import user_line
from torchways.errors import CaptureError


class RandomNumbers:
    """The random operators of one trace, by the state of the generator that they found."""

    def __init__(self) -> None:
        self._drawn: dict[Any, Any] = {}
        #: What the program gives torch.manual_seed, before it draws: each run begins there.
        self.seed: int | None = None

    @contextmanager
    def seeding(self) -> Iterator[None]:
        """Sees calls of `torch.manual_seed` inside."""
        original = torch.random.manual_seed

        def manual_seed(seed: Any) -> torch.Generator:
            if torch.random.manual_seed is not manual_seed or threading.get_ident() != thread:
                return original(seed)
            if self._drawn and self.seed is None:
                raise CaptureError(
                    f"the program draws random numbers before it calls torch.manual_seed at {user_line()}: call it "
                    "first, or outside the program"
                )
            self.seed = self.seed if self.seed is not None else int(seed)
            return original(int(seed))

        thread = threading.get_ident()
        torch.manual_seed = torch.random.manual_seed = manual_seed
        try:
            yield
        finally:
            torch.manual_seed = torch.random.manual_seed = original

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls an operator on traced tensors.

        Raises:
            CaptureError: it has a generator of its own.
        """
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise CaptureError(
                f"{func} has a generator of its own at {user_line()}: a program draws from PyTorch's default one, so "
                "leave it out and call torch.manual_seed, or draw outside the program and pass the tensor"
            )
        key = (func, _generator_state(), *map(_kind, pytree.tree_leaves((args, kwargs))))
        drawn = self._drawn.get(key)
        if drawn is None:
            result = func(*args, **kwargs)
            # The caller may change the result in place (dropout scales its mask): a copy is kept.
            self._drawn[key] = pytree.tree_map_only(torch.Tensor, torch.clone, result)
            return result
        if func._schema.is_mutable:
            return args[0].copy_(drawn)
        return pytree.tree_map_only(torch.Tensor, torch.clone, drawn)


def _generator_state() -> bytes:
    """Returns the state of PyTorch's generator, and advances it."""
    with _disable_current_modes():
        state = torch.get_rng_state().numpy().tobytes()
        torch.rand(1)
    return state


def _kind(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else (type(leaf), str(leaf))
