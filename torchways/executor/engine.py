"""The executor's engine: one thread that feeds the core (state.py) events and carries out its commands.

The thread owns the core, the PJRT client (through `Runtime`) and the sending end of the data plane, so between an event
and the computation that it enables there is no hand-over. Everybody else (the gRPC loop, receiver threads, XLA's
completion callbacks) only posts events.
"""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torchways.errors import Failure, failure_from
from torchways.executor import events
from torchways.executor.compiler import Compiler
from torchways.executor.exchange import Exchange
from torchways.executor.failures import Failures
from torchways.executor.fetches import Fetches, OnFetched
from torchways.executor.host_values import to_device
from torchways.executor.launches import Launches
from torchways.executor.loading import PartCode, read_program
from torchways.executor.plan import LoadedProgram
from torchways.executor.runs import lowest
from torchways.executor.spans import Spans
from torchways.executor.stalls import Stalls
from torchways.executor.state import ExecutorState
from torchways.ids import BufferId, ClientId, PartId, ProgramId, RunPart, SliceId, owner
from torchways.link.inbox import Inbox
from torchways.rpc import convert
from torchways.rpc import torchways_pb2 as pb
from torchways.runtime import heap
from torchways.runtime.base import Runtime

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Items taken before launches, sends and reports of the commands so far go on.
_BATCH = 16
#: How often launches under way are looked at; it grows to the second figure while nothing happens.
_POLL_SECONDS = (0.00005, 0.002)
#: Before that, the processor is only offered to others for so long: most launches take less, and to sleep takes more.
_YIELD_SECONDS = 0.0001
#: What is free of the process's memory goes back to the kernel when nothing was computed for the first, and at the
#: latest after the second. To take it anew costs about a second per gigabyte, which whoever waits between steps for
#: something else should not pay at each.
_IDLE_SECONDS, _KEPT_SECONDS = 30.0, 60.0


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
        gang: this is one of several hosts that compute together.
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
        gang: bool = False,
        stall_warning: float = 30.0,
        place: str = "",
    ) -> None:
        self.executor_id = executor_id
        self.runtime = runtime
        self.core = ExecutorState(executor_id, budget_bytes=budget_bytes, client_bytes=client_bytes, gang=gang)
        #: Where the thread waits.
        self.inbox: Inbox[events.Event | Callable[[], None]] = Inbox()
        self.failure = Failures(executor_id)
        self.compiler = Compiler(runtime, self._on_thread, self.failure)
        self.spans = Spans()
        #: Of the parts that the core knows: it says when one can go.
        self._codes: dict[PartId, PartCode] = {}
        self._launches = Launches(
            runtime,
            num_devices,
            self._codes,
            self.inbox,
            self._handle,
            self.spans,
            self.failure,
            is_gang=gang,
        )
        self.fetches = Fetches(self.core, runtime, self._launches, self.inbox, self._handle, self.failure)
        self._exchange = Exchange(
            executor_id,
            host,
            link_key,
            core=self.core,
            runtime=runtime,
            codes=self._codes,
            launches=self._launches,
            inbox=self.inbox,
            is_on_thread=lambda: threading.get_ident() == self._thread.ident,
            handle=self._handle,
            spans=self.spans,
            failure=self.failure,
        )
        self.data_plane = self._exchange.data_plane
        self.stalls = Stalls(stall_warning, place or f"executor {executor_id}", self._launches.describe)
        self._stall_seconds = min(max(stall_warning / 4, 0.02), 5.0)
        self._stalls_checked = 0.0
        self.num_devices = num_devices
        self._memory_wait = memory_wait
        self._client_programs = client_programs
        self._report = report
        self._events: list[pb.ExecutorEvent] = []
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

        def drop() -> None:
            self._handle(events.ClientDropped(client_id=client_id))
            self._exchange.drop_client(client_id)

        self.call(drop)

    def fetch(self, buffer_id: BufferId, on_fetched: OnFetched) -> int:
        """Waits for a buffer, as it is after the runs that are here; returns what `cancel_fetch` takes.

        Args:
            buffer_id: the buffer.
            on_fetched: called once on the engine's thread, unless the fetch is cancelled before. Who gets a `Fetched`
                must end it.
        """
        return self.fetches.fetch(buffer_id, on_fetched)

    def cancel_fetch(self, fetch_id: int) -> None:
        """Waits for a buffer no more, if it still does."""
        self.call(lambda: self.fetches.cancel(fetch_id))

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
        mine = {"fetches": len(self.fetches), "loaded": len(self._codes)}
        return {**self.core.num_entries(), **mine, **self._launches.num_entries(), **self._exchange.num_entries()}

    def _on_thread(self, work: Callable[[], _T], /) -> _T:
        return self.run(work).result()  # if the engine fails meanwhile, the process ends

    def ask_computed(self, buffer_id: BufferId, callback: Callable[[], None]) -> None:
        """Calls back once a buffer is computed or poisoned; not at all if nobody makes it yet."""

        def ask() -> None:
            cell = self.core.names.cells.get(buffer_id)
            if cell is not None and (cell.scheduled or cell.failure is not None):
                self._launches.when_computed(cell, callback)

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
                can_launch = self._launches.go_on()
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
        if self.core.runs or self.fetches or self.stalls.lines():
            return self._stall_seconds
        return _IDLE_SECONDS if self._used_memory > self._gave_memory_back else None

    def _check_stalls(self, now: float) -> None:
        self._stalls_checked = now
        for line in self.stalls.check(self.core, now):
            logger.warning("%s", line)
        self.call(functools.partial(self.fetches.check, now))

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
        self._check_starved(now)
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
                    self._used_memory = time.monotonic()
                    self._launches.start(command, is_granted=self.core.grants.needed)
                case events.Place():
                    self._place(command)
                case events.Send():
                    self._exchange.send(command)
                case events.Reduce():
                    self._exchange.reduce(command)
                case events.Deliver():
                    self.fetches.deliver(command)
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
                    self._report_ready(command)
                case events.ReportPassed():
                    self._report_later(unit_passed=pb.UnitPassed(**_ids(command.run), unit=command.unit))
                case events.ReportIdle():
                    self._report_later(idle=pb.Idle(epoch=command.epoch))

    def _report_ready(self, command: events.ReportReady) -> None:
        failure = command.failure
        if failure is None:
            failure = lowest([cell.failure for cell in command.inputs])
            if failure is not None:  # such as a value that could not be placed here, of which the core does not know
                self.post(events.UnitRefused(run=command.run, unit=command.unit, failure=failure))
        ready = pb.UnitReady(**_ids(command.run), unit=command.unit, failure=_optional(failure))
        self._report_later(unit_ready=ready)

    def _report_later(self, **event: Any) -> None:
        self._events.append(pb.ExecutorEvent(**event))

    # ---- memory

    def _check_starved(self, now: float) -> None:
        """Tells the core when something has waited for memory for long; whatever else comes meanwhile."""
        if not self.core.memory.starved:
            self._starved_since = 0.0
        elif not self._starved_since:
            self._starved_since = now
        elif now - self._starved_since > self._memory_wait:
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


def _ids(run: RunPart) -> dict[str, int]:
    return {"run_id": run.run_id, "slice_id": run.slice_id}


def _optional(failure: Failure | None) -> pb.Failure | None:
    return convert.failure_to_proto(failure) if failure is not None else None
