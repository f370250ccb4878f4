"""Graphs as bytes: what is written is read back, and nothing else is."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from torchways.errors import CaptureError, UserError
from torchways.graphs import SOURCE_KEY, computation_of, deserialize_graph, graph_pb2, run_graph, serialize_graph

aten = torch.ops.aten


def traced(function, *arguments):
    return make_fx(function, tracing_mode="fake")(*arguments).graph


def everything(x, index):
    """Arguments of all kinds: numbers, lists, dtypes, a device, None, texts, and several results."""
    first, second = x.split([2, 4], dim=0)
    normed, *_ = aten.native_layer_norm.default(x, [3], None, None, 1e-5)
    placed = aten.index_put.default(torch.zeros_like(x), [None, index], x[:, :2])
    rounded = torch.div(x, 0.3, rounding_mode="floor")
    made = torch.full((2,), float("inf"), dtype=torch.float64)
    return first.sum(), second.to(torch.bfloat16), normed, placed, rounded, made, F.gelu(x, approximate="tanh"), x > 0


def test_a_graph_computes_the_same_when_it_is_read_back():
    x, index = torch.randn(6, 3), torch.tensor([0, 2])
    graph = traced(everything, x, index)
    for node in graph.nodes:
        node.meta[SOURCE_KEY] = f"train.py:{len(node.name)} in step"
    read = deserialize_graph(serialize_graph(graph))
    for result, expected in zip(run_graph(read, x, index), everything(x, index), strict=True):
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected)
    operators = [(node.target, node.meta[SOURCE_KEY]) for node in graph.nodes if node.op == "call_function"]
    assert operators == [(node.target, node.meta[SOURCE_KEY]) for node in read.nodes if node.op == "call_function"]
    [size] = {tuple(node.meta["val"].shape) for node in read.nodes if node.target is aten.gelu.default}
    assert size == (6, 3)
    assert serialize_graph(read) == serialize_graph(graph)


def test_equal_computations_have_equal_bytes_whatever_their_lines():
    graphs = [traced(lambda x: (x * 2,), torch.randn(3)) for _ in range(2)]
    for number, graph in enumerate(graphs):
        for node in graph.nodes:
            node.meta[SOURCE_KEY] = f"train.py:{number} in step"
    first, second = map(serialize_graph, graphs)
    assert first != second
    assert computation_of(first) == computation_of(second)


def crafted(operator, *arguments):
    computation = graph_pb2.Computation(operators=[operator], outputs=[0])
    computation.nodes.add(arguments=arguments, types=[0])
    return graph_pb2.Graph(computation=computation.SerializeToString(), line_of_node=[0]).SerializeToString()


@pytest.mark.parametrize(
    "operator",
    [
        "aten.from_file.default",  # reads a file
        "aten.add_.Tensor",  # writes
        "aten.normal.out",
        "os.system.default",
        "profiler._record_function_enter.default",
        "aten.nothing.default",
        "aten.add.__class__",
        "aten.__class__.mro",
        "aten",
        "",
        "..",
    ],
)
def test_operators_that_do_more_than_compute_are_refused(operator):
    with pytest.raises(UserError, match="a graph may not have the operator"):
        deserialize_graph(crafted(operator, graph_pb2.Argument(text="/etc/passwd")))


def test_an_operator_of_the_users_is_no_operator_of_executors():
    graph = torch.fx.Graph()
    graph.output((graph.call_function(print, ()),))
    with pytest.raises(CaptureError, match="is no operator that executors know"):
        serialize_graph(graph)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_graph_or_refused(data):
    for message in (data, graph_pb2.Graph(computation=data).SerializeToString()):
        try:
            deserialize_graph(message)
        except UserError:
            pass


@given(st.data())
def test_a_damaged_graph_is_refused_or_still_one(data):
    whole = bytearray(serialize_graph(traced(lambda x: (x.sum(0) * 2, x.relu()), torch.randn(3, 2))))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        deserialize_graph(bytes(whole))
    except UserError:
        pass
