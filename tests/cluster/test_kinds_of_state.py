"""Python state and results of kinds that were once wrong: each is compared with plain Python, call by call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchways as tw
from torchways.errors import CaptureError


@pytest.fixture(scope="module")
def meshes():
    tw.shutdown()
    with tw.init(islands=2, devices_per_island=1):
        yield [tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=island) for island in range(2)]


class Scale(nn.Module):
    scale = 1.0

    def forward(self, x):
        return x * self.scale


class Options:
    """Keeps all in a dictionary that only its own code sees."""

    def __init__(self, **options):
        self.__dict__["_options"] = options

    def __getattr__(self, name):
        if name in self.__dict__["_options"]:
            return self.__dict__["_options"][name]
        raise AttributeError(name)

    def __setattr__(self, name, value):
        self.__dict__["_options"][name] = value


@pytest.mark.parametrize(
    "of_number",
    [
        lambda x, k: x[:, :k],
        lambda x, k: x.chunk(k, 1)[0],
        lambda x, k: x * (k & 1) + (k ^ 3) + (~k) + (k << 1) + (k >> 1),
        lambda x, k: x * divmod(k, 2)[1],
        lambda x, k: x * float(torch.tensor([k]).sum()),
        lambda x, k: x * (10 if type(k) is int else 20),
        lambda x, k: x * (2 if k.bit_length() > 1 else 3),
        lambda x, k: F.interpolate(x[None], scale_factor=k)[0],
        lambda x, k: x * len(range(k)) + int(str(k)),
    ],
    ids=["slice", "chunk", "bits", "divmod", "tensor", "type", "method", "interpolate", "text"],
)
def test_a_number_that_changes_can_do_what_numbers_can(meshes, of_number):
    program = tw.program(of_number, mesh=meshes[0])
    x = torch.arange(4.0).view(1, 4)
    for k in (1, 2, 3, 2):
        assert torch.equal(program(x, k).cpu(), of_number(x, k)), k


def test_numbers_of_a_class(meshes, monkeypatch):
    model = Scale()
    program = tw.program(lambda x: model(x), mesh=meshes[0])
    for value in (1.0, 2.0, 3.0, 4.0, 2.0):
        monkeypatch.setattr(Scale, "scale", value)
        assert program(torch.ones(1)).item() == value
        assert "scale" not in vars(model)


def test_objects_that_are_read_as_dictionaries(meshes):
    options, plain = Options(scale=1.0), type("Plain", (), {})()
    plain.bias = 0.0

    @tw.program(mesh=meshes[0])
    def program(x):
        return x * options.scale, x * vars(plain)["bias"], x * sum(plain.__dict__.values())

    for value in (1.0, 2.0, 3.0):
        options.scale = plain.bias = value
        assert [item.item() for item in program(torch.ones(1))] == [value] * 3


def test_a_set_beside_a_number_that_changes(meshes):
    names, holder = {"x"}, {"k": 1.0}
    program = tw.program(lambda x: x * holder["k"] if "x" in names else -x, mesh=meshes[0])
    for value in (1.0, 2.0, 3.0):
        holder["k"] = value
        assert program(torch.ones(1)).item() == value
    names.clear()
    assert program(torch.ones(1)).item() == -1.0


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_parameters_come_and_go(meshes, register):
    model = tw.parallelize_module(nn.Linear(2, 1), meshes[0])

    def triple(grad):
        if register == "register_hook":
            return grad * 3
        grad.grad.mul_(3)
        return None

    @tw.program
    def gradient(x):
        model(x).sum().backward()
        grad = model.weight.grad
        model.zero_grad()
        return grad

    found = [gradient(torch.ones(1, 2))[0, 0].item()]
    handle = getattr(model.weight, register)(triple)
    found.append(gradient(torch.ones(1, 2))[0, 0].item())
    found.append(gradient(torch.ones(1, 2))[0, 0].item())
    handle.remove()
    found.append(gradient(torch.ones(1, 2))[0, 0].item())
    assert found == [1.0, 3.0, 3.0, 1.0]


def test_results_that_are_also_state_are_kept(meshes):
    """A later call replaces the state; what earlier calls returned stays what it was."""
    torch.manual_seed(0)
    model = tw.parallelize_module(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), meshes[0])
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    held = tw.distribute_tensor(torch.zeros(3), meshes[0])

    @tw.program
    def step(x, same):
        loss = model(x).pow(2).mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        weight = model[0].weight
        return (
            loss,
            weight,
            weight.detach(),
            model[1].running_mean,
            opt.state[weight]["momentum_buffer"],
            same,
            x.view(-1),
        )

    eval_weight = tw.program(lambda: model[0].weight.detach())
    kept, expected, early = [], [], eval_weight()
    first = early.clone().cpu()
    for _ in range(4):
        kept.append(step(torch.ones(2, 4), held))
        expected.append(model[0].weight.detach().cpu().clone())
    assert torch.equal(early.cpu(), first)
    for results, weight in zip(kept, expected, strict=True):
        assert torch.equal(results[1].detach().cpu(), weight)
        assert torch.equal(results[2].cpu(), weight)
        assert all(item.detach().cpu().isfinite().all() for item in results)
    assert held.tolist() == [0.0] * 3


def test_an_array_of_two_names_is_not_given_up(meshes):
    """A program returns one value twice; one of them becomes state, which later calls replace."""
    model = nn.Module()
    model.register_buffer("total", torch.zeros(3))
    twice = tw.program(lambda x: (x + 1,) * 2, mesh=meshes[0])
    one, other = twice(torch.ones(3))
    model.total = one

    @tw.program(mesh=meshes[0])
    def add(x):
        model.total += x
        return model.total.sum()

    assert [add(torch.ones(3)).item() for _ in range(3)] == [9.0, 12.0, 15.0]
    assert other.tolist() == [2.0] * 3


@pytest.mark.parametrize("parts", [1, 2])
def test_each_microbatch_draws_numbers_of_its_own(meshes, parts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Dropout(0.5))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
    placed = (
        tw.parallelize_module(model, meshes[0])
        if parts == 1
        else tw.pipeline(model, split_spec={"1": tw.SplitPoint.BEGINNING}, meshes=meshes)
    )

    def forward(x):
        out = placed(x)
        return out.detach(), torch.rand(x.shape[0], 1)

    @tw.program
    def step(x):
        return tw.microbatch(forward, x, n_microbatches=4)

    def draw():
        torch.manual_seed(3)
        return [[item.cpu() for item in step(torch.ones(16, 8))] for _ in range(2)]

    (masks, numbers), (later, _) = draw()
    assert all(
        torch.equal(a, b) for run, again in zip(draw(), draw(), strict=True) for a, b in zip(run, again, strict=True)
    )
    assert set(masks.unique().tolist()) == {0.0, 2.0}
    of_turns = masks.view(4, -1)
    assert len({tuple(row.tolist()) for row in of_turns}) == 4
    assert not torch.equal(masks, later)
    assert len(numbers.unique()) == 16


def test_a_number_attribute_is_read_in_microbatches(meshes):
    model = tw.pipeline(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), split_spec={"1": tw.SplitPoint.BEGINNING}, meshes=meshes
    )
    model.weight_of_loss = 1.0

    def forward_backward(x):
        loss = model(x).pow(2).mean() * model.weight_of_loss
        loss.backward()
        return loss

    @tw.program
    def step(x, n):
        losses = tw.microbatch(forward_backward, x, n_microbatches=n)
        model.zero_grad()
        return losses

    [first, *_] = step(torch.ones(8, 8), 2).tolist()
    for value, n in ((2.0, 2), (3.0, 4), (4.0, 8)):
        model.weight_of_loss = value
        assert step(torch.ones(8, 8), n).tolist() == pytest.approx([value * first] * n, rel=1e-5)


MIXED = {
    "clamp": lambda x, y: x.clamp(1.5),
    "clamp both": lambda x, y: x.clamp(min=0.5, max=1.5),
    "clamp tensor": lambda x, y: torch.clamp(x, min=torch.tensor(1.5)),
    "maximum": lambda x, y: torch.maximum(x, y),
    "minimum": lambda x, y: torch.minimum(x, torch.tensor(1.5)),
    "fmod": lambda x, y: torch.fmod(x, 1.5) + torch.fmod(y, torch.tensor(1.5)),
    "remainder": lambda x, y: torch.remainder(x, 1.5),
    "where": lambda x, y: torch.where(x > 1, x, y),
    "where scalar": lambda x, y: torch.where(x > 1, x, 1.5),
    "division": lambda x, y: x / 3,
    "product": lambda x, y: x * 0.5 + y,
    "root": lambda x, y: (x + 1).sqrt(),
    "power": lambda x, y: y ** x.to(y.dtype),
    "scalar": lambda x, y: x * y.double()[0] + torch.exp(y.double()[1]) - x,
    "scalar in place": lambda x, y: (x + 1.5).mul_(y.double()[0]).add_(x * y.double().mean()),
    "scalar of a comparison": lambda x, y: (
        torch.where((x + 0.1) == (y.double()[1] - 0.9), x, 5) + ((x + 0.1) > y[0] - 0.9)
    ),
    "new": lambda x, y: torch.full((3,), 0.1) + torch.ones(3) + torch.linspace(0, 1, 3) + torch.arange(0.0, 3.0) * x,
}


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_dtypes_are_those_of_pytorch(meshes, name, default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for one in (torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64):
            for other in (torch.int32, torch.float16, torch.float64):
                x, y = torch.arange(3).to(one), torch.tensor([2, 1, 2]).to(other)
                expected = MIXED[name](x, y)
                found = tw.program(MIXED[name], mesh=meshes[0])(x, y)
                assert (found.dtype, found.cpu().dtype) == (expected.dtype, expected.dtype), (one, other)
                assert torch.allclose(found.cpu().double(), expected.double(), rtol=1e-6), (one, other)
    finally:
        torch.set_default_dtype(before)


def test_complex_numbers_keep_both_parts(meshes):
    x = torch.complex(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
    places = torch.tensor([0.0, 2.0])
    functions = [
        lambda x: x.cumsum(0),
        lambda x: x.cumprod(1),
        torch.trapezoid,
        lambda x: x @ x + x.abs(),
        lambda x: x.abs() + 1,
    ]
    functions += [lambda x: torch.trapezoid(x, places), lambda x: torch.gradient(x, spacing=(places, places))[0]]
    for function in functions:
        found = tw.program(function, mesh=meshes[0])(x)
        assert found.dtype == found.cpu().dtype == function(x).dtype
        assert torch.allclose(found.cpu(), function(x))
    for refused in (torch.linalg.inv, torch.linalg.det, torch.linalg.svd):
        with pytest.raises(
            CaptureError, match=r"of complex matrices has no lowering to XLA, at test_kinds_of_state.py:\d+"
        ):
            tw.program(lambda x, refused=refused: refused(x), mesh=meshes[0])(x)
