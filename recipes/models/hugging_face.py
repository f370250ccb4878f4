"""Causal language models of `transformers`, by class name and settings or from a local directory, and their tokens.

Nothing is downloaded. A directory has the form of `save_pretrained`, or train_lm.py keeps its checkpoints there. If it
holds a tokenizer, that one is used, and otherwise a token is a byte.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import safetensors
import safetensors.torch
import torch
import transformers
from transformers.modeling_utils import no_init_weights

import torchways as tw
from recipes.models import trained_gpt
from torchways.errors import ConfigError

#: Bytes of a file of weights, at most, but for a tensor that is larger: what `write_model` holds at a time.
_FILE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceConfig:
    """Which model."""

    path: str | None = None
    """Directory with a model: in the form of `save_pretrained`, or the checkpoints of train_lm.py, or one of them; null
    makes a new one of `architecture` and `config`."""

    architecture: str = "LlamaForCausalLM"
    """Class of a new model: a causal language model of transformers."""

    config: dict[str, Any] = field(default_factory=dict)
    """Fields of a new model's configuration that differ from the defaults of its class."""

    seq_len: int = 128
    """Tokens of a window of text."""

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"seq_len is {self.seq_len} but must be at least 1; set it to a positive number")
        self._check_path()
        known = self.transformers_config()
        positions = getattr(known, "max_position_embeddings", None)
        if positions is not None and self.seq_len > positions:
            raise ValueError(
                f"seq_len is {self.seq_len} but the model has {positions} positions; lower it, or set "
                f"model.config.max_position_embeddings={self.seq_len} for a new model"
            )
        codec = self.codec()
        if known.vocab_size < codec.vocab_size:
            raise ValueError(
                f"config.vocab_size is {known.vocab_size} but there are {codec.vocab_size} tokens; raise it, or give "
                "the model's own tokenizer in its directory"
            )

    def _check_path(self) -> None:
        if self.path is None or self._trained_gpt() is not None:
            return
        if not (self._folder() / "config.json").is_file():
            raise ValueError(
                f"path={self.path} is no directory with a config.json (seen from {Path.cwd()}); give one that "
                "save_pretrained wrote, a folder of checkpoints of train_lm.py, or null for a new model"
            )
        if not any(self._folder().glob("*.safetensors")):
            raise ValueError(
                f"path={self.path} has no *.safetensors, whose parts each device reads by itself; load the model with "
                "transformers and write it again with save_pretrained"
            )

    def _folder(self) -> Path:
        assert self.path is not None
        return Path(self.path).expanduser()

    def _trained_gpt(self) -> Path | None:
        """Returns what describes the model if train_lm.py wrote the directory."""
        if self.path is None or (self._folder() / "config.json").is_file():
            return None
        return trained_gpt.find_description(self._folder())

    @property
    def n_layers(self) -> int:
        """Number of repeated layers."""
        return self.transformers_config().num_hidden_layers

    def transformers_config(self) -> transformers.PretrainedConfig:
        """Returns the model's configuration.

        Raises:
            ValueError: there is no such class, or its configuration has no such field.
        """
        description = self._trained_gpt()
        if description is not None:
            return trained_gpt.as_transformers(trained_gpt.read_description(description))
        if self.path is not None:
            return transformers.AutoConfig.from_pretrained(self._folder(), local_files_only=True)
        cls = self._class()
        fields = {*cls.config_class().to_dict(), *cls.config_class.attribute_map}
        for name in self.config:
            if name not in fields:
                raise ValueError(f"config.{name} is no field of {cls.config_class.__name__}; it has {sorted(fields)}")
        return cls.config_class(**self.config)

    def _class(self) -> type[transformers.PreTrainedModel]:
        cls = getattr(transformers, self.architecture, None)
        if cls is None or not self.architecture.endswith(("ForCausalLM", "LMHeadModel")):
            raise ValueError(
                f"architecture is {self.architecture!r} but must be a causal language model of transformers "
                f"{transformers.__version__}, such as LlamaForCausalLM, GPT2LMHeadModel or Qwen2ForCausalLM"
            )
        return cls

    def new_model(self) -> transformers.PreTrainedModel:
        """Returns a model with weights that were just made, on the host, in fp32."""
        config = self.transformers_config()
        if self.path is not None:
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return self._class()(config)

    def empty_model(self, dtype: torch.dtype | None = None) -> transformers.PreTrainedModel:
        """Returns a model whose parameters have no values yet; buffers that no file has (rotary frequencies) are right.

        Call it where the model is to live (``tw.parallelize_module(config.empty_model, mesh)``), then `load_weights`.

        Args:
            dtype: of the parameters; None: that of the configuration, or fp32 where it names none.
        """
        config = self.transformers_config()
        with no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
        model.tie_weights()  # which it leaves out without weights
        return model

    def load_weights(self, model: torch.nn.Module) -> None:
        """Loads the weights of the directory into a model of `empty_model`: the executors read their parts of it.

        Raises:
            CheckpointError: the directory has no complete checkpoint, lacks some of them, or has other shapes.
        """
        tensors: dict[str, Any] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers()),
        }
        with torch.device("meta"):
            names = list(self.empty_model().state_dict())  # of the model itself, they would be read
        if self._trained_gpt() is not None:
            state = {trained_gpt.name_in_checkpoint(name): tensors[name] for name in names}
            tw.checkpoint.load(self._folder(), state, random_state=False)
        else:
            known = self._names_in_files()
            prefix = f"{model.base_model_prefix}."
            # Files of a model without its head (GPT-2's) have names without this prefix.
            found = {name: name.removeprefix(prefix) if name not in known else name for name in names}
            state = {found[name] if found[name] in known else name: tensors[name] for name in names}
            tw.checkpoint.load(self._folder(), state)

    def _names_in_files(self) -> set[str]:
        """Returns the names of the tensors in the directory; of the files, their headers are read."""
        names: set[str] = set()
        for file in self._folder().glob("*.safetensors"):
            with safetensors.safe_open(file, framework="pt") as content:
                names.update(content.keys())
        return names

    def generation_config(self) -> transformers.GenerationConfig | None:
        """Returns how the directory says to generate, or None if it does not."""
        if self.path is None or not (self._folder() / "generation_config.json").is_file():
            return None
        return transformers.GenerationConfig.from_pretrained(self._folder(), local_files_only=True)

    def codec(self) -> Bytes | Tokenizer:
        """Returns what makes tokens of text."""
        return Bytes() if self.path is None else read_codec(self._folder())


def read_codec(folder: Path) -> Bytes | Tokenizer:
    """Returns what makes tokens of text for the model in a directory: its tokenizer, or bytes if it has none."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return Bytes()
    return Tokenizer(transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))


class Bytes:
    """A token is a byte."""

    vocab_size = 256
    unit = "nats/byte"

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the tokens of a text."""
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of tokens; what is no UTF-8 is replaced."""
        return bytes(token for token in tokens if token < self.vocab_size).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Does nothing: a directory without a tokenizer has bytes."""


class Tokenizer:
    """The tokenizer of a directory."""

    unit = "nats/token"

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the tokens of a text in UTF-8, without special ones; what is no UTF-8 is replaced."""
        tokens = self._tokenizer(text.decode(errors="replace"), add_special_tokens=False, verbose=False)["input_ids"]
        return np.array(tokens, dtype=np.int64)

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of tokens, without special ones."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer beside a model."""
        self._tokenizer.save_pretrained(folder)


def write_model(model: Any, config: HuggingFaceConfig, folder: Path) -> None:
    """Writes a model as `save_pretrained` does, in fp32, with one file of weights on the host at a time.

    Args:
        model: one of `config`, on slices or on the host.
        config: its settings.
        folder: where to; made if it is not there.
    """
    with torch.device("meta"):
        plain = config.new_model()
    plain.config.save_pretrained(folder)
    if plain.can_generate():
        (config.generation_config() or plain.generation_config).save_pretrained(folder)
    kept = set(plain.state_dict())
    tensors = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers()) if name in kept}
    forms = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    files = huggingface_hub.split_torch_state_dict_into_shards(forms, max_shard_size=_FILE_BYTES)
    for file, names in files.filename_to_tensors.items():
        part = {name: tensors[name].detach().cpu().contiguous() for name in names}
        safetensors.torch.save_file(part, folder / file, metadata={"format": "pt"})
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def layers_name(model: torch.nn.Module, count: int) -> str:
    """Returns the name of the list of a model's `count` repeated layers, e.g. "model.layers" or "transformer.h".

    Raises:
        ConfigError: it has no such list.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return name
    raise ConfigError(
        f"{type(model).__name__} has no list of its {count} layers to split it by; set parallel.pipeline_stages=1"
    )
