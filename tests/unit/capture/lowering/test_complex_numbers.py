"""Complex numbers become pairs of real ones; no processes."""

import pytest
import torch

from tests.local_session import LocalSession
from torchways.controller.function import make_function


def rotary(x):
    turns = torch.polar(torch.ones(4, 3), torch.arange(12.0).reshape(4, 3))
    return torch.view_as_real(torch.view_as_complex(x.reshape(2, 4, 3, 2)) * turns).flatten(2)


def correlation(x):
    spectrum = torch.fft.rfft(x, dim=1)
    return torch.fft.irfft(spectrum * torch.conj(torch.fft.rfft(x * 2, dim=1)), n=4, dim=1)


def short_time(x):
    return torch.stft(x.flatten(1), 8, 4, window=torch.hann_window(8), return_complex=True).abs()


FUNCTIONS = {
    "rotary": rotary,
    "correlation": correlation,
    "short_time": short_time,
    "all_dims": lambda x: torch.fft.fftn(x, dim=(1, 2)).real,
    "odd_size": lambda x: torch.fft.irfft(torch.fft.rfft(x), n=5),
    "power": lambda x: torch.fft.rfft2(x, norm="ortho").abs(),
    "division": lambda x: (torch.fft.ifft(x.to(torch.complex64) * (1 + 2j)) / (x + 3j)).imag,
    "angle": lambda x: torch.exp(torch.fft.fft(x) * 0.1).angle(),
    "shift": lambda x: torch.fft.fftshift(torch.fft.fft(x)).real,
    "joined": lambda x: torch.cat([torch.fft.fft(x), torch.fft.fft(x).sum(1, keepdim=True)], 1).real,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients(name):
    function = FUNCTIONS[name]
    torch.manual_seed(0)
    session = LocalSession()

    def with_gradient(x):
        x = x.detach().requires_grad_()
        result = function(x)
        result.square().sum().backward()
        return result.detach(), x.grad

    x = torch.randn(2, 4, 6)
    ours = make_function(with_gradient, session.mesh(), lambda: session)
    for result, expected in zip(ours(x), with_gradient(x), strict=True):
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-4, atol=1e-4)
    for operator in ("view_as_complex", "view_as_real", "polar", "complex", "_fft_r2c", "_fft_c2c", "_fft_c2r"):
        assert session.num_operators(operator) == 0
