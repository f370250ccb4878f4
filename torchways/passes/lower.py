"""The passes in their order: from a traced program to one part per slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torchways.errors import ConfigError, InternalError, UserError
from torchways.ir.loops import unrolled
from torchways.ir.part import SlicePart
from torchways.ir.program import Loop, Program, verify
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
        ConfigError: there is no such pass, or a schedule does not fit its loop.
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
    _check_order(program, parts)
    return LoweredProgram(program=program, parts=parts)


def _check_order(program: Program, parts: Sequence[SlicePart]) -> None:
    try:
        check_order([unrolled(part) for part in parts])
    except (InternalError, UserError) as error:
        loops = [node for node in program.nodes if isinstance(node, Loop)]
        if not loops:
            raise
        where = " and ".join(f"schedule {loop.schedule} at {loop.source}" for loop in loops)
        raise ConfigError(
            f"{where} does not fit what a microbatch computes: call each stage of the pipeline once in a microbatch, "
            f'or try schedule="GPipe" ({error})'
        ) from error
