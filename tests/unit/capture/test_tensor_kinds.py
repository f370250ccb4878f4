"""Tensors that are no plain ones, as arguments and as state; no processes."""

import pytest
import torch

from tests.local_session import LocalSession
from torchways.controller.program import ProgramFunction
from torchways.errors import CaptureError


class Tagged(torch.Tensor):
    pass


X = torch.eye(3)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (X.as_subclass(Tagged), r"a Tagged.*as_subclass\(torch.Tensor\)"),
        (X.to_sparse(), r"layout torch.sparse_coo.*to_dense\(\)"),
        (torch.nested.nested_tensor([X, X[:1]]), r"nested tensor.*to_padded_tensor"),
        (torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), r"quantized.*dequantize\(\)"),
        (X.to("meta"), r"device meta"),
    ],
    ids=["subclass", "sparse", "nested", "quantized", "meta"],
)
def test_other_kinds_are_refused_with_a_remedy(tensor, message):
    session = LocalSession()
    double = ProgramFunction(lambda value: value * 2, session.mesh(), lambda: session)
    assert double(X).shape == X.shape
    with pytest.raises(CaptureError, match=rf"value is .*{message}"):
        double(tensor)
    with pytest.raises(CaptureError, match=rf"tensor is .*{message}"):
        ProgramFunction(lambda: X + tensor, session.mesh(), lambda: session)()
