"""Control flow on the values of arrays: the controller reads the condition, and dispatches what follows from it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from torchways.capture.current_trace import current_trace
from torchways.capture.source import user_line
from torchways.controller.program import ProgramFunction
from torchways.controller.session import Session
from torchways.errors import DataDependentError, ShapeError
from torchways.mesh import VirtualSlice

#: The programs that were made of users' functions: they are traced once.
_programs: weakref.WeakKeyDictionary[Any, ProgramFunction] = weakref.WeakKeyDictionary()


def run_cond(
    predicate: Any,
    true_fn: Callable[..., Any],
    false_fn: Callable[..., Any],
    operands: Sequence[Any],
    mesh: VirtualSlice | None,
    get_session: Callable[[], Session],
) -> Any:
    """See `tw.cond`."""
    if isinstance(predicate, torch.Tensor):
        _refuse_in_trace("tw.cond")
        _check_scalar(predicate, "tw.cond")
    chosen = true_fn if bool(predicate) else false_fn
    return _program(chosen, mesh, get_session)(*operands)


def run_while_loop(
    cond_fn: Callable[..., Any],
    body_fn: Callable[..., Any],
    operands: Sequence[Any],
    mesh: VirtualSlice | None,
    get_session: Callable[[], Session],
) -> tuple[Any, ...]:
    """See `tw.while_loop`."""
    _refuse_in_trace("tw.while_loop")
    condition = _program(cond_fn, mesh, get_session)
    body = _program(body_fn, mesh, get_session)
    state = tuple(operands)
    while True:
        goes_on = condition(*state)
        if isinstance(goes_on, torch.Tensor):
            _check_scalar(goes_on, "tw.while_loop")
        if not bool(goes_on):
            return state
        result = body(*state)
        after = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        _check_same(state, after, body_fn)
        state = after


def _program(
    function: Callable[..., Any], mesh: VirtualSlice | None, get_session: Callable[[], Session]
) -> Callable[..., Any]:
    if isinstance(function, ProgramFunction) or current_trace() is not None:
        return function
    known = _programs.get(function)
    if known is None or known.mesh is not mesh:
        # A weak reference to the key would be kept alive by the value: the program gets a copy of its own.
        known = _programs[function] = ProgramFunction(copy_of(function), mesh, get_session)
    return known


def copy_of(function: Callable[..., Any]) -> Callable[..., Any]:
    reference = weakref.ref(function)

    def call(*operands: Any) -> Any:
        alive = reference()
        assert alive is not None  # whoever calls this found the program by the function
        return alive(*operands)

    call.__name__ = getattr(function, "__name__", "branch")
    return call


def _refuse_in_trace(what: str) -> None:
    if current_trace() is not None:
        raise DataDependentError(f"{what} decides by the value of an array at {user_line()}")


def _check_scalar(value: torch.Tensor, what: str) -> None:
    if value.numel() != 1:
        raise ShapeError(f"the condition of {what} must have one element, not shape {tuple(value.shape)}")


def _check_same(before: tuple[Any, ...], after: tuple[Any, ...], body_fn: Callable[..., Any]) -> None:
    old, old_spec = pytree.tree_flatten(before)
    new, new_spec = pytree.tree_flatten(after)
    name = getattr(body_fn, "__name__", "the body")
    if old_spec != new_spec:
        raise ShapeError(f"{name}, the body of tw.while_loop, must return {len(before)} operands as it gets them")
    for position, (was, now) in enumerate(zip(old, new, strict=True)):
        if isinstance(was, torch.Tensor) and isinstance(now, torch.Tensor):
            same = was.shape == now.shape and was.dtype == now.dtype
            if not same:
                raise ShapeError(
                    f"{name}, the body of tw.while_loop, returns operand {position} as {kind_text(now)}, but it gets "
                    f"{kind_text(was)}: each turn must keep shapes and dtypes"
                )


def kind_text(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
