"""A session without processes: runs the lowered parts of a program with plain PyTorch, in this process.

It lets capture, partitioning and lowering be tested for what they compute, in milliseconds. It is strict: a donated
buffer is gone, a value is moved only by a transfer, and parts run in an order that only their transfers decide.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
import time
import weakref
from collections import defaultdict

import torch

from torchways.controller.buffers import RemoteBuffer, tensor_from_bytes
from torchways.errors import UserError
from torchways.graphs import deserialize_graph, run_graph
from torchways.ids import SliceId
from torchways.ir.loops import unrolled
from torchways.ir.part import (
    NO_BUFFER,
    AllReduceInstruction,
    ComputeInstruction,
    ReceiveInstruction,
    SendInstruction,
    donated_slots,
    freed_slots,
)
from torchways.mesh import VirtualSlice
from torchways.rpc.clients import ExecutorAddress, SliceAddress
from torchways.rpc.spans import Span


class _Everything(frozenset):
    """Holds every operator name."""

    def __contains__(self, item):
        return True


class LocalSession:
    """See the module's docstring."""

    __module__ = "torchways.tests"  # as a session of ours, it is no state of the user's that traces watch

    closed = False

    def __init__(self, lowered_ops=None, budget_bytes=0, time_of=None):
        """Makes a session.

        Args:
            lowered_ops: operators that executors know; None: all.
            budget_bytes: device memory; 0: no limit.
            time_of: what an action of a loop seems to take, in microseconds, in place of what it takes.
        """
        self.slices = self.programs = self.runs = self.values = self
        self.lock = threading.RLock()
        self.buffers = {}
        self.pid = os.getpid()
        self.contents = defaultdict(dict)  # slice id -> buffer id -> tensor
        self.registered = {}
        self.num_runs = 0
        self.num_transfers = 0
        self.released = []
        self.budget_bytes = budget_bytes
        self._time_of = time_of
        self._spans = []
        self._next = 1
        self._lowered_ops = frozenset(lowered_ops) if lowered_ops is not None else None

    def check(self):
        pass

    def mesh(self, *shape, names=("dp",)):
        return VirtualSlice(shape=shape or (1,), mesh_dim_names=names, slice_id=SliceId(self.new_ids(1)))

    def address(self, mesh):
        executor = ExecutorAddress(
            executor_id=f"s{mesh.slice_id}",
            address="",
            data_address="",
            pid=0,
            lowered_ops=self._lowered_ops if self._lowered_ops is not None else _LOWERED,
            budget_bytes=self.budget_bytes,
        )
        return SliceAddress(slice_id=mesh.slice_id, island_id=0, scheduler_address="", executors=(executor,))

    def new_ids(self, count):
        first, self._next = self._next, self._next + count
        return first

    def put(self, buffer, mesh, placements):
        remote = RemoteBuffer(self, mesh, placements, self.new_ids(1))
        remote.origin = weakref.ref(buffer)
        self.contents[mesh.slice_id][remote.buffer_id] = buffer.read()
        return remote

    def fetch(self, buffer, timeout=None):
        found = self.contents[buffer.mesh.slice_id].get(buffer.buffer_id)
        if found is None:
            raise UserError(f"buffer {buffer.buffer_id} was donated")
        return found.clone()

    def start_fetch(self, buffer):
        future = concurrent.futures.Future()
        future.set_result(self.fetch(buffer))
        return future

    def is_ready(self, buffer):
        return True

    def release(self, slice_id, buffer_id):
        self.released.append(buffer_id)
        del self.contents[slice_id][buffer_id]

    def register(self, name, parts, meshes, traced_seconds=0.0):
        program_id = self.new_ids(1)
        parts = [unrolled(part) for part in parts]
        graphs = [[deserialize_graph(function.graph) for function in part.functions] for part in parts]
        self.registered[program_id] = (parts, [mesh.slice_id for mesh in meshes], graphs)
        return program_id

    def num_operators(self, name):
        """Returns how many operators of this name (without "aten" and overload) the registered programs have."""
        graphs = [graph for _, _, parts in self.registered.values() for part in parts for graph in part]
        targets = [str(node.target).split(".") for graph in graphs for node in graph.nodes]
        return sum(target[1:2] == [name] for target in targets)

    def forget(self, program_id):
        del self.registered[program_id]

    def wait_for_room(self, name):
        pass

    def wait(self, program_id, name):
        pass

    def wait_for(self, run_id):
        pass

    def compile_seconds(self, program_id):
        return None

    def send(self, program_id, name, results, arguments, *, changes_state):
        self.num_runs += 1
        run_id = self.new_ids(1)
        parts, slice_ids, graphs = self.registered[program_id]
        wires, runners = {}, []
        for part, part_graphs in zip(parts, graphs, strict=True):
            slice_id = slice_ids[part.slice_index]
            slots = {slot: torch.tensor(number) for slot, number in part.numbers}
            values = iter(arguments[slice_id].values)
            for slot, buffer_id in enumerate(arguments[slice_id].buffer_ids):
                is_value = buffer_id == NO_BUFFER
                slots[slot] = _tensor(next(values)) if is_value else self.contents[slice_id][buffer_id]
            runners.append(
                self._run_part(part, part_graphs, slots, arguments[slice_id].buffer_ids, slice_id, wires, run_id)
            )
        while runners:
            alive = [runner for runner in runners if next(runner, "end") != "end"]
            assert alive != runners or wires, "deadlock"
            runners = alive
        for part in parts:
            slice_id = slice_ids[part.slice_index]
            for slot, number in part.results:
                self.contents[slice_id][results.start + number] = self._finished[part.slice_index][slot]
        return run_id

    def collect_spans(self, since_ns):
        return {"local": [span for span in self._spans if span.end_ns >= since_ns]}

    def _note(self, kind, name, started_ns, run_id, part_of=None, edge_id=None, sent_bytes=0):
        ended_ns = time.time_ns()
        if part_of is not None and self._time_of is not None:
            started_ns = ended_ns - int(self._time_of(part_of.action) * 1e3)
        track = "device 0" if kind == "compute" else kind
        self._spans.append(Span(name, track, started_ns, ended_ns, run_id, part_of, sent_bytes, kind, edge_id=edge_id))

    def _run_part(self, part, graphs, slots, buffer_ids, slice_id, wires, run_id):
        for instruction, freed in zip(part.instructions, freed_slots(part), strict=True):
            match instruction:
                case ComputeInstruction():
                    started_ns = time.time_ns()
                    with torch.random.fork_rng(devices=[]):  # a graph may seed it
                        results = run_graph(
                            graphs[instruction.function_index], *(slots[slot] for slot in instruction.inputs)
                        )
                    for slot, result in zip(instruction.outputs, results, strict=True):
                        expected = part.slots[slot]
                        assert tuple(result.shape) == expected.shape
                        assert str(result.dtype) == f"torch.{expected.dtype}"
                        slots[slot] = result
                    name = part.functions[instruction.function_index].name
                    name += f" {instruction.part_of.action}" if instruction.part_of is not None else ""
                    self._note("compute", name, started_ns, run_id, instruction.part_of)
                    for slot in donated_slots(instruction):
                        del slots[slot]
                        if slot < len(buffer_ids) and buffer_ids[slot] != NO_BUFFER:
                            del self.contents[slice_id][buffer_ids[slot]]
                case SendInstruction():
                    wires[instruction.edge_id] = slots[instruction.slot]
                    self.num_transfers += 1
                    edge, value = instruction.edge_id, slots[instruction.slot]
                    name = f"send edge {edge} to @{instruction.peer}"
                    self._note("send", name, time.time_ns(), run_id, edge_id=edge, sent_bytes=value.nbytes)
                case ReceiveInstruction():
                    while instruction.edge_id not in wires:
                        yield "waiting"
                    slots[instruction.slot] = wires.pop(instruction.edge_id)
                    edge = instruction.edge_id
                    self._note("receive", f"receive edge {edge}", time.time_ns(), run_id, edge_id=edge)
                case AllReduceInstruction():
                    me = instruction.members.index(part.slice_index)
                    wires["sum", instruction.edge_id, me] = slots[instruction.input]
                    keys = [("sum", instruction.edge_id, member) for member in range(len(instruction.members))]
                    while not all(key in wires for key in keys):
                        yield "waiting"
                    slots[instruction.output] = sum(wires[key] for key in keys)
            for slot in freed:
                del slots[slot]
        if not hasattr(self, "_finished"):
            self._finished = {}
        self._finished[part.slice_index] = slots


def _tensor(value):
    if isinstance(value.data, bytes):
        return tensor_from_bytes(value.dtype, value.shape, bytearray(value.data))
    return torch.full(value.shape, value.data, dtype=getattr(torch, value.dtype))


_LOWERED = _Everything()
