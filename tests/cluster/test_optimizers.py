"""Optimizers of torch.optim, and gradient scaling, on real executors: some steps of each against eager PyTorch."""

import pytest
import torch
from torch import nn

import torchways as tw
from torchways.errors import CaptureError, PlacementError

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, weight_decay=0.1, maximize=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1, decoupled_weight_decay=True, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1, t0=1, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
}


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def train(model, wrap, make, update, scales=(1.0, 2.0, 3.0)):
    optimizer = make(list(model.parameters()))
    generator = torch.Generator().manual_seed(1)

    def step(x):
        loss = model(x).square().mean()
        update(loss, optimizer)
        optimizer.zero_grad()
        return loss

    step = wrap(step)
    losses = [step(torch.randn(4, 5, generator=generator) * scale).detach().cpu() for scale in scales]
    return losses, [value.cpu() for value in model.state_dict().values()]


def plain(loss, optimizer):
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_steps_are_those_of_eager(cluster, meshes, name):
    ours = tw.function(model_of(), mesh=meshes[0])
    found = train(ours, tw.program, OPTIMIZERS[name], plain)
    torch.testing.assert_close(found, train(model_of(), lambda f: f, OPTIMIZERS[name], plain), rtol=1e-4, atol=1e-5)


class WithNumber(nn.Module):
    """A parameter of no dimensions beside others."""

    def __init__(self):
        super().__init__()
        self.layers, self.scale = model_of(), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.layers(x) * self.scale


@pytest.mark.parametrize(
    ("name", "limit"),
    [("SGD", 1e-14), ("Adam", 1e-14), ("AdamW", 1e-14), ("Adamax", 1e-14), ("NAdam", 1e-6), ("RAdam", 1e-6)],
)
def test_steps_in_float64(cluster, meshes, name, limit):
    """Corrections of bias come of Python's float64 in eager PyTorch: in float32 they had errors of 1e-5."""

    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for wrap in (tw.program, lambda function: function):
        model = WithNumber().double()
        if wrap is tw.program:
            model = tw.function(model, mesh=meshes[0])
        optimizer = OPTIMIZERS[name](list(model.parameters()))

        def step(x, model=model, optimizer=optimizer):
            loss = model(x).square().mean()
            plain(loss, optimizer)
            optimizer.zero_grad()
            return loss

        step = wrap(step)
        losses = [step(x).detach().cpu() for _ in range(5)]
        found.append([*losses, *(value.cpu() for value in model.state_dict().values())])
    torch.testing.assert_close(*found, rtol=limit, atol=limit)


def exact_orthogonalization(gradient, coefficients, num_steps, eps):
    """What Muon computes in bfloat16, in float64."""
    a, b, c = coefficients
    value = gradient.double()
    value = value.T if value.shape[0] > value.shape[1] else value
    value = value / value.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = value @ value.T
        value = a * value + (b * gram + c * gram @ gram) @ value
    return value.T if gradient.shape[0] > gradient.shape[1] else value


def test_muon_is_as_near_to_float64_as_eager(cluster, meshes, monkeypatch):
    """It computes in bfloat16, so that two right results differ: each of some 2% of the update from the exact one."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 32, bias=False), nn.Tanh(), nn.Linear(32, 16, bias=False))

    def steps(model, wrap=lambda f: f):
        optimizer = torch.optim.Muon(model.parameters(), lr=0.02)
        generator = torch.Generator().manual_seed(1)
        step = wrap(lambda x: (plain(model(x).square().mean(), optimizer), optimizer.zero_grad()))
        for _ in range(6):
            step(torch.randn(8, 24, generator=generator))
        return [value.cpu() for value in model.state_dict().values()]

    found, eager = steps(tw.function(build(), mesh=meshes[0]), tw.program), steps(build())
    with monkeypatch.context() as patch:
        patch.setattr("torch.optim._muon._zeropower_via_newtonschulz", exact_orthogonalization)
        exact = steps(build())
    for ours, theirs, wanted in zip(found, eager, exact, strict=True):
        assert (ours - wanted).norm() <= 2 * (theirs - wanted).norm()
        assert (ours - wanted).norm() <= 0.01 * wanted.norm()


def test_scaled_gradients_that_are_not_finite_change_nothing_but_the_scale(cluster, meshes):
    scales = (float("inf"), 1.0, 1.0, float("inf"), 1.0)
    results = []
    for model, wrap in ((tw.function(model_of(), mesh=meshes[0]), tw.program), (model_of(), lambda f: f)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

        def update(loss, optimizer, scaler=scaler, model=model):
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()

        losses, state = train(model, wrap, lambda p: torch.optim.Adam(p, lr=0.1), update, scales=scales)
        results.append((losses, state, scaler.get_scale()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert results[0][2] == 512.0


def test_lbfgs_is_refused_by_name(cluster, meshes):
    model = tw.function(model_of(), mesh=meshes[0])
    optimizer = torch.optim.LBFGS(model.parameters())

    @tw.program
    def step(x):
        return optimizer.step(lambda: model(x).square().mean())

    with pytest.raises(CaptureError, match=r"LBFGS.step at test_optimizers.*use another optimizer"):
        step(torch.randn(2, 5))


def test_adafactor_is_refused_by_name(cluster, meshes):
    model = tw.function(model_of(), mesh=meshes[0])
    optimizer = torch.optim.Adafactor(model.parameters())

    @tw.program
    def step(x):
        model(x).square().mean().backward()
        optimizer.step()

    with pytest.raises(CaptureError, match=r"Adafactor reads norms .* at test_optimizers.* use AdamW"):
        step(torch.randn(2, 5))
    assert all(parameter.grad is None for parameter in model.parameters())


class DecoupledSGD(torch.optim.Optimizer):
    """Computes with its hyperparameters in Python, as optimizers of users do."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "decay": 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.add_(parameter.grad, alpha=-group["lr"])


def test_an_optimizer_of_the_users_own(cluster, meshes):
    def update(loss, optimizer):
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9

    results = [
        train(model, wrap, lambda p: DecoupledSGD(p, 0.1), update)
        for model, wrap in ((tw.function(model_of(), mesh=meshes[0]), tw.program), (model_of(), lambda f: f))
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_a_program_of_a_closed_mesh_says_so(cluster):
    mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=0)
    double = tw.function(lambda x: x * 2, mesh=mesh)
    double(torch.ones(2)).cpu()
    mesh.close()
    with pytest.raises(PlacementError, match="runs on a mesh that is closed"):
        double(torch.ones(2))
