"""`tw.cond`, `tw.while_loop` and sequential dispatch, without processes."""

import gc

import pytest
import torch
from torch import nn

from tests.local_session import LocalSession
from torchways.controller import control_flow
from torchways.controller.control_flow import run_cond, run_while_loop
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction
from torchways.errors import ConfigError, ShapeError


@pytest.fixture
def session():
    return LocalSession()


def double(x):
    return x * 2


def negate(x):
    return -x


def test_cond_dispatches_the_branch_that_the_value_chooses(session):
    mesh = session.mesh()
    is_large = ProgramFunction(lambda x: x.sum() > 3, mesh, lambda: session)
    results = []
    for x in (torch.ones(2), torch.full((2,), 5.0), torch.ones(2)):
        results.append(run_cond(is_large(x), double, negate, (x,), mesh, lambda: session).tolist())
    assert results == [[-1.0, -1.0], [10.0, 10.0], [-1.0, -1.0]]
    assert control_flow._programs[negate].num_traces == 1
    assert run_cond(True, double, negate, (torch.ones(1),), mesh, lambda: session).tolist() == [2.0]
    with pytest.raises(ShapeError, match=r"one element, not shape \(2,\)"):
        run_cond(torch.ones(2), double, negate, (x,), mesh, lambda: session)


def test_a_program_that_uses_cond_runs_node_by_node(session, caplog):
    mesh = session.mesh()
    total = make_function(lambda x: x.sum(), mesh, lambda: session)

    def step(x):
        return run_cond(total(x) > 3, double, negate, (x,), mesh, lambda: session)

    step = ProgramFunction(step, mesh, lambda: session)
    assert step(torch.ones(2)).tolist() == [-1.0, -1.0]
    assert step(torch.full((2,), 2.0)).tolist() == [4.0, 4.0]
    assert "tw.cond decides by the value of an array at test_control_flow.py" in caplog.text


def test_while_loop_runs_until_its_condition_is_false(session):
    mesh = session.mesh()

    def halve(count, x):
        return count + 1, x / 2

    def is_large(count, x):
        return x.max() > 1

    count, x = run_while_loop(is_large, halve, (0 * torch.ones(()), torch.tensor([9.0, 3.0])), mesh, lambda: session)
    assert (count.item(), x.tolist()) == (4.0, [9 / 16, 3 / 16])
    assert x.mesh is mesh
    assert session.num_runs == 5 + 4


def grow(x):
    return torch.cat([x, x])


def test_a_body_that_changes_shapes_is_refused(session):
    with pytest.raises(ShapeError, match=r"grow.*operand 0 as float32\[4\], but it gets float32\[2\]"):
        run_while_loop(lambda x: x.sum() > 0, grow, (torch.ones(2),), session.mesh(), lambda: session)
    with pytest.raises(ShapeError, match="must return 2 operands"):
        run_while_loop(lambda x, y: x.sum() > 0, lambda x, y: x, (torch.ones(2), 1), session.mesh(), lambda: session)


def test_programs_of_branches_go_with_them(session):
    before = len(control_flow._programs)

    def branch(x):
        return x + 1

    run_cond(True, branch, branch, (torch.ones(1),), session.mesh(), lambda: session)
    assert len(control_flow._programs) == before + 1
    del branch
    gc.collect()
    assert len(control_flow._programs) == before


def train(session, dispatch):
    torch.manual_seed(0)
    meshes = [session.mesh(), session.mesh()]
    stages = [make_function(nn.Linear(4, 4), mesh, lambda: session) for mesh in meshes]
    optimizer = torch.optim.AdamW([p for stage in stages for p in stage.parameters()], lr=0.1)

    def step(x):
        loss = stages[1](torch.tanh(stages[0](x))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss, x

    step = ProgramFunction(step, None, lambda: session, dispatch)
    losses = [step(torch.full((2, 4), 0.5))[0].item() for _ in range(4)]
    return losses, [value for stage in stages for value in stage.state_dict().values()]


def test_sequential_dispatch_computes_the_same(session):
    parallel = train(session, "parallel")
    num_parallel = session.num_runs
    sequential = train(session, "sequential")
    assert parallel[0] == sequential[0]
    for one, other in zip(parallel[1], sequential[1], strict=True):
        torch.testing.assert_close(one, other)
    # Forward, backward and update of two stages are dispatched one by one.
    assert session.num_runs - num_parallel > 4 * num_parallel
    with pytest.raises(ConfigError, match="dispatched 'parallel' or 'sequential'"):
        ProgramFunction(double, None, lambda: session, "fast")
