"""Recorded graphs have no side effects, and compute what writes through views compute in eager PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from torchways.capture.lowering.decompositions import decomposition_table
from torchways.capture.tracing.recorder import Recorder
from torchways.graphs import run_graph

VIEWS = {
    "select": lambda t: t.select(0, 1),
    "last": lambda t: t.select(-1, 0),
    "slice": lambda t: t[1:],
    "step": lambda t: t[..., ::2],
    "transpose": lambda t: t.transpose(0, -1),
    "flat": lambda t: t.reshape(-1),
    "split": lambda t: t.split(1, dim=0)[1],
    "unbind": lambda t: t.unbind(-1)[0],
    "unsqueeze": lambda t: t.unsqueeze(0),
    "diagonal": lambda t: t.diagonal(0, 0, -1) if t.dim() > 1 else t,
    "detach": lambda t: t.detach(),
    "squeeze in place": lambda t: t.unsqueeze(0).squeeze_(0),
}
WRITES = {
    "add": lambda t, number: t.add_(number),
    "mul": lambda t, number: t.mul_(torch.arange(t.shape[-1]) + number),
    "copy": lambda t, number: t.copy_(torch.full(t.shape[-1:], number, dtype=torch.int64)),
    "fill": lambda t, number: t.fill_(number),
    "zero": lambda t, number: t.zero_(),
    "put": lambda t, number: t.index_put_((torch.arange(2).flip(0),), torch.tensor(number)),
    "item": lambda t, number: t.__setitem__((slice(0, 1),), number),
    "out": lambda t, number: torch.mul(t.clone(), number, out=t),
    "list": lambda t, number: torch._foreach_add_([t, t.clone()], number),
    "clamp": lambda t, number: t.clamp_(max=number),
}


def play(x, actions):
    """Runs actions on views of a tensor, and returns what all of them are in the end."""
    x = x * 1
    tensors, seen = [x], []
    for kind, name, number, target in actions:
        tensor = tensors[target % len(tensors)]
        if kind == "view":
            if tensor.dim() and all(size > 1 for size in (tensor.shape[0], tensor.shape[-1])):
                tensors.append(VIEWS[name](tensor))
        elif kind == "read":
            seen.append(tensor.sum())
        elif tensor.dim() and tensor.shape[0] > 1 and not (name == "out" and not tensor.is_contiguous()):
            WRITES[name](tensor, number)
    return [*tensors, *seen]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("view"), st.sampled_from(sorted(VIEWS)), st.just(0.0), st.integers(0, 9)),
        st.tuples(
            st.just("write"), st.sampled_from(sorted(WRITES)), st.sampled_from([2.0, -1.0, 0.5]), st.integers(0, 9)
        ),
        st.tuples(st.just("read"), st.just(""), st.just(0.0), st.integers(0, 9)),
    ),
    max_size=12,
)


def check(actions):
    x = torch.arange(12.0).reshape(3, 2, 2)
    with torch.no_grad():
        expected = [value.clone() for value in play(x, actions)]
        recorder = Recorder(FakeTensorMode(), decomposition_table())
        with recorder.fake_mode, recorder:
            fakes = play(recorder.add_input("x", x.shape, x.dtype), actions)
        recorder.graph.output(tuple(recorder.node_of(fake) for fake in fakes))
        results = run_graph(recorder.graph, x.clone())
    for node in recorder.graph.nodes:
        assert (
            node.op != "call_function"
            or not getattr(node.target, "_schema", torch.ops.aten.add.Tensor._schema).is_mutable
        )
    for result, wanted, fake in zip(results, expected, fakes, strict=True):
        assert fake.shape == wanted.shape
        torch.testing.assert_close(result, wanted)


@settings(max_examples=60, deadline=None)
@given(ACTIONS)
def test_writes_are_seen_through_all_views(actions):
    check(actions)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(ACTIONS)
def test_writes_are_seen_through_all_views_in_many_sequences(actions):
    check(actions)


def test_lists_of_tensors_are_recorded_once_for_each_kind():
    recorder = Recorder(FakeTensorMode(), {})
    calls = []

    def call(args, kwargs):
        calls.append(args)
        with recorder:
            return torch.ops.aten._foreach_addcmul_.Scalar._op_dk(
                torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs
            )

    with recorder.fake_mode:
        shapes = [(2,), (3, 2), (2,), (2,), (3, 2)]
        first, second = ([recorder.add_input("x", shape, torch.float32) for shape in shapes] for _ in range(2))
        recorder.record_foreach(torch.ops.aten._foreach_addcmul_.Scalar, [first, second, second, 2.0], {}, call)
    assert len(calls) == 2
    recorder.graph.output(tuple(map(recorder.node_of, first)))
    inputs = [torch.randn(shape) for shape in shapes * 2]
    expected = [a + 2.0 * b * b for a, b in zip(inputs[:5], inputs[5:], strict=True)]
    torch.testing.assert_close(list(run_graph(recorder.graph, *inputs)), expected)
