"""From a call of a Python function to a variant: traced, and cut into compiled functions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor

from torchways.array import Array
from torchways.capture.current_trace import current_trace
from torchways.capture.host_content import HostContent
from torchways.capture.lowering.decompositions import decompositions_of
from torchways.capture.partitioning.partition import copy_of, has_automatic_loops, meshes_of, partition
from torchways.capture.partitioning.placed_graph import PlaceholderSpec
from torchways.capture.partitioning.replicas import Copy, separate_replicas
from torchways.capture.python_state.ambient import no_host_randomness
from torchways.capture.python_state.conditions import Conditions
from torchways.capture.python_state.gradients import Bound, Gradients
from torchways.capture.python_state.host_numbers import HostNumbers, node_of
from torchways.capture.python_state.kept_state import Write, has_hidden_state
from torchways.capture.python_state.places import MISSING, Argument, Attribute, Entry, Fixed, Gradient, Place
from torchways.capture.python_state.tokens import TensorSource, Token, is_container, is_function, is_plain, memory_of
from torchways.capture.python_state.watcher import Watcher, check_iterator
from torchways.capture.source import is_users_error, line_of_error, user_line
from torchways.capture.tracing.containers import Containers, containers_in, content_of
from torchways.capture.tracing.memory import place_of
from torchways.capture.tracing.objects import may_open, open_objects
from torchways.capture.tracing.optimizers import StateTracker
from torchways.capture.tracing.pure_graph import separate_results, tidy
from torchways.capture.tracing.trace import NumberInput, Trace
from torchways.capture.tracing.tracer import trace
from torchways.controller.bindings import Binding, Seed, binding_of, binding_of_copy
from torchways.controller.buffers import HostBuffer, array_like
from torchways.controller.checks import check_lowered, not_lowered
from torchways.controller.modules import replaced_by, take_new_state
from torchways.controller.registration import variant_of
from torchways.controller.session import Session
from torchways.controller.signatures import Signature
from torchways.controller.variant import (
    COMPUTED,
    ArgumentContainer,
    ArgumentObject,
    ArgumentTensor,
    Captured,
    Dispatch,
    Effect,
    KnownObject,
    NumberResult,
    Sharing,
    SourceResult,
    Variant,
    WrittenValue,
    target_of,
)
from torchways.errors import CaptureError, DataDependentError, TorchwaysError
from torchways.graphs import SOURCE_KEY
from torchways.ir.program import Arg, Program, node_inputs
from torchways.mesh import VirtualSlice
from torchways.observability.progress import progress
from torchways.schedules import Schedule
from torchways.signals import uninterrupted

#: Traces change classes and modes of the whole process while they run: there is one at a time.
_one_trace = threading.RLock()


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
    symbolic: frozenset[Any] = frozenset(),
) -> Variant:
    """Traces a call; unless `may_read`, its host tensors stand for others of other runs, and are not read.

    One graph for all masks is better than one for each: positions that masks select are read as values only where
    no graph can do without.

    Args:
        symbolic: keys of places whose numbers are inputs.
    """

    started = time.monotonic()
    with progress(f"{name}: tracing"):
        tracing = _traced(function, name, signature, mesh, session, symbolic, rewrite, may_read=may_read)
    return tracing.variant(dispatch, started)


def capture_again(
    function: Callable[..., Any],
    name: str,
    signature: Signature,
    mesh: VirtualSlice | None,
    session: Session,
    symbolic: frozenset[Any],
) -> Captured:
    """Traces a call as `trace_variant` does, and registers nothing."""
    return _traced(function, name, signature, mesh, session, symbolic).captured


def _traced(
    function: Callable[..., Any],
    name: str,
    signature: Signature,
    mesh: VirtualSlice | None,
    session: Session,
    symbolic: frozenset[Any],
    rewrite: Callable[[Captured], Captured] = lambda captured: captured,
    *,
    may_read: bool = True,
) -> _Tracing:
    def attempt(*, reads_positions: bool) -> _Tracing:
        shared = _shared_arrays(signature)
        while True:
            take_new_state()
            tracing = _Tracing(function, name, signature, mesh, session, symbolic, shared)
            try:
                with _one_trace:
                    tracing.run(rewrite, may_read=may_read, reads_positions=reads_positions)
            except Exception:
                if not (found := tracing.arguments_found()):
                    raise
            else:
                if not (found := tracing.arguments_found()):
                    return tracing
            tracing.forget()
            shared |= found  # once more, with these as state that is found in the call

    try:
        return attempt(reads_positions=False)
    except DataDependentError as error:
        if not may_read or not any(type(leaf) is torch.Tensor for leaf in signature.leaves):
            raise
        try:
            return attempt(reads_positions=True)
        except DataDependentError:
            raise error from None


def _shared_arrays(signature: Signature) -> frozenset[int]:
    """Returns the positions of arguments that are arrays of one memory."""
    positions = [position for together in signature.shared() for position in together]
    return frozenset(position for position in positions if isinstance(signature.leaves[position], Array))


class _Tracing:
    """One attempt to trace a call.

    Args:
        shared: positions of arguments that are arrays and that the function has by other names, too, or writes to: they
            are taken for a part of Python's state that is found in the call.
    """

    captured: Captured
    _traced: Trace
    _gradients_read: list[tuple[Place, Token]]
    _meshes: list[VirtualSlice]
    _waited_seconds: float

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        signature: Signature,
        mesh: VirtualSlice | None,
        session: Session,
        symbolic: frozenset[Any],
        shared: frozenset[int],
    ) -> None:
        self.shared = shared
        self._function = function
        self._name = name
        self._signature = signature
        self._mesh = mesh
        self._session = session
        self._numbers = HostNumbers()
        self._watcher = Watcher(call=signature, numbers=self._numbers, symbolic=symbolic)
        self._gradients = Gradients(self._watcher)
        self._tracker = StateTracker(array_like, self._watcher, replaced_by)
        self._writes: list[Write] = []
        self._effects: list[Effect] = []
        #: Which leaf of which effect each further output of the graph is.
        self._written: list[WrittenValue] = []
        #: Positions of arguments that are arrays and that it writes to.
        self._arrays_written: set[int] = set()

    def run(self, rewrite: Callable[[Captured], Captured], *, may_read: bool, reads_positions: bool) -> None:
        """Traces the call; Python's state is as before then, but for arrays in place of what was on the host."""
        tensors = self._signature.tensors
        host_arguments = [tensor if may_read and type(tensor) is torch.Tensor else None for tensor in tensors]
        try:
            try:
                with no_host_randomness(self._name):
                    traced = trace(
                        self._call,
                        tensors,
                        self._escaped,
                        self._watcher,
                        self._gradients,
                        host_arguments,
                        reads_positions=reads_positions,
                    )
            finally:
                with uninterrupted():
                    self._gradients.put_back()
                    self._watcher.put_back()
            self._traced = traced
            self._cut_up(traced, rewrite)
        except BaseException as error:
            if isinstance(error, (TorchwaysError, KeyboardInterrupt)) or is_users_error(error):
                raise
            raise _capture_error(self._name, error) from error

    def arguments_found(self) -> frozenset[int]:
        """Returns the positions of arrays, not in `shared`, that the function found in Python's state, or wrote to."""
        memory = {memory_of(source.tensor) for source in self._watcher.sources.values()}
        found = {
            position
            for position in self._signature.tensor_positions
            if isinstance(leaf := self._signature.leaves[position], Array) and memory_of(leaf) in memory
        }
        return frozenset(found | self._arrays_written).difference(self.shared)

    def _cut_up(self, traced: Trace, rewrite: Callable[[Captured], Captured]) -> None:
        self._gradients_read = list(self._gradients.reads())
        self._check_written(traced)
        specs = _placeholder_specs(traced, self._signature.tensors)
        graph = tidy(traced.graph)
        separate_results(graph)
        written = list(traced.written)
        copies = separate_replicas(graph, specs, written, traced.replicas)
        meshes = meshes_of(graph, specs, self._mesh)
        started = time.monotonic()
        for mesh in meshes:
            self._session.slices.address(mesh)  # a new slice is made ready while a program is traced
        self._waited_seconds = time.monotonic() - started
        if missing := not_lowered(graph, self._session, meshes):
            graph = tidy(graph, decompositions_of(missing))
        check_lowered(graph, self._session, meshes)
        self.captured, self._meshes = self._partitioned(graph, traced, specs, written, copies, rewrite)

    def _partitioned(
        self,
        graph: torch.fx.Graph,
        traced: Trace,
        specs: list[PlaceholderSpec],
        written: list[int],
        copies: list[Copy],
        rewrite: Callable[[Captured], Captured],
    ) -> tuple[Captured, list[VirtualSlice]]:
        """Makes a program of a graph. What partitions it again outlives the trace, and keeps what it needs of it."""
        name, mesh, effects, numbers = self._name, self._mesh, self._effects, self._numbers
        num_returned, out_spec, seed = traced.num_outputs, traced.out_spec, traced.seed
        constants = {index: _constant(value) for index, value in traced.constants.items()}
        bindings = _bindings(traced, copies)
        num_traced = len(traced.written)
        targets = [
            *range(num_returned),
            *self._written,
            *(traced.inputs[position].source for position in traced.written),
            *(bindings[position] for position in written[num_traced:]),
        ]

        def capture(
            graph: torch.fx.Graph,
            schedules: Mapping[int, Schedule],
            reschedule: Callable[[Mapping[int, Schedule]], Captured] | None,
        ) -> tuple[Captured, list[VirtualSlice]]:
            cut = partition(graph, [*specs], name=name, written=written, default_mesh=mesh, schedules=schedules)
            values = [cut.program.values[index] for index in node_inputs(cut.program.nodes[-1])]
            captured = Captured(
                program=cut.program,
                bindings=[*bindings, *_seeds(len(bindings), cut.program)],
                targets=[target_of(target, value, cut.meshes) for target, value in zip(targets, values, strict=True)],
                num_returned=num_returned,
                out_spec=out_spec,
                constants=constants,
                effects=effects,
                numbers=numbers,
                seed=seed,
                reschedule=reschedule,
            )
            return rewrite(captured), cut.meshes

        def reschedule(schedules: Mapping[int, Schedule]) -> Captured:
            return capture(copy_of(graph), schedules, reschedule)[0]

        if has_automatic_loops(graph):
            return capture(copy_of(graph), {}, reschedule)
        return capture(graph, {}, None)

    def variant(self, dispatch: Dispatch, started: float) -> Variant:
        """Returns the variant of what was traced since a moment, registered."""
        traced = self._traced
        self._watcher.free_containers_that_are_only_added_to(self._writes)
        self._tracker.commit()
        sources = [item.source for item in traced.inputs if isinstance(item.source, TensorSource)]
        memory, known = {memory_of(source.tensor) for source in sources}, set(map(id, sources))
        for source in self._watcher.sources.values():  # others of the same memory: no inputs of their own
            if id(source) not in known and source.places and memory_of(source.tensor) in memory:
                sources.append(source)
        arrays = [position for position, leaf in enumerate(self._signature.leaves) if isinstance(leaf, Array)]
        state = Conditions(
            [*self._watcher.reads.values(), *self._gradients_read],
            sources,
            self._signature,
            _adopted,
            [effect.place for effect in self._effects],
            [
                Argument(position, self._signature.name_of(position))
                for position in arrays
                if position not in self.shared
            ],
        )
        seconds = time.monotonic() - started - self._waited_seconds
        variant = variant_of(self.captured, self._meshes, self._session, state, traced.reads, dispatch, seconds)
        self.forget()
        return variant

    def forget(self) -> None:
        """Keeps nothing: the call's arrays are not to wait for the garbage collector."""
        self._watcher.forget()
        vars(self).clear()

    # ---- the call

    def _call(self, fakes: list[torch.Tensor]) -> Any:
        # Here, and not around the trace: make_fx makes modules find their attributes in a way of its own.
        with self._tracker.watching(), self._gradients.watching(), self._watcher.watching():
            return self._called(fakes)

    def _called(self, fakes: list[torch.Tensor]) -> Any:
        mode, signature = current_trace(), self._signature
        assert mode is not None
        self._watcher.note_object_or_function(Fixed(self._function, self._name), self._function)
        leaves = list(signature.leaves)
        known: dict[int, torch.Tensor] = {}
        for position, fake in zip(signature.tensor_positions, fakes, strict=True):
            tensor = signature.leaves[position]
            if position in self.shared:
                place = Argument(position, signature.name_of(position))
                leaves[position] = self._watcher.note(place, tensor)
            elif id(tensor) in known and tensor.requires_grad:  # the host's, twice
                leaves[position] = known[id(tensor)]
            else:
                leaves[position] = known[id(tensor)] = self._argument(position, fake)
        for position, leaf in enumerate(signature.leaves):
            if not isinstance(leaf, torch.Tensor):
                leaves[position] = self._note_argument(position, leaf)
        args, kwargs = pytree.tree_unflatten(leaves, signature.spec)
        if self._mesh is not None:
            mode.enter_stage(self._mesh)
        objects = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if may_open(leaf)]
        containers = Containers((args, kwargs))
        before = [_content(item) for item in objects]
        result = self._function(*args, **kwargs)
        changed: dict[Any, Any] = {
            number: open_objects(item)
            for number, item in enumerate(objects)
            if signature.opened[number] and _content(item) != before[number]
        }
        numbers = {id(item): number for number, item in enumerate(objects)}

        def existing(leaf: Any) -> Any:
            """An object that was there before the call is returned itself."""
            if id(leaf) in numbers:
                return ArgumentObject(numbers[id(leaf)])
            return KnownObject(leaf) if self._watcher.is_known(leaf) else leaf

        container_of = {id(item): ArgumentContainer(number) for number, item in enumerate(containers.items)}
        tensor_of = {
            id(leaf): ArgumentTensor(position) for position, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)
        }
        of_call = {**tensor_of, **container_of}
        written = containers.changed()
        for number in written:
            self._check_container(number)
            content = _replaced(content_of(containers.items[number]), of_call)
            changed[ArgumentContainer(number)] = open_objects(content, existing)
        of_written = {id(containers.items[number]) for number in written}
        returned = [item for item in containers.items if any(id(inner) in of_written for inner in containers_in(item))]
        result = _replaced(result, {id(item): container_of[id(item)] for item in returned})
        return open_objects(result, existing), changed

    def _check_container(self, number: int) -> None:
        """Refuses a change to one of the call's containers that the function also has by another name."""
        given = containers_in(self._signature.given)
        container = given[number]
        if self._watcher.is_known(container) or sum(item is container for item in given) > 1:
            raise CaptureError(
                f"{self._name} changes a {type(container).__name__} that it is given as an argument and also finds in "
                f"another place, at {user_line()}: give it the {type(container).__name__} once"
            )

    def _argument(self, position: int, fake: torch.Tensor) -> torch.Tensor:
        """Returns what stands for a tensor argument: a leaf that needs gradients where it is one."""
        tensor = self._signature.leaves[position]
        if tensor.requires_grad:
            fake.requires_grad_()
            place = Gradient(Argument(position, self._signature.name_of(position)))
            if tensor.is_leaf:
                self._gradients.note(fake, place, is_condition=False)  # that of the call's signature says it
                if tensor.grad is not None:
                    mode = current_trace()
                    assert mode is not None
                    source = self._watcher.source(tensor.grad)
                    if not source.places:
                        source.places.append(place)
                    fake.grad = mode.stand_in(tensor.grad).clone()
        return fake

    def _note_argument(self, position: int, leaf: Any) -> Any:
        watcher = self._watcher
        place: Place = Argument(position, self._signature.name_of(position))
        if type(leaf) in (int, float):
            return watcher.note(place, leaf)
        if is_plain(leaf):
            return leaf
        if is_function(leaf):
            watcher.note_function(leaf)
        elif is_container(leaf) or has_hidden_state(leaf):
            watcher.note(place, leaf)
        else:
            check_iterator(place, leaf)
            watcher.note_object(place if self._signature.is_by_path(position) else Fixed(leaf, str(place)), leaf)
        return leaf

    # ---- what it left behind

    def _escaped(self) -> list[torch.Tensor]:
        """Returns the traced values that Python's state holds when the function has returned, noting where."""
        found: list[Write] = []
        for write in self._watcher.writes():
            if self._tracker.is_created(write):
                found.extend(self._tracker.writes_to_new_state(write))
            else:
                found.append(write)
        mode = current_trace()
        assert mode is not None
        found += self._gradients.writes()
        assigned: dict[int, Any] = {}
        for array, now in mode.assigned_data():
            assigned[len(found)] = array
            found.append(Write("set", Attribute(Bound(self._watcher.source(array)), "data"), now))
        self._writes = found
        outputs: list[torch.Tensor] = []
        inputs: Any = mode.inputs
        #: Of memory that is there after the run, and views of it: whose it is, and what stands for that.
        owners: dict[Any, tuple[WrittenValue | TensorSource, Any]] = {
            (place_of(item.fake).memory,): (item.source, None)
            for item in inputs
            if isinstance(item.source, TensorSource) and item.source.is_array
        }
        with self._watcher.pause():
            for number, write in enumerate(self._writes):
                effect = self._effect(write)
                for index, leaf in enumerate(effect.leaves):
                    if not isinstance(leaf, FakeTensor):
                        continue
                    here = WrittenValue(number, index)
                    place = getattr(leaf, "_tw_place", None)
                    if place is not None:
                        key = (place.memory, *map(id, place.steps))
                        owner, stand_in = owners.setdefault(key, (here, leaf))
                        if owner is not here:
                            effect.leaves[index] = Sharing(owner, is_owner=leaf is stand_in)
                            continue
                    home = assigned.get(number)
                    if home is not None and home.mesh is not None:  # it stays where it is
                        leaf = mode.constrain(leaf, home.mesh, home.sharding)
                    outputs.append(leaf)
                    self._written.append(here)
                    effect.leaves[index] = COMPUTED
                self._effects.append(effect)
        return outputs

    def _effect(self, write: Write) -> Effect:
        if write.value is MISSING or self._watcher.is_known(write.value):
            leaves, spec = [write.value], pytree.tree_structure(0)
        else:
            leaves, spec = pytree.tree_flatten(open_objects(write.value))
        return Effect(write.kind, write.place, spec, [self._result(write, leaf) for leaf in leaves])

    def _result(self, write: Write, leaf: Any) -> Any:
        if isinstance(leaf, torch.nn.Module) and any(
            isinstance(value, FakeTensor) for value in (*leaf.parameters(), *leaf.buffers())
        ):
            raise CaptureError(
                f"{self._name} leaves a {type(leaf).__name__} that it builds at {write.place}, at {user_line()}: build "
                "modules outside the program"
            )
        if isinstance(leaf, torch.Tensor) and id(leaf) in self._watcher.sources:
            return SourceResult(self._watcher.sources[id(leaf)])
        return _constant(leaf)

    def _check_written(self, traced: Trace) -> None:
        results: Any = traced.graph.output_node().args[0]
        values = results[len(results) - len(traced.written) :]
        for position, value in zip(traced.written, values, strict=True):
            item = traced.inputs[position]
            if isinstance(item.source, TensorSource) and item.source.is_array:
                continue
            if isinstance(item.source, int):
                leaf = self._signature.tensor_positions[item.source]
                if isinstance(self._signature.leaves[leaf], Array):
                    self._arrays_written.add(leaf)
            what = f"argument {item.source}" if isinstance(item.source, int) else "a tensor on the host"
            if isinstance(item.source, TensorSource) and item.source.places:
                what = f"{item.source.name}, a tensor on the host"
            raise CaptureError(
                f"{self._name} changes {what} (shape {tuple(item.fake.shape)}) in place at "
                f"{value.meta.get(SOURCE_KEY) or user_line()}, which its caller would not see: return the new value, "
                "or keep it in a module as a buffer"
            )


def _adopted(source: TensorSource, value: torch.Tensor) -> Array | None:
    """Makes an array of a host tensor that took the place of an optimizer's state, as load_state_dict does."""
    place = source.places[0]
    is_state = (
        isinstance(place, Entry) and isinstance(place.parent, Entry) and str(place.parent.parent).endswith(".state")
    )
    if not is_state or tuple(value.shape) != source.shape or value.dtype != source.dtype:
        return None
    content = HostContent(source.shape, source.dtype, value.detach().clone())
    old = source.tensor
    follows = old._buffer.follows if isinstance(old, Array) and isinstance(old._buffer, HostBuffer) else None
    mesh, placements = source.home if source.home is not None else (None, None)
    return Array(HostBuffer(content, follows=follows, mesh=mesh, placements=placements), source.shape, source.dtype)


def _constant(value: Any) -> Any:
    node = node_of(value)
    return value if node is None else NumberResult(node.step)


def _replaced(tree: Any, by_identity: Mapping[int, Any]) -> Any:
    """Returns a tree with some of its nodes and leaves replaced."""
    return pytree.tree_map(
        lambda value: by_identity.get(id(value), value), tree, is_leaf=lambda value: id(value) in by_identity
    )


def _content(item: Any) -> Any:
    """Returns what an object holds, to be compared with what it holds later."""
    leaves, spec = pytree.tree_flatten(open_objects(item))
    return spec, [id(leaf) if isinstance(leaf, torch.Tensor) or node_of(leaf) else leaf for leaf in leaves]


def _bindings(traced: Trace, copies: list[Copy]) -> list[Binding]:
    """Returns what the inputs are bound to, by position: of what was traced, then of copies for replicas."""
    bindings = [binding_of(item.source) for item in traced.inputs]
    return [*bindings, *(binding_of_copy(bindings[copy.position]) for copy in copies)]


def _seeds(first: int, program: Program) -> list[Seed]:
    """Returns what the inputs from a position on are bound to: seeds."""
    num_seeds = sum(isinstance(node, Arg) and node.position >= first for node in program.nodes)
    return list(map(Seed, range(num_seeds)))


def _placeholder_specs(traced: Trace, tensors: list[torch.Tensor]) -> list[PlaceholderSpec]:
    position_of = {
        id(item.source.tensor): index
        for index, item in enumerate(traced.inputs)
        if isinstance(item.source, TensorSource)
    }
    specs = []
    for item in traced.inputs:
        shape, source = tuple(item.fake.shape), item.source
        tensor: Any = tensors[source] if isinstance(source, int) else getattr(source, "tensor", source)
        if isinstance(tensor, Array):
            buffer = tensor._buffer
            follows = buffer.follows if isinstance(buffer, HostBuffer) else None
            specs.append(
                PlaceholderSpec(
                    label=f"array {shape}" if isinstance(source, int) else f"state {shape}",
                    mesh=tensor.mesh,
                    placements=tensor.sharding,
                    is_state=True,
                    is_data=False,
                    follows=position_of.get(id(follows)) if follows is not None else None,
                )
            )
        else:
            label = f"host {source}" if isinstance(source, int) else f"constant {shape}"
            if isinstance(source, NumberInput):
                label = "number"
            specs.append(
                PlaceholderSpec(
                    label=label, mesh=None, placements=None, is_state=False, is_data=isinstance(source, int)
                )
            )
    return specs


def _capture_error(name: str, error: BaseException) -> CaptureError:
    line = line_of_error(error)
    return CaptureError(
        f"{name} cannot be captured: {type(error).__name__}: {error}\n  at {line or user_line()}\n"
        "  TORCHWAYS_EAGER=1 runs the same script as plain PyTorch, with breakpoints"
    )
