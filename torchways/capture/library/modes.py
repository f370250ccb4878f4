"""Changes settings and checks of PyTorch's library that stand in a trace's way, and puts all back after it.

oneDNN's recurrent layers are operators that torch-xla does not know; without oneDNN, PyTorch takes them apart.
Functions that decide by values, or have operators without lowering, get another form that gives the same numbers, or
are refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch._decomp.decompositions import _grid_sampler_2d
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from torchways.capture.library.ctc import ctc_loss
from torchways.capture.library.distributions import ArgumentChecks
from torchways.capture.library.recurrent import PackedSequences
from torchways.capture.library.replacement import Replacement, replaced
from torchways.capture.rows.ragged_tensors import RaggedTensors
from torchways.capture.source import user_line
from torchways.errors import CaptureError


@contextmanager
def library_modes(ragged: RaggedTensors) -> Iterator[None]:
    """While it is open, PyTorch's library takes paths that can be traced."""
    without_onednn = torch.backends.mkldnn.flags(
        enabled=False, deterministic=None, allow_tf32=None, fp32_precision=None
    )
    with ExitStack() as stack:
        for context in (sdpa_kernel(SDPBackend.MATH), without_onednn, *map(replaced, _REPLACED)):
            stack.enter_context(context)
        for mode in (ArgumentChecks(), LibraryFunctions(), PackedSequences(ragged)):
            stack.enter_context(mode)
        yield


class LibraryFunctions(TorchFunctionMode):
    """While it is active, functions of torch.nn.functional run in the form that can be captured."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.ctc_loss:
            return ctc_loss(*args, **kwargs)
        if func is F.grid_sample and args[0].dim() == 4:
            return _grid_sample(*args, **kwargs)
        if func in (torch.grid_sampler, torch.grid_sampler_2d) and args[0].dim() == 4:
            return _grid_sampler(*args, **kwargs)
        if func in _MAX_POOLS:
            return _max_pool(func, *args, **kwargs)
        if func in (F.embedding, F.embedding_bag):
            _refuse_sparse_gradients(func, args, kwargs)
        return func(*args, **kwargs)


def _grid_sample(
    value: torch.Tensor,
    grid: torch.Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Any:
    """Computes what PyTorch's operator does by operators whose gradients have a lowering, which its own has not."""
    F.grid_sample(value, grid, mode, padding_mode, bool(align_corners))  # it checks; nobody uses its result
    modes, paddings = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")
    return _grid_sampler(value, grid, modes.index(mode), paddings.index(padding_mode), bool(align_corners))


def _grid_sampler(
    value: torch.Tensor, grid: torch.Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> torch.Tensor:
    sampled = _grid_sampler_2d(value, grid, interpolation_mode, padding_mode, align_corners)
    if interpolation_mode != 1:
        return sampled
    # What is nearest depends on the grid by integers alone: as in PyTorch, the grid's gradient is zeros, and not None.
    return sampled + torch.where(torch.zeros_like(grid, dtype=torch.bool), grid, 0.0).sum()


def _max_pool(
    func: Any,
    value: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Any:
    """With `ceil_mode`, torch-xla computes some on the host; windows that reach beyond the end find it padded here."""
    if not ceil_mode or not value.is_floating_point():
        return func(value, kernel_size, stride, padding, dilation, ceil_mode)
    num_dims = _MAX_POOLS[func]
    options = [[item] * num_dims if isinstance(item, int) else list(item) for item in (kernel_size, padding, dilation)]
    steps = stride if stride else kernel_size
    strides = [steps] * num_dims if isinstance(steps, int) else list(steps)
    missing = [
        _missing(size, *of_dim) for size, *of_dim in zip(value.shape[-num_dims:], *options, strides, strict=True)
    ]
    if any(missing):
        value = F.pad(value, [side for size in reversed(missing) for side in (0, size)], value=-torch.inf)
    return func(value, kernel_size, stride, padding, dilation)


def _missing(size: int, kernel: int, padding: int, dilation: int, stride: int) -> int:
    """Returns how many elements the last window reaches beyond a dimension's end and its padding."""
    window = dilation * (kernel - 1) + 1
    last = -((window - size - 2 * padding) // stride)  # rounded up
    if last * stride >= size + padding:  # it would begin in the padding behind the end
        last -= 1
    return max(0, last * stride + window - size - 2 * padding)


_MAX_POOLS = {torch.max_pool1d: 1, torch.max_pool2d: 2, torch.max_pool3d: 3}


def _refuse_sparse_gradients(func: Any, args: Any, kwargs: Any) -> None:
    call = inspect.signature(func).bind(*args, **kwargs)
    if call.arguments.get("sparse") and torch.is_grad_enabled() and call.arguments["weight"].requires_grad:
        raise CaptureError(
            f"{func.__name__} with sparse=True at {user_line()} has sparse gradients, and those of a program are "
            "dense: leave sparse=True out, and use an optimizer for dense gradients (SGD, Adagrad or Adam)"
        )


def _batch_norm_forward(original: Any) -> Any:
    """With `momentum=None`, running statistics are means of all batches, whose number is a tensor."""

    def forward(self: Any, value: torch.Tensor) -> torch.Tensor:
        is_cumulative = self.momentum is None and self.training and self.track_running_stats
        if not is_cumulative or self.num_batches_tracked is None:
            return original(self, value)
        self._check_input_dim(value)
        self.num_batches_tracked.add_(1)
        statistics = [self.running_mean, self.running_var]
        of_batch = [torch.zeros_like(item) for item in statistics]
        mean, variance = of_batch
        result = F.batch_norm(value, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        with torch.no_grad():
            for item, new in zip(statistics, of_batch, strict=True):
                item.add_((new - item) / self.num_batches_tracked.to(item.dtype))
        return result

    return forward


def _total_norm(original: Any) -> Any:
    def total_norm(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> Any:
        if error_if_nonfinite:
            raise CaptureError(
                f"clip_grad_norm_(error_if_nonfinite=True) at {user_line()} decides by the gradients' values whether "
                "to raise, which a program cannot know when it is dispatched: leave it out, return the norm that "
                "clip_grad_norm_ returns, and check it where you read it"
            )
        return original(tensors, norm_type, error_if_nonfinite, foreach)

    return total_norm


def _run_backward(original: Any) -> Any:
    def run_backward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
            raise CaptureError(
                f"torch.autograd.detect_anomaly looks for NaN in every gradient, which backward at {user_line()} does "
                "not compute before the program runs: use detect_anomaly(check_nan=False), or run the step with "
                "TORCHWAYS_EAGER=1"
            )
        return original(*args, **kwargs)

    return run_backward


def _refuse_lbfgs(original: Any) -> Any:
    def step(self: Any, closure: Any) -> Any:
        raise CaptureError(
            f"LBFGS.step at {user_line()} decides by the losses that its closure returns how often it calls it, and a "
            "program has one graph: use another optimizer, or run the step with TORCHWAYS_EAGER=1"
        )

    return step


_REPLACED = (
    Replacement(torch.optim.LBFGS, "step", _refuse_lbfgs),
    Replacement(torch.nn.modules.batchnorm._BatchNorm, "forward", _batch_norm_forward),
    Replacement(torch.nn.utils.clip_grad, "_get_total_norm", _total_norm),
    Replacement(torch.autograd, "_engine_run_backward", _run_backward),
)
