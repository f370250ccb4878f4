"""Operators of captured graphs beside ATen's. On the CPU they do what they say; `runtime/xla.py` gives them to XLA."""

from __future__ import annotations

from typing import Any

import torch


@torch.library.custom_op("torchways::manual_seed", mutates_args=())
def _manual_seed(seed: torch.Tensor) -> None:
    torch.manual_seed(int(seed))


@_manual_seed.register_fake
def _(seed: torch.Tensor) -> None:
    return None


@torch.library.custom_op("torchways::constrain", mutates_args=())
def _constrain(value: torch.Tensor, placements: str) -> torch.Tensor:
    return value.clone()


@_constrain.register_fake
def _(value: torch.Tensor, placements: str) -> torch.Tensor:
    return torch.empty_like(value)


def _save_placements(ctx: Any, inputs: tuple[torch.Tensor, str], output: torch.Tensor) -> None:
    ctx.placements = inputs[1]


def _constrain_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    return _constrain(gradient, ctx.placements), None


_constrain.register_autograd(_constrain_backward, setup_context=_save_placements)


@torch.library.custom_op("torchways::barrier", mutates_args=())
def _barrier(value: torch.Tensor) -> torch.Tensor:
    return value.clone()


@_barrier.register_fake
def _(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value)


@torch.library.custom_op("torchways::qr", mutates_args=())
def _qr(value: torch.Tensor, reduced: bool) -> tuple[torch.Tensor, torch.Tensor]:
    q, r = torch.linalg.qr(value, "reduced" if reduced else "complete")
    return q.contiguous(), r.contiguous()


@_qr.register_fake
def _(value: torch.Tensor, reduced: bool) -> tuple[torch.Tensor, torch.Tensor]:
    *batch, num_rows, num_columns = value.shape
    size = min(num_rows, num_columns) if reduced else num_rows
    return value.new_empty(*batch, num_rows, size), value.new_empty(*batch, size, num_columns)


@torch.library.custom_op("torchways::svd", mutates_args=())
def _svd(value: torch.Tensor, full: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, singular_values, v = torch.linalg.svd(value, full_matrices=full)
    return u.contiguous(), singular_values, v.mT.contiguous()


@_svd.register_fake
def _(value: torch.Tensor, full: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *batch, num_rows, num_columns = value.shape
    size = min(num_rows, num_columns)
    u = value.new_empty(*batch, num_rows, num_rows if full else size)
    return u, value.new_empty(*batch, size), value.new_empty(*batch, num_columns, num_columns if full else size)


@torch.library.custom_op("torchways::alignments", mutates_args=())
def _alignments(emitted: torch.Tensor, skipping: torch.Tensor) -> torch.Tensor:
    states = [emitted[0]]
    for step in emitted[1:]:
        states.append(torch.stack(_sources_of(states[-1], skipping)).logsumexp(0) + step)
    return torch.stack(states)


def _sources_of(state: torch.Tensor, skipping: torch.Tensor) -> list[torch.Tensor]:
    """Returns what each state of the next step may come from: itself, the one before, and the one before that."""
    shifted = [torch.nn.functional.pad(state, (count, -count), value=NEVER) for count in (1, 2)]
    return [state, shifted[0], shifted[1] + skipping]


@_alignments.register_fake
def _(emitted: torch.Tensor, skipping: torch.Tensor) -> torch.Tensor:
    return emitted.new_empty(emitted.shape)


@torch.library.custom_op("torchways::alignments_backward", mutates_args=())
def _alignments_gradient(gradient: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    totals = [gradient[-1]]
    for step in reversed(range(len(gradient) - 1)):
        back = [
            torch.nn.functional.pad(share * totals[-1], (-count, count)) for count, share in enumerate(shares[:, step])
        ]
        totals.append(gradient[step] + back[0] + back[1] + back[2])
    return torch.stack(totals[::-1])


@_alignments_gradient.register_fake
def _(gradient: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    return gradient.new_empty(gradient.shape)


def _save_states(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])


def _alignments_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    states, skipping = ctx.saved_tensors
    shares = torch.stack(_sources_of(states[:-1], skipping)).softmax(0)
    return _alignments_gradient(gradient, shares), None


_alignments.register_autograd(_alignments_backward, setup_context=_save_states)


@torch.library.custom_op("torchways::turn", mutates_args=())
def _turn() -> torch.Tensor:
    raise NotImplementedError("only a loop has turns")


@_turn.register_fake
def _() -> torch.Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("torchways::carry", mutates_args=())
def _carry(first: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("only a loop hands values on")


@_carry.register_fake
def _(first: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(first)


@torch.library.custom_op("torchways::exit", mutates_args=())
def _exit(values: list[torch.Tensor]) -> torch.Tensor:
    raise NotImplementedError("only a loop has an end")


@_exit.register_fake
def _(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.empty_like(values[0])


@torch.library.custom_op("torchways::replica", mutates_args=())
def _replica(value: torch.Tensor, number: int) -> torch.Tensor:
    return value.clone()


@_replica.register_fake
def _(value: torch.Tensor, number: int) -> torch.Tensor:
    return torch.empty_like(value)


@torch.library.custom_op("torchways::sum_replicas", mutates_args=())
def _sum_replicas(values: list[torch.Tensor], max_bytes: int, dtype: str) -> torch.Tensor:
    return torch.stack(values).sum(0, dtype=values[0].dtype)


@_sum_replicas.register_fake
def _(values: list[torch.Tensor], max_bytes: int, dtype: str) -> torch.Tensor:
    return torch.empty_like(values[0])


#: The logarithm of zero in `ALIGNMENTS`: finite, so that gradients are.
NEVER = -1e30

#: ``manual_seed(seed)``: the random operators of a compiled function draw from `seed`, int64[]. Its first operator.
MANUAL_SEED = torch.ops.torchways.manual_seed.default

#: ``constrain(value, placements)``: the value itself, split as placements say: "R" or "S(dim)" for each mesh axis, with
#: spaces between.
CONSTRAIN = torch.ops.torchways.constrain.default

#: ``barrier(value)``: the value itself; what is computed of it is not merged with what was computed of `value` before.
BARRIER = torch.ops.torchways.barrier.default

#: ``qr(value, reduced)``: Q and R of matrices. ATen's own is not seen in a trace, where PyTorch makes another of it.
QR = torch.ops.torchways.qr.default

#: ``svd(value, full)``: U, S and V (not its transpose) of matrices; as with `QR`.
SVD = torch.ops.torchways.svd.default

#: ``turn()``: the number of a loop's turn, int64[]. This and the next two exist only between capture and partitioning.
TURN = torch.ops.torchways.turn.default

#: ``carry(first)``: what the turn before hands on; in the first turn, `first`.
CARRY = torch.ops.torchways.carry.default

#: ``exit(values)``: what is left of a loop: what the last turn hands on, or made. One value for each body of the loop.
EXIT = torch.ops.torchways.exit.default

#: ``replica(value, number)``: the value, on the slice of replica `number`. It and the next are gone before placement.
REPLICA = torch.ops.torchways.replica.default

#: ``sum_replicas(values, max_bytes, dtype)``: the sum of a gradient over the replicas, on all of them. Sums next to
#: each other travel together, up to `max_bytes`, and as `dtype` if it names one.
SUM_REPLICAS = torch.ops.torchways.sum_replicas.default

#: ``alignments(emitted, skipping)``: logarithms of the probabilities of all ways to a state, at each step; step 0 is
#: `emitted[0]`. From a step [batch, states] to the next, a state stays, goes to the next one, or to the one after that
#: if `skipping` has 0 there, and not `NEVER`. It is a loop of XLA's: unrolled, many steps take minutes to compile.
ALIGNMENTS = torch.ops.torchways.alignments.default

#: ``alignments_backward(gradient, shares)``: the gradient of `emitted`. `shares`: of each of the three ways, at each
#: step but the first.
ALIGNMENTS_BACKWARD = torch.ops.torchways.alignments_backward.default


def is_random(node: torch.fx.Node) -> bool:
    """Whether a node draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
