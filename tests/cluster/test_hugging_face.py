"""Models that nobody here wrote: small configurations of `transformers`, unmodified, against eager PyTorch."""

import copy

import pytest
import torch
import torch.utils._pytree as pytree
import transformers

import torchways as tw
from tests.architectures.sweep import train
from torchways.capture.tracing.objects import open_objects

BATCH, LENGTH, VOCABULARY = 4, 12, 64

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
BERT = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = {**SMALL, "num_key_value_heads": 2}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
IMAGE = {"image_size": 16, "patch_size": 4}


def tokens(generator, length=LENGTH):
    return torch.randint(3, VOCABULARY, (BATCH, length), generator=generator)


def text(generator):
    """A batch with padding in one row."""
    ids, mask = tokens(generator), torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def unmasked_text(generator):
    ids = tokens(generator)
    return {"input_ids": ids, "labels": ids}


def translation(generator):
    return {**text(generator), "labels": tokens(generator, 8)}


def images(size):
    return lambda generator: {
        "pixel_values": torch.randn(BATCH, 3, size, size, generator=generator),
        "labels": torch.randint(0, 5, (BATCH,), generator=generator),
    }


def speech(generator):
    return {"input_features": torch.randn(BATCH, 8, 32, generator=generator), "labels": tokens(generator, 8)}


def waves(generator):
    return {
        "input_values": torch.randn(BATCH, 128, generator=generator),
        "labels": torch.randint(0, 4, (BATCH,), generator=generator),
    }


def pairs(generator):
    return {
        "input_ids": tokens(generator),
        "pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator),
        "return_loss": True,
    }


#: Class, configuration, and what makes a batch.
MAIN = {
    "GPT2LMHeadModel": (GPT2, text),
    "LlamaForCausalLM": (LLAMA, text),
    "T5ForConditionalGeneration": (T5, translation),
}
MORE = {
    "BertForMaskedLM": (BERT, text),
    "RobertaForMaskedLM": (BERT, text),
    "DistilBertForMaskedLM": (
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        text,
    ),
    "OPTForCausalLM": ({**SMALL, "ffn_dim": 64, "dropout": 0.0, "word_embed_proj_dim": 32}, text),
    "GPTNeoXForCausalLM": (SMALL, text),
    "MistralForCausalLM": ({**LLAMA, "sliding_window": 6}, text),
    "Qwen2ForCausalLM": (LLAMA, text),
    "ViTForImageClassification": ({**BERT, **IMAGE, "num_labels": 5}, images(16)),
    "ResNetForImageClassification": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 5},
        images(32),
    ),
    "BartForConditionalGeneration": (BART, translation),
    "WhisperForConditionalGeneration": (
        {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 20},
        speech,
    ),
    "CLIPModel": (
        {
            "text_config": {**SMALL, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
            "vision_config": {**SMALL, **IMAGE},
            "projection_dim": 16,
        },
        pairs,
    ),
    "MambaForCausalLM": (
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        unmasked_text,
    ),
    # It asks the attention mask how long the longest text is.
    "XLMWithLMHeadModel": (
        {
            "vocab_size": VOCABULARY,
            "emb_dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "pad_index": 0,
        },
        text,
    ),
    "MixtralForCausalLM": ({**LLAMA, "num_local_experts": 4}, text),
    "DeepseekV3ForCausalLM": (
        {
            **SMALL,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
        text,
    ),
    "Wav2Vec2ForSequenceClassification": (
        {
            **SMALL,
            "conv_dim": (16, 16),
            "conv_kernel": (4, 4),
            "conv_stride": (2, 2),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
            "hidden_dropout": 0.0,
            "activation_dropout": 0.0,
            "attention_dropout": 0.0,
            "feat_proj_dropout": 0.0,
            "final_dropout": 0.0,
            "layerdrop": 0.0,
            "mask_time_prob": 0.0,
            "classifier_proj_size": 16,
            "num_labels": 4,
        },
        waves,
    ),
}


@pytest.fixture(scope="module")
def mesh(cluster):
    return tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=0)


@pytest.fixture(scope="module")
def place(mesh):
    return lambda model: tw.function(model, mesh=mesh)


def build(name, config):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**config))


def check_forward(model, mesh, batch):
    """The whole output, caches included, is of the same classes and holds the same."""
    model = model.eval()
    ours = tw.function(copy.deepcopy(model), mesh=mesh)
    result = ours(**batch)
    with torch.no_grad():
        expected = model(**batch)
    assert type(result) is type(expected)
    leaves, spec = pytree.tree_flatten(open_objects(result))
    expected_leaves, expected_spec = pytree.tree_flatten(open_objects(expected))
    assert spec == expected_spec
    for leaf, other in zip(leaves, expected_leaves, strict=True):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(leaf.cpu(), other, rtol=1e-4, atol=1e-5)
        else:
            assert leaf == other


def check_training(model, place, data, num_steps=5, eps=1e-8, atol=1e-5):
    """Trains a model and a copy that `place` puts on a slice."""
    generator = torch.Generator().manual_seed(1)
    batches = [data(generator) for _ in range(num_steps)]
    eager = model.train()
    ours = place(copy.deepcopy(model))
    losses = train(ours, batches, tw.program, eps)
    expected = train(eager, batches, lambda step: step, eps)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    state = ours.state_dict()
    assert list(state) == list(eager.state_dict())
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=atol)
    for status in tw.executor_status():
        assert status.fallback_counters == {}


#: GPT-2 is also trained in test_activation_checkpointing and test_balanced_stages.py.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "GPT2LMHeadModel")) for name in MAIN]
)
def test_five_steps_agree_with_eager(mesh, place, name):
    config, data = MAIN[name]
    check_forward(build(name, config), mesh, data(torch.Generator().manual_seed(0)))
    check_training(build(name, config), place, data)


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_activation_checkpointing(place, reentrant):
    model = build("GPT2LMHeadModel", {**GPT2, "use_cache": False})
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check_training(model, place, text, num_steps=3)


def test_a_cache_goes_from_call_to_call(mesh):
    """Decoding with a cache that lives on the slice gives what decoding from the start gives."""
    model = build("LlamaForCausalLM", LLAMA).eval()
    ids = tokens(torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    ours = tw.function(model, mesh=mesh)
    out = ours(input_ids=ids[:, :-2], use_cache=True)
    cache = out.past_key_values
    for position in (LENGTH - 2, LENGTH - 1):
        out = ours(input_ids=ids[:, position : position + 1], past_key_values=cache)
        assert out.past_key_values is cache
        torch.testing.assert_close(out.logits[:, -1].cpu(), expected[:, position], rtol=1e-4, atol=1e-5)
    assert cache.layers[0].keys.shape[2] == LENGTH
    assert isinstance(cache.layers[0].keys, tw.Array)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_architectures(mesh, place, name):
    config, data = MORE[name]
    check_forward(build(name, config), mesh, data(torch.Generator().manual_seed(0)))
    # Some gradients are zero but for rounding (biases of keys, what comes before a batch norm); with its usual epsilon,
    # Adam makes steps of that noise.
    check_training(build(name, config), place, data, num_steps=3, eps=1e-4)
