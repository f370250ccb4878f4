"""What an input pipeline is and where in it one is, as plain values that cross processes as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

from torchways.errors import ConfigError

#: Tensors of a batch, at most: a batch's buffer ids are reserved before anybody knows it.
MAX_TENSORS = 256

#: Placements of a tensor: one for each axis of the slice, or a partition spec (`mesh.normalize_placements`).
Rule: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderSpec:
    """An input pipeline.

    Attributes:
        dataset: import path of what makes the dataset, "package.module:name".
        args, kwargs: that it is called with; plain values.
        batch_size: rows of a batch of all parts together; None: the dataset's items are batches.
        shuffle, seed, drop_last, num_workers, prefetch_factor, timeout: see `tw.data_loader`.
        collate_fn: import path; None: PyTorch's own.
        part_index, num_parts: which of the equal parts of each batch is read here.
        rules: placements of the tensors by their first key in the batch; "" (alone) for all; none: the default.
    """

    dataset: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any]
    batch_size: int | None = 1
    shuffle: bool = False
    seed: int = 0
    drop_last: bool = False
    num_workers: int = 0
    prefetch_factor: int = 2
    timeout: float = 0.0
    collate_fn: str | None = None
    part_index: int = 0
    num_parts: int = 1
    rules: Mapping[str, Rule]

    def __post_init__(self) -> None:
        for name in ("dataset", "collate_fn"):
            path = getattr(self, name)
            if name == "dataset" or path is not None:
                _check_import_path(name, path)
        for name, least in (("num_workers", 0), ("prefetch_factor", 1)):
            _check_whole(name, getattr(self, name), least)
        if self.batch_size is not None:
            _check_whole("batch_size", self.batch_size, 1)
        elif self.drop_last or self.num_parts > 1:
            what = "drop_last=True" if self.drop_last else f"{self.num_parts} slices"
            raise ConfigError(f"{what} needs a batch_size: with batch_size=None each item of the dataset is a batch")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed must be a whole number from 0 to 2**63 - 1, not {self.seed!r}")
        if not isinstance(self.timeout, (int, float)) or self.timeout < 0:
            raise ConfigError(f"timeout must be a number of seconds, 0 for none, not {self.timeout!r}")
        if self.batch_size is not None and self.batch_size % self.num_parts:
            raise ConfigError(
                f"batch_size={self.batch_size} cannot be split evenly over {self.num_parts} slices: make it a multiple"
            )
        _check_plain("args", list(self.args))
        _check_plain("kwargs", dict(self.kwargs))

    def to_json(self) -> str:
        """Returns it as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LoaderSpec:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: it is something else.
        """
        content = _object(text, {field.name for field in fields(cls)})
        rules = {key: _rule(rule) for key, rule in content.pop("rules").items()}
        return cls(**{**content, "args": tuple(content["args"]), "rules": rules})

    def identity(self) -> dict[str, Any]:
        """Returns what must be the same for a position to mean the same batch."""
        names = ("dataset", "batch_size", "shuffle", "seed", "drop_last", "num_parts")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A place between two batches.

    Attributes:
        epoch: number of the pass over the dataset, which its order depends on.
        batch: batches of the pass before it.
        state: of an iterable dataset's loader (trees.py), if it is in the middle of a pass.
    """

    epoch: int = 0
    batch: int = 0
    state: Any = None

    def to_json(self) -> str:
        """Returns it as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Position:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: it is something else.
        """
        content = _object(text, {"epoch", "batch", "state"})
        for name in ("epoch", "batch"):
            _check_whole(name, content[name], 0)
        return cls(**content)


def _object(text: str, names: set[str]) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"this is not JSON: {error}") from None
    if not isinstance(content, dict) or set(content) != names:
        raise ConfigError(f"an object with {sorted(names)} was expected")
    return content


def _rule(entries: Sequence[Any]) -> Rule:
    """JSON has no tuples."""
    return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in entries)


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _check_import_path(name: str, path: Any) -> None:
    module, colon, attribute = path.partition(":") if isinstance(path, str) else ("", "", "")
    parts = [*module.split("."), *attribute.split(".")]
    if colon and module == "__main__":
        raise ConfigError(
            f"{name}={path!r} names the script itself, which other processes cannot import: move it to a module of its "
            "own beside the script"
        )
    if not colon or not all(part.isidentifier() for part in parts):
        shown = f"an import path such as {_path_of(path)!r}"
        raise ConfigError(f"{name} must be {shown}, not {path!r}: it is imported where the slice's executors run")


def _path_of(value: Any) -> str:
    """Returns the import path that a user may have meant."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module and module != "__main__" and name:
        return f"{module}:{name}"
    return "package.module:name"


def _check_plain(where: str, value: Any) -> None:
    """Checks that a value is the same after a way through JSON (but for tuples, which are lists then)."""
    match value:
        case None | bool() | int() | float() | str():
            return
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ConfigError(f"{where} has the key {key!r}, which is no string: it crosses processes as JSON")
                _check_plain(f"{where}[{key!r}]", item)
        case list() | tuple():
            for index, item in enumerate(value):
                _check_plain(f"{where}[{index}]", item)
        case _:
            raise ConfigError(
                f"{where} is a {type(value).__name__}, which does not cross processes: pass plain values (numbers, "
                "strings, None, and lists and dicts of these), and make the rest of them in the dataset's constructor"
            )
