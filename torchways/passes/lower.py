"""The passes in their order: from a traced program to one part per slice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchways.errors import ConfigError
from torchways.ir.loops import unrolled
from torchways.ir.part import SlicePart
from torchways.ir.program import Program, verify
from torchways.passes.donate import donate
from torchways.passes.insert_transfers import insert_transfers
from torchways.passes.place import place
from torchways.passes.preflight import check_order
from torchways.passes.split import split

#: Passes from program to program, by name, in order. `split` then makes the parts. These are bound to executors when
#: the program is registered (rpc/programs.py), so no pass runs again when a slice moves.
PASSES: dict[str, Callable[[Program], Program]] = {
    "verify": verify,
    "place": place,
    "insert_transfers": insert_transfers,
    "donate": donate,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoweredProgram:
    """A program after all passes.

    Attributes:
        program: after the last pass that returns a program.
        parts: one per slice that takes part.
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
        PlacementError: an argument cannot be split as its slice needs it.
        InternalError: the passes made a program that cannot run.
    """
    if print_after is not None and print_after not in (*PASSES, "split"):
        raise ConfigError(f"no pass is called {print_after!r}; the passes are {', '.join(PASSES)}, split")
    for name, run_pass in PASSES.items():
        before = program
        program = verify(run_pass(program))
        if name == print_after:
            print(f"--- before {name}\n{before}\n--- after {name}\n{program}")
    parts = tuple(split(program))
    if print_after == "split":
        print(f"--- before split\n{program}\n--- after split\n" + "\n".join(map(str, parts)))
    check_order([unrolled(part) for part in parts])
    return LoweredProgram(program=program, parts=parts)
