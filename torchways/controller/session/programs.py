"""The programs of a session: registered with islands, compiled there in the background, forgotten."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torchways.capture.source import user_line
from torchways.controller.session.connections import Connections
from torchways.controller.session.slices import Slices
from torchways.errors import CaptureError, Failure, InfraError, ResourceExhausted
from torchways.ids import IslandId, ProgramId, SliceId
from torchways.ir.part import SlicePart
from torchways.mesh import VirtualSlice
from torchways.observability.progress import progress
from torchways.rpc.programs import HostAddress, forget_message, register_message

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Registered:
    """A program that islands have.

    Attributes:
        name: the program's, for people.
        islands: that have it.
        num_compiling: islands that have not said yet that it is compiled.
        failure: why one of them could not.
        num_functions, traced_seconds: for the log.
        sent: when it was, by `time.monotonic`.
        compiled: when all islands had said that it is.
        has_run: a run was sent of it.
    """

    name: str
    islands: tuple[IslandId, ...]
    num_compiling: int
    num_functions: int
    traced_seconds: float
    sent: float = field(default_factory=time.monotonic)
    compiled: float | None = None
    failure: Failure | None = None
    has_run: bool = False

    def times_of_first_run(self) -> str:
        """Returns what a first run took that is over now, for the log."""
        now = time.monotonic()
        compiled = self.sent if self.compiled is None else self.compiled
        functions = "1 function" if self.num_functions == 1 else f"{self.num_functions} functions"
        traced = f"traced {self.traced_seconds:.1f} s, " if self.traced_seconds else ""
        compiling = f"compiled {compiled - self.sent:.1f} s ({functions})"
        return f"{self.name}: {traced}{compiling}, first run {now - compiled:.1f} s"


@dataclass(slots=True)
class Programs:
    """See the module's docstring. Methods are for the user's thread unless they say else.

    Attributes:
        limit: of how many there may be.
    """

    connections: Connections
    slices: Slices
    limit: int
    _programs: dict[ProgramId, Registered] = field(default_factory=dict)

    def register(
        self, name: str, parts: Sequence[SlicePart], meshes: Sequence[VirtualSlice], traced_seconds: float = 0.0
    ) -> ProgramId:
        """Sends a program's parts to their islands; executors compile in the background.

        Args:
            name: the program's name, for people.
            parts: one per slice that takes part.
            meshes: the slices, by slice index.
            traced_seconds: the time that it took to trace the program, for the log.

        Raises:
            ResourceExhausted: this process keeps too many programs.
        """
        if len(self._programs) >= self.limit:
            raise ResourceExhausted(
                f"{name} at {user_line()} would be one of more than {self.limit:,} programs that this process "
                "keeps. Make a tw.program or tw.function once, outside of loops, and call it again and again; what "
                "nothing refers to any more is given back"
            )
        program_id = ProgramId(self.connections.new_ids(1))
        addresses = [self.slices.address(mesh) for mesh in meshes]
        hosts = {
            index: [
                HostAddress(executor_id=executor.executor_id, data_address=executor.data_address)
                for executor in address.executors
            ]
            for index, address in enumerate(addresses)
        }
        by_island: dict[IslandId, list[tuple[SliceId, Sequence[int], SlicePart]]] = defaultdict(list)
        for part in parts:
            address = addresses[part.slice_index]
            by_island[address.island_id].append((address.slice_id, meshes[part.slice_index].root.shape, part))
        islands = tuple(by_island)
        num_functions = sum(len(part.functions) for part in parts)
        self._programs[program_id] = Registered(name, islands, len(islands), num_functions, traced_seconds)
        for island, island_parts in by_island.items():
            self.connections.post(island, register_message(program_id, name, island_parts, hosts, islands))
        return program_id

    def forget(self, program_id: ProgramId) -> None:
        """Lets executors free a program once its last run is over. Called by the garbage collector: no waiting."""
        program = self._programs.pop(program_id, None)
        if program is None or not self.connections.is_usable():
            return
        try:
            for island in program.islands:
                self.connections.post(island, forget_message(program_id))
        except RuntimeError:  # the loop is closed: the interpreter is shutting down
            pass

    def wait(self, program_id: ProgramId, name: str) -> None:
        """Waits until a program is compiled everywhere: a run that gives up buffers must not meet one that is not.

        Raises:
            CaptureError: it cannot be compiled.
            InfraError: what should compile it is gone.
        """
        program = self._programs.get(program_id)
        if program is not None and program.num_compiling:
            with progress(f"{name}: compiling"):
                self.connections.wait(lambda: not program.num_compiling, f"{name}, whose program is compiled,")
        self.connections.check()
        if program is None or program.failure is None:
            return
        if isinstance(lost := program.failure.to_error(), InfraError):
            raise lost
        raise CaptureError(
            f"{name} cannot be compiled: {program.failure.message}\n"
            "  all state is as it was; write it with other operators, or compute them outside the program"
        )

    def compile_seconds(self, program_id: ProgramId) -> float | None:
        """Returns what it took to send a program and compile it everywhere; None: that is not over."""
        program = self._programs.get(program_id)
        return None if program is None or program.compiled is None else program.compiled - program.sent

    def take_first_run(self, program_id: ProgramId) -> Registered | None:
        """Returns a program of which no run was sent yet; one is now."""
        program = self._programs.get(program_id)
        if program is None or program.has_run:
            return None
        program.has_run = True
        return program

    def on_ready(self, program_id: ProgramId, failure: Failure | None) -> None:
        """An island has compiled a program, or cannot; on the loop."""
        if failure is not None:
            logger.warning("program %d could not be compiled: %s", program_id, failure.message)
        program = self._programs.get(program_id)
        if program is None or not program.num_compiling:
            return
        program.failure = program.failure or failure
        program.num_compiling -= 1
        if not program.num_compiling:
            program.compiled = time.monotonic()
            self.connections.look_again()
