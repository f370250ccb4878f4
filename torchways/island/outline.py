"""What operators are shown of a program: its instructions without its graphs, or their numbers where it is large."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from torchways.ids import ClientId
from torchways.rpc import torchways_pb2 as pb

#: A program with more instructions on an island than can be looked at one by one is counted.
MAX_INSTRUCTIONS = 2_000
#: ... and so is one that would make a large message all the same.
_MAX_BYTES = 2 << 20


@dataclass(slots=True)
class KeptOutline:
    """An outline that is kept. `content`: the message as bytes; empty: it is kept no more."""

    num_instructions: int
    content: bytes


class Outlines:
    """The outlines that are kept: of each client, those of its newest programs.

    Args:
        max_bytes: that those of one client may have together.
    """

    def __init__(self, max_bytes: int = 8 << 20) -> None:
        self._max_bytes = max_bytes
        self._of_client: dict[ClientId, deque[KeptOutline]] = {}
        self._bytes: Counter[ClientId] = Counter()

    def keep(self, client_id: ClientId, outline: pb.ProgramOutline) -> KeptOutline:
        """Keeps an outline, at the cost of the client's oldest."""
        kept = KeptOutline(outline.num_instructions, outline.SerializeToString())
        mine = self._of_client.setdefault(client_id, deque())
        mine.append(kept)
        self._bytes[client_id] += len(kept.content)
        while self._bytes[client_id] > self._max_bytes:
            oldest = mine.popleft()
            self._bytes[client_id] -= len(oldest.content)
            oldest.content = b""
        return kept

    def forget(self, client_id: ClientId) -> None:
        """Forgets a client that is gone."""
        self._of_client.pop(client_id, None)
        self._bytes.pop(client_id, None)


def outline_of(program: pb.RegisterProgram) -> pb.ProgramOutline:
    """Returns what the program of a client's message is; nothing of the message is kept alive by it."""
    outline = pb.ProgramOutline(program_id=program.program_id, name=program.name)
    outline.num_instructions = sum(1 for item in program.slices for _ in _instructions(item.part))
    if outline.num_instructions <= MAX_INSTRUCTIONS:
        outline.slices.extend(map(_without_graphs, program.slices))
        if outline.ByteSize() <= _MAX_BYTES:
            return outline
        outline.ClearField("slices")
    outline.summaries.extend(map(_summary, program.slices))
    return outline


def _without_graphs(item: pb.SliceProgram) -> pb.SliceProgram:
    part = item.part
    return pb.SliceProgram(
        slice_id=item.slice_id,
        mesh_shape=item.mesh_shape,
        part=pb.Part(
            slice_index=part.slice_index,
            functions=[
                pb.Function(name=function.name, source=function.source, num_operators=function.num_operators)
                for function in part.functions
            ],
            slots=part.slots,
            num_args=part.num_args,
            instructions=part.instructions,
            results=part.results,
        ),
    )


def _summary(item: pb.SliceProgram) -> pb.PartSummary:
    kinds: Counter[str] = Counter()
    sends: Counter[int] = Counter()
    for instruction in _instructions(item.part):
        kind = instruction.WhichOneof("instruction")
        kinds[kind or "unknown"] += 1
        if kind == "send":
            sends[instruction.send.peer] += 1
    return pb.PartSummary(
        slice_id=item.slice_id, slice_index=item.part.slice_index, num_instructions=kinds, num_sends=sends
    )


def _instructions(part: pb.Part) -> Iterator[pb.Instruction]:
    """Yields a part's instructions, with those of its loops' bodies."""
    for instruction in part.instructions:
        yield instruction
        for body in instruction.loop.bodies:
            for item in body.instructions:
                yield item.instruction
