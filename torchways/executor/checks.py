"""What a program's part must be, before anything of it is believed. A client sends it, and may send anything."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from torchways.errors import UserError
from torchways.rpc import torchways_pb2 as pb

#: Bounds of what is plausible: a part is kept whole, and looked through at each run.
_MAX_SLOTS = 1 << 20
_MAX_INSTRUCTIONS = 1 << 20
_MAX_DIMENSIONS = 64
#: Elements of a value; what a machine has no memory for is refused by the budget.
_MAX_ELEMENTS = 1 << 48


def check_part(part: pb.SliceProgram, num_devices: int, executor_id: str) -> None:
    """Checks that a part can be carried out: every value is made once, before it is read, and everything is there.

    Raises:
        UserError: it cannot; the message says why.
    """
    _require(math.prod(part.mesh_shape) == num_devices and min(part.mesh_shape, default=1) > 0, "its mesh is another")
    _require(len(part.slots) <= _MAX_SLOTS and len(part.instructions) <= _MAX_INSTRUCTIONS, "it is too large")
    _require(part.num_args <= len(part.slots), "it has more arguments than values")
    for spec in part.slots:
        check_spec(spec, part.mesh_shape)
    peers = {peer.slice_id for peer in part.peers}
    mine = {peer.executor_id for peer in part.peers if peer.slice_id == part.slice_id}
    _require(not mine or executor_id in mine, "it is for another executor")
    made = set(range(part.num_args))
    gone: set[int] = set()
    for item in part.instructions:
        reads, writes, donated = _accesses(item, part, peers)
        for slot in reads:
            _require(
                slot in made and slot not in gone, f"value {slot} is read before it is made, or after it is given up"
            )
        for slot in writes:
            _require(slot < len(part.slots) and slot not in made, f"value {slot} does not exist, or is made twice")
            made.add(slot)
        gone |= donated
    results = [result.slot for result in part.results]
    _require(all(slot in made and slot not in gone for slot in results), "a result is never made, or is given up")
    numbers = [result.result_index for result in part.results]
    _require(len(set(numbers)) == len(numbers) and max(numbers, default=0) < _MAX_SLOTS, "its results are not numbered")


def check_spec(spec: pb.TensorSpec, mesh: Sequence[int]) -> None:
    """Checks that a value can be on a mesh whose axes have these sizes.

    Raises:
        UserError: it cannot; the message says why.
    """
    dtype = getattr(torch, spec.dtype, None) if spec.dtype.isidentifier() else None
    _require(isinstance(dtype, torch.dtype), f"there is no dtype {spec.dtype[:40]!r}")
    shape = tuple(spec.shape)
    _require(len(shape) <= _MAX_DIMENSIONS and min(shape, default=0) >= 0, f"there is no shape {shape[:8]}")
    _require(math.prod(shape) <= _MAX_ELEMENTS, f"a value of shape {shape[:8]} is too large")
    _require(len(spec.placements) == len(mesh), f"{len(spec.placements)} placements do not fit a mesh {tuple(mesh)}")
    for text in spec.placements:
        number = text[2:-1]
        is_split = text == f"S({number})" and number.isascii() and number.isdigit() and len(number) < 3
        _require(text == "R" or (is_split and int(number) < len(shape)), f"there is no placement {text[:40]!r}")


def _accesses(item: pb.Instruction, part: pb.SliceProgram, peers: set[int]) -> tuple[list[int], list[int], set[int]]:
    """Returns the slots that an instruction reads, those it makes, and those that nobody may read after it."""
    match item.WhichOneof("instruction"):
        case "compute":
            call = item.compute
            _require(call.function_id < len(part.functions), f"there is no function {call.function_id}")
            _require(all(index < len(call.inputs) for index in call.donated), "it donates what it does not read")
            return list(call.inputs), list(call.outputs), {call.inputs[index] for index in call.donated}
        case "send":
            _require(item.send.peer in peers, f"slice {item.send.peer} is no peer")
            return [item.send.slot], [], set()
        case "receive":
            _require(item.receive.peer in peers, f"slice {item.receive.peer} is no peer")
            return [], [item.receive.slot], set()
        case "all_reduce":
            members = item.all_reduce.members
            _require(part.slice_id in members and peers.issuperset(members), "a sum is with slices that are no peers")
            return [item.all_reduce.input], [item.all_reduce.output], set()
    raise UserError("an instruction has no known kind")


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise UserError(f"a program cannot be loaded: {reason}")
