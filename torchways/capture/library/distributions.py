"""Checks of `torch.distributions`: they pass where a trace cannot know the values that they ask for.

That is as with `validate_args=False`. Checks that can be answered are still made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributions.constraints import Constraint, positive_definite, positive_semidefinite
from torch.overrides import TorchFunctionMode

from torchways.errors import DataDependentError


class ArgumentChecks(TorchFunctionMode):
    """While it is active, checks of torch.distributions that depend on computed values pass."""

    def __enter__(self) -> Any:
        self._saved = [(constraint, constraint.check) for constraint in _OF_MATRICES]
        for constraint, check in _OF_MATRICES.items():
            constraint.check = check  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for constraint, check in self._saved:
            constraint.check = check  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._is_all_true:  # distributions' alone; users have Tensor.all
            try:
                return bool(func(*args))
            except DataDependentError:
                return True
        return func(*args, **(kwargs or {}))


def _is_symmetric(value: torch.Tensor) -> torch.Tensor:
    if value.shape[-1] != value.shape[-2]:
        return torch.zeros(value.shape[:-2], dtype=torch.bool)
    return torch.isclose(value, value.mT, atol=1e-6).all(-2).all(-1)


def _is_positive_semidefinite(self: Constraint, value: torch.Tensor) -> torch.Tensor:
    symmetric = _is_symmetric(value)
    return symmetric & torch.linalg.eigvalsh(value).ge(0).all(-1) if value.shape[-1] == value.shape[-2] else symmetric


def _is_positive_definite(self: Constraint, value: torch.Tensor) -> torch.Tensor:
    symmetric = _is_symmetric(value)
    return symmetric & torch.linalg.cholesky_ex(value).info.eq(0) if value.shape[-1] == value.shape[-2] else symmetric


#: Constraints whose check decides by values whether to go on, and what they check, without a decision.
_OF_MATRICES: dict[type[Constraint], Any] = {
    type(positive_semidefinite): _is_positive_semidefinite,
    type(positive_definite): _is_positive_definite,
}
