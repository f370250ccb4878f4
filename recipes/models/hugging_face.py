"""Causal language models of `transformers`, by class name and settings or from a local directory, and their tokens.

Nothing is downloaded. A directory has the form of `save_pretrained`; if it holds a tokenizer, that one is used, and
otherwise a token is a byte.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from torchways.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceConfig:
    """Which model."""

    path: str | None = None
    """Directory with a model in the form of `save_pretrained`; null makes a new one of `architecture` and `config`."""

    architecture: str = "LlamaForCausalLM"
    """Class of a new model: a causal language model of transformers."""

    config: dict[str, Any] = field(default_factory=dict)
    """Fields of a new model's configuration that differ from the defaults of its class."""

    seq_len: int = 128
    """Tokens of a window of text."""

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"seq_len is {self.seq_len} but must be at least 1; set it to a positive number")
        if self.path is not None and not (Path(self.path).expanduser() / "config.json").is_file():
            raise ValueError(
                f"path={self.path} is no directory with a config.json (seen from {Path.cwd()}); give one that "
                "save_pretrained wrote, or null for a new model"
            )
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

    @property
    def n_layers(self) -> int:
        """Number of repeated layers."""
        return self.transformers_config().num_hidden_layers

    def transformers_config(self) -> transformers.PretrainedConfig:
        """Returns the model's configuration.

        Raises:
            ValueError: there is no such class, or its configuration has no such field.
        """
        if self.path is not None:
            return transformers.AutoConfig.from_pretrained(Path(self.path).expanduser(), local_files_only=True)
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

    def load_model(self) -> transformers.PreTrainedModel:
        """Returns the model of the directory, in fp32, or a new one if there is none."""
        if self.path is None:
            return self.new_model()
        return transformers.AutoModelForCausalLM.from_pretrained(
            Path(self.path).expanduser(), local_files_only=True, dtype=torch.float32
        )

    def codec(self) -> Bytes | Tokenizer:
        """Returns what makes tokens of text."""
        folder = Path(self.path).expanduser() if self.path is not None else None
        if folder is None or not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
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
