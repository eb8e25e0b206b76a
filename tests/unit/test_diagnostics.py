"""Checks of posteriors and forecasts, against enumeration, simulation and what is known to be right or wrong."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy.stats import binom, chisquare, kstest, norm

import biomodel as bm
from biomodel.calibration.population import Population
from biomodel.calibration.samples import Chains, Samples
from biomodel.calibration.volumes import VolumeNoise, volume_parameters
from biomodel.diagnostics import (
    check_forecasts,
    coverage,
    independent_draws,
    pit,
    posterior_predictive_check,
    rank_statistics,
    simulate_volumes,
    simulation_based_calibration,
    uniform_band,
    uniform_p,
)
from biomodel.diagnostics_forecasts import CURVE
from biomodel.diagnostics_ranks import _stays
from biomodel.errors import InputError
from biomodel.figure_diagnostics import coverage_curves, pit_histogram, rank_differences, replicates
from biomodel.parameters import JointPrior
from biomodel.scoring import crps
from biomodel.virtual import small_patient

PLAN = bm.Schedule.weekly("paclitaxel", 21.0, 3, 80, "mg/m^2")


# Uniformity -----------------------------------------------------------------------------------------------------------


def test_the_probability_of_staying_inside_is_that_of_enumeration():
    at, low, high = np.array([0.2, 0.5, 0.7]), np.array([0, 1, 2]), np.array([2, 3, 4])
    edges = np.concatenate(([0.0], at, [1.0]))
    total = 0.0
    for cells in product(range(4), repeat=4):
        counts = np.cumsum(np.bincount(cells, minlength=4))[:3]
        if ((counts >= low) & (counts <= high)).all():
            total += np.prod(np.diff(edges)[list(cells)])
    assert _stays(4, at, low, high) == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize(("n", "level"), [(60, 0.95), (300, 0.8)])
def test_the_band_holds_uniform_values_as_often_as_it_says(n, level):
    at = np.arange(1, 32) / 32
    low, high = uniform_band(n, at, level)
    values = np.random.default_rng(0).random((6000, n))
    share = (values[:, None] < at[:, None]).mean(2)
    inside = ((share >= low - 1e-9) & (share <= high + 1e-9)).all(1).mean()
    assert level - 0.012 < inside < level + 0.03
    # Wider than a band for one point alone.
    assert (high - low > (binom.ppf(0.5 + level / 2, n, at) - binom.ppf(0.5 - level / 2, n, at)) / n - 1e-9).all()


def test_p_values_of_uniform_values_are_uniform_and_others_small():
    at, rng = np.arange(1, 20) / 20, np.random.default_rng(1)
    values = rng.random((400, 150))
    p = np.array([uniform_p((v[:, None] < at).sum(0), 150, at) for v in values])
    assert kstest(p, "uniform").statistic < 0.08
    low, high = uniform_band(150, at)
    share = (values[:, None] < at[:, None]).mean(2)
    outside = ((share < low - 1e-9) | (share > high + 1e-9)).any(1)
    assert ((p <= 0.05) == outside).mean() > 0.99, "out of the band where p is small"
    assert uniform_p((rng.beta(2, 2, 150)[:, None] < at).sum(0), 150, at) < 1e-3


def test_bands_of_nonsense_are_refused():
    bad = ((0, [0.5], 0.9), (10, [0.5, 0.4], 0.9), (10, [0.0, 0.5], 0.9), (10, [0.5], 1.0), (10, [], 0.9))
    for n, at, level in bad:
        with pytest.raises(InputError, match="uniform_band"):
            uniform_band(n, np.array(at), level)


# Simulation-based calibration -----------------------------------------------------------------------------------------


def gaussian_study(width=1.0, shift=0.0, replications=320, draws=63):
    """z ~ N(0, 1), y ~ N(z, 0.5²), and its posterior made `width` times as wide and shifted by so many of its sd."""
    precision = 1 + 4.0

    def posterior(y, rng):
        noise = rng.standard_normal((len(y), draws, 2))
        return (y * 4 / precision)[:, None] + (shift + width * noise) / np.sqrt(precision)

    return simulation_based_calibration(
        ("a", "b"), lambda n, rng: rng.standard_normal((n, 2)),
        lambda z, rng: z + 0.5 * rng.standard_normal(z.shape), posterior, replications, seed=4,
    )  # fmt: skip


def test_a_right_posterior_passes():
    found = gaussian_study()
    assert found.bins == 32 and found.replications == 320
    assert (found.chi_squared > 0.01).all() and (found.ecdf_p > 0.01).all()
    for row in found.table():
        assert row["expected"] == 0.125 and 0.06 < row["lowest"] < 0.2 and 0.06 < row["highest"] < 0.2
    np.testing.assert_allclose(found.chi_squared, [chisquare(c).pvalue for c in found.counts])
    low, high = found.band()
    assert ((found.ecdf >= low) & (found.ecdf <= high)).all() == all(r["in_band"] for r in found.table())


@pytest.mark.parametrize(("width", "shift"), [(0.6, 0.0), (1.6, 0.0), (1.0, 0.4)])
def test_a_wrong_posterior_fails_and_tells_how(width, shift):
    found = gaussian_study(width, shift)
    assert (found.chi_squared < 1e-3).all() and (found.ecdf_p < 1e-3).all()
    for row in found.table():
        if width < 1:
            assert min(row["lowest"], row["highest"]) > 0.16
        elif width > 1:
            assert max(row["lowest"], row["highest"]) < 0.09
        else:
            assert row["lowest"] > 0.16 and row["highest"] < 0.09


def test_bins_divide_the_ranks_evenly():
    truth, draws = np.zeros((200, 1)), np.zeros((200, 15, 1))
    assert rank_statistics(("x",), truth, draws).bins == 16
    assert rank_statistics(("x",), truth[:90], draws[:90]).bins == 8
    ranks = rank_statistics(("x",), truth, draws).ranks
    assert ranks.min() == 0 and ranks.max() == 15, "ties are broken at random"
    assert rank_statistics(("x",), truth, draws + 1).ranks.max() == 0


def test_ranks_of_what_is_no_number_are_refused():
    with pytest.raises(InputError, match="expected"):
        rank_statistics(("x",), np.zeros((5, 1)), np.zeros((4, 9, 1)))
    with pytest.raises(InputError, match="not finite"):
        rank_statistics(("x",), np.zeros((5, 1)), np.full((5, 9, 1), np.nan))
    with pytest.raises(InputError, match="5 replications"):
        gaussian_study(replications=5)


def test_independent_draws_follow_weights_and_thin_chains():
    rng = np.random.default_rng(0)
    weighted = Samples(np.array([[0.0], [1.0]]), np.array([0.2, 0.8]))
    assert independent_draws(weighted, 4000, rng).mean() == pytest.approx(0.8, abs=0.03)
    z = np.arange(40.0).reshape(2, 20, 1)
    chains = Samples.of(Chains(z, {}, 0, 0.0, "none"))
    np.testing.assert_array_equal(independent_draws(chains, 4, rng)[:, 0], [0, 13, 26, 39])
    with pytest.raises(InputError, match="41 asked for"):
        independent_draws(chains, 41, rng)


def population(df=8.0):
    drug = bm.Chemotherapy("paclitaxel", bm.LogNormal(0.1, 0.7))
    model = bm.ReactionDiffusion(bm.Exponential(bm.LogNormal(0.02, 0.7)), bm.NoDiffusion(), [drug])
    parameters = volume_parameters(model, 10.0)
    mean, sd = (np.array([getattr(p.prior, what) for p in parameters.values()]) for what in ("location", "scale"))
    joint = JointPrior(tuple(parameters), mean, np.diag(sd**2))
    return Population(model, joint, parameters, VolumeNoise((0.0, 42.0), (0.1, 0.3), df), 0, 0.0, ())


def template(floor=1e-6):
    return bm.Patient.from_volumes("S", [0.0, 21.0, 42.0, 63.0], [1.0] * 4, PLAN, floor=floor)


def test_virtual_patients_follow_the_likelihood():
    people, rng = population(), np.random.default_rng(2)
    z = np.tile(people.gaussian.mean, (500, 1))
    patients = simulate_volumes(people, template(), z, rng)
    logs = np.log([[p.volume_of(v) for v in p.visits] for p in patients])
    middle = np.median(logs, 0)
    k, e, first = np.exp(people.gaussian.mean)
    assert middle[0] == pytest.approx(np.log(first), abs=0.02)
    assert middle[1] == pytest.approx(np.log(first) + 21 * k, abs=0.03), "grows until the first dose"
    scale = people.noise.at(np.array([0.0, 21.0, 42.0, 63.0]))
    for t in range(4):
        assert kstest((logs[:, t] - middle[t]) / scale[t], "t", (8.0,)).pvalue > 0.01
    with pytest.raises(InputError, match="volumes are not above 0"):
        simulate_volumes(people, template(8.0), z, rng)


def test_laplace_of_a_cohort_is_that_of_each_patient():
    people, rng = population(), np.random.default_rng(5)
    truth = rng.multivariate_normal(people.gaussian.mean, people.gaussian.covariance, 4)
    patients = simulate_volumes(people, template(), truth, rng)
    z, covariance = people.laplace(patients)
    for i, patient in enumerate(patients):
        fit = bm.calibrate(people, patient, method=bm.Laplace(bm.MAP(tolerance=1e-3)))
        np.testing.assert_allclose((z[i] - fit.z) / fit.sd, 0.0, atol=0.01)
        np.testing.assert_allclose(covariance[i], fit.covariance, rtol=0.02, atol=1e-4)


# Forecasts ------------------------------------------------------------------------------------------------------------


def forecasts(n=400, draws=199, width=1.0, seed=0):
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal(n)
    return centre[:, None] + width * rng.standard_normal((n, draws)), centre + rng.standard_normal(n)


def test_pit_is_uniform_where_forecasts_are_right_also_at_atoms():
    draws, seen = forecasts()
    found = pit(draws, seen)
    assert kstest(found, "uniform").pvalue > 0.01
    np.testing.assert_allclose(found, norm.cdf(seen - draws.mean(1)), atol=0.2)
    # A third or so of the values at 0, in forecasts and truth alike.
    floored = pit(np.maximum(draws, 0.0), np.maximum(seen, 0.0))
    assert kstest(floored, "uniform").pvalue > 0.01
    np.testing.assert_array_equal(floored, pit(np.maximum(draws, 0.0), np.maximum(seen, 0.0)))
    assert (floored != pit(np.maximum(draws, 0.0), np.maximum(seen, 0.0), seed=1)).any()
    assert pit(np.zeros((1, 9)), np.ones(1))[0] > 0.9 and pit(np.zeros((1, 9)), -np.ones(1))[0] < 0.1


def test_weights_count_like_copies():
    draws, seen = forecasts(n=50, draws=20)
    copies = np.random.default_rng(3).integers(1, 5, 20)
    weights = np.tile(copies / copies.sum(), (50, 1))
    repeated = np.repeat(draws, copies, axis=1)
    found, plain = check_forecasts(draws, seen, weights), check_forecasts(repeated, seen)
    np.testing.assert_allclose(found.pit, plain.pit, atol=0.08)
    np.testing.assert_allclose(found.crps, plain.crps, atol=0.1)
    np.testing.assert_allclose(found.widths.mean(0), plain.widths.mean(0), rtol=0.1)


def test_a_check_of_forecasts_gathers_what_is_known():
    draws, seen = forecasts()
    found = check_forecasts(draws, seen)
    np.testing.assert_allclose(found.crps, [crps(x, y) for x, y in zip(draws, seen, strict=True)])
    np.testing.assert_allclose(found.widths.mean(0), 2 * norm.ppf(0.5 + np.array([0.5, 0.8, 0.9, 0.95]) / 2), rtol=0.03)
    assert found.coverage.inside.all() and found.uniform_p > 0.01
    np.testing.assert_array_equal(found.coverage.low, binom.ppf(0.025, 400, found.coverage.levels) / 400)
    narrow = check_forecasts(*forecasts(width=0.6))
    assert not narrow.coverage.inside.any() and narrow.uniform_p < 1e-4
    assert (narrow.coverage.observed < narrow.coverage.low).all()
    assert narrow.table()[2]["width"] < found.table()[2]["width"] and narrow.crps.mean() > found.crps.mean()
    assert "400 forecasts" in found._repr_html_()


def test_coverage_counts_what_lies_in_central_intervals():
    found = coverage(np.array([0.05, 0.3, 0.5, 0.74, 0.99]), levels=[0.5, 0.95])
    np.testing.assert_allclose(found.observed, [0.6, 0.8])
    assert [r["level"] for r in found.table()] == [0.5, 0.95] and "5 forecasts" in found._repr_html_()
    for bad in ([], [1.2], [np.nan]):
        with pytest.raises(InputError, match="coverage"):
            coverage(np.array(bad))
    with pytest.raises(InputError, match="not finite"):
        check_forecasts(np.full((2, 5), np.nan), np.zeros(2))
    with pytest.raises(InputError, match="expected"):
        pit(np.zeros((2, 5)), np.zeros(3))
    with pytest.raises(InputError, match="weights"):
        pit(np.zeros((2, 5)), np.zeros(2), np.zeros((2, 4)))


# Posterior predictive checks ------------------------------------------------------------------------------------------


def treated(volumes):
    return bm.Patient.from_volumes("V", [0.0, 21.0, 42.0, 63.0], volumes, PLAN, cv=0.15)


def test_volumes_that_the_model_could_have_made_surprise_nobody_and_others_do():
    people = population(df=30.0)
    good = posterior_predictive_check(bm.calibrate(people, treated([10.0, 13.0, 5.0, 6.0])), draws=400)
    assert good.surprising(0.05) == () and len(good.names) == 6 and good.names[-1] == "volume, visit 4"
    assert good.table()[0]["observed"] > 0
    # A tenth of the tumour left before the first dose: growth does not do that.
    jump = posterior_predictive_check(bm.calibrate(people, treated([10.0, 1.0, 10.0, 13.0])), draws=400)
    assert "chi-squared of the residuals" in jump.surprising(0.01)
    assert jump.p[0] < good.p[0] and "Posterior predictive check, 400" in jump._repr_html_()


def test_volume_replicates_follow_the_predictive_law():
    people = population(df=1e9)
    fit = bm.calibrate(people, treated([10.0, 13.0, 5.0, 6.0]))
    check = posterior_predictive_check(fit, draws=4000)
    chi = check.replicated[0]
    # Replicates are drawn about their own parameters: chi-squared of four values, whatever the posterior.
    assert kstest(chi, "chi2", (4,)).pvalue > 1e-3
    forecast = bm.forecast(fit, times=[42.0], draws=4000, seed=9)["measured_volume"].values[:, 0]
    np.testing.assert_allclose(np.quantile(check.replicated[4], [0.1, 0.5, 0.9]),
                               np.quantile(forecast, [0.1, 0.5, 0.9]), rtol=0.08)  # fmt: skip


@pytest.fixture(scope="module")
def imaged():
    known = small_patient(3).patient.until(2)
    return known, bm.calibrate(bm.default_model(known), known)


def test_images_with_more_noise_than_stated_are_found(imaged):
    known, fit = imaged
    good = posterior_predictive_check(fit, draws=60)
    assert good.names == ("chi-squared of the residuals", "largest residual", "volume, visit 2")
    assert good.p[2] > 0.01
    first, second = known.visits
    noisy = second.adc * (1 + 0.3 * np.random.default_rng(0).standard_normal(second.adc.shape))
    bad = replace(known, visits=(first, replace(second, adc=np.clip(noisy, 2e-4, 2.9e-3))))
    other = posterior_predictive_check(replace(fit, patient=bad), draws=60)
    assert set(other.names[:2]) <= set(other.surprising(0.02)) and good.p[0] > other.p[0]
    # The replicates' own misfit does not depend on the data, and is about one per voxel.
    count = int(known.visits[1].region.sum())
    assert 0.5 * count < good.replicated[0].mean() < 1.5 * count


def test_checks_without_a_posterior_are_refused(imaged):
    known, fit = imaged
    with pytest.raises(InputError, match="a MAP fit has no posterior"):
        posterior_predictive_check(replace(fit, covariance=np.zeros_like(fit.covariance)))
    with pytest.raises(InputError, match="draws is 5"):
        posterior_predictive_check(fit, draws=5)


# Figures --------------------------------------------------------------------------------------------------------------


def test_figures_show_what_they_are_given():
    right, wrong = gaussian_study(), gaussian_study(0.6)
    figure = rank_differences({"right": right, "wrong": wrong})
    assert len(figure.axes) == 4 and "a" in figure.axes[0].get_title() and "wrong" in figure.axes[2].get_ylabel()
    line = figure.axes[0].lines[-1]
    np.testing.assert_allclose(line.get_ydata()[1:-1], right.ecdf[0] - right.at)
    assert line.get_color() != figure.axes[2].lines[-1].get_color(), "out of the band in another colour"
    pits = pit(*forecasts())
    curves = coverage_curves({"all": coverage(pits, CURVE)})
    np.testing.assert_allclose(curves.axes[0].lines[-1].get_ydata(), coverage(pits, CURVE).observed)
    histogram = pit_histogram(pits)
    assert histogram.axes[0].get_ylabel() == "forecasts"
    check = posterior_predictive_check(bm.calibrate(population(), treated([10.0, 13.0, 5.0, 6.0])), draws=50)
    assert len(replicates(check).axes) == len(check.names)
    with pytest.raises(InputError, match="no studies"):
        rank_differences({})
    with pytest.raises(InputError, match="no values"):
        pit_histogram(np.array([]))
