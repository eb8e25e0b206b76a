"""Convolution and tracer-kinetic models: exactness, limits, derivatives."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp

from biomodel.errors import InputError
from biomodel.imaging.aif import InputFunction, Parker
from biomodel.imaging.concentration import Relaxivity
from biomodel.imaging.dce import (
    ExtendedTofts,
    Patlak,
    Tofts,
    TwoCompartmentExchange,
    TwoCompartmentUptake,
    tissue_signal,
)
from biomodel.imaging.dce.convolution import convolve, interpolate
from biomodel.imaging.dce.kernels import basis
from biomodel.imaging.t1 import SpoiledGradientEcho

MODELS = {
    Tofts(): (0.2, 0.3),
    ExtendedTofts(): (0.2, 0.3, 0.05),
    Patlak(): (0.05, 0.04),
    TwoCompartmentUptake(): (0.5, 0.08, 0.06),
    TwoCompartmentExchange(): (0.5, 0.1, 0.25, 0.06),
}
CASES = [pytest.param(m, p, id=type(m).__name__) for m, p in MODELS.items()]
KNOTS = np.array([0.0, 1.0, 1.5, 4.0, 9.0, 9.25, 20.0, 60.0])
VALUES = np.array([0.0, 0.2, 5.0, 3.0, 1.0, 2.0, 0.5, 0.4])


def tensor(values):
    return torch.as_tensor(np.asarray(values, dtype=float))


@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.01, 0.2, 0.999, 1.001, 3.0, 80.0])
def test_convolution_is_exact_for_any_step(rate):
    """Against adaptive quadrature of every straight piece."""
    at = np.array([0.0, 0.7, 1.0, 3.3, 9.1, 20.0, 45.0, 60.0, 75.0])

    def piece(t):
        edges = np.unique(np.concatenate([KNOTS[t > KNOTS], [t]]))
        parts = zip(edges[:-1], edges[1:], strict=True)
        return sum(
            quad(lambda s: np.interp(s, KNOTS, VALUES) * np.exp(-rate * (t - s)), a, b, epsabs=1e-13, epsrel=1e-13)[0]
            for a, b in parts
        )

    found = convolve(tensor([rate]), tensor(KNOTS), tensor(VALUES), tensor(at))[0].numpy()
    np.testing.assert_allclose(found, [piece(t) for t in at], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(convolve(tensor([rate]), tensor(KNOTS), tensor(VALUES))[0][-1], found[-2], rtol=1e-13)


@pytest.mark.parametrize("rate", [0.0, 1e-5, 0.05, 0.7, 30.0])
def test_compiled_curves_are_the_same(rate):
    b, d = np.empty(len(KNOTS)), np.empty(len(KNOTS))
    basis(rate, np.diff(KNOTS), VALUES, b, d)
    k = tensor([rate]).requires_grad_()
    curve = convolve(k, tensor(KNOTS), tensor(VALUES))[0]
    np.testing.assert_allclose(b, curve.detach(), rtol=1e-12, atol=1e-13)
    slope = [torch.autograd.grad(c, k, retain_graph=True)[0].item() if i else 0.0 for i, c in enumerate(curve)]
    np.testing.assert_allclose(d, slope, rtol=1e-9, atol=1e-11)


def test_input_outside_of_its_knots():
    at = tensor([-1.0, 0.5, 80.0])
    np.testing.assert_allclose(interpolate(tensor(KNOTS), tensor(VALUES), at)[0], [0.0, 0.1, 0.4])
    assert convolve(tensor([0.1]), tensor(KNOTS), tensor(VALUES), at)[0, 0] == 0


def test_convolution_derivatives():
    rate = tensor([0.03, 0.8]).requires_grad_()
    values = tensor([VALUES, VALUES[::-1].copy()]).requires_grad_()
    at = tensor([[0.3, 5.0, 30.0], [2.0, 9.2, 61.0]]).requires_grad_()
    knots = tensor(KNOTS)
    assert torch.autograd.gradcheck(lambda r, v, a: convolve(r, knots, v, a), (rate, values, at))
    assert torch.autograd.gradgradcheck(lambda r, v: convolve(r, knots, v), (rate, values))


@pytest.mark.parametrize(("model", "parameters"), CASES)
def test_derivatives(model, parameters):
    """Parameters to concentration, with an input and a delay of each voxel's own."""
    theta = tensor([parameters, np.array(parameters) * 1.3]).requires_grad_()
    plasma = tensor([VALUES, 0.7 * VALUES]).requires_grad_()
    delay = tensor([0.4, -0.2]).requires_grad_()
    times = tensor([0.7, 2.2, 6.1, 15.0, 40.0])

    def forward(p, c, d):
        return model.concentration(p, times, tensor(KNOTS), c, d)

    assert torch.autograd.gradcheck(forward, (theta, plasma, delay))


def test_derivatives_of_the_signal():
    """From parameters to signal, and in T1, S0 and B1."""
    model = ExtendedTofts()
    theta = tensor([[0.2, 0.3, 0.05], [0.1, 0.2, 0.02]]).requires_grad_()
    others = [tensor(v).requires_grad_() for v in ([1.2, 0.9], [100.0, 140.0], [0.95, 1.1], [0.2, 0.5])]

    def forward(p, t10, s0, b1, delay):
        return tissue_signal(
            model, p, tensor([0.0, 3.0, 8.0, 30.0]), tensor(KNOTS), tensor(VALUES), t10=t10, s0=s0, b1=b1, delay=delay,
            acquisition=SpoiledGradientEcho(12.0, 0.005, 0.002), relaxivity=Relaxivity(4.5, r2star=6.0),
        )  # fmt: skip

    assert torch.autograd.gradcheck(forward, (theta, *others))


def compartments(ve, exchange_back, parameters, aif, times):
    """Concentration of the two compartments by an ordinary differential equation solver."""
    flow, exchange, vp = parameters
    flow, exchange = flow / 60, exchange / 60

    def slope(t, y):
        plasma, outside = y
        back = exchange * outside / ve if exchange_back else 0.0
        return [
            flow * np.interp(t, aif.times, aif.plasma) - (flow + exchange) * plasma / vp + back,
            exchange * plasma / vp - back,
        ]

    y = solve_ivp(slope, (0, times[-1]), [0.0, 0.0], t_eval=times, rtol=1e-9, atol=1e-12, max_step=0.5).y
    return y.sum(0)


def test_two_compartments_solve_their_equations():
    times = np.arange(0.0, 121.0, 4.0)
    aif = InputFunction.from_blood(times, Parker(arrival=8).blood(times))
    found = TwoCompartmentExchange()(np.array([0.6, 0.15, 0.2, 0.08]), times, aif)[0]
    np.testing.assert_allclose(found, compartments(0.2, True, (0.6, 0.15, 0.08), aif, times), atol=2e-6)
    found = TwoCompartmentUptake()(np.array([0.6, 0.15, 0.08]), times, aif)[0]
    np.testing.assert_allclose(found, compartments(1.0, False, (0.6, 0.15, 0.08), aif, times), atol=2e-6)


def test_limits_of_the_models():
    """Each model is the limit of the next one."""
    times = np.arange(0.0, 301.0, 2.0)
    aif = InputFunction.from_blood(times, Parker(arrival=10).blood(times))
    exchange = TwoCompartmentExchange()(np.array([1e6, 0.1, 0.3, 0.05]), times, aif)
    np.testing.assert_allclose(exchange, ExtendedTofts()(np.array([0.1, 0.3, 0.05]), times, aif), atol=1e-4)
    np.testing.assert_allclose(
        ExtendedTofts()(np.array([0.1, 0.3, 0.0]), times, aif), Tofts()(np.array([0.1, 0.3]), times, aif), atol=1e-14
    )
    slow = ExtendedTofts()(np.array([0.01, 1e7, 0.05]), times, aif)
    np.testing.assert_allclose(slow, Patlak()(np.array([0.01, 0.05]), times, aif), atol=1e-8)
    uptake = TwoCompartmentExchange()(np.array([0.5, 0.05, 1e7, 0.05]), times, aif)
    np.testing.assert_allclose(uptake, TwoCompartmentUptake()(np.array([0.5, 0.05, 0.05]), times, aif), atol=1e-7)


def test_no_exchange_and_no_flow():
    times = np.arange(0.0, 61.0, 2.0)
    aif = InputFunction.from_blood(times, Parker(arrival=4).blood(times))
    for model in (TwoCompartmentUptake(), TwoCompartmentExchange()):
        nothing = np.array([0.0, 0.0, 0.1, 0.1][: len(model.names)])
        np.testing.assert_array_equal(model(nothing, times, aif), 0.0)
        plasma_only = np.array([0.5, 0.0, 0.1, 0.1][: len(model.names)])
        assert np.isfinite(model(plasma_only, times, aif)).all()


def test_wrong_number_of_parameters():
    aif = InputFunction(KNOTS, VALUES)
    with pytest.raises(InputError, match="ExtendedTofts: 2 parameters; expected Ktrans, ve, vp"):
        ExtendedTofts()(np.array([0.1, 0.2]), KNOTS, aif)
