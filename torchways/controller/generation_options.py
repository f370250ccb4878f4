"""Which options of transformers' `generate` are those of `tw.generate`; others are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from torchways.controller.logits import BeamSearch, TokenChoice
from torchways.errors import UserError

#: Of a `generation_config`: they say nothing about tokens.
_NO_OPTIONS = {"transformers_version", "bos_token_id", "use_cache", "_from_model_config"}
_OWN = (
    "max_new_tokens",
    "max_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "num_return_sequences",
    "eos_token_id",
    "pad_token_id",
    "num_beams",
    "length_penalty",
    "early_stopping",
)
#: Of these, transformers makes logits processors.
_OF_PROCESSORS = (
    "min_new_tokens",
    "min_length",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "remove_invalid_values",
)
_USERS = ("logits_processor", "stopping_criteria")
_NAMES = (*_OWN, *_OF_PROCESSORS)


def merged(
    given: Mapping[str, Any], generation_config: Any, model_config: Any, others: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the options of a call; those that it does not name are of its `generation_config`, then of the model's.

    Args:
        given: options that `tw.generate` has parameters for, None where the call does not name them.
        generation_config: of transformers, or None.
        model_config: the model's `generation_config`, or None.
        others: further options of transformers' `generate`.

    Raises:
        UserError: an option is none that `tw.generate` has, and has an effect.
    """
    for name, value in others.items():
        if name not in (*_NAMES, *_USERS) and not _has_no_effect(name, value):
            _refuse(name, value)
    result = {**given, **{name: value for name, value in others.items() if name in (*_NAMES, *_USERS)}}
    # Configs give only what differs from transformers' defaults. Of these, this one alone has an effect.
    configured: dict[str, Any] = {"top_k": _default_config().top_k}
    for config in (model_config, generation_config):
        for name, value in {} if config is None else config.to_diff_dict().items():
            if name in _NAMES:
                configured[name] = value
            elif name not in _NO_OPTIONS and name not in others:
                _refuse(name, value)
    return result | {name: value for name, value in configured.items() if result.get(name) is None}


def token_choice(options: Mapping[str, Any], *, streams: bool) -> TokenChoice:
    """Returns how tokens are chosen, by the options that `merged` gave.

    Raises:
        UserError: they do not go together.
    """
    eos, pad = options["eos_token_id"], options["pad_token_id"]
    eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return TokenChoice(
        do_sample=bool(options["do_sample"]),
        temperature=options["temperature"],
        top_k=options["top_k"],
        top_p=options["top_p"],
        eos_token_ids=eos_ids,
        pad_token_id=pad if pad is not None else eos_ids[0] if eos_ids else 0,
        streams=streams,
        others={name: options[name] for name in _OF_PROCESSORS if options.get(name) is not None},
        logits_processor=tuple(options.get("logits_processor") or ()),
        stopping_criteria=tuple(options.get("stopping_criteria") or ()),
        beams=_beam_search(options, streams=streams),
    )


def _beam_search(options: Mapping[str, Any], *, streams: bool) -> BeamSearch | None:
    num_beams = options.get("num_beams") or 1
    if num_beams == 1:
        return None
    num_returned = options.get("num_return_sequences") or 1
    if num_returned > num_beams:
        raise UserError(
            f"tw.generate: num_return_sequences={num_returned} is more than num_beams={num_beams}; search with as many"
        )
    if options.get("do_sample") or streams:
        name = "do_sample" if options.get("do_sample") else "streamer"
        raise UserError(f"tw.generate: num_beams={num_beams} and {name} do not go together; leave one of them out")
    penalty = options.get("length_penalty")
    return BeamSearch(
        num_beams=num_beams,
        length_penalty=1.0 if penalty is None else penalty,
        early_stopping=options.get("early_stopping") or False,
        num_return_sequences=num_returned,
    )


def num_new_tokens(max_new_tokens: int | None, max_length: int | None, prompt_length: int) -> int:
    """Returns how many tokens to add at most.

    Raises:
        UserError: the call does not say, or the prompt is that long already.
    """
    if max_new_tokens is not None:
        return max_new_tokens
    if max_length is None:
        raise UserError("tw.generate does not know how many tokens to add: pass max_new_tokens, or max_length")
    if max_length <= prompt_length:
        raise UserError(
            f"tw.generate: max_length={max_length} counts the prompt, which has {prompt_length} tokens already; pass "
            "max_new_tokens, or a larger max_length"
        )
    return max_length - prompt_length


def repeated(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, num_return_sequences: int | None, do_sample: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns prompts as often as each is to be continued.

    Raises:
        UserError: all continuations of a prompt would be the same.
    """
    if num_return_sequences in (None, 1):
        return input_ids, attention_mask
    if not do_sample:
        raise UserError(
            f"tw.generate: num_return_sequences={num_return_sequences} greedy continuations of a prompt are all the "
            "same; pass do_sample=True"
        )
    ids, mask = (
        None if item is None else item.repeat_interleave(num_return_sequences, dim=0)
        for item in (input_ids, attention_mask)
    )
    assert ids is not None
    return ids, mask


def _has_no_effect(name: str, value: Any) -> bool:
    """Whether an option has the value that transformers gives it by default."""
    default = _default_config()
    return value is None or (hasattr(default, name) and getattr(default, name) == value)


def _default_config() -> Any:
    from transformers import GenerationConfig

    return GenerationConfig()


def _refuse(name: str, value: Any) -> None:
    text = repr(value)
    text = text if len(text) <= 40 else f"<{type(value).__name__}>"
    taken = f"{', '.join(_NAMES)}, {' and '.join(_USERS)}"
    raise UserError(
        f"tw.generate does not take {name}={text}: it takes {taken}; leave it out, or call the generate method of a "
        "copy of the model on the CPU"
    )
