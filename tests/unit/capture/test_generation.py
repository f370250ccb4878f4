"""`tw.generate` against `transformers`' own, on random weights and without processes."""

import copy

import pytest
import tokenizers
import torch
import transformers

from tests.local_session import LocalSession
from torchways.controller.function import make_function, make_replicated
from torchways.controller.generation import draw, run_generate
from torchways.controller.generation_options import merged, token_choice
from torchways.controller.logits import TokenChoice
from torchways.errors import ShapeError, UserError
from torchways.parallel.replicate import Reduction

#: One layer: most of a test's time goes into traces, and tests/cluster/test_generation.py has two.
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 80,
}


@pytest.fixture(scope="module")
def session():
    return LocalSession()


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()


@pytest.fixture(scope="module")
def placed(session, llama):
    return make_function(copy.deepcopy(llama), session.mesh(), lambda: session)


def prompts(batch=2, length=7):
    """A batch whose second row is padded on the left."""
    ids = torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :3] = mask[1, :3] = 0
    return ids, mask


def choice(**options):
    defaults = {
        "do_sample": False,
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "eos_token_ids": (),
        "pad_token_id": 0,
        "streams": False,
    }
    return TokenChoice(**{**defaults, **options})


def generate(session, model, num_tokens, tokens_per_dispatch=4, generator=None, streamer=None, **options):
    ids, mask = prompts()
    options = choice(streams=streamer is not None, **options)
    return run_generate(
        model, ids, mask, num_tokens, options, generator, streamer, tokens_per_dispatch, session and (lambda: session)
    )


def expected(model, num_tokens, eos=None):
    ids, mask = prompts()
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, eos_token_id=eos
    )


def test_greedy_tokens_are_those_of_transformers(session, llama, placed):
    before = session.num_runs
    assert torch.equal(generate(session, placed, 14), expected(llama, 14))
    assert session.num_runs - before == 1 + 4  # the prompt, and 13 tokens by 4
    assert torch.equal(generate(session, placed, 1), expected(llama, 1))


def test_prompts_of_about_one_length_share_what_is_compiled(session, llama, placed):
    def run(length):
        ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(length))
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        theirs = llama.generate(ids, attention_mask=torch.ones_like(ids), **options, eos_token_id=None)
        assert torch.equal(run_generate(placed, ids, None, 5, choice(), None, None, 4, lambda: session), theirs)
        return len(session.registered)

    first = run(9)
    assert [run(length) for length in (3, 12, 16)] == [first] * 3
    assert run(17) > first
    assert run(75) > first  # 80 positions: no room for padding


def test_rows_end_and_are_padded_as_in_transformers(session, llama, placed):
    tokens = expected(llama, 14)
    for eos in ((int(tokens[0, 9]),), (int(tokens[0, 9]), int(tokens[1, 12])), (int(tokens[0, 7]), int(tokens[1, 7]))):
        ours = generate(session, placed, 14, eos_token_ids=eos)
        assert torch.equal(ours, expected(llama, 14, list(eos)))


class Streamer(transformers.generation.streamers.BaseStreamer):
    def __init__(self):
        self.values = []

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.values.append("end")


def test_a_streamer_gets_what_transformers_would_give_it(session, llama, placed):
    tokens = expected(llama, 14)
    eos = (int(tokens[0, 9]), int(tokens[1, 12]))
    ours, theirs = Streamer(), Streamer()
    generate(session, placed, 14, streamer=ours, eos_token_ids=eos)
    ids, mask = prompts()
    llama.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=14,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=list(eos),
        streamer=theirs,
    )
    assert len(ours.values) == len(theirs.values)
    assert all(torch.equal(a, b) for a, b in zip(ours.values[:-1], theirs.values[:-1], strict=True))
    assert ours.values[-1] == "end"


def test_sampled_tokens_are_those_of_eager_pytorch_with_the_same_numbers(session, llama, placed):
    options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    seeded = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    ours = [
        generate(session, placed, 14, tokens_per_dispatch=size, generator=generator, **options)
        for size, generator in zip((4, 13, 4), seeded, strict=True)
    ]
    assert torch.equal(ours[0], ours[1])
    assert not torch.equal(ours[0], ours[2])
    eager = generate(None, copy.deepcopy(llama), 14, generator=torch.Generator().manual_seed(1), **options)
    assert torch.equal(ours[0], eager)
    # And these are what transformers' scores give, drawn one by one.
    ids, mask = prompts()
    uniforms = torch.rand(14, 2, generator=torch.Generator().manual_seed(1))
    for number in range(14):
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
            scores = llama(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        for warper in choice(**options).processors(llama):
            scores = warper(None, scores)
        ids = torch.cat([ids, draw(scores, uniforms[number])[:, None]], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(ours[0], ids)


def test_drawn_tokens_have_their_probabilities():
    weights = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    count = 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    drawn = draw(weights.log().expand(count, 5), uniform)
    counts = torch.bincount(drawn, minlength=5)
    assert counts[1] == 0
    possible = weights > 0
    chi_square = ((counts - count * weights).square() / (count * weights))[possible].sum()
    assert chi_square < 16.3  # 3 degrees of freedom, one in a thousand
    assert draw(weights.log()[None], torch.tensor([0.0])).item() == 0
    assert draw(weights.log()[None], torch.tensor([1 - 2.0**-24])).item() == 4


class Favours(transformers.LogitsProcessor):
    """Makes token 5 likelier after even tokens."""

    def __call__(self, input_ids, scores):
        bonus = torch.zeros(scores.shape[-1]).index_fill(0, torch.tensor([5]), 3.0)
        return torch.where((input_ids[:, -1] % 2 == 0)[:, None], scores + bonus, scores)


class EndsAfter(transformers.StoppingCriteria):
    """Ends rows whose last two tokens are these."""

    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -2:] == self.tokens).all(-1)


def test_replicated_models_are_refused_by_name(session, llama):
    stages = [[session.mesh()], [session.mesh()]]
    ours = make_replicated(copy.deepcopy(llama), stages, {}, None, Reduction(0, ""), lambda: session)
    with pytest.raises(UserError, match=r"LlamaForCausalLM is replicated, and tw\.generate takes no replicas"):
        generate(session, ours, 4)


PLAIN = {"max_new_tokens": 14, "pad_token_id": 0}


def with_options(session, model, **options):
    """What `tw.generate` makes of a call's options."""
    given = dict.fromkeys(("do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id"))
    options = merged(given, None, None, {**PLAIN, **options})
    chosen = token_choice(options, streams=False)
    rows = prompts()
    if chosen.beams is not None:
        rows = [item.repeat_interleave(chosen.beams.num_beams, 0) for item in rows]
    return run_generate(model, *rows, options["max_new_tokens"], chosen, None, None, 4, lambda: session)


def test_options_of_processors_give_the_tokens_of_transformers(session, llama, placed):
    ids, mask = prompts()
    plain = expected(llama, 14)
    eos = int(plain[0, 9])
    likely = plain[:, 8:].unique().tolist()
    cases = [
        {"eos_token_id": eos, "min_new_tokens": 6, "repetition_penalty": 1.5},
        {"eos_token_id": eos, "min_length": 12, "suppress_tokens": likely[:2], "begin_suppress_tokens": likely[2:3]},
        {"no_repeat_ngram_size": 2, "eos_token_id": None},
        {"no_repeat_ngram_size": 1, "eos_token_id": None},
        {"bad_words_ids": [[likely[0]], plain[0, 9:11].tolist(), [*([1] * 40), 2]], "eos_token_id": None},
        {"sequence_bias": {tuple(plain[1, 8:10].tolist()): -9.0}, "logits_processor": [Favours()]},
    ]
    for options in cases:
        theirs = llama.generate(ids, attention_mask=mask, do_sample=False, **PLAIN, **options)
        assert not torch.equal(theirs, plain)
        assert torch.equal(with_options(session, placed, **options), theirs), options


def test_rows_end_by_criteria_as_in_transformers(session, llama, placed):
    ids, mask = prompts()
    plain = expected(llama, 14)
    first, second = (EndsAfter(plain[row, 10:12].tolist()) for row in (0, 1))
    end = transformers.generation.EosTokenCriteria(int(plain[1, 9]))
    for criteria in ([first], [first, second], [first, end]):
        theirs = llama.generate(
            ids, attention_mask=mask, do_sample=False, **PLAIN, eos_token_id=None, stopping_criteria=criteria
        )
        assert torch.equal(with_options(session, placed, stopping_criteria=criteria), theirs)


def test_rows_end_by_strings_as_in_transformers(session, llama, placed):
    ids, mask = prompts()
    letters = [chr(ord("0") + token) for token in range(64)]
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({letter: token for token, letter in enumerate(letters)}, unk_token="0")
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    model.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model)
    plain = expected(llama, 14)
    strings = ["".join(letters[token] for token in plain[row, 9:12].tolist()) for row in (0, 1)]
    longer = [letters[5] * 20, *strings]  # than any prompt
    for texts in (strings, longer):
        criteria = [transformers.StopStringCriteria(tokenizer, texts)]
        theirs = llama.generate(
            ids, attention_mask=mask, do_sample=False, **PLAIN, eos_token_id=None, stopping_criteria=criteria
        )
        assert theirs.shape[1] == 12
        assert torch.equal(with_options(session, placed, stopping_criteria=criteria), theirs)


def test_beams_are_those_of_transformers(session, llama, placed):
    ids, mask = prompts()
    eos = int(expected(llama, 14)[0, 12])
    ends = EndsAfter(expected(llama, 14)[1, 10:12].tolist())
    cases = [
        {"num_beams": 3, "eos_token_id": None},
        {"num_beams": 3, "eos_token_id": [eos, 7], "num_return_sequences": 2, "length_penalty": 0.0},
        {"num_beams": 2, "eos_token_id": eos, "early_stopping": True, "length_penalty": -3.0},
        {"num_beams": 2, "eos_token_id": eos, "early_stopping": "never", "repetition_penalty": 1.5},
        {"num_beams": 2, "eos_token_id": [eos, 9, 11, 20, 31, 40, 50, 60], "min_new_tokens": 3, "pad_token_id": 1},
        {"num_beams": 2, "eos_token_id": None, "stopping_criteria": [ends], "no_repeat_ngram_size": 2},
    ]
    for options in cases:
        theirs = llama.generate(ids, attention_mask=mask, do_sample=False, **{**PLAIN, **options})
        assert torch.equal(with_options(session, placed, **options), theirs), options


def test_warpers_of_scores_can_be_traced(session, llama, placed):
    options = {"do_sample": True, "min_p": 0.05, "typical_p": 0.9, "epsilon_cutoff": 0.001, "eta_cutoff": 0.001}
    drawn = []
    for model, get in ((placed, lambda: session), (copy.deepcopy(llama), None)):
        chosen = choice(do_sample=True, others={name: value for name, value in options.items() if name != "do_sample"})
        drawn.append(run_generate(model, *prompts(), 6, chosen, torch.Generator().manual_seed(1), None, 4, get))
    assert torch.equal(drawn[0], drawn[1])


def test_processors_and_criteria_that_need_the_length_are_refused(session, placed):
    def processor(use):
        def __call__(self, input_ids, scores):
            return scores + use(input_ids)

        return type("Mine", (transformers.LogitsProcessor,), {"__call__": __call__})()

    generation = transformers.generation
    for use, text in (
        (lambda ids: ids.shape[1], r"input_ids\.shape"),
        (lambda ids: ids[:, 0:1], r"input_ids\[.*0"),
        (lambda ids: torch.sum(ids), "sum of input_ids"),
    ):
        with pytest.raises(UserError, match=rf"Mine uses {text}.*only input_ids\[:, -n\]"):
            with_options(session, placed, logits_processor=[processor(use)])
    with pytest.raises(UserError, match=r"the last 9 tokens, but the prompt has 7: pad it on the left to 9"):
        with_options(session, placed, logits_processor=[processor(lambda ids: ids[:, -9:].sum(-1, keepdim=True))])
    with pytest.raises(UserError, match="MaxTimeCriteria is decided by Python for each token"):
        with_options(session, placed, stopping_criteria=[generation.MaxTimeCriteria(1.0)])
    with pytest.raises(UserError, match="MinLengthLogitsProcessor depends on how many tokens there are"):
        with_options(session, placed, logits_processor=[generation.MinLengthLogitsProcessor(3, 2)])
    for result, text in (
        (lambda ids: len(ids[:, -1:].shape) > 5, r"returned False of Python; it must return a tensor, bool\[batch\]"),
        (lambda ids: torch.zeros(2, dtype=torch.bool), "looks at no token, so Python would decide once"),
    ):
        call = {"__call__": lambda self, ids, scores, result=result, **_: result(ids)}
        ends = type("Ends", (transformers.StoppingCriteria,), call)()
        with pytest.raises(UserError, match=f"Ends {text}"):
            with_options(session, placed, stopping_criteria=[ends])


def test_what_cannot_be_generated_is_refused(session, llama, placed):
    ids, mask = prompts()

    def run(model=placed, ids=ids, mask=mask, num_tokens=4, size=4):
        run_generate(model, ids, mask, num_tokens, choice(), None, None, size, lambda: session)

    with pytest.raises(UserError, match=r"7 tokens and max_new_tokens=74 .* 80 positions .* at most 73 new tokens"):
        run(num_tokens=74)
    with pytest.raises(UserError, match=r"LlamaForCausalLM is on no slice: place it with tw\.function"):
        run(model=llama)
    with pytest.raises(UserError, match="not Linear"):
        run(model=torch.nn.Linear(1, 1))
    with pytest.raises(ShapeError, match=r"attention_mask has shape \[2, 6\], but input_ids \[2, 7\]"):
        run(mask=mask[:, 1:])
    with pytest.raises(UserError, match="pad prompts on the left"):
        run(mask=mask.flip(1))
    with pytest.raises(ShapeError, match=r"int64\[batch, length\], not float32\[2, 7\]"):
        run(ids=ids.float())
    with pytest.raises(UserError, match="max_new_tokens=0"):
        run(num_tokens=0)
