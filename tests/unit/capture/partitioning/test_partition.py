"""Where operators run, how they are cut into computations, and how values are split; no processes."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.local_session import LocalSession
from tests.unit.capture.models import Model, make_step, pipelined
from torchways.controller.function import make_function, make_parallel
from torchways.controller.program import ProgramFunction
from torchways.errors import PlacementError
from torchways.ir.program import Compute, Transfer
from torchways.parallel.pipeline import SplitPoint


def test_new_state_stays_on_its_slice_wherever_it_is_computed():
    session = LocalSession()
    home, other = session.mesh(), session.mesh()
    norm = make_function(nn.BatchNorm1d(3), home, lambda: session)

    def step(x):
        with torch.no_grad():
            norm.running_mean.copy_(double(norm.running_mean + x))
        return norm.running_mean + 0

    double = make_function(lambda value: value * 2, other, lambda: session)
    step = ProgramFunction(step, home, lambda: session)
    results = [step(torch.ones(3)).cpu() for _ in range(3)]
    assert [result[0].item() for result in results] == [2.0, 6.0, 14.0]
    assert norm.running_mean.mesh is home
    assert step.num_traces == 1


def test_adam_state_lives_where_its_parameter_does():
    session = LocalSession()
    meshes = [session.mesh(), session.mesh()]
    model = pipelined(session, Model(), {"layers.1": SplitPoint.BEGINNING}, meshes)
    opt = torch.optim.AdamW(model.parameters())
    step = ProgramFunction(make_step(model, opt, clip=False), None, lambda: session)
    x = torch.randint(0, 17, (4, 5))
    step(x, x)
    for parameter, state in opt.state.items():
        assert {array.mesh for array in state.values()} == {parameter.mesh}
    # forward, forward + backward, backward, gradients that no stage waits for, and an update of each stage.
    assert str(step).count(" compute ") <= 6
    assert str(step).count(" transfer ") == 2


def test_backward_runs_where_its_forward_ran():
    session = LocalSession()
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 10))
    model = pipelined(session, model, {"2": SplitPoint.BEGINNING}, [session.mesh(), session.mesh()])
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step(x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    step = ProgramFunction(train_step, None, lambda: session)
    step(torch.randn(64, 32), torch.randint(0, 10, (64,)))
    assert str(step).count(" transfer ") == 2  # the activation there, its gradient back


def test_functions_are_nodes_of_their_own_and_nest():
    session = LocalSession()
    a, b = session.mesh(), session.mesh()
    double = make_function(lambda x: x * 2, a, lambda: session)
    add_one = make_function(lambda x: x + 1, b, lambda: session)

    def chain(x):
        for _ in range(4):
            x = double(x)
        return {"sum": add_one(x), "label": "four doublings"}

    program = ProgramFunction(chain, None, lambda: session)
    result = program(torch.tensor([1.0, 2.0]))
    assert result["sum"].tolist() == [17, 33]
    assert result["label"] == "four doublings"
    text = str(program)
    assert text.count(" compute @0") == 4
    assert text.count(" compute @1") == 1
    assert text.count(" transfer ") == 1
    assert len(program._last.captured.program.functions) == 2  # four calls share one compiled function


def test_a_training_step_on_one_slice_is_one_computation_and_an_update_of_all_state_in_place():
    session = LocalSession()
    model = make_parallel(Model(tied=True), session.mesh(2), {}, lambda: session)
    optimizer = torch.optim.AdamW(model.parameters())
    program = ProgramFunction(make_step(model, optimizer, clip=True), None, lambda: session)
    tokens = torch.randint(0, 17, (4, 6))
    for _ in range(2):
        program(tokens, tokens)
        gradients, update = (node for node in program.lower().program.nodes if isinstance(node, Compute))
        assert not gradients.donated  # to write where it reads again and again, it would have to copy that first
        state = [array for slots in optimizer.state.values() for array in slots.values()]
        assert len(update.donated) == len([*model.parameters(), *state])


@pytest.mark.parametrize("inner_first", [False, True])
def test_a_module_within_a_module_on_another_slice_keeps_its_state_there(inner_first):
    session = LocalSession()
    outer, inner = session.mesh(), session.mesh()
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 1))
    expected = copy.deepcopy(model)
    for module, mesh in [(model[1], inner), (model, outer)][:: 1 if inner_first else -1]:
        make_parallel(module, mesh, {}, lambda: session)
    x = torch.randn(3, 4)
    steps = [make_step_of_squares(module) for module in (expected, model)]
    program = ProgramFunction(steps[1], None, lambda: session)
    for _ in range(2):
        torch.testing.assert_close(program(x).cpu(), steps[0](x))
    assert all(parameter.mesh is inner for parameter in model[1].parameters())
    assert all(parameter.mesh is outer for number in (0, 2) for parameter in model[number].parameters())
    moved = [node for node in program.lower().program.nodes if isinstance(node, Transfer)]
    assert len(moved) == 4  # activations and their gradients, there and back


def make_step_of_squares(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


@pytest.mark.parametrize("clip", [False, True])
def test_a_gradient_is_split_as_its_parameter_is_among_others_of_its_shape(clip):
    session = LocalSession()
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.GELU(), nn.Linear(8, 8, bias=False))
    plan = {"0.weight": ("tp", "dp"), "2.weight": ("dp", "tp")}
    model = make_parallel(model, session.mesh(2, 2, names=("dp", "tp")), plan, lambda: session)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(x):
        model(x).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    program = ProgramFunction(step, None, lambda: session)
    program(torch.randn(4, 8))
    lowered = program.lower().program
    _, update = (node for node in lowered.nodes if isinstance(node, Compute))
    values = [lowered.values[index] for index in update.inputs]
    splits = Counter(value.placements for value in values if value.shape == (8, 8))
    assert splits == {("S(1)", "S(0)"): 4, ("S(0)", "S(1)"): 4}  # parameter, gradient and two moments


def test_an_activation_with_a_parameters_shape_is_split_as_data_is():
    session = LocalSession()
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pipelined(session, model, {"1": SplitPoint.BEGINNING}, [session.mesh(2), session.mesh(2)])
    program = ProgramFunction(model, None, lambda: session)
    program(torch.randn(8, 8))
    lowered = program.lower().program
    (moved,) = (node for node in lowered.nodes if isinstance(node, Transfer))
    assert lowered.values[moved.output].placements == ("S(0)",)


def test_an_array_of_another_slice_is_transferred():
    session = LocalSession()
    a, b = session.mesh(), session.mesh()
    first = make_function(lambda x: x + 1, a, lambda: session)
    second = make_function(lambda x: x * 3, b, lambda: session)
    y = second(first(torch.ones(2)))
    assert y.tolist() == [6, 6]
    assert y.mesh is b
    assert session.num_transfers == 1


def test_text_grows_with_nodes_only_not_with_devices():
    texts = []
    session = LocalSession()
    for devices in (2, 8):
        model = make_function(nn.Linear(16, 16), session.mesh(devices), lambda: session)
        model(torch.ones(8, 16))
        texts.append(str(model._torchways_entry))
    assert texts[0] != texts[1]
    assert texts[0].replace("'dp'=2", "'dp'=8") == texts[1]


def test_what_is_computed_of_a_view_of_an_array_has_a_slice():
    """Nothing is looked at again for each way that leads to it, of which there are 2^60 here."""
    session = LocalSession()
    array = make_function(torch.clone, session.mesh(), lambda: session)(torch.tensor([[1.0, -2.0, 3.0]]))

    def program(x):
        x = x.mT
        for _ in range(60):
            x = torch.where(x > 0, -x, x)
        return x.sort(dim=0)

    values, positions = ProgramFunction(program, session.mesh(), lambda: session)(array)
    assert values.cpu().tolist() == [[-3.0], [-2.0], [-1.0]]
    assert positions.cpu().tolist() == [[2], [1], [0]]


def test_batch_that_does_not_divide_is_refused():
    session = LocalSession()
    double = make_function(lambda x: x * 2, session.mesh(2), lambda: session)
    with pytest.raises(PlacementError, match=r"axis 'dp' has size 2 but dimension 0 has 3[\s\S]*replicate"):
        double(torch.ones(3))


def test_nothing_says_where():
    session = LocalSession()
    with pytest.raises(PlacementError, match=r"tw\.program\(mesh="):
        ProgramFunction(lambda x: x * 2, None, lambda: session)(torch.ones(3))


def test_a_function_that_computes_gradients_itself_and_goes_on_with_them_is_one_node():
    session = LocalSession()

    def penalty(x):
        x = x.detach().requires_grad_()
        [gradient] = torch.autograd.grad(x.tanh().sum(), x)
        return (gradient.norm() - 1).square() + x.sum()

    step = ProgramFunction(make_function(penalty, session.mesh(), lambda: session), None, lambda: session)
    x = torch.randn(3, 4)
    torch.testing.assert_close(step(x).cpu(), penalty(x).detach())
    assert len(step._last.captured.program.functions) == 1
