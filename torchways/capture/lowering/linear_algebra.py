"""Decompositions of linear algebra into what XLA has: Cholesky, QR, SVD, eigenvalues of symmetric matrices, triangles.

XLA on CPU has no LU decomposition. It is written out column by column, so only for matrices of moderate size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchways.capture.source import user_line
from torchways.errors import CaptureError
from torchways.operators import QR, SVD

aten = torch.ops.aten

#: Columns of a matrix whose LU decomposition is written out: some twenty operators each, seconds to compile.
_MAX_LU_COLUMNS = 64


def _info(value: torch.Tensor) -> torch.Tensor:
    """Returns LAPACK's code for success for each matrix."""
    return value.new_zeros(value.shape[:-2], dtype=torch.int32)


def _cholesky_ex(value: torch.Tensor, *, upper: bool = False, check_errors: bool = False) -> Any:
    """A matrix that is not positive definite has a factor of NaNs."""
    factor = aten.cholesky(value, upper)
    is_bad = factor.diagonal(dim1=-2, dim2=-1).isnan()
    return factor, is_bad.any(-1).to(torch.int32) if value.shape[-1] else _info(value)


def _solve_triangular(
    triangle: torch.Tensor, right: torch.Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> torch.Tensor:
    if not left:
        turned = _solve_triangular(triangle.mT, right.mT, upper=not upper, unitriangular=unitriangular)
        return turned.mT
    batch = torch.broadcast_shapes(triangle.shape[:-2], right.shape[:-2])
    triangle, right = triangle.expand(*batch, *triangle.shape[-2:]), right.expand(*batch, *right.shape[-2:])
    return aten.triangular_solve(right, triangle, upper, False, unitriangular)[0]


def _cholesky_solve(right: torch.Tensor, factor: torch.Tensor, upper: bool = False) -> torch.Tensor:
    lower = factor.mT if upper else factor
    return _solve_triangular(lower.mT, _solve_triangular(lower, right, upper=False), upper=True)


def _cholesky_inverse(factor: torch.Tensor, upper: bool = False) -> torch.Tensor:
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype).expand(factor.shape)
    return _cholesky_solve(identity, factor, upper)


def _qr(value: torch.Tensor, mode: str = "reduced") -> Any:
    q, r = QR(value, mode != "complete")
    return (value.new_empty(0), r) if mode == "r" else (q, r)


def _inverse_ex(value: torch.Tensor, *, check_errors: bool = False) -> Any:
    q, r = QR(value, True)
    return _solve_triangular(r, q.mT, upper=True), _info(value)


def _svd(value: torch.Tensor, full_matrices: bool = False, compute_uv: bool = True, *, driver: Any = None) -> Any:
    u, singular_values, v = SVD(value, full_matrices)
    if not compute_uv:
        return value.new_empty(0), singular_values, value.new_empty(0)
    return u, singular_values, v.mT


def _pinv(
    value: torch.Tensor,
    *,
    atol: torch.Tensor | None = None,
    rtol: torch.Tensor | None = None,
    hermitian: bool = False,
) -> torch.Tensor:
    if not value.numel():
        return value.new_empty(value.mT.shape)
    if hermitian:
        values, vectors = torch.linalg.eigh(value)
        left, right, size = vectors, vectors, values.abs()
    else:
        left, values, right = torch.linalg.svd(value, full_matrices=False)
        right, size = right.mT, values
    default = torch.finfo(value.dtype).eps * max(value.shape[-2:])
    bound = size.amax(-1, keepdim=True)
    if rtol is not None:
        bound = bound * rtol.unsqueeze(-1)
    elif atol is not None:
        bound = bound * torch.where(atol > 0, 0.0, default).unsqueeze(-1)
    else:
        bound = bound * default
    if atol is not None:
        bound = torch.maximum(bound, atol.unsqueeze(-1).to(bound.dtype))
    inverted = torch.where(size > bound, values.reciprocal(), 0.0)
    return (right * inverted.unsqueeze(-2)) @ left.mT


# ---- LU


def _lu_factor_ex(value: torch.Tensor, *, pivot: bool = True, check_errors: bool = False) -> Any:
    """Gaussian elimination with row exchanges, a column at a time."""
    num_rows, num_columns = value.shape[-2:]
    num_steps = min(num_rows, num_columns)
    if num_steps > _MAX_LU_COLUMNS:
        raise CaptureError(
            f"the LU decomposition of a matrix {num_rows} x {num_columns} at {user_line()} (solve, det, lu) is written "
            f"out column by column, for at most {_MAX_LU_COLUMNS}; torch.linalg.inv, qr and cholesky have no such limit"
        )
    rows, columns = torch.arange(num_rows), torch.arange(num_columns)
    pivots, info = [], _info(value)
    for step in range(num_steps):
        column = value[..., step]
        chosen = torch.full(column.shape[:-1], step)
        if pivot:
            chosen = torch.where(rows >= step, column.abs(), -1.0).argmax(-1)
        pivots.append(chosen.to(torch.int32) + 1)
        place = chosen.unsqueeze(-1).unsqueeze(-1).expand(*chosen.shape, 1, num_columns)
        top, other = value.gather(-2, place), value[..., step : step + 1, :]
        if pivot:
            value = torch.where((rows == chosen.unsqueeze(-1)).unsqueeze(-1), other, value)
            value = torch.where((rows == step).unsqueeze(-1), top, value)
        divisor = top[..., step : step + 1]
        is_zero = divisor == 0
        info = torch.where((info == 0) & is_zero[..., 0, 0], step + 1, info).to(torch.int32)
        factors = torch.where(is_zero | (rows <= step).unsqueeze(-1), 0.0, value[..., step : step + 1] / divisor)
        reduced = value - factors * torch.where(columns > step, top, 0.0)
        below = (rows > step).unsqueeze(-1) & (columns == step)
        value = torch.where(below, factors, reduced)
    if not pivots:
        return value, value.new_zeros(*value.shape[:-2], 0, dtype=torch.int32), info
    return value, torch.stack(pivots, -1), info


def _rows_after(pivots: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Returns which row stands where after the exchanges of an LU decomposition."""
    places = torch.arange(num_rows)
    order = places.expand(*pivots.shape[:-1], num_rows)
    for step in range(pivots.shape[-1]):
        chosen = pivots[..., step : step + 1].to(torch.int64) - 1
        there, here = order.gather(-1, chosen), order[..., step : step + 1]
        order = torch.where(places == chosen, here, order)
        order = torch.where(places == step, there, order)
    return order


def _take_rows(value: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    batch = torch.broadcast_shapes(value.shape[:-2], order.shape[:-1])
    value = value.expand(*batch, *value.shape[-2:])
    return value.gather(-2, order.expand(*batch, order.shape[-1]).unsqueeze(-1).expand(value.shape))


def _lu_unpack(lu: torch.Tensor, pivots: torch.Tensor, unpack_data: bool = True, unpack_pivots: bool = True) -> Any:
    num_rows, num_columns = lu.shape[-2:]
    size = min(num_rows, num_columns)
    permutation = lower = upper = lu.new_empty(0)
    if unpack_data:
        lower = lu[..., :size].tril(-1) + torch.eye(num_rows, size, dtype=lu.dtype)
        upper = lu[..., :size, :].triu()
    if unpack_pivots:
        order = _rows_after(pivots, num_rows)
        permutation = (torch.arange(num_rows).unsqueeze(-1) == order.unsqueeze(-2)).to(lu.dtype)
    return permutation, lower, upper


def _lu(value: torch.Tensor, *, pivot: bool = True) -> Any:
    lu, pivots, _ = _lu_factor_ex(value, pivot=pivot)
    permutation, lower, upper = _lu_unpack(lu, pivots, unpack_pivots=pivot)
    return permutation, lower, upper


def _lu_solve(
    lu: torch.Tensor, pivots: torch.Tensor, right: torch.Tensor, *, left: bool = True, adjoint: bool = False
) -> torch.Tensor:
    if not left:
        return _lu_solve(lu, pivots, right.mT, adjoint=not adjoint).mT
    order = _rows_after(pivots, lu.shape[-1])
    if adjoint:
        right = _solve_triangular(lu.mT, right, upper=False)
        right = _solve_triangular(lu.mT, right, upper=True, unitriangular=True)
        return _take_rows(right, order.argsort(-1))
    right = _solve_triangular(lu, _take_rows(right, order), upper=False, unitriangular=True)
    return _solve_triangular(lu, right, upper=True)


def _lu_of(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """Returns LU, pivots and info; of the transpose where a matrix is contiguous, as PyTorch's gradients expect it."""
    is_turned = value.is_contiguous()
    lu, pivots, info = _lu_factor_ex(value.mT if is_turned else value)
    return lu, pivots, info, is_turned


def _solve_ex(value: torch.Tensor, right: torch.Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    lu, pivots, info, is_turned = _lu_of(value)
    is_vector = right.dim() == 1 or (right.dim() == value.dim() - 1 and right.shape == value.shape[:-1])
    right = right.unsqueeze(-1) if is_vector else right
    result = _lu_solve(lu, pivots, right, left=left, adjoint=is_turned)
    return result.squeeze(-1) if is_vector else result, lu, pivots, info


def _sign_of(pivots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    exchanged = pivots != torch.arange(1, pivots.shape[-1] + 1, dtype=torch.int32)
    return 1 - 2 * (exchanged.sum(-1) % 2).to(dtype)


def _det(value: torch.Tensor) -> Any:
    lu, pivots, _, _ = _lu_of(value)
    return _sign_of(pivots, value.dtype) * lu.diagonal(dim1=-2, dim2=-1).prod(-1), lu, pivots


def _slogdet(value: torch.Tensor) -> Any:
    lu, pivots, _, _ = _lu_of(value)
    diagonal = lu.diagonal(dim1=-2, dim2=-1)
    sign = _sign_of(pivots, value.dtype) * diagonal.sign().prod(-1)
    return sign, diagonal.abs().log().sum(-1), lu, pivots


def linear_algebra_decompositions() -> dict[Any, Any]:
    """Returns decompositions of operators that torch-xla would run on the host, or computes otherwise than PyTorch."""
    return {
        aten.linalg_cholesky_ex.default: _cholesky_ex,
        aten.linalg_solve_triangular.default: _solve_triangular,
        aten.cholesky_solve.default: _cholesky_solve,
        aten.cholesky_inverse.default: _cholesky_inverse,
        aten.linalg_qr.default: _qr,
        **{operator: _of_real_numbers(operator, function) for operator, function in _OF_REAL_NUMBERS.items()},
    }


def _of_real_numbers(operator: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a decomposition that refuses complex matrices, of which it would compute something else."""

    def checked(value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if value.is_complex():
            raise CaptureError(
                f"{operator} of complex matrices has no lowering to XLA, at {user_line()}: compute it outside the "
                "program"
            )
        return function(value, *args, **kwargs)

    return checked


_OF_REAL_NUMBERS: dict[Any, Callable[..., Any]] = {
    aten.linalg_inv_ex.default: _inverse_ex,
    aten._linalg_svd.default: _svd,
    aten.linalg_pinv.atol_rtol_tensor: _pinv,
    aten.linalg_lu_factor_ex.default: _lu_factor_ex,
    aten.lu_unpack.default: _lu_unpack,
    aten.linalg_lu.default: _lu,
    aten.linalg_lu_solve.default: _lu_solve,
    aten._linalg_solve_ex.default: _solve_ex,
    aten._linalg_det.default: _det,
    aten._linalg_slogdet.default: _slogdet,
}
