"""Lowered programs and their runs as messages for the schedulers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torchways.ids import BufferId, ProgramId, RunId, SliceId
from torchways.ir.program import Value
from torchways.passes.split import AllReduceStep, ComputeStep, FreeStep, ReceiveStep, SendStep, SlicePart, Step
from torchways.rpc import torchways_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class InlineValue:
    """A host value inside a message.

    Attributes:
        dtype, shape, placements: as in `Value`.
        data: row-major elements, or one number for all of them.
    """

    dtype: str
    shape: tuple[int, ...]
    placements: tuple[str, ...]
    data: bytes | float


#: What an argument is bound to: a buffer that exists or will, or a value.
Binding: TypeAlias = BufferId | InlineValue


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAddress:
    """A slice at the other end of transfers: (executor id, data address) of each of its hosts."""

    slice_id: SliceId
    executors: tuple[tuple[str, str], ...]


def register_message(
    program_id: ProgramId,
    name: str,
    parts: Sequence[tuple[SliceId, Sequence[int], SlicePart]],
    peers: Mapping[int, PeerAddress],
) -> pb.ClientMessage:
    """Returns the message that registers a program's parts on one island.

    Args:
        program_id: the program's.
        name: for people.
        parts: of the island's slices, each with the sizes of its slice's axes.
        peers: where each of the program's slices is, by slice index.
    """
    return pb.ClientMessage(
        register_program=pb.RegisterProgram(
            program_id=program_id,
            name=name,
            slices=[_part(slice_id, mesh, part, peers) for slice_id, mesh, part in parts],
        )
    )


def run_message(
    program_id: ProgramId,
    run_id: RunId,
    first_buffer_id: BufferId,
    arguments: Sequence[tuple[SliceId, Sequence[Binding]]],
) -> pb.ClientMessage:
    """Returns the one message that runs an island's part of a program."""
    return pb.ClientMessage(
        run_program=pb.RunProgram(
            program_id=program_id,
            run_id=run_id,
            first_buffer_id=first_buffer_id,
            slices=[
                pb.SliceArguments(slice_id=slice_id, arguments=_arguments(bindings)) for slice_id, bindings in arguments
            ],
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
    return pb.HostValue(spec=spec, fill=value.data)


def _arguments(bindings: Sequence[Binding]) -> bytes:
    message = pb.Arguments(
        buffer_ids=[0 if isinstance(binding, InlineValue) else binding for binding in bindings],
        values=[host_value(binding) for binding in bindings if isinstance(binding, InlineValue)],
    )
    return message.SerializeToString()


def _part(slice_id: SliceId, mesh: Sequence[int], part: SlicePart, peers: Mapping[int, PeerAddress]) -> pb.SliceProgram:
    used = sorted({index for step in part.steps for index in _step_peers(step)} | {part.slice_index})
    return pb.SliceProgram(
        slice_id=slice_id,
        mesh_shape=mesh,
        functions=[
            pb.Function(function_id=index, name=function.name, source=function.source, graph=function.graph)
            for index, function in enumerate(part.functions)
        ],
        slots=[_spec(value) for value in part.slots],
        num_args=len(part.args),
        instructions=[_instruction(step, peers) for step in part.steps if not isinstance(step, FreeStep)],
        results=[pb.ResultSlot(slot=slot, result_index=number) for slot, number in part.results],
        peers=[
            pb.Peer(executor_id=executor_id, data_address=data_address, slice_id=peers[index].slice_id)
            for index in used
            for executor_id, data_address in peers[index].executors
        ],
    )


def _step_peers(step: Step) -> tuple[int, ...]:
    match step:
        case SendStep() | ReceiveStep():
            return (step.peer,)
        case AllReduceStep():
            return step.members
        case ComputeStep() | FreeStep():
            return ()


def _spec(value: Value) -> pb.TensorSpec:
    return pb.TensorSpec(dtype=value.dtype, shape=value.shape, placements=value.placements)


def _instruction(
    step: ComputeStep | SendStep | ReceiveStep | AllReduceStep, peers: Mapping[int, PeerAddress]
) -> pb.Instruction:
    match step:
        case ComputeStep():
            return pb.Instruction(
                compute=pb.Compute(
                    function_id=step.function_index, inputs=step.inputs, outputs=step.outputs, donated=step.donated
                )
            )
        case SendStep():
            return pb.Instruction(send=pb.Send(slot=step.slot, edge_id=step.edge_id, peer=peers[step.peer].slice_id))
        case ReceiveStep():
            return pb.Instruction(
                receive=pb.Receive(slot=step.slot, edge_id=step.edge_id, peer=peers[step.peer].slice_id)
            )
        case AllReduceStep():
            members = [peers[index].slice_id for index in step.members]
            return pb.Instruction(
                all_reduce=pb.AllReduce(input=step.input, output=step.output, edge_id=step.edge_id, members=members)
            )
