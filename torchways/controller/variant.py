"""A traced, lowered and registered form of a function, and how its ends are tied to Python."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
import torch.utils._pytree as pytree

from torchways.capture.python_state.conditions import Conditions
from torchways.capture.python_state.host_numbers import HostNumbers
from torchways.capture.python_state.places import Place
from torchways.capture.python_state.tokens import TensorSource, short
from torchways.capture.tracing.known_values import ArgumentRead
from torchways.controller.bindings import Binding, BoundArgument, CopyOf, Seed
from torchways.controller.parity.observe import observed
from torchways.controller.session import Session
from torchways.controller.signatures import Signature
from torchways.ids import ProgramId, RunId, SliceId
from torchways.ir.loops import unrolled
from torchways.ir.program import Arg, Loop, MadeValue, Program, TracedInput, Value, ValueIndex, donated_values
from torchways.mesh import Placements, VirtualSlice
from torchways.passes.lower import LoweredProgram, lower
from torchways.passes.preflight import check_memory
from torchways.passes.sequential import FinalResult, Piece
from torchways.passes.split import slice_args
from torchways.schedules import Found, Schedule
from torchways.signals import uninterrupted

#: "parallel": the whole program in one message an island. "sequential": one computation after the other.
Dispatch: TypeAlias = Literal["parallel", "sequential"]


@dataclass(frozen=True, slots=True)
class WrittenValue:
    """A tensor that a run leaves at a place of Python's state: leaf `leaf` of effect `effect`."""

    effect: int
    leaf: int


@dataclass(frozen=True, slots=True)
class NumberResult:
    """A number that each call computes on the host."""

    step: int


@dataclass(frozen=True, slots=True)
class SourceResult:
    """A tensor of Python's state itself."""

    source: TensorSource


@dataclass(frozen=True, slots=True)
class Sharing:
    """A tensor that shares its memory with another that a run leaves in Python's state, or that is there already.

    Attributes:
        owner: the other.
        is_owner: it is the same object.
    """

    owner: WrittenValue | TensorSource
    is_owner: bool = False


#: Stands among an effect's leaves for a tensor that the run computes.
COMPUTED = object()


@dataclass(frozen=True, slots=True)
class Effect:
    """What each run writes to a place of Python's state.

    Attributes:
        kind, place: see `Write`.
        spec: structure of what it writes.
        leaves: of it, in order; `COMPUTED` for tensors that the run computes.
    """

    kind: str
    place: Place
    spec: pytree.TreeSpec
    leaves: list[Any]


@dataclass(frozen=True, slots=True)
class ResultTarget:
    """Where a result goes: output `position` of the function, a tensor of Python's state that is written
    in place, a copy of one, a place of Python's state, a piece."""

    target: int | TensorSource | CopyOf | WrittenValue | MadeValue
    mesh: VirtualSlice
    placements: Placements
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """A program as traced, and how its ends are tied to Python.

    Attributes:
        program: not lowered yet.
        bindings: what the inputs of the traced function are bound to, by `TracedInput.position`.
        targets: what becomes of each of its results.
        num_returned: the first so many results are what the function returned.
        out_spec: the structure of what it returned, ahead of the objects and containers among its arguments that it
            changed: by the number of an object, and by `ArgumentContainer`.
        constants: positions in the flattened result, and the values there, that are not tensors.
        effects: what each run writes to Python's state.
        numbers: what each call computes on the host.
        seed: what it gives torch.manual_seed before it draws.
        reschedule: if it has loops whose schedule is searched for, partitions what was traced again, by other
            schedules: a function of these, by the loops' numbers.
    """

    program: Program
    bindings: list[Binding]
    targets: list[ResultTarget]
    num_returned: int
    out_spec: pytree.TreeSpec
    constants: dict[int, Any]
    effects: list[Effect]
    numbers: HostNumbers
    seed: int | None = None
    reschedule: Callable[[Mapping[int, Schedule]], Captured] | None = None


@dataclass(slots=True, kw_only=True)
class BoundPiece:
    """What is dispatched at once: the whole program, or one computation of it.

    Attributes:
        lowered: after all passes.
        arguments: for each part, by slice index, what its arguments are bound to.
        results: what becomes of the results.
        copies: the arguments that are copies of others, with their slices, by index.
        program_id: what it is registered as.
        bound_to: the slices that it is registered for, in the order of the program's.
    """

    lowered: LoweredProgram
    arguments: dict[int, list[BoundArgument]]
    results: list[ResultTarget]
    copies: list[tuple[int, BoundArgument]]
    program_id: ProgramId = ProgramId(0)
    bound_to: tuple[SliceId, ...] = ()

    def only_returns(self, num_returned: int) -> bool:
        """Whether all of its results are among what the function returns, which are so many."""
        return len(self.results) <= num_returned and all(isinstance(result.target, int) for result in self.results)


@dataclass(frozen=True, slots=True)
class CallRuns:
    """The runs of one call.

    Attributes:
        run_ids: one for each piece.
        started_ns, sent_ns: before the first of them was bound and sent, and after the last was; Unix nanoseconds.
    """

    run_ids: tuple[RunId, ...]
    started_ns: int
    sent_ns: int


@dataclass(slots=True)
class ScheduleSearch:
    """The search for the schedules of a variant's automatic loops (auto_schedule.py).

    Attributes:
        found: by the loop's number, how its schedule was found, by measured times.
        tries: how often the trace of the measured calls was incomplete.
        is_over: the schedules are final.
    """

    found: dict[int, Found] = field(default_factory=dict)
    tries: int = 0
    is_over: bool = False


#: Calls whose runs a variant remembers.
_RECENT_CALLS = 5


@dataclass(kw_only=True, eq=False)
class Variant:
    """One traced, lowered and registered form of a function.

    Attributes:
        captured: the program as traced.
        lowered: after all passes, whole.
        pieces: what a call dispatches, one after the other.
        meshes: the slice that each of the program's slices stands for.
        session: where it is registered.
        state: conditions on Python's state under which the trace holds.
        reads: conditions on values of tensors.
        traced_seconds: what tracing it took.
        dispatch: how its pieces were cut.
        recent: the last calls of these pieces.
        num_calls: of these pieces.
        search: for the schedules of its automatic loops; None if it has none.
    """

    captured: Captured
    lowered: LoweredProgram
    pieces: list[BoundPiece]
    meshes: list[VirtualSlice]
    session: Session
    state: Conditions
    reads: list[ArgumentRead]
    traced_seconds: float = 0.0
    dispatch: Dispatch = "parallel"
    recent: deque[CallRuns] = field(default_factory=lambda: deque(maxlen=_RECENT_CALLS))
    num_calls: int = 0
    search: ScheduleSearch | None = None
    _observed: BoundPiece | None = None

    @functools.cached_property
    def is_random(self) -> bool:
        """Whether it draws random numbers."""
        bindings = (item.binding for piece in self.pieces for items in piece.arguments.values() for item in items)
        return any(isinstance(binding, Seed) for binding in bindings)

    @property
    def loops(self) -> list[Loop]:
        """Its loops over microbatches, lowered."""
        return [node for node in self.lowered.program.nodes if isinstance(node, Loop)]

    def note_call(self, run_ids: list[RunId], started_ns: int) -> None:
        """Remembers the runs of a call."""
        self.num_calls += 1
        self.recent.append(CallRuns(tuple(run_ids), started_ns, time.time_ns()))

    def compile_seconds(self) -> float | None:
        """Returns what it took to send its pieces and compile them everywhere; None: that is not known."""
        seconds = [self.session.programs.compile_seconds(piece.program_id) for piece in self.pieces]
        return max((item for item in seconds if item is not None), default=None)

    def __del__(self) -> None:
        self._forget([*self.pieces, *filter(None, [self._observed])])

    def _forget(self, pieces: list[BoundPiece]) -> None:
        for piece in pieces:
            if piece.bound_to:
                self.session.programs.forget(piece.program_id)

    def replace(self, captured: Captured, pieces: list[BoundPiece]) -> None:
        """Goes on with another form of the same program; waits until it is compiled.

        Raises:
            CaptureError: it cannot be compiled; the variant is as it was.
        """
        lowered = lower(captured.program)
        try:
            self.bind(pieces)
            for piece in pieces:
                self.session.programs.wait(piece.program_id, captured.program.name)
        except BaseException:
            self._forget(pieces)
            raise
        with uninterrupted():
            self._forget([*self.pieces, *filter(None, [self._observed])])
            self.captured, self.pieces, self._observed = captured, pieces, None
            self.lowered = lowered
            self.recent.clear()
            self.num_calls = 0
            vars(self).pop("is_random", None)

    def observed(self) -> BoundPiece:
        """Returns the whole program with all its values as results, bound: what parity mode dispatches."""
        if self._observed is None:
            piece = observed(self.captured.program)
            self._observed = make_piece(self.captured, piece, self.meshes)
        self.bind([self._observed])
        return self._observed

    def bind(self, pieces: list[BoundPiece]) -> None:
        """Registers pieces for the devices that the slices are on now; tracing and passes are not done again."""
        here = tuple(mesh.slice_id for mesh in self.meshes)
        for piece in pieces:
            if piece.bound_to != here:
                self._check_memory(piece)
                if piece.bound_to:
                    self.session.programs.forget(piece.program_id)
                piece.program_id = self.session.programs.register(
                    self.captured.program.name, piece.lowered.parts, self.meshes, self.traced_seconds
                )
                piece.bound_to = here

    def _check_memory(self, piece: BoundPiece) -> None:
        program = self.captured.program
        parts = [unrolled(part) for part in piece.lowered.parts]
        check_memory(program.name, parts, program.slices, *budgets_of(self.meshes, self.session))

    def holds(self, session: Session, signature: Signature) -> bool:
        """Whether the trace is valid for Python's state now, and a call with its signature."""
        if self.session is not session or not self.state.hold(signature):
            return False
        numbers = self.captured.numbers
        if numbers.steps:
            try:
                if numbers.changed(numbers.evaluate(signature)) is not None:
                    return False
            except (ArithmeticError, TypeError, ValueError):
                return False
        return all(read.is_same(signature.tensors) for read in self.reads)

    def changes(self, session: Session, signature: Signature) -> list[str]:
        """Says what of Python's state, or of what a call's host tensors are asked, is not as it was traced."""
        if self.session is not session:
            return ["there is another session"]
        found = [f"{place} {text}" for place, text in self.state.changes(signature)]
        try:
            condition = self.captured.numbers.changed(values := self.captured.numbers.evaluate(signature))
        except (ArithmeticError, TypeError, ValueError) as error:
            return [*found, f"a number cannot be computed any more ({error})"]
        if condition is not None:
            places = ", ".join(dict.fromkeys(map(str, self.captured.numbers.places_of(condition.step))))
            now, was = short(values[condition.step]), short(condition.value)
            found.append(f"what {condition.line or 'the program'} reads of {places} is {now}, was {was}")
        for read in self.reads:
            if not read.is_same(signature.tensors):
                names = [_name_of(source, signature) for source in read.sources]
                now, was = (_text(value) for value in (read.again(signature.tensors), read.value))
                found.append(f"what {read.line} reads of {' and '.join(names)} is {now}, was {was}")
        return found


def _name_of(source: int | TensorSource, signature: Signature) -> str:
    return signature.name_of_tensor(source) if isinstance(source, int) else source.name


def _text(value: Any) -> str:
    text = repr(pytree.tree_map_only(torch.Tensor, torch.Tensor.tolist, value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def budgets_of(meshes: list[VirtualSlice], session: Session) -> tuple[dict[int, int], dict[int, str]]:
    """Returns each slice's memory, bytes per device, 0 for no limit; and the first executor of its devices."""
    found = {index: session.slices.address(mesh).executors for index, mesh in enumerate(meshes)}
    budgets = {index: min(item.budget_bytes for item in executors) for index, executors in found.items()}
    return budgets, {index: executors[0].executor_id for index, executors in found.items()}


@dataclass(frozen=True, slots=True)
class ArgumentObject:
    """Stands in a result for one of the call's own argument objects."""

    number: int


@dataclass(frozen=True, slots=True)
class ArgumentContainer:
    """Stands in a result for one of the call's own lists or dictionaries."""

    number: int


@dataclass(frozen=True, slots=True)
class ArgumentTensor:
    """Stands in a container that the function changed for one of the call's own tensors."""

    position: int


@dataclass(frozen=True, slots=True)
class KnownObject:
    """Stands in a result for an object of Python's state."""

    value: Any


def make_piece(captured: Captured, piece: Piece, meshes: list[VirtualSlice]) -> BoundPiece:
    lowered = lower(piece.program)
    donated = {value for node in lowered.program.nodes for value in donated_values(node)}
    bound: dict[ValueIndex, BoundArgument] = {}
    for node in lowered.program.nodes:
        if isinstance(node, Arg):
            match node.source:
                case TracedInput(position):
                    binding: Binding | MadeValue = captured.bindings[position]
                case MadeValue() as binding:
                    pass
            placements = lowered.program.values[node.output].placements
            bound[node.output] = BoundArgument(binding, placements, node.output in donated)
    args = slice_args(lowered.program)
    results = []
    for result in piece.results:
        match result:
            case FinalResult(number):
                results.append(captured.targets[number])
            case MadeValue(value):
                results.append(target_of(result, piece.program.values[value], meshes))
    arguments = {part.slice_index: [bound[value] for value in args[part.slice_index]] for part in lowered.parts}
    copies = [(index, item) for index, items in arguments.items() for item in items if isinstance(item.binding, CopyOf)]
    return BoundPiece(lowered=lowered, arguments=arguments, results=results, copies=copies)


def target_of(target: Any, value: Value, meshes: list[VirtualSlice]) -> ResultTarget:
    return ResultTarget(target, meshes[value.slice_index], value.placements, value.shape, getattr(torch, value.dtype))
