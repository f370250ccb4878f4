"""Records the operators of a Python function as a graph without side effects, in one pass.

Every operator that reaches PyTorch's dispatch (below autograd) is run on fake tensors, for its shape, and recorded as a
node. Operators in the table of decompositions are taken apart first. An operator that writes gives its target's memory
(memory.py) a new value, and views of it are taken again where they are read later. So the graph has no in-place
operator, and no second pass removes any.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from torchways.capture.lowering.accumulation import HALVES, adds_up
from torchways.capture.source import user_line
from torchways.capture.tracing.memory import Memory, Place, Step, place_of
from torchways.capture.tracing.traits import Traits, is_composite, returned, traits_of
from torchways.errors import CaptureError
from torchways.graphs import SOURCE_KEY

aten = torch.ops.aten

_CPU = torch.device("cpu")
_ALIASES = {aten.alias.default, aten.detach.default, aten.lift_fresh.default, aten.lift_fresh_copy.default}


@dataclass(frozen=True, slots=True, eq=False)
class _Template:
    """The nodes that an operator on a list made for one of its tensors.

    Attributes:
        inputs: the nodes of its tensors.
        nodes: what it added to the graph.
        made: the node of its result.
        result: what stands for that.
    """

    inputs: tuple[Any, ...]
    nodes: list[torch.fx.Node]
    made: torch.fx.Node
    result: torch.Tensor


class Recorder(TorchDispatchMode):
    """Records what runs inside.

    Args:
        fake_mode: of the tensors that stand for values.
        decompositions: what takes operators apart; a function may return NotImplemented to keep one whole.

    Attributes:
        graph: what was recorded so far; ``meta["val"]`` of a node is a fake tensor of its shape and dtype, not the one
            that the traced function has.
    """

    def __init__(self, fake_mode: FakeTensorMode, decompositions: Mapping[Any, Any]) -> None:
        super().__init__()
        self.fake_mode = fake_mode
        self.graph = torch.fx.Graph()
        self._decompositions = decompositions
        #: One fake tensor for each shape and dtype.
        self._values: dict[tuple[Any, ...], FakeTensor] = {}
        #: What operators give, by their arguments' geometry: shapes, strides and dtypes.
        self._shapes: dict[Any, tuple[Any, ...]] = {}
        #: Of memory that was written to: the node of its value before. Kept where somebody asks for it.
        self.overwritten: dict[Memory, torch.fx.Node] | None = None
        #: Memory that became a copy of other memory, with that: both have one node until one is written to.
        self.copies: list[tuple[Memory, Memory]] = []
        #: Whether views are being taken again.
        self._takes_again = False
        #: The operator of which a pure form is sought.
        self._functionalizing: Any = None
        #: Operators within operators: those that one is taken apart into.
        self._depth = 0

    # ---- for subclasses

    def label(self, node: torch.fx.Node) -> None:
        """Labels a new node."""

    @contextmanager
    def noting_writes(self) -> Iterator[dict[Memory, torch.fx.Node]]:
        """Notes memory that is written to inside, with the node of its value before."""
        outer, self.overwritten = self.overwritten, {}
        found = self.overwritten
        try:
            yield found
        finally:
            self.overwritten = outer
            if outer is not None:
                for memory, before in found.items():
                    outer.setdefault(memory, before)

    @contextmanager
    def noting_writes_to_others(self) -> Iterator[dict[object, str]]:
        """Notes memory that was there before and is written to inside, with the line that does; known at the end."""
        last = self.graph._root.prev
        found: dict[object, str] = {}
        with self.noting_writes() as written:
            yield found
        made = {node for node in _nodes_after(last, self.graph) if node.op != "placeholder"}
        for memory, before in written.items():
            if before not in made:
                found[memory] = memory.node.meta.get(SOURCE_KEY, "")

    def is_current(self, view: torch.fx.Node) -> bool:
        """Whether a view that was taken before may be read where the trace is now."""
        return True

    def moved(self, old: torch.fx.Node, new: torch.fx.Node) -> None:
        """Notes that a tensor has the value `new` in place of `old`: it was written to, or its memory was."""

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what stands for a host tensor that is the same in each run.

        Raises:
            CaptureError: it has more than one element.
        """
        if tensor.numel() != 1:
            raise CaptureError(f"a decomposition builds a tensor of shape {list(tensor.shape)} on the host")
        fake = self.fake_constant(tensor)
        with _disable_current_modes():
            value = tensor.item()
        node = self._node(aten.full.default, (list(tensor.shape), value), {"dtype": tensor.dtype, "device": _CPU})
        node.meta["val"] = self.value_like(tensor.shape, tensor.dtype)
        self.bind(fake, node)
        return fake

    # ---- tensors and nodes

    def fake_constant(self, tensor: torch.Tensor) -> FakeTensor:
        """Returns a fake tensor that knows the value of a tensor on the host; it has no node yet."""
        with _disable_current_modes(), self.fake_mode:
            return aten.lift_fresh.default(tensor)

    def add_input(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> FakeTensor:
        """Adds a placeholder to the graph; returns what stands for it."""
        node = self.graph.create_node("placeholder", name, (), {})
        node.meta["val"] = self.value_like(shape, dtype)
        with _disable_current_modes(), self.fake_mode:
            fake = torch.empty(tuple(shape), dtype=dtype)
        self.bind(fake, node)
        return fake  # type: ignore[return-value]

    def bind(self, fake: Any, node: torch.fx.Node) -> None:
        """Makes a fake tensor one of its own memory, whose value is a node's."""
        memory = Memory(node, fake.shape, fake.stride(), fake.dtype)
        fake._tw_place = Place(memory, (), node, 0)

    def node_of(self, tensor: Any) -> torch.fx.Node | None:
        """Returns the node of a tensor's present value, or None if it is none of this recorder's."""
        place: Place | None = getattr(tensor, "_tw_place", None)
        if place is None or place.memory.node.graph is not self.graph:
            return None
        if place.version != place.memory.version or not (self._takes_again or self._is_current(place)):
            self._take_views_again(place)
        return place.node

    def _is_current(self, place: Place) -> bool:
        return not place.steps or self.is_current(place.node)

    def value_like(self, shape: Sequence[int], dtype: torch.dtype) -> FakeTensor:
        """Returns the fake tensor that nodes of a shape and dtype share as ``meta["val"]``."""
        key = (tuple(shape), dtype)
        found = self._values.get(key)
        if found is None:
            with _disable_current_modes(), self.fake_mode:
                found = self._values[key] = torch.empty(key[0], dtype=dtype)  # type: ignore[assignment]
        return found  # type: ignore[return-value]

    def _take_views_again(self, place: Place) -> None:
        memory = place.memory
        node = memory.node
        if place.steps:
            fake = self._copy_of_memory(memory)
            outer, self._takes_again = self._takes_again, True
            try:
                with _disable_current_modes(), self.fake_mode, self.inside():
                    for step in place.steps:
                        fake = step(fake)  # type: ignore[assignment]
                found = self.node_of(fake)
            finally:
                self._takes_again = outer
            assert found is not None
            node = found
        old, place.node, place.version = place.node, node, memory.version
        self.moved(old, node)

    def _copy_of_memory(self, memory: Memory) -> FakeTensor:
        return self.stands_for(memory.node, memory.shape, memory.strides, memory.dtype)

    def _strided_as(self, target: Any, value: Any) -> Any:
        """Returns a tensor with the strides of another of its shape, by which it can be viewed in the same ways."""
        node = self.node_of(value)
        if node is None or value.stride() == target.stride():
            return value
        return self.stands_for(node, target.shape, target.stride(), target.dtype)

    def stands_for(self, node: torch.fx.Node, shape: Any, strides: Any, dtype: torch.dtype) -> FakeTensor:
        """Returns a tensor of its own memory, whose value is a node's."""
        fake = self._new((shape, strides, dtype))
        self.bind(fake, node)
        return fake

    # ---- operators

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Makes what is called inside part of the operator under way."""
        depth, self._depth = self._depth, self._depth + 1
        try:
            with self:
                yield
        finally:
            self._depth = depth

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.record(func, args, kwargs or {})

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator on fake tensors, and adds it to the graph."""
        if func in _ALIASES:
            return self._alias(func, args[0])
        if func.namespace == "prim":  # they ask for a tensor's device or layout
            return func(*args, **kwargs)
        if func is aten.copy.default:
            return self._converted(args[1], args[0])
        traits = traits_of(func)
        if traits.is_mutable:
            return self._record_write(func, traits, args, kwargs)
        if adds_up(func, args, kwargs) and any(_is_half(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
            return self._in_float32(func, traits, args, kwargs)
        decomposed = self._decomposed(func, args, kwargs)
        if decomposed is not NotImplemented:
            return self._as_view(func, traits, args, kwargs, decomposed) if traits.is_view else decomposed
        if traits.has_dim and isinstance(args[0], torch.Tensor) and args[0].dim() == 0:
            return self._along_dim_of_scalar(func, args, kwargs)
        if traits.is_view and isinstance(args[0], (int, float, complex)):  # as autograd's formulas conjugate numbers
            with _disable_current_modes():
                number = func(*args, **kwargs).resolve_conj().resolve_neg()
            return self.constant(number)
        result = self._shaped(func, traits, args, kwargs)
        if not traits.returns_tensors and traits.returns_something:
            return result  # it asks for a tensor's device, layout or size
        node = self._node(func, args, kwargs)
        if isinstance(result, torch.Tensor):
            self._bind_result(result, node, traits, args, kwargs, None)
            node.meta["val"] = self.value_like(result.shape, result.dtype)
        elif isinstance(result, (tuple, list)):
            values: list[Any] = []
            for index, item in enumerate(result):
                if not isinstance(item, torch.Tensor):
                    values.append(item)
                    continue
                values.append(self.value_like(item.shape, item.dtype))
                item_node = self.graph.create_node("call_function", operator.getitem, (node, index))
                item_node.meta["val"] = values[-1]
                self.label(item_node)
                self._bind_result(item, item_node, traits, args, kwargs, index)
            node.meta["val"] = type(result)(values) if type(result) in (tuple, list) else tuple(values)
        else:
            node.meta["val"] = None
        return result

    def _shaped(self, func: Any, traits: Traits, args: Any, kwargs: Any) -> Any:
        """Runs an operator on fake tensors; what it gives for these shapes, dtypes and numbers is computed once."""
        if traits.is_view:
            return self._view(func, args, kwargs)
        try:
            key = (func, *map(_geometry, args), *((name, _geometry(item)) for name, item in kwargs.items()))
            known = self._shapes.get(key)
        except TypeError:  # an argument of which nothing is known
            return func(*args, **kwargs)
        if known is not None:
            return self._new(known[0]) if len(known) == 1 else tuple(map(self._new, known))
        result = func(*args, **kwargs)
        items = (result,) if isinstance(result, torch.Tensor) else result
        is_plain = type(items) in (tuple, list) and len(items) > (0 if items is not result else 1)
        if is_plain and all(type(item) is FakeTensor and item.constant is None for item in items):
            self._shapes[key] = tuple((item.shape, item.stride(), item.dtype) for item in items)
        return result

    def _new(self, geometry: tuple[torch.Size, tuple[int, ...], torch.dtype]) -> FakeTensor:
        shape, strides, dtype = geometry
        with torch._C._DisableTorchDispatch():
            content = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        return FakeTensor(self.fake_mode, content, _CPU)

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator that makes a view, without what the fake mode does for all others."""
        with in_kernel_invocation_manager(self.fake_mode):
            views = func(*args, **kwargs)
        if isinstance(views, (tuple, list)):
            return [FakeTensor(self.fake_mode, item, _CPU) for item in views]
        return FakeTensor(self.fake_mode, views, _CPU) if views is not args[0] else views

    def _node(self, func: Any, args: Any, kwargs: Any) -> torch.fx.Node:
        arguments = tuple([self._argument(item) for item in args])
        options = {name: self._argument(item) for name, item in kwargs.items()}
        node = self.graph.create_node("call_function", func, arguments, options)
        self.label(node)
        return node

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            node = self.node_of(value)
            return self.node_of(self.constant(value)) if node is None else node
        if isinstance(value, (list, tuple)):
            return [self._argument(item) for item in value]
        return value

    def _bind_result(
        self, result: Any, node: torch.fx.Node, traits: Traits, args: Any, kwargs: Any, index: int | None
    ) -> None:
        if traits.is_view and result is not args[0]:
            place = place_of(args[0])
            step = Step(traits.func, tuple(args[1:]), kwargs, index)
            result._tw_place = Place(place.memory, (*place.steps, step), node, place.memory.version)
        elif all(result is not item for item in args):
            self.bind(result, node)

    def _alias(self, func: Any, tensor: Any) -> Any:
        if not isinstance(tensor, FakeTensor):
            return self.constant(tensor)
        result = self._view(func, (tensor,), {}) if tensor.constant is None else func(tensor)
        if result is not tensor and (node := self.node_of(tensor)) is not None:
            place = place_of(tensor)
            result._tw_place = Place(place.memory, place.steps, node, place.memory.version)
        return result

    def _decomposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Takes an operator apart, if it is to be; returns NotImplemented if not."""
        decomposition = self._decompositions.get(func)
        if decomposition is not None:
            with self.inside():
                result = decomposition(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if is_composite(func):
            with self.inside():
                return func.decompose(*args, **kwargs)
        return NotImplemented

    def _as_view(self, func: Any, traits: Traits, args: Any, kwargs: Any, result: Any) -> Any:
        """Returns the view that an operator makes, with the value that its decomposition computed."""
        first = args[0]
        if not isinstance(first, torch.Tensor):
            return result
        memory = place_of(first).memory
        items = result if isinstance(result, (list, tuple)) else [result]
        if all(place_of(item).memory is memory for item in items):
            return result
        views = self._view(func, args, kwargs)
        several = isinstance(views, (list, tuple))
        for index, (view, item) in enumerate(zip(views if several else [views], items, strict=True)):
            node = self.node_of(item)
            assert node is not None
            self._bind_result(view, node, traits, args, kwargs, index if several else None)
        return views

    def _in_float32(self, func: Any, traits: Traits, args: Any, kwargs: Any) -> Any:
        """Runs an operator on float32 in place of 16 bits, and rounds its results."""
        shapes = self._shaped(func, traits, args, kwargs)
        with self.inside():
            args, kwargs = pytree.tree_map(_widened, (args, kwargs))
            return pytree.tree_map(
                lambda value, like: value.to(like.dtype) if isinstance(like, torch.Tensor) else value,
                func(*args, **kwargs),
                shapes,
            )

    def _along_dim_of_scalar(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator along the dimension that a scalar does not have, which torch-xla refuses, on vectors."""
        shapes = func(*args, **kwargs)
        with self.inside():
            args, kwargs = pytree.tree_map_only(
                torch.Tensor, lambda value: value.reshape(1) if value.dim() == 0 else value, (args, kwargs)
            )
            result = func(*args, **kwargs)
            return pytree.tree_map(
                lambda value, like: value.reshape(like.shape) if isinstance(like, torch.Tensor) else value,
                result,
                shapes,
            )

    # ---- lists of tensors

    def record_foreach(self, func: Any, args: Any, kwargs: Any, call: Callable[..., Any]) -> Any:
        """Runs an operator on lists of tensors: once for the first of each kind, whose nodes are copied for the others.

        Args:
            func, args, kwargs: the operator, on traced tensors.
            call: calls it on lists of one tensor.
        """
        lists = [position for position, item in enumerate(args) if isinstance(item, (list, tuple))]
        results: list[Any] = []
        templates: dict[Any, _Template] = {}
        for number in range(len(args[lists[0]])):
            mine = [[item[number]] if position in lists else item for position, item in enumerate(args)]
            operands = [mine[position][0] for position in lists]
            tensors = [item for item in operands if isinstance(item, torch.Tensor)]
            nodes = [self.node_of(item) for item in tensors]
            is_whole = not (func._schema.is_mutable and place_of(tensors[0]).steps)
            key = (tuple(map(_kind, operands)), tuple(nodes.index(node) for node in nodes))
            template = templates.get(key) if is_whole else None
            if template is None:
                before = self.graph._root.prev
                result = call(mine, kwargs)
                target = tensors[0] if func._schema.is_mutable else result[0]
                made = self.node_of(target)
                assert made is not None
                if is_whole:
                    templates[key] = _Template(tuple(nodes), _nodes_after(before, self.graph), made, target)
            else:
                made = self._copy_nodes(template, nodes)
                if func._schema.is_mutable:
                    target = tensors[0]
                    self._write_memory(place_of(target), made)
                else:
                    like = template.result
                    target = self.stands_for(made, like.shape, like.stride(), like.dtype)
            results.append(target)
        return results if func._schema.returns else None

    def _copy_nodes(self, template: _Template, nodes: Sequence[Any]) -> torch.fx.Node:
        copies = dict(zip(template.inputs, nodes, strict=True))
        for node in template.nodes:
            if node.op == "placeholder":
                continue
            arguments, options = torch.fx.node.map_arg((node.args, node.kwargs), lambda item: copies.get(item, item))
            copies[node] = copy = self.graph.create_node("call_function", node.target, arguments, options)
            copy.meta = dict(node.meta)
        return copies.get(template.made, template.made)

    # ---- writes

    def _record_write(self, func: Any, traits: Traits, args: Any, kwargs: Any) -> Any:
        if func is aten.copy_.default:
            self.write(args[0], self._converted(args[1], args[0]))
            self.copies.append((place_of(args[0]).memory, place_of(args[1]).memory))
            return args[0]
        decomposition = self._decompositions.get(func)
        if decomposition is not None and traits.functional not in self._decompositions:
            with self.inside():  # it writes by operators that have a pure form
                return returned(func, args, kwargs, decomposition(*args, **kwargs))
        if traits.functional is None:
            return self._functionalized(func, args, kwargs)
        target = args[0]
        if torch.Tag.inplace_view in func.tags and traits.functional.is_view:  # as transpose_
            with self.inside():
                view = traits.functional(*args, **kwargs)
            func(*args, **kwargs)
            target._tw_place = view._tw_place
            return target
        with self.inside():
            value = traits.functional(*args, **kwargs)
            if value.shape != target.shape:
                with self.fake_mode:
                    func(*args, **kwargs)  # raises what PyTorch does
            if value.dtype != target.dtype:
                value = aten._to_copy.default(value, dtype=target.dtype)
        self.write(target, value)
        return target

    def _converted(self, source: Any, target: Any) -> Any:
        """Returns a tensor in the shape and dtype of another, as a copy to that converts it."""
        with self.inside():
            if source.dtype != target.dtype:
                source = aten._to_copy.default(source, dtype=target.dtype)
            if source.shape != target.shape:
                source = aten.expand.default(source, list(target.shape))
        return self._strided_as(target, source)

    def write(self, target: Any, value: Any) -> None:
        """Gives a tensor, and all that share its memory, the value of another of its shape and dtype."""
        node = self.node_of(value)
        place = place_of(target)
        assert node is not None
        if target.constant is not None:
            target.constant = None
        if not place.steps:
            self._write_memory(place, node)
            return
        base = self._copy_of_memory(place.memory)
        source = self._strided_as(target, value)

        def scatter(base: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
            view = base
            for step in place.steps:
                view = step(view)
            view.copy_(source)
            return base

        noted, self.overwritten = self.overwritten, None  # `base` is no memory of the trace's
        try:
            self._functionalize(scatter, [base, source])
        finally:
            self.overwritten = noted
        written = self.node_of(base)
        assert written is not None
        self._write_memory(place, written)
        old, place.node = place.node, node
        self.moved(old, node)

    def _write_memory(self, place: Place, node: torch.fx.Node) -> None:
        memory = place.memory
        old, memory.node = memory.node, node
        if self.overwritten is not None:
            self.overwritten.setdefault(memory, old)
        memory.version += 1
        place.version = memory.version
        if not place.steps:
            place.node = node
        self.moved(old, node)

    def _functionalized(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator that writes to some of its arguments through PyTorch's own functionalization.

        Raises:
            CaptureError: that makes the very same operator of it, as of `resize_`.
        """
        if func is self._functionalizing:
            raise CaptureError(f"{func} has no form without side effects, at {user_line()}")
        leaves, spec = pytree.tree_flatten((args, kwargs))
        positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

        def call(*tensors: torch.Tensor) -> Any:
            filled = list(leaves)
            for position, tensor in zip(positions, tensors, strict=True):
                filled[position] = tensor
            new_args, new_kwargs = pytree.tree_unflatten(filled, spec)
            return func(*new_args, **new_kwargs)

        outer, self._functionalizing = self._functionalizing, func
        try:
            result = self._functionalize(call, [leaves[position] for position in positions])
        finally:
            self._functionalizing = outer
        return returned(func, args, kwargs, result)

    def _functionalize(self, function: Callable[..., Any], tensors: list[Any]) -> Any:
        """Calls a function; what it writes to tensors becomes their value. Returns its result."""
        wrapped = [torch._to_functional_tensor(tensor) for tensor in tensors]
        key = torch._C.DispatchKey.Functionalize  # which is left out within a dispatch
        included = torch._C._dispatch_tls_local_include_set().add(key)
        excluded = torch._C._dispatch_tls_local_exclude_set().remove(key)
        with torch._C._ForceDispatchKeyGuard(included, excluded), self.inside():
            before = torch._functionalize_enable_reapply_views(True)  # type: ignore[attr-defined]
            try:
                result = function(*wrapped)
                for item in (*wrapped, *_tensors(result)):
                    torch._sync(item)  # type: ignore[attr-defined]
            finally:
                torch._functionalize_enable_reapply_views(before)  # type: ignore[attr-defined]
        for tensor, item in zip(tensors, wrapped, strict=True):
            value = torch._from_functional_tensor(item)
            if value is not tensor:
                self.write(tensor, value)
        return pytree.tree_map_only(torch.Tensor, torch._from_functional_tensor, result)


def _geometry(value: Any) -> Any:
    """Returns the part of an argument that decides the shape of an operator's result.

    Raises:
        TypeError: its value may.
    """
    if type(value) is FakeTensor:
        if value.constant is not None:
            raise TypeError
        return value.shape, value.stride(), value.dtype
    kind = type(value)
    if kind in (list, tuple):
        return tuple(map(_geometry, value))
    if kind not in _PLAIN:
        raise TypeError
    return kind, value


#: Types of arguments that are compared by value.
_PLAIN = {int, float, bool, type(None), str, complex, torch.dtype, torch.device, torch.layout, torch.memory_format}


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in HALVES


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value in HALVES else value
    return value.to(torch.float32) if _is_half(value) else value


def _kind(item: Any) -> Any:
    """Returns what elements of lists have in common for which an operator does the same."""
    if isinstance(item, torch.Tensor):
        return tuple(item.shape), item.dtype
    return (type(item), item) if type(item) in (int, float, bool, complex) else id(item)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _nodes_after(before: torch.fx.Node, graph: torch.fx.Graph) -> list[torch.fx.Node]:
    nodes = []
    while (before := before.next) is not graph._root:
        nodes.append(before)
    return nodes
