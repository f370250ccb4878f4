"""TORCHWAYS_CHECK_TRACES=1: at each call, whether a new trace would be the one that the call goes on with.

Two traces of one function may name their values differently and read their inputs in another order. So each result is
compared by how it is computed: the operators from the inputs' places in Python's state to it.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
import torch.utils._pytree as pytree

from torchways.capture.python_state.host_numbers import HostNumbers
from torchways.capture.python_state.places import Call
from torchways.capture.python_state.tokens import TensorSource, is_plain, same_plain, short
from torchways.controller.bindings import Binding, CallTensor, ComputedNumber, Constant, CopyOf, Seed, StateTensor
from torchways.controller.variant import Captured, NumberResult, SourceResult, WrittenValue
from torchways.errors import InternalError
from torchways.graphs import deserialize_graph
from torchways.ir.program import Arg, Compute, Result, node_inputs, node_outputs

CHECK_VARIABLE = "TORCHWAYS_CHECK_TRACES"


def checks_traces() -> bool:
    """Whether the environment asks for every call to be traced again and compared."""
    return os.environ.get(CHECK_VARIABLE, "") not in ("", "0")


def check_trace(name: str, cached: Captured, new: Captured, call: Call) -> None:
    """Compares the trace that a call goes on with with a new one.

    Args:
        call: that call. Its trace may write what is there already, as a new one does not.

    Raises:
        InternalError: they differ; it names the first result or effect that does.
    """
    was, now = _described(cached, call), _described(new, call)
    for what in [*was, *(key for key in now if key not in was)]:
        if was.get(what) != now.get(what):
            raise InternalError(
                f"{CHECK_VARIABLE}: {name} goes on with a trace that is not what a new one would be: {what} is "
                f"{_text(now.get(what))}, was {_text(was.get(what))}"
            )


def _text(description: Any) -> str:
    return "missing" if description is None else str(description)


def _described(captured: Captured, call: Call) -> dict[str, str]:
    """Returns how each result and effect of a program comes about, by its name."""
    values = _values(captured)
    results = [values[index] for index in node_inputs(captured.program.nodes[-1])]
    found: dict[str, str] = {}
    for result, target in zip(results, captured.targets, strict=True):
        found[_name_of(target.target, captured)] = result
    for index, value in captured.constants.items():
        found[f"result leaf {index}"] = _constant(value, captured.numbers)
    for effect in captured.effects:
        is_one_value = effect.kind == "set" and len(effect.leaves) == 1 and is_plain(effect.leaves[0])
        if is_one_value and same_plain(effect.place.get(call), effect.leaves[0]):
            continue
        kinds = [_constant(leaf, captured.numbers) for leaf in effect.leaves]
        found[f"what it writes to {effect.place}"] = f"{effect.kind} {effect.spec} {kinds}"
    found["the structure of its result"] = str(captured.out_spec)
    return found


def _name_of(target: Any, captured: Captured) -> str:
    if isinstance(target, int):
        return f"result {target}"
    if isinstance(target, WrittenValue):
        return f"tensor {target.leaf} written to {captured.effects[target.effect].place}"
    return f"{target.name} ({id(target.tensor)})" if isinstance(target, TensorSource) else str(target)


def _constant(value: Any, numbers: HostNumbers) -> str:
    if isinstance(value, NumberResult):
        return _number(value.step, numbers)
    if isinstance(value, SourceResult):
        return f"tensor {id(value.source.tensor)}"
    return short(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__


def _number(index: int, numbers: HostNumbers) -> str:
    step = numbers.steps[index]
    if step.place is not None:
        return f"number at {step.place.key}"
    if step.function is None:
        return repr(step.constant)
    operands = ", ".join(_number(operand, numbers) for operand in step.operands)
    return f"{getattr(step.function, '__name__', step.function)}({operands})"


def _values(captured: Captured) -> dict[int, str]:
    """Returns how each value of a program is computed, as a hash."""
    program = captured.program
    graphs = [deserialize_graph(function.graph) for function in program.functions]
    values: dict[int, str] = {}
    for node in program.nodes:
        if isinstance(node, Arg):
            values[node.output] = _hash("input", _binding(captured.bindings[node.position], captured.numbers))
        elif isinstance(node, Compute):
            outputs = _outputs(graphs[node.function_index], [values[index] for index in node.inputs])
            values.update(zip(node.outputs, outputs, strict=True))
        elif not isinstance(node, Result):
            inputs = [values[index] for index in node_inputs(node)]
            for number, output in enumerate(node_outputs(node)):
                values[output] = _hash(type(node).__name__, number, *inputs)
    return values


def _binding(binding: Binding, numbers: HostNumbers) -> str:
    match binding:
        case StateTensor():
            return f"tensor {id(binding.source.tensor)}"
        case ComputedNumber():
            return f"{_number(binding.step, numbers)} as {binding.dtype}"
        case Constant():
            tensor = binding.tensor
            return _hash(tensor.dtype, tuple(tensor.shape), tensor.detach().cpu().contiguous().view(-1).tolist())
        case CopyOf():
            return f"copy of {_binding(binding.original, numbers)}"
        case CallTensor() | Seed():
            return str(binding)


def _outputs(graph: torch.fx.Graph, inputs: list[str]) -> list[str]:
    """Returns the hashes of a graph's outputs, given those of its placeholders."""
    remaining = iter(inputs)
    hashes: dict[torch.fx.Node, str] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            hashes[node] = next(remaining)
        elif node.op == "output":
            return [hashes[value] for value in node.args[0]]
        else:
            arguments = pytree.tree_leaves(torch.fx.node.map_arg((node.args, node.kwargs), hashes.__getitem__))
            hashes[node] = _hash(node.target, *arguments)
    return []


def _hash(*parts: Any) -> str:
    return hashlib.sha1("\x1f".join(map(str, parts)).encode()).hexdigest()
