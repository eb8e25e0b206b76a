"""Scores: each against its definition, and a forecast beside its baselines."""

import numpy as np
import pytest
from scipy.stats import norm

import biomodel as bm
from biomodel.errors import InputError
from biomodel.observation import longest_diameter
from biomodel.scoring import concordance, covers, crps, dice, exponential_volume, pearson


def test_crps_is_that_of_the_normal_distribution():
    draws = np.random.default_rng(0).standard_normal(20_000)
    for y in (-1.0, 0.0, 2.5):
        exact = y * (2 * norm.cdf(y) - 1) + 2 * norm.pdf(y) - 1 / np.sqrt(np.pi)
        assert abs(crps(draws, y) - exact) < 0.02


def test_crps_is_fair_and_is_the_absolute_error_of_a_point():
    assert crps(np.array([3.0]), 1.0) == 2.0
    rng = np.random.default_rng(1)
    few = np.mean([crps(rng.standard_normal(5), 0.3) for _ in range(4000)])
    many = crps(rng.standard_normal(20_000), 0.3)
    assert abs(few - many) < 0.03


def test_concordance_and_correlation():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert concordance(x, x) == pytest.approx(1.0) and pearson(x, 2 * x + 1) == pytest.approx(1.0)
    # Lin's formula by hand: 2·1.25 / (1.25 + 1.25 + 1)
    assert concordance(x, x + 1) == pytest.approx(2.5 / 3.5)
    assert np.isnan(concordance(x[:1], x[:1])) and np.isnan(pearson(x, np.ones(4)))


def test_overlap_and_cover():
    a = np.array([True, True, False, False])
    assert dice(a, ~a) == 0 and dice(a, a) == 1 and dice(a & False, a & False) == 1
    assert dice(a, np.array([True, False, False, False])) == pytest.approx(2 / 3)
    assert covers(np.arange(101.0), 5.0, 0.9) and not covers(np.arange(101.0), 4.0, 0.9)


def test_exponential_baseline_goes_through_the_last_two_volumes():
    assert exponential_volume([0, 10, 20], [9.0, 8.0, 4.0], 30, 0.01) == pytest.approx(2.0)
    assert exponential_volume([0, 10], [1.0, 0.0], 20, 0.1) == pytest.approx(0.01)


def test_longest_diameter_in_the_plane():
    region = np.zeros((3, 20, 20), bool)
    assert longest_diameter(region, (5.0, 1.0, 1.0)) == 0.0
    region[1, 4, 2:12] = True
    assert longest_diameter(region, (5.0, 1.0, 1.0)) == pytest.approx(10.0)
    region[1, 4:16, 2] = True
    assert longest_diameter(region, (5.0, 1.0, 1.0)) == pytest.approx(np.hypot(11, 9) + 1)
    z, y, x = np.indices((3, 20, 20))
    ball = (y - 10) ** 2 + (x - 10) ** 2 <= 36
    assert abs(longest_diameter(ball, (5.0, 1.0, 1.0)) - 13) < 1e-9


def volumes():
    return bm.Patient.from_volumes("P", [0, 21, 84, 150], [12.0, 9.0, 4.0, 0.0], cv=0.2, floor=0.05)


def test_a_forecast_of_volumes_is_scored_beside_its_baselines():
    patient = volumes()
    model = bm.ReactionDiffusion(bm.Exponential(), bm.NoDiffusion())
    fit = bm.calibrate(model, patient.until(2))
    forecast = bm.forecast(fit, times=[84.0, 150.0], draws=300, seed=1)
    score = bm.score(forecast, patient)
    assert [r["predictor"] for r in score.rows] == ["forecast", "carry-forward", "exponential volume"] * 2
    carried = score.of("carry-forward")[0]
    assert carried["volume"] == 9.0 and carried["crps"] == 5.0 and carried["volume_error"] == pytest.approx(1.25)
    # A tumour that is gone has no relative error, and JSON knows no NaN.
    assert score.of("forecast")[1]["volume_error"] is None
    shown = score._repr_html_()
    assert "carry-forward" in shown and "<th>observed volume</th>" in shown and "<td>–</td>" in shown
    assert "None" not in shown and "True" not in shown
    # Only what the calibration knew makes the baselines.
    assert score.of("exponential volume")[0]["volume"] == pytest.approx(9 * (9 / 12) ** 3)


def test_scoring_the_wrong_record_is_told():
    patient = volumes()
    model = bm.ReactionDiffusion(bm.Exponential(), bm.NoDiffusion())
    forecast = bm.forecast(bm.calibrate(model, patient.until(2)), until=90.0, draws=10)
    with pytest.raises(InputError, match="no visit after day 21"):
        bm.score(forecast, patient)
    with pytest.raises(InputError, match="for patient P"):
        bm.score(forecast, bm.Patient.from_volumes("Q", [0, 90], [1.0, 2.0]))
