"""Complex numbers as pairs of real ones: torch-xla lowers few operators on complex tensors.

Rotary embeddings multiply by complex numbers, and Fourier transforms make them. In a pure graph each complex value
becomes two real ones; transforms become products with matrices of cosines and sines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Pair:
    """The real and imaginary parts of a complex tensor, or of a number."""

    real: Any
    imag: Any


def can_be_pairs(graph: torch.fx.Graph) -> bool:
    """Whether a graph computes with complex numbers, and has a rule for all that it does with them."""
    concerned = [node for node in graph.nodes if _is_complex(node) or any(map(_is_complex, node.all_input_nodes))]
    return bool(concerned) and all(map(has_rule, concerned))


def _is_complex(node: torch.fx.Node) -> bool:
    return any(
        isinstance(value, torch.Tensor) and value.is_complex() for value in pytree.tree_leaves(node.meta.get("val"))
    )


def has_rule(node: torch.fx.Node) -> bool:
    """Whether a node takes or gives complex numbers, and can do so in pairs."""
    concerns = _is_complex(node) or any(map(_is_complex, node.all_input_nodes))
    target: Any = node.target
    return concerns and node.op == "call_function" and (target in _RULES or target in _APART or _is_view(target))


def _is_view(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.is_view


def call_on_pairs(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operator that has a rule, where complex arguments are pairs."""
    rule = _RULES.get(func)
    return rule(*args, **kwargs) if rule is not None else _apart(func, args, kwargs)


def _pair(value: Any) -> Pair:
    """Returns a pair for a number or any tensor."""
    if isinstance(value, Pair):
        return value
    if isinstance(value, torch.Tensor):
        return Pair(value, torch.zeros_like(value))
    return Pair(value.real, value.imag)


def _real_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    return dtype.to_real() if dtype is not None and dtype.is_complex else dtype


def _apart(func: Any, args: Any, kwargs: Any) -> Any:
    """Calls an operator that does the same to both parts; real arguments go to both calls."""
    kwargs = {name: _real_dtype(value) if name == "dtype" else value for name, value in kwargs.items()}

    def part(choose: Callable[[Pair], Any]) -> Any:
        mine = pytree.tree_map(lambda leaf: choose(leaf) if isinstance(leaf, Pair) else leaf, (args, kwargs))
        return func(*mine[0], **mine[1])

    real, imag = part(lambda pair: pair.real), part(lambda pair: pair.imag)
    return pytree.tree_map(Pair, real, imag)


def _join(func: Any) -> Callable[..., Any]:
    """Of an operator that treats parts alike but takes real tensors along with complex ones."""

    def rule(*args: Any, **kwargs: Any) -> Any:
        args = tuple(
            [_pair(item) for item in value]
            if isinstance(value, (list, tuple)) and any(isinstance(item, Pair) for item in value)
            else value
            for value in args
        )
        return _apart(func, args, kwargs)

    return rule


def _add(left: Any, right: Any, *, alpha: Any = 1) -> Pair:
    left, right = _pair(left), _mul(right, alpha) if alpha != 1 else _pair(right)
    return Pair(left.real + right.real, left.imag + right.imag)


def _sub(left: Any, right: Any, *, alpha: Any = 1) -> Pair:
    return _add(left, _neg(_mul(right, alpha) if alpha != 1 else _pair(right)))


def _neg(value: Pair) -> Pair:
    return Pair(-value.real, -value.imag)


def _mul(left: Any, right: Any) -> Pair:
    left, right = (right, left) if not isinstance(left, Pair) else (left, right)
    if not isinstance(left, Pair):
        left = _pair(left)
    if not isinstance(right, (Pair, complex)):
        return Pair(left.real * right, left.imag * right)
    right = _pair(right)
    return Pair(
        left.real * right.real - left.imag * right.imag,
        left.real * right.imag + left.imag * right.real,
    )


def _div(left: Any, right: Any) -> Pair:
    if not isinstance(right, (Pair, complex)):
        return Pair(left.real / right, left.imag / right)
    return _mul(left, _reciprocal(_pair(right)))


def _reciprocal(value: Pair) -> Pair:
    square = value.real * value.real + value.imag * value.imag
    return Pair(value.real / square, -value.imag / square)


def _conj(value: Pair) -> Pair:
    return Pair(value.real, -value.imag)


def _abs(value: Pair) -> torch.Tensor:
    return torch.sqrt(value.real * value.real + value.imag * value.imag)


def _sgn(value: Pair) -> Pair:
    size = _abs(value)
    safe = torch.where(size == 0, 1.0, size)
    return Pair(value.real / safe, value.imag / safe)


def _exp(value: Pair) -> Pair:
    size = torch.exp(value.real)
    return Pair(size * torch.cos(value.imag), size * torch.sin(value.imag))


def _matrix_product(func: Any) -> Callable[..., Pair]:
    def rule(left: Any, right: Any) -> Pair:
        if not isinstance(right, Pair):
            return Pair(func(left.real, right), func(left.imag, right))
        if not isinstance(left, Pair):
            return Pair(func(left, right.real), func(left, right.imag))
        return Pair(
            func(left.real, right.real) - func(left.imag, right.imag),
            func(left.real, right.imag) + func(left.imag, right.real),
        )

    return rule


def _to_copy(value: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    if dtype is not None and not dtype.is_complex:
        return value.real.to(dtype) if isinstance(value, Pair) else value.to(dtype)
    pair, part = _pair(value), _real_dtype(dtype)
    return pair if part is None else Pair(pair.real.to(part), pair.imag.to(part))


def _constant(make: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """Of an operator that makes a tensor of zeros, or of one number, like another or from a size."""

    def rule(like: Any, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        source = like.real if isinstance(like, Pair) else like
        if dtype is not None and not dtype.is_complex:
            return make(source, *args, dtype=dtype, **kwargs)
        if dtype is None and not isinstance(like, Pair):
            return make(source, *args, **kwargs)
        parts = []
        for part in ("real", "imag"):
            found = [getattr(item, part) if isinstance(item, complex) else item for item in (source, *args)]
            parts.append(make(*found, dtype=_real_dtype(dtype), **kwargs))
        has_number = any(isinstance(item, complex) for item in (source, *args))
        return Pair(parts[0], parts[1] if has_number else torch.zeros_like(parts[0]))

    return rule


def _eq(left: Any, right: Any) -> torch.Tensor:
    left, right = _pair(left), _pair(right)
    return (left.real == right.real) & (left.imag == right.imag)


def _where(condition: torch.Tensor, value: Any, other: Any) -> Pair:
    value, other = _pair(value), _pair(other)
    return Pair(torch.where(condition, value.real, other.real), torch.where(condition, value.imag, other.imag))


# ---- Fourier transforms


def _waves(size: int, num_frequencies: int, sign: int, like: torch.Tensor) -> Pair:
    """Returns exp(sign * 2 pi i n k / size) for positions n (rows) and frequencies k (columns)."""
    turns = torch.outer(torch.arange(size), torch.arange(num_frequencies)) % size
    angle = turns.to(torch.float64) * (sign * 2.0 * math.pi / size)
    return Pair(torch.cos(angle).to(like.dtype), torch.sin(angle).to(like.dtype))


def _scale(value: Any, sizes: Sequence[int], normalization: int) -> Any:
    """Divides by the number of elements (2), by its root (1) or not at all (0)."""
    number = math.prod(sizes)
    factor = {0: 1.0, 1: 1.0 / math.sqrt(number), 2: 1.0 / number}[normalization]
    if factor == 1.0:
        return value
    return _mul(value, factor) if isinstance(value, Pair) else value * factor


def _product_along(value: torch.Tensor, dim: int, matrix: torch.Tensor) -> torch.Tensor:
    return (value.movedim(dim, -1) @ matrix).movedim(-1, dim)


def _fft_c2c(value: Any, dims: Sequence[int], normalization: int, forward: bool) -> Pair:
    value = _pair(value)
    sizes = [value.real.shape[dim] for dim in dims]
    for dim, size in zip(dims, sizes, strict=True):
        waves = _waves(size, size, -1 if forward else 1, value.real)
        cosine, sine = (
            Pair(_product_along(value.real, dim, wave), _product_along(value.imag, dim, wave))
            for wave in (waves.real, waves.imag)
        )
        value = Pair(cosine.real - sine.imag, cosine.imag + sine.real)
    return _scale(value, sizes, normalization)


def _fft_r2c(value: torch.Tensor, dims: Sequence[int], normalization: int, onesided: bool) -> Pair:
    *others, last = dims
    sizes = [value.shape[dim] for dim in dims]
    waves = _waves(sizes[-1], sizes[-1] // 2 + 1 if onesided else sizes[-1], -1, value)
    pair = Pair(_product_along(value, last, waves.real), _product_along(value, last, waves.imag))
    return _scale(_fft_c2c(pair, others, 0, True), sizes, normalization)


def _fft_c2r(value: Any, dims: Sequence[int], normalization: int, last_size: int) -> torch.Tensor:
    """The other half of the frequencies is the conjugate of this one: both together are twice the real part."""
    *others, last = dims
    value = _fft_c2c(value, others, 0, False)
    num_frequencies = last_size // 2 + 1
    value = _apart(aten.slice.Tensor, (value, last, 0, num_frequencies), {})
    frequencies = torch.arange(num_frequencies)
    counts = torch.where((frequencies == 0) | (2 * frequencies == last_size), 1.0, 2.0).to(value.real.dtype)
    waves = _waves(last_size, num_frequencies, 1, value.real)
    result = _product_along(value.real, last, (waves.real * counts).T)
    result = result - _product_along(value.imag, last, (waves.imag * counts).T)
    sizes = [*(value.real.shape[dim] for dim in others), last_size]
    return _scale(result, sizes, normalization)


#: Both parts alike, and all arguments that are tensors of numbers are complex.
_APART = {
    aten.clone.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.flip.default,
    aten.roll.default,
    aten.repeat.default,
    aten.constant_pad_nd.default,
    aten._unsafe_view.default,
    aten.embedding.default,
}

_RULES: dict[Any, Callable[..., Any]] = {
    aten.view_as_complex.default: lambda value: Pair(value.select(-1, 0), value.select(-1, 1)),
    aten.view_as_complex_copy.default: lambda value: Pair(value.select(-1, 0), value.select(-1, 1)),
    aten.view_as_real.default: lambda value: torch.stack([value.real, value.imag], -1),
    aten.view_as_real_copy.default: lambda value: torch.stack([value.real, value.imag], -1),
    aten.complex.default: Pair,
    aten.polar.default: lambda size, angle: Pair(size * torch.cos(angle), size * torch.sin(angle)),
    aten.real.default: lambda value: value.real,
    aten.imag.default: lambda value: value.imag,
    aten._conj.default: _conj,
    aten._conj_copy.default: _conj,
    aten._conj_physical.default: _conj,
    aten.conj_physical.default: _conj,
    aten.resolve_conj.default: lambda value: value,
    aten.resolve_neg.default: lambda value: value,
    aten.add.Tensor: _add,
    aten.add.Scalar: _add,
    aten.sub.Tensor: _sub,
    aten.sub.Scalar: _sub,
    aten.neg.default: _neg,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.reciprocal.default: _reciprocal,
    aten.abs.default: _abs,
    aten.angle.default: lambda value: torch.atan2(value.imag, value.real),
    aten.sgn.default: _sgn,
    aten.exp.default: _exp,
    aten.mm.default: _matrix_product(aten.mm.default),
    aten.bmm.default: _matrix_product(aten.bmm.default),
    aten._to_copy.default: _to_copy,
    aten.zeros_like.default: _constant(torch.zeros_like),
    aten.ones_like.default: _constant(torch.ones_like),
    aten.full_like.default: _constant(torch.full_like),
    aten.zeros.default: _constant(torch.zeros),
    aten.ones.default: _constant(torch.ones),
    aten.full.default: _constant(torch.full),
    aten.new_zeros.default: _constant(lambda like, *args, **kwargs: like.new_zeros(*args, **kwargs)),
    aten.scalar_tensor.default: _constant(torch.scalar_tensor),
    aten.eq.Scalar: _eq,
    aten.eq.Tensor: _eq,
    aten.ne.Scalar: lambda left, right: ~_eq(left, right),
    aten.ne.Tensor: lambda left, right: ~_eq(left, right),
    aten.where.self: _where,
    aten.cat.default: _join(aten.cat.default),
    aten.stack.default: _join(aten.stack.default),
    aten.slice_scatter.default: lambda value, source, *rest, **kwargs: _apart(
        aten.slice_scatter.default, (_pair(value), _pair(source), *rest), kwargs
    ),
    aten.select_scatter.default: lambda value, source, *rest, **kwargs: _apart(
        aten.select_scatter.default, (_pair(value), _pair(source), *rest), kwargs
    ),
    aten.index_put.default: lambda value, indices, source, *rest: _apart(
        aten.index_put.default, (_pair(value), indices, _pair(source), *rest), {}
    ),
    aten._fft_c2c.default: _fft_c2c,
    aten._fft_r2c.default: _fft_r2c,
    aten._fft_c2r.default: _fft_c2r,
}
