"""Writes docs/api.md from the docstrings of the public names. `make docs` runs it; a test compares the result.

The text depends on the sources alone, not on the version of Python.
"""

from __future__ import annotations

import ast
import enum
import inspect
import itertools
import operator
import re
import textwrap
from pathlib import Path
from typing import Any

import torchways as tw
from torchways import checkpoint, errors
from torchways.checkpoint import Saving
from torchways.config import ClusterConfig
from torchways.controller.data_loader import ArrayLoader
from torchways.controller.parity.report import ParityReport
from torchways.controller.program import ProgramFunction
from torchways.controller.reports.items import LineReport, MemoryReport, NodeReport, TransferReport, WaitReport
from torchways.controller.reports.loops import LoopReport, StageReport
from torchways.controller.reports.report import ProgramReport
from torchways.parallel.balance import BalancedStages, StageEstimate
from torchways.rpc.clients import ClusterInfo, ExecutorStatus, IslandInfo

PAGE = Path(__file__).with_name("api.md")

#: Every name of `torchways.__all__`, by what it is for. A name without a group fails.
GROUPS = {
    "Sessions and slices": ["init", "shutdown", "init_device_mesh", "VirtualSlice", "is_eager"],
    "Programs": [
        "program",
        "function",
        "cond",
        "while_loop",
        "scan",
        "microbatch",
        "Schedule",
        "all_reduce",
        "generate",
    ],
    "Placement": [
        "pipeline",
        "replicate",
        "balanced_stages",
        "SplitPoint",
        "parallelize_module",
        "fully_shard",
        "tensor_parallel",
        "distribute_tensor",
        "redistribute",
    ],
    "Arrays": ["Array", "get"],
    "Data": ["data_loader"],
    "Checkpoints": ["checkpoint.save", "checkpoint.load", "checkpoint.latest"],
    "Runs": ["synchronize", "cancel", "deadline"],
    "Inspection": ["parity", "check_values", "profile", "cluster_info", "executor_status"],
}

#: Classes without a name in `torchways`, of objects that public functions return or take.
RETURNED = {
    ProgramFunction: "The result of `tw.program`, and of `tw.function` on a function.",
    ProgramReport: "The result of `report()` of a program.",
    NodeReport: "An item of `ProgramReport.nodes`.",
    LineReport: "An item of `ProgramReport.lines`.",
    WaitReport: "An item of `ProgramReport.waits`.",
    TransferReport: "An item of `ProgramReport.transfers`.",
    MemoryReport: "An item of `ProgramReport.memory`.",
    LoopReport: "An item of `ProgramReport.loops`.",
    StageReport: "An item of `LoopReport.stages`.",
    BalancedStages: "The result of `tw.balanced_stages`.",
    StageEstimate: "An item of `BalancedStages.stages`.",
    Saving: "The result of `tw.checkpoint.save`.",
    ArrayLoader: "The result of `tw.data_loader`.",
    ParityReport: "The value of `with tw.parity() as report`.",
    ClusterInfo: "The result of `tw.cluster_info`.",
    IslandInfo: "An item of `ClusterInfo.islands`.",
    ExecutorStatus: "An item of the result of `tw.executor_status`.",
    ClusterConfig: "The settings behind the arguments of `tw.init` and the flags of `twrun`.",
}

#: Annotations that would tell a reader nothing.
_NOT_SHOWN = ("Any", "None", "_Scope", "Iterator[None]")
_SECTIONS = (
    "Args:",
    "Returns:",
    "Raises:",
    "Raises (when called):",
    "Raises (a call inside):",
    "Raises (also from iterating):",
    "Attributes:",
)


def page() -> str:
    """Returns the whole page."""
    grouped = [name for names in GROUPS.values() for name in names]
    public = [*tw.__all__, *(f"checkpoint.{name}" for name in checkpoint.__all__ if name != Saving.__name__)]
    if sorted(grouped) != sorted(public):
        raise ValueError(f"GROUPS and the public names differ in {set(grouped) ^ set(public)}")
    parts = [
        "# API",
        "<!-- Made by docs/make_api.py from docstrings: edit those, then run `make docs`. -->",
        "`import torchways as tw` has these public names. The words *island*, *slice*, *program* and *array* are "
        "explained in the [README](../README.md#the-first-program).",
        "\n".join(
            f"- **{title}**: " + ", ".join(f"[`{name}`](#{_anchor(name)})" for name in names)
            for title, names in GROUPS.items()
        )
        + "\n- **Other classes**: "
        + ", ".join(f"[`{cls.__name__}`](#{cls.__name__.lower()})" for cls in RETURNED)
        + "\n- **[Errors](#errors)**",
    ]
    for title, names in GROUPS.items():
        parts.append(f"## {title}")
        for name in names:
            parts += _entry(f"tw.{name}", operator.attrgetter(name)(tw))
    parts.append("## Other classes")
    for cls, purpose in RETURNED.items():
        parts += _entry(cls.__name__, cls, purpose)
    parts += ["## Errors", "In `torchways.errors`. Each class inherits from the one it is indented under."]
    parts.append("\n".join(_error_lines(errors.TorchwaysError, 0)))
    return "\n\n".join(parts) + "\n"


def _anchor(name: str) -> str:
    return f"tw{name}".lower().replace(".", "")


def _entry(title: str, value: Any, purpose: str = "") -> list[str]:
    parts = [f"### {title}"]
    if inspect.isclass(value):
        parts += [purpose] * bool(purpose) + _docstring(value.__doc__)
        return parts if value is ParityReport else parts + _members(value)
    parts.append(f"```text\n{_signature(title, value)}\n```")
    return parts + _docstring(value.__doc__)


def _members(cls: type) -> list[str]:
    if issubclass(cls, enum.Enum):
        texts = dict(re.findall(r'(\w+) = \d+\n\s+"""(.*?)"""', inspect.getsource(cls), re.DOTALL))
        return ["\n".join(f"- `{member.name}`: {texts[member.name]}" for member in cls)]
    if cls is ClusterConfig:
        return ["\n".join(_fields(cls))]
    lines = []
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else member
        text = (getattr(member, "__doc__", "") or "").strip()
        if name.startswith("_") or not text or text == "As a tensor's." or not callable(function):
            continue
        shown = f"`{name}`" if isinstance(member, property) else f"`{_signature(name, function)}`"
        summary, _, rest = text.partition("\n\n")
        body = [f"- {shown}: {_one_line(summary)}"]
        body += [textwrap.indent(part, "  ") for part in _docstring(summary + "\n\n" + rest)[1:]]
        lines.append("\n\n".join(body))
    return ["*Methods and properties:*", "\n".join(lines)] if lines else []


def _fields(cls: type) -> list[str]:
    """Returns the fields of a dataclass that has a string under each of them."""
    (tree,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    lines = []
    for field, text in itertools.pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and field.value is not None and isinstance(text, ast.Expr):
            default = ast.unparse(field.value)
            lines.append(
                f"- `{ast.unparse(field.target)}` (default `{default}`): {_one_line(ast.literal_eval(text.value))}"
            )
    return lines


def _signature(name: str, function: Any) -> str:
    """Returns a function's signature, on one line if it is short enough, else with a line per parameter."""
    shown, is_keyword_only = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not is_keyword_only:
            is_keyword_only = True
            shown.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        is_keyword_only |= parameter.kind is parameter.VAR_POSITIONAL
        text = stars + parameter.name
        if parameter.annotation not in (parameter.empty, "Any"):
            text += f": {parameter.annotation}"
        if parameter.default is not parameter.empty:
            text += f" = {parameter.default!r}" if ":" in text else f"={parameter.default!r}"
        shown.append(text)
    returned = inspect.signature(function).return_annotation
    arrow = "" if returned in (inspect.Signature.empty, *_NOT_SHOWN) else f" -> {returned}"
    line = f"{name}({', '.join(shown)}){arrow}"
    if len(line) <= 100 or not name.startswith("tw."):
        return line
    return f"{name}(\n    " + ",\n    ".join(shown) + f",\n){arrow}"


def _docstring(text: str | None) -> list[str]:
    """Returns a Google-style docstring as Markdown: paragraphs, and a list for each of its sections."""
    parts = []
    for paragraph in inspect.cleandoc(text or "").split("\n\n"):
        first, _, rest = paragraph.partition("\n")
        if first in _SECTIONS:
            parts.append(f"*{first}*")
            parts.append(_items(textwrap.dedent(rest)))
        else:
            parts.append(_one_line(paragraph))
    return [part.replace("``", "`") for part in parts]


def _items(text: str) -> str:
    """Returns a section's ``name: text`` items as a list; text without names as a paragraph."""
    items = re.split(r"\n(?! )", text)
    names = [re.match(r"([\w*, ]+): ", item) for item in items]
    if not all(names):
        return _one_line(text)
    return "\n".join(
        f"- `{name[1]}`: {_one_line(item[name.end() :])}" for item, name in zip(items, names, strict=True) if name
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _error_lines(cls: type[errors.TorchwaysError], depth: int) -> list[str]:
    also = [base.__name__ for base in cls.__bases__ if not issubclass(base, errors.TorchwaysError)]
    builtin = f" (also a `{also[0]}`)" if also and also != ["Exception"] else ""
    text = _one_line((cls.__doc__ or "").split("\n\n")[0])
    lines = [f"{'  ' * depth}- `{cls.__name__}`{builtin}: {text}"]
    for subclass in cls.__subclasses__():
        if subclass.__module__ == errors.__name__:
            lines += _error_lines(subclass, depth + 1)
    return lines


if __name__ == "__main__":
    PAGE.write_text(page())
