"""How much memory a sequence of steps holds at a time.

Pre-flight asks it of a part's instructions (passes/preflight.py), and an executor of the units that it issues and of
the computations inside a unit (executor/plan.py). So both count alike, and a program that pre-flight found to fit does
fit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, KeysView, Sequence
from dataclasses import dataclass
from typing import Protocol

from torchways.ir.part import Instruction, Slot, donated_slots, reads, writes


class Step(Protocol):
    """Something that is carried out as a whole."""

    @property
    def reads(self) -> tuple[Slot, ...]:
        """The slots that it reads."""

    @property
    def writes(self) -> tuple[Slot, ...]:
        """The slots that it fills."""

    @property
    def donated(self) -> tuple[Slot, ...]:
        """Those of `reads` whose buffers it may reuse."""

    @property
    def need_bytes(self) -> int:
        """The most that it allocates at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionStep:
    """One instruction as a step: it allocates exactly what it fills."""

    reads: tuple[Slot, ...]
    writes: tuple[Slot, ...]
    donated: tuple[Slot, ...]
    need_bytes: int

    @classmethod
    def of(cls, instruction: Instruction, slot_bytes: Sequence[int]) -> InstructionStep:
        """Returns an instruction as a step."""
        made = writes(instruction)
        return cls(
            reads=reads(instruction),
            writes=made,
            donated=donated_slots(instruction),
            need_bytes=sum(slot_bytes[slot] for slot in made),
        )


def footprints(
    steps: Sequence[Step], slot_bytes: Sequence[int], *, held: Iterable[Slot], kept: Collection[Slot]
) -> Iterator[tuple[int, KeysView[Slot]]]:
    """Yields the memory that is held before the first step, and then while each of them runs.

    A slot's memory is taken when the slot is filled. It is given back by the step that donates it, or after the last
    step that reads it.

    Args:
        steps: in the order in which they run.
        slot_bytes: size of every slot's value.
        held: the slots that have memory before the first step. Slots that are only read, and are not among these,
            count for nothing: their memory is somebody else's.
        kept: slots that are not given back after their last reader; they may be donated.

    Yields:
        the bytes, and the slots that have memory then, among them those that the step donates. The view changes when
        the next item is asked for.
    """
    live = dict.fromkeys(held)
    nbytes = sum(slot_bytes[slot] for slot in live)
    last = {slot: position for position, step in enumerate(steps) for slot in (*step.reads, *step.writes)}
    yield nbytes, live.keys()
    for position, step in enumerate(steps):
        given_back = {slot for slot in step.donated if slot in live}
        nbytes -= sum(slot_bytes[slot] for slot in given_back)
        live.update(dict.fromkeys(step.writes))
        yield nbytes + step.need_bytes, live.keys()
        nbytes += sum(slot_bytes[slot] for slot in step.writes)
        for slot in given_back:
            del live[slot]
        for slot in {*step.reads, *step.writes}:
            if last[slot] == position and slot in live and slot not in kept:
                del live[slot]
                nbytes -= slot_bytes[slot]


def peak_bytes(
    steps: Sequence[Step], slot_bytes: Sequence[int], *, held: Iterable[Slot], kept: Collection[Slot]
) -> int:
    """Returns the most memory that is held at a time; see `footprints`."""
    return max(nbytes for nbytes, _ in footprints(steps, slot_bytes, held=held, kept=kept))
