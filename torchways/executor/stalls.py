"""Runs that have made no progress for long: what each never did, and what it waits for, in one line for people.

Of each client's runs on an executor, the oldest is the one that others wait for; only that one is named.

Pure: the time comes with each check, and the shell says what a computation is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torchways.executor.memory import Taker
from torchways.executor.runs import Cell, Placing, Run, Task
from torchways.executor.state import ExecutorState
from torchways.ids import ClientId, RunPart, owner
from torchways.ir.part import AllReduceInstruction, ComputeInstruction, ReceiveInstruction, SendInstruction

#: Returns what a computation is called, and its user's line.
Describe: TypeAlias = Callable[[Task], str]

#: Clients that are named as holding memory.
_MAX_HOLDERS = 4


@dataclass(slots=True)
class _Mark:
    """The oldest run of a client: how far it is, since when, what it waits for, and whether that was logged."""

    run: RunPart
    progress: tuple[int, int, bool]
    since: float
    line: str = ""
    is_logged: bool = False


class Stalls:
    """See the module's docstring.

    Args:
        after: seconds without progress from which on a run is named.
        place: what the executor has: "island 0 devices 0 1".
        describe: see `Describe`.
    """

    def __init__(self, after: float, place: str, describe: Describe) -> None:
        self.after = after
        self._place = place
        self._describe = describe
        self._marks: dict[ClientId, _Mark] = {}

    def lines(self) -> list[tuple[ClientId, str]]:
        """Returns the runs that are stalled as of the last check, each with its client."""
        return [(client_id, mark.line) for client_id, mark in self._marks.items() if mark.is_logged]

    def check(self, state: ExecutorState, now: float) -> list[str]:
        """Looks at all runs; returns what to log: of each stall one line, and one when it is over."""
        oldest: dict[ClientId, Run] = {}
        for run in state.runs.values():
            known = oldest.setdefault(owner(run.run_id), run)
            if run.sequence < known.sequence:
                oldest[owner(run.run_id)] = run
        log: list[str] = []
        for client_id, mark in list(self._marks.items()):
            current = oldest.get(client_id)
            if current is None or (current.part, _progress(current)) != (mark.run, mark.progress):
                if mark.is_logged:
                    outcome = "goes on" if mark.run in state.runs else "is over"
                    log.append(f"run {mark.run.run_id} {outcome}, after {now - mark.since:.0f} s without progress")
                del self._marks[client_id]
        for client_id, run in oldest.items():
            mark = self._marks.setdefault(client_id, _Mark(run.part, _progress(run), now))
            reason = self._reason(state, run)
            if not reason:
                mark.since = now  # it waits for what goes on
            elif now - mark.since >= self.after:
                seconds = f"{now - mark.since:.0f} s"
                mark.line = f"run {run.run_id} of {run.program.name} (client {client_id}) waits {seconds}: {reason}"
                if not mark.is_logged:
                    mark.is_logged = True
                    log.append(mark.line)
        return log

    def _reason(self, state: ExecutorState, run: Run) -> str:
        """Returns what a run never did, and what that waits for; "" where it waits its turn behind others."""
        if not run.known.is_compiled:
            return f"{self._place} never began it; it waits for its compilation"
        task = _first_open(run)
        if task is None:
            return ""
        if task.issued and isinstance(task.unit.instructions[0], ComputeInstruction):
            is_first = not any(_computes(other) for other in state.runs.values() if other.sequence < run.sequence)
            return f"{self._place} never finished {self._describe(task)}; it is on the devices" if is_first else ""
        cause = self._cause(state, task)
        return f"{self._place} never {self._deed(task)}; it waits for {cause}" if cause else ""

    def _deed(self, task: Task) -> str:
        match task.unit.instructions[0]:
            case SendInstruction(edge_id=edge):
                return f"sent edge {edge}"
            case ReceiveInstruction(edge_id=edge):
                return f"received edge {edge}"
            case AllReduceInstruction(edge_id=edge):
                return f"summed edge {edge}"
        return f"enqueued {self._describe(task)}"

    def _cause(self, state: ExecutorState, task: Task) -> str:
        run, first = task.run, task.unit.instructions[0]
        if not task.issued:
            for slot in task.unit.reads:
                cell = run.cells[slot]
                if cell is not None and not cell.scheduled:
                    maker = next((other for other in run.tasks if slot in other.unit.writes), None)
                    return self._cause(state, maker) if maker is not None else _of_argument(state, run, slot, cell)
        if not task.has_passed and (not run.admitted or task in state.memory.starved):
            return _of_memory(state, run, task)
        if isinstance(first, ReceiveInstruction):
            return f"a value from executor {run.program.routes.senders[first.edge_id]} (edge {first.edge_id})"
        if isinstance(first, AllReduceInstruction) and task.issued:
            members = dict.fromkeys(run.program.routes.sums[first.edge_id].members)
            return f"the values of executors {', '.join(members)}"
        if isinstance(first, SendInstruction) and task.issued:
            peers = run.program.routes.targets[first.edge_id]
            return f"its value to be computed, and executors {', '.join(peers)} to take it"
        if task.number in state.grants.units_of(run.part):
            if state.grants.is_gang:
                return "its grant: other hosts are not ready, or executors that share these devices come first"
            return "its grant: other executors that share these devices come first"
        if any(run.cells[slot].readers > 1 for slot in task.unit.donated):  # type: ignore[union-attr]
            return "others to read a value that it overwrites"
        return ""


def waiting_for(state: ExecutorState, client_id: int = 0) -> list[str]:
    """Returns, for people, what each run in flight waits for: those of a client, or (0) of all."""
    memory = state.memory
    lines = [
        f"{item} waits for {item.need_bytes:,} bytes of device memory: {memory.used_bytes:,} of "
        f"{memory.budget_bytes:,} are used"
        for item in memory.starved
        if client_id in (0, _owner_of(state, item))
    ]
    for run in state.runs.values():
        if client_id not in (0, owner(run.run_id)):
            continue
        if not run.known.is_compiled:
            lines.append(f"run {run.run_id} of {run.program.name}: its compilation")
            continue
        empty = [slot for slot, cell in enumerate(run.cells) if cell is not None and not cell.scheduled]
        receives, ungranted = state.mailbox.edges_of(run.run_id), state.grants.units_of(run.part)
        lines.append(
            f"run {run.run_id} of {run.program.name}: {run.units_left} units left; empty slots {empty[:8]}; "
            f"receives edges {receives[:8]}" + (f"; grants of units {ungranted[:8]}" if ungranted else "")
        )
    return lines


def _owner_of(state: ExecutorState, item: Taker) -> ClientId:
    """Returns whose a task or value is; 0 if a value has no name any more."""
    if isinstance(item, Task):
        return owner(item.run.run_id)
    payer = item.cell.payer
    return owner(payer.run_id) if payer is not None else state.names.owner_of(item.cell)


def action_text(task: Task, schedules: Mapping[int, str]) -> str:
    """Returns what a computation is of a pipeline's schedule, for people; "" where it is of none.

    `schedules`: the names of those of its program's loops, by number.
    """
    first = task.unit.instructions[0]
    if not isinstance(first, ComputeInstruction) or first.part_of is None:
        return ""
    action, name = first.part_of.action, schedules.get(first.part_of.loop, "")
    named = f"{name}, " if name else ""
    return f" ({named}stage {action.stage}, {action.kind.name.lower()}, microbatch {action.microbatch})"


def _progress(run: Run) -> tuple[int, int, bool]:
    return run.units_left, run.num_passed, run.known.is_compiled


def _first_open(run: Run) -> Task | None:
    """Returns the task that what follows in a run waits for."""
    if run.num_passed < len(run.in_order):
        return run.in_order[run.num_passed]
    return next((task for task in run.tasks if not task.has_ended), None)


def _computes(run: Run) -> bool:
    return any(
        task.issued and not task.has_ended and isinstance(task.unit.instructions[0], ComputeInstruction)
        for task in run.tasks
    )


def _of_argument(state: ExecutorState, run: Run, slot: int, cell: Cell) -> str:
    """Returns why an argument is not there; "" where an older run makes it, which says more."""
    if any(other is not run and _makes(other, cell) for other in state.runs.values()):
        return ""
    starved = next((item for item in state.memory.starved if isinstance(item, Placing) and item.cell is cell), None)
    if starved is not None:
        return _of_memory(state, run, starved)
    return f"its argument {slot}, which neither its client nor an earlier run has brought"


def _makes(run: Run, cell: Cell) -> bool:
    return any(found is cell for found in run.cells[run.program.num_args :])


def _of_memory(state: ExecutorState, run: Run, taker: Taker) -> str:
    memory = state.memory
    if not run.admitted:
        if not memory.waits_for_room(run):
            return ""
        need = run.reserved_bytes
        if memory.is_at_limit(run):
            used = f"{memory.used_by_client[run.client_id]:,} of {memory.client_bytes:,} bytes"
            return f"{need:,} bytes of device memory that its own client must give back, which has {used}"
    else:
        need = memory.need_bytes(taker)
    used = f"{memory.used_bytes:,} of {memory.budget_bytes:,} bytes are used"
    return f"{need:,} bytes of device memory{_holders(state)}; {used}"


def _holders(state: ExecutorState) -> str:
    owned = sorted(state.names.client_bytes().items(), key=lambda item: -item[1])
    shown = [f"client {client_id} ({size:,} bytes)" for client_id, size in owned[:_MAX_HOLDERS] if size]
    return f" held by {' and '.join(shown)}" if shown else " that runs in flight use"
