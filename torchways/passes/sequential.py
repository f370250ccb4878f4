"""Cuts a program into programs of one computation each, for sequential dispatch (the paper's Figure 4a).

Each is dispatched when the one before is over. It is what parallel dispatch is compared with, and shows what
dispatching whole programs saves.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchways.ir.program import (
    Arg,
    MadeValue,
    Node,
    Program,
    Result,
    ValueIndex,
    node_inputs,
    node_outputs,
    with_nodes,
)


@dataclass(frozen=True, slots=True)
class FinalResult:
    """A result of the whole program."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A program of its own.

    Attributes:
        program: it; its values are numbered as in the whole.
        results: what each of its results is to the whole.
    """

    program: Program
    results: tuple[FinalResult | MadeValue, ...]


def whole(program: Program) -> Piece:
    """Returns a program as its only piece."""
    return Piece(program=program, results=tuple(map(FinalResult, range(len(node_inputs(program.nodes[-1]))))))


def sequential(program: Program) -> list[Piece]:
    """Returns a piece for each node that is neither an argument nor the result, in order."""
    args = {node.output: node for node in program.nodes if isinstance(node, Arg)}
    work = [node for node in program.nodes if not isinstance(node, (Arg, Result))]
    results = node_inputs(program.nodes[-1])
    last_reader: dict[ValueIndex, int] = {}
    for position, node in enumerate(work):
        last_reader.update((value, position) for value in node_inputs(node))
    pieces = [_piece(program, args, node, position, last_reader, results) for position, node in enumerate(work)]
    passed = [(number, value) for number, value in enumerate(results) if value in args]
    if passed or not pieces:  # arguments that are results
        nodes: list[Node] = [args[value] for value in dict.fromkeys(value for _, value in passed)]
        nodes.append(Result(inputs=tuple(value for _, value in passed)))
        pieces.append(
            Piece(program=with_nodes(program, nodes), results=tuple(FinalResult(number) for number, _ in passed))
        )
    return pieces


def _piece(
    program: Program,
    args: dict[ValueIndex, Arg],
    node: Node,
    position: int,
    last_reader: dict[ValueIndex, int],
    results: tuple[ValueIndex, ...],
) -> Piece:
    reads: list[Node] = []
    for value in dict.fromkeys(node_inputs(node)):
        known = args.get(value)
        is_last = last_reader[value] == position and value not in results
        if known is None:
            reads.append(Arg(output=value, label="value", source=MadeValue(value), replaced=is_last))
        elif known.replaced and not is_last:
            reads.append(Arg(output=value, label=known.label, source=known.source, is_data=known.is_data))
        else:
            reads.append(known)
    kept: list[tuple[ValueIndex, FinalResult | MadeValue]] = []
    for value in node_outputs(node):
        kept += [(value, FinalResult(number)) for number, result in enumerate(results) if result == value]
        if value in last_reader:
            kept.append((value, MadeValue(value)))
    end = Result(inputs=tuple(value for value, _ in kept))
    return Piece(program=with_nodes(program, [*reads, node, end]), results=tuple(what for _, what in kept))
