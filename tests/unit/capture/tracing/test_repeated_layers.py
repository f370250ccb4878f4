"""Regions that are compiled once: `torch.compiler.nested_compile_region` and `Module.compile()` within a program."""

import copy
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.local_session import LocalSession
from torchways.controller.function import make_function, make_parallel, make_pipeline
from torchways.controller.program import ProgramFunction
from torchways.parallel.pipeline import SplitPoint

LAYERS, WIDTH, CLASSES = 5, 8, 7


class Block(nn.Module):
    def __init__(self, *, is_normalised_by_batch=False, dropout=0.0):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH) if is_normalised_by_batch else nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.layers = nn.ModuleList(Block(**options) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.is_checkpointed = False

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.is_checkpointed else layer(x)
        return self.head(x)


def mark(model):
    for layer in model.layers:
        layer.forward = torch.compiler.nested_compile_region(layer.forward)


def unmarked(model):
    pass


def compile_layers(model):
    for layer in model.layers:
        layer.compile()


def make_step(model, optimizer, clip=False):
    def step(x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def batch():
    return torch.randint(CLASSES, (6,)), torch.randint(CLASSES, (6,))


def compare(model, twin, program, step, runs=3):
    for _ in range(runs):
        x, y = batch()
        torch.testing.assert_close(program(x, y).cpu(), step(x, y), rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(
            ours.cpu(), theirs, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def calls_of(program):
    """The function of each computation."""
    return re.findall(r" = compute @\S+ (\S+)\(", str(program))


def compile_each_by_itself(model):
    model.layers = nn.ModuleList(map(torch.compile, model.layers))


def adamw(parameters):
    return torch.optim.AdamW(parameters, 0.01)


def twin_of(model, marked, place):
    """Marks and places a model; returns it with a twin on the host, which is neither."""
    twin = copy.deepcopy(model)
    marked(model)
    return place(model), twin


def train(model, twin, mesh, session, optimizer=adamw, **options):
    """Trains a placed model and its twin; returns the program."""
    program = ProgramFunction(make_step(model, optimizer(model.parameters()), **options), mesh, lambda: session)
    compare(model, twin, program, make_step(twin, optimizer(twin.parameters()), **options))
    assert program.num_traces == 1
    return program


def times_called(model, marked=mark, devices=2, **options):
    """Trains a model on a slice; returns how often each function is called. On several devices marks alone count."""
    session = LocalSession()
    mesh = session.mesh(devices)
    model, twin = twin_of(model, marked, lambda item: make_parallel(item, mesh, None, lambda: session))
    return Counter(calls_of(train(model, twin, mesh, session, **options)))


@pytest.mark.parametrize("marked", [mark, compile_layers, compile_each_by_itself])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("place", [make_function, lambda item, mesh, get: make_parallel(item, mesh, None, get)])
def test_layers_share_functions(marked, clip, place):
    torch.manual_seed(0)
    session = LocalSession()
    mesh = session.mesh(2)
    model, twin = twin_of(Model(), marked, lambda item: place(item, mesh, lambda: session))
    times = Counter(calls_of(train(model, twin, mesh, session, clip=clip)))
    assert list(times.values()).count(LAYERS) == 3, times  # the layers' forward, backward and update


OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, 0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 0.01, eps=1e-3, centered=True),
    "not foreach": lambda parameters: torch.optim.AdamW(parameters, 0.01, foreach=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    torch.manual_seed(0)
    times = times_called(Model(), optimizer=OPTIMIZERS[name], clip=True)
    assert list(times.values()).count(LAYERS) == 3, times


def test_layers_with_batch_statistics():
    torch.manual_seed(0)
    times = times_called(Model(is_normalised_by_batch=True))
    assert list(times.values()).count(LAYERS) >= 3, times


def test_tied_layers_are_updated_together():
    torch.manual_seed(0)
    model = Model()
    for layer in model.layers[1:]:
        layer.up.weight = model.layers[0].up.weight
    times = times_called(model, clip=True)
    assert sorted(times.values())[-3:] == [LAYERS - 1, LAYERS, LAYERS], times  # one backward begins a sum of gradients


def test_one_layer_called_several_times():
    torch.manual_seed(0)
    model = Model()
    model.layers = nn.ModuleList([model.layers[0]] * LAYERS)
    times = times_called(model, marked=lambda item: item.layers[0].compile())
    assert sorted(times.values())[-2:] == [LAYERS - 1, LAYERS]


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_checkpointed_layer_keeps_nothing_but_its_input(is_checkpointed):
    torch.manual_seed(0)
    session = LocalSession()
    mesh = session.mesh()
    model, twin = twin_of(Model(), unmarked, lambda item: make_parallel(item, mesh, None, lambda: session))
    model.is_checkpointed = is_checkpointed
    program = train(model, twin, mesh, session)
    assert list(Counter(calls_of(program)).values()).count(LAYERS) == 3
    forward = next(line for line in str(program).splitlines() if "Block(" in line)
    assert (forward.partition(" = ")[0].count("%") == 1) == is_checkpointed, forward


@pytest.mark.parametrize("marked", [mark, compile_layers, unmarked])
@pytest.mark.parametrize("devices", [1, 2])
def test_layers_of_a_pipeline(marked, devices):
    torch.manual_seed(0)
    session = LocalSession()
    meshes = [session.mesh(devices), session.mesh(devices)]
    split = {"layers.2": SplitPoint.BEGINNING}
    model, twin = twin_of(Model(), marked, lambda item: make_pipeline(item, split, meshes, None, lambda: session))
    program = train(model, twin, None, session, clip=True)
    assert len({id(layer.up.weight.mesh) for layer in model.layers}) == 2
    is_repeated = marked is not unmarked or devices == 1
    assert ({2, 3} <= set(Counter(calls_of(program)).values())) == is_repeated


def test_a_region_of_several_slices_is_none():
    session = LocalSession()
    meshes = session.mesh(), session.mesh()
    double, triple = (
        make_function(lambda x, n=n: x * n, mesh, lambda: session) for n, mesh in zip((2, 3), meshes, strict=True)
    )

    @torch.compiler.nested_compile_region
    def region(x):
        return triple(double(x + 1) - 1) * double(x)

    program = ProgramFunction(lambda x: region(region(x)).sum(), None, lambda: session)
    x = torch.arange(4.0)

    def expected(x):
        return ((x + 1) * 2 - 1) * 3 * (x * 2)

    torch.testing.assert_close(program(x).cpu(), expected(expected(x)).sum())


def compare_results(make, **tolerance):
    """Compares what a marked model and its twin give, once, to the function that `make` makes of each."""
    session = LocalSession()
    mesh = session.mesh()
    model, twin = twin_of(Model(), mark, lambda item: make_parallel(item, mesh, None, lambda: session))
    results = [ProgramFunction(make(model), mesh, lambda: session), make(twin)]
    arguments = batch()
    for ours, theirs in zip(*(function(*arguments) for function in results), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, **tolerance)


def test_hooks_that_read_other_layers_gradients():
    """Operators of a hook, between two layers' backwards, belong to either; the order of the trace holds."""
    torch.manual_seed(0)

    def make(model):
        def step(x, y):
            norms = []
            h = model.embed(x)
            for layer in model.layers:
                h = layer(h)
                h.register_hook(lambda grad: norms.append(grad.norm()) or grad / (1 + sum(norms)))
            loss = F.cross_entropy(model.head(h), y)
            loss.backward()
            return loss.detach(), torch.stack(norms), model.layers[0].up.weight.grad

        return step

    compare_results(make)


def test_gradients_of_gradients():
    torch.manual_seed(0)

    def make(model):
        def penalty(x, y):
            h = model.embed(x)
            out = h
            for layer in model.layers:
                out = layer(out)
            (grad,) = torch.autograd.grad(out.square().sum(), h, create_graph=True)
            loss = grad.square().sum()
            loss.backward()
            return loss.detach(), model.layers[2].up.weight.grad

        return penalty

    compare_results(make, rtol=1e-4, atol=1e-3)


def test_a_compiled_function_is_called_as_it_is():
    session = LocalSession()
    compiled = torch.compile(lambda x: x.sin() + 1)
    program = ProgramFunction(lambda x: compiled(x) * 2, session.mesh(), lambda: session)
    torch.testing.assert_close(program(torch.ones(3)).cpu(), (torch.ones(3).sin() + 1) * 2)


def test_layers_alike_on_one_device_need_no_mark():
    torch.manual_seed(0)
    times = times_called(Model(), unmarked, devices=1)
    assert list(times.values()).count(LAYERS) == 3


def test_without_a_mark_several_devices_have_one_computation():
    torch.manual_seed(0)
    assert sum(times_called(Model(), unmarked).values()) == 2


@pytest.mark.parametrize("change", ["few", "different", "small"])
def test_without_a_mark_other_layers_are_no_regions(change):
    torch.manual_seed(0)
    model = Model()
    if change == "few":
        del model.layers[3:]
    elif change == "different":
        for number, layer in enumerate(model.layers[:3]):
            layer.up, layer.down = nn.Linear(WIDTH, number + 1), nn.Linear(number + 1, WIDTH)
    else:
        model.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
    assert sum(times_called(model, unmarked, devices=1).values()) == 2


def test_inference_without_a_mark_is_one_computation():
    session = LocalSession()
    model = make_parallel(Model(), session.mesh(), None, lambda: session)
    program = ProgramFunction(torch.no_grad()(lambda x: model(x)), session.mesh(), lambda: session)
    program(batch()[0])
    assert len(calls_of(program)) == 1


@pytest.mark.parametrize("inner", [False, True])
def test_a_region_that_computes_gradients_itself(inner):
    torch.manual_seed(0)
    session = LocalSession()
    weight = torch.randn(3, 3)

    def square(x):
        return (x @ weight).square()

    if inner:
        square = torch.compiler.nested_compile_region(square)

    @torch.compiler.nested_compile_region
    def region(x):
        x = x.detach().requires_grad_()
        first = square(x)
        (grad,) = torch.autograd.grad(first.sum(), x)
        return first.detach() + grad * x.detach()

    program = ProgramFunction(lambda x: region(region(x)).sum(), session.mesh(), lambda: session)
    x = torch.randn(2, 3)
    torch.testing.assert_close(program(x).cpu(), region(region(x)).sum())
