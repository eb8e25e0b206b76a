"""Metrics: equal to scikit-learn, scikit-survival and lifelines where they have them, else to what is known."""

import numpy as np
import pytest

pytest.importorskip("sksurv")
pytest.importorskip("lifelines")

import sksurv.metrics as theirs  # noqa: E402
from lifelines.utils import concordance_index  # noqa: E402
from scipy.stats import kstest  # noqa: E402
from sklearn.calibration import calibration_curve  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import (  # noqa: E402
    average_precision_score,
    brier_score_loss,
    confusion_matrix,
    roc_auc_score,
)

from biomodel.errors import InputError  # noqa: E402
from survival import metrics  # noqa: E402
from survival.curves import Curves  # noqa: E402
from survival.outcome import follow_up  # noqa: E402

EXACT = 1e-10


def cohort(n, seed, ties=False):
    """Follow-up, risks that tell something of it, and true survival curves at some times."""
    rng = np.random.default_rng(seed)
    rate = np.exp(rng.normal(size=n))
    time, end = rng.exponential(1 / rate), rng.exponential(1.5, n)
    seen = np.minimum(time, end) + 1e-3
    risk = rate + rng.normal(size=n)
    if ties:
        seen, risk = np.ceil(seen * 8) / 8, np.round(risk)
    times = np.linspace(0.15, 1.2, 15)
    return follow_up(seen, time <= end), risk, Curves(times, np.exp(-rate[:, None] * times))


@pytest.fixture(scope="module", params=[(0, False), (1, True)], ids=["no ties", "ties"])
def data(request):
    seed, ties = request.param
    train, _, _ = cohort(400, seed + 10, ties)
    y, risk, curves = cohort(150, seed, ties)
    y["time"] = np.minimum(y["time"], train["time"].max())
    return train, y, risk, curves


def test_harrell(data):
    _, y, risk, _ = data
    ours = metrics.harrell_c(y, risk)
    assert ours == pytest.approx(theirs.concordance_index_censored(y["event"], y["time"], risk)[0], abs=EXACT)
    assert ours == pytest.approx(concordance_index(y["time"], -risk, y["event"]), abs=EXACT)


def test_uno(data):
    train, y, risk, _ = data
    for until in (0.5, 1.2):
        ours = metrics.uno_c(train, y, risk, until)
        assert ours == pytest.approx(theirs.concordance_index_ipcw(train, y, risk, until)[0], abs=EXACT)


def test_brier_score(data):
    train, y, _, curves = data
    ours = metrics.brier_by_patient(train, y, curves).mean(0)
    assert ours == pytest.approx(theirs.brier_score(train, y, curves.survival, curves.times)[1], abs=EXACT)
    total = metrics.integrated_brier_score(train, y, curves)
    assert total == pytest.approx(theirs.integrated_brier_score(train, y, curves.survival, curves.times), abs=EXACT)


def test_time_dependent_auc(data):
    train, y, risk, curves = data
    for r in (risk, 1 - curves.survival):
        auc, mean = metrics.time_dependent_auc(train, y, r, curves.times)
        expected, expected_mean = theirs.cumulative_dynamic_auc(train, y, r, curves.times)
        assert auc == pytest.approx(expected, abs=EXACT)
        assert mean == pytest.approx(expected_mean, abs=EXACT)


def test_counts_are_repeated_patients(data):
    train, y, risk, curves = data
    counts = np.random.default_rng(0).multinomial(len(y), np.full(len(y), 1 / len(y)))
    some = np.repeat(np.arange(len(y)), counts)
    again = Curves(curves.times, curves.survival[some])
    assert metrics.harrell_c(y, risk, counts) == pytest.approx(metrics.harrell_c(y[some], risk[some]), abs=EXACT)
    assert metrics.uno_c(train, y, risk, 1.0, counts) == pytest.approx(
        metrics.uno_c(train, y[some], risk[some], 1.0), abs=EXACT
    )
    assert metrics.integrated_brier_score(train, y, curves, counts) == pytest.approx(
        metrics.integrated_brier_score(train, y[some], again), abs=EXACT
    )
    ours = metrics.time_dependent_auc(train, y, risk, curves.times, counts)
    expected = metrics.time_dependent_auc(train, y[some], risk[some], curves.times)
    assert ours[0] == pytest.approx(expected[0], abs=EXACT) and ours[1] == pytest.approx(expected[1], abs=EXACT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y, r, c: metrics.harrell_c(y, r[:5]), "risks have shape"),
        (lambda y, r, c: metrics.harrell_c(y, np.full(len(y), np.nan)), "not finite"),
        (lambda y, r, c: metrics.harrell_c(follow_up([1, 2], [0, 1]), [1, 2]), "no two patients can be compared"),
        (lambda y, r, c: metrics.harrell_c(y["time"], r), "make it with survival.follow_up"),
        (lambda y, r, c: metrics.harrell_c(y, r, -np.ones(len(y))), "not negative"),
        (lambda y, r, c: metrics.uno_c(follow_up([0.01, 0.02], [1, 0]), y, r), "censoring is not known there"),
        (
            lambda y, r, c: metrics.brier_by_patient(y, y, Curves(c.times[:1] * 1e-9, c.survival[:, :1])),
            "within the follow",
        ),
        (lambda y, r, c: metrics.brier_by_patient(y, y, Curves(c.times, c.survival[:3])), "3 curves for"),
        (lambda y, r, c: metrics.time_dependent_auc(y, y, r, [1.0, 0.5]), "rise and lie above 0"),
        (lambda y, r, c: metrics.d_calibration(y, r * 100), "must lie in"),
    ],
)
def test_bad_input_to_metrics_of_times(call, message):
    y, risk, curves = cohort(80, 0)
    with pytest.raises(InputError, match=message):
        call(y, risk, curves)


def test_d_calibration():
    rng = np.random.default_rng(0)
    rate = np.exp(rng.normal(size=3000))
    time, end = rng.exponential(1 / rate), rng.exponential(1.5, 3000)
    y = follow_up(np.minimum(time, end), time <= end)
    right = np.exp(-rate * y["time"])
    found = metrics.d_calibration(y, right)
    assert found.share.sum() == pytest.approx(1) and found.p > 0.01
    assert metrics.d_calibration(y, right**1.5).p < 1e-6
    # Without censoring it is the plain chi-squared test of a histogram.
    alone = follow_up([1.0, 1.0, 1.0, 1.0], [1, 1, 1, 1])
    found = metrics.d_calibration(alone, [0.1, 0.2, 0.7, 1.0], bins=2)
    assert found.share.tolist() == [0.5, 0.5] and found.statistic == 0
    # Censored at 0.75: a third of the patient in each of the lower bins of width 0.25.
    one = metrics.d_calibration(follow_up([1.0, 1.0], [0, 1]), [0.75, 0.9], bins=4)
    assert one.share * 2 == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])


def labels(n=300, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    p = rng.beta(2, 3, n)
    if ties:
        p = np.round(p, 1)
    return (rng.random(n) < p).astype(int), np.clip(p, 0.01, 0.99), rng.integers(0, 4, n).astype(float)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_binary_metrics(ties, weighted):
    y, p, w = labels(ties=ties)
    w = w if weighted else None
    assert metrics.auroc(y, p, w) == pytest.approx(roc_auc_score(y, p, sample_weight=w), abs=EXACT)
    assert metrics.auprc(y, p, w) == pytest.approx(average_precision_score(y, p, sample_weight=w), abs=EXACT)
    assert metrics.brier(y, p, w) == pytest.approx(brier_score_loss(y, p, sample_weight=w), abs=EXACT)
    logit = np.log(p / (1 - p))[:, None]
    line = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-14, max_iter=1000).fit(logit, y, w)
    slope, intercept, _ = metrics.calibration_line(y, p, w)
    assert slope == pytest.approx(line.coef_[0, 0], abs=EXACT)
    assert intercept == pytest.approx(line.intercept_[0], abs=EXACT)
    called = metrics.at_threshold(y, p, 0.4, w)
    tn, fp, fn, tp = confusion_matrix(y, p >= 0.4, sample_weight=w).ravel()
    assert (called.true_positive, called.false_positive) == pytest.approx((tp, fp))
    assert (called.sensitivity, called.specificity) == pytest.approx((tp / (tp + fn), tn / (tn + fp)))
    assert (called.ppv, called.npv) == pytest.approx((tp / (tp + fp), tn / (tn + fn)))
    total = 300 if w is None else w.sum()
    assert metrics.net_benefit(y, p, [0.4], w)[0] == pytest.approx((tp - fp * 0.4 / 0.6) / total, abs=EXACT)


def test_in_the_large():
    """The third number of the line makes the mean of the probabilities that of the labels."""
    y, p, _ = labels()
    large = metrics.calibration_line(y, p**2)[2]
    logit = np.log(p**2 / (1 - p**2))
    assert (1 / (1 + np.exp(-(logit + large)))).mean() == pytest.approx(y.mean(), abs=EXACT)


def test_expected_calibration_error():
    y, p, _ = labels()
    observed, predicted = calibration_curve(y, p, n_bins=10, strategy="quantile")
    assert metrics.expected_calibration_error(y, p, 10) == pytest.approx(np.abs(observed - predicted).mean(), abs=EXACT)


def test_decision_curve_of_everybody():
    y, _, _ = labels()
    t = np.array([0.1, 0.5])
    assert metrics.net_benefit(y, np.ones(len(y)), t) == pytest.approx(y.mean() - (1 - y.mean()) * t / (1 - t))
    # A perfect prediction gains the prevalence at every threshold.
    assert metrics.net_benefit(y, y, t) == pytest.approx(y.mean())


def test_wilson():
    """Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263 and 0 of 20."""
    found = metrics.AtThreshold(0.5, 81, 0, 182, 0).interval("sensitivity")
    assert found == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert metrics.AtThreshold(0.5, 0, 0, 20, 0).interval("sensitivity") == pytest.approx((0.0, 0.1611), abs=5e-5)
    with pytest.raises(InputError, match="not one of"):
        metrics.AtThreshold(0.5, 1, 1, 1, 1).interval("accuracy")
    assert np.isnan(metrics.AtThreshold(0.9, 0, 0, 5, 5).ppv)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y, p: metrics.auroc(np.ones(9), p[:9]), "all 9 labels are 1"),
        (lambda y, p: metrics.auroc(y + 1, p), "must be 0 or 1"),
        (lambda y, p: metrics.auroc(y, p * np.nan), "missing or infinite"),
        (lambda y, p: metrics.auroc(y, p[:5]), "shape"),
        (lambda y, p: metrics.auroc(y, p, 1.0 * y), "leave one class alone"),
        (lambda y, p: metrics.brier(y, p * 2), "expected probabilities"),
        (lambda y, p: metrics.brier(y, ["a"] * len(y)), "no number"),
        (lambda y, p: metrics.calibration_line(y, np.full(len(y), 0.3)), "all probabilities are the same"),
        (lambda y, p: metrics.calibration_line(y, 0.1 + 0.8 * y), "separate the classes"),
        (lambda y, p: metrics.net_benefit(y, p, [0.0, 0.5]), "between 0 and 1"),
        (lambda y, p: metrics.delong(np.arange(len(y)) == 0, p), "at least two patients of each class"),
    ],
)
def test_bad_input_to_binary_metrics(call, message):
    y, p, _ = labels()
    with pytest.raises(InputError, match=message):
        call(y, p)


def test_delong_by_hand():
    """Variance from the definition: placements counted pair by pair."""
    y, p, _ = labels(60, ties=True)
    q = np.random.default_rng(1).normal(p, 0.3)
    one, none = np.flatnonzero(y == 1), np.flatnonzero(y == 0)

    def placements(v):
        psi = (v[one][:, None] > v[none]) + 0.5 * (v[one][:, None] == v[none])
        return psi.mean(1), psi.mean(0)

    (a10, a01), (b10, b01) = placements(p), placements(q)
    variance = np.var(a10 - b10, ddof=1) / len(one) + np.var(a01 - b01, ddof=1) / len(none)
    found = metrics.delong_paired(y, p, q)
    assert found.value == pytest.approx(roc_auc_score(y, p) - roc_auc_score(y, q), abs=EXACT)
    assert (found.high - found.low) / 2 / 1.959963984540054 == pytest.approx(np.sqrt(variance), abs=EXACT)
    assert metrics.delong(y, p).value == pytest.approx(roc_auc_score(y, p), abs=EXACT)
    assert metrics.delong_paired(y, p, p).p == 1.0


@pytest.mark.slow
def test_intervals_cover_and_tests_hold_their_level():
    """600 cohorts: coverage and size within what 600 allow (two standard errors of 0.95 are 0.018)."""
    rng = np.random.default_rng(0)
    truth, covered, refused, boot = 0.7602499389065233, 0, [], 0  # Phi(1/sqrt 2)
    for k in range(600):
        y = np.repeat([1, 0], [40, 60])
        x, z = rng.normal(y, 1.0), rng.normal(y, 1.0)
        found = metrics.delong(y, x)
        covered += found.low <= truth <= found.high
        refused.append(metrics.delong_paired(y, x, z).p)
        if k < 200:
            interval = metrics.bootstrap(lambda w, y=y, x=x: metrics.auroc(y, x, w), 100, 300, strata=y, seed=k)
            boot += interval.low <= truth <= interval.high
    assert abs(covered / 600 - 0.95) < 0.025
    assert boot / 200 > 0.90
    assert kstest(refused, "uniform").pvalue > 0.01


def test_bootstrap():
    x = np.random.default_rng(0).normal(size=400)
    found = metrics.bootstrap(lambda w: float(w @ x / w.sum()), 400, 2000, seed=3)
    se = x.std() / 20
    assert found.value == pytest.approx(x.mean()) and np.isnan(found.p)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(se, rel=0.08)
    again = metrics.bootstrap(lambda w: float(w @ x / w.sum()), 400, 2000, seed=3)
    assert (again.low, again.high) == (found.low, found.high)
    # Rows of a patient that are copies of each other say nothing new.
    doubled = np.repeat(x, 2)
    apart = metrics.bootstrap_draws(lambda w: float(w @ doubled / w.sum()), 800, 2000)
    pairs = np.repeat(np.arange(400), 2)
    whole = metrics.bootstrap_draws(lambda w: float(w @ doubled / w.sum()), 800, 2000, groups=pairs)
    assert whole.std() / apart.std() == pytest.approx(np.sqrt(2), rel=0.1)
    kept = metrics.bootstrap_draws(lambda w: w[:100].sum(), 400, 50, strata=np.arange(400) < 100)
    assert np.all(kept == 100)
    assert metrics.bootstrap(lambda w: float(w @ (x + 1) / w.sum()), 400, 400, null=0.0).p == pytest.approx(2 / 401)
    with pytest.raises(InputError, match="not both"):
        metrics.bootstrap(lambda w: 0.0, 400, groups=x, strata=x)
    with pytest.raises(InputError, match="at least two"):
        metrics.bootstrap(lambda w: 0.0, 400, groups=np.ones(400))


def test_corrected_t_test():
    d = np.array([0.01, 0.03, 0.02, 0.04, 0.0])
    found = metrics.corrected_t_test(d, 0.25)
    sd = np.sqrt(d.var(ddof=1) * (0.2 + 0.25))
    assert (found.high - found.value) / sd == pytest.approx(2.7764451051977987)  # t of 4 degrees of freedom
    assert found.p > 0.05 and metrics.corrected_t_test(d + 1, 0.25).p < 1e-4
    with pytest.raises(InputError, match="at least two"):
        metrics.corrected_t_test([0.1], 0.25)


def test_holm():
    """The example of Wright 1992, Biometrics 48:1005, with the steps by hand."""
    assert metrics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert metrics.holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    with pytest.raises(InputError, match="p values"):
        metrics.holm([0.5, 1.2])
