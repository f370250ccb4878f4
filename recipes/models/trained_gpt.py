"""What train_lm.py writes beside its checkpoints, and its model as one of `transformers`.

A `GPT` computes what a Starcoder2 with the same sizes and without biases does. So its weights can go on as a model of
`transformers`, whose generation keeps keys and values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.models.gpt import GPTConfig

if TYPE_CHECKING:  # train_lm.py does without it
    import transformers

#: Beside the checkpoints of train_lm.py: the sizes of its model.
DESCRIPTION = "model.json"

#: Names of a `GPT`'s modules, as the other model has them.
_OF_MODEL = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_OF_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.c_fc",
    "feed_forward.w2": "mlp.c_proj",
}


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Writes the sizes of a model beside its checkpoints; a crash leaves the old file or the new one.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{DESCRIPTION}.{os.getpid()}"
    partial.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / DESCRIPTION)


def find_description(path: Path) -> Path | None:
    """Returns the description of a folder of checkpoints, or of one of them; None if there is none."""
    found = (folder / DESCRIPTION for folder in (path, path.absolute().parent))
    return next((file for file in found if file.is_file()), None)


def read_description(file: Path) -> GPTConfig:
    """Returns the sizes of the model whose checkpoints a file is beside.

    Raises:
        ValueError: the file is something else.
    """
    try:
        return GPTConfig(**json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} does not describe a model of train_lm.py: {error}") from error


def as_transformers(config: GPTConfig) -> transformers.Starcoder2Config:
    """Returns the configuration of the model of `transformers` that computes the same."""
    import transformers

    return transformers.Starcoder2Config(
        architectures=["Starcoder2ForCausalLM"],
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.ffn_multiple * config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_heads,
        max_position_embeddings=config.seq_len,
        rope_theta=config.rope_theta,
        hidden_act="gelu",
        norm_epsilon=1e-5,
        use_bias=False,
        residual_dropout=config.dropout,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )


def name_in_checkpoint(name: str) -> str:
    """Returns what train_lm.py's checkpoints call a parameter of the model of `transformers`."""
    module, _, kind = name.rpartition(".")
    prefix = "model.layers."
    if module.startswith(prefix):
        index, _, part = module.removeprefix(prefix).partition(".")
        [ours] = [ours for ours, theirs in _OF_LAYER.items() if theirs == part]
        return f"model.layers.{index}.{ours}.{kind}"
    [ours] = [ours for ours, theirs in _OF_MODEL.items() if theirs == module]
    return f"model.{ours}.{kind}"
