"""Batches and states as JSON, and back."""

import collections
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchways.data import trees
from torchways.errors import DataError

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
tensors = st.lists(st.floats(width=32, allow_nan=False), max_size=4).map(torch.tensor)
Point = collections.namedtuple("Point", ["x", "y"])


def nested(leaves):
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.tuples(inner, inner).map(lambda pair: Point(*pair)),
            st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
        ),
        max_leaves=10,
    )


def same(one, other):
    if isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in other)
    if isinstance(other, (list, tuple)):
        is_same = type(one).__name__ == type(other).__name__ and len(one) == len(other)
        return is_same and all(map(same, one, other))
    return type(one) is type(other) and one == other


@given(nested(plain | tensors))
def test_batches_keep_their_structure(batch):
    structure, leaves, keys = trees.flatten(batch)
    assert len(leaves) == len(keys)
    assert same(trees.unflatten(json.loads(json.dumps(structure)), leaves), batch)


@given(nested(plain | tensors | st.binary() | st.lists(st.integers(-9, 9)).map(np.array)))
def test_states_keep_their_values(state):
    assert same(trees.decode_state(json.loads(json.dumps(trees.encode_state(state)))), state)


def test_the_first_key_says_where_a_tensor_is():
    batch = {"x": torch.ones(2), "more": [np.arange(2), (torch.zeros(1),)], "n": np.float32(2)}
    structure, leaves, keys = trees.flatten(batch)
    assert keys == ["x", "more", "more"]
    assert [type(leaf) for leaf in leaves] == [torch.Tensor] * 3
    assert trees.unflatten(structure, leaves)["n"] == 2.0
    assert trees.flatten((torch.ones(1), torch.ones(1)))[2] == ["0", "1"]
    assert trees.flatten(torch.ones(1))[2] == [""]


def test_what_is_no_value_is_refused_with_its_place():
    with pytest.raises(DataError, match=r"the batch has a set at \['x'\]\[1\]: a batch consists of tensors"):
        trees.flatten({"x": [torch.ones(1), {1}]})
    with pytest.raises(DataError, match=r"the batch has a ndarray at its top"):
        trees.flatten(np.array(["text"]))
    with pytest.raises(DataError, match=r"with layout torch.sparse_coo: only dense tensors on the CPU"):
        trees.flatten(torch.ones(2, 2).to_sparse())
    with pytest.raises(DataError, match=r"state has a function at \['f'\]"):
        trees.encode_state({"f": same})
