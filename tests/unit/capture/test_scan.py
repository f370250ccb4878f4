"""`tw.scan` against a Python loop, without processes."""

import gc

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import torchways as tw
from tests.local_session import LocalSession
from torchways.array import Array
from torchways.controller import scan
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction
from torchways.controller.scan import loop_in_python, run_scan
from torchways.errors import ShapeError, UserError


@pytest.fixture
def session():
    return LocalSession()


def run(session, body, init, xs=None, length=None, *, mesh=None, donate=False):
    return run_scan(body, init, xs, length, mesh or session.mesh(), donate, lambda: session)


def decay(carry, x):
    count, state, name = carry
    state = state * 0.5 + x["a"]
    return (count + 1, state, name), {"sum": state.sum() + x["b"], "state": state, "name": name}


def start():
    return torch.zeros((), dtype=torch.int64), torch.ones(2), "decay"


def test_a_loop_is_one_program_and_computes_what_python_does(session):
    xs = {"a": torch.arange(10.0).reshape(5, 2), "b": torch.arange(5.0)}
    mesh = session.mesh()
    final, ys = run(session, decay, start(), xs, mesh=mesh)
    expected, expected_ys = loop_in_python(decay, start(), xs, 5)
    assert session.num_runs == 1
    assert final[0].item() == 5
    assert final[1].tolist() == expected[1].tolist()
    assert final[2] == "decay"
    assert len(ys) == 5
    for y, other in zip(ys, expected_ys, strict=True):
        assert isinstance(y["state"], Array)
        assert (y["sum"].item(), y["state"].tolist(), y["name"]) == (
            other["sum"].item(),
            other["state"].tolist(),
            "decay",
        )
    # It goes on from its own carry; and xs may be on the slice.
    on_slice = ProgramFunction(lambda tensor: tensor * 1, mesh, lambda: session)
    again, _ = run(session, decay, final, {"a": on_slice(xs["a"]), "b": on_slice(xs["b"])}, mesh=mesh)
    assert again[1].tolist() == loop_in_python(decay, expected, xs, 5)[0][1].tolist()


def test_all_turns_call_one_function_and_all_lengths_share_a_trace(session):
    mesh = session.mesh()
    num_calls = 0

    def counted(carry, x):
        nonlocal num_calls
        num_calls += 1
        return add_one(carry, x)

    for length in (2, 6, 2):
        final, ys = run(session, counted, torch.zeros(3), length=length, mesh=mesh)
        assert final.tolist() == [float(length)] * 3
        assert ys == [None] * length
    assert num_calls == 1
    assert scan._loops[counted].num_traces == 2
    assert session.num_operators("add") == 2
    assert run(session, add_one, torch.zeros(3), length=0)[1] == []


def add_one(carry, x):
    return carry + 1, x


def test_the_carry_is_donated_from_turn_to_turn(session):
    mesh = session.mesh()
    first, _ = run(session, add_one, torch.zeros(3), length=3, mesh=mesh)
    kept, _ = run(session, add_one, first, length=3, mesh=mesh)
    assert first.tolist() == [3.0] * 3
    text = str(scan._loops[add_one])
    assert text.count("donate") == 2  # the first turn's carry is the user's
    given, _ = run(session, add_one, kept, length=3, mesh=mesh, donate=True)
    assert str(scan._loops[add_one]).count("donate") == 3
    assert given.tolist() == [9.0] * 3
    with pytest.raises(UserError, match="donated"):
        kept.tolist()
    with pytest.raises(UserError, match="in init twice"):
        run(session, add_one, (given, given), length=1, donate=True)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 2.0))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls.add_(1)
        return x * self.weight + self.calls


def test_what_the_body_writes_to_a_module_the_next_turn_sees(session):
    module = make_function(Counter(), session.mesh(), lambda: session)

    def body(carry, x):
        return module(carry), None

    for _ in range(2):
        final, _ = run(session, body, torch.ones(2), length=3)
    assert module.calls.item() == 6
    # 1 -> 2 + 4 -> 12 + 5 -> 34 + 6
    assert final.tolist() == [40.0, 40.0]


def test_the_carry_goes_from_slice_to_slice(session):
    stages = [make_function(lambda x: x * 2, session.mesh(), lambda: session) for _ in range(2)]

    def body(carry, x):
        middle = stages[0](carry) + x
        return stages[1](middle), middle

    final, ys = run_scan(body, torch.ones(4), torch.arange(3.0), None, None, False, lambda: session)
    expected, expected_ys = loop_in_python(
        lambda carry, x: ((carry * 2 + x) * 2, carry * 2 + x), torch.ones(4), torch.arange(3.0), 3
    )
    assert final.tolist() == expected.tolist()
    assert [y.tolist() for y in ys] == [y.tolist() for y in expected_ys]
    assert session.num_runs == 1


def test_inside_a_program_it_is_a_loop_of_the_trace(session):
    layer = make_function(nn.Linear(2, 2), session.mesh(), lambda: session)

    def step(x):
        final, ys = run_scan(
            lambda carry, x: (layer(carry) + x, carry.sum()), x, torch.ones(3, 2), None, None, False, lambda: session
        )
        final.sum().backward()
        return final, ys

    final, ys = ProgramFunction(step, None, lambda: session)(torch.ones(1, 2))
    state = layer.state_dict()
    x = torch.ones(1, 2)
    weight, bias = (value.requires_grad_() for value in state.values())
    for _ in range(3):
        x = nn.functional.linear(x, weight, bias) + 1
    torch.testing.assert_close(final.cpu(), x.detach())
    x.sum().backward()
    torch.testing.assert_close(layer.weight.grad.cpu(), weight.grad)
    assert len(ys) == 3


def noise(carry, x):
    return carry + 1, torch.rand(4)


def test_turns_draw_numbers_of_their_own_from_the_seed_of_the_run(session):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        _, ys = run(session, noise, torch.zeros(()), length=3)
        drawn.append([tuple(y.tolist()) for y in ys])
    assert drawn[0] == drawn[1]
    assert len({*drawn[0], *drawn[2]}) == 6


def grow(carry, x):
    return torch.cat([carry, carry]), None


def test_bodies_and_arguments_that_make_no_loop_are_refused(session):
    with pytest.raises(
        ShapeError, match=r"grow.*returns leaf 0 of the carry as float32\[4\], but it gets float32\[2\]"
    ):
        run(session, grow, torch.ones(2), length=2)
    with pytest.raises(ShapeError, match="carry of the structure"):
        run(session, lambda carry, x: ((carry,), None), torch.ones(2), length=2)
    with pytest.raises(ShapeError, match="changes leaf 1 of the carry, 0: only tensors can change"):
        run(session, lambda carry, x: ((carry[0], carry[1] + 1), None), (torch.ones(2), 0), length=2)
    with pytest.raises(UserError, match="must return the tuple"):
        run(session, lambda carry, x: carry, torch.ones(2), length=2)
    for xs, length in (
        (torch.ones(3), 4),
        ((torch.ones(3), torch.ones(2)), None),
        (None, None),
        (torch.ones(()), None),
    ):
        with pytest.raises(ShapeError, match="the number of turns"):
            run(session, add_one, torch.ones(2), xs, length)


def test_loops_go_with_their_bodies(session):
    gc.collect()  # loops of other tests
    before = len(scan._loops)

    def body(carry, x):
        return carry + 1, None

    run(session, body, torch.ones(2), length=2)
    assert len(scan._loops) == before + 1
    del body
    gc.collect()
    assert len(scan._loops) == before


def test_a_carry_comes_back_split_as_it_came(session):
    mesh = session.mesh(2, names=("tp",))
    on_slice = ProgramFunction(lambda tensor: tw.redistribute(tensor, mesh, [Shard(1)]), mesh, lambda: session)
    carry = on_slice(torch.zeros(3, 4))

    def body(carry, x):
        carry = carry.index_copy(0, torch.tensor([1]), x)
        return carry, carry.sum()

    for _ in range(2):
        carry, ys = run_scan(body, carry, torch.ones(2, 1, 4), None, mesh, False, lambda: session)
        assert carry._buffer.placements == ("S(1)",)
    assert carry.cpu().sum() == ys[-1].item() == 4  # the second row
