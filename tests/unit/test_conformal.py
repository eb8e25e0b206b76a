"""Conformal adjustment: coverage of exchangeable patients, by theory and by MAPIE; groups, maps, files, refusals."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta, betabinom, norm

import biomodel as bm
from biomodel.conformal import (
    Adjustment,
    CubeRoot,
    Identity,
    Logarithm,
    as_measured,
    draws_of,
    fewest,
    known_region,
    learn_adjustment,
    map_coverage,
    quantile_crps,
    score_ends,
    scores,
)
from biomodel.conformal_scores import FLOOR, values_at
from biomodel.errors import InputError
from biomodel.scoring import crps
from biomodel.virtual import small_patient

SIGNED = Identity(lowest=-np.inf)


def learn(draws, observed, scale=SIGNED, least=0.1, groups=None) -> Adjustment:
    return learn_adjustment(draws, observed, quantity="volume", units="cm^3", cohort="made up", virtual=True,
                            scale=scale, least_spread=least, groups=groups)  # fmt: skip


def cohort(rng, n, bias=0.8, wide=2.0, size=60):
    """Forecasts (draws,) with a bias and a spread too small, and what was seen."""
    centre, spread = rng.normal(0, 3, n), rng.uniform(0.5, 1.5, n)
    draws = [c + s * rng.standard_normal(size) for c, s in zip(centre, spread, strict=True)]
    return draws, [c + s * (bias + wide * rng.standard_normal()) for c, s in zip(centre, spread, strict=True)]


def held(adjustment, draws, observed, level, groups=None) -> np.ndarray:
    """Share of each patient's values in the interval."""
    found = []
    for i, (x, y) in enumerate(zip(draws, observed, strict=True)):
        low, high = adjustment.interval(x, level, None if groups is None else groups[i])
        found.append(np.mean((low <= y) & (y <= high)))
    return np.array(found)


# Scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [Identity(), CubeRoot(), Logarithm(0.1)])
def test_values_and_scores_are_each_others_inverse(scale):
    rng = np.random.default_rng(0)
    draws = rng.gamma(3.0, 2.0, (50, 6)) + 20.0
    for t in np.linspace(-4, 4, 33):
        seen = values_at(draws, np.array([t]), scale, 0.05)[0]
        np.testing.assert_allclose(scores(draws, seen, scale, 0.05), t, atol=1e-9)


def test_scores_are_those_of_a_normal_forecast():
    n = 4001
    draws = norm.ppf(np.arange(1, n) / n)[:, None] * 2.0 + 5.0
    for t in (-3.0, -1.2, 0.0, 0.4, 2.5):
        assert scores(draws, np.array([5.0 + 2.0 * t]), SIGNED, 1e-9)[0] == pytest.approx(t, abs=1e-3)


def test_an_atom_at_the_end_of_the_scale_holds_all_scores_below():
    draws = np.concatenate([np.zeros(30), np.linspace(1, 2, 30)])[:, None]
    low, high = score_ends(draws, np.array([0.0]), Identity(), 0.1)
    assert low[0] == FLOOR
    # Half of the draws are 0, so about half of the probability.
    assert norm.cdf(high[0]) == pytest.approx(30 / 61, abs=1e-9)
    drawn = [scores(draws, np.array([0.0]), Identity(), 0.1, seed)[0] for seed in range(400)]
    assert np.mean(norm.cdf(drawn)) == pytest.approx(15 / 61, abs=0.025)


# Coverage -------------------------------------------------------------------------------------------------------------


def test_coverage_is_that_of_order_statistics():
    # Given the cohort of n = 49, the coverage of the 80 % interval is Beta(40, 10): between scores 5 and 45 of 49.
    rng, n, new = np.random.default_rng(1), 49, 40
    counts = []
    for _ in range(250):
        adjustment = learn(*cohort(rng, n))
        counts.append(int(held(adjustment, *cohort(rng, new), 0.8).sum()))
    law = betabinom(new, 40, 10)
    assert np.mean(counts) / new == pytest.approx(0.8, abs=3.5 * law.std() / new / np.sqrt(len(counts)))
    assert np.std(counts) == pytest.approx(law.std(), rel=0.15)
    assert beta(40, 10).mean() == pytest.approx(0.8)


def test_unadjusted_forecasts_of_that_cohort_fail():
    draws, observed = cohort(np.random.default_rng(2), 2000)
    ends = [np.quantile(x, [0.1, 0.9]) for x in draws]
    raw = np.mean([a <= y <= b for (a, b), y in zip(ends, observed, strict=True)])
    assert raw < 0.55, "or the tests of coverage would test nothing"


def test_maps_are_held_on_average_over_patients_not_voxels():
    rng, n = np.random.default_rng(3), 79

    def maps(count):
        draws, observed = [], []
        for _ in range(count):
            # Large tumours are forecast worst: pooling voxels would let them decide for all.
            size = int(rng.choice([4, 60]))
            error = (2.0 if size > 30 else 0.5) * rng.standard_normal() + 0.3 * rng.standard_normal(size)
            draws.append(rng.standard_normal((40, size)))
            observed.append(error)
        return draws, observed

    found = [held(learn(*maps(n)), *maps(50), 0.9).mean() for _ in range(80)]
    # Conformal risk control: at least the level, and above it by at most 2 (largest loss) / (n + 1) for each tail.
    error = 3 * np.std(found) / np.sqrt(len(found))
    assert 0.9 - error < np.mean(found) < 0.9 + 4 / (n + 1) + error
    assert error < 0.015


def test_groups_are_held_each_and_one_adjustment_for_all_fails_both():
    rng = np.random.default_rng(4)

    def two(count):
        easy, hard = cohort(rng, count, 0.0, 0.4), cohort(rng, count, -1.0, 4.0)
        return easy[0] + hard[0], easy[1] + hard[1], ["easy"] * count + ["hard"] * count

    draws, observed, groups = two(300)
    fresh, seen, names = two(1500)
    mondrian, split = learn(draws, observed, groups=groups), learn(draws, observed)
    by = np.array(names)
    each = held(mondrian, fresh, seen, 0.8, names)
    pooled = held(split, fresh, seen, 0.8)
    for name in ("easy", "hard"):
        # Beta(0.8 (n + 1), 0.2 (n + 1)) of the cohort, binomial of the new ones.
        sd = np.sqrt(0.16 / 302 + 0.16 / 1500)
        assert each[by == name].mean() == pytest.approx(0.8, abs=3 * sd)
    assert pooled.mean() == pytest.approx(0.8, abs=0.04)
    assert pooled[by == "easy"].mean() > 0.95
    assert pooled[by == "hard"].mean() < 0.7


def test_zeros_do_not_make_intervals_hold_more_than_they_say():
    # Seven in ten volumes are 0, and forecasts are for too much.
    rng = np.random.default_rng(5)

    def shrinking(count):
        gone = rng.random(count) < 0.3
        draws = [np.maximum(rng.normal(0.5, 1.0, 80), 0.0) for _ in gone]
        return draws, [0.0 if g else max(rng.normal(0.0, 1.5), 0.0) for g in gone]

    found = [held(learn(*shrinking(99), scale=Identity()), *shrinking(60), 0.9).mean() for _ in range(80)]
    error = 3 * np.std(found) / np.sqrt(len(found))
    assert 0.9 - error < np.mean(found) < 0.92 + error
    assert error < 0.02


def test_intervals_end_at_the_residuals_of_split_conformal_and_mapie_agrees():
    mapie = pytest.importorskip("mapie.regression")
    from mapie.conformity_scores import AbsoluteConformityScore
    from sklearn.base import BaseEstimator, RegressorMixin

    class Centre(RegressorMixin, BaseEstimator):
        is_fitted = True

        def fit(self, x, y):
            return self

        def __sklearn_is_fitted__(self):
            return True

        def predict(self, x):
            return x[:, 0]

    rng, size = np.random.default_rng(6), 99
    shape = norm.ppf(np.arange(1, size + 1) / (size + 1))
    centre, new = rng.normal(0, 3, 119), rng.normal(0, 3, 7)
    observed = centre + rng.gamma(2.0, 1.0, 119)
    ordered = np.sort(observed - centre)
    # All forecasts have the same normal shape, so scores are residuals in units of one spread.
    adjustment = learn([c + shape for c in centre], observed, least=1e-9)
    for level in (0.5, 0.8, 0.9, 0.95):
        peer = mapie.SplitConformalRegressor(Centre(), level, AbsoluteConformityScore(sym=False), prefit=True)
        peer.conformalize(centre[:, None], observed)
        ends = peer.predict_interval(new[:, None])[1][:, :, 0]
        mine = np.array([adjustment.interval(c + shape, level) for c in new])
        tail = int(np.floor((1 - level) / 2 * 120 + 1e-9))
        np.testing.assert_allclose(mine - new[:, None], np.tile(ordered[[tail - 1, -tail]], (7, 1)), atol=1e-6)
        # MAPIE rounds up a position among n - 1 gaps, which may take the next residual out; never one further in.
        low, high = (np.abs(ordered[:, None] - (ends - new[:, None])[:, k]).argmin(0) for k in (0, 1))
        np.testing.assert_allclose(ordered[np.stack([low, high], 1)], ends - new[:, None], atol=1e-6)
        assert set(tail - 1 - low) <= {0, 1}
        assert set(high - (119 - tail)) <= {0, 1}


# Draws and scores of forecasts ----------------------------------------------------------------------------------------


def test_adjusted_draws_keep_their_ranks_and_have_the_adjusted_quantiles():
    rng = np.random.default_rng(7)
    adjustment = learn(*cohort(rng, 400))
    draws = rng.standard_normal((60, 5))
    found = adjustment.draws(draws)
    assert (np.argsort(found, 0) == np.argsort(draws, 0)).all()
    np.testing.assert_allclose(np.sort(found, 0)[[29, 30]].mean(0), adjustment.quantile(draws, [0.5])[0], atol=0.05)
    assert (found.std(0) > 1.5 * draws.std(0)).all(), "the cohort's errors are twice as wide"


def test_crps_of_failing_forecasts_falls_and_of_right_ones_stays():
    rng = np.random.default_rng(8)
    for bias, wide, low, high in ((0.8, 2.0, -0.5, -0.05), (0.0, 1.0, -0.02, 0.02)):
        adjustment = learn(*cohort(rng, 600, bias, wide))
        draws, observed = cohort(rng, 1500, bias, wide)
        before = np.mean([crps(x, y) for x, y in zip(draws, observed, strict=True)])
        after = np.mean([quantile_crps(adjustment.draws(x), y) for x, y in zip(draws, observed, strict=True)])
        assert low < after / before - 1 < high


def test_crps_of_quantiles_is_that_of_the_distribution():
    levels = (np.arange(2000) + 0.5) / 2000
    for y in (-1.0, 0.0, 2.5):
        exact = y * (2 * norm.cdf(y) - 1) + 2 * norm.pdf(y) - 1 / np.sqrt(np.pi)
        assert quantile_crps(norm.ppf(levels), np.array(y)) == pytest.approx(exact, abs=1e-3)


def test_pits_of_adjusted_forecasts_are_uniform_and_maps_count_by_patients():
    rng = np.random.default_rng(9)
    adjustment = learn(*cohort(rng, 800))
    draws, observed = cohort(rng, 1200)
    pits = np.array([adjustment.pit(x, np.array(y)) for x, y in zip(draws, observed, strict=True)])
    assert np.abs(np.sort(pits) - (np.arange(1200) + 0.5) / 1200).max() < 0.06
    found = map_coverage([pits[:1000], pits[1000:]], [0.8])
    assert found.n == 2
    assert found.observed[0] == pytest.approx(
        np.mean([np.mean(np.abs(p - 0.5) <= 0.4) for p in (pits[:1000], pits[1000:])])
    )


# A real forecast ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forecast() -> bm.Forecast:
    plan = bm.Schedule.weekly("paclitaxel", 1.4, 6, 80.0, "mg/m^2", status="planned")
    patient = small_patient(31, regimen=plan, visit_days=(0.0, 19.0, 41.0)).patient
    model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel")])
    return bm.forecast(bm.calibrate(model, patient.until(2)), times=[19.0, 41.0], draws=40, curve_step=50.0)


def test_a_forecast_is_adjusted_after_the_calibration_alone(forecast):
    rng = np.random.default_rng(10)
    draws = [np.maximum(rng.normal(3, 0.3, 60), 0) for _ in range(60)]
    adjustment = learn(draws, [4 + 0.5 * rng.standard_normal() for _ in draws], scale=Identity())
    found = adjustment.adjust(forecast)
    np.testing.assert_array_equal(found["volume"].values[:, 0], forecast["volume"].values[:, 0])
    np.testing.assert_array_equal(found["volume"].values[:, 1], adjustment.draws(forecast["volume"].values[:, 1]))
    assert found["volume"].values[:, 1].mean() > forecast["volume"].values[:, 1].mean() + 0.2
    assert found["volume"].attrs["units"] == "cm^3"
    assert "60 virtual patients (made up)" in found.notes[-1]
    assert forecast.notes == found.notes[:-1]
    with pytest.raises(InputError, match="forecast has no cells_left"):
        replace(adjustment, quantity="cells_left").adjust(forecast)


def test_maps_are_adjusted_where_tumour_was_seen(forecast):
    rng = np.random.default_rng(11)
    draws = [np.clip(rng.normal(0.4, 0.05, (40, 30)), 0, 1) for _ in range(40)]
    seen = [np.clip(0.6 + 0.05 * rng.standard_normal(30), 0, 1) for _ in draws]
    adjustment = replace(learn(draws, seen, scale=Identity(), least=0.05), quantity="cell_fraction")
    place, before = known_region(forecast), draws_of(forecast, "cell_fraction", 41.0)
    after = adjustment.adjust(forecast)["cell_fraction"].values[:, 1]
    assert place.any() and not place.all()
    assert (after[:, place].mean(0) > before[:, place].mean(0)).mean() > 0.95
    np.testing.assert_array_equal(after[:, ~place], before[:, ~place].astype(np.float32))


def test_maps_as_measured_have_the_noise_of_a_visit():
    patient = small_patient(31).patient
    settings = patient.cellularity
    u = np.full((3000, 4), 0.5)
    found = as_measured(u, settings, 0)
    # ADC is 1.8e-3 there, of a range of 2.4e-3: 5 % shared and 5 % own are 0.0375 each.
    assert found.std(0) == pytest.approx(0.0375 * np.sqrt(2), rel=0.05)
    assert np.corrcoef(found.T)[0, 1] == pytest.approx(0.5, abs=0.05)
    assert (as_measured(np.full((5, 4), 0.05), settings, 0) == 0).all()


# Files and refusals ---------------------------------------------------------------------------------------------------


def test_a_saved_adjustment_is_the_same(tmp_path):
    rng = np.random.default_rng(12)
    draws, observed = cohort(rng, 90)
    adjustment = learn(draws, observed, scale=Logarithm(9.0), groups=["a", "b"] * 45)
    adjustment.save(tmp_path / "volume.json")
    again = Adjustment.load(tmp_path / "volume.json")
    assert again == adjustment
    assert (again.patients, again.cohort, again.virtual) == (90, "made up", True)
    np.testing.assert_array_equal(again.interval(draws[0], 0.9, "b"), adjustment.interval(draws[0], 0.9, "b"))
    assert "made up, virtual" in again._repr_html_()


@pytest.mark.parametrize("text", ["", "{}", '{"schema": "tumorcast.conformal/1"}', '{"schema": "other"}', "[1]"])
def test_damaged_files_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json: not a conformal adjustment"):
        Adjustment.load(tmp_path / "a.json")
    with pytest.raises(InputError, match="not a conformal adjustment"):
        Adjustment.load(tmp_path / "absent.json")


def test_too_few_patients_for_a_level_are_refused():
    assert [fewest(level) for level in (0.5, 0.8, 0.9, 0.95)] == [3, 9, 19, 39]
    rng = np.random.default_rng(13)
    draws, observed = cohort(rng, 18)
    adjustment = learn(draws, observed)
    adjustment.interval(draws[0], 0.89)
    with pytest.raises(InputError, match=r"has 18 patients; expected at least 19.*up to 0.895"):
        adjustment.interval(draws[0], 0.9)
    with pytest.raises(InputError, match="level 1.0"):
        adjustment.interval(draws[0], 1.0)
    with pytest.raises(InputError, match=r"too few patients in b \(2\); expected at least 3"):
        learn(draws, observed, groups=["a"] * 16 + ["b"] * 2)


def test_nonsense_is_refused():
    rng = np.random.default_rng(14)
    draws, observed = cohort(rng, 30)
    with pytest.raises(InputError, match="30 forecasts, 29 values seen"):
        learn(draws, observed[1:])
    with pytest.raises(InputError, match=r"patient 1 has draws \(60,\) and values seen \(2,\)"):
        learn(draws, [np.zeros(2), *observed[1:]])
    with pytest.raises(InputError, match="patient 1: draws"):
        learn([np.full(60, np.nan), *draws[1:]], observed)
    with pytest.raises(InputError, match="least_spread"):
        learn(draws, observed, least=0.0)
    with pytest.raises(InputError, match="floor"):
        Logarithm(0.0)
    grouped = learn(draws, observed, groups=["a", "b"] * 15)
    for name in (None, "c"):
        with pytest.raises(InputError, match="expected one of a, b"):
            grouped.interval(draws[0], 0.5, name)
