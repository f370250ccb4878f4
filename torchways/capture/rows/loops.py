"""Loops over rows of unknown number: `for row in mask.nonzero()`.

The body runs for every position of the mask. Where the position is not selected, everything that the body selects is
empty. So the body may write to tensors from before the loop by selected rows only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from torchways.capture.rows.operator_kinds import INDEX_ADDS, INDEXED_WRITES, has_mask
from torchways.capture.rows.ragged_tensors import RaggedTensors
from torchways.capture.rows.values import refuse


class RowLoops:
    """The loops over rows of one trace, and what they may not do."""

    def __init__(self, ragged: RaggedTensors) -> None:
        self._ragged = ragged
        self._body: _Body | None = None
        #: The loop body that made a storage, while it may not be used elsewhere.
        self._made_in: dict[int, _Body] = {}
        self._alive: list[torch.Tensor] = []
        self._left_early = False

    @property
    def condition(self) -> torch.Tensor | None:
        """The condition under which the loop body that runs now has an effect; None: none runs."""
        return self._body.condition if self._body is not None else None

    def iterate(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """Iterates over the rows of what `nonzero` found, for every position; see the module's docstring."""
        rows = self._ragged.rows_of(tensor)
        assert rows is not None
        if rows.mask is None or rows.positions is None or rows.dim != 0 or self._body is not None:
            refuse("a loop over rows")
        for position in range(rows.mask.shape[0]):
            self._body = _Body(rows.mask[position])
            finished = False
            try:
                with _disable_current_modes():
                    row = rows.positions[position]
                    shape, index = row.shape, int(row)
                yield torch.full(shape, index, dtype=row.dtype)
                finished = True
            finally:
                self._body = None
                self._left_early |= not finished

    def check(self, func: Any, args: Any, kwargs: Any, in_backward: bool) -> None:
        """Refuses an operator that acts otherwise in a loop body that runs for all positions.

        Raises:
            DataDependentError: it writes to what was there before, or uses what another run of the body made.
        """
        if self._left_early:
            refuse("a loop over rows that ends early")
        if in_backward or (self._body is None and not self._made_in):
            return
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(self._made_in.get(_storage(tensor), self._body) is not self._body for tensor in tensors):
            refuse(f"{func}, on what a loop over rows made in another round,")
        if self._body is not None and func._schema.is_mutable and _storage(args[0]) not in self._made_in:
            by_rows = (func in INDEX_ADDS or func in INDEXED_WRITES) and self._ragged.concerns(func, args, kwargs)
            if not by_rows and not has_mask(func, args):
                refuse(f"{func}, which writes to a tensor from within a loop over rows,")

    def check_results(self, results: Sequence[torch.Tensor]) -> None:
        """Refuses what a trace may not end with.

        Raises:
            DataDependentError: a result is ragged, or a loop ended early.
        """
        if self._left_early:
            refuse("a loop over rows that ends early")
        if any(self._ragged.rows_of(tensor) is not None for tensor in results):
            refuse("a result")

    def note_result(self, func: Any, result: Any) -> None:
        """Remembers the tensors that a loop body made."""
        if self._body is None or func._schema.is_mutable or func.is_view:
            return
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._made_in[_storage(tensor)] = self._body
                self._alive.append(tensor)  # its storage's address is not used again


class _Body:
    """One run of the body of a loop over rows, and the condition under which it has an effect."""

    def __init__(self, condition: torch.Tensor) -> None:
        self.condition = condition


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
