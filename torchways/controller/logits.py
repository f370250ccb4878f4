"""How `tw.generate` chooses tokens and ends rows: transformers' own logits processors and stopping criteria, traced.

transformers hands its processors a tensor that grows with each token. Within the loop, shapes are constant: processors
that look at the last tokens, or ask which tokens there were, get them at the end of a tensor of the cache's length.
Limits on the number of tokens are computed from a count in the loop's state. Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from torchways.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearch:
    """Transformers' options of these names."""

    num_beams: int
    length_penalty: float
    early_stopping: bool | str
    num_return_sequences: int = field(compare=False)


#: No token: what stands before the prompt, where it must not be taken for one.
_NONE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChoice:
    """How the next token is chosen, and what ends a row.

    Attributes:
        do_sample: draw it; else take the likeliest.
        temperature, top_k, top_p: of transformers' logits warpers of these names; None: left out.
        eos_token_ids: tokens that end a row.
        pad_token_id: what follows in a row that has ended.
        streams: each token is read when it is there.
        others: further options of a `GenerationConfig` that processors are made of.
        logits_processor, stopping_criteria: the user's.
        beams: search with beams; None: each row goes on by itself.
    """

    do_sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    streams: bool
    others: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), compare=False)
    logits_processor: tuple[Any, ...] = ()
    stopping_criteria: tuple[Any, ...] = ()
    beams: BeamSearch | None = None
    #: Stands for `others` where choices are compared; `min_length` is no part of what is traced.
    _key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_key", repr((self.has_min_length, sorted(self._traced().items()))))

    @property
    def has_min_length(self) -> bool:
        """Whether rows may not end before they have some number of tokens."""
        return bool(self.others.get("min_length") or self.others.get("min_new_tokens"))

    def min_new_tokens(self, prompt_length: int) -> int:
        """Returns before how many new tokens rows may not end."""
        min_new_tokens: int | None = self.others.get("min_new_tokens")
        if min_new_tokens is not None:  # in transformers it takes precedence
            return min_new_tokens
        return max(0, (self.others.get("min_length") or 0) - prompt_length)

    @property
    def fill(self) -> int:
        """What stands behind the tokens; with beams, as in transformers, which takes 0 for no padding token."""
        if self.beams is None:
            return self.pad_token_id
        return (self.pad_token_id or self.eos_token_ids[0]) if self.eos_token_ids else -1

    def processors(self, model: Any) -> list[Any]:
        """Returns what changes the scores before a token is chosen, as transformers makes and orders it."""
        from transformers import GenerationConfig
        from transformers.generation.utils import GenerationMixin

        warping = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")} if self.do_sample else {}
        config: Any = GenerationConfig(**self._traced(), do_sample=self.do_sample, **warping)
        config._eos_token_tensor = torch.tensor(self.eos_token_ids) if self.eos_token_ids else None
        make: Any = GenerationMixin._get_logits_processor  # nothing public makes the list
        made: list[Any] = make(
            model, config, input_ids_seq_length=0, logits_processor=list(self.logits_processor), device="cpu"
        )
        return made

    def _traced(self) -> dict[str, Any]:
        return {name: value for name, value in self.others.items() if name not in ("min_length", "min_new_tokens")}


@dataclass(frozen=True, slots=True)
class Tokens:
    """All tokens so far: `ids`, [batch, cache length], from position `first` to `last`, both [1]."""

    ids: torch.Tensor
    last: torch.Tensor
    first: torch.Tensor | None

    def at_the_end(self, before: int | None) -> torch.Tensor:
        """Returns the tokens at the end of a tensor of the cache's length.

        Args:
            before: what stands before the first one; None: the first one again.
        """
        assert self.first is not None
        length = self.ids.shape[1]
        position = torch.arange(1 - length, 1) + self.last
        tokens = self.ids.index_select(1, torch.maximum(position, self.first))
        return tokens if before is None else torch.where(position >= self.first, tokens, before)


class Processors:
    """The processors and criteria of a choice, for one model.

    Attributes:
        read_tokens: some look at the tokens so far.
        ends: rows may end before they have as many tokens as were asked for.
        pads: a row that has ended is padded; as in transformers, not where only criteria without `eos_token_id` end it.
    """

    def __init__(self, choice: TokenChoice, model: Any) -> None:
        from transformers.generation import logits_process as processes
        from transformers.generation import stopping_criteria as criteria

        self._choice = choice
        self._processes: Any = processes
        self._criteria: Any = criteria
        self._processors = choice.processors(model)
        self._window = 0
        vocabulary = model.config.get_text_config(decoder=True).vocab_size if self._processors else 0
        processor: Any
        for processor in self._processors:
            if isinstance(
                processor, self._processes.SequenceBiasLogitsProcessor
            ):  # it makes its tensors at the first call
                processor._prepare_bias_variables(torch.zeros(1, vocabulary))
        scores_only: Any = (
            processes.TemperatureLogitsWarper,
            processes.TopKLogitsWarper,
            processes.TopPLogitsWarper,
            processes.MinPLogitsWarper,
            processes.TypicalLogitsWarper,
            processes.EpsilonLogitsWarper,
            processes.EtaLogitsWarper,
            processes.SuppressTokensLogitsProcessor,
            processes.SuppressTokensAtBeginLogitsProcessor,
            processes.InfNanRemoveLogitsProcessor,
        )
        self._scores_only = scores_only
        counting = (
            *(processes.MinLengthLogitsProcessor, processes.MinNewTokensLengthLogitsProcessor),
            *(processes.ForcedBOSTokenLogitsProcessor, processes.ForcedEOSTokenLogitsProcessor),
            *(processes.ExponentialDecayLengthPenalty, processes.SuppressTokensAtBeginLogitsProcessor),
        )
        for given in choice.logits_processor:
            if isinstance(given, counting):
                _refuse(given, "depends on how many tokens there are; pass the option of `generate` that makes it")
        for given in choice.stopping_criteria:
            if isinstance(given, (criteria.MaxLengthCriteria, criteria.MaxTimeCriteria, criteria.ConfidenceCriteria)):
                _refuse(given, "is decided by Python for each token; pass max_new_tokens to bound the length")
        self.read_tokens = any(not isinstance(item, scores_only) for item in self._processors) or any(
            not isinstance(item, criteria.EosTokenCriteria) for item in choice.stopping_criteria
        )
        self.ends = bool(choice.eos_token_ids or choice.stopping_criteria or choice.beams)
        self.pads = bool(choice.eos_token_ids) or any(
            hasattr(item, "eos_token_id") for item in choice.stopping_criteria
        )

    def check_prompt(self, length: int) -> None:
        """Refuses a prompt that is shorter than what the user's processors and criteria look at.

        Raises:
            UserError: it is.
        """
        if length < self._window:
            raise UserError(
                f"a logits processor or stopping criterion looks at the last {self._window} tokens, but the prompt has "
                f"{length}: pad it on the left to {self._window}, with attention_mask"
            )

    def scores(
        self, tokens: Tokens, scores: torch.Tensor, too_short: torch.Tensor | None, *, is_first: bool
    ) -> torch.Tensor:
        """Returns the scores as all processors leave them, [batch, vocabulary]."""
        processes = self._processes
        processor: Any
        if too_short is not None:
            no_end = scores.index_fill(1, torch.tensor(self._choice.eos_token_ids), -torch.inf)
            scores = torch.where(too_short > 0, no_end, scores)
        for processor in self._processors:
            if isinstance(processor, processes.SuppressTokensAtBeginLogitsProcessor):
                if is_first:
                    scores = processor(tokens.ids[:, :0], scores)  # made for prompts of length 0
            elif isinstance(processor, self._scores_only):
                scores = processor(None, scores)
            elif isinstance(processor, processes.RepetitionPenaltyLogitsProcessor) and not (
                processor.prompt_ignore_length
            ):
                scores = processor(tokens.at_the_end(None), scores)
            elif isinstance(processor, processes.SequenceBiasLogitsProcessor):
                scores = processor(tokens.at_the_end(_NONE), scores)
            elif isinstance(processor, processes.NoRepeatNGramLogitsProcessor):
                scores = _no_repeated(tokens.at_the_end(_NONE), scores, processor.ngram_size)
            else:
                scores = processor(_LastTokens(tokens, processor, self), scores)
        return scores

    def finished(self, tokens: Tokens, token: torch.Tensor, finished: torch.Tensor) -> torch.Tensor:
        """Returns which rows have ended, now that `token` is the last one."""
        for eos in self._choice.eos_token_ids:
            finished = finished | (token == eos)
        for criterion in self._choice.stopping_criteria:
            if isinstance(criterion, self._criteria.EosTokenCriteria):
                found = criterion(token[:, None], None)
            elif isinstance(criterion, self._criteria.StopStringCriteria):
                outside = criterion.embedding_vec.shape[0]  # of its vocabulary: matches nothing
                found = criterion(tokens.at_the_end(outside), None)
            else:
                last = _LastTokens(tokens, criterion, self)
                found = criterion(last, None)
                if not last.was_read:
                    _refuse(criterion, "looks at no token, so Python would decide once for all of them")
            if not isinstance(found, torch.Tensor):
                _refuse(criterion, f"returned {found!r} of Python; it must return a tensor, bool[batch]")
            finished = finished | found
        return finished

    def look_at(self, count: int) -> None:
        """Notes how many of the last tokens a processor or criterion of the user's looks at."""
        self._window = max(self._window, count)


class _LastTokens:
    """The `input_ids` of a processor or criterion that is not transformers': only its last tokens can be had."""

    def __init__(self, tokens: Tokens, owner: Any, processors: Processors) -> None:
        self._tokens = tokens
        self._owner = owner
        self._processors = processors
        self.was_read = False

    def __getitem__(self, index: Any) -> torch.Tensor:
        match index:
            case (slice(start=None, stop=None, step=None), int(column)) if column < 0:
                count = -column
            case (slice(start=None, stop=None, step=None), slice(start=int(start), stop=None | -1)) if start < 0:
                count = -start
            case _:
                self._refuse(f"input_ids[{index}]")
        if count > self._tokens.ids.shape[1]:
            _refuse(self._owner, f"looks at the last {count} tokens, more than prompt and new tokens are together")
        self.was_read = True
        self._processors.look_at(count)
        found: torch.Tensor = self._tokens.at_the_end(_NONE)[index]
        return found

    def __getattr__(self, name: str) -> Any:
        self._refuse(f"input_ids.{name}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = [item for item in (*args, *(kwargs or {}).values()) if isinstance(item, cls)]
        found[0]._refuse(f"{getattr(function, '__name__', function)} of input_ids")

    def _refuse(self, use: str) -> NoReturn:
        _refuse(self._owner, f"uses {use}: its length is not known in the loop, only input_ids[:, -n] and [:, -n:] are")


def _no_repeated(tokens: torch.Tensor, scores: torch.Tensor, size: int) -> torch.Tensor:
    """NoRepeatNGramLogitsProcessor, which makes Python dicts of the tokens, with tensors.

    Args:
        tokens: [batch, length]; `_NONE` before the first one.
        scores: [batch, vocabulary].
        size: of the n-grams that come once only.
    """
    batch, vocabulary = scores.shape
    found = tokens.unfold(1, size, 1)  # [batch, number of n-grams, size]
    begun = (found[:, :, :-1] == tokens[:, None, tokens.shape[1] - size + 1 :]).all(-1)
    last = torch.where(begun & (found[:, :, 0] != _NONE), found[:, :, -1], vocabulary)  # one more: of no n-gram
    banned = torch.zeros(batch, vocabulary + 1, dtype=torch.bool).scatter(1, last, True)[:, :vocabulary]
    return scores.masked_fill(banned, -torch.inf)


def _refuse(owner: Any, reason: str) -> NoReturn:
    raise UserError(
        f"tw.generate: {type(owner).__name__} {reason}; or call the generate method of a copy of the model on the CPU"
    )
