"""Our types as messages and back: the two functions of each pair are inverse to each other."""

from __future__ import annotations

from typing import assert_never

from torchways.errors import Failure, UserError
from torchways.ir.part import (
    AllReduceInstruction,
    ComputeInstruction,
    Instruction,
    ReceiveInstruction,
    SendInstruction,
    SlicePart,
)
from torchways.ir.program import Function, Value
from torchways.rpc import torchways_pb2 as pb


def failure_to_proto(failure: Failure) -> pb.Failure:
    """Returns a failure as a message."""
    return pb.Failure(
        kind=failure.kind,
        message=failure.message,
        function=failure.function,
        source=failure.source,
        traceback=failure.traceback,
        run_id=failure.run_id,
        process=failure.process,
    )


def failure_from_proto(message: pb.Failure) -> Failure:
    """Returns a message as a failure."""
    return Failure(
        kind=message.kind,
        message=message.message,
        function=message.function,
        source=message.source,
        traceback=message.traceback,
        run_id=message.run_id,
        process=message.process,
    )


def part_to_proto(part: SlicePart) -> pb.Part:
    """Returns a part as a message."""
    return pb.Part(
        slice_index=part.slice_index,
        functions=[
            pb.Function(
                name=function.name, source=function.source, graph=function.graph, num_operators=function.num_operators
            )
            for function in part.functions
        ],
        slots=[
            pb.TensorSpec(dtype=value.dtype, shape=value.shape, placements=value.placements) for value in part.slots
        ],
        num_args=part.num_args,
        instructions=[_instruction_to_proto(instruction) for instruction in part.instructions],
        results=[pb.ResultSlot(slot=slot, result_index=number) for slot, number in part.results],
    )


def part_from_proto(message: pb.Part) -> SlicePart:
    """Returns a message as a part; that it can be carried out is not checked (executor/checks.py).

    Raises:
        UserError: it has an instruction of an unknown kind.
    """
    return SlicePart(
        slice_index=message.slice_index,
        functions=tuple(
            Function(
                name=function.name, source=function.source, graph=function.graph, num_operators=function.num_operators
            )
            for function in message.functions
        ),
        slots=tuple(
            Value(
                dtype=spec.dtype,
                shape=tuple(spec.shape),
                slice_index=message.slice_index,
                placements=tuple(spec.placements),
            )
            for spec in message.slots
        ),
        num_args=message.num_args,
        instructions=tuple(map(_instruction_from_proto, message.instructions)),
        results=tuple((result.slot, result.result_index) for result in message.results),
    )


def _instruction_to_proto(instruction: Instruction) -> pb.Instruction:
    match instruction:
        case ComputeInstruction():
            return pb.Instruction(
                compute=pb.Compute(
                    function_index=instruction.function_index,
                    inputs=instruction.inputs,
                    outputs=instruction.outputs,
                    donated=instruction.donated,
                )
            )
        case SendInstruction():
            return pb.Instruction(
                send=pb.Send(slot=instruction.slot, edge_id=instruction.edge_id, peer=instruction.peer)
            )
        case ReceiveInstruction():
            return pb.Instruction(
                receive=pb.Receive(slot=instruction.slot, edge_id=instruction.edge_id, peer=instruction.peer)
            )
        case AllReduceInstruction():
            return pb.Instruction(
                all_reduce=pb.AllReduce(
                    input=instruction.input,
                    output=instruction.output,
                    edge_id=instruction.edge_id,
                    members=instruction.members,
                )
            )
        case _:
            assert_never(instruction)


def _instruction_from_proto(message: pb.Instruction) -> Instruction:
    match message.WhichOneof("instruction"):
        case "compute":
            compute = message.compute
            return ComputeInstruction(
                function_index=compute.function_index,
                inputs=tuple(compute.inputs),
                outputs=tuple(compute.outputs),
                donated=tuple(compute.donated),
            )
        case "send":
            send = message.send
            return SendInstruction(slot=send.slot, edge_id=send.edge_id, peer=send.peer)
        case "receive":
            receive = message.receive
            return ReceiveInstruction(slot=receive.slot, edge_id=receive.edge_id, peer=receive.peer)
        case "all_reduce":
            reduce = message.all_reduce
            return AllReduceInstruction(
                input=reduce.input, output=reduce.output, edge_id=reduce.edge_id, members=tuple(reduce.members)
            )
    raise UserError("a program cannot be loaded: an instruction has no known kind")
