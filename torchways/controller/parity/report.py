"""Parity mode's switch, and what it reports. `check.py` compares; `observe.py` makes programs that show all."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from torchways.controller.parity.comparison import Difference, Tolerance

PARITY_VARIABLE = "TORCHWAYS_PARITY"


@dataclass(slots=True)
class ParityReport:
    """What parity mode compared. `str()` gives a summary in one line.

    Attributes:
        tolerance: the tolerance of the comparison.
        num_calls, num_nodes, num_values: how many calls, nodes and values were compared.
        num_by_rounding: values beyond the tolerance that were accepted as rounding (see `tw.parity`).
        largest: for each dtype, the comparison with the largest absolute error.
    """

    tolerance: Tolerance = field(default_factory=Tolerance)
    num_calls: int = 0
    num_nodes: int = 0
    num_values: int = 0
    num_by_rounding: int = 0
    largest: dict[str, Difference] = field(default_factory=dict)

    def __str__(self) -> str:
        errors = ", ".join(f"{dtype} {item.max_abs_error:.2g}" for dtype, item in self.largest.items())
        rounding = f" ({self.num_by_rounding} of them but for rounding)" if self.num_by_rounding else ""
        return (
            f"{self.num_calls} calls, {self.num_nodes} nodes, {self.num_values} values agree with eager "
            f"PyTorch{rounding}; largest absolute errors: {errors or 'none'}"
        )

    def add(self, dtype: str, difference: Difference, *, by_rounding: bool) -> None:
        """Notes the comparison of one value."""
        self.num_values += 1
        self.num_by_rounding += by_rounding
        if dtype not in self.largest or difference.max_abs_error > self.largest[dtype].max_abs_error:
            self.largest[dtype] = difference

    def include(self, other: ParityReport) -> None:
        """Adds what another report counted."""
        self.num_calls += other.num_calls
        self.num_nodes += other.num_nodes
        self.num_values += other.num_values
        self.num_by_rounding += other.num_by_rounding
        for dtype, difference in other.largest.items():
            if dtype not in self.largest or difference.max_abs_error > self.largest[dtype].max_abs_error:
                self.largest[dtype] = difference


_active: contextvars.ContextVar[ParityReport | None] = contextvars.ContextVar("parity", default=None)
#: What TORCHWAYS_PARITY=1 reports to.
_of_process = ParityReport()


@contextlib.contextmanager
def parity(*, rtol: float | None = None, atol: float | None = None) -> Iterator[ParityReport]:
    """See `tw.parity`."""
    report = ParityReport(Tolerance(rtol=rtol, atol=atol))
    token = _active.set(report)
    try:
        yield report
    finally:
        _active.reset(token)


def active_parity() -> ParityReport | None:
    """Returns the report of parity mode, or None where it is off."""
    report = _active.get()
    if report is None and os.environ.get(PARITY_VARIABLE, "") not in ("", "0"):
        return _of_process
    return report
