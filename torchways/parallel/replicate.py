"""`tw.replicate`: a module with a copy on each of several slices, which share each batch.

A call splits its tensors along dimension 0, runs a part on each replica, and puts the results together. There is one
logical parameter: the copies are made, and kept the same, by the pass that separates replicas
(capture/partitioning/replicas.py).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.utils._pytree as pytree

from torchways.capture.current_trace import CurrentTrace, current_trace
from torchways.capture.python_state.gradients import GRAD, gradient_of
from torchways.capture.python_state.watcher import active_watcher
from torchways.capture.replica_trace import Leaf
from torchways.capture.source import user_line
from torchways.capture.tracing.containers import Containers
from torchways.capture.tracing.memory import place_of
from torchways.capture.tracing.objects import open_objects
from torchways.errors import CaptureError, PlacementError, ShapeError, UserError
from torchways.mesh import VirtualSlice
from torchways.operators import REPLICA, SUM_REPLICAS
from torchways.parallel.parts import is_split, merged

#: Attribute of a replicated module's class: the number of its replicas.
_COUNT = "_torchways_num_replicas"
#: How far `replicas_of` looks, from variable to attribute to attribute.
_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Reduction:
    """How gradients are summed over replicas.

    Attributes:
        bucket_bytes: gradients travel together, up to so many bytes.
        dtype: name of the dtype as which they travel; "": their own.
    """

    bucket_bytes: int
    dtype: str


def note_replicas(module: torch.nn.Module, count: int) -> None:
    """Notes how many replicas a module has, and its copies; see `replicas_of`."""
    setattr(type(module), _COUNT, count)


def check_replicas(stages: Sequence[Sequence[VirtualSlice]]) -> None:
    """Raises PlacementError unless there are replicas with as many stages each, on slices of their own."""
    if not stages or len({len(row) for row in stages}) != 1 or not stages[0]:
        raise PlacementError(
            "tw.replicate: meshes is a list of slices, one for each replica, or of lists of as many slices, one for "
            f"each stage of a replica; there are {[len(row) for row in stages]}"
        )
    of_replica = [{mesh.root for mesh in row} for row in stages]
    if sum(map(len, of_replica)) != len(set().union(*of_replica)):
        raise PlacementError("tw.replicate: two replicas share a slice; give each slices of its own")
    axes = {mesh.mesh_dim_names for row in stages for mesh in row}
    if len(axes) > 1:
        raise PlacementError(f"tw.replicate: all slices need the same axes, not {' and '.join(map(str, sorted(axes)))}")


def replica_call(
    stages: Sequence[Sequence[VirtualSlice]], reduction: Reduction, homes: dict[str, VirtualSlice]
) -> Callable[..., Any]:
    """Returns what runs a call of a replicated module within a trace.

    Args:
        stages: for each replica, the slices of its stages.
        reduction: how gradients are summed.
        homes: the first replica's slice of each parameter, by name.
    """
    counterparts = {first.root: tuple(row[index].root for row in stages) for index, first in enumerate(stages[0])}

    def call(module: torch.nn.Module, plain_call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        mode = current_trace()
        assert mode is not None
        replicas = mode.replicas
        if id(module) in replicas.running:
            return plain_call(*args, **kwargs)
        for first, slices in counterparts.items():
            if replicas.slices.setdefault(first, slices) != slices:
                raise PlacementError(f"mesh {first} holds replicas of modules whose other replicas are elsewhere")

        def run(number: int, args: Any, kwargs: Any) -> Any:
            values = _state_of(mode, module, number, counterparts, homes, reduction)
            where = mode.stage(stages[number][0], type(module).__name__, 0)
            given = Containers((args, kwargs))
            with replicas.calling(module, number), where, _recurrent_layers_as_they_are(module):
                result = torch.func.functional_call(module, values, args, kwargs, tie_weights=False)
            if replicas.number is None and (changed := given.changed()):
                kind = type(given.items[changed[0]]).__name__
                raise CaptureError(
                    f"a replicated {type(module).__name__} changes a {kind} that it is given when it is called at "
                    f"{user_line()}: each replica has one of its own. Let it return the value"
                )
            return result

        if replicas.leaves is None and mode.loop is not None:
            raise CaptureError(
                f"the function of tw.microbatch calls a replicated module at {user_line()}, which its variables do not "
                "lead to: make the module a variable of the function"
            )
        if replicas.number is not None:
            return run(replicas.number % len(stages), args, kwargs)
        with mode.unplaced():
            leaves, spec = pytree.tree_flatten(open_objects((args, kwargs)))
            parts = _parts(leaves, spec, len(stages))
            before = _writes()
            with mode.noting_writes_to_others() as written:
                results = [open_objects(run(0, *parts[0]))]
            _check_memory(mode, module, written, leaves)
            after_first = _writes()
            results += [open_objects(run(number, *part)) for number, part in enumerate(parts[1:], start=1)]
            _check_writes(module, before, after_first, _writes())
            rows = [len(next(filter(is_split, pytree.tree_leaves(open_objects(part))))) for part in parts]
            return merged(
                results, functools.partial(_merged_leaf, rows), f"replicas return different structures at {user_line()}"
            )

    return call


@contextmanager
def _recurrent_layers_as_they_are(module: torch.nn.Module) -> Iterator[None]:
    """Takes back that recurrent layers note the weights with which they are called: their own stay what they were."""
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.RNNBase)]
    noted = [{name: vars(layer)[name] for name in ("_flat_weights", "_flat_weight_refs")} for layer in layers]
    try:
        yield
    finally:
        for layer, lists in zip(layers, noted, strict=True):
            vars(layer).update(lists)


def _writes() -> dict[Any, tuple[Any, Any]]:
    """Returns what the trace has written to Python's state so far."""
    watcher = active_watcher()
    writes = watcher.writes() if watcher is not None else []
    return {(write.kind, write.place.key): (write.place, write.value) for write in writes}


def _check_writes(
    module: torch.nn.Module,
    before: dict[Any, tuple[Any, Any]],
    first: dict[Any, tuple[Any, Any]],
    last: dict[Any, tuple[Any, Any]],
) -> None:
    """Refuses what a call of the plain module would leave otherwise in Python's state than its replicas do."""
    for key, (place, value) in last.items():
        if key in before and before[key][1] is value:
            continue
        is_plain = not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(open_objects(value)))
        if not is_plain or key not in first or repr(first[key][1]) != repr(value):
            raise CaptureError(
                f"a replicated {type(module).__name__} assigns to {place} when it is called at {user_line()}: each "
                "replica does, for its own part of the batch. Let it return the value"
            )


def _check_memory(
    mode: CurrentTrace, module: torch.nn.Module, written: Mapping[object, str], leaves: Sequence[Any]
) -> None:
    """Refuses writes to tensors that all replicas share: each would write, where the plain module does once.

    Batch norms may: they take the parts one after the other. So may who writes to the batch: each part is another.
    """
    norms = [item for item in module.modules() if isinstance(item, torch.nn.modules.batchnorm._BatchNorm)]
    allowed = [*(leaf for leaf in leaves if is_split(leaf)), *(buffer for item in norms for buffer in item.buffers())]
    for memory, line in written.items():
        if any(_is_of(mode, tensor, memory) for tensor in allowed):
            continue
        state = [*module.named_buffers(), *module.named_parameters()]
        name = next((name for name, tensor in state if _is_of(mode, tensor, memory)), "a tensor")
        raise CaptureError(
            f"a replicated {type(module).__name__} writes to {name} in place at {line}: "
            "each replica does, for its own part of the batch. Let it return the value, or call it in tw.microbatch"
        )


def _is_of(mode: CurrentTrace, tensor: torch.Tensor, memory: object) -> bool:
    traced = mode.stand_in(tensor)
    return mode.node_of(traced) is not None and place_of(traced).memory is memory


def _state_of(
    mode: CurrentTrace,
    module: torch.nn.Module,
    number: int,
    counterparts: dict[VirtualSlice, tuple[VirtualSlice, ...]],
    homes: dict[str, VirtualSlice],
    reduction: Reduction,
) -> dict[str, torch.Tensor]:
    """Returns what stands for a module's parameters on a replica, by name.

    A parameter that several modules hold has a name for each of them, and a module that has several names only one:
    torch.func.functional_call would leave its values in a module that it is given twice.
    """
    found: dict[int, torch.Tensor] = {}
    for name, value in module.named_parameters():
        if name not in homes:
            raise PlacementError(
                f"{name} of a replicated {type(module).__name__} was not there when tw.replicate was called: add it "
                f"before ({user_line()})"
            )
        slices = counterparts[homes[name].root]

        def copy_on(index: int, value: torch.Tensor = value, slices: Sequence[VirtualSlice] = slices) -> torch.Tensor:
            with mode.placed(slices[index]):
                return REPLICA(value, index)

        has_gradient = value.requires_grad and torch.is_grad_enabled()
        if has_gradient and (leaves := mode.replicas.leaves) is not None:
            if number:
                parts = (reduction.bucket_bytes, reduction.dtype)
                leaf = leaves.setdefault(id(value), Leaf(value, gradient_of(value), len(slices), parts))
                if number not in leaf.copies:
                    with mode.placed(slices[number]):
                        leaf.copies[number] = mode.leaf_copy(value, number)
                found[id(value)] = leaf.copies[number]
        elif has_gradient:
            key = (id(value), mode.value_of(value))
            known = mode.replicas.values
            if key not in known:
                with mode.unplaced():
                    known[key] = _Copies.apply(value, copy_on, len(slices), reduction)
            found[id(value)] = known[key][number]
        elif number:
            found[id(value)] = copy_on(number)
    return {
        f"{prefix}.{name}" if prefix else name: found[id(value)]
        for prefix, part in module.named_modules()
        for name, value in part.named_parameters(recurse=False)
        if id(value) in found
    }


@contextmanager
def each_replica_apart(mode: CurrentTrace, count: int) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
    """Lets each replica work on microbatches of its own, and sums their gradients when all is done.

    Yields:
        Given the number of a replica, a context: what is called inside belongs to it.
    """
    replicas = mode.replicas
    if count == 1:
        yield lambda _: nullcontext()
        return
    replicas.leaves = {}
    try:
        yield replicas.of_number
        with torch.no_grad(), mode.unplaced():
            for leaf in reversed(replicas.leaves.values()):
                own = gradient_of(leaf.parameter)
                others = {number: gradient_of(copy) for number, copy in leaf.copies.items()}
                if own is None and all(gradient is None for gradient in others.values()):
                    continue
                zeros = torch.zeros_like(leaf.parameter)
                gradients = [own, *(others.get(number) for number in range(1, leaf.count))]
                total = SUM_REPLICAS([zeros if item is None else item for item in gradients], *leaf.reduction)
                if leaf.before is None or own is None:
                    GRAD.__set__(leaf.parameter, total)
                else:
                    own.copy_(total)
                for copy in leaf.copies.values():
                    GRAD.__set__(copy, None)
    finally:
        replicas.leaves = None


def replicas_of(function: Any) -> int:
    """Returns the number of replicas of the replicated modules that a function refers to; 1: it refers to none.

    It looks at variables of the function and of functions that it refers to, at their objects' attributes, and into
    lists and dictionaries.
    """
    seen: dict[int, Any] = {}
    waiting: list[tuple[Any, int]] = [(function, 0)]
    while waiting:
        item, depth = waiting.pop()
        if id(item) in seen or depth > _DEPTH:
            continue
        seen[id(item)] = item
        if isinstance(item, torch.nn.Module):
            if count := max(getattr(type(module), _COUNT, 0) for module in item.modules()):
                return int(count)
        elif isinstance(item, (list, tuple, set)):
            waiting += [(value, depth + 1) for value in item]
        elif isinstance(item, dict):
            waiting += [(value, depth + 1) for value in item.values()]
        elif isinstance(item, functools.partial):
            waiting += [(value, depth) for value in (item.func, *item.args, *item.keywords.values())]
        elif inspect.ismethod(item):
            waiting += [(item.__func__, depth), (item.__self__, depth)]
        elif inspect.isfunction(item):
            names = {name: item.__globals__[name] for name in item.__code__.co_names if name in item.__globals__}
            cells = [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
            waiting += [(value, depth + 1) for value in (*names.values(), *cells)]
        elif hasattr(item, "__dict__") and not isinstance(item, (type, ModuleType, torch.Tensor)):
            waiting += [(value, depth + 1) for value in vars(item).values()]
    return 1


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


class _Copies(torch.autograd.Function):
    """The values of a parameter on all replicas; its gradient is the sum of theirs."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, copy_on: Callable[[int], torch.Tensor], count: int, reduction: Reduction
    ) -> tuple[torch.Tensor, ...]:
        ctx.reduction = reduction
        return (value.view_as(value), *map(copy_on, range(1, count)))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        reduction: Reduction = ctx.reduction
        return SUM_REPLICAS(list(gradients), reduction.bucket_bytes, reduction.dtype), None, None, None


def _parts(leaves: Sequence[Any], spec: pytree.TreeSpec, count: int) -> list[tuple[Any, Any]]:
    """Splits arguments into those of each replica, along dimension 0 of their tensors."""
    sizes = sorted({int(leaf.shape[0]) for leaf in leaves if is_split(leaf)})
    if len(sizes) != 1 or sizes[0] < count:
        raise ShapeError(
            "a replicated module splits its tensor arguments along dimension 0, which must have one size in all of "
            f"them, at least {count}, the number of replicas; it is called with sizes {sizes} at {user_line()}. Make "
            "tensors that belong to no row buffers of the module"
        )
    columns = [leaf.tensor_split(count) if is_split(leaf) else [leaf] * count for leaf in leaves]
    return [pytree.tree_unflatten([column[index] for column in columns], spec) for index in range(count)]


def _merged_leaf(rows: Sequence[int], column: list[Any]) -> Any:
    if not isinstance(column[0], torch.Tensor):
        if any(value != column[0] for value in column):
            raise UserError(
                f"replicas return different values that are no tensors at {user_line()}: {column[:4]}; each computes "
                "its own from a part of the batch"
            )
        return column[0]
    if column[0].dim() == 0:
        raise UserError(
            f"a replicated module returns a tensor without dimensions at {user_line()}, and each replica has one of "
            "its own: return values for each row and reduce them outside, or call the module in tw.microbatch"
        )
    sizes = [int(value.shape[0]) for value in column]
    if any(size % count for size, count in zip(sizes, rows, strict=True)):
        raise UserError(
            f"a replicated module returns a tensor at {user_line()} whose dimension 0 is not that of the batch: its "
            f"replicas have {rows} rows, and tensors of shapes {[list(value.shape) for value in column]}. Return "
            "values for each row, with the batch as dimension 0, or call the module in tw.microbatch"
        )
    return torch.cat(column)
