"""Traces a loop over microbatches: its body once, with marks where values enter a turn, are handed on, and are left.

The body is traced on the first microbatch, as part of the trace under way; its nodes have a label. What a turn hands on
to the next is found by comparison: memory that the body wrote to (running statistics, gradients that were there), and
gradients that it made, which add up. So the graph stays flat and without side effects, and the partitioner makes a loop
of it (partitioning/loops.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor

from torchways.capture.python_state.closures import keep_closure
from torchways.capture.python_state.gradients import GRAD, Gradients, gradient_of
from torchways.capture.python_state.host_numbers import node_of
from torchways.capture.python_state.kept_state import KeptState
from torchways.capture.python_state.watcher import Watcher
from torchways.capture.regions import CARRY_KEY, LOOP_KEY, REGION_KEY, LoopLabel
from torchways.capture.tracing.labels import LabellingRecorder
from torchways.capture.tracing.memory import Memory, place_of
from torchways.capture.tracing.pure_graph import living_nodes
from torchways.errors import CaptureError, UserError
from torchways.graphs import SOURCE_KEY
from torchways.operators import CARRY, EXIT

aten = torch.ops.aten

_CPU = torch.device("cpu")


@dataclass(slots=True)
class _Carried:
    """A value that turns hand on.

    Attributes:
        first: the node of the value that the first turn gets.
        restore: makes a node the value that Python sees.
        entered: for each body, the node that stands for what the turn gets.
        made: for each body, the node of what it hands on.
    """

    first: torch.fx.Node
    restore: Callable[[torch.fx.Node], None]
    entered: dict[int, torch.fx.Node] = field(default_factory=dict)
    made: dict[int, torch.fx.Node] = field(default_factory=dict)


@dataclass(slots=True)
class _Result:
    """A tensor of the body's result.

    Attributes:
        stacked: its rows of all turns, but not of a smaller last turn.
        remainder: that of a smaller last turn; at least one dimension.
    """

    stacked: torch.Tensor | None
    remainder: torch.Tensor | None = None


class LoopTrace:
    """A loop that is being traced.

    Args:
        recorder: of the trace under way.
        watcher, gradients: of this trace.
        label: the loop.
        function: the user's, which computes a microbatch.
        num_whole: turns whose microbatch is not smaller than the others.
    """

    def __init__(
        self,
        recorder: LabellingRecorder,
        watcher: Watcher,
        gradients: Gradients,
        label: LoopLabel,
        function: Callable[..., Any],
        num_whole: int,
    ) -> None:
        self._recorder = recorder
        self._watcher = watcher
        self._gradients = gradients
        self._label = label
        #: What the program made itself: the watcher knows nothing of it.
        self._closure = KeptState()
        keep_closure(self._closure, function, watcher.is_known)
        self._num_whole = num_whole
        self._num_bodies = 0
        self._separate_copies()
        #: By the identity of a memory, a gradient's owner, or the position of a result.
        self._carried: dict[Any, _Carried] = {}
        self._results: list[_Result] = []
        self._constants: dict[int, Any] = {}
        self._spec: pytree.TreeSpec | None = None
        #: Nodes that are handed on.
        self._made: set[torch.fx.Node] = set()
        #: For nodes of the last turn, what is left of them behind the loop.
        self._left: dict[torch.fx.Node, torch.fx.Node] = {}
        #: Keeps what identities stand for.
        self._alive: list[Any] = []

    # ---- bodies

    def body(self, call: Callable[[torch.Tensor], Any], *, is_remainder: bool) -> None:
        """Traces a turn.

        Args:
            call: computes it, given the number of the turn, int64[]; returns its result.
            is_remainder: whether it is the last turn, whose microbatch is smaller.

        Raises:
            CaptureError: it writes to what is no tensor, or assigns gradients.
        """
        number, self._num_bodies = self._num_bodies, self._num_bodies + 1
        writes, assigned = self._writes(), self._gradients.assigned()
        gradients = self._gradients.now()
        with self._recording(number) as changed, self._gradients.looking() as looked_at:
            turn = torch.ops.torchways.turn.default()
            result = call(turn)
            self._check_writes(writes, assigned)
            # Before anything is handed on: a result has the value that it has at the end of the turn.
            self._take_results(number, turn, result, changed, is_remainder=is_remainder)
            for memory, before in changed.items():
                self._hand_on_memory(number, memory, before)
            for owner, before_gradient in self._gradients.changed_since(gradients):
                if id(owner) in looked_at:
                    raise CaptureError(
                        f"a microbatch at {self._label.line} reads a gradient that it makes, which adds up over "
                        "microbatches: read, clip or clear gradients after the loop"
                    )
                self._hand_on_gradient(number, owner, before_gradient)

    @contextmanager
    def _recording(self, number: int) -> Iterator[dict[Memory, torch.fx.Node]]:
        recorder = self._recorder
        outer_region = recorder.region
        recorder.loop = (self._label, number)
        try:
            with recorder.noting_writes() as changed:
                yield changed
        finally:
            recorder.loop, recorder.region = None, outer_region

    def _is_inside(self, node: torch.fx.Node) -> bool:
        return node.meta.get(LOOP_KEY, (None,))[0] is self._label

    def _separate_copies(self) -> None:
        """Gives memory that has the node of other memory one of its own: a turn may write to either."""
        recorder = self._recorder
        for copy, original in recorder.copies:
            if copy is not original and copy.node is original.node:
                copy.node = recorder.graph.call_function(aten.clone.default, (original.node,))
                copy.node.meta = {
                    key: item for key, item in original.node.meta.items() if key not in (LOOP_KEY, CARRY_KEY)
                }
                copy.version += 1
        recorder.copies.clear()

    # ---- what is handed on

    def _hand_on_memory(self, number: int, memory: Memory, before: torch.fx.Node) -> None:
        made = memory.node
        if self._is_inside(before):
            return
        self._alive.append(memory)

        def restore(node: torch.fx.Node) -> None:
            memory.node = node
            memory.version += 1

        carried = self._carried.setdefault(id(memory), _Carried(before, restore))
        entered = self._enter(number, carried, made)
        for node in self._nodes(number):
            if node is not entered:
                node.replace_input_with(before, entered)
        self._hand_on(number, carried, entered if made is before else made)
        restore(before)  # as it is for the next body

    def _hand_on_gradient(self, number: int, owner: torch.Tensor, before: torch.Tensor | None) -> None:
        now = gradient_of(owner)
        if now is None or before is not None:
            raise CaptureError(
                f"a microbatch at {self._label.line} replaces a gradient: add to it in place, or change it afterwards"
            )
        recorder = self._recorder
        made = recorder.node_of(now)
        assert made is not None
        self._alive.append(owner)

        def restore(node: torch.fx.Node) -> None:
            recorder.bind(now, node)  # it may have been a part of a gradient of several tensors
            GRAD.__set__(owner, now)

        if id(owner) not in self._carried:
            self._carried[id(owner)] = _Carried(self._zeros(now.shape, now.dtype), restore)
        carried = self._carried[id(owner)]
        entered = self._enter(number, carried, made)
        total = recorder.graph.create_node("call_function", aten.add.Tensor, (entered, made))
        total.meta = dict(made.meta)
        self._hand_on(number, carried, total)
        GRAD.__set__(owner, before)

    def _zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.fx.Node:
        """Adds zeros before the loop."""
        graph = self._recorder.graph
        with graph.inserting_before(self._first_node(0)):
            zeros = graph.call_function(aten.full.default, (list(shape), 0), {"dtype": dtype, "device": _CPU})
        zeros.meta = {"val": self._recorder.value_like(shape, dtype), SOURCE_KEY: self._label.line}
        return zeros

    def _hand_on(self, number: int, carried: _Carried, made: torch.fx.Node) -> None:
        """Notes what a turn hands on; it is a node of the body, and that of this value alone."""
        if not self._is_inside(made) or made is carried.entered[number] or made in self._made:
            made = self._copy_inside(number, made, carried.entered[number])
        self._made.add(made)
        carried.made[number] = made

    def _copy_inside(self, number: int, value: torch.fx.Node, entered: torch.fx.Node) -> torch.fx.Node:
        with self._recorder.graph.inserting_after(self._nodes(number)[-1]):
            copy = self._recorder.graph.call_function(aten.clone.default, (value,))
        copy.meta = {key: item for key, item in entered.meta.items() if key != CARRY_KEY}
        return copy

    def _enter(self, number: int, carried: _Carried, made: torch.fx.Node) -> torch.fx.Node:
        """Returns the node for what a turn gets, which lives where `made` does."""
        graph = self._recorder.graph
        first = self._first_node(number)
        with graph.inserting_before(first):
            entered = graph.call_function(CARRY, (carried.first,))
        entered.meta = {"val": carried.first.meta["val"], LOOP_KEY: (self._label, number)}
        if carried.first.op == "call_function" and REGION_KEY in made.meta:
            entered.meta[REGION_KEY] = made.meta[REGION_KEY]
        carried.entered[number] = entered
        return entered

    def _nodes(self, number: int) -> list[torch.fx.Node]:
        return [node for node in self._recorder.graph.nodes if node.meta.get(LOOP_KEY) == (self._label, number)]

    def _first_node(self, number: int) -> torch.fx.Node:
        return next(node for node in self._recorder.graph.nodes if node.meta.get(LOOP_KEY) == (self._label, number))

    # ---- results

    def _take_results(
        self,
        number: int,
        turn: torch.Tensor,
        result: Any,
        changed: Mapping[Memory, torch.fx.Node],
        *,
        is_remainder: bool,
    ) -> None:
        leaves, spec = pytree.tree_flatten(result)
        if self._spec is None:
            self._spec = spec
            self._results = [_Result(None) for _ in leaves]
        if spec != self._spec:
            raise UserError(f"the last microbatch at {self._label.line} returns another structure than the others")
        for position, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                self._constants.setdefault(position, leaf)
                if self._constants[position] != leaf:
                    raise UserError(f"microbatches at {self._label.line} return different values that are no tensors")
                continue
            value = leaf.detach()
            stacked = self._results[position].stacked
            if stacked is not None and stacked.dim() != value.dim() + 1:
                raise UserError(
                    f"the last microbatch at {self._label.line}, which is smaller, returns a tensor of {value.dim()} "
                    f"dimensions and the others one of {stacked.dim() - 1}"
                )
            is_lasting = self._is_lasting(value, changed)
            if is_remainder:
                rows = value if value.dim() else value.unsqueeze(0)
                # Where it is a view, its memory is of the turn.
                self._results[position].remainder = rows if is_lasting else rows.clone()
            elif is_lasting:  # as in eager PyTorch, where all microbatches return the same tensor; a view of it
                self._results[position].stacked = value.unsqueeze(0).expand(self._num_whole, *value.shape)
            else:
                self._collect(number, position, turn, value)

    def _is_lasting(self, value: torch.Tensor, changed: Mapping[Memory, torch.fx.Node]) -> bool:
        """Whether a tensor was there before the loop: what is read behind the loop is what its last turn wrote."""
        memory = place_of(value).memory
        return not self._is_inside(changed.get(memory, memory.node))

    def _collect(self, number: int, position: int, turn: torch.Tensor, value: torch.Tensor) -> None:
        """Writes a turn's result into the row of its number."""
        recorder = self._recorder
        node = recorder.node_of(value)
        assert node is not None
        region, recorder.region = recorder.region, node.meta.get(REGION_KEY, recorder.region)
        carried = self._carried.get(("result", position))
        if carried is None:
            shape = torch.Size((self._num_whole, *value.shape))
            first = self._zeros(shape, value.dtype)
            rows = recorder.stands_for(first, shape, value.new_empty(shape).stride(), value.dtype)
            self._results[position].stacked = rows

            def restore(last: torch.fx.Node) -> None:
                place_of(rows).memory.node = last
                place_of(rows).memory.version += 1

            carried = self._carried["result", position] = _Carried(first, restore)
        entered = self._enter(number, carried, node)
        like = self._results[position].stacked
        assert like is not None
        buffer = recorder.stands_for(entered, like.shape, like.stride(), like.dtype)
        made = recorder.node_of(buffer.index_copy(0, turn.reshape(1), value.unsqueeze(0)))
        assert made is not None
        self._hand_on(number, carried, made)
        recorder.region = region

    def results(self) -> Any:
        """Ends the loop: what Python sees is what its last turn left. Returns the result of all microbatches.

        A turn returns a list: the result of a microbatch of each replica. Tensors without dimensions
        are stacked, others concatenated along dimension 0.
        """
        graph = self._recorder.graph
        for index, carried in enumerate(self._carried.values()):
            for number in range(self._num_bodies):
                if number not in carried.made:
                    self._pass_on(number, carried)
                carried.entered[number].meta[CARRY_KEY] = (self._label, index)
            end = graph.call_function(EXIT, ([carried.made[number] for number in range(self._num_bodies)],))
            end.meta = {"val": carried.made[0].meta["val"], CARRY_KEY: (self._label, index)}
            carried.restore(end)
        assert self._spec is not None
        self._alive.clear()
        [spec, *others] = self._spec.children_specs
        if any(other != spec for other in others):
            raise UserError(f"microbatches at {self._label.line} return different structures")
        leaves = [
            self._merged(list(range(first, len(self._results), spec.num_leaves))) for first in range(spec.num_leaves)
        ]
        return pytree.tree_unflatten(leaves, spec)

    def _merged(self, positions: Sequence[int]) -> Any:
        """Returns what all microbatches made of one leaf; `positions` are those of the replicas' results."""
        if any(position in self._constants for position in positions):
            constants = [self._constants.get(position) for position in positions]
            if any(constant != constants[0] for constant in constants):
                raise UserError(f"microbatches at {self._label.line} return different values that are no tensors")
            return constants[0]
        items = [self._results[position] for position in positions]
        rows = [item.stacked for item in items if item.stacked is not None]
        in_order = rows[0].clone() if len(rows) == 1 else torch.stack(rows, 1).flatten(0, 1)
        if in_order.dim() > 1:
            in_order = in_order.flatten(0, 1)
        rest = [self._left_behind(item.remainder) for item in items if item.remainder is not None]
        return torch.cat([in_order, *rest]) if rest else in_order

    def _left_behind(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what stands behind the loop for a tensor of its last turn."""
        recorder = self._recorder
        node = recorder.node_of(tensor)
        assert node is not None
        if not self._is_inside(node):
            return tensor
        left = self._left
        if node not in left:
            value = node
            if node in self._made:  # it is handed on as well
                value = self._copy_inside(self._num_bodies - 1, node, node)
            left[node] = recorder.graph.call_function(EXIT, ([value],))
            left[node].meta = {"val": node.meta["val"]}
        return recorder.stands_for(left[node], tensor.shape, tensor.stride(), tensor.dtype)

    def _pass_on(self, number: int, carried: _Carried) -> None:
        """Hands on, unchanged, what one of two bodies does not write to."""
        entered = self._enter(number, carried, next(iter(carried.made.values())))
        self._hand_on(number, carried, entered)

    # ---- what a body may not do

    def _writes(self) -> dict[Any, tuple[Any, ...]]:
        made_here = self._closure.writes(self._watcher.call, lambda _, value: node_of(value) is not None)
        return {
            (write.kind, write.place.key): (write.place, _identity(write.value))
            for write in (*self._watcher.writes(), *made_here)
        }

    def _check_writes(self, before: dict[Any, tuple[Any, ...]], assigned: set[int]) -> None:
        for key, (place, value) in self._writes().items():
            if key not in before or before[key][1] != value:
                raise CaptureError(
                    f"a microbatch at {self._label.line} assigns to {place}: it is traced once for all microbatches. "
                    "Return the value, write to a tensor in place, or assign after the loop"
                )
        if self._gradients.assigned() - assigned:
            raise CaptureError(
                f"a microbatch at {self._label.line} clears or assigns gradients, which add up over microbatches: do "
                "it before or after the loop"
            )


def check_loops(graph: torch.fx.Graph) -> None:
    """Refuses to read behind a loop what a turn of it made, but for what is returned and handed on.

    Raises:
        CaptureError: a node does.
    """
    living = living_nodes(graph)  # what was viewed again behind the loop, but is not used, does no harm
    for node in graph.nodes:
        loop = node.meta.get(LOOP_KEY)
        if loop is None:
            continue
        for user in node.users:
            if user in living and user.target is not EXIT and user.meta.get(LOOP_KEY) != loop:
                line = user.meta.get(SOURCE_KEY) or node.meta.get(SOURCE_KEY)
                raise CaptureError(
                    f"{line} uses a tensor that microbatches at {loop[0].line} make, after these: return it from the "
                    "function, or write it in place to a tensor that was there before"
                )


def _identity(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(id, value))
    return id(value) if isinstance(value, (torch.Tensor, FakeTensor)) else repr(value)
