"""Host numbers (python_state/host_numbers.py) as operands of tensors: scalar inputs of the graph.

An operator that takes a number is called in the form that takes a tensor of no dimensions. If it has no such form, it
gets the number itself, which makes that number a condition of the trace.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.overrides import TorchFunctionMode

from torchways.capture.lowering.accumulation import HALVES
from torchways.capture.python_state.host_numbers import HostFloat, HostInt, Node, node_of

#: Makes the graph's input for a number, of a dtype.
MakeScalar = Callable[[Node, torch.dtype], torch.Tensor]

_SYMBOLIC = (torch.SymFloat, torch.SymInt, torch.SymBool)
_HOST = (HostFloat, HostInt)
#: Functions of two operands, either of which may be a number, by name without underscores.
_BINARY = {"add", "sub", "mul", "div", "radd", "rsub", "rmul", "rdiv", "rtruediv", "truediv", "true_divide", "multiply"}
_BINARY |= {"subtract", "divide", "iadd", "isub", "imul", "itruediv", "idiv", "rpow", "remainder", "fmod", "mod"}
_BINARY |= {"floordiv", "rfloordiv", "floor_divide", "maximum", "minimum", "rmod"}


class NumbersAsTensors(TorchFunctionMode):
    """While it is active, numbers in arithmetic with tensors are tensors, so that autograd sees no constant."""

    def __init__(self, make_scalar: MakeScalar) -> None:
        super().__init__()
        self._make_scalar = make_scalar

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(type(value) in _HOST for value in args) and getattr(func, "__name__", "").strip("_") in _BINARY:
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            if tensors:
                args = [
                    self._make_scalar(value.node, dtype_beside(value.node, tensors)) if type(value) in _HOST else value
                    for value in args
                ]
        return func(*args, **(kwargs or {}))


def has_numbers(args: Any, kwargs: Any) -> bool:
    """Whether an operator is called with a host number."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, _SYMBOLIC) or (
            isinstance(value, (list, tuple)) and any(isinstance(item, _SYMBOLIC) for item in value)
        ):
            return True
    return False


def dtype_beside(node: Node, tensors: list[torch.Tensor]) -> torch.dtype:
    """Returns the dtype of a scalar tensor that computes with tensors as a Python number does."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    if dtype.is_complex:
        dtype = dtype.to_real()
    if dtype.is_floating_point:
        return torch.float32 if dtype in HALVES and any(tensor.dim() for tensor in tensors) else dtype
    if node.is_float():
        return torch.get_default_dtype()
    return torch.int64 if dtype == torch.bool else dtype


def call_with_numbers(func: Any, args: Any, kwargs: Any, make_scalar: MakeScalar, call: Callable[..., Any]) -> Any:
    """Calls an ATen operator of which some arguments are host numbers.

    Args:
        func: the operator.
        args, kwargs: its arguments.
        make_scalar: see `MakeScalar`.
        call: calls an operator; numbers among its arguments are handled alike.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    name = func._schema.name.split("::")[1]

    def scalar(value: Any) -> torch.Tensor:
        node = node_of(value)
        return value if node is None else make_scalar(node, dtype_beside(node, tensors))

    if node_of(kwargs.get("alpha")) is not None and name.rstrip("_") in ("add", "sub"):
        first, second = args
        return call(func, (first, call(torch.ops.aten.mul.Tensor, (second, scalar(kwargs["alpha"])), {})), {})
    if node_of(kwargs.get("value")) is not None and name.rstrip("_") in ("addcmul", "addcdiv"):
        first, second, third = args
        product = call(torch.ops.aten.mul.Tensor, (second, scalar(kwargs["value"])), {})
        return call(func, (first, product, third), {})
    if name in _FILLED:
        position = _FILLED[name]
        if position < len(args) and (node := node_of(args[position])) is not None:
            dtype = kwargs.get("dtype") or _dtype_of_filled(name, args, node)
            empty = call(func, (*args[:position], 0, *args[position + 1 :]), {**kwargs, "dtype": dtype})
            return call(torch.ops.aten.fill.Tensor, (empty, make_scalar(node, dtype)), {})
    with_tensors = _overload_with_tensors(func)
    if tensors and with_tensors is not None and not kwargs:
        changed = list(args)
        for index, (old, new) in enumerate(zip(func._schema.arguments, with_tensors._schema.arguments, strict=False)):
            is_number = isinstance(old.type.getElementType() if _is_optional(old) else old.type, torch.NumberType)
            if is_number and index < len(args) and args[index] is not None and "Tensor" in str(new.type):
                value = args[index]
                changed[index] = scalar(value) if node_of(value) is not None else _full_like(value, tensors)
        if not has_numbers(changed, {}):
            return call(with_tensors, tuple(changed), {})
    return call(func, *plain(args, kwargs))


def plain(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Returns arguments with the numbers themselves, which become conditions."""
    result: tuple[Any, Any] = pytree.tree_map_only(_SYMBOLIC, _required, (args, kwargs))
    return result


def _required(value: Any) -> Any:
    node = node_of(value)
    return value if node is None else node.require()


#: Operators that fill a new tensor with a number, and which argument that is.
_FILLED = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}


def _dtype_of_filled(name: str, args: Any, node: Node) -> torch.dtype:
    if name in ("full_like", "new_full"):
        return args[0].dtype
    return torch.get_default_dtype() if node.is_float() else torch.int64


def _full_like(value: Any, tensors: list[torch.Tensor]) -> torch.Tensor:
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return torch.full((), value, dtype=dtype)


def _is_optional(argument: Any) -> bool:
    return isinstance(argument.type, torch.OptionalType)


def _overload_with_tensors(func: Any) -> Any:
    """Returns the form of an operator that takes tensors where `func` takes numbers; None: there is none."""
    packet, overload = func._overloadpacket, func._overloadname
    names = {"Scalar": "Tensor", "Tensor_Scalar": "Tensor_Tensor", "int_Scalar": "int_Tensor", "default": "Tensor"}
    if packet.__name__.rstrip("_") == "pow" and overload == "Scalar":
        name = "Tensor_Tensor" if packet.__name__ == "pow" else "Tensor"
    else:
        name = names.get(overload, "")
    if name not in packet.overloads() or packet.__name__.startswith("_foreach"):
        return None
    other = getattr(packet, name)
    return other if len(other._schema.arguments) == len(func._schema.arguments) else None
