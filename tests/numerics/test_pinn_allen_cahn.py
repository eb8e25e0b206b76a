"""Allen-Cahn by a network: derivatives of its residual, and its error against a spectral solver."""

import pytest
import torch

from allen_cahn import Cahn, error, points, reference, solve
from pinn.network import Network


def test_derivatives_of_the_residual():
    network = Network(torch.ones(1, dtype=torch.float64), 3, (5, 5), 1)
    w = 3 * network.start(0)
    at = points(network, w, 40, 0)
    residual, jacobian = at.linear(w)
    step = 1e-6 * torch.randn(len(w), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = (at.value(w + step) - at.value(w - step)) / 2
    assert torch.allclose(residual, at.value(w), atol=1e-14)
    assert torch.allclose(jacobian @ step, found, atol=1e-6 * float(found.abs().max()))


def test_residual_is_that_of_the_equation():
    """u_t - 1e-4 u_xx + 5 u³ - 5 u, by differences of the network's own state."""
    network = Network(torch.ones(1, dtype=torch.float64), 3, (5, 5), 1)
    w = 3 * network.start(0)
    x, t = torch.tensor([0.1, 0.35, 0.52, 0.8], dtype=torch.float64), torch.tensor([0.1, 0.5, 0.6, 0.3]).double()

    def u(dx=0.0, dt=0.0):
        return Cahn(network, x + dx, t + dt).state(w)

    h = 1e-4
    u_t = (u(dt=h) - u(dt=-h)) / (2 * h)
    u_xx = (u(h) - 2 * u() + u(-h)) / h**2
    expected = u_t - 1e-4 * u_xx + 5 * u() ** 3 - 5 * u()
    assert torch.allclose(Cahn(network, x, t).value(w), expected, atol=2e-5)


@pytest.mark.slow
def test_error_against_the_spectral_solver():
    truth = reference(2048)
    network, w = solve(16, 1500, 3, 60, 0)
    nothing = error(network, 0 * w, truth)
    found = error(network, w, truth)
    print(f"relative L2 error: splitting alone {nothing:.1e}, network {found:.1e}")
    assert 3e-3 < nothing < 1e-2
    assert found < 1e-4
