"""The executor's core: it decides which unit can be issued, what a unit waits for, and what a failure poisons.

Pure: events go in, commands come out (events.py); no clock, no socket, no device. Device buffers are opaque objects
here: the shell puts them into cells, and a buffer is freed when nothing refers to its cell any more.

A run is a list of units (plan.py) over cells. A unit is issued when all cells that it reads are *scheduled*: filled, or
to be filled by a command that was given before. The shell carries out commands in order on one thread, so a computation
that reads the output of another is enqueued right behind it, long before that one ends.

The computations of a run are issued in the program's order, the one that pre-flight proved (passes/preflight.py); sends
and receives are not held up by it. Of several runs, the older goes first where both could. If devices are shared with
other executors, or with other hosts (`UnitGranted`), computations are issued only as the island's scheduler grants
them. With other hosts (a gang), all of them issue a unit or none does: what was reported ready does not fail here alone
any more, and what fails before is reported, and fails on all (`UnitRefused`).

A run's memory (memory.py) is allocated in the program's order too: memory for a value that is received is set aside
when its turn comes, whether it has arrived or not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, assert_never

from torchways.errors import Failure, InternalError
from torchways.executor.agenda import Agenda
from torchways.executor.binding import bind, refusal
from torchways.executor.cells import Cells
from torchways.executor.events import (
    BufferPut,
    BuffersDropped,
    ClientDropped,
    Command,
    Event,
    Execute,
    FetchCancelled,
    FetchEnded,
    FetchRequested,
    GrantsNeeded,
    MemoryStalled,
    PeerLost,
    PeerReopened,
    Place,
    ProgramArrived,
    ProgramCompiled,
    ProgramDropped,
    Reduce,
    Reduced,
    ReportEnded,
    ReportReady,
    RunCancelled,
    RunEnqueued,
    Send,
    SliceDropped,
    TransferArrived,
    UnitFinished,
    UnitGranted,
    UnitRefused,
)
from torchways.executor.failures import Failures
from torchways.executor.grants import Grants
from torchways.executor.mailbox import Mailbox
from torchways.executor.memory import Memory, Taker
from torchways.executor.names import Names
from torchways.executor.programs import Programs
from torchways.executor.runs import Cell, Placing, Run, Task, lowest
from torchways.ids import BufferId, ClientId, RunId, RunPart, SliceId, owner
from torchways.ir.part import ComputeInstruction, ReceiveInstruction, SendInstruction

#: Ids of dropped buffers that are remembered, to tell "gone" from "not there yet".
_MAX_REMEMBERED = 200_000
#: Values of a client that may wait for memory on the devices, and their bytes.
_MAX_WAITING, _MAX_WAITING_BYTES = 10_000, 1 << 30
_TAKEN = "was an argument of one call"


class ExecutorState:
    """See the module's docstring.

    Args:
        executor_id: for messages.
        budget_bytes: device memory, bytes a device; 0: no limit.
        client_bytes: of it, what one client may have; 0: no limit.
        gang: this is one of several hosts that compute together.
        max_remembered: ids of dropped buffers, slices and clients that are kept for what may still come about them.
    """

    def __init__(
        self,
        executor_id: str,
        *,
        budget_bytes: int = 0,
        client_bytes: int = 0,
        gang: bool = False,
        max_remembered: int = _MAX_REMEMBERED,
    ) -> None:
        self._failure = Failures(executor_id)
        #: Runs that are not over, in their order.
        self.runs: dict[RunPart, Run] = {}
        self.memory = Memory(budget_bytes, self.runs, client_bytes)
        self.names = Names(self._failure, max_remembered)
        self.grants = Grants(is_gang=gang)
        self.mailbox = Mailbox()
        self._agenda = Agenda()
        self._cells = Cells(self._agenda, self.memory, self.names)
        self.programs = Programs(self._agenda, self._cells)
        #: Of each client, the newest run that has come.
        self.newest_runs: dict[ClientId, RunId] = {}
        #: Computations and sends that have not ended; while there are some, memory may yet be freed.
        self._in_flight = 0

    def handle(self, event: Event) -> list[Command]:
        """Takes an event; returns what to do, in order."""
        match event:
            case RunEnqueued():
                self._enqueue(event)
            case RunCancelled():
                self._cancel(event)
            case UnitFinished():
                self._unit_finished(event.task, event.failure)
            case TransferArrived():
                self._transfer_arrived(event)
            case Reduced():
                self._reduced(event)
            case UnitGranted():
                self._note_wait(event)
                self.grants.granted.append((event.run, event.unit))
                self._issue_granted()
            case UnitRefused():
                self._refuse_grant(event)
            case GrantsNeeded():
                commands, freed = self.grants.set_needed(event.needed, event.epoch)
                self._agenda.commands += commands
                self._agenda.ready += freed
            case FetchRequested():
                self._cells.fetch(event)
            case FetchCancelled():
                self._cells.cancel_fetch(event.fetch_id)
            case FetchEnded():
                self._cells.end_fetch(event.cell)
            case BufferPut():
                self._put(event)
            case BuffersDropped():
                for buffer_id in event.buffer_ids:
                    self._cells.drop(buffer_id, "was released")
            case ProgramArrived():
                self.programs.take(event.program)
            case ProgramCompiled():
                self.programs.compiled(event)
            case PeerLost():
                self._lose(event.peer, self.newest_runs, event.failure)
            case PeerReopened():
                known = {client: run for client, run in event.newest.items() if not self.names.is_gone(client)}
                self._lose(event.peer, known, event.failure)
            case ProgramDropped():
                program_id = event.program_id
                self.programs.drop(lambda part: part.program_id == program_id)
            case SliceDropped():
                self._drop_slice(event.slice_id)
            case ClientDropped():
                self._drop_client(event.client_id)
            case MemoryStalled():
                self._memory_stalled(event.seconds, event.time_ns)
            case _:
                assert_never(event)
        if self._agenda.ready:
            self._issue_ready()
        return self._agenda.take_commands()

    def num_entries(self) -> dict[str, int]:
        """Returns how many entries each collection has: one that grows with the number of runs leaks."""
        holders = (self, self.memory, self.names, self.grants, self.mailbox, self.programs, self._cells, self._agenda)
        return {
            name.strip("_"): len(value)
            for holder in holders
            for name, value in vars(holder).items()
            if isinstance(value, dict | list | deque | set)
        }

    # ---- runs

    def _enqueue(self, event: RunEnqueued) -> None:
        known, part = self.programs.known.get(event.part), RunPart(event.run_id, event.part.slice_id)
        client_id = owner(event.run_id)
        if not self.names.is_gone(client_id):
            self.newest_runs[client_id] = max(event.run_id, self.newest_runs.get(client_id, event.run_id))
        if known is None or known.is_dropped:
            failure = self._failure("InternalError", f"run {event.run_id} names {event.part}, which is not loaded")
            self._agenda.commands.append(ReportEnded(run=part, failure=failure))
            return
        program = known.program
        reason = refusal(event, program)
        results = [BufferId(event.first_buffer_id + number) for _, number in program.results]
        if not reason and any(map(self.names.is_made, results)):
            reason = "it makes buffers that are there already"
        if reason:
            failure = self._failure("AccessDenied", f"run {event.run_id} of {program.name} is refused: {reason}")
            for buffer_id in results:
                if owner(buffer_id) == client_id and not self.names.is_made(buffer_id):
                    self._cells.name(buffer_id, Cell(scheduled=True, failure=failure, slice_id=part.slice_id))
            self._agenda.commands.append(ReportEnded(run=part, failure=failure))
            return
        bound = bind(event, known, self.names, self._cells)
        for slot, number in program.results:
            result = bound.cells[slot]
            assert result is not None
            self._cells.name(BufferId(event.first_buffer_id + number), result)
        reads_left = dict(program.read_counts)
        peak_bytes = program.peak_bytes if event.cancelled is None else 0
        run = Run(
            program,
            known,
            event.run_id,
            event.sequence,
            bound.cells,
            reads_left,
            len(program.units),
            reserved_bytes=max(0, peak_bytes + bound.value_bytes),
            cancelled=event.cancelled,
            checks_values=event.checks_values,
            came_ns=event.time_ns,
        )
        self.runs[part] = run
        known.num_runs += 1
        self.memory.enqueue(run)
        for value in bound.values:
            self._try_place(value)
        for slot, count in program.read_counts:
            run.cells[slot].readers += count  # type: ignore[union-attr]
        for slot in (*range(program.num_args), *known.numbers):
            if slot not in reads_left:
                self._cells.leave(run, slot)
        for buffer_id in bound.taken:
            self._cells.drop(buffer_id, _TAKEN)
        assert event.arguments is not None
        self.programs.drop_donated(known, event.arguments.buffer_ids, is_cancelled=event.cancelled is not None)
        if not program.units:
            self._end_run(run)
            return
        run.tasks = [Task(run, unit, number) for number, unit in enumerate(program.units)]
        run.in_order = [task for task in run.tasks if _takes_memory(task)]
        if known.is_compiled or event.cancelled is not None:
            self._agenda.ready += run.tasks
        else:
            known.waiting.extend(run.tasks)

    def _cancel(self, event: RunCancelled) -> None:
        run = self.runs.get(event.run)
        if run is not None:
            self._end_early(run, event.failure)

    def _end_early(self, run: Run, failure: Failure) -> None:
        """Fails what a run has not begun, but for what other hosts rely on, and what reads that; once."""
        if run.cancelled is not None:
            return
        run.cancelled = failure
        promised = {slot for task in run.tasks if task.is_promised for slot in task.unit.writes}
        open_tasks = [task for task in run.tasks if not task.issued]
        self._agenda.ready += [task for task in open_tasks if promised.isdisjoint(task.unit.reads)]

    @staticmethod
    def _is_next(task: Task) -> bool:
        run = task.run
        return run.num_passed < len(run.in_order) and run.in_order[run.num_passed] is task

    def _pass(self, task: Task) -> None:
        """What comes behind a task in its run need not wait for it any more."""
        run = task.run
        task.has_passed = True
        if not self._is_next(task):
            return
        while run.num_passed < len(run.in_order) and run.in_order[run.num_passed].has_passed:
            run.num_passed += 1
        if run.num_passed < len(run.in_order):
            self._agenda.ready.append(run.in_order[run.num_passed])

    def _issue_ready(self) -> None:
        """Issues every task that can be; a poisoned one poisons what it fills, at once."""
        while batch := self._agenda.take_ready():
            if len(batch) > 1:
                batch.sort(key=self.memory.priority)
            for item in batch:
                if isinstance(item, Placing):
                    if not item.issued:
                        self._try_place(item)
                elif not item.issued:
                    self._try_issue(item)
                elif not item.has_passed:
                    self._try_take_memory(item)

    def _try_issue(self, task: Task) -> None:
        run, unit = task.run, task.unit
        cells = run.cells
        instruction = unit.instructions[0]
        if isinstance(instruction, ComputeInstruction) and (not self._is_next(task) or task.is_promised):
            return  # looked at again when it is, or issued or refused as all hosts agree
        failure = task.refusal or run.cancelled or run.known.failure
        misfit: Failure | None = None
        for slot in unit.reads:
            cell = cells[slot]
            if not cell.scheduled and failure is None:  # type: ignore[union-attr]
                cell.waiters.append(task)  # type: ignore[union-attr]
                task.awaited_input = True
                return
        if failure is None:
            failure = misfit = self._misfit(task)
        if isinstance(instruction, ComputeInstruction):
            self._try_compute(task, failure)
            return
        task.issued = True
        if isinstance(instruction, ReceiveInstruction):
            self._issue_receive(task, instruction)
            self._try_take_memory(task)
            return
        self._in_flight += 1
        cell = cells[unit.reads[0]]
        assert cell is not None
        if failure is not None and (failure is misfit or not cell.scheduled):
            cell = Cell(scheduled=True, failure=failure)
        if isinstance(instruction, SendInstruction):
            self._agenda.commands.append(Send(task=task, instruction=instruction, cell=cell))
        else:
            self._agenda.commands.append(Reduce(task=task, instruction=instruction, cell=cell))
            self._try_take_memory(task)

    def _misfit(self, task: Task) -> Failure | None:
        """Returns the failure of a task that would read an argument of another dtype or shape than it is made for."""
        program = task.run.program
        for slot in task.unit.reads:
            if slot < program.num_args and program.slot_forms:
                found, needed = task.run.cells[slot].form, program.slot_forms[slot]  # type: ignore[union-attr]
                if found and found != needed:
                    return self._failure(
                        "UserError",
                        f"argument {slot} of {task} is an array of {found}, and the program was traced for {needed}: "
                        "an array was given another dtype or shape; call the program again, to trace it anew",
                    )
        return None

    def _try_compute(self, task: Task, failure: Failure | None) -> None:
        unit, cells = task.unit, task.run.cells
        if failure is None:
            known = [cells[slot].failure for slot in unit.reads]  # type: ignore[union-attr]
            failures = [item for item in known if item is not None]
            # Of several computations, those that can run do: the shell sees to it. But not those that other hosts have
            # a part in, where all may be able to run.
            if failures and (len(unit.instructions) == 1 or len(failures) == len(known) or self.grants.is_gang):
                failure = lowest(failures)
        if failure is None and any(cells[slot].names for slot in unit.donated):  # type: ignore[union-attr]
            # What has that name would be lost, and whoever reads it would wait for ever.
            failure = self._failure("InternalError", f"{task} gives up a value that has another name")
        if failure is not None:
            task.issued = True
            self._fail_task(task, failure)
            return
        for slot in unit.donated:
            cell = cells[slot]
            if cell.readers > 1:  # type: ignore[union-attr]
                cell.waiters.append(task)  # type: ignore[union-attr]
                return
        if not self._may_allocate(task):
            return
        if self.grants.needed:
            if self.grants.ask(task):
                task.is_reported = self.grants.is_gang
                inputs = task.cells_of(unit.reads) if self.grants.is_gang else ()
                self._agenda.commands.append(ReportReady(run=task.run.part, unit=task.number, inputs=inputs))
            self._issue_granted()
        else:
            self._issue_compute(task)

    def _note_wait(self, event: UnitGranted) -> None:
        run = self.runs.get(event.run)
        if run is not None and event.unit < len(run.tasks):
            run.tasks[event.unit].held_for = event.held_for

    def _refuse_grant(self, event: UnitRefused) -> None:
        """Fails what a host of the gang cannot compute, when its turn comes."""
        run = self.runs.get(event.run)
        if run is None or run.tasks[event.unit].issued:
            return  # it has failed here, too
        task = run.tasks[event.unit]
        task.refusal = event.failure
        self.grants.refuse(task)
        self._agenda.ready.append(task)

    def _issue_granted(self) -> None:
        """Issues what is ready at the head of the granted order; a unit that failed here is passed over.

        Raises:
            InternalError: it is not ready here, though all hosts of a gang issue it.
        """
        grants = self.grants
        while grants.granted:
            part, number = key = grants.granted[0]
            run, task = self.runs.get(part), grants.asking(key)
            is_issued = False
            if task is None and grants.is_gang:
                # The other hosts' devices wait for it. This executor must end, so that they do.
                raise InternalError(f"unit {number} of run {part.run_id} is granted, but was not reported ready here")
            if run is not None and not run.tasks[number].issued:
                # A gang's unit had room when it was reported ready. Its run keeps that, but for what it takes over from
                # a run that has not ended, which counts twice until then: not for long, and not on the devices.
                if task is None or (not grants.is_gang and not self._may_allocate(task) and not task.issued):
                    return
                if not task.issued:
                    self._issue_compute(task)
                    is_issued = True
            self._agenda.commands += grants.take_first(is_issued=is_issued)

    def _issue_compute(self, task: Task) -> None:
        task.issued = True
        unit = task.unit
        self._in_flight += 1
        self.grants.begin(task)
        outputs = task.cells_of(unit.writes)
        self.memory.begin_compute(task, outputs)
        inputs = task.cells_of(unit.reads)
        self._agenda.commands.append(Execute(task=task, inputs=inputs, outputs=outputs))
        for cell in outputs:
            self._cells.schedule(cell)
        for cell in inputs:  # a donation that is issued later also runs later: it need not wait
            self._cells.end_reader(cell)
        self._pass(task)

    def _issue_receive(self, task: Task, instruction: ReceiveInstruction) -> None:
        found = self.mailbox.receive(task, instruction.edge_id)
        if isinstance(found, TransferArrived):
            self._receive(task, found)
        elif found is not None:
            self._fail_task(task, found)
        elif self.names.is_gone(owner(task.run.run_id)):
            self._fail_task(task, self.names.client_gone())
        else:
            self.mailbox.expect(task, instruction.edge_id)

    def _receive(self, task: Task, arrived: TransferArrived) -> None:
        if task.has_ended:
            return
        if arrived.failure is not None:
            self._fail_task(task, arrived.failure)
        else:
            self._fill(task, arrived.data)

    def _fill(self, task: Task, data: Any) -> None:
        """Places a received value, at once or when it has memory."""
        [slot] = task.unit.writes or (None,)
        cell = task.run.cells[slot] if slot is not None else None
        if slot is None or cell is None:  # nobody reads it, or who would has failed already
            self._pass(task)
            self._end_unit(task, None)
            return
        task.arrived = Place(cell=cell, part=task.run.program.part, slot=slot, data=data)
        if task.has_passed:
            self._place_arrived(task)

    def _place_arrived(self, task: Task) -> None:
        assert task.arrived is not None
        self._agenda.commands.append(task.arrived)
        self._cells.schedule(task.arrived.cell)
        task.arrived = None
        self._end_unit(task, None)

    def _try_take_memory(self, task: Task) -> None:
        """Sets memory aside for what a task receives, when its turn has come."""
        if not self._is_next(task) or task.has_ended:
            return
        cells: list[Cell | None] = [task.run.cells[slot] for slot in task.unit.writes]
        if any(cells) and not self._may_allocate(task):
            return
        for cell in cells:
            if cell is not None:  # else who would read it has failed already
                self.memory.charge(cell)
        self._pass(task)
        if task.arrived is not None:
            self._place_arrived(task)

    def _reduced(self, event: Reduced) -> None:
        self._in_flight -= 1
        task = event.task
        if task.has_ended:
            return
        for cell in task.cells_of(task.unit.reads):
            self._cells.end_reader(cell)
        if event.failure is not None:
            self._fail_task(task, event.failure, end_readers=False)
        else:
            self._fill(task, event.data)

    def _unit_finished(self, task: Task, failure: Failure | None) -> None:
        self._in_flight -= 1
        unit = task.unit
        if isinstance(unit.instructions[0], SendInstruction):
            for cell in task.cells_of(unit.reads):
                self._cells.end_reader(cell)
        else:
            self.memory.end_compute(task)
            self._agenda.commands += self.grants.end(task)
        self._end_unit(task, failure)

    def _fail_task(self, task: Task, failure: Failure, *, end_readers: bool = True) -> None:
        """Poisons what a task would have filled, and ends it."""
        if self.grants.is_gang and not task.is_reported and isinstance(task.unit.instructions[0], ComputeInstruction):
            task.is_reported = True
            self._agenda.commands.append(ReportReady(run=task.run.part, unit=task.number, failure=failure))
        for slot in task.unit.writes:
            cell = task.run.cells[slot]
            if cell is not None:  # else all that would read it has failed already
                self._cells.poison(cell, failure)
        if end_readers:
            for read in task.cells_of(task.unit.reads):
                self._cells.end_reader(read)
        self._pass(task)
        self._end_unit(task, failure)

    def _end_unit(self, task: Task, failure: Failure | None) -> None:
        run, unit = task.run, task.unit
        task.has_ended = True
        if failure is not None:
            run.failure = lowest([run.failure, failure])
        for slot in unit.reads:
            run.reads_left[slot] -= 1
            if run.reads_left[slot] == 0:
                self._cells.leave(run, slot)
        for slot in unit.writes:
            if run.reads_left.get(slot, 0) == 0:
                self._cells.leave(run, slot)
        run.units_left -= 1
        if run.units_left == 0:
            self._end_run(run)
        self._cells.memory_freed()

    def _end_run(self, run: Run) -> None:
        del self.runs[run.part]
        self.memory.end(run)
        self._agenda.commands.append(ReportEnded(run=run.part, failure=run.failure, device_ns=run.device_ns))
        self.programs.end_run(run)

    # ---- memory

    def _may_allocate(self, item: Taker) -> bool:
        """Whether an item fits into the budget; if not, it waits, or fails because it never will."""
        if self.memory.has_room(item):
            return True
        if reason := self.memory.why_never(item):
            self._refuse(item, reason)
        else:
            self.memory.starved.append(item)
        return False

    def _refuse(self, item: Taker, reason: str) -> None:
        if isinstance(item, Task) and item.is_promised:
            return  # it has had room since
        item.issued = True
        message = f"{item} is refused: {reason}. Use a larger slice, or shard its values"
        failure = self._failure("ResourceExhausted", message)
        if isinstance(item, Task):
            self._fail_task(item, failure)
        else:
            self._cells.poison(item.cell, failure)

    def _memory_stalled(self, seconds: float, now_ns: int) -> None:
        memory = self.memory
        for item, reason in memory.stalled_at_limits(seconds, now_ns):
            if not isinstance(item, Run):
                memory.starved.remove(item)
                self._refuse(item, reason)
            else:
                message = f"run {item.run_id} of {item.program.name} is refused: {reason}"
                self._end_early(item, self._failure("ResourceExhausted", message))
        if self._in_flight:
            return
        owned = sorted(self.names.client_bytes().items())
        held = ", ".join(f"client {client}: {size:,} bytes" for client, size in owned)
        for item in memory.stalled(seconds, now_ns):
            memory.starved.remove(item)
            self._refuse(
                item,
                f"it waited {seconds:g} s for {item.need_bytes:,} bytes a device while {memory.used_bytes:,} were in "
                f"use (arrays that clients hold: {held or 'none'}); drop arrays that you no longer need. The budget is "
                f"{memory.budget_bytes:,} bytes",
            )

    def _try_place(self, item: Placing) -> None:
        if item.cell.holders == 0:  # released before it had a place
            item.issued = True
            return
        if not self._may_allocate(item):
            return
        item.issued = True
        self.memory.charge(item.cell)
        self._agenda.commands.append(item.command)
        self._cells.schedule(item.cell)

    def _put(self, event: BufferPut) -> None:
        cell = self.names.find_for_put(event.buffer_id, event.slice_id)
        if cell is None:
            return
        cell.form = event.form
        cell.nbytes = event.nbytes
        cell.slice_id = event.slice_id
        cell.client_id = owner(event.buffer_id)
        placing = Placing(cell, Place(cell=cell, data=event.data, spec=event.spec), came_ns=event.time_ns)
        if event.for_run and cell.payer is not None:  # its run is here, and all that has it
            self._cells.drop(event.buffer_id, _TAKEN)
        elif event.for_run and not cell.scheduled and cell.kept is None and self._cells.keep(placing):
            return  # before its run it has no place: it would take what earlier runs need
        if cell.payer is None and self._waits_too_much(placing):
            self._refuse(placing, f"its client has {_MAX_WAITING_BYTES:,} bytes of values that wait for memory already")
            return
        self._try_place(placing)

    def _waits_too_much(self, item: Placing) -> bool:
        """Whether a value must wait, and its client has too much that waits: it is in host memory meanwhile."""
        if self.memory.has_room(item):
            return False
        waiting = [other for other in self.memory.starved if isinstance(other, Placing)]
        sizes = [other.need_bytes for other in waiting if other.cell.client_id == item.cell.client_id]
        return len(sizes) >= _MAX_WAITING or sum(sizes) + item.need_bytes > _MAX_WAITING_BYTES

    # ---- transfers and drops

    def _lose(self, peer: str, newest: Mapping[ClientId, RunId], failure: Failure) -> None:
        for task in self.mailbox.lose(peer, newest, failure):
            self._fail_task(task, failure)

    def _transfer_arrived(self, event: TransferArrived) -> None:
        if self.mailbox.broken.failure(event.peer, event.run_id) is not None:
            return  # who would receive it has failed
        task = self.mailbox.arrive(event)
        if task is not None:
            self._receive(task, event)
        elif not self.names.is_gone(owner(event.run_id)):
            self.mailbox.keep(event)

    def _drop_slice(self, slice_id: SliceId) -> None:
        """Frees the buffers and programs on a slice; runs that are in flight on it go on."""
        self.names.forget_slice(slice_id)
        for buffer_id in self.names.on_slice(slice_id):
            self._cells.drop(buffer_id, "was on a mesh that is closed")
        self.programs.drop(lambda part: part.slice_id == slice_id)

    def _drop_client(self, client_id: ClientId) -> None:
        self.names.forget_client(client_id)
        self.newest_runs.pop(client_id, None)
        for buffer_id in self.names.of_client(client_id):
            self._cells.drop(buffer_id, "belonged to a client that is gone")
        self.programs.drop(lambda part: owner(part.program_id) == client_id)
        for run in [run for run in self.runs.values() if run.client_id == client_id]:
            self._end_early(run, self.names.client_gone())
        receiving = self.mailbox.drop_client(client_id)
        for cell in self.names.give_up_expected(client_id):
            self._cells.schedule(cell)
        for task in receiving:
            self._fail_task(task, self.names.client_gone())


def _takes_memory(task: Task) -> bool:
    """Whether a task has a turn in its run's order."""
    return bool(task.unit.writes) or isinstance(task.unit.instructions[0], ComputeInstruction)
