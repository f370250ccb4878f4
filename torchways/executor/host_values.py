"""Values on the host, as messages and peers bring them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from torchways.errors import Failure, UserError
from torchways.executor.checks import check_spec
from torchways.executor.events import BufferPut
from torchways.executor.failures import Failures
from torchways.ids import BufferId, ClientId, SliceId
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.identity import check_owner
from torchways.runtime.base import BufferSpec, Runtime


def spec_of(message: pb.TensorSpec, mesh: Sequence[int]) -> BufferSpec:
    """Returns a message as a spec on a mesh whose axes have these sizes."""
    return BufferSpec(
        dtype=message.dtype, shape=tuple(message.shape), placements=tuple(message.placements), mesh=tuple(mesh)
    )


def checked_put(first: pb.PutChunk, client_id: ClientId, num_devices: int) -> BufferSpec:
    """Returns the spec of a value that a client puts, once it is checked.

    Args:
        first: says of which buffer and slice it is, and what it is like.
        client_id: who puts it.
        num_devices: of this executor's set, on all hosts.

    Raises:
        TorchwaysError: the buffer is another's, or such a value cannot be on these devices.
    """
    check_owner(client_id, ids=[BufferId(first.buffer_id)])
    return checked_spec(first.value.spec, first.mesh_shape, num_devices)


def checked_spec(message: pb.TensorSpec, mesh: Sequence[int], num_devices: int) -> BufferSpec:
    """Returns the spec of a value on a mesh whose axes have these sizes, once it is checked.

    Raises:
        TorchwaysError: such a value cannot be on these devices.
    """
    spec = spec_of(message, mesh)
    check_spec(spec, spec.mesh)
    if math.prod(mesh) != num_devices or min(mesh, default=1) < 1:
        raise UserError(f"a mesh {tuple(mesh)} is not one of {num_devices} devices")
    return spec


def put_event(
    buffer_id: BufferId,
    slice_id: SliceId,
    data: pb.HostValue | torch.Tensor,
    spec: BufferSpec,
    *,
    for_run: bool = False,
) -> BufferPut:
    """Returns the event of a value that has come from outside a program."""
    return BufferPut(
        buffer_id=buffer_id,
        data=data,
        spec=spec,
        nbytes=spec.device_nbytes,
        slice_id=slice_id,
        form=spec.form,
        for_run=for_run,
        time_ns=time.time_ns(),
    )


def to_device(runtime: Runtime, data: pb.HostValue | torch.Tensor | int, spec: BufferSpec) -> Any:
    """Copies a value to the devices; returns its buffer.

    Args:
        runtime: the devices.
        data: a message of the controller, the bytes that a peer sent, which must not change any more, or a number.
        spec: of the buffer.

    Raises:
        ValueError: the number of bytes is not that of `spec`.
    """
    if isinstance(data, torch.Tensor):
        return runtime.put(_typed(data, spec), spec)
    if isinstance(data, int):
        return runtime.fill(spec, data)
    if data.WhichOneof("content") == "fill":
        return runtime.fill(spec, data.fill)
    return runtime.put(_typed(_bytes_tensor(data.data), spec), spec)


def to_host(runtime: Runtime, buffer: Any, failure: Failures) -> torch.Tensor | Failure:
    """Returns a computed buffer as a CPU tensor, which may be its own memory, or why it cannot be read."""
    try:
        return runtime.to_host(buffer)
    except Exception as error:
        return failure("RemoteError", f"a value could not be read from its devices: {error}", error)


def as_sent(value: torch.Tensor | Failure) -> torch.Tensor | Failure:
    """Returns a value as a peer would send it: a copy of its bytes, since its own memory may be a buffer's."""
    return value if isinstance(value, Failure) else value.clone().contiguous().reshape(-1).view(torch.uint8)


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _typed(data: torch.Tensor, spec: BufferSpec) -> torch.Tensor:
    if data.nbytes != spec.nbytes:
        raise ValueError(f"{data.nbytes} bytes came, but {spec.dtype}{list(spec.shape)} has {spec.nbytes}")
    return data.view(spec.torch_dtype).reshape(spec.shape)
