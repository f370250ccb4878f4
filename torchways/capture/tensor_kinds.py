"""Kinds of tensors that a program cannot take: what operators do with them is not what they do with plain ones."""

from __future__ import annotations

import torch

from torchways.array import Array
from torchways.errors import CaptureError

#: Packages whose subclasses of `torch.Tensor` compute as plain tensors do.
_PLAIN_PACKAGES = {"torch", "torchways", "torchvision"}


def is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is surely of the plain kind, dense on the host; quick."""
    is_strided = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    return is_strided and tensor.is_cpu and not tensor.is_nested and not tensor.is_quantized


def check_tensor_kind(name: str, tensor: torch.Tensor, line: str) -> None:
    """Refuses a tensor of a kind that no program takes.

    Args:
        name: what it is called.
        line: where the program is called.

    Raises:
        CaptureError: it is sparse, nested, quantized, not on the CPU, or of a subclass of the user's.
    """
    if isinstance(tensor, Array) or is_plain_tensor(tensor):
        return
    what = remedy = ""
    cls = type(tensor)
    if cls.__module__.split(".")[0] not in _PLAIN_PACKAGES:
        what, remedy = f"a {cls.__name__}", f"pass {name}.as_subclass(torch.Tensor)"
    elif tensor.is_nested:
        what, remedy = "a nested tensor", f"pass torch.nested.to_padded_tensor({name}, 0.0)"
    elif tensor.layout is not torch.strided:
        what, remedy = f"a tensor of layout {tensor.layout}", f"pass {name}.to_dense()"
    elif tensor.is_quantized:
        what, remedy = "a quantized tensor", f"pass {name}.dequantize()"
    elif tensor.is_meta:
        what, remedy = "a tensor on the device meta, which has no values", "pass one that has"
    elif not tensor.is_cpu:
        what, remedy = f"a tensor on the device {tensor.device}", f"pass {name}.cpu()"
    if what:
        raise CaptureError(f"{name} is {what}, at {line}, and programs take plain tensors: {remedy}")
