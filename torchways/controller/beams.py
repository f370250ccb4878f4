"""A step of beam search for `tw.generate`, of transformers' own functions, which are tensor code."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from torchways.controller.logits import BeamSearch, Processors, Tokens

#: What transformers gives to beams that may not be chosen.
_UNLIKELY = -1.0e9


class Beams(NamedTuple):
    """What a step gives to the next; [prompts, beams] is the shape of all but `sequences` and those named.

    Attributes:
        running_scores: log probabilities of the beams that go on.
        sequences: the best that have ended, [prompts, beams, cache length].
        scores: theirs, with length penalty.
        lengths: how many tokens were added to them, [prompts, beams, 1].
        has_ended: which of them there are.
        may_improve: which prompts may still get better ones, [prompts, 1].
        origin: rows of the cache that the running beams go on from, [prompts * beams].
        num_new: tokens added so far, [1].
        limit: at most so many, [1].
        is_over: nothing is added any more, [1].
    """

    running_scores: torch.Tensor
    sequences: torch.Tensor
    scores: torch.Tensor
    lengths: torch.Tensor
    has_ended: torch.Tensor
    may_improve: torch.Tensor
    origin: torch.Tensor
    num_new: torch.Tensor
    limit: torch.Tensor
    is_over: torch.Tensor

    @staticmethod
    def first(ids: torch.Tensor, num_beams: int, limit: int) -> Beams:
        """Returns the state before the first token; `ids` are prompts, each repeated for its beams."""
        shape = (ids.shape[0] // num_beams, num_beams)
        running = torch.full(shape, _UNLIKELY)
        running[:, 0] = 0.0  # all beams of a prompt are the same
        return Beams(
            running_scores=running,
            sequences=ids.reshape(*shape, -1),
            scores=torch.full(shape, _UNLIKELY),
            lengths=torch.zeros(*shape, 1, dtype=torch.int64),
            has_ended=torch.zeros(shape, dtype=torch.bool),
            may_improve=torch.ones(shape[0], 1, dtype=torch.bool),
            origin=torch.arange(ids.shape[0]),
            num_new=torch.zeros(1, dtype=torch.int64),
            limit=torch.tensor([limit]),
            is_over=torch.zeros(1, dtype=torch.bool),
        )


def next_beams(
    search: BeamSearch,
    processors: Processors,
    beams: Beams,
    seen: Tokens,
    scores: torch.Tensor,
    num_ends: int,
) -> tuple[Beams, torch.Tensor]:
    """Returns the state after one more token, and all tokens of the beams that go on, [rows, cache length].

    Args:
        search: its options.
        processors: what says which candidates have ended.
        beams: the state.
        seen: tokens of the running beams, a row for each.
        scores: log probabilities of the next token, processed, [rows, vocabulary].
        num_ends: how many tokens may end a row.
    """
    from transformers.generation.utils import GenerationMixin

    ours: Any = GenerationMixin  # nothing public does these steps; none of them uses the model
    num_prompts, num_beams = beams.scores.shape
    vocabulary = scores.shape[1]
    num_kept = max(2, 1 + num_ends) * num_beams
    totals = (scores.reshape(num_prompts, num_beams, -1) + beams.running_scores[:, :, None]).reshape(num_prompts, -1)
    kept_scores, kept = totals.topk(num_kept)
    origin = torch.div(kept, vocabulary, rounding_mode="floor")
    token = kept % vocabulary
    last = seen.last + 1
    candidates = ours._gather_beams(seen.ids.reshape(num_prompts, num_beams, -1), origin)
    candidates = candidates.index_copy(2, last, token[:, :, None])
    count = beams.num_new + 1
    flat = Tokens(candidates.reshape(num_prompts * num_kept, -1), last, seen.first)
    ended = processors.finished(flat, token.reshape(-1), (count >= beams.limit).expand(num_prompts * num_kept))
    ended = ended.reshape(num_prompts, num_kept)
    running, running_scores, origin = ours._get_running_beams_for_next_iteration(
        ours, kept_scores, candidates, origin, ended, num_beams
    )
    sequences, best_scores, lengths, has_ended = ours._update_finished_beams(
        ours,
        sequences=beams.sequences,
        topk_running_sequences=candidates,
        beam_scores=beams.scores,
        topk_log_probs=kept_scores,
        beam_indices=beams.lengths,
        topk_running_beam_indices=count.expand(num_prompts, num_kept, 1),
        is_early_stop_heuristic_unsatisfied=beams.may_improve,
        is_sent_finished=beams.has_ended,
        next_token_hits_stopping_criteria=ended,
        top_num_beam_mask=torch.arange(num_kept) < num_beams,
        num_beams=num_beams,
        cur_len=beams.num_new,
        decoder_prompt_len=0,
        length_penalty=search.length_penalty,
        early_stopping=search.early_stopping,
    )
    may_improve = ours._check_early_stop_heuristic(
        is_early_stop_heuristic_unsatisfied=beams.may_improve,
        running_beam_scores=running_scores,
        beam_scores=best_scores,
        is_sent_finished=has_ended,
        cur_len=count,
        max_length=beams.limit,
        decoder_prompt_len=0,
        early_stopping=search.early_stopping,
        length_penalty=search.length_penalty,
    )
    goes_on = ours._beam_search_has_unfinished_sequences(may_improve, has_ended, ended, search.early_stopping)
    over = beams.is_over
    state = Beams(
        running_scores=running_scores,
        sequences=torch.where(over, beams.sequences, sequences),
        scores=torch.where(over, beams.scores, best_scores),
        lengths=torch.where(over, beams.lengths, lengths),
        has_ended=torch.where(over, beams.has_ended, has_ended),
        may_improve=may_improve,
        origin=(origin + num_beams * torch.arange(num_prompts)[:, None]).reshape(-1),
        num_new=count,
        limit=beams.limit,
        is_over=over | ~goes_on,
    )
    return state, running.reshape(num_prompts * num_beams, -1)


def beam_results(search: BeamSearch, beams: Beams, begin: int, prompt_length: int) -> torch.Tensor:
    """Returns prompts, of which the first position is `begin`, and the best continuations; waits for them."""
    num = search.num_return_sequences
    length = prompt_length + int(beams.lengths.cpu()[:, :num].max())
    return beams.sequences.cpu()[:, :num, begin : begin + length].flatten(0, 1)
