"""Arrays made of arrays on slices, outside programs: `tw.redistribute`, and casts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchways.array import Array
from torchways.capture.current_trace import current_trace
from torchways.capture.host_content import HostContent
from torchways.controller.buffers import HostBuffer, RemoteBuffer
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
    return Array(get_session().values.put(HostBuffer(content), mesh, texts), content.shape, content.dtype)


def cast_on_slice(array: Array, dtype: torch.dtype) -> Array | None:
    """Returns an array in another dtype, on the same slice and sharded the same; None: its value is on the host."""
    buffer = array._buffer
    if not isinstance(buffer, RemoteBuffer):
        return None
    mesh, placements = buffer.mesh, buffer.placements
    session: Any = buffer.session

    def cast(value: torch.Tensor) -> torch.Tensor:
        mode = current_trace()
        assert mode is not None
        return mode.constrain(torch.ops.aten._to_copy.default(value, dtype=dtype), mesh, placements)

    found: Array = ProgramFunction(cast, mesh, lambda: session)(array.detach())
    return found


Array._cast_on_slice = staticmethod(cast_on_slice)
