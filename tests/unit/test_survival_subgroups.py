"""Tables by group, gaps between groups, and what so many patients can show."""

import numpy as np
import pytest

pytest.importorskip("sksurv")

from scipy.special import expit  # noqa: E402

from biomodel.errors import InputError  # noqa: E402
from survival import metrics  # noqa: E402


def cohort(n=1200, unfair=0.0, seed=0):
    """Two vendors alike, unless the second one's probabilities are shifted."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    vendor = np.where(rng.random(n) < 0.5, "A", "B")
    y = (rng.random(n) < expit(1.5 * x - 0.5)).astype(int)
    return y, expit(1.5 * x - 0.5 + unfair * (vendor == "B")), vendor


def test_table():
    y, p, vendor = cohort()
    rows = metrics.subgroups(y, p, vendor, 0.5)
    assert [r.name for r in rows] == ["all", "A", "B"]
    assert rows[0].patients == 1200 == rows[1].patients + rows[2].patients and rows[0].outcomes == y.sum()
    for row in rows:
        who = np.ones(1200, bool) if row.name == "all" else vendor == row.name
        called = metrics.at_threshold(y[who], p[who], 0.5)
        assert row.sensitivity.value == pytest.approx(called.sensitivity)
        assert (row.sensitivity.low, row.sensitivity.high) == pytest.approx(called.interval("sensitivity"))
        assert row.specificity.value == pytest.approx(called.specificity)
        assert row.called.value == pytest.approx((p[who] >= 0.5).mean())
        assert row.auroc.value == pytest.approx(metrics.auroc(y[who], p[who]))
        assert row.excess.low < 0 < row.excess.high
    small = metrics.subgroups(np.append(y, 1), np.append(p, 0.7), np.append(vendor, "C"), 0.5)[-1]
    assert small.patients == 1 and np.isnan(small.auroc.value) and np.isnan(small.specificity.value)


def test_gaps():
    fair = metrics.gaps(*cohort(), 0.5, draws=200)
    unfair = metrics.gaps(*cohort(unfair=1.0), 0.5, draws=200)
    assert fair["calibration"].value < 0.05 < 0.1 < unfair["calibration"].low
    assert fair["sensitivity"].value < 0.1 and unfair["sensitivity"].low > 0.08
    y, p, vendor = cohort(unfair=1.0)
    share = [(p[vendor == v] >= 0.5).mean() for v in "AB"]
    assert unfair["demographic parity"].value == pytest.approx(abs(share[1] - share[0]))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["A"] * 1200, "1 groups have 10 patients"),
        (["A"] * 1199 + [None], "the group of a patient is missing"),
        (["A"] * 7, "7 groups named for 1200 patients"),
    ],
)
def test_bad_groups(groups, message):
    y, p, _ = cohort()
    with pytest.raises(InputError, match=message):
        metrics.gaps(y, p, groups, 0.5)


def test_standard_error_and_power():
    """Against the spread of simulated areas, for exponential scores, of which the formula is exact."""
    rng, found = np.random.default_rng(0), []
    for _ in range(2000):
        one, none = rng.exponential(3.0, 40), rng.exponential(1.0, 60)
        found.append(metrics.auroc(np.repeat([1, 0], [40, 60]), np.concatenate((one, none))))
    assert np.mean(found) == pytest.approx(0.75, abs=0.004)
    assert np.std(found) == pytest.approx(metrics.auroc_standard_error(0.75, 40, 60), rel=0.06)
    alone, paired = (metrics.detectable_difference(0.8, 113, 271, r) for r in (0.0, 0.8))
    assert alone > 1.8 * paired and 0.01 < paired < 0.1
    assert metrics.detectable_difference(0.8, 1130, 2710, 0.0) < alone / 2
    assert metrics.detectable_difference(0.95, 3, 3) == np.inf
    with pytest.raises(InputError, match="two patients of each class"):
        metrics.auroc_standard_error(0.8, 1, 50)
    with pytest.raises(InputError, match="correlation"):
        metrics.detectable_difference(0.8, 50, 50, 1.0)
