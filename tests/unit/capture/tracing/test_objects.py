"""Objects that hold tensors and that pytrees do not know, as arguments and results; no processes."""

import copy
import dataclasses

import torch
from torch import nn

from tests.local_session import LocalSession
from torchways.array import Array
from torchways.controller.function import make_function


class Layer:
    """A layer of a cache, as a library writes it: a plain object that is empty at first."""

    def __init__(self):
        self.keys = None
        self.length = 0

    def update(self, keys):
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=1)
        self.length += keys.shape[1]
        return self.keys


class Cache:
    def __init__(self):
        self.layers = []

    def update(self, index, keys):
        while len(self.layers) <= index:
            self.layers.append(Layer())
        return self.layers[index].update(keys)


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    logits: torch.Tensor
    cache: Cache | None = None
    note: str = "plain"


class Bag(dict):
    """A kind of dict that pytrees do not know."""


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, cache=None):
        cache = Cache() if cache is None else cache
        for index, layer in enumerate(self.layers):
            x = x + cache.update(index, layer(x)).mean(1, keepdim=True)
        return Output(x, cache, note="decoded")


def test_objects_come_back_as_they_are_and_are_updated_as_in_eager():
    torch.manual_seed(0)
    session = LocalSession()
    eager = Decoder()
    ours = make_function(copy.deepcopy(eager), session.mesh(), lambda: session)
    expected_cache, cache = Cache(), Cache()
    for number in range(4):
        x = torch.randn(2, 3 if number == 0 else 1, 4)
        expected = eager(x, expected_cache)
        result = ours(x, cache)
        assert type(result) is Output
        assert result.note == "decoded"
        assert result.cache is cache
        torch.testing.assert_close(result.logits.cpu(), expected.logits)
        for layer, other in zip(cache.layers, expected_cache.layers, strict=True):
            assert type(layer) is Layer
            assert isinstance(layer.keys, Array)
            assert layer.length == other.length
            torch.testing.assert_close(layer.keys.cpu(), other.keys)
    fresh = ours(torch.randn(2, 3, 4))
    assert fresh.cache is not cache
    assert fresh.cache.layers[1].keys.shape == (2, 3, 4)


def test_an_empty_object_is_known_by_its_class_after_the_first_call():
    session = LocalSession()
    ours = make_function(Decoder(), session.mesh(), lambda: session)
    for _ in range(5):
        ours(torch.randn(2, 3, 4), Cache())
    assert ours._torchways_entry.num_traces <= 2


def test_kinds_of_dicts_are_results():
    session = LocalSession()
    double = make_function(lambda x: Bag(a=x * 2, b=[1, "two"]), session.mesh(), lambda: session)
    result = double(torch.ones(2))
    assert type(result) is Bag
    assert result["a"].tolist() == [2, 2]
    assert result["b"] == [1, "two"]
