"""Traces a Python function of tensors as a whole: forward, autograd's backward and the optimizer.

`_TraceMode` sees every operator that the function calls. It records it on fake tensors (recorder.py), as a graph
without side effects, with labels on each node (labels.py). Tensors that the function reads without being passed them
(parameters and optimizer state as arrays, tensors of the closure) become graph inputs when they are first touched, so
nothing has to be declared.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import _disable_current_modes

from torchways.array import Array
from torchways.capture.collectives import ALL_REDUCE
from torchways.capture.current_trace import as_current_trace
from torchways.capture.library.modes import library_modes
from torchways.capture.library.rewrites import Rewrites
from torchways.capture.lowering.decompositions import decomposition_table, taken_apart
from torchways.capture.python_state.gradients import Bound, Gradients
from torchways.capture.python_state.host_numbers import Node
from torchways.capture.python_state.places import Gradient
from torchways.capture.python_state.tokens import TensorSource, memory_of
from torchways.capture.python_state.watcher import Watcher
from torchways.capture.regions import LOOP_KEY, LoopLabel
from torchways.capture.rows.loops import RowLoops
from torchways.capture.rows.ragged_tensors import RaggedTensors
from torchways.capture.rows.rules import RowRules
from torchways.capture.rows.tensor_methods import RowsInPython
from torchways.capture.rows.windows import Windows
from torchways.capture.source import user_line
from torchways.capture.tensor_kinds import check_tensor_kind
from torchways.capture.tracing.host_scalars import NumbersAsTensors, call_with_numbers, has_numbers
from torchways.capture.tracing.labels import LabellingRecorder
from torchways.capture.tracing.memory import place_of
from torchways.capture.tracing.microbatches import LoopTrace, check_loops
from torchways.capture.tracing.random_numbers import RandomNumbers
from torchways.capture.tracing.repeated_layers import repeated_layers
from torchways.capture.tracing.trace import GraphInput, NumberInput, Trace
from torchways.capture.tracing.traits import returned
from torchways.capture.tracing.value_reads import ValueReads, is_known_constant, tensors_in
from torchways.errors import CaptureError, DataDependentError, ShapeError
from torchways.operators import REPLICA, SUM_REPLICAS
from torchways.schedules import Schedule

#: It logs a traceback of its own for every shape error, which reaches the user as a CaptureError anyway.
_FAKE_TENSOR_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")

_HOST_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
}
_DEVICE = torch.ops.prim.device.default
#: Powers of a number: an optimizer's corrections of bias, such as 1 - 0.999 ** step.
_POWERS = {torch.ops.aten.pow.Scalar, torch.ops.aten._foreach_pow.ScalarAndTensor}
_ONE_DTYPE = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.convolution.default,
}
#: Operators whose result is one constant everywhere, and how to tell it from their arguments.
_CONSTANT_VALUE: dict[Any, Callable[[Any], float]] = {
    torch.ops.aten.zeros.default: lambda args: 0.0,
    torch.ops.aten.zeros_like.default: lambda args: 0.0,
    torch.ops.aten.ones.default: lambda args: 1.0,
    torch.ops.aten.ones_like.default: lambda args: 1.0,
    torch.ops.aten.full.default: lambda args: float(args[1]),
    torch.ops.aten.full_like.default: lambda args: float(args[1]),
}


class _TraceMode(LabellingRecorder):
    """Sees every operator of the traced function; see the module's docstring."""

    def __init__(
        self,
        fake_mode: FakeTensorMode,
        watcher: Watcher,
        gradients: Gradients,
        host_arguments: Sequence[torch.Tensor | None],
        reads_positions: bool,
    ) -> None:
        super().__init__(fake_mode, decomposition_table())
        self.watcher = watcher
        self.gradients = gradients
        self.inputs: list[GraphInput] = []
        self._scalars: dict[NumberInput, torch.Tensor] = {}
        #: Constants made by an optimizer's step, by storage (autograd may rewrap tensors): tensor, node and value.
        self._constants: dict[int, tuple[torch.Tensor, torch.fx.Node, float]] = {}
        self._by_memory: dict[int, GraphInput] = {}
        #: Arrays that were given other memory: by identity, the array and what stands for it now.
        self._assigned: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        #: Keeps lifted tensors alive, so that an id in `_by_memory` is never reused.
        self._alive: list[torch.Tensor] = []
        self.value_reads = ValueReads(
            self.inputs, lambda tensor: self.node_of(self._as_traced(tensor)), host_arguments, reads_positions
        )
        self.random = RandomNumbers()
        self.ragged = RaggedTensors(self.node_of)
        self.row_loops = RowLoops(self.ragged)
        self._row_rules = RowRules(self.ragged, self.row_loops, self._positions_of)

    # ---- operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        if func is ALL_REDUCE and self.loop is not None:
            raise CaptureError(
                f"tw.all_reduce at {user_line()} is called within a microbatch: return the values, and sum them after "
                "the loop"
            )
        if self._depth:  # part of an operator that was seen
            return self.record(func, args, kwargs)
        is_foreach = func._schema.name.startswith("aten::_foreach_")
        if not is_foreach and has_numbers(args, kwargs):
            return call_with_numbers(func, args, kwargs, self.scalar, self._again)
        if func in _HOST_READS and not all(map(is_known_constant, tensors_in(args))):
            return self._on_known(func, args, kwargs)
        if func is torch.ops.aten.lift_fresh.default:  # torch.tensor(...) in the user's code
            return self.record(func, args, kwargs)
        _check_dtypes(func, args)
        new_args, new_kwargs = pytree.tree_map_only(torch.Tensor, self._as_traced, (args, kwargs))
        self.row_loops.check(func, new_args, new_kwargs, torch._C._current_autograd_node() is not None)
        outer, self._label = self._label, self._label_now()
        try:
            result = self._run(func, new_args, new_kwargs, is_foreach)
        except UnsupportedOperatorException as error:
            raise CaptureError(
                f"operator {error.func} cannot be captured (it has no fake implementation) at {user_line()}; write it "
                "with operators that have one, or register one with torch.library.register_fake"
            ) from error
        finally:
            self._label = outer
        if func in (ALL_REDUCE, SUM_REPLICAS):  # no part of a call
            self._end_call()
        self.row_loops.note_result(func, result)
        if self.in_optimizer and func in _CONSTANT_VALUE:
            node = self.node_of(result)
            assert node is not None
            self._constants[_storage_of(result)] = (result, node, _CONSTANT_VALUE[func](args))
        return returned(func, args, kwargs, result)

    def _run(self, func: Any, args: Any, kwargs: Any, is_foreach: bool) -> Any:
        try:
            if self.ragged.concerns(func, args, kwargs) or self._row_rules.writes_by_mask(func, args):
                return self._on_rows(func, args, kwargs)
            if self.in_optimizer and func in _POWERS:
                # Python computes them in float64. In float32, 1 - 0.999 ** step has four digits in the first steps.
                args = (args[0], pytree.tree_map_only(torch.Tensor, self._in_float64, args[1]))
            if is_foreach:
                return self.record_foreach(func, args, kwargs, lambda *call: self._one_by_one(func, *call))
            if torch.Tag.nondeterministic_seeded in func.tags:
                with self.inside():
                    return self.random.call(func, args, kwargs)
            return self.record(func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            try:
                return self._on_known(func, args, kwargs)
            except DataDependentError:
                if not self._row_rules.selects(func, args):
                    raise
                with self.inside():
                    return self._row_rules.call(func, args, kwargs)

    def _in_float64(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._again(torch.ops.aten._to_copy.default, (tensor,), {"dtype": torch.float64})

    @contextmanager
    def _anew(self) -> Iterator[None]:
        """Sees what is called inside as if the traced function called it itself."""
        depth, self._depth = self._depth, 0
        try:
            with self:
                yield
        finally:
            self._depth = depth

    def _one_by_one(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self._anew():  # its C++ kernel calls the operators for each tensor
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)

    def _again(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls an operator as part of the trace."""
        with self._anew():
            return func(*args, **kwargs)

    def scalar(self, node: Node, dtype: torch.dtype) -> torch.Tensor:
        """Returns the graph's input for a number that is computed on the host at each call."""
        number = NumberInput(node.step, dtype)
        if number not in self._scalars:
            self._scalars[number] = self.add_graph_input(number, (), dtype).fake
        return self._scalars[number]

    def _on_rows(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls an operator on rows that a mask selects."""
        if self._row_rules.has_rule(func):
            with self.inside():
                return self._row_rules.call(func, args, kwargs)
        with self._anew():
            return taken_apart()[func](*args, **kwargs)

    def _on_known(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls an operator whose result, or its shape, depends on values: possible where these are known.

        Raises:
            DataDependentError: they are not.
        """
        return pytree.tree_map_only(torch.Tensor, self._lift, self.value_reads.ask(func, args, kwargs))

    def _positions_of(self, mask: torch.Tensor) -> torch.Tensor | None:
        """Returns the positions that a mask selects, if they are the same in each call."""
        reads = self.value_reads.reads
        num_reads = len(reads)
        try:
            positions = self._on_known(torch.ops.aten.nonzero.default, (mask,), {})
        except DataDependentError:
            return None
        asked = [source for read in reads[num_reads:] for source in read.sources]
        if any(isinstance(source, int) for source in asked):  # other masks of other calls would each need a graph
            del reads[num_reads:]
            return None
        return positions

    def _as_traced(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the fake tensor that stands for `tensor` in this trace."""
        if isinstance(tensor, FakeTensor) and not isinstance(tensor, Array):
            return tensor
        if (assigned := self._assigned.get(id(tensor))) is not None:
            return assigned[1]
        known = self._by_memory.get(memory_of(tensor))
        return known.fake if known is not None else self._lift(tensor)

    def _lift(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, Array) and (isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad):
            raise CaptureError(
                f"a parameter of shape {tuple(tensor.shape)} that is on no slice is used at {user_line()}; wrap its "
                "module with tw.function(mesh=...) or tw.pipeline(...), and build the optimizer after that"
            )
        with self.watcher.pause(), _disable_current_modes():
            source = self.watcher.source(tensor)
            check_tensor_kind(source.name, tensor, user_line())
            if tensor.requires_grad:
                self.gradients.note(tensor)
        lifted = self.add_graph_input(source, tuple(tensor.shape), tensor.dtype)
        self._by_memory[memory_of(tensor)] = lifted
        self._alive.append(tensor)
        return lifted.fake

    def forget_tensors(self) -> None:
        """The trace is over: the tensors that it lifted are not to wait for the garbage collector."""
        self._by_memory.clear()
        self._assigned.clear()
        self._alive.clear()

    def add_graph_input(self, source: Any, shape: tuple[int, ...], dtype: torch.dtype) -> GraphInput:
        """Adds a placeholder for `source` to the graph; callable in the midst of a trace."""
        fake = self.add_input(f"input_{len(self.inputs)}", shape, dtype)
        node = self.node_of(fake)
        assert node is not None
        graph_input = GraphInput(node, source, fake)
        self.inputs.append(graph_input)
        return graph_input

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what stands for a host tensor that is the same in each run."""
        if tensor.numel() == 1:
            return super().constant(tensor)
        fake = self.fake_constant(tensor)
        self.bind(fake, self.add_graph_input(tensor, tuple(tensor.shape), tensor.dtype).node)
        return fake

    def stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what stands for a tensor of Python's state."""
        return self._as_traced(tensor)

    def set_data(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Gives a tensor the memory of another, as assigning to its `data` does.

        Raises:
            CaptureError: it has another shape or dtype, the tensor is an argument of the program, or this is within a
                microbatch or a call of a replicated module.
        """
        if value is tensor:
            return
        now = self._as_traced(value)
        if now.shape != tensor.shape or now.dtype != tensor.dtype:
            raise CaptureError(
                f"a tensor of shape {list(now.shape)} and dtype {now.dtype} is assigned to the data of one of shape "
                f"{list(tensor.shape)} and dtype {tensor.dtype} at {user_line()}: do it outside the program"
            )
        within = "a microbatch" if self.loop is not None else "a replicated module" if self.replicas.running else ""
        if within or any(item.fake is tensor for item in self.inputs):
            what = f"within {within}" if within else "of an argument, which its caller would not see"
            raise CaptureError(f"data is assigned at {user_line()} {what}: copy the value with .data.copy_(value)")
        with torch.no_grad():
            alias: Any = now.detach()
        if not isinstance(tensor, Array):
            with torch._C.DisableTorchFunctionSubclass():
                tensor.data = alias
            tensor._tw_place = alias._tw_place  # type: ignore[attr-defined]
            return
        self._assigned.pop(id(tensor), None)
        own, place = place_of(self._as_traced(tensor)), place_of(alias)
        if place.memory is not own.memory or place.steps:
            self._assigned[id(tensor)] = tensor, alias

    def assigned_data(self) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Returns the arrays whose `data` were assigned, each with what stands for it now."""
        return list(self._assigned.values())

    def value_of(self, tensor: torch.Tensor) -> object:
        """Returns what a tensor's value is now: the same object until it is written to."""
        return self.node_of(self._as_traced(tensor))

    def constant_state(self, tensor: torch.Tensor) -> float | None:
        """Returns the value that all elements of `tensor` had when an optimizer's step made it, if it had one."""
        known = self._constants.get(_storage_of(tensor))
        return known[2] if known is not None else None

    def make_input_of(self, tensor: Any, array: Array) -> None:
        """Makes the constant that became `tensor` a graph input that stands for `array`."""
        _, node, _ = self._constants.pop(_storage_of(tensor))
        node.op, node.target, node.args, node.kwargs = "placeholder", f"input_{len(self.inputs)}", (), {}
        source = self.watcher.source(array)
        self.inputs.append(GraphInput(node, source, tensor))
        self._by_memory[memory_of(array)] = self.inputs[-1]
        self._alive.append(array)

    def constants_before(self, first: int) -> dict[int, torch.Tensor]:
        """Returns the values that constants which became inputs have before the graph changes them.

        Args:
            first: number of the first of these inputs.
        """
        found: dict[int, torch.Tensor] = {}
        for item in self.inputs[first:]:
            if not isinstance(item.source, TensorSource):
                continue
            if (after := self._by_memory.get(memory_of(item.source.tensor))) is not None:
                fake = item.fake
                found[id(after.fake)] = self.stands_for(item.node, fake.shape, fake.stride(), fake.dtype)
        return found

    @contextmanager
    def microbatches(
        self, function: Callable[..., Any], num_turns: int, num_whole: int, schedule: str | Schedule
    ) -> Iterator[LoopTrace]:
        """Opens a loop over microbatches.

        Raises:
            CaptureError: within another loop, or within an optimizer's step.
        """
        if self.loop is not None or self.in_optimizer:
            raise CaptureError(f"tw.microbatch at {user_line()} is called within another loop over microbatches")
        label = LoopLabel(num_turns, schedule, user_line())
        yield LoopTrace(self, self.watcher, self.gradients, label, function, num_whole)

    def leaf_copy(self, parameter: torch.Tensor, number: int) -> torch.Tensor:
        """Returns a copy of a parameter, on the slice of a replica, that gathers gradients of its own.

        It is the same in all microbatches: it is made before their loop.
        """
        loop, self.loop = self.loop, None
        where: Any = contextlib.nullcontext()
        if loop is not None:
            of_loop = (node for node in self.graph.nodes if node.meta.get(LOOP_KEY, (None,))[0] is loop[0])
            where = self.graph.inserting_before(next(of_loop))
        try:
            with where, torch.no_grad():
                copy = REPLICA(parameter.detach(), number)
        finally:
            self.loop = loop
        leaf = copy.detach().requires_grad_()
        self.gradients.note(leaf, Gradient(Bound(self.watcher.source(parameter))), is_condition=False)
        return leaf

    def moved(self, old: torch.fx.Node, new: torch.fx.Node) -> None:
        self.ragged.follow(old, new)


def trace(
    function: Callable[..., Any],
    example_args: list[torch.Tensor],
    escaped: Callable[[], list[torch.Tensor]],
    watcher: Watcher,
    gradients: Gradients,
    host_arguments: Sequence[torch.Tensor | None],
    *,
    reads_positions: bool,
) -> Trace:
    """Traces `function` whole.

    Args:
        function: called once with a list of fake tensors, one for each of `example_args`; returns any pytree.
        example_args: the tensor arguments.
        escaped: called after it; returns tensors made inside that live on in Python objects (optimizer state,
            gradients): they become further outputs.
        watcher, gradients: note what it reads of Python's state.
        host_arguments: the tensors of this call whose values the function may read, by position; None: it may not.
        reads_positions: it may also ask them for the positions of what is selected (`mask.nonzero()`).

    Raises:
        CaptureError: the function cannot be captured.
    """
    mode = _TraceMode(FakeTensorMode(), watcher, gradients, host_arguments, reads_positions)
    # With these two flags optimizers take their tensor-only paths and library code its export-friendly ones.
    _FAKE_TENSOR_LOGGER.disabled = True
    saved_flag, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
    saved_random, saved_cache = torch.get_rng_state(), torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with (
            as_current_trace(mode),
            mode.fake_mode,
            RowsInPython(mode.ragged, mode.row_loops),
            Windows(mode.ragged),
            Rewrites(),
            library_modes(mode.ragged),
            repeated_layers(mode.repeated_region, mode.is_alone),
            NumbersAsTensors(mode.scalar),
            mode.random.seeding(),
            mode,
        ):
            return _traced(mode, function, example_args, escaped)
    finally:
        torch.set_autocast_cache_enabled(saved_cache)
        torch.set_rng_state(saved_random)
        torch.compiler._is_compiling_flag = saved_flag
        _FAKE_TENSOR_LOGGER.disabled = False
        mode.forget_tensors()


def _traced(
    mode: _TraceMode,
    function: Callable[..., Any],
    example_args: list[torch.Tensor],
    escaped: Callable[[], list[torch.Tensor]],
) -> Trace:
    fakes = [
        mode.add_graph_input(position, tuple(tensor.shape), tensor.dtype).fake
        for position, tensor in enumerate(example_args)
    ]
    flat, out_spec = pytree.tree_flatten(function(fakes))
    outputs = [value for value in flat if isinstance(value, torch.Tensor)]
    results = [*outputs, *escaped()]
    mode.row_loops.check_results(results)
    nodes: list[Any] = [mode.node_of(mode.stand_in(tensor)) for tensor in results]
    values = [mode.node_of(item.fake) for item in mode.inputs]
    written = [position for position, item in enumerate(mode.inputs) if values[position] is not item.node]
    graph = mode.graph
    graph.output((*nodes, *(values[position] for position in written)))
    check_loops(graph)
    for item in reversed(mode.inputs):
        first = next(iter(graph.nodes))
        if first is not item.node:
            first.prepend(item.node)
    return Trace(
        graph=graph,
        inputs=mode.inputs,
        num_outputs=len(outputs),
        out_spec=out_spec,
        written=written,
        constants={position: value for position, value in enumerate(flat) if not isinstance(value, torch.Tensor)},
        reads=mode.value_reads.reads,
        seed=mode.random.seed,
        replicas=mode.replicas.slices,
    )


def _storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _check_dtypes(func: Any, args: Any) -> None:
    """Refuses mixed dtypes where eager PyTorch does but fake tensors and XLA do not."""
    if func in _ONE_DTYPE:
        dtypes = [value.dtype for value in args if isinstance(value, torch.Tensor)]
        if len(set(dtypes)) > 1:
            names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ShapeError(
                f"{func} needs arguments of one dtype, not {names}, at {user_line()}; convert one with .to(dtype)"
            )
    if func is torch.ops.aten.embedding.default and args[1].dtype not in (torch.int32, torch.int64):
        dtype = str(args[1].dtype).removeprefix("torch.")
        raise ShapeError(f"embedding needs indices of dtype int64 or int32, not {dtype}, at {user_line()}")
