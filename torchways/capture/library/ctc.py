"""The loss of connectionist temporal classification, as a recursion that autograd can differentiate.

PyTorch's kernels look at the lengths and have no lowering. Here sequences of all lengths go through the same steps
(`ALIGNMENTS` in operators.py), and the result of each is its state at the step where it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F

from torchways.operators import ALIGNMENTS, NEVER

#: Lengths of the sequences of a batch: a tensor, or numbers.
Lengths: TypeAlias = torch.Tensor | Sequence[int]


def ctc_loss(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> torch.Tensor:
    """Computes what `torch.nn.functional.ctc_loss` does; its arguments are the same."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    is_batch = log_probs.dim() == 3
    log_probs = log_probs if is_batch else log_probs.unsqueeze(1)
    num_steps, batch_size, _ = log_probs.shape
    input_lengths, target_lengths = _tensor(input_lengths, batch_size), _tensor(target_lengths, batch_size)
    targets = _padded(targets, target_lengths, batch_size, is_batch).to(torch.int64)
    labels = torch.full((batch_size, 2 * targets.shape[1] + 1), blank)
    labels[:, 1::2] = targets  # with a blank before and behind each
    # In PyTorch, the gradient is that of normalised probabilities.
    normalised = log_probs.log_softmax(-1)
    log_probs = normalised + (log_probs - normalised).detach()
    emitted = log_probs.gather(2, labels.expand(num_steps, *labels.shape))
    may_skip = (labels[:, 2:] != blank) & (labels[:, 2:] != labels[:, :-2])
    skipping = F.pad(torch.where(may_skip, 0.0, NEVER).to(log_probs.dtype), (2, 0), value=NEVER)
    first = torch.where(torch.arange(labels.shape[1]) < 2, emitted[:1], NEVER)
    states = ALIGNMENTS(torch.cat([first, emitted[1:]]), skipping)
    last = (input_lengths - 1).clamp(0, num_steps - 1).reshape(1, -1, 1)
    state = states.gather(0, last.expand(1, *states.shape[1:])).squeeze(0)
    return _reduced(_loss(state, input_lengths, target_lengths), target_lengths, reduction, zero_infinity, is_batch)


def _loss(state: torch.Tensor, input_lengths: torch.Tensor, target_lengths: torch.Tensor) -> torch.Tensor:
    last = state.gather(1, 2 * target_lengths.unsqueeze(1)).squeeze(1)
    before = state.gather(1, (2 * target_lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    before = torch.where(target_lengths > 0, before, NEVER)
    loss = -torch.stack([last, before]).logsumexp(0)
    loss = torch.where((input_lengths == 0) & (target_lengths == 0), 0.0, loss)
    is_possible = (loss < -NEVER / 2) & ((input_lengths > 0) | (target_lengths == 0))
    return loss * torch.where(is_possible, 1.0, torch.inf)


def _reduced(
    loss: torch.Tensor, target_lengths: torch.Tensor, reduction: str, zero_infinity: bool, is_batch: bool
) -> torch.Tensor:
    if zero_infinity:
        loss = torch.where(loss.detach().isinf(), 0.0, loss)
    if reduction == "mean":
        return (loss / target_lengths.clamp(min=1)).mean()
    if reduction == "sum":
        return loss.sum()
    return loss if is_batch else loss.squeeze(0)


def _tensor(lengths: Lengths, batch_size: int) -> torch.Tensor:
    lengths = torch.as_tensor(lengths).to(torch.int64).reshape(-1)
    if lengths.shape[0] != batch_size:
        raise RuntimeError(f"input_lengths and target_lengths must be of size {batch_size}, not {lengths.shape[0]}")
    return lengths


def _padded(targets: torch.Tensor, lengths: torch.Tensor, batch_size: int, is_batch: bool) -> torch.Tensor:
    """Returns targets as a row for each sequence, also where they stand one behind the other."""
    if targets.dim() == 2 or not is_batch:
        return targets.reshape(batch_size, -1)
    longest = int(lengths.max())
    starts = lengths.cumsum(0) - lengths
    place = starts.unsqueeze(1) + torch.arange(longest)
    return targets[place.clamp(max=max(0, targets.shape[0] - 1))]
