"""PyTorch's database of operators with samples, on real executors against eager PyTorch: results, and gradients.

A sample agrees (where tolerances are missed, it must be as near to float64's result as eager PyTorch's), or it is
refused with an error that names the operator or the line. `make test-all` runs all of it on one device (some ten
minutes) and says how many agree; `make test` runs operators that many models have, on arguments that are split over
two.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import torchways as tw
from tests.operator_database import cases, check
from torchways.errors import RemoteError, UserError

_AROUND = "a tensor comes to a program as its elements; as_strided looks at the memory around them"
_SCALAR_MASK = "what a scalar mask selects is refused with words of PyTorch's"
_TIMES_BOOL = "the gradient of a NaN: XLA takes a product with a bool for a choice, so infinity times False is 0"

#: Cases in which eager PyTorch is not followed, and why; one that begins to agree fails the test.
DEVIATIONS = {
    "as_strided.partial_views-float32": _AROUND,
    "as_strided.partial_views-int64": _AROUND,
    "as_strided.partial_views-gradient": _AROUND,
    "masked_select-float32": _SCALAR_MASK,
    "masked_select-int64": _SCALAR_MASK,
    "masked_select-gradient": _SCALAR_MASK,
    "masked.amax-gradient": _TIMES_BOOL,
    "masked.amin-gradient": _TIMES_BOOL,
}

COMMON = {
    "argmax",
    "cat",
    "cummax",
    "gather",
    "index_put",
    "linalg.cholesky",
    "matmul",
    "median",
    "nn.functional.conv2d",
    "nn.functional.cross_entropy",
    "nn.functional.scaled_dot_product_attention",
    "topk",
    "where",
}


class Devices:
    """A slice; it is made anew, cluster and all, where another size is asked for, and after what it may not survive."""

    def __init__(self):
        self._mesh = None

    def mesh(self, num_devices):
        if self._mesh is not None and self._mesh.size() != num_devices:
            self.close()
        if self._mesh is None:
            tw.init(islands=1, devices_per_island=num_devices)
            self._mesh = tw.init_device_mesh((num_devices,), mesh_dim_names=("dp",))
        return self._mesh

    def check(self, case, num_devices):
        """Returns the case's outcome."""
        mesh, survives = self.mesh(num_devices), False
        try:
            outcome = check(case, mesh)
            survives = True
        except (AssertionError, UserError, RemoteError):
            survives = True
            raise
        finally:
            if not survives:
                self.close()
        return outcome.value

    def close(self):
        self._mesh = None
        tw.shutdown()


@pytest.fixture(scope="module")
def devices():
    devices = Devices()
    yield devices
    devices.close()


def parameters(selected):
    return [
        pytest.param(
            case,
            id=str(case),
            marks=pytest.mark.xfail(strict=True, reason=DEVIATIONS[str(case)]) if str(case) in DEVIATIONS else (),
        )
        for case in cases()
        if selected(case)
    ]


@pytest.mark.timeout(90)
@pytest.mark.parametrize("case", parameters(lambda case: case.operator in COMMON and case.dtype == torch.float32))
def test_common_operators_on_two_devices(devices, case):
    assert devices.check(case, 2) == "agrees"


@pytest.mark.slow
@pytest.mark.timeout(90)
@pytest.mark.parametrize("case", parameters(lambda case: True))
def test_operator(devices, case, record_property):
    record_property("operator", devices.check(case, 1))


@pytest.mark.parametrize("num_devices", [2, 1])
def test_a_nan_is_every_extreme(devices, num_devices):
    """XLA leaves NaNs out on CPU unless it is told otherwise, and its positions of extremes do."""
    x = torch.tensor([[1.0, math.nan, 3.0, 2.0], [4.0, 2.0, math.inf, 1.0], [-math.inf, math.nan, math.nan, 5.0]])
    x = torch.cat([x, torch.arange(4.0).unsqueeze(0)])

    def extremes(x):
        found = [x.max(), x.min(), x.amax(1), x.amin(0), x.aminmax(dim=0), x.max(1), x.min(0), x.argmax(), x.argmin(1)]
        norm = torch.linalg.vector_norm(x, math.inf)
        return [*found, norm, F.max_pool1d(x, 2), x.cummax(1), x.cummin(0), x.median(1), x.nanmedian(1)]

    result = tw.get(tw.function(extremes, mesh=devices.mesh(num_devices))(x))
    torch.testing.assert_close(result, extremes(x), equal_nan=True)


def test_float64_is_computed_in_float64(devices):
    """torch-xla has constants of float32 in these, and in bilinear resizing and some pooling."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def gradients(x):
        x = x.detach().requires_grad_(True)
        found = [F.gelu(x), F.gelu(x, approximate="tanh"), F.threshold(x, 0.1, 0.7), x.abs().log2(), x.abs().log10()]
        found += [F.layer_norm(1e-3 * x, (8,)), F.avg_pool2d(x, 3, 2, 1), F.adaptive_avg_pool2d(x, 4)]
        found.append(F.ctc_loss(x[0].log_softmax(-1), torch.tensor([[1, 2]] * 8), [3] * 8, [2] * 8))
        found += [F.interpolate(x, scale_factor=1.7, mode=mode) for mode in ("bilinear", "bicubic")]
        found += [
            F.interpolate(x, size=(5, 5), mode="bilinear"),
            F.interpolate(x, (9, 9), mode="bilinear", antialias=True),
        ]
        return found, [torch.autograd.grad(value.square().sum(), x)[0] for value in found]

    results = tw.get(tw.program(tw.function(gradients, mesh=devices.mesh(1)))(x))
    torch.testing.assert_close(results, gradients(x), rtol=1e-10, atol=1e-10)


def test_deviations_are_of_cases():
    assert set(DEVIATIONS) <= set(map(str, cases()))
