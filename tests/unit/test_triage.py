"""Out-of-distribution distance and triage: false alarms under the reference, alarms outside it, reasons in words."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import chi2

import biomodel as bm
from biomodel.diagnostics import PredictiveCheck, posterior_predictive_check
from biomodel.diagnostics_predictive import MISFIT, WORST
from biomodel.errors import InputError
from biomodel.out_of_distribution import Distance, Reference, features, learn_reference, shape_of
from biomodel.triage import (
    NOT_USABLE,
    PROGRESSION,
    RESPONSE,
    REVIEW,
    USABLE,
    agrees,
    could_have_made,
    ended_and_taught,
    like_the_cohort,
    says_something,
    triage,
)
from biomodel.virtual import small_patient

NAMES = ("a", "b", "c", "d")
MIX = np.array([[1.0, 0.6, 0.0, 0.2], [0.0, 1.0, 0.5, 0.0], [0.0, 0.0, 2.0, 0.0], [0.3, 0.0, 0.0, 5.0]])


def rows(rng, n, skewed=False, shift=0.0):
    x = rng.exponential(1.0, (n, 4)) if skewed else rng.standard_normal((n, 4))
    return [dict(zip(NAMES, v, strict=True)) for v in (x + shift) @ MIX + 3.0]


def distance(p=0.5, **apart) -> Distance:
    return Distance(4.0, p, apart or {"log misfit": 2.5, "a": 0.1}, "the reference")


def check(names, p, draws=200) -> PredictiveCheck:
    """A check with these p-values of one side."""
    replicated = np.array([np.where(np.arange(draws) < round(q * draws), 2.0, 0.0) for q in p])
    return PredictiveCheck(names, ("1",) * len(names), np.ones((len(names), draws)), replicated, (False,) * len(names))


# Distance -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "skewed"), [(100, True), (40, False)])
def test_false_alarms_under_the_reference_are_as_many_as_said(n, skewed):
    rng = np.random.default_rng(n + skewed)
    p = []
    for _ in range(12):
        reference = learn_reference(rows(rng, n, skewed), cohort="made up", virtual=True)
        found = [reference.distance(r) for r in rows(rng, 40, skewed)]
        p.append([d.p for d in found])
    alarms = np.array([[np.mean(np.array(q) < level) for level in (0.05, 0.2)] for q in p])
    for k, level in enumerate((0.05, 0.2)):
        assert alarms[:, k].mean() == pytest.approx(level, abs=3.5 * alarms[:, k].std() / np.sqrt(12) + 0.004)
        # By chance of the 40 tested and of the n that make the reference (a rank's level is Beta distributed).
        chance = np.sqrt(level * (1 - level) * (1 / 40 + 1 / n))
        assert alarms[:, k].std() < 1.5 * chance


def test_patients_outside_are_found_and_what_is_odd_is_named():
    rng = np.random.default_rng(3)
    reference = learn_reference(rows(rng, 200), cohort="made up", virtual=True)
    far = [reference.distance(r).p for r in rows(rng, 40, shift=4.0)]
    assert np.mean(np.array(far) < 0.01) > 0.95
    odd = reference.distance({"a": 3.0, "b": 3.0, "c": 3.0, "d": 60.0})
    assert next(iter(odd.apart)) == "d"
    assert odd.apart["d"] == pytest.approx(57 / shape_of(reference.rows)[1][3], rel=0.05)
    # Against the correlation a patient may be far with every feature by itself near.
    hidden = reference.distance({"a": 3 + 1.5, "b": 3 - 1.5, "c": 3.0, "d": 3.0})
    assert max(abs(v) for v in hidden.apart.values()) < 2
    assert hidden.squared > 1.5 * sum(v**2 for v in hidden.apart.values())


def test_distances_of_a_large_cohort_are_chi_squared_and_of_a_small_one_finite():
    rng = np.random.default_rng(4)
    large = learn_reference(rows(rng, 2000), cohort="made up", virtual=True)
    mean, sd, correlation = shape_of(large.rows)
    z = (large.rows - mean) / sd
    squared = (z * np.linalg.solve(correlation, z.T).T).sum(1)
    assert np.quantile(squared, 0.9) == pytest.approx(chi2(4).ppf(0.9), rel=0.08)
    truth = np.diag(1 / np.sqrt(np.diag(MIX.T @ MIX)))
    truth = truth @ MIX.T @ MIX @ truth
    np.testing.assert_allclose(correlation, truth, atol=0.06)
    small = np.array([list(r.values()) for r in rows(rng, 9)])
    assert np.linalg.cond(shape_of(small)[2]) < 30, "shrunk"
    # Shrinking pulls towards no correlation.
    off = ~np.eye(4, dtype=bool)
    raw = np.corrcoef(np.array([list(r.values()) for r in rows(np.random.default_rng(4), 9)]).T)
    shrunk = shape_of(np.array([list(r.values()) for r in rows(np.random.default_rng(4), 9)]))[2]
    assert np.abs(shrunk[off]).sum() < 0.95 * np.abs(raw[off]).sum()


def test_a_saved_reference_is_the_same(tmp_path):
    rng = np.random.default_rng(5)
    reference = learn_reference(rows(rng, 120), cohort="made up", virtual=True)
    reference.save(tmp_path / "reference.json")
    again = Reference.load(tmp_path / "reference.json")
    assert (again.names, again.cohort, again.virtual, again.patients) == (NAMES, "made up", True, 120)
    new = rows(rng, 1)[0]
    assert again.distance(new) == reference.distance(new)
    for text in ("", "{}", '{"schema": "tumorcast.reference/1", "names": ["a"], "rows": [[1], [2]]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=r"bad\.json: not a reference cohort"):
            Reference.load(tmp_path / "bad.json")


def test_references_that_cannot_be_are_refused():
    rng = np.random.default_rng(6)
    good = rows(rng, 30)
    with pytest.raises(InputError, match="8 patients for 4 features; expected at least 20"):
        learn_reference(good[:8], cohort="c", virtual=True)
    with pytest.raises(InputError, match="different features"):
        learn_reference([*good, {"a": 1.0}], cohort="c", virtual=True)
    with pytest.raises(InputError, match="b is the same in all"):
        learn_reference([r | {"b": 1.0} for r in good], cohort="c", virtual=True)
    with pytest.raises(InputError, match="not finite"):
        learn_reference([*good, good[0] | {"b": np.inf}], cohort="c", virtual=True)
    with pytest.raises(InputError, match="no finite value of b, d"):
        learn_reference(good, cohort="the cohort", virtual=True).distance({"a": 1.0, "b": np.nan, "c": 0.0})


# Questions ------------------------------------------------------------------------------------------------------------


def test_each_question_has_its_thresholds():
    assert [like_the_cohort(distance(p)).verdict for p in (0.05, 0.049, 0.011, 0.01)] == [
        USABLE, REVIEW, REVIEW, NOT_USABLE,
    ]  # fmt: skip
    assert like_the_cohort(None).verdict == REVIEW
    assert [agrees(x).verdict for x in (1.0, 3.0, 3.1, 6.0, 6.1)] == [USABLE, USABLE, REVIEW, REVIEW, NOT_USABLE]
    volumes = ("volume, visit 2", "volume, visit 3")
    assert could_have_made(check(volumes, (0.3, 0.01))).verdict == USABLE
    assert could_have_made(check(volumes, (0.3, 0.0))).verdict == REVIEW
    assert could_have_made(None).verdict == REVIEW
    residuals = check((MISFIT, WORST), (0.0, 0.0))
    assert could_have_made(residuals).verdict == REVIEW
    assert could_have_made(residuals, reference=True).verdict == USABLE
    assert "volume, visit 3 (p = 0.005)" in could_have_made(check(volumes, (0.3, 0.0))).reason
    # A hundred replicates do not tell a thing that happens once in a hundred times on either side.
    assert "100 replicates, which are too few" in could_have_made(check(volumes, (0.3, 0.3), draws=100)).reason
    assert could_have_made(check(volumes, (0.3, 0.3), draws=100), reference=True).verdict == USABLE


def test_a_forecast_that_holds_response_and_progression_says_nothing():
    assert (RESPONSE, PROGRESSION) == pytest.approx((0.343, 1.728))
    wide, high, narrow = np.linspace(0.2, 2.5, 200), np.linspace(0.5, 2.5, 200), np.linspace(0.8, 1.2, 200)
    assert [says_something(10 * x, 10.0).verdict for x in (wide, high, narrow)] == [REVIEW, USABLE, USABLE]
    assert "10 cm³ last measured" in says_something(10 * wide, 10.0).reason
    assert says_something(narrow[:19], 1.0).verdict == REVIEW
    # Where none was seen, one that may be seen again is news.
    assert [says_something(x, 0.0).verdict for x in (wide, 0 * wide)] == [REVIEW, USABLE]
    assert [says_something(0.01 * x, 0.0, floor=0.05).verdict for x in (wide, 10 * wide)] == [USABLE, REVIEW]


def test_a_calibration_that_ended_badly_or_taught_nothing_is_reviewed():
    model = SimpleNamespace(free=("growth.k", "diffusion.D"))
    good = SimpleNamespace(converged=True, identified=("growth.k", "adc_shift.visit2"), iterations=5, model=model,
                           sd=np.ones(3))  # fmt: skip
    assert [f.verdict for f in ended_and_taught(good)] == [USABLE, USABLE]
    assert ended_and_taught(good)[1].reason == "They informed growth.k."
    # To know an error of the scanner is not to know the tumour.
    bad = SimpleNamespace(converged=False, identified=("adc_shift.visit2",), iterations=60, model=model, sd=np.ones(3))
    ended, taught = ended_and_taught(bad)
    assert (ended.verdict, taught.verdict) == (REVIEW, REVIEW)
    assert "60 iterations" in ended.reason
    point = SimpleNamespace(converged=True, identified=(), iterations=5, model=model, sd=np.zeros(3))
    assert "computes no posterior" in ended_and_taught(point)[1].reason


# A real forecast ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    plan = bm.Schedule.weekly("paclitaxel", 1.4, 6, 80.0, "mg/m^2", status="planned")
    patient = small_patient(32, regimen=plan, visit_days=(0.0, 19.0, 41.0)).patient
    model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel")])
    fit = bm.calibrate(model, patient.until(2))
    return fit, posterior_predictive_check(fit, 20), bm.forecast(fit, until=41.0, draws=40, curve_step=50.0)


def test_features_are_those_of_data_and_fit(made):
    fit, predictive, _ = made
    found = features(fit, predictive)
    v1, v2 = (fit.patient.volume_of(v) for v in fit.patient.visits)
    assert found["log change of volume per day"] == pytest.approx(np.log((v2 + 0.008) / (v1 + 0.008)) / 19)
    assert found["log inflation"] == pytest.approx(np.log(fit.inflation))
    assert found["growth.k, prior sds"] == pytest.approx((fit.z[0] - fit.prior.mean[0]) / fit.prior.sd[0])
    assert 0.1 < found["mean cell fraction, first visit"] < 1
    assert np.isfinite(list(found.values())).all()
    assert {n.split(",")[0] for n in found if "prior" in n} == set(fit.model.free)


def test_the_verdict_is_the_worst_answer_and_reasons_come_gravest_first(made):
    fit, predictive, forecast = made
    good = triage(forecast, predictive, distance(0.5))
    assert len(good.findings) == 6
    assert good.verdict == (REVIEW if good.reasons else USABLE)
    assert triage(forecast).verdict == REVIEW
    assert len(triage(forecast).reasons) >= 2
    apart = replace(forecast, fit=replace(fit, inflation=4.0))
    bad = triage(apart, predictive, distance(0.001))
    assert bad.verdict == NOT_USABLE
    assert bad.reasons[0].startswith("Unlike the patients of the reference")
    assert "log misfit (+2.5 sd)" in bad.reasons[0]
    assert any("4.0 times less" in r for r in bad.reasons)
    assert "not usable" in bad._repr_html_()
    early = bm.forecast(fit, times=[19.0], draws=20, curve_step=50.0)
    with pytest.raises(InputError, match="ends on day 19, the calibration on day 19"):
        triage(early, predictive)


def test_patients_without_images_have_fewer_features_and_questions():
    plan = bm.Schedule.weekly("paclitaxel", 21.0, 3, 80, "mg/m^2")
    patient = bm.Patient.from_volumes("V", [0.0, 21.0, 42.0], [10.0, 9.0, 6.0], plan, floor=0.1)
    drug = bm.Chemotherapy("paclitaxel", bm.LogNormal(0.1, 0.7))
    fit = bm.calibrate(bm.ReactionDiffusion(bm.Exponential(), bm.NoDiffusion(), [drug]), patient)
    predictive = posterior_predictive_check(fit, 100)
    found = features(fit, predictive)
    assert "log inflation" not in found and "log misfit" in found
    assert found["log first volume"] == pytest.approx(np.log(10.1))
    verdict = triage(bm.forecast(fit, until=63.0, draws=100), predictive, distance(0.5))
    assert len(verdict.findings) == 5
