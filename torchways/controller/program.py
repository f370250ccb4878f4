"""`@tw.program`: traces a Python function once, then dispatches it whole.

A call looks for a variant that was traced for these argument shapes and this state structure. If there is one, the
call only binds buffers to it: one message an island, whatever the program does.
"""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.utils._pytree as pytree

from torchways.array import Array
from torchways.capture.decompositions import decompositions_of
from torchways.capture.functionalize import PureGraph, make_pure
from torchways.capture.objects import copy_object, holds_tensors, may_open, open_objects, set_attributes
from torchways.capture.partition import PartitionedProgram, PlaceholderSpec, partition
from torchways.capture.source import is_user_file, user_line
from torchways.capture.state import HostContent, LearningRate, StateSlot, StateTracker
from torchways.capture.tracer import Trace, current_trace, trace
from torchways.controller.buffers import HostBuffer, RemoteBuffer, array_like
from torchways.controller.checks import check_lowered, not_lowered
from torchways.controller.guards import Guard, guards_of
from torchways.controller.parity.check import ParityCheck
from torchways.controller.parity.observe import observed
from torchways.controller.parity.report import ParityReport, active_parity
from torchways.controller.session import Session
from torchways.controller.signatures import Signature, difference, signature_of
from torchways.controller.variants import DEFAULT_OPTIONS, VariantCache, VariantOptions
from torchways.errors import (
    CaptureError,
    ConfigError,
    DataDependentError,
    InternalError,
    PlacementError,
    TorchwaysError,
    UserError,
)
from torchways.ids import BufferId, ProgramId, RunId, SliceId
from torchways.ir.program import Arg, Compute, Program, Value, ValueIndex, node_inputs
from torchways.mesh import Placements, VirtualSlice
from torchways.passes.lower import LoweredProgram, lower
from torchways.passes.preflight import check_memory
from torchways.passes.sequential import Piece, sequential, whole
from torchways.rpc.programs import Binding, InlineValue

logger = logging.getLogger(__name__)

#: "parallel": the whole program in one message an island. "sequential": one computation after the other.
Dispatch: TypeAlias = Literal["parallel", "sequential"]


@dataclass(frozen=True, slots=True)
class _Made:
    """A value that a piece of a program makes for a later one."""

    value: ValueIndex


@dataclass(frozen=True, slots=True)
class Seed:
    """The seed of one of a run's computations that draw random numbers."""

    number: int

    def of_run(self, run_seed: int) -> bytes:
        """Returns it as int64[]; seeds of one run have nothing to do with each other (SplitMix64's finalizer)."""
        mixed = (run_seed + (self.number + 1) * 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        return ((mixed ^ (mixed >> 31)) >> 1).to_bytes(8, "little")


@dataclass(frozen=True, slots=True)
class _Source:
    """What an argument of a slice part is bound to: a traced input, and how it is sharded there."""

    source: Any
    placements: Placements
    donated: bool


@dataclass(frozen=True, slots=True)
class ResultTarget:
    """Where a result goes: output `position` of the function, a written array, a place in Python state, a piece."""

    target: int | Array | StateSlot | _Made
    mesh: VirtualSlice
    placements: Placements
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """A program as traced, and how its ends are tied to Python.

    Attributes:
        program: not lowered yet.
        sources: what each of its arguments is bound to, by `Arg.source`: the call's tensor at a position, an array, ...
        targets: what becomes of each of its results.
        num_returned: the first so many results are what the function returned.
        out_spec: the structure of what it returned, ahead of the argument objects that it changed.
        constants: positions in the flattened result, and the values there, that are not tensors.
    """

    program: Program
    sources: list[Any]
    targets: list[ResultTarget]
    num_returned: int
    out_spec: pytree.TreeSpec
    constants: dict[int, Any]


@dataclass(slots=True, kw_only=True)
class _Piece:
    """What is dispatched at once: the whole program, or one computation of it.

    Attributes:
        lowered: after all passes.
        arguments: for each part, by slice index, what its arguments are bound to.
        results: what becomes of the results.
        program_id: what it is registered as.
        bound_to: the slices that it is registered for, in the order of the program's.
    """

    lowered: LoweredProgram
    arguments: dict[int, list[_Source]]
    results: list[ResultTarget]
    program_id: ProgramId = ProgramId(0)
    bound_to: tuple[SliceId, ...] = ()


@dataclass(kw_only=True, eq=False)
class Variant:
    """One traced, lowered and registered form of a function.

    Attributes:
        captured: the program as traced.
        lowered: after all passes, whole.
        pieces: what a call dispatches, one after the other.
        meshes: the slice that each of the program's slices stands for.
        session: where it is registered.
        guards: conditions under which the trace holds.
    """

    captured: Captured
    lowered: LoweredProgram
    pieces: list[_Piece]
    meshes: list[VirtualSlice]
    session: Session
    guards: list[Guard]
    _observed: _Piece | None = None

    @functools.cached_property
    def is_random(self) -> bool:
        """Whether it draws random numbers."""
        sources = (item.source for piece in self.pieces for items in piece.arguments.values() for item in items)
        return any(isinstance(source, Seed) for source in sources)

    def __del__(self) -> None:
        for piece in [*self.pieces, *filter(None, [self._observed])]:
            if piece.bound_to:
                self.session.forget_program(piece.program_id)

    def observed(self) -> _Piece:
        """Returns the whole program with all its values as results, bound: what parity mode dispatches."""
        if self._observed is None:
            piece = observed(self.captured.program)
            self._observed = _make_piece(self.captured, piece, self.meshes)
        self.bind([self._observed])
        return self._observed

    def bind(self, pieces: list[_Piece]) -> None:
        """Registers pieces for the devices that the slices are on now; tracing and passes are not done again."""
        here = tuple(mesh.slice_id for mesh in self.meshes)
        for piece in pieces:
            if piece.bound_to != here:
                check_memory(
                    self.captured.program.name, piece.lowered.parts, self.captured.program.slices, self._budgets()
                )
                if piece.bound_to:
                    self.session.forget_program(piece.program_id)
                piece.program_id = self.session.register_program(
                    self.captured.program.name, piece.lowered.parts, self.meshes
                )
                piece.bound_to = here

    def _budgets(self) -> dict[int, int]:
        return {
            index: min(executor.budget_bytes for executor in self.session.slice_address(mesh).executors)
            for index, mesh in enumerate(self.meshes)
        }

    def changes(self, session: Session, signature: Signature) -> list[str]:
        """Says what of Python's state, or of what a call's host tensors are asked, is not as it was traced."""
        if self.session is not session:
            return ["there is another session"]
        return [guard.change(signature) for guard in self.guards if not guard.holds(signature)]

    def holds(self, session: Session, signature: Signature) -> bool:
        """Whether the trace is valid for Python's state now, and a call with its signature."""
        return self.session is session and all(guard.holds(signature) for guard in self.guards)


@dataclass(frozen=True, slots=True)
class _ArgumentObject:
    """Stands in a result for one of the call's own argument objects."""

    number: int


class ProgramFunction:
    """A Python function that runs as one dataflow program. Made by `tw.program`.

    Calling it returns at once: tensors in its result are arrays (futures). `print(f)` shows the program as traced
    last; `f.lower(...)` runs the passes on it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        mesh: VirtualSlice | None,
        get_session: Callable[[], Session],
        dispatch: Dispatch = "parallel",
        is_one_node: bool = False,
        options: VariantOptions = DEFAULT_OPTIONS,
    ) -> None:
        if dispatch not in ("parallel", "sequential"):
            raise ConfigError(f"dispatch={dispatch!r}: a program is dispatched 'parallel' or 'sequential'")
        functools.update_wrapper(self, function)
        self._function = function
        self.mesh = mesh
        self._get_session = get_session
        self._dispatch = dispatch
        #: It is one compiled function: there are no smaller nodes that it could be run by.
        self._is_one_node = is_one_node
        self._padding = options.padding
        self._variants: VariantCache[Variant] = VariantCache(options.max_variants)
        #: Signatures for which the graph depends on values: these calls run node by node.
        self._untraceable: set[Any] = set()
        self._last: Variant | None = None
        self._times_traced = 0

    @property
    def _name(self) -> str:
        return getattr(self._function, "__name__", type(self._function).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if current_trace() is not None:
            return self._function(*args, **kwargs)  # part of the program that is being traced
        session = self._get_session()
        session.check()
        if self._padding is not None:
            args, kwargs = self._padding.pad(self._function, args, kwargs)
        signature = signature_of(args, kwargs)
        variant = self._variants.find(signature.key, lambda variant: variant.holds(session, signature))
        if variant is None:
            if signature.key in self._untraceable:
                return self._run_untraced(args, kwargs)
            try:
                variant = self._trace(signature, session)
            except DataDependentError as error:
                if self._is_one_node:
                    raise
                return self._run_untraced(args, kwargs, error)
            if len(self._untraceable) > self._variants.max_variants:
                self._untraceable.clear()
        self._last = variant
        return _run(variant, signature)

    def _run_untraced(self, args: Any, kwargs: Any, reason: DataDependentError | None = None) -> Any:
        """Runs the Python function itself: each compiled function that it calls is dispatched when it is called.

        Raises:
            DataDependentError: it computes gradients, which only a trace can.
        """
        try:
            with torch.no_grad():
                result = self._function(*args, **kwargs)
        except RuntimeError as error:
            if "does not require grad" in str(error):
                raise reason or DataDependentError(f"{self._name} depends on values and computes gradients") from error
            raise
        if reason is not None:
            logger.warning("%s; it runs node by node", reason)
            self._untraceable.add(signature_of(args, kwargs).key)
        return result

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __str__(self) -> str:
        if self._last is None:
            return f"program {self._name}: not traced yet; call it once"
        return str(self._last.lowered.program)

    @property
    def num_traces(self) -> int:
        """How many variants are kept."""
        return len(self._variants)

    def lower(self, *, print_after: str | None = None) -> LoweredProgram:
        """Runs the passes anew on the program as traced last.

        Args:
            print_after: name of a pass to print the program before and after.

        Raises:
            UserError: it was not called yet.
        """
        if self._last is None:
            raise UserError(f"{self} before lower()")
        return lower(self._last.captured.program, print_after=print_after)

    def _trace(self, signature: Signature, session: Session) -> Variant:
        variant = self._make_variant(signature, session)
        self._variants.add(signature.key, variant)
        return variant

    def _make_variant(self, signature: Signature, session: Session) -> Variant:
        self._log_trace(signature, session)
        return trace_variant(self._function, self._name, signature, self.mesh, session, self._dispatch)

    def _log_trace(self, signature: Signature, session: Session) -> None:
        """Says why the function is traced, if it is not the first time."""
        self._times_traced += 1
        if self._variants:
            kept, most = len(self._variants), self._variants.max_variants
            logger.warning(
                "tracing %s anew at %s, for the %s time (%d of at most %d traces kept%s): %s",
                self._name,
                user_line(),
                _ordinal(self._times_traced),
                kept,
                most,
                ": buckets= pads sizes, max_variants= keeps more" if kept == most else "",
                self._why(signature, session),
            )

    def _why(self, signature: Signature, session: Session) -> str:
        """Says why no variant serves a call."""
        same = self._variants.of_key(signature.key)
        if not same:
            return difference(self._function, signature, self._variants.keys())
        fewest = min([variant.changes(session, signature) for variant in same], key=len)
        return "; ".join(fewest)


def _ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number % 100 in (11, 12, 13) else endings.get(number % 10, 'th')}"


# ---- tracing


def trace_variant(
    function: Callable[..., Any],
    name: str,
    signature: Signature,
    mesh: VirtualSlice | None,
    session: Session,
    dispatch: Dispatch,
    rewrite: Callable[[Captured], Captured] = lambda captured: captured,
    *,
    may_read: bool = True,
) -> Variant:
    """Traces a call; unless `may_read`, its host tensors stand for others of other runs, and are not read.

    One graph for all masks is better than one for each: positions that masks select are read as values only where
    no graph can do without.
    """
    arguments = (function, name, signature, mesh, session, dispatch, rewrite)
    try:
        return _trace_once(*arguments, may_read=may_read, reads_positions=False)
    except DataDependentError as error:
        if not may_read or not any(type(leaf) is torch.Tensor for leaf in signature.leaves):
            raise
        try:
            return _trace_once(*arguments, may_read=True, reads_positions=True)
        except DataDependentError:
            raise error from None


def _trace_once(
    function: Callable[..., Any],
    name: str,
    signature: Signature,
    mesh: VirtualSlice | None,
    session: Session,
    dispatch: Dispatch,
    rewrite: Callable[[Captured], Captured],
    *,
    may_read: bool,
    reads_positions: bool,
) -> Variant:
    tensors = signature.tensors
    tracker = StateTracker(array_like)
    lifted: list[Array] = []

    def call(fakes: list[torch.Tensor]) -> Any:
        mode = current_trace()
        assert mode is not None
        leaves = list(signature.leaves)
        for position, fake in zip(signature.tensor_positions, fakes, strict=True):
            leaves[position] = fake
        args, kwargs = pytree.tree_unflatten(leaves, signature.spec)
        if mesh is not None:
            mode.enter_stage(mesh)
        if not signature.objects:
            return open_objects(function(*args, **kwargs)), {}
        args, kwargs = pytree.tree_map(lambda leaf: _own_object(leaf), (args, kwargs))
        objects = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if may_open(leaf)]
        before = list(map(_content, objects))
        result = function(*args, **kwargs)
        changed = {
            number: open_objects(item) for number, item in enumerate(objects) if _content(item) != before[number]
        }
        numbers = {id(item): number for number, item in enumerate(objects)}
        return (
            open_objects(result, lambda leaf: _ArgumentObject(numbers[id(leaf)]) if id(leaf) in numbers else leaf),
            changed,
        )

    host_arguments = [tensor if may_read and type(tensor) is torch.Tensor else None for tensor in tensors]
    try:
        with tracker.watching():
            shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
            traced = trace(
                call,
                shapes,
                lambda: tracker.escaped(lifted),
                lifted,
                host_arguments,
                reads_positions=reads_positions,
            )
        tracker.check_learning_rates()
        pure, cut = _cut(traced, tensors, name, mesh, {})
        if missing := not_lowered(pure.graph_module, session, cut.meshes):
            pure, cut = _cut(traced, tensors, name, mesh, decompositions_of(missing))
        check_lowered(pure.graph_module, session, cut.meshes)
        captured = rewrite(
            Captured(
                program=cut.program,
                sources=_sources(traced, cut.program),
                targets=_result_targets(cut, traced, tracker, pure.written),
                num_returned=traced.num_outputs,
                out_spec=traced.out_spec,
                constants=traced.constants,
            )
        )
        variant = variant_of(captured, cut.meshes, session, guards_of(function, traced, tracker, lifted), dispatch)
    except BaseException as error:
        tracker.roll_back(lifted)
        if isinstance(error, (TorchwaysError, KeyboardInterrupt)):
            raise
        raise _capture_error(name, error) from error
    tracker.commit()
    return variant


def variant_of(
    captured: Captured,
    meshes: list[VirtualSlice],
    session: Session,
    guards: list[Guard],
    dispatch: Dispatch = "parallel",
) -> Variant:
    """Lowers and registers what was captured."""
    program = captured.program
    pieces = [whole(program)] if dispatch == "parallel" else sequential(program)
    variant = Variant(
        captured=captured,
        lowered=lower(program),
        pieces=[_make_piece(captured, piece, meshes) for piece in pieces],
        meshes=meshes,
        session=session,
        guards=guards,
    )
    if active_parity() is None:
        variant.bind(variant.pieces)
    else:
        variant.observed()
    return variant


def _cut(
    traced: Trace, tensors: list[torch.Tensor], name: str, mesh: VirtualSlice | None, decompositions: dict[Any, Any]
) -> tuple[PureGraph, PartitionedProgram]:
    """Makes a pure graph of a trace, and a program of that."""
    pure = make_pure(traced.graph_module, decompositions)
    specs = _placeholder_specs(traced, tensors)
    _check_written(traced, pure.written, name)
    return pure, partition(pure.graph_module, specs, name=name, written=pure.written, default_mesh=mesh)


def _own_object(leaf: Any) -> Any:
    """Returns what a trace may change in place of an argument; what holds tensors is a copy already."""
    return copy_object(leaf) if may_open(leaf) and not holds_tensors(leaf) else leaf


def _content(item: Any) -> Any:
    """Returns what an object holds, to be compared with what it holds later."""
    leaves, spec = pytree.tree_flatten(open_objects(item))
    return spec, [id(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _sources(traced: Trace, program: Program) -> list[Any]:
    """Returns what arguments are bound to, by `Arg.source`: what was traced, then the seeds."""
    first_seed = len(traced.inputs)
    num_seeds = sum(isinstance(node, Arg) and node.source >= first_seed for node in program.nodes)
    return [*(item.source for item in traced.inputs), *map(Seed, range(num_seeds))]


def _make_piece(captured: Captured, piece: Piece, meshes: list[VirtualSlice]) -> _Piece:
    lowered = lower(piece.program)
    donated: set[ValueIndex] = {
        node.inputs[index] for node in lowered.program.nodes if isinstance(node, Compute) for index in node.donated
    }
    sources: dict[ValueIndex, _Source] = {}
    for node in lowered.program.nodes:
        if isinstance(node, Arg):
            source = captured.sources[node.source] if node.source >= 0 else _Made(~node.source)
            placements = lowered.program.values[node.output].placements
            sources[node.output] = _Source(source, placements, node.output in donated)
    results = []
    for number in piece.results:
        if number >= 0:
            results.append(captured.targets[number])
        else:
            results.append(_target(_Made(~number), piece.program.values[~number], meshes))
    return _Piece(
        lowered=lowered,
        arguments={part.slice_index: [sources[value] for value in part.args] for part in lowered.parts},
        results=results,
    )


def _capture_error(name: str, error: BaseException) -> CaptureError:
    line = _line_of(error)
    return CaptureError(
        f"{name} cannot be captured: {type(error).__name__}: {error}\n  at {line or user_line()}\n"
        "  TORCHWAYS_EAGER=1 runs the same script as plain PyTorch, with breakpoints"
    )


def _line_of(error: BaseException) -> str:
    """Returns the innermost user line of an exception's traceback."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if is_user_file(frame.filename)]
    if not lines:
        return ""
    return f"{lines[-1].filename.rsplit('/', 1)[-1]}:{lines[-1].lineno} in {lines[-1].name}"


def _placeholder_specs(traced: Trace, tensors: list[torch.Tensor]) -> list[PlaceholderSpec]:
    position_of = {id(item.source): index for index, item in enumerate(traced.inputs)}
    specs = []
    for item in traced.inputs:
        source = tensors[item.source] if isinstance(item.source, int) else item.source
        shape = tuple(item.fake.shape)
        if isinstance(source, Array):
            buffer = source._buffer
            follows = buffer.follows if isinstance(buffer, HostBuffer) else None
            specs.append(
                PlaceholderSpec(
                    label=f"array {shape}" if isinstance(item.source, int) else f"state {shape}",
                    mesh=source.mesh,
                    placements=source.sharding,
                    is_state=True,
                    is_data=False,
                    follows=position_of.get(id(follows)) if follows is not None else None,
                )
            )
        else:
            label = "learning rate" if isinstance(source, LearningRate) else f"host {item.source}"
            is_data = isinstance(item.source, int)
            label = label if is_data or isinstance(source, LearningRate) else f"constant {shape}"
            specs.append(PlaceholderSpec(label=label, mesh=None, placements=None, is_state=False, is_data=is_data))
    return specs


def _check_written(traced: Trace, written: list[int], name: str) -> None:
    for position in written:
        item = traced.inputs[position]
        if not isinstance(item.source, Array):
            what = f"argument {item.source}" if isinstance(item.source, int) else "a tensor of its closure"
            raise CaptureError(
                f"{name} changes {what} (shape {tuple(item.fake.shape)}) in place, which its caller would not see: "
                "return the new value, or keep it in a module as a buffer"
            )


def _result_targets(
    cut: PartitionedProgram, traced: Trace, tracker: StateTracker, written: list[int]
) -> list[ResultTarget]:
    targets: list[int | Array | StateSlot] = [
        *range(traced.num_outputs),
        *tracker.slots,
        *(traced.inputs[position].source for position in written),
    ]
    values = [cut.program.values[index] for index in node_inputs(cut.program.nodes[-1])]
    return [_target(target, value, cut.meshes) for target, value in zip(targets, values, strict=True)]


def _target(target: Any, value: Value, meshes: list[VirtualSlice]) -> ResultTarget:
    return ResultTarget(target, meshes[value.slice_index], value.placements, value.shape, getattr(torch, value.dtype))


# ---- running


def _run(variant: Variant, signature: Signature) -> Any:
    session = variant.session
    tensors = signature.tensors
    # One number of PyTorch's generator a run: torch.manual_seed and torch.get_rng_state mean what they always do.
    run_seed = int(torch.randint(2**63 - 1, (), device="cpu")) if variant.is_random else 0
    outputs: list[Any] = [None] * (variant.captured.out_spec.num_leaves)
    positions = [index for index in range(len(outputs)) if index not in variant.captured.constants]
    for index, value in variant.captured.constants.items():
        outputs[index] = signature.objects[value.number] if isinstance(value, _ArgumentObject) else value
    if (report := active_parity()) is not None:
        _run_observed(variant, report, tensors, run_seed, outputs, positions)
    else:
        variant.bind(variant.pieces)
        made: dict[ValueIndex, RemoteBuffer] = {}
        for number, piece in enumerate(variant.pieces):
            run_id, buffers = _dispatch(variant, piece, tensors, run_seed, made)
            _assign(piece, buffers, made, outputs, positions)
            if number < len(variant.pieces) - 1:
                session.wait_for_run(run_id)
    result, changed = pytree.tree_unflatten(outputs, variant.captured.out_spec)
    for number, item in changed.items():
        set_attributes(signature.objects[number], item)
    return result


def _run_observed(
    variant: Variant,
    report: ParityReport,
    tensors: list[torch.Tensor],
    run_seed: int,
    outputs: list[Any],
    positions: list[int],
) -> None:
    """Runs the program in parity mode; where it diverges, all state stays as it was."""
    piece = variant.observed()
    sent = _host_values(piece, tensors)
    _, buffers = _dispatch(variant, piece, tensors, run_seed, {})
    own = len(variant.captured.targets)
    made = {
        result.target.value: buffer
        for result, buffer in zip(piece.results[own:], buffers[own:], strict=True)
        if isinstance(result.target, _Made)
    }
    del buffers[own:]  # they are given back as they are read
    check = ParityCheck(
        program=piece.lowered.program,
        meshes=variant.meshes,
        session=variant.session,
        buffers=made,
        sent=sent,
        tolerance=report.tolerance,
    )
    report.include(check.run())
    _assign(piece, buffers, {}, outputs, positions)


def _host_values(piece: _Piece, tensors: list[torch.Tensor]) -> dict[ValueIndex, torch.Tensor]:
    """Returns the values of a piece's arguments that are still on the host."""
    values: dict[ValueIndex, torch.Tensor] = {}
    for part in piece.lowered.parts:
        for value, item in zip(part.args, piece.arguments[part.slice_index], strict=True):
            source = tensors[item.source] if isinstance(item.source, int) else item.source
            if isinstance(source, Array) and isinstance(source._buffer, HostBuffer):
                values[value] = source._buffer.read()
            elif isinstance(source, torch.Tensor) and not isinstance(source, Array):
                values[value] = source.detach()
    return values


def _dispatch(
    variant: Variant,
    piece: _Piece,
    tensors: list[torch.Tensor],
    run_seed: int,
    made: dict[ValueIndex, RemoteBuffer],
) -> tuple[RunId, list[RemoteBuffer]]:
    """Sends a run of a piece; returns the buffers of its results."""
    session = variant.session
    consumed: list[RemoteBuffer] = []
    arguments: dict[SliceId, list[Binding]] = {}
    for slice_index, sources in piece.arguments.items():
        mesh = variant.meshes[slice_index]
        arguments[mesh.slice_id] = [_bind(item, tensors, run_seed, made, mesh, session, consumed) for item in sources]
    first = BufferId(session.new_ids(max(1, len(piece.results))))
    run_id = session.run_program(piece.program_id, variant.captured.program.name, first, arguments)
    for buffer in consumed:
        buffer.consumed = True
    buffers = [
        RemoteBuffer(session, result.mesh, result.placements, BufferId(first + number))
        for number, result in enumerate(piece.results)
    ]
    return run_id, buffers


def _assign(
    piece: _Piece,
    buffers: list[RemoteBuffer],
    made: dict[ValueIndex, RemoteBuffer],
    outputs: list[Any],
    positions: list[int],
) -> None:
    """Puts the first results of a piece, as many as there are buffers, where they go."""
    for result, buffer in zip(piece.results, buffers, strict=False):
        if isinstance(result.target, Array):
            result.target._buffer = buffer
        elif isinstance(result.target, StateSlot):
            result.target.set(Array(buffer, result.shape, result.dtype))
        elif isinstance(result.target, _Made):
            made[result.target.value] = buffer
        else:
            outputs[positions[result.target]] = Array(buffer, result.shape, result.dtype)


def _bind(
    item: _Source,
    tensors: list[torch.Tensor],
    run_seed: int,
    made: dict[ValueIndex, RemoteBuffer],
    mesh: VirtualSlice,
    session: Session,
    consumed: list[RemoteBuffer],
) -> Binding:
    source = tensors[item.source] if isinstance(item.source, int) else item.source
    if isinstance(source, _Made):
        if item.donated:
            consumed.append(made[source.value])
        return made[source.value].buffer_id
    if isinstance(source, Array):
        buffer = source._buffer
        if isinstance(buffer, HostBuffer):
            if item.donated and not isinstance(buffer.value.content, torch.Tensor):
                return buffer.inline(item.placements)  # a constant that this run replaces: no buffer of its own
            buffer = source._buffer = session.put(buffer, mesh, item.placements)
        assert isinstance(buffer, RemoteBuffer)
        if buffer.session is not session:
            raise PlacementError("an array of a closed session is used; make its module or value anew")
        if buffer.mesh is not mesh:
            raise InternalError(f"a program reads {source!r} on another mesh, {mesh}")
        if item.donated:
            consumed.append(buffer)
        return buffer.buffer_id
    if isinstance(source, Seed):
        return InlineValue(dtype="int64", shape=(), placements=item.placements, data=source.of_run(run_seed))
    if isinstance(source, LearningRate):
        return InlineValue(dtype="float32", shape=(), placements=item.placements, data=source.read())
    content = HostContent(tuple(source.shape), source.dtype, source.detach())
    return HostBuffer(content).inline(item.placements)
