"""Drug maps: mean 1 in the tumour, finite in the whole mask, and what was missing is said."""

import numpy as np
import pytest
from scipy.integrate import quad

import biomodel as bm
from biomodel.domain import Domain
from biomodel.errors import GeometryError, InputError
from biomodel.imaging.drugmap import drug_map, ktrans_per_plasma, region_maximum, tofts_supply
from biomodel.imaging.voxelfit import Code
from biomodel.visit import Visit, check_visit

SHAPE, SPACING = (4, 16, 16), (3.0, 1.5, 1.5)


@pytest.fixture
def scene():
    z, y, x = np.indices(SHAPE)
    mask = (y - 7.5) ** 2 + (x - 7.5) ** 2 < 60
    region = (y - 7.5) ** 2 + (x - 7.5) ** 2 < 14
    supply = 0.2 + 0.02 * x + 0.05 * region
    return Domain.box(SHAPE, SPACING, mask=mask), region, supply


def test_map_has_mean_one_in_the_region_whatever_its_unit(scene):
    domain, region, supply = scene
    found = drug_map(supply, region, domain, winsor=1.0)
    assert found.values[region].mean() == pytest.approx(1)
    np.testing.assert_allclose(found.values[domain.mask], supply[domain.mask] / found.scale)
    assert (found.values[~domain.mask] == 0).all() and not found.filled.any()
    np.testing.assert_allclose(drug_map(60 * supply, region, domain).values, drug_map(supply, region, domain).values)
    largest = drug_map(supply, region, domain, winsor=1.0, scale=region_maximum)
    assert largest.values[region].max() == pytest.approx(1)
    second = drug_map(2 * supply, region, domain, winsor=1.0, scale=lambda _: found.scale)
    assert second.values[region].mean() == pytest.approx(2)


def test_a_visit_takes_the_map_as_it_is_and_the_model_kills_in_proportion(scene):
    domain, region, supply = scene
    supply[np.random.default_rng(0).random(SHAPE) < 0.2] = np.nan
    found = drug_map(supply, region, domain)
    visit = Visit(1, 0.0, region=region, drug_map=found.values)
    check_visit(visit, domain, {name: name for name in ("adc", "region", "drug_map")})
    model = bm.ReactionDiffusion(bm.Logistic(), bm.NoDiffusion(), [bm.Chemotherapy("paclitaxel", map="drug_map")])
    schedule = bm.Schedule.weekly("paclitaxel", start=1, n=1, amount=80, units="mg/m^2")
    simulation = bm.TorchSolver(rtol=1e-5).build(model, domain, schedule, fields={"drug_map": found.values})
    u0 = 1e-3 * domain.mask
    values = {"growth.k": 1e-6, "paclitaxel.efficacy": 0.1}
    last = simulation(values, u0, [10.0])[0, 0].numpy()
    exponent = -np.log(last[domain.mask] / 1e-3)
    expected = 0.1 * (1 - np.exp(-0.35 * 9)) / 0.35 * found.values[domain.mask]
    np.testing.assert_allclose(exponent, expected, rtol=1e-3, atol=1e-4)


def test_missing_voxels_are_filled_from_their_own_tissue(scene):
    domain, region, supply = scene
    supply = np.where(region, 4.0, 1.0)
    hole = np.zeros(SHAPE, bool)
    hole[1, 7:9, 7:9] = hole[2, 0:8, 3] = True
    code = np.where(hole, Code.NO_ENHANCEMENT, Code.FITTED)
    found = drug_map(np.where(hole, 1e9, supply), region, domain, code=code)
    np.testing.assert_array_equal(found.filled, hole & domain.mask)
    np.testing.assert_allclose(found.values[region], 1)
    np.testing.assert_allclose(found.values[hole & region], 1)
    beyond = hole & domain.mask & ~region
    assert ((0.25 <= found.values[beyond]) & (found.values[beyond] <= 1)).all()


def test_a_map_known_in_the_region_alone_reaches_the_whole_mask(scene):
    domain, region, supply = scene
    found = drug_map(np.where(region, supply, np.nan), region, domain, reach_mm=0.5)
    assert np.isfinite(found.values).all() and found.values[domain.mask].min() > 0
    assert found.filled.sum() == (domain.mask & ~region).sum()
    # The nearest measured voxel counts where none is in reach.
    assert found.values[0, 7, 0] == pytest.approx(found.values[0, 7, 4])


def test_negative_and_extreme_values_are_bounded_and_counted(scene):
    domain, region, supply = scene
    supply[0, 7, 7], supply[0, 7, 1] = -3.0, 500.0
    found = drug_map(supply, region, domain)
    assert found.negative == 1 and found.values[0, 7, 7] == 0
    assert found.above >= 1 and found.values.max() < 2
    assert found.values[region].mean() == pytest.approx(1)


def test_maps_that_cannot_be_used_are_refused(scene):
    domain, region, supply = scene
    sparse = np.where(np.random.default_rng(1).random(SHAPE) < 0.7, np.nan, supply)
    for arguments, error, match in (
        ((sparse, region, domain), InputError, "of the region's"),
        ((0 * supply, region, domain), InputError, "counts as 1"),
        ((supply[1:], region, domain), GeometryError, "supply of shape"),
        ((supply, region.astype(int), domain), InputError, "expected bool"),
        ((supply, region & False, domain), InputError, "0 voxels in the region"),
        ((supply, np.ones(SHAPE, bool), domain), InputError, "outside"),
    ):
        with pytest.raises(error, match=match):
            drug_map(*arguments)
    with pytest.raises(InputError, match="quantile"):
        drug_map(supply, region, domain, winsor=0.2)
    with pytest.raises(GeometryError, match="code of shape"):
        drug_map(supply, region, domain, code=np.zeros(3))


def test_area_under_the_tofts_curve_is_exact():
    times = np.array([0.0, 10, 25, 60, 200, 900])
    plasma = np.array([0.0, 6, 4, 2, 1, 0.2])

    def cp(s):
        return np.interp(s, times, plasma)

    ktrans, ve, vp = 0.25, 0.3, 0.05
    kep = ktrans / ve / 60

    def concentration(t):
        inner = quad(lambda s: cp(s) * np.exp(-kep * (t - s)), 0, t, points=[p for p in times if 0 < p < t], limit=200)
        return vp * cp(t) + ktrans / 60 * inner[0]

    expected = quad(concentration, 0, 900, points=times[1:-1], limit=200, epsabs=1e-6)[0]
    assert tofts_supply(ktrans, ve, vp, times, plasma) == pytest.approx(expected, rel=1e-6)
    # Without leakage only plasma counts; with very much, plasma and the space outside the vessels.
    area = np.trapezoid(plasma, times)
    assert tofts_supply(0.0, ve, vp, times, plasma) == pytest.approx(vp * area, rel=1e-9)
    assert tofts_supply(1e5, ve, vp, times, plasma) == pytest.approx((vp + ve) * area, rel=1e-3)
    # No jump where the series for small rates takes over.
    at = tofts_supply(np.array([0.99, 1.01]) * 1e-4 * 60 * ve / 35, ve, vp, times, plasma)
    assert abs(at[1] - at[0]) / at[0] < 1e-3 and at[1] > at[0]


def test_supplies_are_missing_where_parameters_are():
    times, plasma = np.array([0.0, 10.0]), np.array([1.0, 1.0])
    bad = tofts_supply([0.1, np.nan, -0.1, 0.1], [0.3, 0.3, 0.3, 0.0], 0.02, times, plasma)
    assert list(np.isnan(bad)) == [False, True, True, True]
    np.testing.assert_allclose(ktrans_per_plasma([0.1, 0.1, 0.2], [0.05, 0.001, np.nan]), [2.0, np.nan, np.nan])
    with pytest.raises(InputError, match="growing times"):
        tofts_supply(0.1, 0.3, 0.02, times[::-1], plasma)
    with pytest.raises(GeometryError, match="expected the same"):
        ktrans_per_plasma([0.1], [0.1, 0.2])
