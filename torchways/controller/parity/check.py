"""Compares a run of a program with eager PyTorch: the first node that diverges, and inside it the first operator.

A run hands out every value between its nodes (`observe.py`). Each node is then computed once more on the controller, by
plain PyTorch on the CPU, from the values that the executor had; so the first node that diverges is the guilty one.
Inside it, the first guilty operator is found in the same way: the node runs again with what each operator computes as
an output. Random operators are not compared: what they drew is given to eager PyTorch.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from torchways.capture.host_content import HostContent
from torchways.controller.buffers import HostBuffer, RemoteBuffer
from torchways.controller.checks import operator_name
from torchways.controller.parity.comparison import EXACT, Difference, Tolerance, compare, explained_by_rounding
from torchways.controller.parity.observe import values_of
from torchways.controller.parity.replay import (
    call_operator,
    is_drawn,
    operator_values,
    outputs_of,
    replay,
    with_outputs,
)
from torchways.controller.parity.report import ParityReport
from torchways.controller.session import Session
from torchways.errors import ParityError, TorchwaysError
from torchways.graphs import SOURCE_KEY, deserialize_graph
from torchways.ids import BufferId
from torchways.ir.part import Arguments
from torchways.ir.program import (
    AllReduce,
    Arg,
    Compute,
    Function,
    Node,
    Program,
    Result,
    TracedInput,
    Transfer,
    ValueIndex,
    node_inputs,
    node_outputs,
)
from torchways.mesh import VirtualSlice, mesh_text
from torchways.passes.insert_transfers import compute_slice
from torchways.passes.lower import lower
from torchways.rpc.programs import InlineValue

logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)  # its lines are asked for by the switch itself


@dataclass(slots=True, kw_only=True)
class ParityCheck:
    """Compares one run of an observed program with eager PyTorch.

    Attributes:
        program: an observed one, after all passes.
        meshes: the slice that each of its slices stands for.
        session: where it ran.
        buffers: the run's buffer of each value; they are given back as they are read.
        sent: values of arguments that were on the host.
        tolerance: see `Tolerance`.
    """

    program: Program
    meshes: Sequence[VirtualSlice]
    session: Session
    buffers: dict[ValueIndex, RemoteBuffer]
    sent: Mapping[ValueIndex, torch.Tensor]
    tolerance: Tolerance
    _report: ParityReport = field(default_factory=lambda: ParityReport(num_calls=1))
    _values: dict[ValueIndex, torch.Tensor] = field(default_factory=dict)

    def run(self) -> ParityReport:
        """Compares all nodes in program order; waits for the run.

        Raises:
            ParityError: a node diverges.
            RemoteError, ExecutorLost, ...: as reading an array.
        """
        nodes = self.program.nodes[:-1]
        last_reader = {value: position for position, node in enumerate(nodes) for value in node_inputs(node)}
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for position, node in enumerate(nodes):
                self._read(node_outputs(node))
                self._check(node)
                for value in (*node_inputs(node), *node_outputs(node)):
                    if last_reader.get(value, -1) <= position:
                        self._values.pop(value, None)
        logger.info("parity of %s: %s", self.program.name, self._report)
        return self._report

    def _read(self, values: Sequence[ValueIndex]) -> None:
        reads = [(value, self.session.values.start_fetch(self.buffers[value])) for value in values]
        for value, read in reads:
            self._values[value] = read.result()  # raises where its executor is lost
            del self.buffers[value]

    def _check(self, node: Node) -> None:
        match node:
            case Arg():
                if node.output in self.sent:
                    self._check_moved(f"argument ({node.label})", self.sent[node.output], node.output)
                return  # an argument is no node for people
            case Transfer():
                source = self.program.values[node.input].slice_index
                what = f"transfer of %{node.input} from {self._mesh_text(source)}"
                self._check_moved(what, self._values[node.input], node.output)
            case AllReduce():
                self._check_sum(node)
            case Compute():
                self._check_compute(node)
            case Result():
                pass
        self._report.num_nodes += 1

    def _check_moved(self, what: str, expected: torch.Tensor, output: ValueIndex) -> None:
        """What is moved, and split anew, must arrive as it was."""
        difference = compare(self._values[output], expected, EXACT)
        if difference.num_different:
            raise self._error(what, "", output, difference, "what arrives is not what was sent")
        self._report.add(self.program.values[output].dtype, difference, by_rounding=False)

    def _check_sum(self, node: AllReduce) -> None:
        inputs = [self._values[value] for value in node.inputs]
        expected = sum(inputs[1:], inputs[0])
        for output in node.outputs:
            difference = compare(self._values[output], expected, self.tolerance)
            by_rounding = difference.num_different > 0 and explained_by_rounding(
                self._values[output], expected, torch.stack(inputs).double().sum(0)
            )
            if difference.num_different and not by_rounding:
                finding = "it is not the sum of its inputs"
                raise self._error("tw.all_reduce", node.source, output, difference, finding)
            self._report.add(self.program.values[output].dtype, difference, by_rounding=by_rounding)

    def _check_compute(self, node: Compute) -> None:
        function = self.program.functions[node.function_index]
        graph = _graph_of(function.graph)
        inputs = [self._values[value] for value in node.inputs]
        actual = [self._values[value] for value in node.outputs]
        drawn = {item: value for item, value in zip(outputs_of(graph), actual, strict=True) if is_drawn(item)}
        expected = replay(graph, inputs, drawn)
        differences = [compare(*pair, self.tolerance) for pair in zip(actual, expected, strict=True)]
        beyond = {position for position, difference in enumerate(differences) if difference.num_different}
        diverging = beyond
        if beyond and (reference := _in_float64(lambda: replay(graph, inputs, drawn, in_float64=True))):
            diverging = {
                position
                for position in beyond
                if not explained_by_rounding(actual[position], expected[position], reference[position])
            }
        if diverging:
            first = min(diverging)
            finding = self._find_operator(node, graph, inputs, [(item, actual[item]) for item in sorted(diverging)])
            if finding is not None:
                raise self._error(
                    function.name,
                    function.source,
                    node.outputs[first],
                    differences[first],
                    finding.text,
                    operator=finding.operator,
                    operator_source=finding.source,
                )
        for position, (value, difference) in enumerate(zip(node.outputs, differences, strict=True)):
            self._report.add(self.program.values[value].dtype, difference, by_rounding=position in beyond)

    # ---- inside a node

    def _find_operator(
        self,
        node: Compute,
        graph: torch.fx.Graph,
        inputs: Sequence[torch.Tensor],
        diverging: Sequence[tuple[int, torch.Tensor]],
    ) -> _Finding | None:
        """Returns the first operator of a diverging node that diverges by itself.

        None: all agree, and give together what the node gave, so that only rounding can have grown.
        """
        try:
            outputs, values = self._run_exposed(node, graph, inputs)
        except TorchwaysError as error:
            return _Finding(f"which operator it is cannot be told: {error}")
        operators = [
            item for item in graph.nodes if item.op == "call_function" and _tensors_of(item) and not is_drawn(item)
        ]
        for item in operators:
            for tensor, difference in self._differences_of(item, values):
                name, source = operator_name(item.target), str(item.meta.get(SOURCE_KEY, ""))
                [value] = values_of([tensor], self.program, node)
                where = source or "an unknown line"
                text = (
                    f"inside, the first operator that diverges by itself is {name}, at {where}\n  {value}: {difference}"
                )
                return _Finding(text, name, source)
        if any(compare(outputs[position], value, self.tolerance).num_different for position, value in diverging):
            return _Finding(
                f"run again with what each of its {len(operators)} operators computes as an output, it gives other "
                "values, and no operator diverges by itself: how XLA fuses or partitions the whole matters"
            )
        return None

    def _differences_of(
        self, node: torch.fx.Node, values: Mapping[torch.fx.Node, torch.Tensor]
    ) -> Iterator[tuple[torch.fx.Node, Difference]]:
        """Yields the tensors of an operator that are not what eager PyTorch makes of the values that it read."""
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        expected = _leaves(call_operator(node.target, args, kwargs))
        for position, tensor in _tensors_of(node):
            difference = compare(values[tensor], expected[position], self.tolerance)
            if difference.num_different:
                wide = _in_float64(lambda: _leaves(call_operator(node.target, args, kwargs, in_float64=True)))
                if wide is None or not explained_by_rounding(values[tensor], expected[position], wide[position]):
                    yield tensor, difference

    def _run_exposed(
        self, node: Compute, graph: torch.fx.Graph, inputs: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], dict[torch.fx.Node, torch.Tensor]]:
        """Runs a computation with what each operator computes as an output.

        Returns its own outputs, and the values of the graph's nodes.
        """
        program, session = self.program, self.session
        home = compute_slice(program, node)
        mesh = self.meshes[home]
        exposed = operator_values(graph)
        values = [
            replace(value, slice_index=0)
            for value in (
                *(program.values[index] for index in (*node.inputs, *node.outputs)),
                *values_of(exposed, program, node),
            )
        ]
        read, made = range(len(inputs)), range(len(inputs), len(values))
        function = program.functions[node.function_index]
        name = f"{function.name} operator by operator"
        data = with_outputs(graph, exposed)
        lowered = lower(
            Program(
                name=name,
                slices=(program.slices[home],),
                values=tuple(values),
                functions=(
                    Function(name=name, source=function.source, graph=data, num_operators=function.num_operators),
                ),
                nodes=(
                    *(Arg(output=value, label="input", source=TracedInput(value)) for value in read),
                    Compute(function_index=0, inputs=tuple(read), outputs=tuple(made)),
                    Result(inputs=tuple(made)),
                ),
            )
        )
        placed = [
            session.values.put(
                HostBuffer(HostContent(tuple(value.shape), value.dtype, value)), mesh, values[index].placements
            )
            for index, value in enumerate(inputs)
        ]
        program_id = session.programs.register(name, lowered.parts, [mesh])
        first = session.new_ids(len(made))
        arguments: Arguments[InlineValue] = Arguments([item.buffer_id for item in placed])
        ids = range(first, first + len(made))
        session.runs.send(program_id, name, ids, {mesh.slice_id: arguments}, changes_state=False)
        buffers = [
            RemoteBuffer(session, mesh, values[index].placements, BufferId(first + number))
            for number, index in enumerate(made)
        ]
        results = [read.result() for read in [session.values.start_fetch(buffer) for buffer in buffers]]
        session.programs.forget(program_id)
        own = len(node.outputs)
        placeholders = graph.find_nodes(op="placeholder")
        return results[:own], dict(zip((*placeholders, *exposed), (*inputs, *results[own:]), strict=True))

    # ---- messages

    def _mesh_text(self, slice_index: int) -> str:
        spec = self.program.slices[slice_index]
        return f"slice @{slice_index} {mesh_text(spec.shape, spec.axis_names)}"

    def _error(
        self,
        what: str,
        source: str,
        output: ValueIndex,
        difference: Difference,
        finding: str,
        **where: str,
    ) -> ParityError:
        value = self.program.values[output]
        line = f", at {source}" if source else ""
        num_nodes = sum(not isinstance(node, (Arg, Result)) for node in self.program.nodes)
        where_in = f"node {self._report.num_nodes} of {num_nodes}: {what} on {self._mesh_text(value.slice_index)}{line}"
        return ParityError(
            f"{self.program.name} diverges from eager PyTorch at {where_in}\n  %{output}: {value}: {difference}\n"
            f"  {finding}",
            program=self.program.name,
            function=what,
            source=source,
            num_different=difference.num_different,
            max_abs_error=difference.max_abs_error,
            max_rel_error=difference.max_rel_error,
            **where,
        )


@functools.lru_cache(maxsize=64)
def _graph_of(data: bytes) -> torch.fx.Graph:
    return deserialize_graph(data)


@dataclass(frozen=True, slots=True)
class _Finding:
    """What was found inside a diverging node."""

    text: str
    operator: str = ""
    source: str = ""


def _tensors_of(node: torch.fx.Node) -> list[tuple[int, torch.fx.Node]]:
    """Returns the nodes that are an operator's tensors, with their places among its results."""
    if node.target is operator.getitem:
        return []  # it is its operator's
    if isinstance(node.meta.get("val"), torch.Tensor):
        return [(0, node)]
    return [(user.args[1], user) for user in node.users if user.target is operator.getitem]  # type: ignore[misc]


def _leaves(result: object) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)  # type: ignore[call-overload]


def _in_float64(compute: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor] | None:
    """Returns what float64 gives; None where an operator cannot be computed in it (one that looks at bits)."""
    try:
        return compute()
    except (RuntimeError, TypeError, NotImplementedError):
        return None
