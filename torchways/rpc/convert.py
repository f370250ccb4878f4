"""Our types as messages and back: the two functions of each pair are inverse to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from torchways.errors import Failure, UserError
from torchways.ir.part import (
    AllReduceInstruction,
    BodyInstruction,
    ComputeInstruction,
    Instruction,
    LoopBody,
    LoopInstruction,
    ReceiveInstruction,
    SendInstruction,
    SlicePart,
)
from torchways.ir.program import Function, Value
from torchways.rpc import torchways_pb2 as pb
from torchways.schedules.actions import Action, Kind, Repeat


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
        slots=_specs(part.slots),
        num_args=part.num_args,
        instructions=[
            pb.Instruction(loop=_loop_to_proto(instruction))
            if isinstance(instruction, LoopInstruction)
            else _instruction_to_proto(instruction)
            for instruction in part.instructions
        ],
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
        slots=_values(message.slots, message.slice_index),
        num_args=message.num_args,
        instructions=tuple(
            _loop_from_proto(item.loop, message.slice_index) if item.HasField("loop") else _instruction_from_proto(item)
            for item in message.instructions
        ),
        results=tuple((result.slot, result.result_index) for result in message.results),
    )


def _specs(values: Sequence[Value]) -> list[pb.TensorSpec]:
    return [pb.TensorSpec(dtype=value.dtype, shape=value.shape, placements=value.placements) for value in values]


def _values(specs: Sequence[pb.TensorSpec], slice_index: int) -> tuple[Value, ...]:
    return tuple(
        Value(dtype=spec.dtype, shape=tuple(spec.shape), slice_index=slice_index, placements=tuple(spec.placements))
        for spec in specs
    )


def _loop_to_proto(loop: LoopInstruction) -> pb.Loop:
    return pb.Loop(
        bodies=[
            pb.LoopBody(
                slots=_specs(body.slots),
                inputs=body.inputs,
                number_slots=body.number_slots,
                instructions=[
                    pb.BodyInstruction(
                        stage=item.stage, kind=item.kind, instruction=_instruction_to_proto(item.instruction)
                    )
                    for item in body.instructions
                ],
                carried=[pb.Carried(input=read, made=made) for read, made in body.carried],
                last=body.last,
            )
            for body in loop.bodies
        ],
        num_turns=loop.num_turns,
        order=[
            pb.Repeat(
                actions=[pb.Action(stage=a.stage, kind=a.kind, microbatch=a.microbatch) for a in repeat.actions],
                times=repeat.times,
                step=repeat.step,
            )
            for repeat in loop.order
        ],
        outputs=loop.outputs,
        donated=loop.donated,
        edge_stride=loop.edge_stride,
        number=loop.number,
        schedule=loop.schedule,
    )


def _loop_from_proto(message: pb.Loop, slice_index: int) -> LoopInstruction:
    return LoopInstruction(
        bodies=tuple(
            LoopBody(
                slots=_values(body.slots, slice_index),
                inputs=tuple(body.inputs),
                number_slots=tuple(body.number_slots),
                instructions=tuple(
                    BodyInstruction(
                        stage=item.stage, kind=_kind(item.kind), instruction=_instruction_from_proto(item.instruction)
                    )
                    for item in body.instructions
                ),
                carried=tuple((item.input, item.made) for item in body.carried),
                last=tuple(body.last),
            )
            for body in message.bodies
        ),
        num_turns=message.num_turns,
        order=tuple(
            Repeat(
                tuple(Action(action.stage, _kind(action.kind), action.microbatch) for action in repeat.actions),
                repeat.times,
                repeat.step,
            )
            for repeat in message.order
        ),
        outputs=tuple(message.outputs),
        donated=tuple(message.donated),
        edge_stride=message.edge_stride,
        number=message.number if message.HasField("number") else None,
        schedule=message.schedule,
    )


def _kind(text: str) -> Kind:
    try:
        return Kind(text)
    except ValueError:
        raise UserError(f"a program cannot be loaded: there is no kind of action {text[:40]!r}") from None


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
