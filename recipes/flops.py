"""How many floating-point operations a training step takes, by the model's shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_step_flops(
    make_model: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    inputs: Mapping[str, tuple[int, ...]],
) -> int:
    """Returns the FLOPs of one forward and backward pass: those of matrix products, as PyTorch's counter counts them.

    A multiplication and an addition are two operations. Causal attention counts in full. What an implementation
    computes in vain or twice (masked experts, checkpoints) does not count. Nothing is computed: tensors are fake.

    Args:
        make_model: builds the plain model.
        loss_of: returns the loss, given the model and its inputs.
        inputs: shapes of these int64 tensors, by name.
    """
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        model = make_model()
        tensors = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in inputs.items()}
        with FlopCounterMode(display=False) as counter:
            loss_of(model, tensors).backward()
    return counter.get_total_flops()
