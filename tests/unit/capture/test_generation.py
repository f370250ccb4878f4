"""`tw.generate` against `transformers`' own, on random weights and without processes."""

import copy

import pytest
import torch
import transformers

from tests.local_session import LocalSession
from torchways.controller.function import make_function
from torchways.controller.generation import TokenChoice, draw, run_generate
from torchways.errors import ShapeError, UserError

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
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
        return len(session.programs)

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
        for warper in choice(**options).warpers():
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
