"""`tw.scan`: a loop that is one program. Its body is traced once; all turns are dispatched in one message an island."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree

from torchways.array import Array
from torchways.capture.current_trace import current_trace
from torchways.capture.python_state.tokens import TensorSource
from torchways.controller.bindings import Binding, CallTensor, Seed, StateTensor
from torchways.controller.control_flow import copy_of, kind_text
from torchways.controller.program import ProgramFunction
from torchways.controller.registration import variant_of
from torchways.controller.session import Session
from torchways.controller.signatures import Signature, signature_of
from torchways.controller.tracing import trace_variant
from torchways.controller.variant import Captured, ResultTarget, Variant
from torchways.controller.variants import MAX_VARIANTS
from torchways.errors import CaptureError, ShapeError, UserError
from torchways.ir.program import Arg, node_inputs, with_nodes
from torchways.mesh import VirtualSlice
from torchways.passes.unroll import ScanLoop, unroll

#: The loops that were made of users' functions: they are traced once.
_loops: weakref.WeakKeyDictionary[Any, _ScanFunction] = weakref.WeakKeyDictionary()


def run_scan(
    combine_fn: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    length: int | None,
    mesh: VirtualSlice | None,
    donate: bool,
    get_session: Callable[[], Session],
) -> tuple[Any, list[Any]]:
    """See `tw.scan`."""
    length = loop_length(xs, length)
    if current_trace() is not None or length == 0:
        return loop_in_python(combine_fn, init, xs, length)
    if donate:
        _check_donation(init)
    loop = _loops.get(combine_fn)
    if loop is None or loop.mesh is not mesh:
        loop = _loops[combine_fn] = _ScanFunction(combine_fn, mesh, get_session)
    with torch.no_grad():
        final, ys = loop(init, loop.turns(xs, length), donate=donate)
    return final, ys


def loop_in_python(
    combine_fn: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any, length: int
) -> tuple[Any, list[Any]]:
    """Runs the turns one after the other: eagerly, or as part of the trace under way."""
    carry, ys = init, []
    for turn in range(length):
        carry, y = combine_fn(carry, pytree.tree_map_only(torch.Tensor, operator.itemgetter(turn), xs))
        ys.append(y)
    return carry, ys


def loop_length(xs: Any, length: int | None) -> int:
    """Returns the number of turns.

    Raises:
        ShapeError: `xs` and `length` do not agree on it.
    """
    sizes = {leaf.shape[0] if leaf.dim() else -1 for leaf in pytree.tree_leaves(xs) if isinstance(leaf, torch.Tensor)}
    if length is not None:
        sizes.add(length)
    if len(sizes) != 1 or min(sizes) < 0:
        raise ShapeError(
            f"tw.scan: length={length} and the sizes of dimension 0 of xs must be one number, the number of turns; "
            f"they are {sorted(sizes)}"
        )
    return int(sizes.pop())


class _ScanFunction(ProgramFunction):
    """A loop over one body: called with the first carry and the list of what each turn gets of its own."""

    def __init__(
        self, combine_fn: Callable[..., Any], mesh: VirtualSlice | None, get_session: Callable[[], Session]
    ) -> None:
        # A weak reference to the key of `_loops` would be kept alive by the value: the program gets a copy of its own.
        super().__init__(copy_of(combine_fn), mesh, get_session, is_one_node=True)
        self._unbind = ProgramFunction(_unbind, mesh, get_session)
        #: The body as captured, and a variant that it is in, by signature: other lengths need no trace.
        self._bodies: dict[Any, tuple[Captured, Variant]] = {}

    def turns(self, xs: Any, length: int) -> list[Any]:
        """Returns what each turn gets of `xs`."""
        leaves, spec = pytree.tree_flatten(xs)
        columns: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Array):
                columns.append(self._unbind(leaf))
            else:
                columns.append(leaf.unbind(0) if isinstance(leaf, torch.Tensor) else [leaf] * length)
        return [pytree.tree_unflatten([column[turn] for column in columns], spec) for turn in range(length)]

    def _make_variant(self, signature: Signature, session: Session) -> Variant:
        (init, turns), options = pytree.tree_unflatten(signature.leaves, signature.spec)
        body = signature_of((init, turns[0]), {})
        if body.objects:
            names = ", ".join(sorted({type(item).__name__ for item in body.objects}))
            raise UserError(f"{self._name}: the carry and xs of tw.scan are pytrees of tensors, not {names}")

        key, length, donate = body.key, len(turns), options["donate"]
        captured, known = self._bodies.get(key, (None, None))
        if captured is not None and known is not None and known.holds(session, body):
            unrolled = _unrolled(captured, self._name, init, length, donate)
            return variant_of(unrolled, known.meshes, session, known.state, known.reads)

        self._log_trace(signature, session)

        def rewrite(found: Captured) -> Captured:
            nonlocal captured
            captured = found
            return _unrolled(found, self._name, init, length, donate)

        variant = trace_variant(
            self._function, self._name, body, self.mesh, session, self._dispatch, rewrite, may_read=False
        )
        assert captured is not None
        if len(self._bodies) >= MAX_VARIANTS:
            del self._bodies[next(iter(self._bodies))]
        self._bodies[key] = captured, variant
        return variant


def _unbind(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [row.clone() for row in tensor.unbind(0)]


def _unrolled(body: Captured, name: str, init: Any, length: int, donate: bool) -> Captured:
    """Returns all turns as one program; see `unroll`."""
    result, changed = pytree.tree_unflatten(list(range(body.out_spec.num_leaves)), body.out_spec)
    if changed:
        raise CaptureError(
            f"{name}, the body of tw.scan, changes a list or dict that it is given: return it in the carry"
        )
    if not isinstance(result, tuple) or len(result) != 2:
        raise UserError(f"{name}, the body of tw.scan, must return the tuple (next carry, y)")
    carry, y = result
    tensors = [position for position in range(body.out_spec.num_leaves) if position not in body.constants]
    result_of = {position: number for number, position in enumerate(tensors)}
    carried = _check_carry(body, name, init, carry, result_of)
    num_carried = len(carried)
    input_of = {
        binding.position: number for number, binding in enumerate(body.bindings) if isinstance(binding, CallTensor)
    }
    fed = {input_of[position]: number for position, number in enumerate(carried)}
    for number in range(body.num_returned, len(body.targets)):  # what the body writes to arrays is carried as well
        target = body.targets[number].target
        if not isinstance(target, TensorSource):
            raise CaptureError(f"{name}, the body of tw.scan, makes optimizer state or gradients: use tw.program")
        position = next(
            index
            for index, binding in enumerate(body.bindings)
            if isinstance(binding, StateTensor) and binding.source is target
        )
        fed[position] = number
    seeds = {index: binding for index, binding in enumerate(body.bindings) if isinstance(binding, Seed)}
    loop = ScanLoop(
        length=length,
        num_inputs=len(body.bindings),
        fed=fed,
        own=frozenset([*(index for position, index in input_of.items() if position >= num_carried), *seeds]),
        kept=frozenset(result_of[leaf] for leaf in pytree.tree_leaves(y) if leaf in result_of),
    )
    num_own = len(input_of) - num_carried
    nodes = [
        replace(node, replaced=node.replaced or (donate and node.position in fed)) if isinstance(node, Arg) else node
        for node in body.program.nodes
    ]
    program = unroll(with_nodes(body.program, nodes), loop)
    bindings: list[Binding] = []
    for turn in range(length):
        for index, binding in enumerate(body.bindings):
            match binding:
                case Seed():  # every turn draws numbers of its own
                    bindings.append(Seed(binding.number + turn * len(seeds)))
                case CallTensor() if index in loop.own:
                    bindings.append(CallTensor(binding.position + turn * num_own))
                case _:
                    bindings.append(binding)
    # The result of the whole: the carry of the last turn and the y of each.
    whole: Any = ((_label(carry, length - 1), [_label(y, turn) for turn in range(length)]), {})
    labels, out_spec = pytree.tree_flatten(whole, is_leaf=lambda item: isinstance(item, _Leaf))
    place = {label: number for number, label in enumerate(label for label in labels if label.position in result_of)}
    targets: list[ResultTarget] = []
    results = node_inputs(program.nodes[-1])
    for value, (turn, number) in zip(results, loop.results(len(body.targets)), strict=True):
        made = replace(body.targets[number], placements=program.values[value].placements)  # of a carry: as it came
        if number < body.num_returned:
            made = replace(made, target=place[_Leaf((turn, tensors[number]))])
        targets.append(made)
    if body.effects:
        raise CaptureError(f"{name}, the body of tw.scan, writes to {body.effects[0].place}: return it in the carry")
    return Captured(
        program=program,
        effects=[],
        numbers=body.numbers,
        seed=body.seed,
        bindings=bindings,
        targets=targets,
        num_returned=len(place),
        out_spec=out_spec,
        constants={
            index: body.constants[label.position]
            for index, label in enumerate(labels)
            if label.position in body.constants
        },
    )


class _Leaf(tuple[int, int]):
    """A leaf of the body's flattened result, in one turn."""

    __slots__ = ()

    @property
    def position(self) -> int:
        """Its position there."""
        return self[1]


def _label(tree: Any, turn: int) -> Any:
    return pytree.tree_map(lambda position: _Leaf((turn, position)), tree)


def _check_carry(body: Captured, name: str, init: Any, carry: Any, result_of: dict[int, int]) -> list[int]:
    """Returns, for each tensor of the carry, which result is its next value.

    Raises:
        ShapeError: the body returns a carry of another structure, shape or dtype.
    """
    old, old_spec = pytree.tree_flatten(init)
    new, new_spec = pytree.tree_flatten(carry)
    if old_spec != new_spec:
        raise ShapeError(f"{name}, the body of tw.scan, must return a carry of the structure that it gets, {old_spec}")
    carried = []
    for position, (was, leaf) in enumerate(zip(old, new, strict=True)):
        if leaf in result_of and isinstance(was, torch.Tensor):
            target = body.targets[result_of[leaf]]
            if target.shape != tuple(was.shape) or target.dtype != was.dtype:
                now = f"{str(target.dtype).removeprefix('torch.')}{list(target.shape)}"
                raise ShapeError(
                    f"{name}, the body of tw.scan, returns leaf {position} of the carry as {now}, but it gets "
                    f"{kind_text(was)}: each turn must keep shapes and dtypes"
                )
            carried.append(result_of[leaf])
        elif leaf in result_of or isinstance(was, torch.Tensor) or body.constants[leaf] != was:
            raise ShapeError(
                f"{name}, the body of tw.scan, changes leaf {position} of the carry, {was!r}: only tensors can change "
                "from turn to turn"
            )
    return carried


def _check_donation(init: Any) -> None:
    buffers = [id(leaf._buffer) for leaf in pytree.tree_leaves(init) if isinstance(leaf, Array)]
    if len(set(buffers)) < len(buffers):
        raise UserError("tw.scan(..., donate=True): an array is in init twice, and can be given up only once")
