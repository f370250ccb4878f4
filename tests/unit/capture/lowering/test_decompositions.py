"""Operators that are taken apart give what eager PyTorch gives; no processes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.local_session import LocalSession
from tests.unit.capture.models import make_sgd_step
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction
from torchways.errors import CaptureError


def test_operators_along_the_dimension_of_a_scalar():
    session = LocalSession()

    def function(x):
        return x.cumsum(0), x.softmax(0), x.gather(0, torch.tensor([0])), x.max(0)[0], x.squeeze(0)

    ours = make_function(function, session.mesh(), lambda: session)
    for result, expected in zip(ours(torch.tensor(3.0)), function(torch.tensor(3.0)), strict=True):
        torch.testing.assert_close(result.cpu(), expected)


def test_operators_without_lowering_are_taken_apart_or_all_reported():
    everything = {"aten::" + name for name in ("mul.Tensor", "add.Tensor", "exp", "pow.Tensor_Scalar")}
    session = LocalSession(lowered_ops=everything)

    def program(x):
        return torch.linalg.matrix_exp(x) + torch.linalg.eigvalsh(x).sum() + torch.special.i0(x).sum()

    with pytest.raises(CaptureError, match=r"linalg_matrix_exp at [\s\S]*_linalg_eigh at [\s\S]*i0 at"):
        ProgramFunction(program, session.mesh(), lambda: session)(torch.eye(3))


class Images(nn.Module):
    """Operators of image models that torch-xla would run on the host."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm(self.conv(x))
        total = F.adaptive_avg_pool2d(x, (3, 5)).square().mean()
        modes = [("bilinear", {"align_corners": True}), ("bicubic", {}), ("nearest-exact", {})]
        modes += [("bilinear", {"antialias": True}), ("bicubic", {"antialias": True, "align_corners": True})]
        for mode, flags in modes:
            total = total + F.interpolate(x, size=(5, 12), mode=mode, **flags).square().mean()
        return total + F.interpolate(x, scale_factor=2.0).square().mean()


def test_image_operators_are_taken_apart():
    torch.manual_seed(0)
    session = LocalSession()
    eager = Images()
    ours = make_function(copy.deepcopy(eager), session.mesh(), lambda: session)

    expected = make_sgd_step(eager, eager)
    step = ProgramFunction(make_sgd_step(ours, ours), None, lambda: session)
    for _ in range(2):
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(step(x).cpu(), expected(x).detach())
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    graphs = [graph for _, _, parts in session.registered.values() for part in parts for graph in part]
    targets = {str(node.target) for graph in graphs for node in graph.nodes}
    for target in targets:
        assert not any(name in target for name in ("batch_norm", "_adaptive_avg_pool2d", "_weight_norm"))
        assert not ("upsample" in target and "backward" in target)


def test_operators_that_torch_xla_computes_otherwise_are_taken_apart():
    session = LocalSession()

    def function(x, mask, source):
        y = x.clone()
        y.diagonal(-1).fill_(7.0)
        pools = [
            F.avg_pool2d(x[None], 2, padding=1, ceil_mode=True, count_include_pad=False),
            F.avg_pool2d(x[None], 3, 2, ceil_mode=True, divisor_override=5),
        ]
        scattered = x.masked_scatter(mask, source)
        sums = mask.cumsum(1), torch.addmm(x[0], x[1], x[2], beta=2, alpha=3), x.signbit()
        return x.diagonal(-1), x.diagonal(1, 2, 0), y, *pools, scattered, *sums

    x, mask, source = torch.randn(3, 3, 3), torch.rand(3, 3, 3) > 0.5, torch.randn(40)
    ours = make_function(function, session.mesh(), lambda: session)
    for result, expected in zip(ours(x, mask, source), function(x, mask, source), strict=True):
        torch.testing.assert_close(result.cpu(), expected)
    for name in ("diagonal", "diagonal_scatter", "avg_pool2d", "masked_scatter", "addmm", "signbit"):
        assert session.num_operators(name) == 0


def test_the_gradient_of_a_masked_scatter():
    session = LocalSession()
    x, mask, source = torch.randn(2, 6), torch.rand(2, 6) > 0.5, torch.randn(3, 5)

    def gradient(x, source):
        source = source.detach().requires_grad_()
        (x.masked_scatter(mask, source) * torch.arange(6)).sum().backward()
        return source.grad

    ours = make_function(gradient, session.mesh(), lambda: session)
    torch.testing.assert_close(ours(x, source).cpu(), gradient(x, source))
    assert session.num_operators("masked_select") == 0


def test_elementwise_operators_and_means_by_index_are_taken_apart():
    session = LocalSession()

    def function(x, y, index):
        y = torch.where(y > 1, torch.nan, y)
        mean = x.scatter_reduce(1, index, y.nan_to_num(), "mean")
        alone = x.scatter_reduce(1, index, y.nan_to_num(), "mean", include_self=False)
        return (
            torch.fmax(x, y), torch.fmin(x, y), torch.hypot(x, x + 1), torch.copysign(x, -torch.zeros(6)), x.exp2(),
            mean, alone, x.aminmax()[0], x.amax(),
        )  # fmt: skip

    x, y, index = torch.randn(4, 6), torch.randn(4, 6), torch.randint(0, 6, (4, 3))
    ours = make_function(function, session.mesh(), lambda: session)
    for result, expected in zip(ours(x, y, index), function(x, y, index), strict=True):
        torch.testing.assert_close(result.cpu(), expected, equal_nan=True)
    for name in ("fmax", "hypot", "copysign", "exp2"):
        assert session.num_operators(name) == 0


@pytest.mark.parametrize("reduce", ["sum", "prod", "amax", "amin"])
def test_reductions_by_index_without_what_was_there(reduce):
    session = LocalSession()

    def function(x, y, index):
        numbers = (y * 9).to(torch.int64)
        return (
            x.scatter_reduce(1, index, y, reduce, include_self=False),
            torch.ones_like(numbers).scatter_reduce(1, index, numbers, reduce, include_self=False),
        )

    x, y, index = torch.randn(4, 6), torch.randn(4, 6), torch.randint(0, 6, (4, 3))
    ours = make_function(function, session.mesh(), lambda: session)
    for result, expected in zip(ours(x, y, index), function(x, y, index), strict=True):
        torch.testing.assert_close(result.cpu(), expected)


def test_strides_are_those_of_eager():
    session = LocalSession()

    def function(x):
        x = x.clone().requires_grad_()
        turned = x.transpose(0, 1)
        windows = turned.as_strided((3, 4, 4), (2, 1, 4))
        written = x.transpose(0, 1).clone()
        written.as_strided((2, 2), (1, 4), 1).mul_(3)
        chunks = (x * 2).view(4, 2, 4).transpose(0, 1).as_strided((2, 3, 2, 4), (4, 8, 8, 1))
        (gradient,) = torch.autograd.grad((windows * windows.cumsum(0)).sum() + chunks.pow(2).cumsum(1).sum(), x)
        return windows, written, chunks, gradient

    x = torch.randn(4, 8)
    results = make_function(function, session.mesh(), lambda: session)(x)
    for result, expected in zip(results, function(x), strict=True):
        torch.testing.assert_close(result.cpu(), expected)
    for size, tensor in (((8, 2), lambda x: x[:, 2:]), ((5, 8), lambda x: x)):
        with pytest.raises(CaptureError, match="as_strided"):
            make_function(lambda x, s=size, t=tensor: t(x).as_strided(s, (8, 1)), session.mesh(), lambda: session)(x)
