"""How large values are."""

import torch

from torchways.ir.sizes import device_bytes, item_bytes, logical_bytes, shard_shape


def test_every_dtype_has_the_size_that_torch_says():
    dtypes = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    assert {name: item_bytes(name) for name in dtypes} == {name: value.itemsize for name, value in dtypes.items()}


def test_a_split_value_takes_the_bytes_of_its_largest_shard_on_each_device():
    assert logical_bytes("bfloat16", (5, 8)) == 80
    assert shard_shape((5, 8), ("S(0)", "S(1)", "R"), (2, 4, 3)) == (3, 2)
    assert device_bytes("bfloat16", (5, 8), ("S(0)", "S(1)", "R"), (2, 4, 3)) == 12
    assert device_bytes("bool", (), ("R",), (4,)) == 1
