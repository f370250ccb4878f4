"""Sharding plans: what they say of a module's parameters, and what they refuse."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard

import torchways as tw
from recipes.models.gpt import GPT, GPTConfig
from torchways.errors import PlacementError
from torchways.mesh import VirtualSlice
from torchways.parallel.plans import add_constraints, placements_of


def mesh(**axes):
    return VirtualSlice(shape=tuple(axes.values()), mesh_dim_names=tuple(axes))


def gpt():
    return GPT(GPTConfig(vocab_size=32, seq_len=16, d_model=16, n_layers=1, n_heads=2))


def test_entries_by_axis_and_one_an_axis_mean_the_same():
    model, both = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), mesh(dp=2, tp=2)
    by_axis = placements_of(model, both, {"0.*": {"tp": Shard(0)}, "1.weight": {"dp": Shard(0), "tp": Shard(1)}})
    in_order = placements_of(
        model, both, {"0.*": [Replicate(), Shard(0)], "1.weight": [Shard(0), Shard(1)], "*": ["R", "R"]}
    )
    expected = {
        "0.weight": ("R", "S(0)"),
        "0.bias": ("R", "S(0)"),
        "1.weight": ("S(0)", "S(1)"),
        "1.bias": ("R", "R"),
    }
    assert by_axis == in_order == expected


def test_tied_parameters_are_split_once_by_any_of_their_names():
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embedding"].weight
    found = placements_of(model, mesh(tp=2), {"head.weight": {"tp": Shard(0)}})
    assert found == {"embedding.weight": ("S(0)",), "head.weight": ("S(0)",)}


def test_tensor_parallel_pairs_column_wise_and_row_wise_layers():
    plan = tw.tensor_parallel(gpt(), mesh(dp=1, tp=2))
    layer = "layers.0."
    assert plan == {
        **{f"{layer}attention.{name}.weight": {"tp": Shard(0)} for name in ("wq", "wk", "wv")},
        f"{layer}attention.wo.weight": {"tp": Shard(1)},
        f"{layer}feed_forward.w1.weight": {"tp": Shard(0)},
        f"{layer}feed_forward.w2.weight": {"tp": Shard(1)},
    }


def test_fully_shard_splits_the_longest_dimension_that_is_free():
    both = mesh(dp=2, tp=2)
    model = gpt()
    plan = tw.fully_shard(model, both, plan=tw.tensor_parallel(model, both))
    assert plan["tok_embeddings.weight"] == {"dp": Shard(0)}
    assert plan["layers.0.attention.wq.weight"] == {"tp": Shard(0), "dp": Shard(1)}
    assert plan["layers.0.feed_forward.w2.weight"] == {"tp": Shard(1), "dp": Shard(0)}
    assert plan["norm.bias"] == {"dp": Shard(0)}
    assert set(plan) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"0.wieght": {"tp": Shard(0)}},
            r"pattern '0.wieght' fits no parameter of Sequential, which has 0.weight, 0.bi",
        ),
        ({"0.weight": {"pp": Shard(0)}}, r"mesh \('dp'=2,'tp'=2\) has no axis 'pp'; its axes are dp, tp"),
        ({"0.weight": {"tp": Shard(1)}}, r"parameter 0.weight fp32\[8,3\]: mesh axis 'tp' has size 2 but dim"),
        ({"0.bias": {"tp": Shard(1)}}, r"parameter 0.bias fp32\[8\]: placement S\(1\) .* it has no dimension 1"),
        ({"1.weight": [Shard(0), Shard(0)]}, r"mesh axis 'dp x tp' has size 4 but dimension 0 has 2"),
        ({"0.weight": [Shard(0)]}, r"1 placements \('S\(0\)',\) for the 2 axes"),
        ({"0.weight": {"tp": Shard(-3)}}, r"placement Shard\(dim=-3\) of a tensor of shape \(8, 3\)"),
        ({"0.weight": ("pp", None)}, r"partition spec \('pp', None\) names 'pp'; mesh .* has axes dp, tp"),
        ({"0.weight": ("tp", "tp")}, r"names axis 'tp' twice"),
        ({"0.weight": (("tp", "dp"),)}, r"name axes in the mesh's order, \('dp', 'tp'\)"),
        ({"0.bias": ("tp", None)}, r"has 2 entries for shape \(8,\)"),
    ],
)
def test_plans_that_do_not_fit_are_refused_with_names_and_sizes(plan, message):
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    with pytest.raises(PlacementError, match=message):
        placements_of(model, mesh(dp=2, tp=2), plan)


def test_constraints_of_submodules_that_do_not_exist_are_refused():
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    with pytest.raises(PlacementError, match="pattern '2:output' fits no submodule; there are 0, 1"):
        add_constraints(model, mesh(dp=2), {"2:output": ("dp",)}, lambda tensor, placements: tensor)


def test_ready_plans_need_their_axis():
    with pytest.raises(PlacementError, match="has no axis 'tp'"):
        tw.tensor_parallel(gpt(), mesh(dp=2))
    with pytest.raises(PlacementError, match="has no axis 'fsdp'"):
        tw.fully_shard(gpt(), mesh(dp=2), axis="fsdp")


def test_eager_mode_checks_the_plan(monkeypatch):
    monkeypatch.setenv("TORCHWAYS_EAGER", "1")
    model = nn.Linear(2, 2)
    assert tw.parallelize_module(model, mesh(tp=2), {"weight": {"tp": Shard(0)}}) is model
    assert type(model.weight) is torch.nn.Parameter
    with pytest.raises(PlacementError, match="fits no parameter"):
        tw.parallelize_module(model, mesh(tp=2), {"wait": {"tp": Shard(0)}})
