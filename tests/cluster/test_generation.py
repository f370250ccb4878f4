"""Generation with real processes: tokens, messages, memory, on one device and on several."""

import copy
import gc
import time

import pytest
import torch
import transformers

import torchways as tw
from tests.cluster.conftest import status_of
from tests.unit.capture.test_generation import Streamer, prompts
from torchways import api
from torchways.controller.buffers import RemoteBuffer

NUM_TOKENS, CHUNK = 14, 4
LLAMA = transformers.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=80,
)
GPT2 = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=2)


def build(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def named_prompts():
    return dict(zip(("input_ids", "attention_mask"), prompts(), strict=True))


def num_runs():
    return {island: counts.get("run_program", 0) for island, counts in api._current().num_messages().items()}


def num_buffers(mesh, until, seconds=10.0):
    """Returns the number of buffers on a slice's devices; waits for the releases of those that are to go."""
    gc.collect()  # models of earlier tests
    deadline = time.monotonic() + seconds
    while True:
        status = status_of(mesh)
        assert status.fallback_counters == {}
        if status.num_buffers == until or time.monotonic() > deadline:
            return status.num_buffers
        time.sleep(0.05)


@pytest.mark.parametrize(
    "config", [pytest.param(LLAMA, id="llama"), pytest.param(GPT2, id="gpt2", marks=pytest.mark.slow)]
)
def test_greedy_tokens_are_those_of_transformers(cluster, config):
    model = build(config)
    expected = model.generate(
        **named_prompts(), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=-1
    )
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 6, "pad_token_id": 1, "eos_token_id": [5, 9]}
    expected_beams = model.generate(**named_prompts(), **beams, do_sample=False)
    mesh = tw.init_device_mesh((2,), mesh_dim_names=("tp",), island=0)
    ours = tw.parallelize_module(model, mesh, tw.tensor_parallel(model, mesh))
    options = {"max_new_tokens": NUM_TOKENS, "eos_token_id": -1, "pad_token_id": 0, "tokens_per_dispatch": CHUNK}
    assert torch.equal(tw.generate(ours, **named_prompts(), **options), expected)
    used = {id(array) for array in (*model.parameters(), *model.buffers()) if isinstance(array._buffer, RemoteBuffer)}
    before = num_runs()[mesh.island]
    assert torch.equal(tw.generate(ours, **named_prompts(), **options), expected)
    # The prompt, and 13 tokens by 4: one message each.
    assert num_runs()[mesh.island] - before == 1 + 4
    # The model is left, and neither caches nor tokens.
    assert num_buffers(mesh, until=len(used)) == len(used)
    assert torch.equal(tw.generate(ours, **named_prompts(), **beams), expected_beams)


def test_tokens_can_be_read_as_they_come(cluster):
    model = build(LLAMA)
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 0}
    eos = model.generate(**named_prompts(), **options)[:, 10].tolist()
    expected = model.generate(**named_prompts(), **options, eos_token_id=eos)
    mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=1)
    ours = tw.function(copy.deepcopy(model), mesh=mesh)
    streamer = Streamer()
    result = tw.generate(ours, **named_prompts(), **options, eos_token_id=eos, streamer=streamer)
    streamed = torch.cat([streamer.values[0], *(value[:, None] for value in streamer.values[1:-1])], dim=1)
    assert torch.equal(streamed, result)
    assert torch.equal(result, expected)

    class Ends(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == 5

    options |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_length": 12, "eos_token_id": eos}
    options["stopping_criteria"] = [Ends()]
    expected = model.generate(**named_prompts(), **options)
    assert torch.equal(tw.generate(ours, **named_prompts(), **options, streamer=Streamer()), expected)


def test_sampling_is_seeded(cluster):
    mesh = tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=0)
    ours = tw.function(build(GPT2), mesh=mesh)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(tw.generate(ours, **named_prompts(), max_new_tokens=6, do_sample=True, top_k=8, temperature=2.0))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
