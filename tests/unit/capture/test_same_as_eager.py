"""Programs give what the same Python gives in eager PyTorch, whatever the user does between calls.

A small model with a training step, and an eager twin: the same actions are done to both, in random order, and after
each call everything is compared. No processes: tests/local_session.py runs the programs.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from torch import nn
from torch.nn.utils import parametrizations, prune

from tests.local_session import LocalSession
from torchways.array import Array
from torchways.controller.function import make_parallel
from torchways.controller.program import ProgramFunction


class Net(nn.Module):
    """Layers of several kinds, and state of its own that it reads and writes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.0)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh())
        self.head = nn.Linear(8, 4)
        self.register_buffer("offset", torch.zeros(4))
        self.register_buffer("mean", torch.zeros(()))
        self.scale = 1.0
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.drop(self.act(self.norm(self.first(x))))
        x = x + self.inner(x)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        self.last = x.detach().sum()
        return self.head(x) * self.scale + self.offset


class Side:
    """A model, its optimizer, and two programs: ours or eager's."""

    def __init__(self, model, wrap):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, weight_decay=0.1)
        self.config = SimpleNamespace(weight=1.0, zero_first=False, fail=False, skip=False)
        self.losses = []
        self.hooks = []
        self.saved = None
        shift = torch.zeros(())
        self.shift = shift
        model, optimizer, config, losses = self.model, self.optimizer, self.config, self.losses

        def step(x, y, options):
            if config.zero_first:
                optimizer.zero_grad()
            if config.fail:
                raise KeyError("not this time")
            loss = F.cross_entropy(model(x) + shift, y) * config.weight * options.factor
            loss.backward()
            if not config.skip:
                optimizer.step()
            if not config.zero_first and not config.skip:
                optimizer.zero_grad()
            losses.append(loss.detach())
            return loss

        def forward(x, power):
            with torch.no_grad():
                return model(x).abs() ** power

        self.step, self.forward = wrap(step), wrap(forward)

    def take_parameters(self):
        """Gives the optimizer's first group the model's parameters as they are now."""
        first, *others = self.optimizer.param_groups
        elsewhere = {parameter for group in others for parameter in group["params"]}
        first["params"] = [parameter for parameter in self.model.parameters() if parameter not in elsewhere]
        for parameter in set(self.optimizer.state) - {*first["params"], *elsewhere}:
            del self.optimizer.state[parameter]

    def gradients(self):
        return {name: parameter.grad for name, parameter in self.model.named_parameters()}

    def moments(self):
        state = self.optimizer.state
        return [
            {key: value for key, value in state[parameter].items() if key != "step"}
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter in state
        ]


def host(tree):
    return torch.utils._pytree.tree_map(lambda v: v.detach().cpu().clone() if isinstance(v, torch.Tensor) else v, tree)


def assert_same(ours, eager, what):
    assert (ours is None) == (eager is None), f"{what}: {ours} {eager}"
    if isinstance(eager, torch.Tensor):
        torch.testing.assert_close(
            ours.detach().cpu(), eager.detach(), rtol=2e-4, atol=2e-4, msg=lambda m: f"{what}: {m}"
        )
    elif isinstance(eager, (list, tuple)):
        assert len(ours) == len(eager), f"{what}: {len(ours)} items, not {len(eager)}"
        for number, pair in enumerate(zip(ours, eager, strict=True)):
            assert_same(*pair, f"{what}[{number}]")
    elif isinstance(eager, dict):
        assert ours.keys() == eager.keys(), what
        for key in eager:
            assert_same(ours[key], eager[key], f"{what}.{key}")
    elif eager is not None:
        assert ours == eager, f"{what}: {ours}, not {eager}"


class SameAsEager(RuleBasedStateMachine):
    """Does the same to both sides, and compares them after each call."""

    @initialize()
    def start(self):
        torch.manual_seed(0)
        model = Net()
        session = LocalSession()
        mesh = session.mesh()
        self.eager = Side(copy.deepcopy(model), lambda function: function)
        placed = make_parallel(model, mesh, None, lambda: session)
        self.ours = Side(placed, lambda function: ProgramFunction(function, mesh, lambda: session))
        self.generator = torch.Generator().manual_seed(1)
        self.sides = (self.ours, self.eager)

    def batch(self, size):
        return torch.randn(size, 6, generator=self.generator), torch.randint(0, 4, (size,), generator=self.generator)

    def compare(self):
        ours, eager = self.sides
        assert_same(host(ours.model.state_dict()), host(eager.model.state_dict()), "state")
        assert_same(ours.gradients(), eager.gradients(), "gradients")
        assert_same(ours.moments(), eager.moments(), "optimizer")
        assert_same(ours.losses, eager.losses, "losses")
        assert (ours.model.calls, ours.model.training) == (eager.model.calls, eager.model.training)
        if hasattr(eager.model, "last"):
            assert_same(ours.model.last, eager.model.last, "last")
        stale = [name for name, value in vars(ours.model).items() if type(value).__name__ == "FakeTensor"]
        assert not stale

    @rule(size=st.sampled_from([4, 4, 4, 6]), factor=st.sampled_from([1.0, 1.0, 0.5]))
    def train(self, size, factor):
        x, y = self.batch(size)
        results = [side.step(x, y, SimpleNamespace(factor=factor)) for side in self.sides]
        assert_same(*results, "loss")
        self.compare()

    @rule(power=st.sampled_from([1.0, 2.0, 3.0]))
    def infer(self, power):
        x, _ = self.batch(4)
        assert_same(*[side.forward(x, power) for side in self.sides], "output")
        self.compare()

    @rule()
    def raise_in_the_middle(self):
        x, y = self.batch(4)
        for side in self.sides:
            side.config.fail, first = True, side.config.zero_first
            side.config.zero_first = False
            with pytest.raises(KeyError, match="not this time"):
                side.step(x, y, SimpleNamespace(factor=1.0))
            side.config.fail, side.config.zero_first = False, first
        self.compare()

    @rule(name=st.sampled_from(["first", "inner", "head", "norm"]), flag=st.booleans())
    def freeze(self, name, flag):
        for side in self.sides:
            getattr(side.model, name).requires_grad_(flag)

    @rule(mode=st.booleans())
    def train_or_eval(self, mode):
        for side in self.sides:
            side.model.train(mode)

    @rule(factor=st.sampled_from([2.0, 0.5]))
    def add_hook(self, factor):
        for side in self.sides:
            side.hooks.append(side.model.inner.register_forward_hook(lambda module, args, output: output * factor))

    @precondition(lambda self: self.eager.hooks)
    @rule()
    def remove_hook(self):
        for side in self.sides:
            side.hooks.pop().remove()

    @rule(cls=st.sampled_from([nn.ReLU, nn.Sigmoid, nn.Identity]))
    def replace_activation(self, cls):
        for side in self.sides:
            side.model.act = cls()

    @rule()
    def replace_layer(self):
        layer = nn.Linear(8, 8)
        for side in self.sides:
            side.model.inner[0] = copy.deepcopy(layer)
            side.take_parameters()

    @rule(p=st.sampled_from([0.0, 1.0]), momentum=st.sampled_from([0.1, 0.3]), scale=st.sampled_from([1.0, 1.5, 2.0]))
    def change_numbers(self, p, momentum, scale):
        for side in self.sides:
            side.model.drop.p, side.model.norm.momentum, side.model.scale = p, momentum, scale

    @rule(lr=st.sampled_from([0.01, 0.02]), beta=st.sampled_from([0.9, 0.8]), decay=st.sampled_from([0.0, 0.1, 0.2]))
    def change_hyperparameters(self, lr, beta, decay):
        for side in self.sides:
            for group in side.optimizer.param_groups:
                group["lr"], group["betas"], group["weight_decay"] = lr, (beta, 0.999), decay

    @precondition(lambda self: len(self.eager.optimizer.param_groups) == 1)
    @rule()
    def add_param_group(self):
        for side in self.sides:
            side.model.offset_scale = nn.Parameter(torch.ones(4))
            side.optimizer.add_param_group({"params": [side.model.offset_scale], "lr": 0.05})

    @rule()
    def save(self):
        for side in self.sides:
            side.saved = host(side.model.state_dict()), copy.deepcopy(host(side.optimizer.state_dict()))

    @precondition(lambda self: self.eager.saved is not None)
    @rule(model=st.booleans(), optimizer=st.booleans())
    def load(self, model, optimizer):
        for side in self.sides:
            saved_model, saved_optimizer = copy.deepcopy(side.saved)
            if model:
                side.model.load_state_dict(saved_model, strict=False)
            groups = [len(group["params"]) for group in side.optimizer.param_groups]
            if optimizer and groups == [len(group["params"]) for group in saved_optimizer["param_groups"]]:
                side.optimizer.load_state_dict(saved_optimizer)

    @rule(value=st.sampled_from([0.0, 0.5]))
    def replace_buffer(self, value):
        for side in self.sides:
            side.model.offset = torch.full((4,), value)

    @rule(value=st.sampled_from([0.0, 0.25]))
    def change_closure(self, value):
        for side in self.sides:
            side.shift.fill_(value)

    @rule(weight=st.sampled_from([1.0, 2.0, 3.0]), zero_first=st.booleans(), skip=st.booleans())
    def change_config(self, weight, zero_first, skip):
        for side in self.sides:
            side.config.weight, side.config.zero_first, side.config.skip = weight, zero_first, skip

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        for side in self.sides:
            side.optimizer.zero_grad(set_to_none=set_to_none)

    @rule(value=st.sampled_from([0.1, -0.1]))
    def write_outside(self, value):
        with torch.no_grad():
            for side in self.sides:
                side.model.head.bias[0] = value
                side.model.head.weight.mul_(0.9)

    @rule()
    def autocast(self):
        x, _ = self.batch(4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, eager = [side.forward(x, 1.0) for side in self.sides]
        assert ours.dtype == eager.dtype
        torch.testing.assert_close(ours.cpu(), eager, rtol=0.1, atol=0.1)
        for side in self.sides:  # what it wrote is rounded differently
            side.model.load_state_dict(host(self.eager.model.state_dict()))
            side.model.last = host(self.eager.model.last)

    @precondition(lambda self: not hasattr(self.eager.model.head, "weight_mask"))
    @rule()
    def prune(self):
        for side in self.sides:
            prune.l1_unstructured(side.model.head, "weight", amount=0.3)
            side.take_parameters()

    @precondition(lambda self: not hasattr(self.eager.model.first, "parametrizations"))
    @rule()
    def parametrize(self):
        for side in self.sides:
            parametrizations.weight_norm(side.model.first)
            side.take_parameters()


def test_any_sequence_of_actions():
    run_state_machine_as_test(
        SameAsEager,
        settings=settings(
            max_examples=4, stateful_step_count=15, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck), database=None,
        ),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_sequences_of_actions():
    run_state_machine_as_test(
        SameAsEager,
        settings=settings(
            max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_what_is_stored_in_python_is_an_array():
    session = LocalSession()
    mesh = session.mesh()
    kept = SimpleNamespace(loss=None)
    table = {}
    results = []

    def step(x):
        loss = (x * 2).sum()
        kept.loss = loss
        table["loss"] = loss + 1
        results.append(loss + 2)
        return loss

    program = ProgramFunction(step, mesh, lambda: session)
    for number in range(1, 4):
        program(torch.full((2,), float(number)))
        found = [kept.loss, table["loss"], results[-1]]
        assert all(isinstance(value, Array) for value in found)
        assert [value.item() for value in found] == [4.0 * number, 4.0 * number + 1, 4.0 * number + 2]
    assert len(results) == 3
