"""Unrolls a loop: from the program of one turn to that of all of them, each fed with what the one before made.

All turns call the same compiled functions, so these are compiled once, and what a turn gives to the next is donated to
it: a loop over a large state (a key-value cache) updates it in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torchways.errors import UserError
from torchways.ir.program import (
    AllReduce,
    Arg,
    Compute,
    Loop,
    Node,
    Program,
    Result,
    TracedInput,
    Transfer,
    Value,
    ValueIndex,
    node_inputs,
    node_outputs,
    with_nodes,
)
from torchways.passes.place import place


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanLoop:
    """How the turns of a loop hang together.

    Attributes:
        length: number of turns, at least one.
        num_inputs: inputs of the traced function.
        fed: from the position of an input to the number of the result that is its value in the next turn.
        own: positions of inputs of which each turn gets one of its own.
        kept: numbers of the results that each turn gives; of the others, only the last turn's are results.
    """

    length: int
    num_inputs: int
    fed: Mapping[int, int]
    own: frozenset[int]
    kept: frozenset[int]

    def results(self, num_results: int) -> list[tuple[int, int]]:
        """Returns (turn, number) for each result of the whole loop, in order."""
        last = self.length - 1
        return [
            (turn, number)
            for turn in range(self.length)
            for number in range(num_results)
            if number in self.kept or turn == last
        ]


def unroll(body: Program, loop: ScanLoop) -> Program:
    """Returns the program of all turns.

    Its arguments are those of the first turn, and what each further turn gets of its own. In turn t, the position of
    an input is t * `num_inputs` above that of the first turn. Its results are those of `loop.results`.
    """
    body = _same_placements(place(body), loop)
    results = node_inputs(body.nodes[-1])
    fed = {
        node.output: results[loop.fed[node.position]]
        for node in body.nodes
        if isinstance(node, Arg) and node.position in loop.fed
    }
    kept = {results[number] for number in loop.kept}
    values = list(body.values)
    nodes: list[Node] = []
    made: list[dict[ValueIndex, ValueIndex]] = []
    for turn in range(loop.length):
        now: dict[ValueIndex, ValueIndex] = {}
        for node in body.nodes:
            if isinstance(node, Arg):
                if turn > 0 and node.output in fed:
                    now[node.output] = made[-1][fed[node.output]]
                    continue
                if turn > 0 and node.position not in loop.own:
                    now[node.output] = node.output
                    continue
            for value in node_outputs(node):
                now[value] = _copy(values, value) if turn else value
            if not isinstance(node, Result):
                nodes.append(_node_of_turn(node, turn, now, loop, fed, kept))
        made.append(now)
    nodes.append(Result(inputs=tuple(made[turn][results[number]] for turn, number in loop.results(len(results)))))
    # Arguments first, as in any program.
    return with_nodes(body, sorted(nodes, key=lambda node: not isinstance(node, Arg)), values)


def _same_placements(body: Program, loop: ScanLoop) -> Program:
    """Gives what is fed back the placements of the argument that it becomes: every turn is then the same call."""
    values = list(body.values)
    results = node_inputs(body.nodes[-1])
    computed = {value for node in body.nodes if not isinstance(node, Arg) for value in node_outputs(node)}
    for node in body.nodes:
        if isinstance(node, Arg) and node.position in loop.fed:
            value, known = results[loop.fed[node.position]], body.values[node.output]
            if value in computed and values[value].slice_index == known.slice_index:
                values[value] = replace(values[value], placements=known.placements)
    return with_nodes(body, list(body.nodes), values)


def _copy(values: list[Value], value: ValueIndex) -> ValueIndex:
    values.append(values[value])
    return len(values) - 1


def _node_of_turn(
    node: Node,
    turn: int,
    now: Mapping[ValueIndex, ValueIndex],
    loop: ScanLoop,
    fed: Mapping[ValueIndex, ValueIndex],
    kept: set[ValueIndex],
) -> Node:
    match node:
        case Arg():
            # What no later turn can donate the first does not either: all are then the same call.
            replaced = node.replaced and fed.get(node.output) not in kept
            label = f"{node.label} of turn {turn}" if turn else node.label
            source = TracedInput(node.position + turn * loop.num_inputs)
            return replace(node, output=now[node.output], source=source, label=label, replaced=replaced)
        case Compute():
            donated = tuple(index for index, value in enumerate(node.inputs) if value in fed) if turn else ()
            inputs = tuple(now[value] for value in node.inputs)
            outputs = tuple(now[value] for value in node.outputs)
            return replace(node, inputs=inputs, outputs=outputs, donated=donated)
        case AllReduce():
            inputs = tuple(now[value] for value in node.inputs)
            return replace(node, inputs=inputs, outputs=tuple(now[value] for value in node.outputs))
        case Transfer():
            return replace(node, input=now[node.input], output=now[node.output])
        case Loop():
            raise UserError("tw.scan cannot have a tw.microbatch in its body: call it from a Python loop in a program")
        case Result():
            return node
