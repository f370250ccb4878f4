"""How far a value is from what eager PyTorch computes, and whether rounding explains it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.testing._comparison import default_tolerances  # no public name gives assert_close's tolerances by dtype

#: A value may be this many times as far from float64's as eager's is: XLA sums in another order and fuses.
_ROUNDING_FACTOR = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Largest error that counts as none: `atol + rtol * abs(expected)`, for each element.

    Attributes:
        rtol, atol: None: torch.testing.assert_close's for the dtype (float32: 1.3e-6 and 1e-5; bfloat16: 1.6e-2 and
            1e-5). Integers and bools must be equal in any case.
    """

    rtol: float | None = None
    atol: float | None = None

    def of(self, dtype: torch.dtype) -> tuple[float, float]:
        """Returns rtol and atol for a dtype."""
        if not (dtype.is_floating_point or dtype.is_complex):
            return 0.0, 0.0
        rtol, atol = default_tolerances(dtype)
        return rtol if self.rtol is None else self.rtol, atol if self.atol is None else self.atol


#: For what is only moved.
EXACT = Tolerance(rtol=0.0, atol=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What sets a value apart from the expected one.

    Attributes:
        num_elements: of the value.
        num_different: elements whose error exceeds the tolerance.
        max_abs_error, max_rel_error: over all elements; the latter over those that are expected not to be 0.
        index: of the element with the largest absolute error.
        actual, expected: that element.
        rtol, atol: the tolerance.
    """

    num_elements: int
    num_different: int
    max_abs_error: float
    max_rel_error: float
    index: tuple[int, ...]
    actual: complex | float
    expected: complex | float
    rtol: float
    atol: float

    def __str__(self) -> str:
        return (
            f"{self.num_different} of {self.num_elements} elements differ (rtol={self.rtol:g}, atol={self.atol:g}); "
            f"largest absolute error {self.max_abs_error:.3g}, at {list(self.index)}, where {self.actual:.9g} stands "
            f"for eager PyTorch's {self.expected:.9g}; largest relative error {self.max_rel_error:.3g}"
        )


def compare(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Difference:
    """Compares two CPU tensors of one shape and dtype; NaN equals NaN."""
    rtol, atol = tolerance.of(expected.dtype)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    wide = torch.complex128 if expected.dtype.is_complex else torch.float64
    wide_actual, wide_expected = actual.to(wide), expected.to(wide)
    error = (wide_actual - wide_expected).abs().nan_to_num(nan=torch.inf).masked_fill(same, 0.0)
    magnitude = wide_expected.abs()
    different = ~same & ~(error <= atol + rtol * magnitude) if rtol or atol else ~same
    relative = torch.where(magnitude > 0, error / magnitude, 0.0).nan_to_num(nan=0.0)
    worst = int(error.argmax()) if error.numel() else 0
    index = torch.unravel_index(torch.tensor(worst), error.shape) if error.numel() else ()
    return Difference(
        num_elements=error.numel(),
        num_different=int(different.sum()),
        max_abs_error=_largest(error),
        max_rel_error=_largest(relative),
        index=tuple(map(int, index)),
        actual=actual.flatten()[worst].item() if error.numel() else 0.0,
        expected=expected.flatten()[worst].item() if error.numel() else 0.0,
        rtol=rtol,
        atol=atol,
    )


def explained_by_rounding(actual: torch.Tensor, expected: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether a value is about as near to what float64 gives as eager PyTorch's is (as `torch._dynamo.utils.same`).

    That judges long sums, and results of noise (Adam's step for a gradient that is zero but for rounding), which no
    tolerance fits. Both the root mean square and the largest error count.

    Args:
        actual: the executor's.
        expected: eager PyTorch's, in the same dtype.
        reference: eager PyTorch's, computed in float64.
    """
    if not actual.dtype.is_floating_point or not torch.equal(actual.isfinite(), expected.isfinite()):
        return False
    known = actual.isfinite() & reference.isfinite()
    if not torch.equal(actual[~known].nan_to_num(), expected[~known].nan_to_num()):
        return False
    error, eager_error = ((value[known].double() - reference[known].double()).abs() for value in (actual, expected))
    return all(measure(error) <= _ROUNDING_FACTOR * measure(eager_error) for measure in (_largest, _root_mean_square))


def _largest(error: torch.Tensor) -> float:
    return float(error.max()) if error.numel() else 0.0


def _root_mean_square(error: torch.Tensor) -> float:
    return float(error.square().mean().sqrt()) if error.numel() else 0.0
