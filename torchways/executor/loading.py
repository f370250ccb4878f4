"""Reads the message that loads a program's part: checks it, plans its units and finds its routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torchways.executor.checks import check_part, check_size
from torchways.executor.compiler import Call
from torchways.executor.plan import LoadedProgram, load_program
from torchways.executor.routes import find_routes
from torchways.ids import PartId, ProgramId, SliceId
from torchways.ir.loops import unrolled
from torchways.ir.part import LoopInstruction, SliceIndex
from torchways.ir.program import Function
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.convert import part_from_proto
from torchways.runtime.base import BufferSpec


@dataclass(slots=True, kw_only=True)
class PartCode:
    """What the engine keeps of a loaded part; the core has the rest.

    Attributes:
        functions: its compiled functions; their graphs are dropped once these are compiled.
        slots: what the runtime must know of each slot's buffer.
        peers: (executor id, data address) of all executors that it exchanges values with; as they were sent, with this
            executor among them, the addresses are signed.
        calls: by number of the unit, the computations of each unit that computes; empty until they are compiled.
        compiled_ns: when they were; Unix time.
        schedules: by number of a pipeline's loop, the name of its schedule.
        nbytes: of all of it, as it was sent.
    """

    functions: Sequence[Function]
    slots: Sequence[BufferSpec]
    peers: Sequence[tuple[str, str]]
    calls: dict[int, list[Call]] = field(default_factory=dict)
    compiled_ns: int = 0
    schedules: Mapping[int, str] = field(default_factory=dict)
    nbytes: int = 0

    def drop_graphs(self) -> None:
        """Forgets the graphs, which the runtime has read."""
        self.functions = [replace(function, graph=b"") for function in self.functions]


def read_program(
    message: pb.LoadProgram, executor_id: str, num_devices: int, budget_bytes: int
) -> tuple[LoadedProgram, PartCode]:
    """Returns what the core and what the engine keep of a program's part.

    Args:
        message: as a client sent it.
        executor_id: this executor.
        num_devices: devices of its set, on all hosts.
        budget_bytes: device memory, bytes per device; 0 means no limit.

    Raises:
        UserError: the part cannot be carried out.
    """
    program = message.program
    check_size(program)
    sent = part_from_proto(program.part)
    loops = [item for item in sent.instructions if isinstance(item, LoopInstruction)]
    schedules = {loop.number: loop.schedule for loop in loops if loop.number is not None}
    part = unrolled(sent)
    mesh = tuple(program.mesh_shape)
    hosts: dict[SliceIndex, list[str]] = {}
    for peer in program.peers:
        hosts.setdefault(peer.slice_index, []).append(peer.executor_id)
    hosts.setdefault(part.slice_index, [executor_id])
    check_part(part, mesh, hosts, num_devices=num_devices, executor_id=executor_id)
    slots = [
        BufferSpec(dtype=value.dtype, shape=value.shape, placements=value.placements, mesh=mesh) for value in part.slots
    ]
    num_slices = sum(executor_id in executors for executors in hosts.values())
    loaded = load_program(
        PartId(ProgramId(message.program_id), SliceId(program.slice_id)),
        message.name,
        part.num_args,
        [spec.device_nbytes for spec in slots],
        part.instructions,
        part.results,
        [spec.form for spec in slots],
        numbers=part.numbers,
        routes=find_routes(part, executor_id, hosts),
        limit_bytes=budget_bytes // num_slices,
    )
    peers = [(peer.executor_id, peer.data_address) for peer in program.peers]
    nbytes = program.ByteSize()
    return loaded, PartCode(functions=part.functions, slots=slots, peers=peers, schedules=schedules, nbytes=nbytes)
