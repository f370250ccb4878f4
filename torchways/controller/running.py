"""Runs of variants: binds buffers to arguments, sends the run, and puts its results where they go."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree

from torchways.array import Array, set_grad_quietly
from torchways.capture.host_content import HostContent
from torchways.capture.python_state.host_numbers import number_bytes
from torchways.capture.python_state.places import MISSING, Gradient
from torchways.capture.python_state.tokens import TensorSource
from torchways.capture.source import user_line
from torchways.capture.tracing.containers import containers_in, extend, fill
from torchways.capture.tracing.objects import set_attributes
from torchways.controller.bindings import (
    Binding,
    BoundArgument,
    CallTensor,
    ComputedNumber,
    Constant,
    CopyOf,
    Seed,
    StateTensor,
)
from torchways.controller.buffers import HostBuffer, RemoteBuffer
from torchways.controller.parity.check import ParityCheck
from torchways.controller.parity.report import ParityReport, active_parity
from torchways.controller.session import Session
from torchways.controller.signatures import Signature
from torchways.controller.variant import (
    COMPUTED,
    ArgumentContainer,
    ArgumentObject,
    ArgumentTensor,
    BoundPiece,
    Effect,
    KnownObject,
    NumberResult,
    Sharing,
    SourceResult,
    Variant,
    WrittenValue,
)
from torchways.errors import InternalError, PlacementError, UserError
from torchways.ids import BufferId, RunId, SliceId
from torchways.ir.part import NO_BUFFER, Arguments
from torchways.ir.program import MadeValue, ValueIndex
from torchways.mesh import Placements, VirtualSlice
from torchways.passes.split import slice_args
from torchways.rpc.programs import InlineValue
from torchways.signals import uninterrupted
from torchways.storage import ViewStorage

#: A larger host tensor does not pass through schedulers, which have other clients, too.
_INLINE_BYTES = 64 << 10
#: Makes copies of arrays on a slice: (slice, arrays, placements of each).
CopiesOn: TypeAlias = Callable[[VirtualSlice, Sequence[Array], Sequence[Placements]], list[RemoteBuffer]]


def run_variant(variant: Variant, signature: Signature, copies_on: CopiesOn) -> Any:
    """Sends a run of a variant that holds for a call; returns what the function returns, with arrays as futures."""
    try:
        return _Run(variant, signature, copies_on).result()
    finally:
        variant.state.forget_call()


class _Run:
    """One run of a variant."""

    def __init__(self, variant: Variant, signature: Signature, copies_on: CopiesOn) -> None:
        self._variant = variant
        self._copies_on = copies_on
        self._signature = signature
        self._tensors = signature.tensors
        captured = variant.captured
        self._numbers = captured.numbers.evaluate(signature) if captured.numbers.steps else []
        if captured.seed is not None:
            torch.manual_seed(captured.seed)
        # One number of PyTorch's generator a run: torch.manual_seed and torch.get_rng_state mean what they always do.
        self._seed = int(torch.randint(2**63 - 1, (), device="cpu")) if variant.is_random else 0
        self._outputs: list[Any] = [None] * captured.out_spec.num_leaves
        self._positions = [index for index in range(len(self._outputs)) if index not in captured.constants]
        for index, value in captured.constants.items():
            self._outputs[index] = self._value_of(value)
        self._written: dict[WrittenValue, Array] = {}
        self._made: dict[ValueIndex, RemoteBuffer] = {}
        #: Of several pieces: what arrays had when the call began. Later pieces read that, though earlier ones write.
        self._before: dict[int, Any] = {}
        #: Buffers of host tensors that go to a slice beside the run, by tensor.
        self._sent: dict[tuple[int, VirtualSlice, Placements], RemoteBuffer] = {}
        #: New values of copies, and the binding of what they are copies of.
        self._new_copies: list[tuple[Binding, RemoteBuffer]] = []

    def result(self) -> Any:
        variant = self._variant
        self._check_aliases()
        if (report := active_parity()) is not None:
            self._run_observed(report)
        else:
            variant.bind(variant.pieces)
            self._make_copies(variant.pieces)
            if len(variant.pieces) > 1:
                tensors = map(self._tensor_of, variant.captured.bindings)
                self._before = {id(tensor): tensor._buffer for tensor in tensors if isinstance(tensor, Array)}
            started_ns, run_ids = time.time_ns(), []
            for number, piece in enumerate(variant.pieces):
                is_last = number == len(variant.pieces) - 1
                run_ids.append(self._run_piece(piece, len(piece.results), is_last=is_last)[0])
                if not is_last:
                    variant.session.runs.wait_for(run_ids[-1])
            variant.note_call(run_ids, started_ns)
        result, changed = pytree.tree_unflatten(self._outputs, variant.captured.out_spec)
        for key, item in changed.items():
            if isinstance(key, ArgumentContainer):
                fill(self._containers[key.number], item)
            else:
                set_attributes(self._signature.objects[key], item)
        return result

    @functools.cached_property
    def _containers(self) -> list[Any]:
        return containers_in(self._signature.given)

    def _run_piece(self, piece: BoundPiece, num_results: int, *, is_last: bool) -> tuple[RunId, list[RemoteBuffer]]:
        """Sends a run of a piece, and puts the first of its results where they go: one step to signals."""
        session = self._variant.session
        consumed: list[RemoteBuffer] = []
        arguments: dict[SliceId, Arguments[InlineValue]] = {}
        for slice_index, items in piece.arguments.items():
            mesh = self._variant.meshes[slice_index]
            values: list[InlineValue] = []
            buffer_ids = [self._bind(item, mesh, session, consumed, values) for item in items]
            arguments[mesh.slice_id] = Arguments(buffer_ids, values)
        name = self._variant.captured.program.name
        if consumed:
            session.programs.wait(piece.program_id, name)
        session.runs.wait_for_room(name)
        with uninterrupted():
            first = BufferId(session.new_ids(max(1, len(piece.results))))
            run_id = session.runs.send(
                piece.program_id,
                name,
                range(first, first + len(piece.results)),
                arguments,
                changes_state=bool(consumed) or not piece.only_returns(self._variant.captured.num_returned),
            )
            self._sent.clear()  # they are given back, behind the run
            for buffer in consumed:
                buffer.consumed = True
            buffers = [
                RemoteBuffer(session, result.mesh, result.placements, BufferId(first + number))
                for number, result in enumerate(piece.results)
            ]
            self._assign(piece, buffers[:num_results])
            if is_last:
                self._assign_copies()
                self._carry_out_effects()
        return run_id, buffers

    def _value_of(self, value: Any) -> Any:
        if isinstance(value, NumberResult):
            return self._numbers[value.step]
        if isinstance(value, SourceResult):
            return value.source.tensor
        if isinstance(value, Sharing):
            owner = self._written[value.owner] if isinstance(value.owner, WrittenValue) else value.owner.tensor
            return owner if value.is_owner else owner.detach()
        if isinstance(value, KnownObject):
            return value.value
        if isinstance(value, ArgumentContainer):
            return self._containers[value.number]
        if isinstance(value, ArgumentTensor):
            return self._signature.leaves[value.position]
        return self._signature.objects[value.number] if isinstance(value, ArgumentObject) else value

    def _carry_out_effects(self) -> None:
        """Writes what the function wrote to Python's state."""
        effects = self._variant.captured.effects
        values = [
            pytree.tree_unflatten(
                [
                    self._written[WrittenValue(number, index)] if leaf is COMPUTED else self._value_of(leaf)
                    for index, leaf in enumerate(effect.leaves)
                ],
                effect.spec,
            )
            for number, effect in enumerate(effects)
        ]
        for effect, value in zip(effects, values, strict=True):  # one may change what the value of another is made of
            self._carry_out(effect, value)

    def _carry_out(self, effect: Effect, value: Any) -> None:
        """Writes a value to a place of Python's state."""
        if isinstance(effect.place, Gradient):
            _set_gradient(effect.place.parent.get(self._signature), None if value is MISSING else value)
        elif effect.kind == "set":
            effect.place.set(self._signature, value)
        else:
            container = effect.place.get(self._signature)
            (fill if effect.kind == "replace" else extend)(container, value)

    def _run_observed(self, report: ParityReport) -> None:
        """Runs the program in parity mode; where it diverges, all state stays as it was."""
        variant = self._variant
        piece = variant.observed()
        sent = self._host_values(piece)
        self._make_copies([piece])
        _, buffers = self._run_piece(piece, 0, is_last=False)
        own = len(variant.captured.targets)
        made = {
            result.target.value: buffer
            for result, buffer in zip(piece.results[own:], buffers[own:], strict=True)
            if isinstance(result.target, MadeValue)
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
        with uninterrupted():
            self._assign(piece, buffers)
            self._assign_copies()
            self._carry_out_effects()

    def _host_values(self, piece: BoundPiece) -> dict[ValueIndex, torch.Tensor]:
        """Returns the values of a piece's arguments that are still on the host."""
        values: dict[ValueIndex, torch.Tensor] = {}
        args = slice_args(piece.lowered.program)
        for slice_index, items in piece.arguments.items():
            for value, item in zip(args[slice_index], items, strict=True):
                tensor = self._tensor_of(item.binding)
                if isinstance(tensor, Array) and isinstance(tensor._buffer, HostBuffer):
                    values[value] = tensor._buffer.read()
                elif isinstance(tensor, torch.Tensor) and not isinstance(tensor, Array):
                    values[value] = tensor.detach()
        return values

    def _tensor_of(self, binding: Binding | MadeValue) -> torch.Tensor | None:
        """Returns the tensor that an argument is bound to in this run, if it is bound to one."""
        match binding:
            case StateTensor():
                return binding.source.tensor
            case CallTensor():
                return self._tensors[binding.position]
            case Constant():
                return binding.tensor
            case CopyOf():
                return self._tensor_of(binding.original)
            case _:
                return None

    def _assign(self, piece: BoundPiece, buffers: list[RemoteBuffer]) -> None:
        """Puts the first results of a piece, as many as there are buffers, where they go."""
        for result, buffer in zip(piece.results, buffers, strict=False):
            target = result.target
            if isinstance(target, TensorSource):
                assert isinstance(target.tensor, Array)
                target.tensor._buffer = buffer
            elif isinstance(target, CopyOf):
                self._new_copies.append((target.original, buffer))
            elif isinstance(target, MadeValue):
                self._made[target.value] = buffer
            elif isinstance(target, WrittenValue):
                self._written[target] = Array(buffer, result.shape, result.dtype)
            else:
                self._outputs[self._positions[target]] = Array(buffer, result.shape, result.dtype)

    def _assign_copies(self) -> None:
        """Notes the new values of copies at what has the new values of their originals."""
        for original, buffer in self._new_copies:
            array = self._tensor_of(original)
            assert isinstance(array, Array)
            assert isinstance(array._buffer, RemoteBuffer)
            array._buffer.copies[buffer.mesh] = buffer
        self._new_copies.clear()

    def _make_copies(self, pieces: Sequence[BoundPiece]) -> None:
        """Makes the copies that pieces read and that are not there: of new state, and of what else has changed."""
        variant = self._variant
        missing: dict[VirtualSlice, list[tuple[Array, Placements]]] = {}
        for slice_index, item in [pair for piece in pieces for pair in piece.copies]:
            mesh = variant.meshes[slice_index]
            assert isinstance(item.binding, CopyOf)
            original = item.binding.original
            array = self._tensor_of(original)
            assert isinstance(array, Array)
            host = array._buffer
            if isinstance(host, HostBuffer):
                if item.donated and not isinstance(host.value.content, torch.Tensor):
                    continue  # a constant that this run replaces, on either slice
                home, placements = self._home_of(pieces, original) or (mesh, item.placements)
                array._buffer = buffer = variant.session.values.put(host, home, placements)
                if home is not mesh:
                    buffer.copies[mesh] = variant.session.values.put(host, mesh, item.placements)
                continue
            assert isinstance(host, RemoteBuffer)
            if mesh not in host.copies and host.mesh is not mesh:
                missing.setdefault(mesh, []).append((array, item.placements))
        for mesh, pairs in missing.items():
            made = self._copies_on(mesh, [array for array, _ in pairs], [placements for _, placements in pairs])
            for (array, _), copy in zip(pairs, made, strict=True):
                assert isinstance(array._buffer, RemoteBuffer)
                array._buffer.copies[mesh] = copy

    def _home_of(self, pieces: Sequence[BoundPiece], binding: Binding) -> tuple[VirtualSlice, Placements] | None:
        """Returns the slice of the argument of pieces that is bound so, and how it is sharded there."""
        for slice_index, items in [pair for piece in pieces for pair in piece.arguments.items()]:
            for item in items:
                if item.binding == binding:
                    return self._variant.meshes[slice_index], item.placements
        return None

    def _check_aliases(self) -> None:
        """Refuses a view and what it is a view of, or two views of one array, where the program writes to one of them.

        A program has a value of each; in eager PyTorch, a write to one is seen in the other.

        Raises:
            UserError: it is so.
        """
        captured = self._variant.captured
        arrays = [tensor for tensor in map(self._tensor_of, captured.bindings) if isinstance(tensor, Array)]
        if not any(isinstance(tensor._storage, ViewStorage) for tensor in arrays):
            return
        targets = [item.target for item in captured.targets if isinstance(item.target, TensorSource)]
        written = {id(target.tensor._storage): target for target in targets}  # type: ignore[attr-defined]
        of_base: dict[int, Array] = {}
        for tensor in arrays:
            other = of_base.setdefault(id(tensor._storage.base), tensor)
            target = written.get(id(tensor._storage)) or written.get(id(other._storage))
            if other._storage is not tensor._storage and target is not None:
                raise UserError(
                    f"{captured.program.name} changes {target.name} in place and also uses another tensor of the same "
                    f"memory, called at {user_line()}: take the view within the program, or give it a copy (.clone())"
                )

    def _bind(
        self,
        item: BoundArgument,
        mesh: VirtualSlice,
        session: Session,
        consumed: list[RemoteBuffer],
        values: list[InlineValue],
    ) -> BufferId:
        """Returns the buffer that an argument is bound to; if it is a value, adds it to `values`."""
        match item.binding:
            case StateTensor() as state:
                tensor = state.source.tensor
            case CallTensor() as argument:
                tensor = self._tensors[argument.position]
            case Constant() as constant:
                tensor = constant.tensor
            case CopyOf():
                return self._bind_copy(item, mesh, consumed, values)
            case MadeValue() as made:
                if item.donated:
                    consumed.append(self._made[made.value])
                return self._made[made.value].buffer_id
            case Seed() as seed:
                data = seed.of_run(self._seed)
                values.append(InlineValue(dtype="int64", shape=(), placements=item.placements, data=data))
                return NO_BUFFER
            case ComputedNumber() as number:
                dtype = str(number.dtype).removeprefix("torch.")
                data = number_bytes(self._numbers[number.step], number.dtype)
                values.append(InlineValue(dtype=dtype, shape=(), placements=item.placements, data=data))
                return NO_BUFFER
        if not isinstance(tensor, Array):
            host = HostBuffer(HostContent(tuple(tensor.shape), tensor.dtype, tensor.detach()))
            if tensor.nbytes <= _INLINE_BYTES:
                values.append(host.inline(item.placements))
                return NO_BUFFER
            key = id(tensor), mesh, item.placements
            if (sent := self._sent.get(key)) is None or item.donated:
                sent = self._sent[key] = session.values.put_for_run(host, mesh, item.placements)
            if item.donated:
                consumed.append(sent)
            return sent.buffer_id
        buffer = self._before.get(id(tensor), tensor._buffer)
        if isinstance(buffer, HostBuffer):
            if item.donated and not isinstance(buffer.value.content, torch.Tensor):
                values.append(buffer.inline(item.placements))  # a constant that this run replaces: no buffer of its own
                return NO_BUFFER
            host, buffer = buffer, session.values.put(buffer, mesh, item.placements)
            if tensor._buffer is host:
                tensor._buffer = buffer
            if self._before:
                self._before[id(tensor)] = buffer
        assert isinstance(buffer, RemoteBuffer)
        if buffer.session is not session:
            raise PlacementError("an array of a closed session is used; make its module or value anew")
        if buffer.mesh is not mesh:
            raise InternalError(f"a program reads {tensor!r} on another mesh, {mesh}")
        if item.donated:
            consumed.append(buffer)
        return buffer.buffer_id

    def _bind_copy(
        self, item: BoundArgument, mesh: VirtualSlice, consumed: list[RemoteBuffer], values: list[InlineValue]
    ) -> BufferId:
        """Returns the buffer on a slice that is a copy of an array's."""
        assert isinstance(item.binding, CopyOf)
        array = self._tensor_of(item.binding.original)
        assert isinstance(array, Array)
        original = self._before.get(id(array), array._buffer)
        if isinstance(original, HostBuffer):
            values.append(original.inline(item.placements))
            return NO_BUFFER
        assert isinstance(original, RemoteBuffer)
        buffer = original.copies.get(mesh, original)
        if item.donated:
            consumed.append(buffer)
        return buffer.buffer_id


def _set_gradient(owner: torch.Tensor, gradient: torch.Tensor | None) -> None:
    before = owner.grad
    if gradient is None and before is None:
        return
    if isinstance(owner, Array):
        set_grad_quietly(owner, gradient)  # what the run itself does is no change
    else:
        owner.grad = gradient
    if (before is None) is not (gradient is None):
        Array.num_changes += 1
