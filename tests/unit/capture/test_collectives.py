"""`tw.all_reduce`: what it computes, where its results are, and what it refuses."""

import pytest
import torch

import torchways as tw
from tests.local_session import LocalSession
from torchways.controller.program import ProgramFunction
from torchways.errors import PlacementError, ShapeError, UserError
from torchways.ir.program import AllReduce


@pytest.fixture
def session():
    return LocalSession()


def program(function, session, mesh=None):
    return ProgramFunction(function, mesh, lambda: session)


def placed(function, mesh, session):
    from torchways.controller.function import make_function

    return make_function(function, mesh, lambda: session)


def test_every_slice_gets_the_sum(session):
    meshes = [session.mesh(1), session.mesh(1), session.mesh(1)]
    doubles = [placed(lambda x: x * 2, mesh, session) for mesh in meshes]

    def step(x):
        sums = tw.all_reduce([double(x + number) for number, double in enumerate(doubles)])
        return [double(total) for double, total in zip(doubles, sums, strict=True)]

    step = program(step, session)
    results = step(torch.ones(4))
    for mesh, result in zip(meshes, results, strict=True):
        assert result.mesh is mesh
        torch.testing.assert_close(result.cpu(), torch.full((4,), 2 * (2 + 4 + 6.0)))
    assert session.num_transfers == 0  # each slice has the argument, and nothing is gathered anywhere
    [node] = [node for node in step.lower().program.nodes if isinstance(node, AllReduce)]
    assert len(node.inputs) == len(node.outputs) == 3
    assert "all_reduce(" in str(step)


def test_arguments_are_summed_where_they_are(session):
    meshes = [session.mesh(1), session.mesh(1)]
    doubles = [placed(lambda x: x * 2, mesh, session) for mesh in meshes]
    step = program(lambda xs: tw.all_reduce(tw.all_reduce(xs)), session)
    results = step([double(torch.ones(2)) for double in doubles])
    for mesh, result in zip(meshes, results, strict=True):
        assert result.mesh is mesh
        assert result.tolist() == [8, 8]
    assert session.num_transfers == 0


def test_gradients_flow_through_it(session):
    meshes = [session.mesh(1), session.mesh(1)]
    weights = [torch.nn.Linear(3, 3) for _ in meshes]
    reference = [[p.detach().clone() for p in layer.parameters()] for layer in weights]
    from torchways.controller.function import make_function

    layers = [make_function(layer, mesh, lambda: session) for layer, mesh in zip(weights, meshes, strict=True)]

    def step(x):
        first, second = tw.all_reduce([layer(x) for layer in layers])
        (first.square().sum() + 3 * second.sum()).backward()
        return [layer.weight.grad for layer in layers]

    x = torch.randn(5, 3)
    grads = program(step, session)(x)
    plain = [[p.clone().requires_grad_() for p in layer] for layer in reference]
    total = sum(x @ weight.T + bias for weight, bias in plain)
    (total.square().sum() + 3 * total.sum()).backward()
    for grad, (weight, _) in zip(grads, plain, strict=True):
        torch.testing.assert_close(grad.cpu(), weight.grad)


def test_eager_mode_sums():
    first, second = tw.all_reduce([torch.ones(2), torch.full((2,), 2.0)])
    assert first.tolist() == second.tolist() == [3.0, 3.0]
    assert first is not second


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ([], UserError, "at least one tensor"),
        ([torch.ones(2), torch.ones(3)], ShapeError, r"float32\[2\], float32\[3\]"),
        ([torch.ones(2), torch.ones(2, dtype=torch.int32)], ShapeError, "int32"),
    ],
)
def test_bad_input(values, error, match):
    with pytest.raises(error, match=match):
        tw.all_reduce(values)


def test_two_of_one_slice_are_refused(session):
    mesh = session.mesh(1)
    double = placed(lambda x: x * 2, mesh, session)

    def step(x):
        return tw.all_reduce([double(x), double(x)])

    with pytest.raises(PlacementError, match=r"all_reduce.*one slice"):
        program(step, session)(torch.ones(2))
