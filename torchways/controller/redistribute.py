"""`tw.redistribute`: a tensor with another sharding, or on another slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchways.array import Array
from torchways.capture.state import HostContent
from torchways.capture.tracer import current_trace
from torchways.controller.buffers import HostBuffer
from torchways.controller.program import ProgramFunction
from torchways.controller.session import Session
from torchways.mesh import VirtualSlice, normalize_placements


def distribute(
    tensor: torch.Tensor, mesh: VirtualSlice, placements: Sequence[Any] | None, get_session: Callable[[], Session]
) -> Any:
    """See `tw.distribute_tensor` and `tw.redistribute`."""
    texts = normalize_placements(placements, mesh, tensor.shape)
    mode = current_trace()
    if mode is not None:
        return mode.constrain(tensor, mesh, texts)
    if isinstance(tensor, Array):

        def redistribute(value: torch.Tensor) -> torch.Tensor:
            mode = current_trace()
            assert mode is not None
            return mode.constrain(value, mesh, texts)

        return ProgramFunction(redistribute, mesh, get_session)(tensor)
    content = HostContent(tuple(tensor.shape), tensor.dtype, tensor.detach().clone())
    return Array(get_session().put(HostBuffer(content), mesh, texts), content.shape, content.dtype)
