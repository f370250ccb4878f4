"""Captured graphs as bytes: how a controller hands a compiled function to executors (graph.proto).

A graph here is flat and functional: placeholders are tensors, the output is a tuple of tensors. What is read back is
operators by name, of those that PyTorch knows and that only compute; nothing that arrives is evaluated or unpickled.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from google.protobuf.message import DecodeError

import torchways.operators  # noqa: F401  (graphs have its operators)
from torchways.errors import CaptureError, UserError
from torchways.graphs import graph_pb2 as pb

#: Key of `node.meta`: the user's line that a node comes from, "train.py:41 in train_step".
SOURCE_KEY = "tw_source"

_NAMESPACES = ("aten", "prims", "torchways")
_GETITEM = "getitem"
#: The only options of operators that are texts; a file's name is none of them.
_TEXTS = {"reduce", "rounding_mode", "approximate", "mode", "indexing", "placements", "side", "UPLO", "padding_mode"}
_DTYPES = {str(item).removeprefix("torch."): item for item in vars(torch).values() if isinstance(item, torch.dtype)}
_LAYOUTS = {str(item): item for item in (torch.strided,)}
_MEMORY_FORMATS = {
    str(item): item
    for item in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}


def serialize_graph(graph: torch.fx.Graph) -> bytes:
    """Returns a whole graph as bytes; see `serialize`."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    body = [node for node in graph.nodes if node.op == "call_function"]
    return serialize(inputs, body, list(graph.output_node().args[0]))  # type: ignore[arg-type]


def serialize(
    inputs: Sequence[torch.fx.Node], body: Sequence[torch.fx.Node], outputs: Sequence[torch.fx.Node]
) -> bytes:
    """Returns a part of a graph as bytes.

    Args:
        inputs: what it reads from outside.
        body: its operators, in an order in which they can run; each has a tensor, or a tuple of tensors, in
            ``meta["val"]``. Their ``meta["tw_source"]`` travels along.
        outputs: which of these it returns.

    Raises:
        CaptureError: an operator or an argument has no form in which it can be sent.
    """
    writer = _Writer()
    for node in inputs:
        writer.add_input(node)
    for node in body:
        writer.add(node)
    return writer.finish(outputs)


class _Writer:
    def __init__(self) -> None:
        self._graph = pb.Graph()
        self._computation = pb.Computation()
        self._number: dict[torch.fx.Node, int] = {}
        self._operators: dict[Any, int] = {}
        self._types: dict[tuple[Any, ...], int] = {}
        self._lines: dict[str, int] = {"": 0}

    def add_input(self, node: torch.fx.Node) -> None:
        message = self._new(node)
        message.types.append(self._type(node.meta["val"]))
        self._computation.num_inputs += 1

    def add(self, node: torch.fx.Node) -> None:
        message = self._new(node)
        found = self._operators.get(node.target)
        if found is None:
            found = self._operators[node.target] = len(self._operators)
            self._computation.operators.append(_name_of(node.target))
        message.operator = found
        for item in node.args:
            self._write(message.arguments.add(), item)
        for name, item in node.kwargs.items():
            message.names.append(name)
            self._write(message.arguments.add(), item)
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            message.returns_tuple = True
            message.types.extend(map(self._type, value))
        else:
            message.types.append(self._type(value))

    def finish(self, outputs: Sequence[torch.fx.Node]) -> bytes:
        self._computation.outputs.extend(self._number[node] for node in outputs)
        self._graph.computation = self._computation.SerializeToString(deterministic=True)
        self._graph.lines.extend(list(self._lines)[1:])
        return self._graph.SerializeToString(deterministic=True)

    def _new(self, node: torch.fx.Node) -> pb.Node:
        self._number[node] = len(self._number)
        line = node.meta.get(SOURCE_KEY, "")
        self._graph.line_of_node.append(self._lines.setdefault(line, len(self._lines)))
        return self._computation.nodes.add()

    def _type(self, value: Any) -> int:
        if not isinstance(value, torch.Tensor):
            return 0
        key = (value.dtype, *value.shape)
        found = self._types.get(key)
        if found is None:
            found = self._types[key] = len(self._types) + 1
            dtype = str(value.dtype).removeprefix("torch.")
            self._computation.types.append(pb.TensorType(dtype=dtype, shape=list(map(int, value.shape))))
        return found

    def _write(self, message: pb.Argument, value: Any) -> None:
        kind = type(value)
        if kind is torch.fx.Node:
            message.node = self._number[value]
        elif kind is bool:
            message.boolean = value
        elif kind is int:
            message.integer = value
        elif kind is float:
            message.number = value
        elif value is None:
            message.none = True
        elif isinstance(value, (list, tuple)):
            if all(type(item) is int for item in value):
                message.integers.items.extend(value)
                message.integers.SetInParent()
            else:
                for item in value:
                    self._write(message.list.items.add(), item)
        elif kind is torch.dtype:
            message.dtype = str(value).removeprefix("torch.")
        elif kind is torch.device:
            message.device = str(value)
        elif kind is torch.layout:
            message.layout = str(value)
        elif kind is torch.memory_format:
            message.memory_format = str(value)
        elif kind is str:
            message.text = value
        elif kind is complex:
            message.complex.real, message.complex.imag = value.real, value.imag
        elif isinstance(value, (int, float)):  # of a class of the user's
            self._write(message, int(value) if isinstance(value, int) else float(value))
        else:
            raise CaptureError(f"an operator's argument of type {kind.__name__} cannot be sent to executors")


def computation_of(data: bytes) -> bytes:
    """Returns what identifies a serialized graph, whatever lines its operators come from."""
    return _parsed(pb.Graph, data).computation


def deserialize_graph(data: bytes) -> torch.fx.Graph:
    """Returns the graph that `serialize_graph` wrote; nodes have ``meta["val"]``, on "meta", and ``meta["tw_source"]``.

    Raises:
        UserError: it is no such graph, or has an operator that graphs may not have.
    """
    message = _parsed(pb.Graph, data)
    computation = _parsed(pb.Computation, message.computation)
    try:
        return _read(message, computation)
    except (IndexError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"this is no graph: {type(error).__name__}: {error}") from error


def run_operator(target: Any, args: Any, kwargs: Any) -> Any:
    """Calls a graph's operator by plain PyTorch. Values of a graph have no strides, which `view` would ask for."""
    if target is torch.ops.aten.view.default:
        return args[0].reshape(args[1])
    return target(*args, **kwargs)


class _Run(torch.fx.Interpreter):
    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return run_operator(target, args, kwargs)


def run_graph(graph: torch.fx.Graph, *inputs: torch.Tensor) -> Any:
    """Runs a graph by plain PyTorch; returns the tuple of its outputs."""
    return _Run(torch.nn.Module(), graph=graph).run(*inputs, enable_io_processing=False)


def _parsed(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise UserError(f"this is no graph: {error}") from error


def _read(message: pb.Graph, computation: pb.Computation) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    operators = [_operator_of(name) for name in computation.operators]
    types = [None, *map(_tensor_of, computation.types)]
    lines = ["", *message.lines]
    nodes: list[torch.fx.Node] = []
    for number, item in enumerate(computation.nodes):
        if number < computation.num_inputs:
            node = graph.create_node("placeholder", f"arg_{number}", (), {})
        else:
            values = [_value_of(argument, nodes) for argument in item.arguments]
            first = len(values) - len(item.names)
            options = dict(zip(item.names, values[first:], strict=True))
            node = graph.create_node("call_function", operators[item.operator], tuple(values[:first]), options)
        found = [types[index] for index in item.types]
        node.meta["val"] = tuple(found) if item.returns_tuple else found[0]
        node.meta[SOURCE_KEY] = lines[message.line_of_node[number]]
        nodes.append(node)
    graph.output(tuple(nodes[index] for index in computation.outputs))
    return graph


def _value_of(message: pb.Argument, nodes: Sequence[torch.fx.Node]) -> Any:
    kind = message.WhichOneof("kind")
    match kind:
        case "node":
            return nodes[message.node]
        case "integer" | "number" | "boolean" | "text":
            return getattr(message, kind)
        case "none":
            return None
        case "integers":
            return list(message.integers.items)
        case "list":
            return [_value_of(item, nodes) for item in message.list.items]
        case "dtype":
            return _DTYPES[message.dtype]
        case "device":
            return torch.device(message.device)
        case "layout":
            return _LAYOUTS[message.layout]
        case "memory_format":
            return _MEMORY_FORMATS[message.memory_format]
        case "complex":
            return complex(message.complex.real, message.complex.imag)
    raise ValueError("an argument of no kind")


def _tensor_of(message: pb.TensorType) -> torch.Tensor:
    return torch.empty(tuple(message.shape), dtype=_DTYPES[message.dtype], device="meta")


def _name_of(target: Any) -> str:
    if target is operator.getitem:
        return _GETITEM
    name = str(target)
    if not isinstance(target, torch._ops.OpOverload) or _operator_of(name) is not target:
        raise CaptureError(f"{name} is no operator that executors know")
    return name


@cache
def _operator_of(name: str) -> Any:
    """Returns the operator of a name, if graphs may have it.

    Raises:
        UserError: there is none, it writes to memory or reads a file, or it is none of PyTorch's or ours.
    """
    if name == _GETITEM:
        return operator.getitem
    namespace, _, rest = name.partition(".")
    packet_name, _, overload = rest.rpartition(".")
    packet = getattr(getattr(torch.ops, namespace), packet_name, None) if namespace in _NAMESPACES else None
    if not isinstance(packet, torch._ops.OpOverloadPacket) or overload not in packet.overloads():
        raise UserError(f"a graph may not have the operator {name[:100]!r}")
    found = getattr(packet, overload)
    schema = found._schema
    texts = {item.name for item in schema.arguments if "str" in str(item.type)}
    if schema.is_mutable or not texts <= _TEXTS:
        raise UserError(f"a graph may not have the operator {name!r}: it does more than compute")
    return found
