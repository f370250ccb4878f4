"""Parity mode without processes: what it finds where a part of a program computes something else than PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.local_session import LocalSession
from torchways.capture.collectives import all_reduce
from torchways.controller.function import make_function
from torchways.controller.parity.comparison import Tolerance, compare, explained_by_rounding
from torchways.controller.parity.report import PARITY_VARIABLE, parity
from torchways.controller.program import ProgramFunction
from torchways.errors import ParityError


class WrongSession(LocalSession):
    """Adds `error` to what each operator of one name gives; with `only_fused`, not where a graph has many outputs."""

    def __init__(self, name, error, only_fused=False):
        super().__init__()
        self._name, self._error, self._only_fused = name, error, only_fused

    def register(self, name, parts, meshes, *seconds):
        program_id = super().register(name, parts, meshes, *seconds)
        for graph in [graph for graphs in self.registered[program_id][2] for graph in graphs]:
            if self._only_fused and len(graph.output_node().args[0]) > 1:
                continue
            for node in graph.nodes:
                if str(node.target).startswith(f"aten.{self._name}."):
                    with graph.inserting_after(node):
                        wrong = graph.call_function(torch.ops.aten.add.Tensor, (node, self._error))
                    node.replace_all_uses_with(wrong, lambda user, wrong=wrong: user is not wrong)
        return program_id


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.second(self.dropout(F.gelu(self.first(x))))


def make_step(model, optimizer):
    def step(x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def placed(session):
    torch.manual_seed(0)
    model = make_function(Net(), session.mesh(2), lambda: session)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, ProgramFunction(make_step(model, optimizer), None, lambda: session)


def trained(session, num_steps):
    model, step = placed(session)
    losses = [step(torch.ones(4, 6) * number) for number in range(num_steps)]
    return [loss.item() for loss in losses], model.state_dict(), step


def test_calls_give_and_change_what_they_do_without():
    with parity() as report:
        losses, state, step = trained(LocalSession(), 3)
    expected, expected_state, _ = trained(LocalSession(), 3)
    assert losses == expected
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)
    assert step.num_traces == 1
    assert report.num_calls == 3
    assert report.largest["float32"].max_abs_error == 0
    assert str(report).startswith("3 calls, ")


def test_a_variable_switches_it_on(monkeypatch, caplog):
    monkeypatch.setenv(PARITY_VARIABLE, "1")
    session = WrongSession("tanh", 1.0)
    function = make_function(torch.tanh, session.mesh(1), lambda: session)
    with pytest.raises(ParityError, match="tanh diverges from eager PyTorch at node 0 of 1"):
        function(torch.ones(2))
    monkeypatch.setenv(PARITY_VARIABLE, "0")
    assert function(torch.zeros(2)).cpu().tolist() == [1, 1]


def test_the_first_operator_that_diverges_is_named_with_its_line_and_error():
    session = WrongSession("tanh", 0.25)
    mesh = session.mesh(2)

    def double(x):
        return x * 2

    def squash(x):
        y = x + 1
        return y.tanh().exp()

    double, squash = (make_function(function, mesh, lambda: session) for function in (double, squash))
    step = ProgramFunction(lambda x: squash(double(x)), None, lambda: session)
    with parity(), pytest.raises(ParityError) as caught:
        step(torch.zeros(4, 3))
    error = caught.value
    text = str(error)
    assert "at node 1 of 2: <lambda>/1:squash on slice @0 ('dp'=2), at test_parity.py:" in text.replace(", '", ",'")
    assert "[4,3][S(0)]: 12 of 12 elements differ (rtol=1.3e-06, atol=1e-05); largest absolute error 0.608" in text
    assert "the first operator that diverges by itself is aten::tanh, at test_parity.py:" in text
    assert "largest absolute error 0.25, at [0, 0], where 1.01159418 stands for eager PyTorch's 0.761594176" in text
    assert (error.operator, error.num_different) == ("aten::tanh", 12)
    assert "in squash" in error.operator_source
    assert error.max_abs_error == pytest.approx(0.608, rel=1e-3)


def test_a_call_that_diverges_changes_nothing():
    session = WrongSession("gelu_backward", 0.5)
    model, step = placed(session)
    before = model.state_dict()
    for _ in range(2):  # the first call would make the optimizer's state
        with parity(), pytest.raises(ParityError, match="aten::gelu_backward"):
            step(torch.ones(4, 6))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with parity(rtol=10.0, atol=10.0):
        loss = step(torch.ones(4, 6))
    assert loss.item() > 0


def test_what_only_the_whole_computation_gets_wrong_is_said_to_be_so():
    session = WrongSession("tanh", 0.25, only_fused=True)
    function = make_function(lambda x: torch.tanh(x).exp(), session.mesh(1), lambda: session)
    with (
        parity(),
        pytest.raises(ParityError, match="it gives other values, and no operator diverges by itself") as caught,
    ):
        function(torch.zeros(3))
    assert caught.value.operator == ""


@pytest.mark.parametrize(
    ("broken", "message"), [("send", "what arrives is not what was sent"), ("sum", "it is not the sum of its inputs")]
)
def test_transfers_and_sums_are_nodes_too(monkeypatch, broken, message):
    session = LocalSession()
    a, b = session.mesh(1), session.mesh(1)
    on_a = make_function(lambda x: x + 1, a, lambda: session)
    on_b = make_function(lambda x: x * 2, b, lambda: session)

    def function(x):
        y = on_a(x)
        return all_reduce([y, on_b(y)])

    program = ProgramFunction(function, None, lambda: session)
    with parity() as report:
        assert [item.cpu().tolist() for item in program(torch.ones(2))] == [[6, 6], [6, 6]]
    assert report.num_nodes == 4  # two computations, a transfer, a sum
    run_part = session._run_part

    def wrong(part, graphs, slots, bindings, slice_id, wires, *others):
        for step in run_part(part, graphs, slots, bindings, slice_id, wires, *others):
            for key in wires:
                if isinstance(key, tuple) == (broken == "sum"):
                    wires[key] = wires[key] + 1
            yield step

    monkeypatch.setattr(session, "_run_part", wrong)
    with parity(), pytest.raises(ParityError, match=message):
        program(torch.ones(2))


def test_comparison_says_how_much_differs_and_where():
    expected = torch.tensor([[1.0, torch.nan, torch.inf], [0.0, -2.0, 4.0]])
    actual = torch.tensor([[1.0, torch.nan, torch.inf], [1e-6, -2.0, 5.0]])
    difference = compare(actual, expected, Tolerance())
    assert (difference.num_elements, difference.num_different) == (6, 1)
    assert difference.index == (1, 2)
    assert (difference.max_abs_error, difference.max_rel_error) == (1.0, 0.25)
    assert compare(actual, expected, Tolerance(atol=2.0)).num_different == 0
    assert compare(torch.tensor([1, 2]), torch.tensor([1, 3]), Tolerance(atol=2.0)).num_different == 1
    assert compare(torch.empty(0, 2), torch.empty(0, 2), Tolerance()).num_elements == 0
    assert compare(torch.tensor([torch.inf]), torch.tensor([1.0]), Tolerance()).num_different == 1


def test_rounding_explains_what_is_about_as_near_to_float64():
    reference = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    eager = torch.tensor([1.001, 2.0, 3.001])
    assert explained_by_rounding(torch.tensor([0.995, 2.0, 3.005]), eager, reference)
    assert not explained_by_rounding(torch.tensor([0.95, 2.0, 3.005]), eager, reference)
    assert not explained_by_rounding(torch.tensor([torch.nan, 2.0, 3.0]), eager, reference)
