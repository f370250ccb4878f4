"""Rules of operators for rows that values select: `nonzero`, `x[mask]`, and what is computed on their rows.

The shapes of a graph are known, but a mask selects an unknown number of rows, at most as many as it has elements. They
are kept in a tensor of that many rows, the selected ones first and in order: it is *ragged*, and what stands in its
other rows means nothing. Operators that keep rows apart give ragged results. Those that add rows up (sums, products,
index_add) take zeros for rows that mean nothing; those that write rows write only the selected ones. All else is
refused, and so is a ragged result. Mixtures of experts route tokens this way. The rules see what autograd computes
backward, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._decomp import core_aten_decompositions
from torch.utils._python_dispatch import _disable_current_modes

from torchways.capture.rows.loops import RowLoops
from torchways.capture.rows.operator_kinds import (
    ALONG_DIM,
    INDEX_ADDS,
    INDEXED_WRITES,
    KNOWN,
    LIKE,
    OF_FIRST_DIM,
    PRODUCTS,
    REDUCTIONS,
    SUMS,
    has_mask,
)
from torchways.capture.rows.ragged_tensors import RaggedTensors
from torchways.capture.rows.values import Rows, refuse

aten = torch.ops.aten

_TAKEN_APART = core_aten_decompositions()


class RowRules:
    """What operators do to the ragged tensors of one trace.

    Args:
        ragged: these tensors.
        loops: the loops over rows of the trace.
        positions_of: returns the positions that a mask selects, if they are the same in each call.
    """

    def __init__(
        self,
        ragged: RaggedTensors,
        loops: RowLoops,
        positions_of: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> None:
        self._ragged = ragged
        self._loops = loops
        self._positions_of = positions_of

    def selects(self, func: Any, args: Any) -> bool:
        """Whether an operator selects rows by a mask, so that `call` has a rule for it."""
        return func is aten.nonzero.default or func is aten.masked_select.default or has_mask(func, args)

    def writes_by_mask(self, func: Any, args: Any) -> bool:
        """Whether an operator writes to the rows that a mask selects, one value for all or one for each."""
        return func in INDEXED_WRITES and has_mask(func, args)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator by its rule.

        Raises:
            DataDependentError: there is none.
        """
        if func is aten.nonzero.default:
            return self._nonzero(args[0])
        if func is aten.masked_select.default:
            value, mask = torch.broadcast_tensors(*args)
            return self._index(value, [mask])
        if func in (aten.index.Tensor, aten._unsafe_index.Tensor):
            return self._index(args[0], args[1])
        if func in INDEXED_WRITES:
            return self._index_put(func, *args, **kwargs)
        if func in INDEX_ADDS:
            return self._index_add(func, *args, **kwargs)
        if func is aten.index_select.default:
            return self._index_select(*args)
        if func is aten.embedding.default:
            return self._mark(func(*args), [(args[1], 0)])
        if func is aten.embedding_dense_backward.default:
            return func(self._zeroed(args[0]), *args[1:])
        if func is aten.nll_loss_forward.default or func is aten.nll_loss_backward.default:
            return self._nll_loss(func, args)
        if func in PRODUCTS:
            return self._product(func, args, kwargs)
        if func in REDUCTIONS:
            return self._reduce(func, args, kwargs)
        if func is aten.gather.default and self._ragged.rows_of(args[0]) is None:
            return self._mark(func(*args, **kwargs), [(args[2], 0)])
        if func is aten.scatter_add.default and self._ragged.rows_of(args[0]) is None:
            return func(*args[:3], self._zeroed(args[3]))
        if func in ALONG_DIM:
            return self._along_dim(func, args, kwargs)
        if func is aten.alias.default or func is aten.detach.default:
            return self._same(func(*args), args[0])
        if func in LIKE:
            return self._mark(func(*args, **kwargs), [(args[0], 0)])
        if (func.is_view and func is not aten.as_strided.default) or func is aten._unsafe_view.default:
            return self._view(func, args, kwargs)
        if torch.Tag.pointwise in func.tags or func in (aten.where.self, aten.copy_.default):
            return self._pointwise(func, args, kwargs)
        return refuse(str(func))

    def has_rule(self, func: Any) -> bool:
        """Whether `call` knows an operator itself; others are to be taken apart."""
        return func not in _TAKEN_APART or torch.Tag.pointwise in func.tags or func.is_view or func in KNOWN

    # ---- selecting

    def _nonzero(self, mask: torch.Tensor) -> torch.Tensor:
        if self._ragged.rows_of(mask) is not None:
            refuse("a mask of rows that another mask selects")
        flat = mask.reshape(-1) != 0
        if (condition := self._loops.condition) is not None:
            flat = flat & condition
        selected, size = flat, flat.shape[0]
        if size == 1:  # views could not tell it from other dimensions
            flat, size = torch.cat([flat, torch.zeros_like(flat)]), 2
        # Stable, so that selected rows stay in order; in eager PyTorch they are, too.
        order = torch.argsort((~flat).to(torch.int32), stable=True)
        rows = Rows(0, size, flat.sum())
        order = torch.where(rows.valid(1), order, 0)  # what means nothing still is a position
        columns, step = [], mask.numel()
        for length in mask.shape:
            step //= max(1, length)
            columns.append(order // step % length if length > 1 else torch.zeros_like(order))
        result = torch.stack(columns, 1) if columns else order.new_zeros((size, 0))
        if mask.dim() == 1:
            with _disable_current_modes():
                positions = torch.arange(size).reshape(size, 1)
            rows = replace(rows, mask=selected, positions=positions)
        self._ragged.mark(result, rows)
        return result

    def _index(self, value: torch.Tensor, indices: Any) -> torch.Tensor:
        indices = self._without_masks(indices)
        result = aten.index.Tensor(value, indices)
        named = [number for number, index in enumerate(indices) if index is not None]
        adjacent = named == list(range(named[0], named[-1] + 1))
        num_index_dims = max(indices[number].dim() for number in named)
        start = named[0] if adjacent else 0
        found: list[tuple[Rows, int]] = []
        for number in named:
            if (rows := self._ragged.rows_of(indices[number])) is not None:
                found.append((rows, start + rows.dim + num_index_dims - indices[number].dim()))
        if (rows := self._ragged.rows_of(value)) is not None:
            if rows.dim in named:
                refuse("indexing by rows")
            before = sum(number < rows.dim for number in named)
            behind = num_index_dims if not adjacent or named[0] < rows.dim else 0
            found.append((rows, rows.dim - before + behind))
        return self._ragged.agree(result, found)

    def _without_masks(self, indices: Any) -> list[torch.Tensor | None]:
        """Replaces masks among indices by the positions that they select."""
        result: list[torch.Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                if self._loops.condition is None and (known := self._positions_of(index)) is not None:
                    result.extend(known.unbind(1))
                    continue
                positions = self._nonzero(index)
                rows = self._ragged.rows_of(positions)
                assert rows is not None
                for column in positions.unbind(1):
                    self._ragged.mark(column, replace(rows, mask=None, positions=None))
                    result.append(column)
            else:
                result.append(index)
        return result

    def _index_select(self, value: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        dim %= max(1, value.dim())
        result = aten.index_select.default(value, dim, index)
        found = [(rows, dim)] if (rows := self._ragged.rows_of(index)) is not None else []
        if (rows := self._ragged.rows_of(value)) is not None:
            if rows.dim == dim:
                refuse("indexing by rows")
            found.append((rows, rows.dim))
        return self._ragged.agree(result, found)

    # ---- writing

    def _index_put(
        self, func: Any, target: torch.Tensor, indices: Any, values: torch.Tensor, accumulate: bool = False, *_: Any
    ) -> torch.Tensor:
        if self._ragged.rows_of(target) is not None:
            refuse(str(func))
        indices = self._without_masks(indices)
        ragged = [index for index in indices if index is not None and self._ragged.rows_of(index) is not None]
        rows = self._ragged.rows_of(ragged[0]) if ragged else None
        if rows is None and self._ragged.rows_of(values) is None:  # all positions are known
            return func(target, indices, values, accumulate)
        if rows is None or any(index.dim() != 1 for index in ragged):
            refuse(str(func))
        if accumulate:
            shape = aten.index.Tensor(target, indices).shape
            place = next(number for number, index in enumerate(indices) if index is not None)
            values = torch.where(rows.valid(len(shape), place), values.expand(shape), 0)
            written = aten.index_put.default(target, indices, values, True)
        else:
            shape = list(aten.index.Tensor(target, indices).shape)
            place = next(number for number, index in enumerate(indices) if index is not None)
            if (
                self._ragged.rows_of(values) is None
                and values.dim() == len(shape)
                and values.shape[place] not in (1, rows.size)
            ):
                missing = rows.size - values.shape[place]  # as many values as there are rows
                filler = values.new_zeros(*values.shape[:place], missing, *values.shape[place + 1 :])
                values = torch.cat([values, filler], place)
            # Rows that mean nothing are written behind the end, which is cut off.
            size = target.shape[place]
            indices[place] = torch.where(rows.valid(1), indices[place], size)
            longer = torch.cat([target, target.narrow(place, 0, 1)], place)
            written = aten.index_put.default(longer, indices, values).narrow(place, 0, size)
        if func._schema.is_mutable:
            return aten.copy_.default(target, written)
        return written

    def _index_add(
        self, func: Any, target: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        rows = self._ragged.rows_of(index) or self._ragged.rows_of(source)
        if rows is None or self._ragged.rows_of(target) is not None or source.shape[dim] != rows.size:
            refuse(str(func))
        source = torch.where(rows.valid(source.dim(), dim % source.dim()), source, 0)
        return func(target, dim, index, source, **kwargs)

    # ---- computing

    def _zeroed(self, value: torch.Tensor) -> torch.Tensor:
        """Returns a ragged tensor with zeros in the rows that mean nothing."""
        rows = self._ragged.rows_of(value)
        return value if rows is None else torch.where(rows.valid(value.dim()), value, 0)

    def _pointwise(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        num_dims = max(tensor.dim() for tensor in tensors)
        found = [
            (rows, rows.dim + num_dims - tensor.dim())
            for tensor in tensors
            if (rows := self._ragged.rows_of(tensor)) is not None
        ]
        if func._schema.is_mutable and self._ragged.rows_of(args[0]) is None:
            refuse(str(func))
        return self._ragged.agree(func(*args, **kwargs), found)

    def _product(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        *bias, left, right = args
        if bias and self._ragged.rows_of(bias[0]) is not None:
            refuse(str(func))
        found: list[tuple[Rows, int]] = []
        last = left.dim() - 1
        of_left, of_right = self._ragged.rows_of(left), self._ragged.rows_of(right)
        if (of_left is not None and of_left.dim == last) or (of_right is not None and of_right.dim == last - 1):
            left = self._zeroed(left) if of_left is not None and of_left.dim == last else left
            right = self._zeroed(right) if of_right is not None and of_right.dim == last - 1 else right
        if of_left is not None and of_left.dim != last:
            found.append((of_left, of_left.dim))
        if of_right is not None and of_right.dim != last - 1:
            found.append((of_right, of_right.dim))
        return self._ragged.agree(func(*bias, left, right, **kwargs), found)

    def _reduce(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = args[0]
        rows = self._ragged.rows_of(value)
        assert rows is not None
        dims = args[1] if len(args) > 1 and func is not aten.sum.default else None
        dims = [dims] if isinstance(dims, int) else dims
        over = {dim % value.dim() for dim in dims} if dims else set(range(value.dim()))
        if rows.dim in over:
            if func not in SUMS:
                refuse(str(func))
            return func(self._zeroed(value), *args[1:], **kwargs)
        keepdim = kwargs.get("keepdim", len(args) > 2 and args[2])
        dim = rows.dim if keepdim else rows.dim - sum(other < rows.dim for other in over)
        return self._ragged.agree(func(*args, **kwargs), [(rows, dim)])

    def _along_dim(self, func: Any, args: Any, kwargs: Any) -> Any:
        position = ALONG_DIM[func]
        dim = args[position] if len(args) > position else kwargs.get("dim", 0 if func in OF_FIRST_DIM else -1)
        tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        found = [(rows, rows.dim) for tensor in tensors if (rows := self._ragged.rows_of(tensor)) is not None]
        if any(place == dim % tensors[0].dim() for _, place in found):
            refuse(str(func))
        return self._ragged.agree(func(*args, **kwargs), found)

    def _nll_loss(self, func: Any, args: Any) -> Any:
        backward = func is aten.nll_loss_backward.default
        args = list(args)
        value, target, ignored = (1, 2, 5) if backward else (0, 1, 4)
        rows = self._ragged.rows_of(args[value]) or self._ragged.rows_of(args[target])
        if rows is None or args[value].dim() != 2:
            refuse(str(func))
        args[target] = torch.where(rows.valid(1), args[target], args[ignored])
        result = func(*args)
        if backward:
            self._ragged.agree(result, [(rows, 0)])
        elif args[3] == 0:  # a loss for each row
            self._ragged.agree(result[0], [(rows, 0)])
        return result

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator that makes views.

        The strides that it gives to a tensor with strides in the ragged dimension alone show where that dimension goes.
        """
        value = args[0]
        rows = self._ragged.rows_of(value)
        assert rows is not None
        probe = torch.empty_strided(value.shape, [int(dim == rows.dim) for dim in range(value.dim())], device="meta")
        view = aten.view.default if func is aten._unsafe_view.default else func
        try:
            with _disable_current_modes():
                probes = view(probe, *args[1:], **kwargs)
                positions = None
                if rows.positions is not None:
                    positions = view(rows.positions, *args[1:], **kwargs)
        except RuntimeError:
            refuse(str(func))
        results = func(*args, **kwargs)
        several = isinstance(results, (list, tuple))
        for number, (result, place) in enumerate(
            zip(results if several else [results], probes if several else [probes], strict=True)
        ):
            dims = [dim for dim in range(place.dim()) if place.stride(dim) and place.shape[dim] > 1]
            if len(dims) != 1 or place.shape[dims[0]] != rows.size:
                refuse(str(func))
            kept = positions[number] if several and positions is not None else positions
            self._ragged.mark(
                result, replace(rows, dim=dims[0], positions=kept if isinstance(kept, torch.Tensor) else None)
            )
        return results

    # ---- bookkeeping

    def _same(self, result: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Makes a result that is a value itself ragged as the value is."""
        rows = self._ragged.rows_of(value)
        assert rows is not None
        self._ragged.mark(result, rows)
        return result

    def _mark(self, result: Any, sources: list[tuple[torch.Tensor, int]]) -> Any:
        found = [
            (rows, rows.dim + moved) for tensor, moved in sources if (rows := self._ragged.rows_of(tensor)) is not None
        ]
        return self._ragged.agree(result, found)
