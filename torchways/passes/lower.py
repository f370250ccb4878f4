"""The passes in their order: from a traced program to what each slice does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchways.errors import ConfigError
from torchways.ir.program import Program, verify
from torchways.passes.donate import donate
from torchways.passes.insert_transfers import insert_transfers
from torchways.passes.split import SlicePart, split

#: Passes from program to program, by name, in order. The last step, `split`, ends in parts.
PASSES: dict[str, Callable[[Program], Program]] = {
    "verify": verify,
    "insert_transfers": insert_transfers,
    "donate": donate,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoweredProgram:
    """A program after all passes.

    Attributes:
        program: after the last pass that ends in a program.
        parts: what each slice does.
    """

    program: Program
    parts: tuple[SlicePart, ...]


def lower(program: Program, *, print_after: str | None = None) -> LoweredProgram:
    """Runs all passes.

    Args:
        program: as traced.
        print_after: name of a pass: print the program before and after it.

    Raises:
        ConfigError: there is no such pass.
    """
    if print_after is not None and print_after not in PASSES:
        raise ConfigError(f"no pass is called {print_after!r}; the passes are {', '.join(PASSES)}")
    for name, run_pass in PASSES.items():
        before = program
        program = verify(run_pass(program))
        if name == print_after:
            print(f"--- before {name}\n{before}\n--- after {name}\n{program}")
    return LoweredProgram(program=program, parts=tuple(split(program)))
