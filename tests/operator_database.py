"""PyTorch's database of operators with samples, and how a sample runs through torchways and in eager PyTorch."""

from __future__ import annotations

import copy
import enum
import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch.distributed.tensor import Replicate, Shard
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode

import torchways as tw
from torchways.errors import UserError

#: Samples that are run of an operator and dtype; they are spread over all that the database has.
NUM_SAMPLES = 5

#: Longest wait for the results of one sample.
PATIENCE = timedelta(seconds=30)

#: What they return is uninitialized: only shapes and dtypes are compared.
_UNINITIALIZED = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}

#: They return values, and a position of each: of several equal ones, PyTorch does not say which.
_FIND_ANY_OF_EQUALS = {"kthvalue", "topk", "median", "nanmedian", "mode", "msort", "sort"}

#: A refusal says where, or at least what.
_LINE_OR_OPERATOR = re.compile(r"\S+\.py:\d+ in |aten(::|\.)\w|prims(::|\.)\w|argument \d")


class Outcome(enum.Enum):
    """What became of the samples of a case, none of which differs from eager PyTorch."""

    AGREES = "agrees"
    REFUSED = "refused"


@dataclass(frozen=True)
class Case:
    """One operator of the database and one dtype; `gradients`: of its arguments, within a program."""

    op: Any
    dtype: torch.dtype
    gradients: bool = False

    @property
    def operator(self) -> str:
        """The operator's name, with that of the kind of samples where there are several."""
        return ".".join(filter(None, [self.op.name, self.op.variant_test_name]))

    def __str__(self) -> str:
        kind = "gradient" if self.gradients else str(self.dtype).removeprefix("torch.")
        return f"{self.operator}-{kind}"

    def samples(self) -> Iterator[Any]:
        """Yields samples; the same in each run."""
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        samples = list(self.op.sample_inputs("cpu", self.dtype))
        yield from itertools.islice(samples, 0, None, -(-len(samples) // NUM_SAMPLES) or 1)


def cases() -> list[Case]:
    """Returns all cases: float32 and int64 where the operator supports them, and gradients of float32."""
    found = [Case(op, dtype) for op in op_db for dtype in (torch.float32, torch.int64) if _supports(op, dtype)]
    return found + [Case(op, torch.float32, gradients=True) for op in op_db if _has_gradients(op)]


def _supports(op: Any, dtype: torch.dtype) -> bool:
    return dtype in op.supported_dtypes("cpu")


def _has_gradients(op: Any) -> bool:
    return (
        op.supports_autograd and torch.float32 in op.supported_backward_dtypes("cpu") and _supports(op, torch.float32)
    )


def check(case: Case, mesh: Any) -> Outcome:
    """Runs a case's samples on `mesh` and in eager PyTorch, and compares.

    Returns:
        REFUSED where any sample is.

    Raises:
        AssertionError: results differ, or a refusal says neither where nor what.
    """
    run = _check_gradients if case.gradients else _check_results
    outcomes = {run(case, sample, mesh) for sample in case.samples()}
    return Outcome.REFUSED if Outcome.REFUSED in outcomes else Outcome.AGREES


def _check_results(case: Case, sample: Any, mesh: Any) -> Outcome:
    def call(*args: Any, **kwargs: Any) -> Any:
        return _definite(case, sample, case.op.op(*args, **kwargs))

    with torch.no_grad():
        return _compare(case, call, tw.function(call, mesh=mesh), sample, mesh)


def _definite(case: Case, sample: Any, result: Any) -> Any:
    """Returns what correct results have in common: not signs of vectors, nor which of equal elements is found."""
    if case.op.name in _FIND_ANY_OF_EQUALS and isinstance(result, tuple):
        return result[0]
    return sample.output_process_fn_grad(result) if case.op.name.startswith(("linalg.", "svd")) else result


def _check_gradients(case: Case, sample: Any, mesh: Any) -> Outcome:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return sample.output_process_fn_grad(case.op.gradcheck_wrapper(case.op.op, *args, **kwargs))

    def gradients_by(forward: Callable[..., Any]) -> Callable[..., Any]:
        def gradients(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = pytree.tree_map_only(torch.Tensor, _leaf, (args, kwargs))
            leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _needs_gradient(leaf)]
            everything = forward(*args, **kwargs)
            results = [leaf for leaf in pytree.tree_leaves(everything) if _needs_gradient(leaf)]
            if not results or not leaves:
                return everything
            loss = sum((result * _weights(result)).sum() for result in results)
            return torch.autograd.grad(loss, leaves, allow_unused=True)

        return gradients

    ours = tw.program(gradients_by(tw.function(forward, mesh=mesh)), mesh=mesh)
    return _compare(case, gradients_by(forward), ours, sample, mesh)


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def _needs_gradient(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def _weights(result: torch.Tensor) -> torch.Tensor:
    """Returns a factor for each element, so that no error of a gradient is lost in a sum."""
    return (torch.arange(result.numel(), dtype=result.dtype) % 7 + 1).reshape(result.shape)


def _compare(case: Case, eager: Callable[..., Any], ours: Callable[..., Any], sample: Any, mesh: Any) -> Outcome:
    arguments = (sample.input, *sample.args), sample.kwargs
    random_numbers = _RandomNumbers()
    with random_numbers:
        try:
            args, kwargs = copy.deepcopy(arguments)
            expected = eager(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError):
            return Outcome.AGREES  # there is nothing to agree with
    only_shapes = case.op.name in _UNINITIALIZED or random_numbers.are_drawn
    args, kwargs = copy.deepcopy(arguments)
    refusal = None
    try:
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: _split(tensor, mesh), (args, kwargs))
        result = tw.get(ours(*args, **kwargs), timeout=PATIENCE)
    except UserError as error:
        refusal = str(error)
    if refusal is not None:
        assert "cannot be captured: " not in refusal, f"an error of somebody else's: {refusal}"
        assert _LINE_OR_OPERATOR.search(refusal), f"it is refused with no line or operator: {refusal}"
        return Outcome.REFUSED
    expected, result = pytree.tree_leaves(expected), pytree.tree_leaves(result)
    assert len(result) == len(expected)
    for index, (actual, wanted) in enumerate(zip(result, expected, strict=True)):
        if not isinstance(wanted, torch.Tensor):
            assert actual == wanted or actual is wanted
        elif only_shapes:
            assert (actual.shape, actual.dtype) == (wanted.shape, wanted.dtype)
        else:
            tolerance = {"rtol": 1e-4, "atol": 1e-4 if case.gradients else 1e-5, "equal_nan": True}
            try:
                torch.testing.assert_close(actual, wanted, **tolerance)
            except AssertionError:
                if wanted.dtype != torch.float32 or not wanted.isfinite().all():
                    raise
                args, kwargs = pytree.tree_map_only(torch.Tensor, _double, arguments)
                exact = pytree.tree_leaves(eager(*args, **kwargs))[index]
                assert (actual.shape, actual.dtype) == (wanted.shape, wanted.dtype)
                assert (actual - exact).abs().max() <= 2 * (wanted - exact).abs().max()  # eager is no nearer either
    return Outcome.AGREES


def _double(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def _split(tensor: torch.Tensor, mesh: Any) -> torch.Tensor:
    """Splits a tensor over several devices, along its first dimension that allows it."""
    if mesh.size() == 1:
        return tensor
    dims = [dim for dim, size in enumerate(tensor.shape) if size and size % mesh.size() == 0]
    return tw.distribute_tensor(tensor, mesh, [Shard(dims[0]) if dims else Replicate()])


class _RandomNumbers(TorchDispatchMode):
    """Sees whether any are drawn."""

    are_drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.are_drawn |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))
