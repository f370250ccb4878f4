"""Looks for NaN and infinity in what a computation made, for runs that check their values."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from torchways.runtime.base import BufferSpec, Runtime

#: How often a computation that is waited for is looked at.
_POLL_SECONDS = 0.0005


def wait_computed(runtime: Runtime, buffers: Sequence[Any]) -> None:
    """Waits until a computation, of which these are outputs, has ended; on the thread that calls the runtime."""
    if not buffers:
        return
    ended = threading.Event()
    runtime.on_ready(buffers, ended.set)
    while not ended.is_set():
        runtime.progress()
        ended.wait(_POLL_SECONDS)


def describe_bad(runtime: Runtime, buffers: Sequence[Any], specs: Sequence[BufferSpec]) -> str:
    """Returns which of a computation's outputs has a value that is not finite, for people; "" if none has.

    They are computed.
    """
    for number, (buffer, spec) in enumerate(zip(buffers, specs, strict=True)):
        if not (spec.torch_dtype.is_floating_point or spec.torch_dtype.is_complex):
            continue
        value = runtime.to_host(buffer)
        if spec.torch_dtype.itemsize == 1:
            value = value.float()  # PyTorch has no isfinite of 8 bits
        if value.numel() == 0 or bool(torch.isfinite(value).all()):
            continue
        num_nan = int(torch.isnan(value).sum())
        num_infinite = value.numel() - int(torch.isfinite(value).sum()) - num_nan
        counts = [f"{count:,} {what}" for count, what in ((num_nan, "NaN"), (num_infinite, "infinite")) if count]
        where = f"output {number + 1} of {len(buffers)}" if len(buffers) > 1 else "its output"
        return f"{where}, {spec.form}, has {' and '.join(counts)} of {value.numel():,} elements"
    return ""
