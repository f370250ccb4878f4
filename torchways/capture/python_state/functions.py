"""The globals and closure variables that the code of a function may read and write.

Python has no hook for these, so they are read off the bytecode. A name in a branch that is not taken counts too.
"""

from __future__ import annotations

import dis
import functools
import os
import sys
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

_PATHS = sysconfig.get_paths()
_TORCHWAYS = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
#: Installed packages below these keep no state of the user's in globals.
_LIBRARIES = {"torch", "torchvision", "torchaudio", "torch_xla", "transformers", "diffusers", "timm", "numpy", "scipy"}
_LIBRARIES |= {"einops", "hydra", "omegaconf", "accelerate", "tokenizers", "safetensors", "huggingface_hub", "sympy"}
_INSTALLED = tuple({_PATHS[name] + os.sep for name in ("purelib", "platlib")})
_STDLIB = tuple({_PATHS[name] + os.sep for name in ("stdlib", "platstdlib")})

#: Classes of PyTorch's whose objects have state of the user's.
_OF_TORCH = (
    torch.nn.Module,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.amp.grad_scaler.GradScaler,
)


def is_our_function(function: Any) -> bool:
    """Whether a function is of torchways itself, whose containers are no state of the user's."""
    return str(function.__module__).partition(".")[0] == "torchways"


#: Methods that add to a container and read nothing of it.
ADDING_METHODS = {"append", "extend", "add", "appendleft", "extendleft"}

_LOADS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FAST", "LOAD_ATTR"}
_AS_IN_3_11 = {
    "LOAD_FAST_CHECK": "LOAD_FAST",
    "LOAD_FROM_DICT_OR_GLOBALS": "LOAD_NAME",
    "LOAD_FROM_DICT_OR_DEREF": "LOAD_CLASSDEREF",
}


@dataclass(frozen=True, slots=True)
class CodeReads:
    """The names in a code object and those inside it.

    Attributes:
        variables: globals that it loads.
        assigned: globals that it assigns to.
        attributes: of anything.
        locals: local variables that it loads, arguments among them.
        only_added_to: names of which each load is the start of ``name.append(...)`` or the like.
        all_loads: names of all loads of variables and attributes.
    """

    variables: frozenset[str]
    assigned: frozenset[str]
    attributes: frozenset[str]
    locals: frozenset[str]
    only_added_to: frozenset[str]
    all_loads: frozenset[str]

    @property
    def asks_for_classes(self) -> bool:
        """Whether it may read attributes of the classes of objects that it has."""
        return "type" in self.variables or "__class__" in self.attributes


@functools.lru_cache(maxsize=4096)
def reads_of(code: types.CodeType) -> CodeReads:
    """Returns the names in a code object."""
    names: dict[str, set[str]] = {"variables": set(), "assigned": set(), "attributes": set(), "locals": set()}
    added: set[str] = set()
    read: set[str] = set()
    for operations in _codes(code):
        for (operation, name), (following, attribute) in zip(operations, [*operations[1:], ("", None)], strict=True):
            if operation in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_FROM"):
                names["variables"].add(name)
            elif operation in ("STORE_GLOBAL", "STORE_NAME", "DELETE_GLOBAL"):
                names["assigned"].add(name)
            elif operation in ("LOAD_ATTR", "LOAD_METHOD"):
                names["attributes"].add(name)
            elif operation in ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE"):
                names["locals"].add(name)
            if operation in _LOADS:
                is_addition = following == "LOAD_METHOD" and attribute in ADDING_METHODS
                (added if is_addition else read).add(name)
    return CodeReads(
        **{kind: frozenset(found) for kind, found in names.items()},
        only_added_to=frozenset(added - read),
        all_loads=frozenset(added | read),
    )


def _codes(code: types.CodeType) -> Iterator[list[tuple[str, Any]]]:
    """Yields the operations of a code object and of those inside it, each with what it names."""
    yield [operation for instruction in dis.get_instructions(code) for operation in _operations(instruction)]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _operations(instruction: dis.Instruction) -> list[tuple[str, Any]]:
    """Returns an instruction as the operations of Python 3.11 that do the same; 3.12 and 3.13 have merged some."""
    operation, name = instruction.opname, instruction.argval
    if operation == "LOAD_FAST_LOAD_FAST":
        return [("LOAD_FAST", local) for local in name]
    if operation == "STORE_FAST_LOAD_FAST":
        return [("STORE_FAST", name[0]), ("LOAD_FAST", name[1])]
    if operation == "LOAD_SUPER_ATTR" or (operation == "LOAD_ATTR" and sys.version_info >= (3, 12)):
        return [("LOAD_METHOD" if (instruction.arg or 0) & 1 else "LOAD_ATTR", name)]
    return [(_AS_IN_3_11.get(operation, operation), name)]


@functools.lru_cache(maxsize=4096)
def is_user_code(filename: str) -> bool:
    """Whether code of a file is the user's, whose globals may change what it computes."""
    if filename.startswith(_TORCHWAYS):
        return False
    for folder in _INSTALLED:
        if filename.startswith(folder):
            return filename[len(folder) :].split(os.sep)[0].removesuffix(".py") not in _LIBRARIES
    return not filename.startswith(_STDLIB) and not filename.startswith("<frozen")


@functools.lru_cache(maxsize=4096)
def is_user_module(name: str | None) -> bool:
    """Whether a module, by name, is the user's."""
    if not name or (name.split(".")[0] in sys.stdlib_module_names and name != "__main__"):
        return False
    module = sys.modules.get(name)
    filename = getattr(module, "__file__", None)
    return module is not None and (filename is None or is_user_code(filename)) and name.split(".")[0] != "builtins"


def unread_parameters(function: Any) -> frozenset[str]:
    """Returns the parameters of a function that its code never loads, so that their values are no condition.

    Of methods of an object none: the first of their code's parameters is no argument of a call.
    """
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        return frozenset()
    code = function.__code__
    reads = reads_of(code)
    if not reads.variables.isdisjoint({"locals", "vars", "eval", "exec", "super"}):
        return frozenset()
    parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return frozenset(parameters) - reads.locals


def is_tracked_class(cls: type) -> bool:
    """Whether reads of an instance's attributes can be, and are worth being, watched."""
    if not cls.__flags__ & (1 << 9) or issubclass(cls, (torch.Tensor, BaseException, type)):  # a class made in C
        return False
    if issubclass(cls, _OF_TORCH):
        return True
    package = cls.__module__.split(".")[0]
    if package in ("torch", "torchways", "torch_xla", "numpy", "grpc", "google"):
        return False
    return package == "argparse" or package not in sys.stdlib_module_names or package == "__main__"
