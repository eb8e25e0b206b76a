"""Arterial inputs: population functions, selection, arrival, and what is refused."""

import numpy as np
import pytest

from biomodel.errors import InputError
from biomodel.imaging.aif import (
    Georgiou,
    InputFunction,
    McGrath,
    Parker,
    arrival_time,
    baseline_samples,
    input_from_mask,
    select_artery,
)
from biomodel.imaging.dce import ExtendedTofts

TIMES = 2.0 * np.arange(120)


def test_mcgrath():
    """Table 1, model B: a rise of 7 s to A1 + A2, then two exponentials."""
    found = McGrath(arrival=5).blood(np.array([0.0, 5.0, 8.5, 12.0, 42.0]))
    np.testing.assert_allclose(found, [0, 0, 2.605, 5.21, 3.4 * np.exp(-1.35) + 1.81 * np.exp(-0.045)], rtol=1e-12)


@pytest.mark.parametrize("kind", [Parker, Georgiou, McGrath])
def test_population_inputs(kind):
    t = np.linspace(0, 1200, 4000)
    early, late = kind().blood(t), kind(arrival=30.0, scale=0.5).blood(t + 30)
    np.testing.assert_allclose(late, 0.5 * early, rtol=1e-9, atol=1e-12)
    assert (kind(arrival=30.0).blood(t[t < 30]) == 0).all()
    assert (early >= 0).all() and np.isfinite(early).all() and 4 < early.max() < 10
    with pytest.raises(InputError, match="finite"):
        kind().blood(np.array([0.0, np.nan]))


def test_plasma_and_blood():
    blood = Parker(arrival=10).blood(TIMES)
    found = InputFunction.from_blood(TIMES, blood, haematocrit=0.45)
    np.testing.assert_allclose(found.plasma * 0.55, blood)
    np.testing.assert_allclose(found.at(np.array([-5.0, 11.0, 999.0])), [0, found.plasma[5:7].mean(), found.plasma[-1]])
    fine = InputFunction.of(Parker(arrival=10), 238.0, 0.45)
    np.testing.assert_allclose(fine.at(TIMES), found.plasma, atol=1e-12)


@pytest.mark.parametrize("arrival", [20.0, 21.0, 23.3, 31.7])
def test_arrival(arrival):
    """Of arteries and of tissue, within one step of 2 s; with noise within two on the median."""
    artery = InputFunction.of(Parker(arrival=arrival), 240.0)
    tissue = ExtendedTofts()(np.array([[0.2, 0.3, 0.05], [0.1, 0.4, 0.01]]), TIMES, artery)
    curves = np.concatenate([artery.at(TIMES)[None], tissue])
    np.testing.assert_allclose(arrival_time(curves, TIMES), arrival, atol=4.0)
    noisy = tissue[:1] + 0.02 * np.random.default_rng(0).standard_normal((300, 120))
    assert abs(np.median(arrival_time(noisy, TIMES)) - arrival) <= 6.0


def test_no_arrival():
    curves = np.stack([np.ones(120), np.linspace(5, 1, 120), np.full(120, np.nan)])
    assert np.isnan(arrival_time(curves, TIMES)).all()


def test_baseline():
    artery = 100 + 50 * InputFunction.of(Parker(arrival=20), 240.0).at(TIMES)
    found = baseline_samples(artery, TIMES)
    assert found[0] == 0 and 8 <= found[-1] <= 12 and len(found) == found[-1] + 1


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (InputFunction.of(Parker(arrival=0), 240.0).at(TIMES + 8), "no baseline"),
        (InputFunction.of(Parker(arrival=0), 240.0).at(TIMES + 20), "baseline of two images"),
        (np.ones(120), "does not rise"),
        (np.random.default_rng(0).standard_normal(120) + 100, "no bolus|no baseline|ends below"),
        (np.append(np.ones(119), np.nan), "not finite"),
    ],
)
def test_series_without_a_baseline_or_a_bolus(curve, message):
    with pytest.raises(InputError, match=message):
        baseline_samples(curve, TIMES)


def volume():
    """Concentrations of 40 artery voxels in 4000 of tissue, air and veins, and which are which."""
    rng = np.random.default_rng(0)
    artery, vein = Parker(arrival=20), Parker(arrival=32)
    tissue = ExtendedTofts()(
        rng.uniform((0.01, 0.1, 0.01), (0.4, 0.5, 0.15), (3000, 3)), TIMES, InputFunction.of(artery, 240.0)
    )
    wide = np.stack([vein.blood(TIMES - s) for s in np.linspace(0, 16, 9)]).mean(0)
    parts = [
        rng.uniform(0.85, 1.0, (40, 1)) * artery.blood(TIMES),
        rng.uniform(0.6, 1, (60, 1)) * wide,
        tissue,
        np.zeros((900, 120)),
    ]
    curves = np.concatenate(parts) + 0.03 * rng.standard_normal((4000, 120))
    curves[3500] = np.nan
    return curves, np.arange(4000) < 40


def test_artery_is_found():
    curves, truth = volume()
    found = select_artery(curves, TIMES)
    assert found.sum() >= 5 and truth[found].all()
    measured = input_from_mask(curves, found, TIMES, haematocrit=0.4)
    off = measured.plasma * 0.6 / 0.925 - Parker(arrival=20).blood(TIMES)
    assert np.abs(off).max() < 0.35
    np.testing.assert_array_equal(found, select_artery(curves, TIMES))  # no chance in it


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, m: select_artery(np.zeros((100, 120)), TIMES), "0 voxels with contrast agent"),
        (lambda c, m: select_artery(c[:, 40:], TIMES[40:]), "no baseline|does not rise|ends below"),
        (lambda c, m: input_from_mask(c, np.zeros(4000, dtype=bool), TIMES), "none of the 0 voxels"),
        (lambda c, m: input_from_mask(c, m[:7], TIMES), "mask of shape"),
        (lambda c, m: input_from_mask(c, m, TIMES, haematocrit=45), "haematocrit is 45; expected a fraction"),
        (lambda c, m: InputFunction(TIMES, np.zeros(120)), "no contrast agent in it"),
        (lambda c, m: InputFunction(TIMES, np.full(120, np.nan)), "must be finite"),
        (lambda c, m: InputFunction(TIMES[::-1], np.ones(120)), "increase from sample to sample"),
        (lambda c, m: InputFunction(TIMES[:5], np.ones(120)), "5 times for 120 samples"),
        (lambda c, m: InputFunction.of(Parker(), 0.2), "expected 0 < step < end"),
    ],
)
def test_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(*volume())
