"""T1 mapping: recovery, intervals, derivatives, and what is refused."""

import numpy as np
import pytest
import torch

from biomodel.errors import InputError
from biomodel.imaging.t1 import (
    InversionPrepared,
    InversionRecovery,
    SpoiledGradientEcho,
    fit_t1,
    inversion_recovery,
    vfa_linear,
    vfa_nonlinear,
    vfa_two_angles,
)
from biomodel.imaging.voxelfit import Code

ANGLES, TR = (2.0, 5.0, 10.0, 15.0, 20.0), 0.006


def signals(acquisitions, t1, s0, b1=1.0):
    t1, s0 = torch.as_tensor(np.asarray(t1, dtype=float)), torch.as_tensor(np.asarray(s0, dtype=float))
    factor = torch.as_tensor(np.broadcast_to(np.asarray(b1, dtype=float), t1.shape).copy())
    return torch.stack([a.signal(1 / t1, s0, factor) for a in acquisitions], 1).numpy()


def echoes(angles=ANGLES):
    return [SpoiledGradientEcho(a, TR) for a in angles]


def truth(count=200, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0.1, 4.0, count), 10 ** rng.uniform(1, 5, count), rng.uniform(0.7, 1.3, count)


@pytest.mark.parametrize("method", [vfa_nonlinear, vfa_linear])
def test_variable_flip_angles(method):
    t1, s0, b1 = truth()
    found = method(signals(echoes(), t1, s0, b1), ANGLES, TR, b1=b1)
    assert found.names == ("T1", "S0") and found.units == ("s", "1")
    assert (found.code == Code.FITTED).all()
    np.testing.assert_allclose(found["T1"], t1, rtol=1e-6)
    np.testing.assert_allclose(found["S0"], s0, rtol=1e-6)
    # A wrong flip angle is a wrong T1, by about its square.
    wrong = method(signals(echoes(), t1, s0, b1), ANGLES, TR)["T1"]
    np.testing.assert_allclose(wrong, t1 * b1**2, rtol=0.05)


def test_steady_state_by_its_recursion():
    """The closed form of the spoiled gradient echo, and of a train after an inversion, pulse by pulse."""
    t1, angle = 0.9, np.deg2rad(8.0)
    echo = SpoiledGradientEcho(8.0, TR)
    prepared = InversionPrepared(0.3, 8.0, TR, 40, delay=0.25, centre=0.5)
    decay = np.exp(-TR / t1)
    m = 1.0
    for _ in range(5000):
        m = 1 + (m * np.cos(angle) - 1) * decay
    assert signals([echo], [t1], [1.0])[0, 0] == pytest.approx(m * np.sin(angle), rel=1e-9)
    m, seen = 1.0, 0.0
    for _ in range(60):
        m = 1 + (-m - 1) * np.exp(-0.3 / t1)
        for pulse in range(40):
            if pulse == 20:
                seen = abs(m) * np.sin(angle)
            m = 1 + (m * np.cos(angle) - 1) * decay
        m = 1 + (m - 1) * np.exp(-0.25 / t1)
    assert signals([prepared], [t1], [1.0])[0, 0] == pytest.approx(seen, rel=1e-9)


def test_inversion_recovery():
    times = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)
    t1, s0, _ = truth()
    made = signals([InversionRecovery(t, 5.0, 0.95) for t in times], t1, s0)
    found = inversion_recovery(made, times, tr=5.0, efficiency=0.95)
    assert (found.code == Code.FITTED).all()
    np.testing.assert_allclose(found["T1"], t1, rtol=1e-5)


def test_few_inversion_times_do_not_hide_the_lowest_minimum():
    """Just beyond the T1 at which a sample passes zero, its magnitude has a minimum of its own."""
    times, t1 = (0.1, 0.4, 1.0, 2.5), np.linspace(0.2, 3.0, 400)
    made = signals([InversionRecovery(t, 4.0) for t in times], t1, np.full(400, 100.0))
    found = inversion_recovery(made, times, tr=4.0)
    np.testing.assert_allclose(found["T1"], t1, rtol=1e-5)


def test_flip_angles_and_inversion_together_give_b1():
    acquisitions = [
        InversionPrepared(0.2, 5.0, 0.0054, 160),
        InversionPrepared(1.1, 5.0, 0.0054, 160),
        *echoes((2.0, 5.0, 12.0)),
    ]
    t1, s0, b1 = truth()
    found = fit_t1(signals(acquisitions, t1, s0, b1), acquisitions, fit_b1=True)
    assert found.names == ("T1", "S0", "B1")
    ok = found.code == Code.FITTED
    assert ok.mean() > 0.95
    np.testing.assert_allclose(found["T1"][ok], t1[ok], rtol=1e-4)
    np.testing.assert_allclose(found["B1"][ok], b1[ok], rtol=1e-4)


def test_intervals_cover():
    """95 % intervals, 4000 voxels; noise estimated and known."""
    rng = np.random.default_rng(0)
    t1, s0 = rng.uniform(0.5, 2.0, 4000), np.full(4000, 1000.0)
    data = signals(echoes(), t1, s0) + 0.5 * rng.standard_normal((4000, 5))
    for noise in (None, 0.5):
        found = vfa_nonlinear(data, ANGLES, TR, noise=noise)
        for name, value in (("T1", t1), ("S0", s0)):
            low, high = found.interval(name)
            assert 0.93 <= ((low <= value) & (value <= high)).mean() <= 0.97


def test_nonlinear_is_less_biased_than_the_line():
    rng = np.random.default_rng(1)
    data = signals(echoes(), np.full(4000, 1.5), np.full(4000, 1000.0)) + 6 * rng.standard_normal((4000, 5))
    line, curve = (np.nanmedian(m(data, ANGLES, TR)["T1"]) - 1.5 for m in (vfa_linear, vfa_nonlinear))
    assert abs(curve) < 0.5 * abs(line)


def test_two_angles():
    t1, s0, b1 = truth(20)
    pair = (3.0, 15.0)
    data = signals(echoes(pair), t1, s0, b1)
    found = vfa_two_angles(data, pair, TR, b1=b1)
    np.testing.assert_allclose(found["T1"], t1, rtol=1e-9)
    assert np.isnan(found.sd("T1")).all()  # no residual is left to take it from
    assert (vfa_two_angles(data, pair, TR, b1=b1, noise=1.0).sd("T1") > 0).all()
    with pytest.raises(InputError, match="5 flip angles; expected two"):
        vfa_two_angles(data, ANGLES, TR)


def test_derivatives():
    r1, s0, b1 = (
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.4, 2.0], [50.0, 80.0], [0.9, 1.1])
    )
    for acquisition in (
        SpoiledGradientEcho(12.0, TR), InversionRecovery(0.4, 4.0, 0.9), InversionPrepared(0.2, 5.0, 0.005, 100, 0.1)
    ):  # fmt: skip
        assert torch.autograd.gradcheck(acquisition.signal, (r1, s0, b1))


@pytest.mark.parametrize("method", [vfa_nonlinear, vfa_linear])
def test_reasons(method):
    t1, s0, _ = truth(6)
    data = signals(echoes(), t1, s0)
    data[0, 2], data[1, 0], data[2, 3] = np.nan, 0.0, -1.0
    b1 = np.ones(6)
    b1[3] = np.nan
    found = method(data, ANGLES, TR, b1=b1)
    assert list(found.code) == [Code.NOT_FINITE, Code.NO_SIGNAL, Code.NO_SIGNAL, Code.NOT_FINITE, 0, 0]
    assert np.isnan(found.values[:4]).all() and np.isfinite(found.values[4:]).all()
    assert found.counts() == {"fitted": 2, "not_finite": 2, "no_signal": 2}


def test_signals_that_no_t1_gives():
    """Growing with the angle as the sine and faster: longer than any T1."""
    rising = np.sin(np.deg2rad(ANGLES))[None] * 100
    assert vfa_nonlinear(rising, ANGLES, TR).code[0] == Code.AT_BOUND
    line = vfa_linear(np.array([[1.0, 10.0, 40.0, 90.0, 160.0]]), ANGLES, TR)
    assert line.code[0] == Code.SATURATED and np.isnan(line["T1"][0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: vfa_nonlinear(s, None, TR), "flip angles are missing"),
        (lambda s: vfa_nonlinear(s, ANGLES, None), "repetition time TR is missing"),
        (lambda s: vfa_nonlinear(s, (2.0, 5.0, 10.0, 15.0, 200.0), TR), "flip angle is 200; expected"),
        (lambda s: vfa_nonlinear(s, (0.0, 5.0, 10.0, 15.0, 20.0), TR), "flip angle is 0; expected more than 0"),
        (lambda s: vfa_nonlinear(s, ANGLES, 6.0), "TR is 6; expected more than 0 and at most 1 s"),
        (lambda s: vfa_nonlinear(s, ANGLES, -0.006), "TR is -0.006"),
        (lambda s: vfa_nonlinear(s, ANGLES[:3], TR), r"signal of shape \(4, 5\); expected \(voxels, 3\)"),
        (lambda s: vfa_linear(s, (5.0,) * 5, TR), "all flip angles are the same"),
        (lambda s: fit_t1(s, echoes(), fit_b1=True), "B1 cannot be told from T1"),
        (lambda s: fit_t1(s[:, :1], echoes((5.0,))), "1 acquisitions for 2 parameters"),
        (lambda s: fit_t1(s, echoes((5.0,) * 5)), "acquisitions repeat each other"),
        (lambda s: inversion_recovery(s, None), "inversion times are missing"),
        (lambda s: inversion_recovery(s, (0.1, 0.2, 0.3, 0.4, 0.5), tr=0.3), "repetition time TR is 0.3"),
        (lambda s: InversionPrepared(0.2, 5.0, 0.005, 100, centre=1.5), "centre 1.5"),
        (lambda s: SpoiledGradientEcho(10.0, 0.005, te=0.01), "echo time TE is 0.01"),
    ],
)  # fmt: skip
def test_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(np.ones((4, 5)))
