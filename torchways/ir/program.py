"""The dataflow program: what runs on which virtual slice, and what flows between.

Location-agnostic (virtual slices, no processes) and compact: a compiled function is one node and a sharded buffer one
value, however many devices the slice has. This package knows neither torch nor gRPC.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torchways.errors import InternalError
from torchways.mesh import Placements, mesh_text, tensor_text
from torchways.schedules.actions import Kind, Repeat

#: Position of a value in `Program.values`.
ValueIndex: TypeAlias = int

#: The slice of a value that goes wherever it is read: a host argument, before the pass `place`.
UNPLACED = -1

#: The schedule of a loop that no pipeline splits: all its slices run the same turn.
ONE_AFTER_THE_OTHER = "one after the other"


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceSpec:
    """A virtual slice as a program sees it.

    Attributes:
        shape: sizes of the mesh axes.
        axis_names: their names.
    """

    shape: tuple[int, ...]
    axis_names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One logical sharded buffer.

    Attributes:
        dtype: PyTorch's spelling without the module, "float32".
        shape: logical shape.
        slice_index: slice that it lives on, or UNPLACED.
        placements: one an axis of the slice; none while it is not placed.
    """

    dtype: str
    shape: tuple[int, ...]
    slice_index: int
    placements: Placements

    def __str__(self) -> str:
        return tensor_text(self.dtype, self.shape, self.placements)


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A compiled function: a captured graph with known shapes and shardings.

    Attributes:
        name: for people, "train_step/1".
        source: the user's line.
        graph: its serialized graph (torchways/graphs.py); opaque here.
        num_operators: operators in the graph.
    """

    name: str
    source: str
    graph: bytes = field(repr=False)
    num_operators: int


@dataclass(frozen=True, slots=True)
class TracedInput:
    """The input at a position among those of the traced function."""

    position: int


@dataclass(frozen=True, slots=True)
class MadeValue:
    """A value that an earlier piece of the same program makes (passes/sequential.py)."""

    value: ValueIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class Arg:
    """A value given from outside: the user's arguments and the state that the program reads.

    Attributes:
        output: the value.
        label: what it is, "host 0", "state layers.0.weight".
        source: where it comes from.
        replaced: the run gives the state a new value, so the old buffer may be donated.
        is_data: a host argument that is split along "dp" where it is placed.
        placements: how a host argument is split instead, where its slice has as many axes.
    """

    output: ValueIndex
    label: str
    source: TracedInput | MadeValue
    replaced: bool = False
    is_data: bool = False
    placements: Placements | None = None

    @property
    def position(self) -> int:
        """The input of the traced function that it is. Arguments of whole programs are nothing else."""
        assert isinstance(self.source, TracedInput), f"{self.label} is made by another piece"
        return self.source.position


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """One call of a compiled function on one slice.

    Attributes:
        function_index: position in `Program.functions`.
        inputs, outputs: values, in the graph's order.
        donated: positions in `inputs` whose buffers the computation may reuse.
    """

    function_index: int
    inputs: tuple[ValueIndex, ...]
    outputs: tuple[ValueIndex, ...]
    donated: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Moves a value to another slice and reshards it there."""

    input: ValueIndex
    output: ValueIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduce:
    """Sums values of several slices, elementwise; every slice gets the sum.

    Attributes:
        inputs: one value of each slice, all of one shape and dtype.
        outputs: the sum on each of the same slices.
        source: the user's line.
    """

    inputs: tuple[ValueIndex, ...]
    outputs: tuple[ValueIndex, ...]
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The values that outlive the run, in the order of their result numbers."""

    inputs: tuple[ValueIndex, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyNode:
    """A node of a loop's body.

    Attributes:
        stage, kind: the action of the schedule that it belongs to; of a transfer, the one that its value comes from.
        node: a Compute, Transfer or AllReduce.
    """

    stage: int
    kind: Kind
    node: Compute | Transfer | AllReduce


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopBody:
    """One turn of a loop. Values that it neither makes nor lists here are the program's, the same in each turn.

    Attributes:
        nodes: in an order in which they can run.
        carried: for each value that turns hand on, the value that stands for what a turn gets, and what it makes of it.
        last: the values whose content in the last turn outlives the loop.
        numbers: values that hold the number of the turn, int64[], one a slice.
    """

    nodes: tuple[BodyNode, ...]
    carried: tuple[tuple[ValueIndex, ValueIndex], ...]
    last: tuple[ValueIndex, ...]
    numbers: tuple[ValueIndex, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Microbatches: turns of a body, whose actions each slice runs in an order of its own. One node, however many.

    Attributes:
        bodies: what turns do. If there are two, the last turn has the second.
        num_turns: at least one.
        orders: the actions of each slice that takes part.
        firsts: what the first turn gets of each value that turns hand on.
        outputs: what the last turn hands on, then what it made of `last`.
        donated: positions in `firsts` whose buffers the first turn may reuse.
        number: of the loop, in the order of the trace. A program that is partitioned again has the same numbers.
        schedule: its name, or `ONE_AFTER_THE_OTHER`.
        is_automatic: the schedule was searched for.
        source: the user's line.
    """

    bodies: tuple[LoopBody, ...]
    num_turns: int
    orders: tuple[tuple[int, tuple[Repeat, ...]], ...]
    firsts: tuple[ValueIndex, ...]
    outputs: tuple[ValueIndex, ...]
    donated: tuple[int, ...] = ()
    number: int = 0
    schedule: str = ""
    is_automatic: bool = False
    source: str = ""

    def invariants(self) -> tuple[ValueIndex, ...]:
        """Returns the values that are the same in each turn."""
        found: dict[ValueIndex, None] = {}
        for body in self.bodies:
            own = {*body.numbers, *(entered for entered, _ in body.carried)}
            own.update(value for item in body.nodes for value in node_outputs(item.node))
            found.update((value, None) for item in body.nodes for value in node_inputs(item.node) if value not in own)
        return tuple(found)


Node: TypeAlias = Arg | Compute | Transfer | AllReduce | Loop | Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A traced dataflow program. Nodes are in an order in which they can run."""

    name: str
    slices: tuple[SliceSpec, ...]
    values: tuple[Value, ...]
    functions: tuple[Function, ...]
    nodes: tuple[Node, ...]

    def __str__(self) -> str:
        return program_text(self)


def node_inputs(node: Node) -> tuple[ValueIndex, ...]:
    """Returns the values that a node reads."""
    match node:
        case Arg():
            return ()
        case Transfer():
            return (node.input,)
        case Compute() | AllReduce() | Result():
            return node.inputs
        case Loop():
            return tuple(dict.fromkeys((*node.firsts, *node.invariants())))


def node_outputs(node: Node) -> tuple[ValueIndex, ...]:
    """Returns the values that a node makes."""
    match node:
        case Arg() | Transfer():
            return (node.output,)
        case Compute() | AllReduce() | Loop():
            return node.outputs
        case Result():
            return ()


def donated_values(node: Node) -> tuple[ValueIndex, ...]:
    """Returns the values whose buffers a node may reuse."""
    match node:
        case Compute():
            return tuple(node.inputs[position] for position in node.donated)
        case Loop():
            return tuple(node.firsts[position] for position in node.donated)
        case _:
            return ()


def verify(program: Program) -> Program:
    """Checks the rules that every pass keeps, and returns the program.

    Every value is made once and before it is read, what a computation makes is on one slice, and the one Result comes
    last.

    Raises:
        InternalError: a rule is broken; the message holds the program's text.
    """
    made: set[ValueIndex] = set()
    for position, node in enumerate(program.nodes):
        for value in node_inputs(node):
            if value not in made:
                raise InternalError(f"%{value} is read by node {position} before it is made in\n{program}")
        for value in node_outputs(node):
            if value in made:
                raise InternalError(f"%{value} is made twice in\n{program}")
            made.add(value)
        if isinstance(node, Loop):
            _verify_loop(program, node, made)
        homes = {program.values[value].slice_index for value in node_outputs(node)}
        if isinstance(node, Compute) and (len(homes) > 1 or UNPLACED in homes):
            raise InternalError(f"node {position} makes values on several slices, or on none, in\n{program}")
        if isinstance(node, Result) != (position == len(program.nodes) - 1):
            raise InternalError(f"Result must be the last node, and only that, in\n{program}")
    return program


def _verify_loop(program: Program, loop: Loop, outside: set[ValueIndex]) -> None:
    """Checks that every value of a body is made once and before it is read, and that all bodies hand on the same."""
    for body in loop.bodies:
        made = {*outside, *body.numbers, *(entered for entered, _ in body.carried)}
        for item in body.nodes:
            if not made.issuperset(node_inputs(item.node)) or not made.isdisjoint(node_outputs(item.node)):
                raise InternalError(f"{item.node} of a loop reads what is not made, or makes what is, in\n{program}")
            made.update(node_outputs(item.node))
        handed_on = {value for _, value in body.carried}
        if not made - outside >= {*body.last, *handed_on} or len(handed_on) < len(body.carried):
            raise InternalError(f"a loop hands on, or leaves, what it does not make in\n{program}")
        num_last = len(loop.bodies[-1].last)
        if len(body.carried) != len(loop.firsts) or len(loop.firsts) + num_last != len(loop.outputs):
            raise InternalError(f"a loop's bodies hand on, or leave, different values in\n{program}")
        for first, (entered, value) in zip(loop.firsts, body.carried, strict=True):
            if program.values[entered] != program.values[value] or program.values[first] != program.values[entered]:
                raise InternalError(f"%{first}, %{entered} and %{value} must be alike, to be handed on, in\n{program}")


def with_nodes(program: Program, nodes: list[Node], values: list[Value] | None = None) -> Program:
    """Returns the program with other nodes (and values)."""
    return replace(program, nodes=tuple(nodes), values=program.values if values is None else tuple(values))


def program_text(program: Program) -> str:
    """Returns the program as text: a line a node, its size the same for any number of devices."""
    return "\n".join(_lines(program))


def _lines(program: Program) -> Iterator[str]:
    yield f"program {program.name}"
    for index, spec in enumerate(program.slices):
        yield f"  slice @{index} {mesh_text(spec.shape, spec.axis_names)}"
    for node in program.nodes:
        match node:
            case Arg():
                note = " (replaced)" if node.replaced else ""
                yield f"  {_made(program, node.output)} = arg {node.label}{note}"
            case Compute():
                function = program.functions[node.function_index]
                where = program.values[node.outputs[0] if node.outputs else node.inputs[0]].slice_index
                inputs = ", ".join(
                    f"{'donate ' if position in node.donated else ''}%{value}"
                    for position, value in enumerate(node.inputs)
                )
                outputs = ", ".join(_made(program, value) for value in node.outputs)
                yield f"  {outputs} = compute @{where} {function.name}({inputs})"
                yield f"      # {function.num_operators} operators, {function.source}"
            case Transfer():
                source, target = program.values[node.input], program.values[node.output]
                made = _made(program, node.output)
                yield f"  {made} = transfer @{source.slice_index} -> @{target.slice_index} %{node.input}"
            case AllReduce():
                outputs = ", ".join(_made(program, value) for value in node.outputs)
                yield f"  {outputs} = all_reduce({', '.join(f'%{value}' for value in node.inputs)})"
            case Loop():
                outputs = ", ".join(_made(program, value) for value in node.outputs)
                auto = "auto: " if node.is_automatic else ""
                yield f"  {outputs} = loop of {node.num_turns} turns by {auto}{node.schedule}"
                yield f"      # {node.source}"
                yield from _loop_lines(program, node)
            case Result():
                yield f"  result {', '.join(f'%{value}' for value in node.inputs)}"


def _loop_lines(program: Program, loop: Loop) -> Iterator[str]:
    for number, body in enumerate(loop.bodies):
        yield "    the last turn" if number else "    each turn"
        for first, (entered, made) in zip(loop.firsts, body.carried, strict=True):
            yield f"      {_made(program, entered)} = first %{first}, then %{made}"
        for item in body.nodes:
            [*lines] = _lines(with_nodes(program, [item.node]))
            yield f"      {item.stage}{item.kind}: {lines[1 + len(program.slices)].strip()}"
        if body.last:
            yield f"      last {', '.join(f'%{value}' for value in body.last)}"


def _made(program: Program, value: ValueIndex) -> str:
    where = program.values[value].slice_index
    return f"%{value}: {program.values[value]} " + (f"@{where}" if where != UNPLACED else "unplaced")
