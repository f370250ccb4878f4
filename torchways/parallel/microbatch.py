"""`tw.microbatch`: calls a function on each chunk of a batch, and puts its results together.

In eager mode this is the loop of gradient accumulation. In a program the loop is traced once and becomes one node. Its
turns run in the order of a schedule (torchways/schedules/).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from torchways.capture.current_trace import current_trace
from torchways.capture.source import user_line
from torchways.capture.tracing.containers import Containers, containers_in
from torchways.capture.tracing.memory import place_of
from torchways.capture.tracing.objects import open_objects
from torchways.errors import ShapeError, UserError
from torchways.parallel.parts import is_split, merged
from torchways.parallel.replicate import each_replica_apart, replicas_of
from torchways.schedules import AUTO, SCHEDULES, Schedule


@dataclass(frozen=True, slots=True)
class _Chunks:
    """How a batch is split: as `torch.chunk` does it.

    Attributes:
        size: rows of each chunk but the last.
        num_whole: chunks of that size.
        remainder: rows of the last chunk, if it is smaller; 0: it is not.
    """

    size: int
    num_whole: int
    remainder: int

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        return self.num_whole + bool(self.remainder)


def run_microbatches(
    function: Callable[..., Any], args: Any, kwargs: Any, n_microbatches: int, schedule: str | Schedule
) -> Any:
    """See `tw.microbatch`."""
    leaves, spec = pytree.tree_flatten(open_objects((args, kwargs)))
    chunks = _chunks_of(leaves, n_microbatches)
    check_schedule(schedule)
    trace = current_trace()

    def call(select: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        mine, mine_kwargs = pytree.tree_unflatten([select(leaf) if is_split(leaf) else leaf for leaf in leaves], spec)
        whole = Containers([item for item in containers_in((mine, mine_kwargs)) if not _holds_rows(item)])
        result = function(*mine, **mine_kwargs)
        if changed := whole.changed():
            kind = type(whole.items[changed[0]]).__name__
            raise UserError(
                f"the function of tw.microbatch at {user_line()} changes a {kind} that it is given whole: return the "
                "value, and put it there after the loop"
            )
        return open_objects(result)

    rows = [slice(number * chunks.size, (number + 1) * chunks.size) for number in range(chunks.num_chunks)]
    if trace is None:
        return _merged([call(operator.itemgetter(item)) for item in rows])
    count = replicas_of(function)
    if chunks.num_chunks % count:
        raise UserError(
            f"tw.microbatch at {user_line()} has {chunks.num_chunks} microbatches for {count} replicas: their number "
            "must be a multiple"
        )
    with each_replica_apart(trace, count) as of_replica:

        def turn_of(select: Callable[[int, torch.Tensor], torch.Tensor]) -> list[Any]:
            """Calls the function for the microbatches of a turn, one for each replica."""
            results = []
            for number in range(count):
                with of_replica(number):
                    results.append(call(functools.partial(select, number)))
            return results

        num_turns = chunks.num_chunks // count
        if num_turns == 1:
            return _merged(turn_of(lambda number, leaf: leaf[rows[number]]))
        num_whole = num_turns - bool(chunks.remainder)
        selected: list[tuple[torch.Tensor, int]] = []
        with trace.microbatches(function, num_turns, num_whole, schedule) as loop:

            def whole(turn: torch.Tensor, number: int, leaf: torch.Tensor) -> torch.Tensor:
                with trace.unplaced():
                    row = _row(leaf, chunks, turn if count == 1 else turn * count + number)
                selected.append((row, place_of(row).memory.version))
                return row

            def rest(number: int, leaf: torch.Tensor) -> torch.Tensor:
                with trace.unplaced():
                    return leaf[rows[number - count]]

            loop.body(lambda turn: turn_of(functools.partial(whole, turn)), is_remainder=False)
            if any(place_of(row).memory.version != version for row, version in selected):
                raise UserError(
                    f"the function of tw.microbatch at {user_line()} writes to its microbatch in place, and so to the "
                    "batch: clone it first"
                )
            if chunks.remainder:
                loop.body(lambda _: turn_of(rest), is_remainder=True)
            return loop.results()


def check_schedule(schedule: str | Schedule) -> None:
    """Raises UserError if there is no such schedule."""
    names = [*SCHEDULES, AUTO]
    if isinstance(schedule, str) and schedule.lower() not in map(str.lower, names):
        raise UserError(f"tw.microbatch: there is no schedule {schedule!r}; there are {', '.join(names)}")


def _holds_rows(container: Any) -> bool:
    """Whether a container is part of the batch: each microbatch has one of its own."""
    return any(map(is_split, pytree.tree_leaves(container)))


def _chunks_of(leaves: list[Any], n_microbatches: int) -> _Chunks:
    if not isinstance(n_microbatches, int) or n_microbatches < 1:
        raise UserError(f"tw.microbatch: n_microbatches must be a whole number of at least 1, not {n_microbatches!r}")
    sizes = sorted({int(leaf.shape[0]) for leaf in leaves if is_split(leaf)})
    if len(sizes) != 1 or not sizes[0]:
        found = f"of sizes {sizes}" if sizes else "none"
        raise ShapeError(
            "tw.microbatch splits its tensor arguments along dimension 0, which must have one size in all of them; "
            f"there are {found}. Pass tensors that belong to no row by the function's closure"
        )
    size = -(-sizes[0] // n_microbatches)
    return _Chunks(size, sizes[0] // size, sizes[0] % size)


def _row(leaf: torch.Tensor, chunks: _Chunks, turn: torch.Tensor) -> torch.Tensor:
    """Returns the chunk of a turn."""
    rows = leaf[: chunks.num_whole * chunks.size].reshape(chunks.num_whole, chunks.size, *leaf.shape[1:])
    return rows.index_select(0, turn.reshape(1)).squeeze(0)


def _merged(results: list[Any]) -> Any:
    complaint = "tw.microbatch: the function returns another structure for another chunk"
    return merged(results, _merged_leaf, complaint)


def _merged_leaf(column: list[Any]) -> Any:
    if isinstance(column[0], torch.Tensor):
        values = [value.detach() for value in column]
        return torch.stack(values) if values[0].dim() == 0 else torch.cat(values)
    if any(value != column[0] for value in column):
        raise UserError(f"tw.microbatch: the function returns different values that are no tensors: {column[:4]}")
    return column[0]
