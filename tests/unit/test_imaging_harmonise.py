"""ComBat: what it removes and keeps, what it refuses, and the report that weighs both."""

import numpy as np
import pytest

from biomodel.errors import InputError
from biomodel.imaging.harmonise import check_assumptions, fit_combat, harmonisation_report


def cohort(seed, n=300, p=12, effect=0.5, prevalence=(0.4, 0.4, 0.4)):
    """Features with a clinical effect in the first four, and shifts and scales of three sites."""
    rng = np.random.default_rng(seed)
    site = np.arange(n) % 3
    outcome = (rng.random(n) < np.array(prevalence)[site]).astype(float)
    clean = rng.standard_normal((n, p)) + effect * outcome[:, None] * (np.arange(p) < 4)
    shift, scale = rng.normal(0, 1.5, (3, p)), rng.uniform(0.7, 1.6, (3, p))
    return clean, clean * scale[site] + shift[site], np.array(["A", "B", "C"])[site], outcome


def test_batches_end_with_one_mean_and_spread_and_covariates_are_kept():
    rng = np.random.default_rng(0)
    site = np.array(list("AB"))[(np.arange(400) >= 150).astype(int)]
    age = rng.uniform(30, 70, 400) + 10 * (site == "B")  # site B has older patients
    slope = np.linspace(-0.1, 0.1, 6)
    noise = rng.standard_normal((400, 6)) * np.where(site == "B", 1.7, 1.0)[:, None]
    x = np.outer(age, slope) + 3 * (site == "B")[:, None] + noise
    for shrink, tolerance in ((False, 1e-9), (True, 0.2)):
        combat = fit_combat(x, site, age, shrink=shrink)
        done = combat.apply(x, site, age)
        rest = done - combat.mean - age[:, None] @ combat.slopes
        a, b = rest[site == "A"], rest[site == "B"]
        np.testing.assert_allclose(a.mean(0), b.mean(0), atol=tolerance)
        np.testing.assert_allclose(a.std(0, ddof=1), b.std(0, ddof=1), rtol=tolerance)
        # Standard error of a slope about 0.006.
        np.testing.assert_allclose(combat.slopes[0], slope, atol=0.02)
    # Without the covariate, what the site's age does is taken for its scanner and removed.
    gap = x[site == "B"].mean(0) - x[site == "A"].mean(0) - 3
    kept, bare = (c[site == "B"].mean(0) - c[site == "A"].mean(0) for c in (done, fit_combat(x, site).apply(x, site)))
    assert np.abs(kept - gap).max() < 0.5 and np.abs(bare).max() < 0.2 * np.abs(gap).max()


def test_shrinkage_brings_small_batches_nearer_to_the_truth():
    rng = np.random.default_rng(1)
    site = np.repeat(["A", "B", "C"], [100, 100, 8])
    truth = {"A": 0.0, "B": 0.5, "C": -0.8}
    shift = np.array([truth[s] for s in site])[:, None] + np.zeros(40)
    x = rng.standard_normal((208, 40)) + shift
    error = {}
    for shrink in (True, False):
        combat = fit_combat(x, site, shrink=shrink)
        error[shrink] = np.abs(combat.shift[2] * combat.sd + combat.mean - truth["C"]).mean()
    assert error[True] < 0.6 * error[False]


def test_reference_batch_stays_as_it_is():
    _, x, site, _ = cohort(2)
    done = fit_combat(x, site, reference="B").apply(x, site)
    np.testing.assert_array_equal(done[site == "B"], x[site == "B"])
    for other in "AC":
        np.testing.assert_allclose(done[site == other].mean(0), x[site == "B"].mean(0), atol=0.1)


def test_new_samples_are_harmonised_by_the_fit_and_not_by_themselves():
    _, x, site, _ = cohort(3, n=600)
    train = np.arange(600) < 400
    combat = fit_combat(x[train], site[train])
    whole = combat.apply(x[~train], site[~train])
    one_by_one = np.vstack([combat.apply(x[[i]], site[[i]]) for i in np.flatnonzero(~train)])
    np.testing.assert_allclose(whole, one_by_one, rtol=1e-12)
    gap = [np.ptp([v[site[~train] == s].mean(0) for s in "ABC"], axis=0).mean() for v in (x[~train], whole)]
    assert gap[1] < 0.2 * gap[0]
    with pytest.raises(InputError, match="batch D was not in the data"):
        combat.apply(x[:1], ["D"])
    with pytest.raises(InputError, match="expected 12 and 0 as in the fit"):
        combat.apply(x, site, np.ones(600))


def test_data_that_cannot_be_harmonised_are_refused():
    _, x, site, y = cohort(4, n=60)
    holes, flat, still = x.copy(), x.copy(), x.copy()
    holes[3, 2] = np.nan
    flat[:, 1] = 7.0
    still[site == "B", 5] = 1.0
    for arguments, match in (
        ((holes, site), "first in feature 3"),
        ((x, site[:-1]), "59 batch labels"),
        ((x, np.where(site == "A", np.nan, 1.0)), "labels are missing"),
        ((x, ["A"] * 60), "all samples are of batch A"),
        ((x, [*site[:-1], "D"]), "single sample in batch D"),
        ((flat, site), "feature 2 has no spread"),
        ((still, site), "feature 6 is constant in batch B"),
        ((x, site, site == "A"), "linearly dependent"),
        ((x, site, np.ones(60)), "linearly dependent"),
        ((x, site, np.full(60, np.inf)), "of the covariates"),
        ((x, site, y[:5]), "covariates of shape"),
        ((x[:, :2], site), "shrink=False"),
        ((x[0], site), "features of shape"),
        ((x.astype(str), site), "expected numbers"),
    ):
        with pytest.raises(InputError, match=match):
            fit_combat(*arguments)
    with pytest.raises(InputError, match="reference batch 'Z'"):
        fit_combat(x, site, reference="Z")
    with pytest.raises(InputError, match="names for"):
        fit_combat(x, site, names=("one",))
    assert fit_combat(x[:, :1], site, shrink=False).apply(x[:, :1], site).shape == (60, 1)


def messages(findings, severity):
    return " ".join(f.message for f in findings if f.severity == severity)


def test_assumptions_that_hold_give_no_finding():
    clean, _, site, _ = cohort(5, p=20, effect=0.0)
    scale = {"A": 1.0, "B": 1.5, "C": 0.8}
    x = clean * np.array([scale[s] for s in site])[:, None] + np.array([ord(s) for s in site])[:, None]
    assert check_assumptions(x, site, np.random.default_rng(0).standard_normal(300)) == ()


def test_each_broken_assumption_is_found():
    rng = np.random.default_rng(6)
    clean, x, site, _ = cohort(6)
    few = np.r_[np.flatnonzero(site != "C"), np.flatnonzero(site == "C")[:5]]
    assert "C (5)" in messages(check_assumptions(x[few], site[few]), "warning")
    tied = (site == "A") + 0.05 * rng.standard_normal(300)
    assert "lies between batches" in messages(check_assumptions(x, site, tied), "warning")
    assert "linearly dependent" in messages(check_assumptions(x, site, site == "A"), "error")
    skewed = x.copy()
    skewed[:, 3] = np.exp(2 * clean[:, 3])
    assert "not normal: feature 4" in messages(check_assumptions(skewed, site), "warning")
    # One feature of a batch of 12 spread 30 times as much as the others: the prior holds it back.
    small = np.r_[np.flatnonzero(site != "C"), np.flatnonzero(site == "C")[:12]]
    wide = np.tile(clean[:, :1], (1, 40)) * 0 + rng.standard_normal((300, 40))
    wide[site == "C", 0] *= 30
    assert "spread unequally" in messages(check_assumptions(wide[small], site[small], shrink=True), "warning")
    shifted = rng.standard_normal((300, 40))
    shifted[site == "B", :3] += 25
    assert "Shifts of batch" in messages(check_assumptions(shifted, site), "info")
    with pytest.raises(InputError, match="features of shape"):
        check_assumptions(x[0], site)


def test_report_shows_the_batch_gone_and_the_signal_kept():
    _, x, site, outcome = cohort(7)
    report = harmonisation_report(x, site, outcome, draws=200)
    assert report.metric == "AUC" and report.batch_chance == pytest.approx(1 / 3)
    assert report.batch_before.low > 0.9 and report.batch_after.value < 0.45
    assert report.after.low > 0.55 and report.change.high > 0
    assert report.change.value == pytest.approx(report.after.value - report.before.value)
    assert report.change.low <= report.change.value <= report.change.high
    text = str(report)
    assert "AUC of the outcome" in text and "within batches" in text and f"{report.after.value:.3f}" in text


def test_report_tells_the_site_from_the_signal():
    # No clinical effect at all, but sites with other prevalence: what is lost was the site.
    _, x, site, outcome = cohort(8, effect=0.0, prevalence=(0.8, 0.5, 0.2))
    report = harmonisation_report(x, site, outcome, draws=200)
    assert report.before.low > 0.65 and report.change.high < -0.05
    assert report.within_before.low < 0.55 and report.within_change.low < 0 < report.within_change.high
    assert "differs between batches" in messages(report.findings, "info")


def test_report_notices_signal_that_harmonisation_removes():
    # Patients with the outcome are scanned on another machine that changes nothing: harmonisation takes their biology.
    rng = np.random.default_rng(9)
    outcome = np.arange(300) % 2.0
    x = rng.standard_normal((300, 8)) + 0.6 * outcome[:, None]
    batch = np.where(outcome + 0.4 * rng.standard_normal(300) > 0.5, "B", "A")
    report = harmonisation_report(x, batch, outcome, draws=200)
    assert report.change.high < -0.1 and report.within_before.value > 0.6


def test_report_of_a_number_is_r2_and_the_same_seed_gives_the_same():
    _, x, site, outcome = cohort(10)
    value = outcome + 0.5 * np.random.default_rng(0).standard_normal(300)
    report = harmonisation_report(x, site, value, draws=100, seed=3)
    assert report.metric == "R²" and report.after.value > 0.02
    assert report == harmonisation_report(x, site, value, draws=100, seed=3)


def test_report_refuses_what_would_mislead():
    _, x, site, outcome = cohort(11, n=60)
    with pytest.raises(InputError, match="among the covariates"):
        harmonisation_report(x, site, outcome, np.column_stack([outcome, x[:, 0]]))
    with pytest.raises(InputError, match="outcome of shape"):
        harmonisation_report(x, site, np.ones(60))
    with pytest.raises(InputError, match="outcome of shape"):
        harmonisation_report(x, site, np.where(np.arange(60) == 0, np.nan, outcome))
    with pytest.raises(InputError, match="folds"):
        harmonisation_report(x, site, outcome, folds=1)
    rare = np.r_[np.flatnonzero(site != "C"), np.flatnonzero(site == "C")[:3]]
    with pytest.raises(InputError, match="smallest of 3"):
        harmonisation_report(x[rare], site[rare], outcome[rare])
