"""Rows that values select, in graphs whose shapes are known: `nonzero`, `x[mask]`, and what is computed on their rows.

A mask selects an unknown number of rows, at most as many as it has elements. They are kept in a tensor of that many
rows, the selected ones first and in order: it is *ragged*, and what stands in its other rows means nothing. Operators
that keep rows apart give ragged results. Those that add rows up (sums, products, index_add) take zeros for rows that
mean nothing; those that write rows write only the selected ones. All else is refused, and so is a ragged result.
Mixtures of experts route tokens this way. The rules see what autograd computes backward, too.

`for row in mask.nonzero()` runs for every position of the mask; where that is not selected, all that the body selects
is empty. The body may write to what was there before only by selected rows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch._decomp import core_aten_decompositions
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from torchways.capture.source import user_line
from torchways.errors import DataDependentError

aten = torch.ops.aten

#: Results have the shape of the first argument, and its rows.
_LIKE = {
    aten.clone.default,
    aten._to_copy.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.fill_.Scalar,
    aten.zero_.default,
}
#: Computed along one dimension: the position of `dim` among the arguments.
_ALONG_DIM = {
    aten.cumsum.default: 1,
    aten._softmax.default: 1,
    aten._log_softmax.default: 1,
    aten._softmax_backward_data.default: 2,
    aten._log_softmax_backward_data.default: 2,
    aten.sort.default: 1,
    aten.topk.default: 2,
    aten.cat.default: 1,
    aten.slice_scatter.default: 2,
}
_OF_FIRST_DIM = {aten.cat.default, aten.slice_scatter.default}
_REDUCTIONS = {
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.var_mean.correction,
    aten.any.dim,
    aten.all.dim,
    aten.argmax.default,
}
_SUMS = {aten.sum.dim_IntList, aten.sum.default}
_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default}
_INDEXED_WRITES = {
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
_INDEX_ADDS = {aten.index_add.default, aten.index_add_.default}
_TAKEN_APART = core_aten_decompositions()


@dataclass(frozen=True, slots=True)
class Rows:
    """Which dimension of a tensor is ragged.

    Attributes:
        dim: the dimension.
        size: the tensor's size there.
        count: how many rows mean something: a traced integer of no dimensions.
        mask: the mask of one dimension that selected the rows, as it was where that is known.
        positions: what the rows would be, were all of them selected, in the shape of the tensor; not traced.
        inside: which rows mean something, where these are not the first (`windows.py`).
    """

    dim: int
    size: int
    count: torch.Tensor
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    inside: torch.Tensor | None = None

    def valid(self, num_dims: int, dim: int | None = None) -> torch.Tensor:
        """Returns which rows mean something, in a shape that broadcasts to a tensor of `num_dims` dimensions."""
        shape = [1] * num_dims
        shape[self.dim if dim is None else dim] = self.size
        valid = torch.arange(self.size) < self.count if self.inside is None else self.inside
        return valid.reshape(shape)

    def along(self, dim: int) -> Rows:
        """Returns the same rows of a tensor that has them along another dimension."""
        return replace(self, dim=dim)

    def read_count(self) -> int:
        """Returns how many rows there are.

        Raises:
            DataDependentError: that depends on computed values.
        """
        try:
            return int(self.count.item())
        except DataDependentError:
            refuse("arithmetic with a number of rows")


class RowCount(int):
    """The number of rows of a ragged tensor, as far as Python may know it.

    Where it decides whether there are any, it says yes: what is computed on none has no effect. It can be used as a
    size; all else asks for the number itself, which is known where the mask is.
    """

    _read: Callable[[], int]

    @classmethod
    def of(cls, most: int, read: Callable[[], int]) -> RowCount:
        """Returns a count that is `most` where Python takes it for a size, and which `read` asks for."""
        count = cls(most)
        count._read = read
        return count

    def _is_more_than(self, other: Any) -> bool:
        return True if other == 0 else self._read() > other

    def _is_at_least(self, other: Any) -> bool:
        return True if other == 1 else self._read() >= other

    def _is_not(self, other: Any) -> bool:
        return True if int(other) == 0 else self._read() != other

    __gt__ = _is_more_than
    __ge__ = _is_at_least
    __ne__ = _is_not
    __hash__ = int.__hash__

    def __lt__(self, other: Any) -> bool:
        return not self._is_at_least(other)

    def __le__(self, other: Any) -> bool:
        return not self._is_more_than(other)

    def __eq__(self, other: Any) -> bool:
        return not self._is_not(other)


def _with_number(name: str) -> Any:
    operator = getattr(int, name)

    def compute(count: RowCount, *others: Any) -> Any:
        return operator(count._read(), *map(_number, others))

    return compute


def _number(value: Any) -> Any:
    return value._read() if isinstance(value, RowCount) else value


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    for _prefix in ("__", "__r"):
        setattr(RowCount, f"{_prefix}{_name}__", _with_number(f"{_prefix}{_name}__"))
for _name in ("float", "neg"):
    setattr(RowCount, f"__{_name}__", _with_number(f"__{_name}__"))


class RaggedSize(tuple[int, ...]):
    """A shape with a `RowCount` in it, of which torch.Size would make a number."""

    def numel(self) -> RowCount:
        """Returns the number of elements."""
        return RowCount.of(math.prod(map(int, self)), lambda: math.prod(map(_number, self)))


def refuse(operator: str) -> NoReturn:
    """Raises the error for what needs to know how many rows there are."""
    raise DataDependentError(
        f"{operator} at {user_line()} needs to know how many rows a mask selects, which depends on values; "
        "select with torch.where, or return the tensor and decide outside the program"
    )


class RaggedRows:
    """The ragged tensors of one trace, and the rules of operators for them.

    Args:
        node_of: returns the graph node of a traced tensor.
        positions_of: returns the positions that a mask selects, if they are the same in each call.
    """

    def __init__(
        self,
        node_of: Callable[[torch.Tensor], torch.fx.Node | None],
        positions_of: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> None:
        self.node_of = node_of
        self._positions_of = positions_of
        self._rows: dict[torch.fx.Node, Rows] = {}
        self._body: _Body | None = None
        #: The loop body that made a storage, while it may not be used elsewhere.
        self._made_in: dict[int, _Body] = {}
        self._alive: list[torch.Tensor] = []
        self._left_early = False

    def rows_of(self, tensor: Any) -> Rows | None:
        """Returns how a tensor is ragged, or None if it is not."""
        if not self._rows or not isinstance(tensor, torch.Tensor):
            return None
        node = self.node_of(tensor)
        return self._rows.get(node) if node is not None else None

    @property
    def is_used(self) -> bool:
        """Whether the trace has ragged tensors."""
        return bool(self._rows)

    def concerns(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether one of an operator's arguments is ragged."""
        if not self._rows or func.namespace == "prim":  # which ask for a tensor's device or layout
            return False
        return any(self.rows_of(leaf) is not None for leaf in pytree.tree_leaves((args, kwargs)))

    def selects(self, func: Any, args: Any) -> bool:
        """Whether an operator selects rows by a mask, so that `call` has a rule for it."""
        return func is aten.nonzero.default or func is aten.masked_select.default or _has_mask(func, args)

    def writes_by_mask(self, func: Any, args: Any) -> bool:
        """Whether an operator writes to the rows that a mask selects, one value for all or one for each."""
        return func in _INDEXED_WRITES and _has_mask(func, args)

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
        if func in _INDEXED_WRITES:
            return self._index_put(func, *args, **kwargs)
        if func in _INDEX_ADDS:
            return self._index_add(func, *args, **kwargs)
        if func is aten.index_select.default:
            return self._index_select(*args)
        if func is aten.embedding.default:
            return self._mark(func(*args), [(args[1], 0)])
        if func is aten.embedding_dense_backward.default:
            return func(self._zeroed(args[0]), *args[1:])
        if func is aten.nll_loss_forward.default or func is aten.nll_loss_backward.default:
            return self._nll_loss(func, args)
        if func in _PRODUCTS:
            return self._product(func, args, kwargs)
        if func in _REDUCTIONS:
            return self._reduce(func, args, kwargs)
        if func is aten.gather.default and self.rows_of(args[0]) is None:
            return self._mark(func(*args, **kwargs), [(args[2], 0)])
        if func is aten.scatter_add.default and self.rows_of(args[0]) is None:
            return func(*args[:3], self._zeroed(args[3]))
        if func in _ALONG_DIM:
            return self._along_dim(func, args, kwargs)
        if func is aten.alias.default or func is aten.detach.default:
            return self._same(func(*args), args[0])
        if func in _LIKE:
            return self._mark(func(*args, **kwargs), [(args[0], 0)])
        if (func.is_view and func is not aten.as_strided.default) or func is aten._unsafe_view.default:
            return self._view(func, args, kwargs)
        if torch.Tag.pointwise in func.tags or func in (aten.where.self, aten.copy_.default):
            return self._pointwise(func, args, kwargs)
        return refuse(str(func))

    def has_rule(self, func: Any) -> bool:
        """Whether `call` knows an operator itself; others are to be taken apart."""
        return func not in _TAKEN_APART or torch.Tag.pointwise in func.tags or func.is_view or func in _KNOWN

    # ---- selecting

    def _nonzero(self, mask: torch.Tensor) -> torch.Tensor:
        if self.rows_of(mask) is not None:
            refuse("a mask of rows that another mask selects")
        flat = mask.reshape(-1) != 0
        if self._body is not None:
            flat = flat & self._body.condition
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
        self.mark(result, rows)
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
            if (rows := self.rows_of(indices[number])) is not None:
                found.append((rows, start + rows.dim + num_index_dims - indices[number].dim()))
        if (rows := self.rows_of(value)) is not None:
            if rows.dim in named:
                refuse("indexing by rows")
            before = sum(number < rows.dim for number in named)
            behind = num_index_dims if not adjacent or named[0] < rows.dim else 0
            found.append((rows, rows.dim - before + behind))
        return self._agree(result, found)

    def _without_masks(self, indices: Any) -> list[torch.Tensor | None]:
        """Replaces masks among indices by the positions that they select."""
        result: list[torch.Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                if self._body is None and (known := self._positions_of(index)) is not None:
                    result.extend(known.unbind(1))
                    continue
                positions = self._nonzero(index)
                rows = self.rows_of(positions)
                assert rows is not None
                for column in positions.unbind(1):
                    self.mark(column, replace(rows, mask=None, positions=None))
                    result.append(column)
            else:
                result.append(index)
        return result

    def _index_select(self, value: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        dim %= max(1, value.dim())
        result = aten.index_select.default(value, dim, index)
        found = [(rows, dim)] if (rows := self.rows_of(index)) is not None else []
        if (rows := self.rows_of(value)) is not None:
            if rows.dim == dim:
                refuse("indexing by rows")
            found.append((rows, rows.dim))
        return self._agree(result, found)

    # ---- writing

    def _index_put(
        self, func: Any, target: torch.Tensor, indices: Any, values: torch.Tensor, accumulate: bool = False, *_: Any
    ) -> torch.Tensor:
        if self.rows_of(target) is not None:
            refuse(str(func))
        indices = self._without_masks(indices)
        ragged = [index for index in indices if index is not None and self.rows_of(index) is not None]
        rows = self.rows_of(ragged[0]) if ragged else None
        if rows is None and self.rows_of(values) is None:  # all positions are known
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
                self.rows_of(values) is None
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
        rows = self.rows_of(index) or self.rows_of(source)
        if rows is None or self.rows_of(target) is not None or source.shape[dim] != rows.size:
            refuse(str(func))
        source = torch.where(rows.valid(source.dim(), dim % source.dim()), source, 0)
        return func(target, dim, index, source, **kwargs)

    # ---- computing

    def _zeroed(self, value: torch.Tensor) -> torch.Tensor:
        """Returns a ragged tensor with zeros in the rows that mean nothing."""
        rows = self.rows_of(value)
        return value if rows is None else torch.where(rows.valid(value.dim()), value, 0)

    def _pointwise(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        num_dims = max(tensor.dim() for tensor in tensors)
        found = [
            (rows, rows.dim + num_dims - tensor.dim())
            for tensor in tensors
            if (rows := self.rows_of(tensor)) is not None
        ]
        if func._schema.is_mutable and self.rows_of(args[0]) is None:
            refuse(str(func))
        return self._agree(func(*args, **kwargs), found)

    def _product(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        *bias, left, right = args
        if bias and self.rows_of(bias[0]) is not None:
            refuse(str(func))
        found: list[tuple[Rows, int]] = []
        last = left.dim() - 1
        of_left, of_right = self.rows_of(left), self.rows_of(right)
        if (of_left is not None and of_left.dim == last) or (of_right is not None and of_right.dim == last - 1):
            left = self._zeroed(left) if of_left is not None and of_left.dim == last else left
            right = self._zeroed(right) if of_right is not None and of_right.dim == last - 1 else right
        if of_left is not None and of_left.dim != last:
            found.append((of_left, of_left.dim))
        if of_right is not None and of_right.dim != last - 1:
            found.append((of_right, of_right.dim))
        return self._agree(func(*bias, left, right, **kwargs), found)

    def _reduce(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = args[0]
        rows = self.rows_of(value)
        assert rows is not None
        dims = args[1] if len(args) > 1 and func is not aten.sum.default else None
        dims = [dims] if isinstance(dims, int) else dims
        over = {dim % value.dim() for dim in dims} if dims else set(range(value.dim()))
        if rows.dim in over:
            if func not in _SUMS:
                refuse(str(func))
            return func(self._zeroed(value), *args[1:], **kwargs)
        keepdim = kwargs.get("keepdim", len(args) > 2 and args[2])
        dim = rows.dim if keepdim else rows.dim - sum(other < rows.dim for other in over)
        return self._agree(func(*args, **kwargs), [(rows, dim)])

    def _along_dim(self, func: Any, args: Any, kwargs: Any) -> Any:
        position = _ALONG_DIM[func]
        dim = args[position] if len(args) > position else kwargs.get("dim", 0 if func in _OF_FIRST_DIM else -1)
        tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        found = [(rows, rows.dim) for tensor in tensors if (rows := self.rows_of(tensor)) is not None]
        if any(place == dim % tensors[0].dim() for _, place in found):
            refuse(str(func))
        return self._agree(func(*args, **kwargs), found)

    def _nll_loss(self, func: Any, args: Any) -> Any:
        backward = func is aten.nll_loss_backward.default
        args = list(args)
        value, target, ignored = (1, 2, 5) if backward else (0, 1, 4)
        rows = self.rows_of(args[value]) or self.rows_of(args[target])
        if rows is None or args[value].dim() != 2:
            refuse(str(func))
        args[target] = torch.where(rows.valid(1), args[target], args[ignored])
        result = func(*args)
        if backward:
            self._agree(result, [(rows, 0)])
        elif args[3] == 0:  # a loss for each row
            self._agree(result[0], [(rows, 0)])
        return result

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Views: where the ragged dimension goes shows in the strides that they give to a tensor that has no other."""
        value = args[0]
        rows = self.rows_of(value)
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
            self.mark(result, replace(rows, dim=dims[0], positions=kept if isinstance(kept, torch.Tensor) else None))
        return results

    # ---- bookkeeping

    def _same(self, result: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Makes a result that is the value itself ragged as that."""
        rows = self.rows_of(value)
        assert rows is not None
        self.mark(result, rows)
        return result

    def _mark(self, result: Any, sources: list[tuple[torch.Tensor, int]]) -> Any:
        found = [(rows, rows.dim + moved) for tensor, moved in sources if (rows := self.rows_of(tensor)) is not None]
        return self._agree(result, found)

    def _agree(self, result: Any, found: list[tuple[Rows, int]]) -> Any:
        """Makes results ragged as what they were computed from, if that is ragged in one way."""
        if len({(dim, rows.size, id(rows.inside)) for rows, dim in found}) > 1:
            refuse("an operator on rows that two masks select")
        if found:
            [(rows, dim), *_] = found
            for tensor in pytree.tree_leaves(result):
                self.mark(tensor, replace(rows, dim=dim, mask=None, positions=None))
        return result

    def mark(self, tensor: torch.Tensor, rows: Rows) -> None:
        """Makes a tensor ragged."""
        node = self.node_of(tensor)
        assert node is not None
        self._rows[node] = rows

    def forget(self, tensor: torch.Tensor) -> None:
        """Makes a tensor one whose rows all mean something."""
        self._rows.pop(self.node_of(tensor), None)  # type: ignore[arg-type]

    def follow(self, old: torch.fx.Node, new: torch.fx.Node) -> None:
        """A tensor that was written to is ragged as before."""
        if old in self._rows:
            self._rows.setdefault(new, self._rows[old])

    # ---- loops over rows

    def iterate(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """Iterates over the rows of what `nonzero` found, for every position; see the module's docstring."""
        rows = self.rows_of(tensor)
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
        """Refuses what is not the same in a loop body that runs for all positions.

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
            by_rows = (func in _INDEX_ADDS or func in _INDEXED_WRITES) and self.concerns(func, args, kwargs)
            if not by_rows and not _has_mask(func, args):
                refuse(f"{func}, which writes to a tensor from within a loop over rows,")

    def check_results(self, results: Sequence[torch.Tensor]) -> None:
        """Refuses what a trace may not end with.

        Raises:
            DataDependentError: a result is ragged, or a loop ended early.
        """
        if self._left_early:
            refuse("a loop over rows that ends early")
        if any(self.rows_of(tensor) is not None for tensor in results):
            refuse("a result")

    def note_result(self, func: Any, result: Any) -> None:
        """Remembers what a loop body made."""
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


def _has_mask(func: Any, args: Any) -> bool:
    if func not in (aten.index.Tensor, aten._unsafe_index.Tensor) and func not in _INDEXED_WRITES:
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


_KNOWN = {
    *_LIKE,
    *_ALONG_DIM,
    *_REDUCTIONS,
    *_PRODUCTS,
    *_INDEXED_WRITES,
    *_INDEX_ADDS,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.alias.default,
    aten.detach.default,
    aten.gather.default,
    aten.scatter_add.default,
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_select.default,
    aten.embedding.default,
    aten.embedding_dense_backward.default,
    aten.nll_loss_forward.default,
    aten.nll_loss_backward.default,
    aten._unsafe_view.default,
    aten.where.self,
    aten.copy_.default,
}


class RowsInPython(TorchFunctionMode):
    """What Python asks a ragged tensor itself: its size, and to be iterated over."""

    def __init__(self, ragged: RaggedRows) -> None:
        super().__init__()
        self._ragged = ragged

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MEANS and (rows := self._ragged.rows_of(args[0])) is not None:
            return _mean(rows, *args, **kwargs)
        if func in _LOSSES and any(self._ragged.rows_of(value) is not None for value in args[:2]):
            return self._loss(func, args, kwargs)
        rows = self._ragged.rows_of(args[0]) if func in _ASKED_BY_PYTHON else None
        if rows is None:
            if self._ragged.is_used and func not in _TAKE_SIZES and _holds_count((args, kwargs)):
                refuse(f"{getattr(func, '__name__', func)} of a number of rows")
            return func(*args, **kwargs)
        if func is torch.Tensor.unbind:  # which a loop over a tensor calls
            if rows.dim != (args[1] if len(args) > 1 else kwargs.get("dim", 0)):
                return func(*args, **kwargs)
            return self._ragged.iterate(args[0])
        if func is torch.Tensor.__len__ and rows.dim == 0:
            refuse("len()")
        result = func(*args, **kwargs)
        shape = RaggedSize(
            RowCount.of(size, rows.read_count) if dim == rows.dim else size for dim, size in enumerate(args[0].shape)
        )
        if func in (torch.Tensor.numel, torch.Tensor.nelement):
            return shape.numel()
        if isinstance(result, torch.Size):
            return shape
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return result if dim is None else shape[dim]

    def _loss(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """Computes a loss of each element, and their mean by itself: backward divides by the number of all rows."""
        call = inspect.signature(func).bind(*args, **kwargs)
        call.apply_defaults()
        if call.arguments["reduction"] != "mean" or {
            call.arguments.get("reduce"),
            call.arguments.get("size_average"),
        } != {None}:
            return func(*args, **kwargs)
        call.arguments["reduction"] = "none"
        losses: torch.Tensor = func(*call.args, **call.kwargs)
        rows = self._ragged.rows_of(losses)
        return losses.mean() if rows is None else _mean(rows, losses)


def _mean(
    rows: Rows,
    value: torch.Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Returns a mean of as many rows as there are; PyTorch's own would divide by the number of all."""
    dims = list(range(value.dim())) if dim is None or dim == () else [dim] if isinstance(dim, int) else list(dim)
    dims = [item % value.dim() for item in dims]
    if rows.dim not in dims:
        return torch.mean(value, dims, keepdim, dtype=dtype)
    others = math.prod(size for place, size in enumerate(value.shape) if place in dims and place != rows.dim)
    total = torch.sum(value, dims, keepdim, dtype=dtype)
    return total / (rows.count * others).to(total.dtype)


def _holds_count(tree: Any) -> bool:
    return any(type(leaf) is RowCount for leaf in pytree.tree_leaves(tree))


_MEANS = {torch.mean, torch.Tensor.mean}
#: Losses whose mean PyTorch computes where no rule sees it.
_LOSSES = {
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
}
#: They put the rows of a ragged tensor into another form; all else would take their number for a value.
_TAKE_SIZES = {torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.expand, torch.reshape}
_ASKED_BY_PYTHON = {
    torch.Tensor.unbind,
    torch.Tensor.__len__,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.size,
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
}
