"""The operators that have a rule of their own for rows of unknown number, by the kind of rule."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten

#: Results have the shape of the first argument, and its rows.
LIKE = {
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
ALONG_DIM = {
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
OF_FIRST_DIM = {aten.cat.default, aten.slice_scatter.default}
REDUCTIONS = {
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
SUMS = {aten.sum.dim_IntList, aten.sum.default}
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default}
INDEXED_WRITES = {
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
INDEX_ADDS = {aten.index_add.default, aten.index_add_.default}

#: All of these; operators that are neither here nor views nor elementwise are taken apart first.
KNOWN = {
    *LIKE,
    *ALONG_DIM,
    *REDUCTIONS,
    *PRODUCTS,
    *INDEXED_WRITES,
    *INDEX_ADDS,
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


def has_mask(func: Any, args: Any) -> bool:
    """Whether an operator reads or writes the rows that a mask selects."""
    if func not in (aten.index.Tensor, aten._unsafe_index.Tensor) and func not in INDEXED_WRITES:
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
