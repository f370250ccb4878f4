"""The programs' parts that an executor has, from their arrival until they are dropped and their last run is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchways.executor.agenda import Agenda
from torchways.executor.cells import Cells
from torchways.executor.events import Compile, Place, ProgramCompiled, ReportLoaded, Unload
from torchways.executor.plan import LoadedProgram
from torchways.executor.runs import Cell, KnownProgram, Run
from torchways.ids import BufferId, PartId
from torchways.ir.part import NO_BUFFER


class Programs:
    """See the module's docstring.

    Attributes:
        known: the parts; those that were dropped stay until their last run is over.
    """

    def __init__(self, agenda: Agenda, cells: Cells) -> None:
        self.known: dict[PartId, KnownProgram] = {}
        self._agenda = agenda
        self._cells = cells

    def take(self, program: LoadedProgram) -> None:
        """Has a part compiled."""
        known = self.known[program.part] = KnownProgram(program)
        for slot, number in program.numbers:
            cell = known.numbers[slot] = Cell(scheduled=True, holders=1, slice_id=program.part.slice_id)
            self._agenda.commands.append(Place(cell=cell, part=program.part, slot=slot, data=number))
        self._agenda.commands.append(Compile(program=program))

    def compiled(self, event: ProgramCompiled) -> None:
        """Lets the runs go on that waited for it."""
        known = self.known.get(event.part)
        if known is not None:
            known.is_compiled, known.failure = True, event.failure
            if event.failure is None:
                self._drop_all_donated(known.to_donate)
            self._agenda.ready += known.waiting
            known.to_donate, known.waiting = [], []
        self._agenda.commands.append(ReportLoaded(part=event.part, failure=event.failure))

    def drop_donated(self, known: KnownProgram, buffer_ids: Sequence[BufferId], *, is_cancelled: bool) -> None:
        """Gives up the names that a run donates: now, or when its program is compiled; never if that failed.

        A run that came cancelled does so, too: the controller, which does not wait for word of that, has given them up.
        """
        donated = [buffer_ids[slot] for slot in known.program.donated_args if buffer_ids[slot] != NO_BUFFER]
        if is_cancelled:
            self._drop_all_donated(donated)
        elif not known.is_compiled:
            known.to_donate.extend(donated)
        elif known.failure is None:
            self._drop_all_donated(donated)

    def _drop_all_donated(self, buffer_ids: list[BufferId]) -> None:
        for buffer_id in buffer_ids:
            self._cells.drop(buffer_id, "was donated to a later computation")

    def end_run(self, run: Run) -> None:
        """A run is over."""
        known = run.known
        known.num_runs -= 1
        if known.is_dropped:
            self._drop(known)

    def drop(self, is_meant: Callable[[PartId], bool]) -> None:
        """Lets parts go, now or when their last runs are over."""
        for known in [known for part, known in self.known.items() if is_meant(part)]:
            self._drop(known)

    def _drop(self, known: KnownProgram) -> None:
        known.is_dropped = True
        if known.num_runs == 0:
            part = known.program.part
            del self.known[part]
            self._agenda.commands.append(Unload(part=part))
