"""`tw.balanced_stages`: estimates of what stages compute, and where models are split."""

import itertools
import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchways as tw
from tests.local_session import LocalSession
from tests.unit.capture.models import pipelined
from torchways.errors import PlacementError
from torchways.parallel.balance import _best_cuts

IDS = torch.zeros(2, 16, dtype=torch.long)


def gpt2(num_layers=6, vocab_size=64):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=vocab_size, n_positions=32, n_embd=32, n_layer=num_layers, n_head=2)
    )


def test_layers_alike_are_split_evenly():
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(8)])
    split = tw.balanced_stages(model, 4, torch.ones(3, 8))
    assert dict(split) == dict.fromkeys(["2", "4", "6"], tw.SplitPoint.BEGINNING)
    assert [stage.flops for stage in split.stages] == [2 * 2 * 3 * 8 * 8] * 4
    assert [stage.parameter_bytes for stage in split.stages] == [2 * (8 * 8 + 8) * 4] * 4
    assert str(split).splitlines()[2].split() == ["1", "2", "2", "768", "25.0%", "0.00", "MB"]


def test_a_large_head_gets_fewer_layers_beside_it():
    small, large = (tw.balanced_stages(gpt2(6, size), 2, IDS) for size in (64, 2048))
    assert list(small) == ["transformer.h.3"]
    assert list(large) == ["transformer.h.5"]
    total = sum(stage.flops for stage in large.stages)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        gpt2(6, 2048)(IDS)
    assert total == counter.get_total_flops()


def test_where_operations_are_equal_parameters_decide():
    class Lookups(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Embedding(size, 4) for size in (10, 10, 10, 100, 10))

        def forward(self, x):
            return sum(layer(x) for layer in self.layers)

    split = tw.balanced_stages(Lookups(), 3, IDS % 10)
    assert list(split) == ["layers.3", "layers.4"]
    assert [stage.flops for stage in split.stages] == [0, 0, 0]


@pytest.mark.parametrize("num_stages", [2, 3, 6])
def test_a_model_that_a_function_builds_needs_no_memory(num_stages):
    def build():
        model = gpt2()
        built.append(model)
        return model

    built = []
    split = tw.balanced_stages(build, num_stages, IDS)
    assert split == tw.balanced_stages(gpt2(), num_stages, IDS)
    assert all(isinstance(parameter, torch._subclasses.FakeTensor) for parameter in built[0].parameters())


def test_an_encoder_and_a_decoder_are_one_row_of_layers():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    split = tw.balanced_stages(transformers.T5ForConditionalGeneration(config), 3, input_ids=IDS, labels=IDS)
    assert [name.split(".")[:3] for name in split] == [["encoder", "block", "2"], ["decoder", "block", "1"]]
    assert max(stage.flops for stage in split.stages) < 0.4 * sum(stage.flops for stage in split.stages)


def test_layers_inside_layers_are_split_only_where_it_pays():
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(4)])
    assert list(tw.balanced_stages(blocks, 2, torch.ones(3, 8))) == ["2"]
    model = nn.Sequential(nn.Linear(8, 8), blocks, nn.Linear(8, 8))
    assert list(tw.balanced_stages(model, 2, torch.ones(3, 8))) == ["1.2"]


def test_one_stage_has_no_split_points_and_the_model_is_as_it_was():
    model = gpt2()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert dict(tw.balanced_stages(model, 1, IDS)) == {}
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_too_few_layers_and_placed_models_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(
        PlacementError, match="Sequential has 2 layers at which a stage may begin, too few for 3 stages"
    ):
        tw.balanced_stages(model, 3, torch.ones(1, 2))
    with pytest.raises(PlacementError, match="num_stages must be at least 1, not 0"):
        tw.balanced_stages(model, 0, torch.ones(1, 2))
    session = LocalSession()
    split = tw.balanced_stages(model, 2, torch.ones(1, 2))
    pipelined(session, model, split, [session.mesh(), session.mesh()])
    with pytest.raises(PlacementError, match=r"placed already; call it before tw\.pipeline"):
        tw.balanced_stages(model, 2, torch.ones(1, 2))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.data())
def test_cuts_are_the_best_of_all(costs, data):
    num_stages = data.draw(st.integers(1, len(costs)))
    most, cuts = _best_cuts(costs, num_stages, [0] * len(costs), 0)

    def largest(cuts):
        return max(sum(costs[begin:end]) for begin, end in itertools.pairwise([*cuts, len(costs)]))

    options = [[0, *rest] for rest in itertools.combinations(range(1, len(costs)), num_stages - 1)]
    assert cuts in options
    assert most == largest(cuts) == min(map(largest, options))
    assert len(options) == math.comb(len(costs) - 1, num_stages - 1)
