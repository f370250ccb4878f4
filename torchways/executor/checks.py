"""Checks that a program's part can be carried out. A client sends it, and may send anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from torchways.ir.loops import require
from torchways.ir.part import (
    AllReduceInstruction,
    ComputeInstruction,
    FlatPart,
    Instruction,
    SliceIndex,
    donated_slots,
    peers,
    reads,
    writes,
)
from torchways.ir.program import Value
from torchways.rpc import torchways_pb2 as pb
from torchways.runtime.base import BufferSpec

#: Plausible bounds: a part is kept whole, and looked through at each run.
_MAX_SLOTS = 1 << 20
_MAX_INSTRUCTIONS = 1 << 20
_MAX_DIMENSIONS = 64
#: Elements of a value; the budget refuses values that this machine has no memory for.
_MAX_ELEMENTS = 1 << 48


def check_size(message: pb.SliceProgram) -> None:
    """Checks that a part is small enough to be read.

    Raises:
        UserError: it is too large.
    """
    part = message.part
    require(len(part.slots) <= _MAX_SLOTS and len(part.instructions) <= _MAX_INSTRUCTIONS, "it is too large")


def check_part(
    part: FlatPart,
    mesh: Sequence[int],
    hosts: Mapping[SliceIndex, Sequence[str]],
    *,
    num_devices: int,
    executor_id: str,
) -> None:
    """Checks that a part can be carried out: every value is made once, before it is read, and everything is there.

    Args:
        part: as it was read, and unrolled.
        mesh: sizes of its slice's axes.
        hosts: the executors of the slices that it may name, its own among them.
        num_devices: devices of this executor's set, on all hosts.
        executor_id: this executor.

    Raises:
        UserError: it cannot; the message gives the reason.
    """
    require(math.prod(mesh) == num_devices and min(mesh, default=1) > 0, "its mesh is another")
    require(part.num_args <= len(part.slots), "it has more arguments than values")
    for value in part.slots:
        check_spec(value, mesh)
    require(executor_id in hosts[part.slice_index], "it is for another executor")
    made = {*range(part.num_args), *(slot for slot, _ in part.numbers)}
    gone: set[int] = set()
    edges: set[int] = set()
    for instruction in part.instructions:
        _check_instruction(instruction, part, hosts, edges)
        for slot in reads(instruction):
            require(
                slot in made and slot not in gone, f"value {slot} is read before it is made, or after it is given up"
            )
        for slot in writes(instruction):
            require(slot < len(part.slots) and slot not in made, f"value {slot} does not exist, or is made twice")
            made.add(slot)
        gone.update(donated_slots(instruction))
    require(
        all(slot in made and slot not in gone for slot, _ in part.results), "a result is never made, or is given up"
    )
    numbers = [number for _, number in part.results]
    require(len(set(numbers)) == len(numbers) and max(numbers, default=0) < _MAX_SLOTS, "its results are not numbered")


def check_spec(spec: Value | BufferSpec, mesh: Sequence[int]) -> None:
    """Checks that a value can be on a mesh whose axes have these sizes.

    Raises:
        UserError: it cannot; the message gives the reason.
    """
    dtype = getattr(torch, spec.dtype, None) if spec.dtype.isidentifier() else None
    require(isinstance(dtype, torch.dtype), f"there is no dtype {spec.dtype[:40]!r}")
    shape = spec.shape
    require(len(shape) <= _MAX_DIMENSIONS and min(shape, default=0) >= 0, f"there is no shape {shape[:8]}")
    require(math.prod(shape) <= _MAX_ELEMENTS, f"a value of shape {shape[:8]} is too large")
    require(len(spec.placements) == len(mesh), f"{len(spec.placements)} placements do not fit a mesh {tuple(mesh)}")
    for text in spec.placements:
        number = text[2:-1]
        is_split = text == f"S({number})" and number.isascii() and number.isdigit() and len(number) < 3
        require(text == "R" or (is_split and int(number) < len(shape)), f"there is no placement {text[:40]!r}")


def _check_instruction(
    instruction: Instruction, part: FlatPart, hosts: Mapping[SliceIndex, Sequence[str]], edges: set[int]
) -> None:
    """Checks what an instruction names beside slots; adds its edge to those that are used."""
    for peer in peers(instruction):
        require(peer in hosts, f"slice @{peer} is no peer")
    if isinstance(instruction, ComputeInstruction):
        index = instruction.function_index
        require(index < len(part.functions), f"there is no function {index}")
        require(max(instruction.donated, default=-1) < len(instruction.inputs), "it donates what it does not read")
        return
    if isinstance(instruction, AllReduceInstruction):
        require(part.slice_index in instruction.members, "a sum is without its own slice")
    require(instruction.edge_id not in edges, f"edge {instruction.edge_id} is used twice")
    edges.add(instruction.edge_id)
