"""Slices, constraints, initialisation on slices and random numbers, on real executors."""

import copy
import gc
import time

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard

import torchways as tw
from recipes.models.gpt import GPT, GPTConfig
from tests.cluster.test_plans import training_step
from torchways.errors import CaptureError, PlacementError, ResourceExhausted, UserError

CONFIG = GPTConfig(vocab_size=64, seq_len=16, d_model=32, n_layers=2, n_heads=4)


@pytest.fixture(scope="module")
def cluster():
    with tw.init(islands=2, devices_per_island=4):
        yield


@pytest.fixture(scope="module")
def mesh(cluster):
    mesh = tw.init_device_mesh((2, 2), mesh_dim_names=("dp", "tp"), island=0)
    tw.executor_status()  # waits until its executor is there
    return mesh


def _in_use():
    """The executors that have a slice; others stay for a while."""
    return {status.executor_id for status in tw.executor_status()}


def test_slices_of_one_island_equal_disjoint_and_overlapping(mesh):
    before = _in_use()
    equal = tw.init_device_mesh((4,), mesh_dim_names=("dp",), island=0)
    half, other_half = (tw.init_device_mesh((2,), mesh_dim_names=("tp",), island=0) for _ in range(2))
    x = torch.arange(8.0)
    arrays = [tw.distribute_tensor(x, where, [Shard(0)]) for where in (equal, half, other_half)]
    doubled = [tw.program(mesh=array.mesh)(lambda value: value * 2)(array) for array in arrays]
    for array in doubled:
        assert torch.equal(array.cpu(), x * 2)
    halves = _in_use() - before
    assert len(halves) == 2  # the equal one has no executor of its own
    with pytest.raises(ResourceExhausted, match=r"needs 8 devices of one island; island 0 has 4 \(0 free\)"):
        tw.init_device_mesh((8,), mesh_dim_names=("dp",), island=0)
    equal.close()
    # Nothing refers to the others any more: they are given back by themselves.
    del half, other_half, arrays, array, doubled
    gc.collect()
    deadline = time.monotonic() + 20
    while halves & _in_use() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not halves & _in_use()


def test_a_dropped_slice_is_kept_until_its_runs_are_over(mesh):
    """The result is on `mesh`; what it is made from is on a slice that nothing refers to once the call returns."""

    def compute(x):
        other = tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=1)

        @tw.function(mesh=other)
        def slow(x):
            for _ in range(30):
                x = torch.tanh(x @ x)
            return x

        @tw.program(mesh=mesh)
        def program(x):
            return tw.redistribute(slow(x), mesh) + 1

        return program(x)

    x = torch.eye(400)
    result = compute(x)
    gc.collect()
    expected = x
    for _ in range(30):
        expected = torch.tanh(expected @ expected)
    torch.testing.assert_close(result.cpu(), expected + 1)


def test_constraints_say_how_tensors_are_sharded(mesh):
    other = tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=1)
    x, w = torch.randn(4, 8), torch.randn(8, 6)

    @tw.program(mesh=mesh)
    def program(x, w):
        x = tw.redistribute(x, mesh, [Replicate(), Shard(1)])
        hidden = tw.redistribute(x @ w, mesh, (("dp", "tp"), None))
        moved = tw.redistribute(hidden * 2, other, [Shard(1)])
        return hidden, moved, moved.sum()

    hidden, moved, total = program(x, w)
    assert repr(hidden) == "tw.Array(fp32[4,6][S(0)][S(0)] on mesh('dp'=2,'tp'=2))"
    assert repr(moved) == "tw.Array(fp32[4,6][S(1)] on mesh('dp'=2))"
    assert total.mesh is mesh
    torch.testing.assert_close(hidden.full_tensor(), x @ w)
    torch.testing.assert_close(moved.full_tensor(), x @ w * 2)
    torch.testing.assert_close(total.item(), (x @ w * 2).sum().item(), rtol=1e-4, atol=1e-4)
    assert "fp32[4,8][R][S(1)] @0 = arg host 0" in str(program.lower().program)


def test_arrays_are_redistributed(mesh):
    other = tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=1)
    x = torch.randn(4, 8)
    array = tw.distribute_tensor(x, mesh, ("dp", "tp"))
    assert array.sharding == ("S(0)", "S(1)")
    assert (array.device_mesh, array.placements) == (mesh, (Shard(0), Shard(1)))
    on_axis = array.redistribute(mesh["tp"], [Shard(0)])
    assert (on_axis.mesh, on_axis.sharding) == (mesh, ("R", "S(0)"))
    elsewhere = on_axis.redistribute(other, [Shard(1)])
    assert (elsewhere.mesh, elsewhere.sharding) == (other, ("S(1)",))
    for value in (array, on_axis, elsewhere):
        assert torch.equal(value.full_tensor(), x)


def _plan(model, mesh):
    sharded = tw.fully_shard(model, mesh, plan=tw.tensor_parallel(model, mesh))
    return {**sharded, "layers.*:output": ("dp", None, "tp"), ":input": ("dp", None)}


def _losses(model, wrap, steps=2):
    step = wrap(training_step(model, torch.optim.AdamW(model.parameters(), lr=1e-3)))
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, 64, (8, 17), generator=generator)
        losses.append(step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    return [loss.item() for loss in losses]


def test_a_pipeline_is_built_on_its_slices_and_its_stages_are_sharded(mesh):
    second = tw.init_device_mesh((2, 2), mesh_dim_names=("dp", "tp"), island=1)
    torch.manual_seed(0)
    model = tw.pipeline(
        lambda: GPT(CONFIG), split_spec={"layers.1": tw.SplitPoint.BEGINNING}, meshes=[mesh, second], plan=_plan
    )
    wq = [model.layers[index].attention.wq.weight for index in ("0", "1")]
    assert [(p.mesh, p.sharding) for p in wq] == [(mesh, ("S(1)", "S(0)")), (second, ("S(1)", "S(0)"))]
    assert model.layers["0"].attention_norm.weight.mesh is mesh
    state = model.state_dict()
    for name, value in GPT(CONFIG).state_dict().items():  # drawn by other numbers from the same distributions
        if value.numel() > 1000:
            assert abs(state[name].std().item() / value.std().item() - 1) < 0.1
            assert not torch.equal(state[name], value)
    eager = GPT(CONFIG)
    eager.load_state_dict(state)
    assert _losses(model, tw.program) == pytest.approx(_losses(eager, lambda step: step), rel=1e-4)


def test_initialisation_on_a_slice_is_reproducible(mesh):
    class Odd(torch.nn.Module):
        """State of all kinds: tied, a buffer, a plain attribute, an initialisation through `.data`."""

        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(16, 8)
            self.head = torch.nn.Linear(8, 16, bias=False)
            self.head.weight = self.embedding.weight
            self.embedding.weight.data.normal_(std=0.5)
            self.register_buffer("scale", torch.arange(1.0, 9.0))
            self.offset = torch.full((8,), 2.0)

        def forward(self, tokens):
            return self.head(self.embedding(tokens) * self.scale + self.offset)

    def build():
        torch.manual_seed(5)
        return tw.parallelize_module(Odd, mesh, {"embedding.weight": (("dp", "tp"), None)})

    model, again = build(), build()
    assert model.head.weight is model.embedding.weight
    assert model.embedding.weight.sharding == ("S(0)", "S(0)")
    assert torch.equal(model.state_dict()["head.weight"], again.state_dict()["head.weight"])
    eager = Odd()
    eager.load_state_dict(model.state_dict())
    tokens = torch.arange(8).reshape(4, 2)
    torch.testing.assert_close(model(tokens).cpu(), eager(tokens).detach())


def test_random_numbers_come_from_a_seed_of_each_run(mesh):
    one = tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=1)
    w = torch.ones(8, 64)

    def draw(where):
        @tw.program(mesh=where)
        def program(w):
            dropped = F.dropout(w, 0.25)
            return dropped, torch.rand(100), torch.randn(100), torch.randint(0, 10, (100,))

        torch.manual_seed(7)
        return [tw.get(program(w)) for _ in range(2)]

    first, second = draw(mesh)
    assert first[0].unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert 0.6 < (first[0] > 0).float().mean() < 0.9
    for one_run, other_run in zip(first, second, strict=True):
        assert not torch.equal(one_run, other_run)
    # The same seed gives the same numbers, on one device as on four.
    for runs in (draw(mesh), draw(one)):
        for values, expected in zip(runs, (first, second), strict=True):
            for value, wanted in zip(values, expected, strict=True):
                assert torch.equal(value, wanted)
    with pytest.raises(CaptureError, match=r"a generator of its own at test_sharding\.py"):
        tw.program(mesh=one)(lambda x: x + torch.rand(8, 64, generator=torch.Generator()))(w)


def test_dropout_in_training_drops_the_same_elements_forward_and_backward(mesh):
    model = tw.function(torch.nn.Linear(16, 16, bias=False), mesh=mesh)

    @tw.program
    def gradient(x):
        dropped = F.dropout(model(x), 0.5)
        dropped.sum().backward()
        result = model.weight.grad
        model.zero_grad()
        return dropped, result

    x = torch.randn(32, 16)
    dropped, result = tw.get(gradient(x))
    mask = (dropped != 0).float() * 2
    torch.testing.assert_close(result, mask.T @ x, rtol=1e-4, atol=1e-4)


def test_tensors_of_many_dimensions_are_left_whole(mesh):
    """torch-xla has no shardings of more than five dimensions."""
    double = tw.function(lambda x: x * 2, mesh=mesh)

    @tw.program(mesh=mesh)
    def step(x):
        return double(x.unflatten(-1, (2, 3)) + 1).square().sum(-1)

    x = torch.randn(4, 2, 3, 2, 1, 6)
    result = step(x)
    torch.testing.assert_close(result.cpu(), ((x.unflatten(-1, (2, 3)) + 1) * 2).square().sum(-1))
    with pytest.raises(PlacementError, match=r"splits tensors of at most 5 dimensions; replicate it, or view it"):
        tw.distribute_tensor(x, mesh, [Shard(0), Replicate()])


def test_mixed_precision_keeps_master_weights(mesh):
    torch.manual_seed(0)
    model = GPT(CONFIG)
    eager = copy.deepcopy(model)
    tw.parallelize_module(model, mesh, tw.fully_shard)

    def autocast(step):
        def run(*args):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return step(*args)

        return run

    losses = _losses(model, lambda step: tw.program(autocast(step)))
    assert losses == pytest.approx(_losses(eager, autocast), rel=2e-3)
    state = model.state_dict()
    assert all(value.dtype == torch.float32 for value in state.values())
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=5e-3)


def test_bad_plans_and_constraints_are_refused(mesh):
    other = tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=1)

    @tw.function(mesh=other)
    def function(x):
        return tw.redistribute(x, mesh)

    with pytest.raises(PlacementError, match=r"function runs on mesh .* cannot place a tensor on another slice"):
        function(torch.ones(4))
    with pytest.raises(PlacementError, match=r"layers.9:output' fits no submodule"):
        tw.parallelize_module(GPT(CONFIG), mesh, {"layers.9:output": ("dp",)})
    with pytest.raises(
        PlacementError, match=r"parameter output.weight fp32\[64,32\]: .* names 'pp'; mesh .* has axes dp, tp"
    ):
        tw.parallelize_module(GPT(CONFIG), mesh, {"output.weight": ("pp", None)})
    with (
        torch.device("meta"),
        pytest.raises(UserError, match=r"on device meta\. Give torchways a function that builds"),
    ):
        tw.parallelize_module(GPT(CONFIG), mesh)
    with pytest.raises(PlacementError, match="one plan is for meshes with the same axes"):
        tw.pipeline(
            GPT(CONFIG),
            split_spec={"layers.1": tw.SplitPoint.BEGINNING},
            meshes=[mesh, other],
            plan={"*.bias": ("dp",)},
        )
