"""Options of transformers' `generate` that `tw.generate` takes, and those that it refuses."""

import pytest
import torch
from transformers import GenerationConfig

import torchways as tw
from torchways.controller.generation_options import merged, num_new_tokens, repeated, token_choice
from torchways.errors import UserError


def test_a_generation_config_fills_in_what_the_call_does_not_name():
    config = GenerationConfig(max_new_tokens=5, do_sample=True, temperature=0.5, bos_token_id=1)
    found = merged({"max_new_tokens": 7, "do_sample": None, "temperature": None}, config, None, {})
    assert found == {"max_new_tokens": 7, "do_sample": True, "temperature": 0.5, "top_k": 50}


def test_top_k_is_that_of_transformers_unless_something_names_it():
    given = {"top_k": None}
    assert merged(given, None, None, {})["top_k"] == 50
    assert merged(given, GenerationConfig(top_k=50), GenerationConfig(), {})["top_k"] == 50
    assert merged(given, GenerationConfig(), GenerationConfig(top_k=20), {})["top_k"] == 20
    assert merged(given, GenerationConfig(top_k=None), GenerationConfig(top_k=20), {})["top_k"] is None
    assert merged({"top_k": 0}, None, GenerationConfig(top_k=20), {})["top_k"] == 0


def test_what_nobody_names_is_of_the_models_own_config():
    own = GenerationConfig(repetition_penalty=1.3, eos_token_id=5, temperature=0.5)
    found = merged({"eos_token_id": None, "temperature": None}, GenerationConfig(temperature=0.25), own, {})
    assert found == {"repetition_penalty": 1.3, "eos_token_id": 5, "temperature": 0.25, "top_k": 50}
    assert merged({}, None, own, {"repetition_penalty": 1.0})["repetition_penalty"] == 1.0
    with pytest.raises(UserError, match="does not take num_beam_groups=2"):
        merged({}, None, GenerationConfig(num_beam_groups=2), {})
    merged({}, None, GenerationConfig(num_beam_groups=2), {"num_beam_groups": 1})


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (None, {"forced_eos_token_id": 2}),
        (None, {"num_beam_groups": 2}),
        (None, {"stop_strings": ["."]}),
        (None, {"no_such_option": 1}),
        (GenerationConfig(penalty_alpha=0.5), {}),
    ],
)
def test_other_options_are_refused_by_name(config, options):
    name = next(iter(options), "penalty_alpha")
    with pytest.raises(UserError, match=f"does not take {name}=.*it takes max_new_tokens.*leave it out"):
        tw.generate(
            torch.nn.Linear(2, 2), torch.ones(1, 2).long(), max_new_tokens=1, generation_config=config, **options
        )


def test_other_options_without_effect_are_taken():
    assert merged({}, None, None, {"num_beam_groups": 1, "use_cache": True, "stop_strings": None}) == {"top_k": 50}


def test_beams_do_not_go_with_everything():
    given = dict.fromkeys(("do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id"))
    for options, text in (
        ({"do_sample": True}, "num_beams=2 and do_sample do not go together"),
        ({"num_return_sequences": 3}, "num_return_sequences=3 is more than num_beams=2"),
    ):
        with pytest.raises(UserError, match=text):
            token_choice({**given, "num_beams": 2, **options}, streams=False)
    with pytest.raises(UserError, match="num_beams=2 and streamer do not go together"):
        token_choice({**given, "num_beams": 2}, streams=True)


def test_min_new_tokens_takes_precedence_over_min_length():
    given = dict.fromkeys(("do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id"))
    for options, expected in (
        ({"min_length": 12}, 4),
        ({"min_length": 5}, 0),
        ({"min_length": 12, "min_new_tokens": 2}, 2),
        ({"min_length": 12, "min_new_tokens": 0}, 0),
    ):
        assert token_choice({**given, **options}, streams=False).min_new_tokens(prompt_length=8) == expected


def test_max_length_counts_the_prompt():
    assert num_new_tokens(None, 12, 8) == 4
    assert num_new_tokens(3, 12, 8) == 3
    with pytest.raises(UserError, match="counts the prompt, which has 8 tokens"):
        num_new_tokens(None, 8, 8)
    with pytest.raises(UserError, match="pass max_new_tokens, or max_length"):
        num_new_tokens(None, None, 8)


def test_each_prompt_is_continued_several_times_when_tokens_are_drawn():
    ids, mask = repeated(torch.tensor([[1], [2]]), torch.ones(2, 1), 2, do_sample=True)
    assert ids.tolist() == [[1], [1], [2], [2]]
    assert mask is not None
    assert mask.shape == (4, 1)
    with pytest.raises(UserError, match="greedy continuations of a prompt are all the same"):
        repeated(torch.ones(1, 1), None, 2, do_sample=False)
