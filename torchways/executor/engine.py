"""The executor's engine: one thread that feeds the core (state.py) events and carries out its commands.

The thread owns the core, the PJRT client (through `Runtime`) and the sending end of the data plane, so between an event
and the computation that it enables there is no hand-over. Everybody else (the gRPC loop, receiver threads, XLA's
completion callbacks) only posts events.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import itertools
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

from torchways.errors import Failure, failure_from
from torchways.executor import events
from torchways.executor.compiler import Call, Compiler
from torchways.executor.host_values import as_sent, to_device
from torchways.executor.loading import PartCode, read_program
from torchways.executor.local_sums import LocalSums
from torchways.executor.plan import LoadedProgram
from torchways.executor.reduce import Reducer
from torchways.executor.runs import Cell, Task, lowest
from torchways.executor.spans import Spans
from torchways.executor.stalls import Stalls, action_text
from torchways.executor.state import ExecutorState
from torchways.executor.transfer import DataPlane, Outgoing
from torchways.executor.value_checks import describe_bad, wait_computed
from torchways.ids import BufferId, ClientId, PartId, ProgramId, RunId, RunPart, SliceId, owner
from torchways.ir.part import ComputeInstruction
from torchways.link.inbox import Inbox
from torchways.rpc import convert
from torchways.rpc import torchways_pb2 as pb
from torchways.runtime import heap
from torchways.runtime.base import Runtime

logger = logging.getLogger(__name__)

#: Called with a value that is computed, or why there is none.
OnFetched: TypeAlias = Callable[["Fetched | Failure"], None]

_T = TypeVar("_T")

#: Events taken before launches, sends and reports of the commands so far go on.
_BATCH = 16
#: How often launches under way are looked at; it grows to the second figure while nothing happens.
_POLL_SECONDS = (0.00005, 0.002)
#: A read may overtake the run that makes its buffer; longer than this it waits only for a run that is known.
_UNKNOWN_BUFFER_SECONDS = 60.0
#: Before that, the processor is only offered to others for so long: most launches take less, and to sleep takes more.
_YIELD_SECONDS = 0.0001
#: What is free of the process's memory goes back to the kernel when nothing was computed for the first, and at the
#: latest after the second: to take it anew costs time.
_IDLE_SECONDS, _KEPT_SECONDS = 1.0, 60.0


class _Fetch(NamedTuple):
    """`since`: monotonic seconds."""

    buffer_id: BufferId
    on_fetched: OnFetched
    since: float


class Fetched:
    """A buffer that is computed, for who fetched it: nothing donates it until `end`. On the engine's thread.

    Attributes:
        nbytes: what its value takes on the host.
    """

    def __init__(self, buffer: Any, read: Callable[[Any], torch.Tensor | Failure], end: Callable[[], None]) -> None:
        self.nbytes: int = buffer.numel() * buffer.element_size()
        self._buffer = buffer
        self._read = read
        self._end: Callable[[], None] | None = end

    def read(self) -> torch.Tensor | Failure:
        """Returns the value on the host, where it may be the buffer's own memory; or why it cannot be read."""
        return self._read(self._buffer)

    def end(self) -> None:
        """Lets the buffer go. Further calls do nothing."""
        end, self._end, self._buffer = self._end, None, None
        if end is not None:
            end()


class _Launch:
    """A unit's computations that are being started, one after the other.

    Attributes:
        command: the core's.
        issued: when the first was started, nanoseconds; 0: none is.
        next: the number of computations that are started, or failed.
        values: by slot.
        poisoned: failures, by slot.
        leaves: what to wait for.
        fills: what to do once its output cells are filled.
    """

    __slots__ = ("command", "fills", "issued", "leaves", "next", "poisoned", "values")

    def __init__(self, command: events.Execute) -> None:
        self.command = command
        self.issued = 0
        self.next = 0
        self.values: dict[int, Any] = {}
        self.poisoned: dict[int, Failure] = {}
        self.leaves: list[Sequence[Any]] = []
        self.fills: list[Callable[[], None]] = []


class Engine:
    """See the module's docstring.

    Args:
        executor_id: this executor.
        runtime: its devices.
        num_devices: of its set, on all hosts: what the meshes of programs and values have.
        host: address that the data plane listens on.
        report: takes events for the scheduler, on the engine's thread.
        link_key: the cluster's.
        budget_bytes: device memory, bytes a device; 0: no limit.
        client_bytes: of it, what one client may have; 0: no limit.
        client_programs: bytes of programs, as they are sent, that one client may have.
        memory_wait: seconds that a computation may wait for memory while nothing runs that could free some.
        gang: "", "leader" or "member"; see `ExecutorState`.
        stall_warning: seconds without progress after which a run is named in a warning.
        place: what the executor has, for people: "island 0 devices 0 1".
    """

    def __init__(
        self,
        executor_id: str,
        runtime: Runtime,
        num_devices: int,
        host: str,
        report: Callable[[list[pb.ExecutorEvent]], None],
        *,
        link_key: bytes,
        budget_bytes: int = 0,
        client_bytes: int = 0,
        client_programs: int = 1 << 30,
        memory_wait: float = 60.0,
        gang: str = "",
        stall_warning: float = 30.0,
        place: str = "",
    ) -> None:
        self.executor_id = executor_id
        self.runtime = runtime
        self.core = ExecutorState(executor_id, budget_bytes=budget_bytes, client_bytes=client_bytes, gang=gang)
        #: Where the thread waits.
        self.inbox: Inbox[events.Event | Callable[[], None]] = Inbox()
        self.data_plane = DataPlane(
            executor_id,
            host,
            link_key,
            self.inbox,
            self._on_arrived,
            self._on_lost,
            self._newest_broken,
            self._on_broken,
        )
        self.reducer = Reducer(executor_id, self._send_piece)
        self.compiler = Compiler(runtime, self._on_thread, self.failure)
        self.spans = Spans()
        self.stalls = Stalls(stall_warning, place or f"executor {executor_id}", self._called)
        self._stall_seconds = min(max(stall_warning / 4, 0.02), 5.0)
        self._stalls_checked = 0.0
        self.num_devices = num_devices
        self._memory_wait = memory_wait
        self._client_programs = client_programs
        self._is_gang = bool(gang)
        self._report = report
        self._events: list[pb.ExecutorEvent] = []
        #: Of the parts that the core knows: it says when one can go.
        self._codes: dict[PartId, PartCode] = {}
        self._local_sums = LocalSums()
        #: Units whose computations are not all started, for lack of room on the devices; in the order of the commands.
        self._launches: collections.deque[_Launch] = collections.deque()
        #: Who fills an output cell of these, by the cell's id.
        self._filling: dict[int, _Launch] = {}
        #: What waits for a buffer that no known run makes yet, oldest first.
        self._fetches: dict[int, _Fetch] = {}
        #: Those whose buffers may be named in reads long before the run that makes them is here.
        self.clients_with_held_runs: set[ClientId] = set()
        self._fetch_ids = itertools.count()
        self._starved_since = 0.0
        #: Monotonic, of the last launch or value that was placed, and when memory was given back.
        self._used_memory = self._gave_memory_back = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- from any thread

    def post(self, event: events.Event) -> None:
        """Gives the core an event."""
        self.inbox.put(event)

    def call(self, work: Callable[[], None]) -> None:
        """Runs `work` on the engine's thread."""
        self.inbox.put(work)

    def load(self, message: pb.LoadProgram) -> None:
        """Loads a program: compiles it, and opens the links that it needs."""
        self.call(lambda: self._load(message))

    def drop_client(self, client_id: ClientId) -> None:
        """Frees all that a client owned."""
        gone = self.failure("SessionClosed", "the client is gone")
        self.call(lambda: self.reducer.drop_client(client_id, gone))
        self.post(events.ClientDropped(client_id=client_id))

    def fetch(self, buffer_id: BufferId, on_fetched: OnFetched) -> int:
        """Waits for a buffer, as it is after the runs that are here; returns what `cancel_fetch` takes.

        Args:
            buffer_id: the buffer.
            on_fetched: called once on the engine's thread, unless the fetch is cancelled before. Who gets a `Fetched`
                must end it.
        """
        fetch_id = next(self._fetch_ids)
        self.call(lambda: self._fetch(fetch_id, buffer_id, on_fetched))
        return fetch_id

    def cancel_fetch(self, fetch_id: int) -> None:
        """Waits for a buffer no more, if it still does."""
        self.call(lambda: self._cancel_fetch(fetch_id))

    def run(self, work: Callable[[], _T]) -> concurrent.futures.Future[_T]:
        """Runs `work` on the engine's thread, unless what it returns is cancelled before."""
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # whoever asked waits no longer
            try:
                result = work()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.inbox.put(run)
        return future

    def num_entries(self) -> dict[str, int]:
        """Returns how many entries each collection has, of the core and of the engine. On the engine's thread."""
        sums = self.reducer.num_open + len(self._local_sums)
        mine = {
            "fetches": len(self._fetches),
            "loaded": len(self._codes),
            "sums": sums,
            "launches": len(self._launches),
            "filling": len(self._filling),
        }
        return {**self.core.num_entries(), **mine}

    def _on_thread(self, work: Callable[[], _T], /) -> _T:
        return self.run(work).result()  # if the engine fails meanwhile, the process ends

    def ask_computed(self, buffer_id: BufferId, callback: Callable[[], None]) -> None:
        """Calls back once a buffer is computed or poisoned; not at all if nobody makes it yet."""

        def ask() -> None:
            cell = self.core.names.cells.get(buffer_id)
            if cell is not None and cell.failure is not None:
                callback()
            elif cell is not None and cell.scheduled:
                self._when_filled(
                    cell,
                    lambda: callback() if cell.failure is not None else self.runtime.on_ready([cell.buffer], callback),
                )

        self.inbox.put(ask)

    # ---- the thread

    def _run(self) -> None:
        """Takes items, and does what they lead to, in this order: launches ask to be told of their ends, sends go out.

        Nothing of this takes a further item, but puts it into the inbox: then there is no wait before it is taken, and
        nothing that it leads to is left lying during one.
        """
        poll, idle_since = _POLL_SECONDS[0], 0.0
        while True:
            try:
                can_launch = bool(self._launches) and self._launch_some()
                busy = self.runtime.progress()
                self._give_out()
                timeout = self._idle_seconds()
                if can_launch:
                    timeout = 0
                elif busy:
                    now = time.monotonic()
                    idle_since = idle_since or now
                    timeout = 0 if now < idle_since + _YIELD_SECONDS else poll
                if not self.inbox.wait(timeout):
                    if can_launch:
                        pass
                    elif timeout == 0:
                        os.sched_yield()  # unlike time.sleep(0), which takes longer than most launches
                    else:
                        poll = min(poll * 2, _POLL_SECONDS[1])
                        self._check_starved()
                    continue
                poll, idle_since = _POLL_SECONDS[0], 0.0
                for _ in range(_BATCH):
                    item = self.inbox.take()
                    if item is None:
                        break
                    self._take(item)
            except Exception:
                # Our bug. To go on would leave somebody waiting for ever: a lost executor is an error that users see.
                logger.exception("the executor's engine failed; ending")
                os._exit(70)

    def _idle_seconds(self) -> float | None:
        """Returns when to look again though nothing came; None: whenever something comes."""
        if self.core.memory.starved:
            return min(1.0, self._stall_seconds)
        if self.core.runs or self._fetches or self.stalls.lines():
            return self._stall_seconds
        return _IDLE_SECONDS if self._used_memory > self._gave_memory_back else None

    def _check_stalls(self, now: float) -> None:
        self._stalls_checked = now
        for line in self.stalls.check(self.core, now):
            logger.warning("%s", line)
        if self._fetches:
            self.call(functools.partial(self._check_fetches, now))

    def _check_fetches(self, now: float) -> None:
        """Ends fetches that have waited for long for what nothing makes."""
        while self._fetches:
            fetch_id, fetch = next(iter(self._fetches.items()))
            if now < fetch.since + _UNKNOWN_BUFFER_SECONDS:
                return
            runs = self.core.waiting_for()
            if runs or owner(fetch.buffer_id) in self.clients_with_held_runs:
                logger.info("a read of buffer %d waits; runs: %s", fetch.buffer_id, runs[:4])
                del self._fetches[fetch_id]
                self._fetches[fetch_id] = fetch._replace(since=now)
                continue
            self._cancel_fetch(fetch_id)
            waited = f"{_UNKNOWN_BUFFER_SECONDS:g} s"
            message = f"buffer {fetch.buffer_id} was awaited for {waited} but no run makes it"
            fetch.on_fetched(self.failure("DeadlineExceeded", message))

    def _called(self, task: Task) -> str:
        """Returns what a computation is called, with what it is of a schedule, and its user's line."""
        name, first = self._name_of(task)
        code = self._codes[task.run.program.part]
        source = code.functions[first.function_index].source
        name += action_text(task, code.schedules)
        return f"{name} at {source}" if source else name

    def _name_of(self, task: Task) -> tuple[str, ComputeInstruction]:
        """Returns the name of a unit of computations, and the first of them."""
        first = task.unit.instructions[0]
        assert isinstance(first, ComputeInstruction)
        name = self._codes[task.run.program.part].functions[first.function_index].name
        num_more = len(task.unit.instructions) - 1
        return f"{name} and {num_more} more" if num_more else name, first

    def _give_out(self) -> None:
        """Sends and reports what the commands so far came to."""
        self.data_plane.flush()
        now = time.monotonic()
        if self._events:
            reported, self._events = self._events, []
            self._report(reported)
        if now > self._stalls_checked + self._stall_seconds:
            self._check_stalls(now)
        self.spans.note_waits(self.core.memory.starved)
        self.spans.note_asking(self.core.grants.waiting)
        if not self.core.memory.starved:
            self._starved_since = 0.0
        used, gave_back = self._used_memory, self._gave_memory_back
        if used > gave_back and now > min(used + _IDLE_SECONDS, gave_back + _KEPT_SECONDS):
            self._gave_memory_back = now
            self.data_plane.give_memory_back()
            heap.give_back()

    def _take(self, item: events.Event | Callable[[], None]) -> None:
        if callable(item):
            item()
        else:
            self._handle(item)

    def _handle(self, event: events.Event) -> None:
        if isinstance(event, events.RunEnqueued):
            self._connect(event.part)
        for command in self.core.handle(event):
            match command:
                case events.Execute():
                    self._execute(command)
                case events.Place():
                    self._place(command)
                case events.Send():
                    self._send(command)
                case events.Reduce():
                    self._reduce(command)
                case events.Deliver():
                    self._deliver(command)
                case events.Compile():
                    self._compile_soon(command.program)
                case events.Unload():
                    del self._codes[command.part]
                case events.ReportEnded():
                    self._report_later(
                        run_ended=pb.RunEnded(
                            **_ids(command.run),
                            failure=_optional(command.failure),
                            device_seconds=command.device_ns / 1e9,
                        )
                    )
                case events.ReportLoaded():
                    loaded = pb.ProgramLoaded(**command.part._asdict(), failure=_optional(command.failure))
                    self._report_later(program_loaded=loaded)
                case events.ReportReady():
                    self._report_later(unit_ready=pb.UnitReady(**_ids(command.run), unit=command.unit))
                case events.ReportPassed():
                    self._report_later(unit_passed=pb.UnitPassed(**_ids(command.run), unit=command.unit))
                case events.ReportIdle():
                    self._report_later(idle=pb.Idle(epoch=command.epoch))

    def _report_later(self, **event: Any) -> None:
        self._events.append(pb.ExecutorEvent(**event))

    # ---- memory

    def _check_starved(self) -> None:
        if not self.core.memory.starved:
            self._starved_since = 0.0
        elif not self._starved_since:
            self._starved_since = time.monotonic()
        elif time.monotonic() - self._starved_since > self._memory_wait:
            self._starved_since = 0.0
            self.post(events.MemoryStalled(seconds=self._memory_wait, time_ns=time.time_ns()))

    # ---- programs

    def _load(self, message: pb.LoadProgram) -> None:
        part = PartId(ProgramId(message.program_id), SliceId(message.program.slice_id))
        if part in self._codes:
            logger.warning("%s is loaded already", part)
            return
        try:
            program, code = read_program(message, self.executor_id, self.num_devices, self.core.memory.limit_bytes)
            addresses = {
                peer: self.data_plane.checked_address(peer, signed)
                for peer, signed in code.peers
                if peer != self.executor_id
            }
            for peer, address in addresses.items():
                self.data_plane.connect(peer, address)
        except Exception as error:  # whatever is wrong with it, others go on
            failure = failure_from(error, process=f"executor {self.executor_id}")
            self._report_later(program_loaded=pb.ProgramLoaded(**part._asdict(), failure=_optional(failure)))
            return
        code.peers = list(addresses.items())
        self._codes[part] = code
        self._handle(events.ProgramArrived(program=program))

    def _connect(self, part: PartId) -> None:
        """Has links opened to a program's peers where there are none: before a run is there that needs them."""
        code = self._codes.get(part)
        for peer, address in code.peers if code is not None else ():
            self.data_plane.connect(peer, address)

    def _compile_soon(self, program: LoadedProgram) -> None:
        client_id = owner(program.part.program_id)
        mine = sum(code.nbytes for part, code in self._codes.items() if owner(part.program_id) == client_id)
        if mine <= self._client_programs:
            self.compiler.submit(functools.partial(self._compile, program))
            return
        code = self._codes[program.part]
        message = (
            f"{program.name} has {code.nbytes:,} bytes of graphs and plans, with which its client has {mine:,} here; "
            f"this cluster allows one client {self._client_programs:,} on an executor (client_programs). Call fewer "
            "programs, or with fewer shapes; those that Python drops are given back"
        )
        code.drop_graphs()
        self.post(events.ProgramCompiled(part=program.part, failure=self.failure("RemoteError", message)))

    def _compile(self, program: LoadedProgram) -> None:
        """Compiles a program; on the compiler's thread."""
        code = self._codes.get(program.part)
        if code is None:  # dropped before any run
            return
        failure: Failure | None = None
        started = time.time_ns()
        try:
            compiled = self.compiler.compile_units(program.name, code.functions, code.slots, program.units)
            if isinstance(compiled, Failure):
                failure = compiled
            else:
                code.calls = compiled
        except Exception as error:
            failure = self.failure("RemoteError", f"{program.name} could not be compiled: {error}", error)
        code.drop_graphs()
        code.compiled_ns = time.time_ns()
        self.spans.note_compiled(program.name, program.part.program_id, started, code.compiled_ns)
        self.post(events.ProgramCompiled(part=program.part, failure=failure))

    # ---- computations

    def _execute(self, command: events.Execute) -> None:
        """Starts a unit's computations: at once where the devices have room, behind those that wait for room.

        All hosts of a gang start what was granted, in that order, and say so; and so do executors that share a device.
        There nothing waits here, but in the runtime.
        """
        self._used_memory = time.monotonic()
        launch = _Launch(command)
        if self._is_gang or self.core.grants.needed:
            while self._launches:
                self._go_on(self._launches[0], is_waiting=True)
                self._launched()
            self._go_on(launch, is_waiting=True)
            self._fill_outputs(launch)
        elif not self._launches and self._go_on(launch):
            self._fill_outputs(launch)
        else:
            self._launches.append(launch)
            for cell in command.outputs:
                self._filling[id(cell)] = launch

    def _launch_some(self) -> bool:
        """Starts a few computations that waited for room; returns whether there is room for more that wait.

        Between them the engine does what else has come.
        """
        for _ in range(_BATCH):
            if not self._launches or not self._go_on(self._launches[0]):
                return False
            self._launched()
        return bool(self._launches)

    def _launched(self) -> None:
        """All computations of the first unit that waited are started."""
        launch = self._launches[0]
        self._fill_outputs(launch)
        self._launches.popleft()
        for cell in launch.command.outputs:
            del self._filling[id(cell)]
        for work in launch.fills:
            work()

    def _when_filled(self, cell: Cell, work: Callable[[], None]) -> None:
        """Does something with a scheduled cell: now, or once the computation that fills it is started."""
        launch = self._filling.get(id(cell)) if self._filling else None
        if launch is None:
            work()
        else:
            launch.fills.append(work)

    def _go_on(self, launch: _Launch, *, is_waiting: bool = False) -> bool:
        """Starts a unit's next computations while the devices have room, or waits for it; returns whether all are."""
        command = launch.command
        task = command.task
        run = task.run
        code = self._codes[run.program.part]
        calls = code.calls[task.number]
        if not launch.issued:
            if not is_waiting and run.cancelled is None and not self.runtime.has_room(self._wake):
                return False
            launch.issued = time.time_ns()
            self.spans.note_granted(task, launch.issued)
            for slot, cell in zip(task.unit.reads, command.inputs, strict=True):
                launch.values[slot] = cell.buffer
                if cell.failure is not None:
                    launch.poisoned[slot] = cell.failure
        values, poisoned = launch.values, launch.poisoned
        key = f"{run.run_id}.{run.program.part.slice_id}"
        runtime = self.runtime
        for number in range(launch.next, len(calls)):
            if number and not is_waiting and run.cancelled is None and not runtime.has_room(self._wake):
                launch.next = number
                return False
            call = calls[number]
            failure = lowest([poisoned.get(slot) for slot in call.inputs]) if poisoned else None
            if failure is None and not self._is_gang:
                # Of several hosts, one that left something out would leave the others waiting for it.
                failure = run.cancelled
            if failure is None:
                try:
                    inputs = [values[slot] for slot in call.inputs]
                    outputs, computed = runtime.execute(call.executable, inputs, f"{key}.{task.number}.{number}")
                    # Of several hosts, one that stopped here would leave the others waiting for it.
                    if run.checks_values and not self._is_gang:
                        wait_computed(runtime, computed)
                        failure = self._check_values(task, call, outputs)
                    for slot, buffer in zip(call.outputs, outputs, strict=True):
                        values[slot] = buffer
                    if call.is_leaf and computed:
                        launch.leaves.append(computed)
                except Exception as error:
                    function = code.functions[call.function_index]
                    message = f"compiled function {function.name} failed: {error}"
                    failure = self.failure("RemoteError", message, error, function.name, function.source, run.run_id)
            if failure is not None:
                for slot in call.outputs:
                    poisoned[slot], values[slot] = failure, None
            for slot in call.dead:
                values.pop(slot, None)
        return True

    def _fill_outputs(self, launch: _Launch) -> None:
        task, poisoned = launch.command.task, launch.poisoned
        for slot, cell in zip(task.unit.writes, launch.command.outputs, strict=True):
            cell.buffer, cell.failure = launch.values[slot], poisoned.get(slot)
        self._await_leaves(task, launch.leaves, lowest(list(poisoned.values())) if poisoned else None, launch.issued)

    def _wake(self) -> None:
        """There may be room for computations; on any thread."""
        self.inbox.put(_nothing)

    def _check_values(self, task: Task, call: Call, outputs: Sequence[Any]) -> Failure | None:
        """Returns the failure of a computation that made NaN or infinity; it has ended."""
        code = self._codes[task.run.program.part]
        bad = describe_bad(self.runtime, outputs, [code.slots[slot] for slot in call.outputs])
        if not bad:
            return None
        function = code.functions[call.function_index]
        action = action_text(task, code.schedules)
        message = (
            f"compiled function {function.name}{action} made a value that is not finite: {bad} (run {task.run.run_id} "
            f"of {task.run.program.name}, checked by tw.check_values). What it computed from was finite, unless the "
            "program's arguments were not"
        )
        return self.failure(
            "NonFiniteError", message, function=function.name, source=function.source, run_id=task.run.run_id
        )

    def _await_leaves(self, task: Task, leaves: list[Sequence[Any]], failure: Failure | None, issued: int) -> None:
        if not leaves:
            self.post(events.UnitFinished(task=task, failure=failure))
            return
        self.spans.note_issued(task, issued)
        left, last = len(leaves), 0

        def finished(ended: int) -> None:
            nonlocal left, last
            left, last = left - 1, max(last, ended)
            if left == 0:
                self._note_computed(task, issued, last)
                self._handle(events.UnitFinished(task=task, failure=failure))

        # Some call back on a thread of the runtime's, others at once: the inbox keeps the order of their ends.
        for buffers in leaves:
            self.runtime.on_ready(buffers, lambda: self.call(functools.partial(finished, time.time_ns())))

    def _note_computed(self, task: Task, issued: int, ended: int) -> None:
        self.spans.note_ended(task)
        name, first = self._name_of(task)
        if first.part_of is not None:
            name += f" {first.part_of.action}"
        run = task.run
        compiled_ns = self._codes[run.program.part].compiled_ns
        awaited_since = max(run.came_ns, compiled_ns) if task.awaited_input else 0
        run.device_ns += self.spans.note_computed(
            name, self.num_devices, issued, ended, run.run_id, first.part_of, awaited_since
        )

    def _place(self, command: events.Place) -> None:
        self._used_memory = time.monotonic()
        cell = command.cell
        spec = command.spec
        if spec is None:
            code = self._codes.get(command.part) if command.part is not None else None
            if code is None:  # its run is over, and nobody reads this
                return
            spec = code.slots[command.slot]
        try:
            cell.buffer = to_device(self.runtime, command.data, spec)
        except Exception as error:
            message = f"a value of shape {spec.shape} could not be placed: {error}"
            cell.failure = self.failure("RemoteError", message, error)

    # ---- transfers, sums and fetches

    def _send(self, command: events.Send) -> None:
        task, edge, cell = command.task, command.instruction.edge_id, command.cell
        run_id = task.run.run_id
        peers = task.run.program.routes.targets[edge]

        left = len(peers)
        started = last = sent_bytes = 0
        failures: list[Failure] = []

        def ended(failure: Failure | None, now: int) -> None:
            nonlocal left, last
            left, last = left - 1, max(last, now)
            failures.extend([failure] if failure is not None else [])
            if left == 0:
                name = f"send edge {edge} to {', '.join(peers)}"
                self.spans.note("send", name, started, last, run_id, edge_id=edge, sent_bytes=sent_bytes)
                self._handle(events.UnitFinished(task=task, failure=lowest(failures)))

        def sent(failure: Failure | None) -> None:
            self.call(functools.partial(ended, failure, time.time_ns()))  # on the thread of each peer's link

        def send(value: torch.Tensor | Failure) -> None:
            nonlocal started, sent_bytes
            started = time.time_ns()
            if not isinstance(value, Failure):
                sent_bytes = value.nbytes * sum(peer != self.executor_id for peer in peers)
            for peer in peers:
                if peer == self.executor_id:  # to another slice of these devices
                    self._on_arrived(peer, run_id, edge, 0, as_sent(value))
                    sent(None)
                    continue
                if (broken := self.core.broken.failure(peer, run_id)) is not None:
                    sent(broken)  # it may have failed there, and what is sent over a new link would lie there for ever
                    continue
                outgoing = Outgoing(run_id=run_id, edge_id=edge, phase=0, value=value, on_sent=sent)
                self.data_plane.send(peer, outgoing)

        if not peers:  # another host sends it
            self.inbox.put(events.UnitFinished(task=task))
            return
        self._when_on_host(cell, send)

    def _reduce(self, command: events.Reduce) -> None:
        task, instruction = command.task, command.instruction
        spec = self._codes[task.run.program.part].slots[instruction.input]
        run_id, edge = task.run.run_id, instruction.edge_id
        route = task.run.program.routes.sums[edge]
        started = time.time_ns()

        def start(value: torch.Tensor | Failure) -> None:
            local = self._local_sums.add(task, edge, value, route.num_local)
            if local is None:
                return

            def done(total: torch.Tensor | None, failure: Failure | None, sent_bytes: int) -> None:
                if total is not None:
                    sent_bytes += total.nbytes * len(route.followers)
                name, ended = f"sum edge {edge}", time.time_ns()
                self.spans.note("sum", name, started, ended, run_id, edge_id=edge, sent_bytes=sent_bytes)
                result = total if failure is None else failure
                assert result is not None
                for peer in route.followers:
                    self.reducer.give(peer, run_id, edge, result)
                for number, member in enumerate(local.tasks):
                    own = total if number == 0 or total is None else total.clone()
                    self.post(events.Reduced(task=member, data=own, failure=failure))

            members = tuple(dict.fromkeys(route.members))
            self.reducer.start(run_id, edge, members, local.total, spec.shape, spec.torch_dtype, done)

        self._when_on_host(command.cell, start)

    def _send_piece(self, peer: str, run_id: RunId, edge_id: int, phase: int, piece: torch.Tensor | Failure) -> None:
        outgoing = Outgoing(run_id=run_id, edge_id=edge_id, phase=phase, value=piece)

        def send() -> None:
            if self.core.broken.failure(peer, run_id) is None:
                self.data_plane.send(peer, outgoing)

        if threading.get_ident() == self._thread.ident:
            send()
            self.data_plane.flush()  # before the sum, and what follows it here: the others need it as soon
        else:
            self.inbox.put(send)

    def _when_on_host(self, cell: Cell, take: Callable[[torch.Tensor | Failure], None]) -> None:
        """Calls `take` on this thread with a cell's value on the host, once it is computed, or its failure."""

        def filled() -> None:
            if cell.failure is not None:
                take(cell.failure)
                return
            self.runtime.on_ready([cell.buffer], lambda: self.call(lambda: take(self._on_host(cell.buffer))))

        self._when_filled(cell, filled)

    def _on_host(self, buffer: Any) -> torch.Tensor | Failure:
        try:
            return self.runtime.to_host(buffer)
        except Exception as error:
            return self.failure("RemoteError", f"a value could not be read from its devices: {error}", error)

    def _fetch(self, fetch_id: int, buffer_id: BufferId, on_fetched: OnFetched) -> None:
        self._fetches[fetch_id] = _Fetch(buffer_id, on_fetched, time.monotonic())
        self._handle(events.FetchRequested(fetch_id=fetch_id, buffer_id=buffer_id))

    def _cancel_fetch(self, fetch_id: int) -> None:
        if self._fetches.pop(fetch_id, None) is not None:
            self._handle(events.FetchCancelled(fetch_id=fetch_id))

    def _deliver(self, command: events.Deliver) -> None:
        on_fetched, cell = self._fetches.pop(command.fetch_id).on_fetched, command.cell

        def end() -> None:
            self.post(events.FetchEnded(cell=cell))

        def filled() -> None:
            if cell.failure is not None:
                on_fetched(cell.failure)
                end()
                return
            self.runtime.on_ready(
                [cell.buffer], lambda: self.call(lambda: on_fetched(Fetched(cell.buffer, self._on_host, end)))
            )

        self._when_filled(cell, filled)

    def _on_arrived(self, peer: str, run_id: RunId, edge_id: int, phase: int, value: torch.Tensor | Failure) -> None:
        if phase:
            self.reducer.arrived(peer, run_id, edge_id, phase, value)
            return
        now = time.time_ns()
        self.spans.note("receive", f"receive edge {edge_id}", now, now, run_id, edge_id=edge_id)
        data, failure = (None, value) if isinstance(value, Failure) else (value, None)
        self.post(events.TransferArrived(peer=peer, run_id=run_id, edge_id=edge_id, data=data, failure=failure))

    def _on_lost(self, peer: str, reason: str) -> None:
        failure = self.failure("ExecutorLost", f"executor {peer} is lost, or the link to it: {reason}")
        newest = dict(self.core.newest_runs)
        self._handle(events.PeerLost(peer=peer, failure=failure))
        self.reducer.lose(peer, newest, failure)

    def _newest_broken(self, peer: str) -> Mapping[ClientId, RunId]:
        return self.core.broken.newest(peer)

    def _on_broken(self, peer: str, newest: Mapping[ClientId, RunId]) -> None:
        failure = self.failure("ExecutorLost", f"the link to executor {peer} broke; it is there again for later runs")
        self._handle(events.PeerReopened(peer=peer, newest=newest, failure=failure))
        self.reducer.lose(peer, self.core.broken.newest(peer), failure)

    # ---- helpers

    def failure(
        self,
        kind: str,
        message: str,
        error: BaseException | None = None,
        function: str = "",
        source: str = "",
        run_id: int = 0,
    ) -> Failure:
        """Returns a failure of this process."""
        lines = "".join(traceback.format_exception(error)) if error is not None else ""
        return Failure(
            kind=kind,
            message=message,
            function=function,
            source=source,
            traceback=lines,
            run_id=run_id,
            process=f"executor {self.executor_id}",
        )


def _nothing() -> None:
    """Only wakes."""


def _ids(run: RunPart) -> dict[str, int]:
    return {"run_id": run.run_id, "slice_id": run.slice_id}


def _optional(failure: Failure | None) -> pb.Failure | None:
    return convert.failure_to_proto(failure) if failure is not None else None
