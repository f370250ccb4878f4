"""Lowered programs and their runs as messages for the schedulers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from google.protobuf.message import DecodeError

from torchways.ids import BufferId, IslandId, ProgramId, RunId, SliceId
from torchways.ir.part import NO_BUFFER, Arguments, SliceIndex, SlicePart, peers
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.convert import part_to_proto
from torchways.rpc.local_values import ValueFile


@dataclass(frozen=True, slots=True, kw_only=True)
class InlineValue:
    """A host value inside a message.

    Attributes:
        dtype, shape, placements: as in `Value`.
        data: row-major elements, or one number for all of them. Where they do not go with a message, a file has them.
    """

    dtype: str
    shape: tuple[int, ...]
    placements: tuple[str, ...]
    data: bytes | float | ValueFile


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAddress:
    """The executor of one host of a slice, and the address at which it accepts links, as it has signed it."""

    executor_id: str
    data_address: str


def register_message(
    program_id: ProgramId,
    name: str,
    parts: Sequence[tuple[SliceId, Sequence[int], SlicePart]],
    hosts: Mapping[SliceIndex, Sequence[HostAddress]],
    islands: Sequence[IslandId],
) -> pb.ClientMessage:
    """Returns the message that registers a program's parts on one island.

    Args:
        program_id: the program's id.
        name: the program's name, for people.
        parts: the parts of the island's slices, each with the id of its slice and the sizes of the slice's axes.
        hosts: the hosts of each of the program's slices.
        islands: all that it has parts on.
    """
    return pb.ClientMessage(
        register_program=pb.RegisterProgram(
            program_id=program_id,
            name=name,
            slices=[_slice_program(slice_id, mesh, part, hosts) for slice_id, mesh, part in parts],
            islands=islands,
        )
    )


def cancel_message(run_ids: Sequence[RunId], reason: str) -> pb.ClientMessage:
    """Returns the message that cancels runs. `reason`: for people, or empty."""
    return pb.ClientMessage(cancel_runs=pb.CancelRuns(run_ids=run_ids, reason=reason))


def run_message(
    program_id: ProgramId,
    run_id: RunId,
    first_buffer_id: BufferId,
    arguments: Sequence[tuple[SliceId, Arguments[InlineValue]]],
    *,
    checks_values: bool = False,
) -> pb.ClientMessage:
    """Returns the one message that runs an island's part of a program.

    `checks_values`: a function that makes NaN or infinity fails.
    """
    return pb.ClientMessage(
        run_program=pb.RunProgram(
            program_id=program_id,
            run_id=run_id,
            first_buffer_id=first_buffer_id,
            slices=[
                pb.SliceArguments(slice_id=slice_id, arguments=arguments_to_bytes(bound))
                for slice_id, bound in arguments
            ],
            checks_values=checks_values,
        )
    )


def release_message(slice_id: SliceId, buffer_ids: Sequence[BufferId]) -> pb.ClientMessage:
    """Returns the message that frees buffers once everything sent before has read them."""
    return pb.ClientMessage(release_buffers=pb.ReleaseBuffers(slice_id=slice_id, buffer_ids=buffer_ids))


def close_message(slice_id: SliceId) -> pb.ClientMessage:
    """Returns the message that frees a slice's buffers and programs once everything sent before has run."""
    return pb.ClientMessage(close_slice=pb.CloseSlice(slice_id=slice_id))


def forget_message(program_id: ProgramId) -> pb.ClientMessage:
    """Returns the message that says that no run of a program will follow."""
    return pb.ClientMessage(forget_program=pb.ForgetProgram(program_id=program_id))


def host_value(value: InlineValue) -> pb.HostValue:
    """Returns an inline value as a message."""
    spec = pb.TensorSpec(dtype=value.dtype, shape=value.shape, placements=value.placements)
    if isinstance(value.data, bytes):
        return pb.HostValue(spec=spec, data=value.data)
    if isinstance(value.data, ValueFile):
        return pb.HostValue(spec=spec)
    return pb.HostValue(spec=spec, fill=value.data)


def arguments_to_bytes(arguments: Arguments[InlineValue]) -> bytes:
    """Returns a run's arguments as schedulers pass them on, unread."""
    values = [host_value(value) for value in arguments.values]
    return pb.Arguments(buffer_ids=arguments.buffer_ids, values=values).SerializeToString()


def arguments_from_bytes(data: bytes) -> Arguments[pb.HostValue] | None:
    """Reads a run's arguments; returns None if a client sent something else."""
    try:
        message = pb.Arguments.FromString(data)
    except DecodeError:
        return None
    buffer_ids = cast("list[BufferId]", list(message.buffer_ids))
    values = message.values
    return Arguments(buffer_ids, values) if buffer_ids.count(NO_BUFFER) == len(values) else None


def _slice_program(
    slice_id: SliceId, mesh: Sequence[int], part: SlicePart, hosts: Mapping[SliceIndex, Sequence[HostAddress]]
) -> pb.SliceProgram:
    named = {index for instruction in part.instructions for index in peers(instruction)}
    return pb.SliceProgram(
        slice_id=slice_id,
        mesh_shape=mesh,
        part=part_to_proto(part),
        peers=[
            pb.Peer(slice_index=index, executor_id=host.executor_id, data_address=host.data_address)
            for index in sorted({*named, part.slice_index})
            for host in hosts[index]
        ],
    )
