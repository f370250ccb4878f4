"""What a run's slots hold when it comes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torchways.executor.cells import Cells
from torchways.executor.events import Place, RunEnqueued
from torchways.executor.names import Names
from torchways.executor.plan import LoadedProgram
from torchways.executor.runs import Cell, KnownProgram, Placing
from torchways.ids import BufferId, RunPart, owner
from torchways.ir.part import NO_BUFFER, Slot


@dataclass(slots=True)
class Bound:
    """The slots of a run.

    Attributes:
        cells: by slot.
        values: those of its arguments that came without a place on the devices.
        taken: names of such values that are for this run alone.
        value_bytes: what `values`, and those that are still to come, will take, bytes a device.
    """

    cells: list[Cell | None]
    values: list[Placing] = field(default_factory=list)
    taken: list[BufferId] = field(default_factory=list)
    value_bytes: int = 0


def refusal(event: RunEnqueued, program: LoadedProgram) -> str:
    """Returns why a run cannot be, or is none of its client's; empty if all is well."""
    client, arguments = owner(event.run_id), event.arguments
    if arguments is None:
        return "its arguments cannot be read"
    named: list[int] = [buffer_id for buffer_id in arguments.buffer_ids if buffer_id != NO_BUFFER]
    named += [event.first_buffer_id + number for _, number in program.results]
    if owner(event.part.program_id) != client or any(owner(identity) != client for identity in named):
        return "it names what belongs to another client"
    ids = arguments.buffer_ids
    if len(ids) != program.num_args:
        return f"it has {len(ids)} arguments, and its program takes {program.num_args}"
    if program.donated_args:
        count_of = Counter(ids)
        if any(count_of[ids[slot]] > 1 and ids[slot] != NO_BUFFER for slot in program.donated_args):
            return "it gives up a buffer that is another of its arguments, too"
    return ""


def bind(event: RunEnqueued, known: KnownProgram, names: Names, cells: Cells) -> Bound:
    """Returns what the slots of a run hold; it holds each of the cells once."""
    program, arguments = known.program, event.arguments
    assert arguments is not None
    part = RunPart(event.run_id, event.part.slice_id)
    forms = program.slot_forms or [""] * len(program.slot_bytes)
    found = Bound([None] * len(program.slot_bytes))

    def new_cell(slot: Slot) -> Cell:
        return Cell(
            program.slot_bytes[slot],
            holders=1,
            form=forms[slot],
            slice_id=part.slice_id,
            client_id=owner(event.run_id),
            payer=part,
        )

    for unit in program.units:
        for slot in unit.writes:
            found.cells[slot] = new_cell(slot)
    values = iter(arguments.values)
    for slot, buffer_id in enumerate(arguments.buffer_ids):
        if buffer_id == NO_BUFFER:
            cell = new_cell(slot)
            found.values.append(Placing(cell, Place(cell=cell, part=event.part, slot=slot, data=next(values))))
            found.value_bytes += cell.nbytes
        else:
            cell = names.find(buffer_id)
            cell.holders += 1
            if not cell.is_charged and not cell.scheduled and cell.payer is None:  # a Put that has no place yet
                cell.payer = part
                found.value_bytes += program.slot_bytes[slot]
                if cell.kept is not None:
                    found.values.append(cell.kept)
                    cells.forget_kept(cell)
                    found.taken.append(buffer_id)
        found.cells[slot] = cell
    for slot, cell in known.numbers.items():
        cell.holders += 1
        found.cells[slot] = cell
    return found
