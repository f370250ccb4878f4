"""`tw.balanced_stages`: where to split a model so that its stages compute equally much.

The model runs once on fake tensors, which computes nothing. What it would compute is counted between the calls of its
layers: the items of its module lists, each of which may begin a stage.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from torchways.array import Array
from torchways.errors import PlacementError
from torchways.parallel.pipeline import SplitPoint

logger = logging.getLogger(__name__)

#: Layers inside layers may begin stages only if that makes the largest stage so much smaller.
_WORTH_SPLITTING_A_LAYER = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate:
    """What a stage of a balanced pipeline has.

    Attributes:
        first: the layer that it begins with; "" for the first stage, which begins with the model.
        num_layers: items of module lists that begin in it.
        flops: floating-point operations of its forward pass, as torch.utils.flop_counter counts them.
        parameter_bytes: bytes of its parameters; one that several stages use counts for the first.
    """

    first: str
    num_layers: int
    flops: int
    parameter_bytes: int


class BalancedStages(dict[str, SplitPoint]):
    """A `split_spec` for `tw.pipeline`. ``str()`` is a table of its stages.

    Attributes:
        stages: what each stage has.
    """

    def __init__(self, stages: Sequence[StageEstimate]) -> None:
        super().__init__((stage.first, SplitPoint.BEGINNING) for stage in stages[1:])
        self.stages = tuple(stages)

    def __str__(self) -> str:
        total = sum(stage.flops for stage in self.stages)
        rows = [("stage", "begins with", "layers", "FLOPs", "share", "parameters")]
        for index, stage in enumerate(self.stages):
            share = f"{stage.flops / total:.1%}" if total else "-"
            size = f"{stage.parameter_bytes / 1e6:,.2f} MB"
            begin = stage.first or "the model"
            rows.append((str(index), begin, str(stage.num_layers), f"{stage.flops:,}", share, size))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def balance(
    target: torch.nn.Module | Callable[[], torch.nn.Module], num_stages: int, args: Any, kwargs: Any
) -> BalancedStages:
    """See `tw.balanced_stages`."""
    name = type(target).__name__ if isinstance(target, torch.nn.Module) else "the model"
    if num_stages < 1:
        raise PlacementError(f"tw.balanced_stages: num_stages must be at least 1, not {num_stages}")
    profile = _profile(target, args, kwargs)
    found: BalancedStages | None = None
    for points in (profile.outer_points, profile.points):
        if len(points) < num_stages:
            continue
        stages = _split(profile, points, num_stages)
        if found is None or _most(stages) < _WORTH_SPLITTING_A_LAYER * _most(found):
            found = stages
    if found is None:
        raise PlacementError(
            f"tw.balanced_stages: {name} has {len(profile.points)} layers at which a stage may begin, too few for "
            f"{num_stages} stages. Layers are the items of nn.ModuleList and nn.Sequential that a call runs once: take "
            "fewer stages, or name split points yourself"
        )
    logger.info("%s in %d stages:\n%s", name, num_stages, found)
    return found


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of a submodule: its name, and what was computed before."""

    name: str
    flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Profile:
    """A call of a model.

    Attributes:
        calls: of submodules, in order.
        flops: of all.
        parameter_bytes: of the parameters of a submodule itself, by its name.
        points: the calls of layers, by their positions in `calls`.
        outer_points: those of layers that are in no other layer.
    """

    calls: list[_Call]
    flops: int
    parameter_bytes: Mapping[str, int]
    points: list[int]
    outer_points: list[int]


def _profile(target: torch.nn.Module | Callable[[], torch.nn.Module], args: Any, kwargs: Any) -> _Profile:
    calls: list[_Call] = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        module = target if isinstance(target, torch.nn.Module) else target()
        if any(isinstance(item, Array) for item in (*module.parameters(), *module.buffers())):
            raise PlacementError("tw.balanced_stages: the module is placed already; call it before tw.pipeline")

        def fake(item: Any) -> Any:
            is_real = isinstance(item, torch.Tensor) and not mode.is_our_fake(item)
            return mode.from_tensor(item) if is_real else item

        state = {key: fake(item) for key, item in (*module.named_parameters(), *module.named_buffers())}
        counter = FlopCounterMode(display=False)
        with _noting_calls(module, lambda name: calls.append(_Call(name, counter.get_total_flops()))), counter:
            torch.func.functional_call(module, state, *_of_call(pytree.tree_map(fake, (args, kwargs))))
    items = [
        f"{name}.{key}" if name else key
        for name, container in module.named_modules()
        if isinstance(container, (torch.nn.ModuleList, torch.nn.Sequential))
        for key, _ in container.named_children()
    ]
    times = Counter(call.name for call in calls)
    layers = {name for name in items if times[name] == 1}
    outer = {name for name in layers if not any(name.startswith(f"{other}.") for other in layers)}
    return _Profile(
        calls=calls,
        flops=counter.get_total_flops(),
        parameter_bytes=_own_bytes(module),
        points=[number for number, call in enumerate(calls) if call.name in layers],
        outer_points=[number for number, call in enumerate(calls) if call.name in outer],
    )


def _of_call(arguments: Any) -> tuple[Any, Any]:
    args, kwargs = arguments
    return tuple(args), dict(kwargs)


@contextlib.contextmanager
def _noting_calls(module: torch.nn.Module, note: Callable[[str], None]) -> Iterator[None]:
    def hook_of(name: str) -> Callable[..., None]:
        return lambda *_: note(name)

    handles = [submodule.register_forward_pre_hook(hook_of(name)) for name, submodule in module.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own_bytes(module: torch.nn.Module) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name, parameter in module.named_parameters():
        found[name.rpartition(".")[0]] += parameter.numel() * parameter.element_size()
    return dict(found)


def _split(profile: _Profile, points: Sequence[int], num_stages: int) -> BalancedStages:
    """Returns the stages with the least work of the largest, and of those the ones with the smallest parameters."""
    starts = [0, *points[1:]]  # the first stage has what comes before the first layer
    at = [0, *(profile.calls[point].flops for point in points[1:]), profile.flops]
    flops = [after - before for before, after in itertools.pairwise(at)]
    nbytes = [0] * len(points)
    first_call: dict[str, int] = {}
    for number, call in enumerate(profile.calls):
        first_call.setdefault(call.name, number)
    for name, size in profile.parameter_bytes.items():
        while name and name not in first_call:  # its parameters are used by whoever has it
            name = name.rpartition(".")[0]
        nbytes[bisect_right(starts, first_call.get(name, 0)) - 1] += size
    most = _best_cuts(flops, num_stages, [0] * len(flops), 0)[0]
    _, cuts = _best_cuts(nbytes, num_stages, flops, most)
    stages = []
    for begin, end in zip(cuts, [*cuts[1:], len(points)], strict=True):
        stages.append(
            StageEstimate(
                first=profile.calls[points[begin]].name if begin else "",
                num_layers=end - begin,
                flops=sum(flops[begin:end]),
                parameter_bytes=sum(nbytes[begin:end]),
            )
        )
    return BalancedStages(stages)


def _best_cuts(costs: Sequence[int], num_stages: int, other: Sequence[int], most_other: int) -> tuple[int, list[int]]:
    """Cuts a sequence into parts that are not empty, so that the most expensive part costs the least.

    Args:
        costs: of each item.
        num_stages: number of parts.
        other, most_other: another cost of each item, and the most that a part may have of it.

    Returns:
        that cost, and the first item of each part.
    """
    num = len(costs)
    total, total_other = _sums(costs), _sums(other)
    #: For the first so many items in so many parts: the cost of the most expensive part, and where the last one begins.
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for _ in range(num_stages):
        now: dict[int, tuple[int, int]] = {}
        for end in range(1, num + 1):
            options = [
                (max(most, total[end] - total[begin]), begin)
                for begin, (most, _) in best[-1].items()
                if begin < end and total_other[end] - total_other[begin] <= most_other
            ]
            if options:
                now[end] = min(options)
        best.append(now)
    cuts, end = [], num
    for parts in range(num_stages, 0, -1):
        end = best[parts][end][1]
        cuts.append(end)
    return best[num_stages][num][0], cuts[::-1]


def _sums(items: Sequence[int]) -> list[int]:
    found = [0]
    for item in items:
        found.append(found[-1] + item)
    return found


def _most(stages: BalancedStages) -> int:
    return max(stage.flops for stage in stages.stages)
