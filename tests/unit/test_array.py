"""Arrays outside programs, against plain PyTorch: storages, views, writes, casts, copies; no processes."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from tests.local_session import LocalSession
from torchways.array import Array, set_grad_quietly
from torchways.controller.buffers import RemoteBuffer
from torchways.controller.function import make_function, make_pipeline
from torchways.controller.modules import replaced_by
from torchways.controller.program import ProgramFunction
from torchways.controller.redistribute import cast_on_slice
from torchways.errors import UserError
from torchways.parallel.pipeline import SplitPoint


class Net(nn.Module):
    def __init__(self, shares=False):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.outer = nn.Linear(3, 3)
        self.register_buffer("scale", torch.full((3,), 2.0))
        if shares:
            self.outer.weight = self.inner.weight

    def forward(self, x):
        return self.outer(self.inner(x).tanh()) * self.scale


def build(shares=False):
    torch.manual_seed(0)
    return Net(shares)


def place(module, session=None):
    session = session or LocalSession()
    return make_function(module, session.mesh(), lambda: session)


def placed_and_used(shares=False):
    """A placed model whose values are on the slice."""
    model = place(build(shares))
    model(torch.ones(2, 3))
    assert isinstance(model.inner.weight._buffer, RemoteBuffer)
    return model


def same(model, plain):
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
    x = torch.linspace(-1, 1, 6).view(2, 3).to(plain.inner.weight.dtype)
    torch.testing.assert_close(model(x).cpu(), plain(x).detach())


def _element(model):
    model.inner.weight[0, 0] = 5.0


def _slice_of_flat(model):
    model.inner.weight.view(-1)[:4].zero_()


def _transposed(model):
    model.inner.weight.t()[1].mul_(3)


def _data_filled(model):
    model.outer.bias.data.fill_(1)


def _detached(model):
    weight = model.outer.weight.detach()
    weight += 1
    weight.sub_(model.inner.weight)


def _view_kept(model):
    row = model.inner.weight[1]
    model.inner.weight.fill_(2.0)
    row.add_(row)
    model.outer.bias.copy_(row)


def _rows(model):
    for number, row in enumerate(model.inner.weight):
        row.fill_(number)


def _chunks(model):
    first, second = model.inner.weight.chunk(2)
    first.mul_(2)
    second.copy_(first[:1])


def _initialized(model):
    torch.manual_seed(1)
    nn.init.xavier_uniform_(model.inner.weight)
    nn.init.trunc_normal_(model.outer.weight)
    nn.init.zeros_(model.inner.bias)


def _from_vector(model):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 2, model.parameters())


def _clipped(model):
    for parameter in model.parameters():
        parameter.clamp_(-0.1, 0.1)


def _foreach(model):
    torch._foreach_mul_(list(model.parameters()), 0.5)


def _out(model):
    torch.add(model.inner.bias, 1.0, out=model.outer.bias.detach())


def _by_mask(model):
    model.inner.weight[model.inner.weight > 0] = 0.25


def _from_itself(model):
    model.inner.weight.add_(model.inner.weight)
    model.inner.weight[0].copy_(model.inner.weight[1] + model.inner.weight[2])


def _buffer(model):
    model.scale *= 3
    model.scale[1] += 1


def _assigned(model):
    model.inner.weight.data = torch.ones(3, 3)
    model.outer.weight.data = model.inner.weight.data * 2


def _swapped(model):
    one, other = model.inner.weight.data, model.outer.weight.data
    model.inner.weight.data, model.outer.weight.data = other, one


WRITES = [
    _element, _slice_of_flat, _transposed, _data_filled, _detached, _view_kept, _rows, _chunks, _initialized,
    _from_vector, _clipped, _foreach, _out, _by_mask, _from_itself, _buffer, _assigned, _swapped,
]  # fmt: skip


@pytest.mark.parametrize("is_used", [False, True], ids=["on the host", "on the slice"])
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__.strip("_"))
def test_writes_outside_programs_take_effect(write, is_used):
    model, plain = placed_and_used() if is_used else place(build()), build()
    homes = {name: (value.mesh, value.sharding) for name, value in model.named_parameters()}
    identities = [id(parameter) for parameter in model.parameters()]
    with torch.no_grad():
        write(model)
        write(plain)
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert {name: (value.mesh, value.sharding) for name, value in model.named_parameters()} == homes
    same(model, plain)


def test_a_write_under_grad_is_refused_as_eager_does():
    model = placed_and_used()
    with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad is being used in an in-place"):
        model.inner.weight[0, 0] = 5.0
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"):
        model.inner.weight.zero_()


def test_what_runs_write_is_seen_through_every_alias_and_view():
    session = LocalSession()
    model = place(build(), session)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    detached, data, row = model.inner.weight.detach(), model.inner.weight.data, model.inner.weight.data[1]

    @ProgramFunctionOf(session)
    def step(x):
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    before = row.cpu()
    step(torch.ones(2, 3))
    after = model.inner.weight.cpu()
    assert not torch.equal(before, after[1])
    for alias in (detached, data):
        assert torch.equal(alias.cpu(), after)
    assert torch.equal(row.cpu(), after[1])


def ProgramFunctionOf(session):
    return lambda function: ProgramFunction(function, None, lambda: session)


def test_views_read_their_base_once():
    session = LocalSession()
    model = place(build(), session)
    model(torch.ones(2, 3))
    reads = []
    fetch = session.values.fetch
    session.values.fetch = lambda *args: reads.append(1) or fetch(*args)
    weight = model.inner.weight.detach()
    assert sum(float(row.sum()) for row in weight) == pytest.approx(float(weight.cpu().sum()))
    assert len(reads) == 2


def test_a_view_never_waits_until_it_is_read_and_keeps_nothing_alive():
    model = placed_and_used()
    buffer = model.inner.weight._buffer
    buffer.session.values.fetch = None  # a read would fail
    view = model.inner.weight.detach().view(-1)[2:4]
    assert (tuple(view.shape), view.mesh, repr(view)) == ((2,), None, "tw.Array(fp32[2], not placed yet)")
    del buffer.session.values.fetch
    value = weakref.ref(view._storage)
    view.cpu()
    del view
    gc.disable()
    try:
        assert value() is None
    finally:
        gc.enable()


def test_a_view_is_a_programs_argument_and_what_a_program_writes_to_it_reaches_its_base():
    session = LocalSession()
    mesh = session.mesh()
    model, plain = place(build(), session), build()
    model(torch.ones(2, 3))
    row = model.inner.weight.detach()[1]
    double = ProgramFunction(lambda: row.mul_(2).sum(), mesh, lambda: session)
    total = ProgramFunction(lambda tensor: tensor.sum(), mesh, lambda: session)
    assert total(row).item() == pytest.approx(plain.inner.weight[1].sum().item())
    double()
    plain.inner.weight.data[1] *= 2
    same(model, plain)
    assert total(row).item() == pytest.approx(plain.inner.weight[1].sum().item())


def test_what_would_change_an_arrays_shape_is_refused():
    weight = placed_and_used().inner.weight.detach()
    for change in (lambda: weight.t_(), lambda: weight.resize_(9), lambda: weight.set_(torch.ones(3, 4))):
        with pytest.raises(UserError, match=r"would change the shape or the memory of tw\.Array.*assign the new value"):
            change()
    with (
        pytest.warns(UserWarning, match="was resized"),
        pytest.raises(UserError, match=r"writes a value of shape \(4,\) to tw.Array\(fp32\[3,3\]"),
    ):
        torch.add(torch.ones(4), 1, out=weight)


def test_an_array_is_given_the_memory_of_another():
    model, plain = placed_and_used(), build()
    for owner in (model, plain):
        weight, bias = owner.inner.weight.data, owner.inner.bias.data
        other = weight.clone() if owner is plain else copy.deepcopy(weight)
        weight.set_(other)
        other.mul_(2)
        assert torch.equal(weight + 0, other + 0)
        bias.set_(torch.ones(3))
        assert torch.equal(bias + 0, torch.ones(3))
    same(model, plain)


def test_a_parametrization_is_registered_later():
    class Doubled(nn.Module):
        def forward(self, value):
            return value * 2

        def right_inverse(self, value):
            return value / 2

    model, plain = placed_and_used(), build()
    x = torch.ones(2, 3)
    expected = plain(x)
    torch.nn.utils.parametrize.register_parametrization(model.inner, "weight", Doubled())
    torch.testing.assert_close(model(x).cpu(), expected)
    torch.nn.utils.parametrize.remove_parametrizations(model.inner, "weight")
    torch.testing.assert_close(model(x).cpu(), expected)


def test_host_tensors_may_be_changed_by_arrays():
    model, plain = placed_and_used(), build()
    host, weight = torch.zeros(3, 3), model.inner.weight.detach()
    running = torch.zeros(())
    running += weight.sum()
    host.copy_(weight)
    host[0] = weight[1]
    host[1, 2] = weight[0, 0]
    ema = torch.ones(3, 3)
    ema.mul_(0.9).add_(weight, alpha=0.1)
    ema.lerp_(weight, 0.5)
    out = torch.empty(3, 3)
    assert torch.add(weight, weight, out=out) is out
    expected = plain.inner.weight.detach()
    assert running.item() == pytest.approx(expected.sum().item())
    assert torch.equal(host[0], expected[1])
    assert host[1, 2] == expected[0, 0]
    torch.testing.assert_close(ema, (torch.ones(3, 3) * 0.9 + 0.1 * expected).lerp(expected, 0.5))
    assert torch.equal(out, 2 * expected)


# ---- .data, casts, devices


@pytest.mark.parametrize("cast", [nn.Module.double, nn.Module.half, lambda module: module.to(torch.bfloat16)])
@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.inner], ids=["all", "a submodule"])
def test_a_cast_keeps_parameters_and_their_place(cast, part):
    model, plain = placed_and_used(), build()
    weights, mesh = list(model.parameters()), model.inner.weight.mesh
    cast(part(model))
    cast(part(plain))
    assert [id(weight) for weight in model.parameters()] == [id(weight) for weight in weights]
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (ours.dtype, ours.requires_grad, ours.mesh) == (theirs.dtype, True, mesh), name
        assert isinstance(ours, nn.Parameter)
        assert torch.equal(ours.cpu(), theirs.detach())
    assert model.scale.dtype == plain.scale.dtype


def test_a_cast_reads_nothing_from_the_slice(monkeypatch):
    model, plain = placed_and_used(), build()
    with monkeypatch.context() as patch:
        patch.setattr(Array, "_cast_on_slice", cast_on_slice)
        patch.setattr(LocalSession, "fetch", None)
        model.double()
        halves = [model.inner.weight.half(), model.scale.to(torch.bfloat16), model.scale.bool().int()]
        model.to(torch.float16)
    expected = [plain.double().inner.weight.half(), plain.scale.to(torch.bfloat16), plain.scale.bool().int()]
    for ours, theirs in zip(halves, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs.detach())
    same(model, plain.half())


def test_data_takes_values_of_any_shape_and_dtype_and_copies_them():
    model = placed_and_used()
    weight, mesh = model.inner.weight, model.inner.weight.mesh
    value = torch.arange(8, dtype=torch.float64).view(2, 4)
    weight.data = value
    value.zero_()
    assert (tuple(weight.shape), weight.dtype, weight.mesh) == ((2, 4), torch.float64, mesh)
    assert torch.equal(weight.cpu(), torch.arange(8, dtype=torch.float64).view(2, 4))
    assert model.inner.weight is weight
    weight.data = model.outer.weight[0]
    with torch.no_grad():
        weight.zero_()
    assert model.outer.weight.cpu()[0].abs().sum() > 0


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to("cuda"),
        lambda model: model.to("meta"),
        lambda model: model.inner.cuda(),
        lambda model: model.to_empty(device="meta"),
    ],
)
def test_other_devices_are_refused(move):
    model = placed_and_used()
    with pytest.raises(UserError, match=r"an array cannot go to device .*tw\.redistribute"):
        move(model)
    same(model, build())


# ---- copies


@pytest.mark.parametrize("shares", [False, True])
def test_a_deep_copy_is_placed_and_has_arrays_of_its_own(shares):
    model, plain = placed_and_used(shares), build(shares)
    other = copy.deepcopy(model)
    assert type(other) is type(model)
    assert other.inner.weight.mesh is model.inner.weight.mesh
    assert (other.inner.weight is other.outer.weight) is shares
    with torch.no_grad():
        model.inner.weight.zero_()
    same(other, plain)
    assert isinstance(other.inner.weight, nn.Parameter)


def test_an_averaged_model_follows_a_placed_one():
    model, plain = placed_and_used(), build()
    averages = [torch.optim.swa_utils.AveragedModel(item) for item in (model, plain)]
    for number in range(3):
        for item, average in zip((model, plain), averages, strict=True):
            with torch.no_grad():
                item.inner.weight.add_(number)
            average.update_parameters(item)
    torch.testing.assert_close(averages[0].module.inner.weight.cpu(), averages[1].module.inner.weight.detach())
    x = torch.ones(2, 3)
    torch.testing.assert_close(averages[0](x).cpu(), averages[1](x).detach())


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("is_pipeline", [False, True])
def test_a_pickled_module_is_plain(shares, is_pipeline):
    if is_pipeline:
        session = LocalSession()
        meshes = [session.mesh(), session.mesh()]
        model = make_pipeline(build(shares), {"outer": SplitPoint.BEGINNING}, meshes, None, lambda: session)
    else:
        model = placed_and_used(shares)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for plain in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert type(plain) is Net
        assert type(plain.inner.weight) is nn.Parameter
        assert type(plain.scale) is torch.Tensor
        assert (plain.inner.weight is plain.outer.weight) is shares
        assert not plain.outer._forward_pre_hooks
        same(plain, build(shares))


def test_states_and_submodules_are_saved_as_host_tensors():
    model, plain = placed_and_used(), build()
    file = io.BytesIO()
    torch.save([model.state_dict(), model.inner.state_dict(), model.outer], file)
    file.seek(0)
    state, inner, outer = torch.load(file, weights_only=False)
    assert type(outer.weight) is nn.Parameter
    assert {type(value) for value in (*state.values(), *inner.values())} == {torch.Tensor}
    assert torch.equal(inner["weight"], plain.inner.weight)
    assert torch.equal(outer.weight, plain.outer.weight)


def test_a_placed_module_keeps_nothing_that_a_copy_must_not_have():
    model = placed_and_used()
    vars(model)["_torchways_decoders"] = {"mesh": model.inner.weight.mesh}
    assert not [key for key in vars(copy.deepcopy(model)) if key.startswith("_torchways_")]
    shallow = copy.copy(model)
    assert shallow._torchways_entry is not model._torchways_entry
    assert shallow.inner is model.inner


def test_memory_cannot_be_shared():
    model = placed_and_used()
    with pytest.raises(UserError, match=r"has no memory in this process.*read it with \.cpu\(\)"):
        model.share_memory()
    with pytest.raises(UserError, match=r"has no memory in this process: read it with \.cpu\(\)"):
        model.inner.weight.data_ptr()


def test_backward_outside_a_program_is_refused():
    model = placed_and_used()
    with pytest.raises(UserError, match=r"backward\(\) of tw\.Array.* outside a program.*@tw\.program"):
        model.inner.bias.detach()[0].backward()


# ---- identity


def test_an_optimizer_built_before_the_model_is_placed_trains_it():
    def losses(model, session):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if session is not None:
            model = place(model, session)

        def step(x):
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        step = step if session is None else ProgramFunctionOf(session)(step)
        return [step(torch.ones(2, 3)).item() for _ in range(4)]

    assert losses(build(), LocalSession()) == pytest.approx(losses(build(), None), rel=1e-5)


def test_a_parameter_becomes_an_array_itself_unless_others_hold_it():
    plain = build()
    weight, bias, scale = plain.inner.weight, plain.inner.bias, plain.scale
    weight.note = "kept"
    held = weakref.ref(bias)
    model = place(plain)
    assert model.inner.weight is weight
    assert model.scale is scale
    assert isinstance(weight, Array)
    assert isinstance(weight, nn.Parameter)
    assert weight.note == "kept"
    assert replaced_by(weight) is None
    assert model.inner.bias is not bias
    assert replaced_by(bias) is model.inner.bias
    assert held() is bias
    assert type(bias) is nn.Parameter


def test_recurrent_modules_go_on_with_arrays():
    torch.manual_seed(0)
    module = nn.GRU(3, 3)
    before = list(module.parameters())
    place(module)
    assert [id(parameter) for parameter in module.parameters()] == [id(parameter) for parameter in before]
    assert all(weight is parameter for weight, parameter in zip(module._flat_weights, before, strict=True))


def test_a_gradient_from_before_is_kept():
    plain = build()
    plain(torch.ones(2, 3)).sum().backward()
    expected = plain.inner.weight.grad.clone()
    model = place(plain)
    assert isinstance(model.inner.weight.grad, Array)
    assert torch.equal(model.inner.weight.grad.cpu(), expected)


# ---- the counter


def test_what_python_sets_is_counted_outside_traces():
    session = LocalSession()
    mesh = session.mesh()
    model = make_function(build(), mesh, lambda: session)
    weight = model.inner.weight
    gradient = weight.detach() * 1

    def changes(action):
        before = Array.num_changes
        action()
        return Array.num_changes - before

    assert changes(lambda: weight.requires_grad_(False)) == 1
    assert changes(lambda: weight.requires_grad_(False)) == 0
    assert changes(lambda: setattr(weight, "requires_grad", True)) == 1
    assert changes(lambda: model.requires_grad_(False)) == 4
    assert changes(lambda: model.requires_grad_(True)) == 4
    assert changes(lambda: setattr(weight, "grad", gradient)) == 1
    assert weight.grad is not None
    assert changes(lambda: delattr(weight, "grad")) == 1
    assert weight.grad is None
    assert changes(lambda: setattr(weight, "grad", None)) == 0
    assert changes(lambda: set_grad_quietly(weight, gradient)) == 0
    assert changes(lambda: setattr(weight, "data", torch.ones(3, 3))) == 1
    assert changes(lambda: model.inner.double()) >= 2
    assert changes(lambda: weight.detach().fill_(1.0)) == 0
    assert changes(lambda: (weight.grad, weight.data, weight.requires_grad, weight.sum())) == 0

    optimizer = torch.optim.SGD(model.outer.parameters(), lr=0.1)

    def step(x):
        model.outer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return model.scale.detach() * 2

    program = ProgramFunction(step, mesh, lambda: session)
    assert changes(lambda: program(torch.ones(2, 3))) == 0


def test_a_buffer_has_the_arrays_shape_and_dtype_whatever_was_done():
    model = placed_and_used()
    model.half()
    model.inner.weight.data = torch.ones(5)
    for array in (*model.parameters(), *model.buffers()):
        value = array._buffer.read()
        assert (value.shape, value.dtype) == (array.shape, array.dtype)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(6.0).view(2, 3))

    def forward(self, x):
        return x + self.table


def test_a_view_and_what_it_is_a_view_of_are_refused_where_a_program_writes_to_one():
    session = LocalSession()
    model = make_function(Table(), session.mesh(), lambda: session)
    model(torch.ones(2, 3))
    row, other = model.table[0], model.table[:, 1:]

    def run(function, *args):
        return ProgramFunction(function, session.mesh(), lambda: session)(*args)

    text = r"changes {} in place and also uses .* of the same memory, called at test_array.py:\d+ in run: take the view"
    with pytest.raises(UserError, match=text.format("model.table")):
        run(lambda: model.table.add_(1) * row.sum())
    with pytest.raises(UserError, match=text.format("row")):
        run(lambda: row.add_(1) * model.table.sum())
    with pytest.raises(UserError, match=text.format("row")):
        run(lambda: row.add_(1) * other.sum())
    with pytest.raises(UserError, match=text.format("model.table")):
        run(lambda x: model.table.add_(1) * x.sum(), row)
    before = torch.arange(6.0).view(2, 3)
    assert torch.equal(model.table.cpu(), before)
    assert torch.equal(run(lambda: model.table + row).cpu(), before + before[0])
    run(lambda: row.add_(1).sum())
    assert torch.equal(model.table.cpu(), before + torch.tensor([[1.0], [0.0]]))


def test_a_view_that_takes_the_place_of_another_array_is_refused_as_well():
    session = LocalSession()
    model = make_function(Table(), session.mesh(), lambda: session)
    model(torch.ones(2, 3))
    step = ProgramFunction(lambda x: (model.table.add_(1), x.sum())[1], session.mesh(), lambda: session)
    found = step(session_array(session, torch.ones(3)))
    assert found.item() == 3.0
    with pytest.raises(UserError, match=r"changes model.table in place"):
        step(model.table[0])


def session_array(session, value):
    return ProgramFunction(lambda x: x.clone(), session.mesh(), lambda: session)(value)
