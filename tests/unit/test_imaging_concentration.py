"""Signal and concentration into each other."""

import numpy as np
import pytest
import torch

from biomodel.errors import InputError
from biomodel.imaging.concentration import Relaxivity, concentration, relaxivity, to_concentration, to_signal
from biomodel.imaging.t1 import SpoiledGradientEcho
from biomodel.imaging.voxelfit import Code

ECHO = SpoiledGradientEcho(15.0, 0.005, 0.002)
AGENT = Relaxivity(4.5)
WITH_T2STAR = Relaxivity(4.5, r2star=8.0)


def series(agent=AGENT, voxels=50, seed=0):
    """Concentrations with three samples before contrast, T10, S0, B1 and signals."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(0, 6, (voxels, 20)) * (np.arange(20) >= 3)
    t10, s0, b1 = rng.uniform(0.5, 2.5, voxels), rng.uniform(50, 5000, voxels), rng.uniform(0.8, 1.2, voxels)
    signal = to_signal(*(torch.as_tensor(a) for a in (values, t10, s0)), ECHO, agent, b1=torch.as_tensor(b1)).numpy()
    return values, t10, s0, b1, signal


@pytest.mark.parametrize("agent", [AGENT, WITH_T2STAR])
def test_there_and_back(agent):
    values, t10, s0, b1, signal = series(agent)
    found = concentration(signal, t10, ECHO, agent, [0, 1, 2], b1=b1)
    assert (found.code == Code.FITTED).all() and found.counts() == {"fitted": 50}
    np.testing.assert_allclose(found.values, values, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.s0, s0, rtol=1e-9)
    np.testing.assert_allclose(found.noise, 0, atol=1e-9)


def test_neglecting_t2star_underestimates():
    values, t10, _, b1, signal = series(WITH_T2STAR)
    found = concentration(signal, t10, ECHO, AGENT, [0, 1, 2], b1=b1).values
    assert (found[:, 3:] <= values[:, 3:] + 1e-9).all() and (found[:, 3:] < 0.97 * values[:, 3:]).mean() > 0.7


def test_negative_values_are_kept():
    """Noise goes both ways; cutting it at zero would bias every fit."""
    values, t10, _, b1, signal = series()
    noisy = signal * (1 + 0.02 * np.random.default_rng(1).standard_normal(signal.shape))
    found = concentration(noisy, t10, ECHO, AGENT, [0, 1, 2], b1=b1).values
    assert (found[:, :3] < 0).mean() > 0.3
    np.testing.assert_allclose(found[:, :3].mean(1), 0, atol=0.02)


@pytest.mark.parametrize("agent", [AGENT, WITH_T2STAR])
def test_derivatives(agent):
    values, t10, s0, b1, signal = (torch.as_tensor(a[:2]).requires_grad_() for a in series(agent))
    before = signal[:, 0].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda c, t, s, b: to_signal(c, t, s, ECHO, agent, b1=b), (values, t10, s0, b1))
    signal = signal.detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, m, t, b: to_concentration(s, m, t, ECHO, agent, b1=b), (signal, before, t10, b1), rtol=1e-4
    )


@pytest.mark.parametrize("agent", [AGENT, WITH_T2STAR])
def test_reasons(agent):
    _, t10, _, b1, signal = series(agent, 9)
    signal[0, 4], signal[1, 5], signal[2, 6] = np.nan, 0.0, -3.0
    t10[3], b1[4], t10[5] = np.nan, 0.0, -1.0
    signal[6, 10] *= 100  # more than full magnetisation gives
    signal[7] = signal[7] / signal[7].max() * 4095
    found = concentration(signal, t10, ECHO, agent, [0, 1, 2], b1=b1, ceiling=4095)
    n, s = Code.NOT_FINITE, Code.SATURATED
    assert list(found.code) == [n, Code.NO_SIGNAL, Code.NO_SIGNAL, n, n, n, s, s, Code.FITTED]
    assert np.isnan(found.values[:8]).all() and np.isfinite(found.values[8]).all() and np.isnan(found.s0[6])
    assert found.counts() == {"fitted": 1, "not_finite": 4, "no_signal": 2, "saturated": 2}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: concentration(s, 1.0, ECHO, AGENT, []), "no baseline samples"),
        (lambda s: concentration(s, 1.0, ECHO, AGENT, [25]), "samples 25 to 25 of a series of 20"),
        (lambda s: concentration(s[0], 1.0, ECHO, AGENT, [0]), r"expected \(voxels, samples\)"),
        (lambda s: concentration(s, np.ones(7), ECHO, AGENT, [0]), "do not match 50 voxels"),
        (lambda s: concentration(s, 1.0, SpoiledGradientEcho(15, 0.005), WITH_T2STAR, [0]), "echo time TE is missing"),
        (lambda s: Relaxivity(0.0), "r1 is 0.0"),
        (lambda s: Relaxivity(4500.0), "r1 is 4500.0; expected between 0 and 100"),
        (lambda s: relaxivity("gadolinium", 3.0), "no agent 'gadolinium'; there are gadopentetate"),
        (lambda s: relaxivity("gadobutrol", 7.0), r"gadobutrol at 7 T is not in the table \(0.47, 1.5, 3, 4.7 T\)"),
    ],
)  # fmt: skip
def test_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(series()[-1])


def test_relaxivities():
    found = relaxivity(" Gadobutrol ", 2.89)  # what a "3 T" scanner states
    assert found.r1 == 5.0 and "Rohrer" in found.source and found.r2star is None
    assert relaxivity("gadoterate", 1.5).r1 == 3.6
