"""Calibrated probabilities of response: calibration, conformal sets, thresholds, fusion; noise predicts nothing."""

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("sksurv")

from scipy.special import expit, logit  # noqa: E402
from sklearn.base import clone  # noqa: E402
from sklearn.isotonic import IsotonicRegression  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.model_selection import GridSearchCV  # noqa: E402

from biomodel.errors import InputError  # noqa: E402
from survival import metrics  # noqa: E402
from survival.calibration import (  # noqa: E402
    ConformalSets,
    Costs,
    Isotonic,
    SensitivityFloor,
    SpecificityFloor,
    Temperature,
    VennAbers,
)
from survival.pcr import Calibrated, LateFusion, Mixture, elastic_net, positive_logistic, ridge  # noqa: E402
from survival.splits import PatientFolds, out_of_fold  # noqa: E402


def patients(n=300, seed=0):
    """Two sources; the outcome depends on a column of each."""
    rng = np.random.default_rng(seed)
    x = pd.DataFrame(rng.normal(size=(n, 5)), columns=["HR", "age", "volume", "change", "noise"])
    truth = expit(1.2 * x["HR"] + 1.2 * x["change"] - 0.7)
    return x, (rng.random(n) < truth).astype(int), truth.to_numpy()


X, Y, TRUTH = patients()
SOURCES = {"clinical": ["HR", "age"], "image": ["volume", "change", "noise"]}
MODELS = {
    "Calibrated": Calibrated(ridge(), Temperature(shift=True)),
    "Mixture": Mixture([("ridge", ridge()), ("net", elastic_net(C=0.3))]),
    "LateFusion": LateFusion(SOURCES, ridge()),
}


def probability(model, rows):
    return model.predict_proba(rows)[:, 1]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models(name):
    model = clone(MODELS[name]).fit(X, Y)
    fresh, label, truth = patients(2000, 1)
    p = probability(model, fresh)
    assert metrics.auroc(label, p) > metrics.auroc(label, truth) - 0.02
    assert 0.8 < metrics.calibration_line(label, p)[0] < 1.25
    assert np.array_equal(probability(clone(model).fit(X, Y), fresh), p)
    assert probability(model, fresh[list(X)[::-1]]) == pytest.approx(p, abs=1e-12)
    assert probability(model, fresh.to_numpy()) == pytest.approx(p, abs=1e-12)
    if name != "LateFusion":  # which needs names
        plain = clone(MODELS[name]).fit(X.to_numpy(), Y)
        assert probability(plain, fresh) == pytest.approx(p, abs=1e-12)
    assert np.array_equal(model.predict(fresh), p >= 0.5)
    sets = model.sets(fresh, 0.9)
    for k in (0, 1):
        assert sets[label == k, k].mean() == pytest.approx(0.9, abs=0.06)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X, np.ones(300), "all 300 outcomes are 1; both classes are needed"),
        (X, np.arange(300) < 3, "3 patients of one class for 5 folds"),
        (X, Y[:10], "X has 300 rows, y 10"),
        (X, np.where(Y, 2, 0), "must hold 0 and 1"),
        (X.assign(HR="positive"), Y, "columns HR hold something other than numbers"),
        (X.set_axis(range(5), axis=1), Y, "names of columns must be text"),
    ],
)
def test_bad_input_to_fit(name, x, y, message):
    with pytest.raises(InputError, match=message):
        clone(MODELS[name]).fit(x, y)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_bad_input_to_predict(name):
    model = clone(MODELS[name])
    with pytest.raises(InputError, match="not fitted"):
        model.predict_proba(X)
    model.fit(X, Y)
    with pytest.raises(InputError, match="lacks change"):
        model.predict_proba(X.drop(columns="change"))
    with pytest.raises(InputError, match="has arm, which the model was not fitted on"):
        model.predict_proba(X.assign(arm=1.0))
    with pytest.raises(InputError, match=r"missing or infinite values, in column HR|a part of the source 'clinical'"):
        model.predict_proba(X.assign(HR=np.nan))


def test_labels_shuffled_predict_nothing():
    """A leak (of a patient, of a choice made outside of the folds) would let noise be predicted."""
    rng = np.random.default_rng(5)
    found, model = [], Mixture([("ridge", ridge()), ("weak", ridge(1.0))], folds=3)
    for k in range(4):
        shuffled = rng.permutation(Y)
        p = out_of_fold(model, X, shuffled, PatientFolds(5, seed=k), probability)
        found.append(metrics.auroc(shuffled, p[0]))
    # The standard error of one AUROC of 300 patients is 0.035, of the mean of four 0.018.
    assert abs(np.mean(found) - 0.5) < 0.055
    p = out_of_fold(model, X, Y, PatientFolds(5), probability)
    assert metrics.auroc(Y, p[0]) > 0.75


def test_noise_in_place_of_the_images_predicts_nothing():
    noise = X.assign(**{c: np.random.default_rng(8).normal(size=300) for c in SOURCES["image"]})
    images = out_of_fold(ridge(), noise[SOURCES["image"]], Y, PatientFolds(5, repeats=3), probability)
    assert abs(np.mean([metrics.auroc(Y, p) for p in images]) - 0.5) < 0.08


def test_temperature_mends_what_was_broken():
    rng = np.random.default_rng(0)
    truth = rng.beta(2, 3, 4000)
    label = (rng.random(4000) < truth).astype(int)
    wrong = expit(2.5 * logit(truth))
    assert Temperature().learn(label, wrong).slope_ == pytest.approx(1 / 2.5, rel=0.06)
    off = expit(2.5 * logit(truth) + 1.0)
    found = Temperature(shift=True).learn(label, off)
    assert found.slope_ == pytest.approx(1 / 2.5, rel=0.06) and found.shift_ == pytest.approx(-0.4, abs=0.1)
    line = LogisticRegression(C=np.inf, tol=1e-10).fit(logit(off)[:, None], label)
    assert (found.slope_, found.shift_) == pytest.approx((line.coef_[0, 0], line.intercept_[0]), abs=1e-4)
    assert found.apply(off).mean() == pytest.approx(label.mean(), abs=1e-9)


@pytest.mark.parametrize(
    "calibration", [Temperature(shift=True), Isotonic(), VennAbers()], ids=lambda c: type(c).__name__
)
def test_calibrations_make_a_bad_model_good(calibration):
    rng = np.random.default_rng(1)
    truth = np.round(rng.beta(2, 3, 3000), 2).clip(0.01, 0.99)
    label = (rng.random(3000) < truth).astype(int)
    wrong = truth**3
    learned = calibration.learn(label[:1500], wrong[:1500])
    before = metrics.expected_calibration_error(label[1500:], wrong[1500:])
    after = metrics.expected_calibration_error(label[1500:], learned.apply(wrong[1500:]))
    assert before > 0.15 and after < 0.045
    for y, p in ((np.ones(50), wrong[:50]), (label[:50], 2 * np.ones(50))):
        with pytest.raises(InputError):
            type(calibration)().learn(y, p)


def test_venn_abers_by_hand():
    label, p = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])
    low, high = VennAbers().learn(label, p).interval([0.5, 0.5, 0.2])
    for k, x in enumerate([0.5, 0.5, 0.2]):
        ends = [IsotonicRegression().fit(np.append(p, x), np.append(label, y)).predict([x])[0] for y in (0, 1)]
        assert (low[k], high[k]) == pytest.approx(ends)
    assert np.all(low <= high)
    assert VennAbers().learn(label, p).apply([0.5])[0] == pytest.approx(high[0] / (1 - low[0] + high[0]))


def test_conformal_sets_cover_in_each_class():
    """Mean over 200 calibration sets, so that what is tested is the promise itself: at least the coverage."""
    rng = np.random.default_rng(0)
    hits = np.zeros(2)
    for _ in range(200):
        y = (rng.random(160) < 0.3).astype(int)
        p = expit(rng.normal(1.5 * y - 1.0, 1.0))
        sets = ConformalSets(0.8).learn(y[:80], p[:80]).sets(p[80:])
        hits += [sets[y[80:] == k, k].mean() / 200 for k in (0, 1)]
    assert np.all(hits > 0.79) and np.all(hits < 0.85)
    with pytest.raises(InputError, match="coverage 0.99 needs 99"):
        ConformalSets(0.99).learn([0, 1] * 20, np.full(40, 0.5))
    with pytest.raises(InputError, match="above 0 and below 1"):
        ConformalSets(1.0)


def test_conformal_p_values_by_hand():
    known = ConformalSets(0.5).learn([0, 0, 0, 1, 1], [0.1, 0.2, 0.6, 0.5, 0.9])
    # 0.55 as "no": of the three, only 0.6 looked as little like it; as "yes": only 0.5 did.
    assert known.p_values([0.55])[0] == pytest.approx([2 / 4, 2 / 3])


def test_thresholds():
    assert Costs(1.0, 4.0).threshold() == pytest.approx(0.2)
    y, p = np.repeat([1, 0], [4, 6]), np.array([0.9, 0.7, 0.6, 0.2, 0.8, 0.5, 0.4, 0.3, 0.1, 0.05])
    for floor, expected in ((0.75, 0.6), (0.5, 0.7), (0.99, 0.2)):
        t = SensitivityFloor(floor).threshold(y, p)
        assert t == expected and metrics.at_threshold(y, p, t).sensitivity >= floor
    for floor, expected in ((0.5, 0.4), (0.8, 0.6), (0.99, 0.9)):
        t = SpecificityFloor(floor).threshold(y, p)
        found = metrics.at_threshold(y, p, t)
        assert t == expected and found.specificity >= floor
    for bad in (lambda: Costs(0.0, 1.0), lambda: SensitivityFloor(1.0), lambda: SpecificityFloor(0.0)):
        with pytest.raises(InputError):
            bad()


def test_the_threshold_of_costs_costs_least():
    y = (np.random.default_rng(0).random(20_000) < 0.3).astype(int)
    p = expit(np.random.default_rng(1).normal(2.0 * y - 1.0, 1.0))
    p = Temperature(shift=True).learn(y, p).apply(p)
    costs = Costs(1.0, 3.0)

    def cost(t):
        found = metrics.at_threshold(y, p, t)
        return found.false_positive + 3 * found.false_negative

    grid = np.linspace(0.05, 0.95, 91)
    assert abs(grid[np.argmin([cost(t) for t in grid])] - costs.threshold()) < 0.05


def test_weights_of_a_mixture():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4000, 2))
    label = (rng.random(4000) < expit(0.3 + z @ [1.5, 0.0])).astype(int)
    assert positive_logistic(z, label, 0.0) == pytest.approx([0.3, 1.5, 0.0], abs=0.15)
    together = positive_logistic(z, label, 1e9)
    assert together[1] == pytest.approx(together[2], abs=1e-3)
    inverse = positive_logistic(-z, label, 0.0)
    assert inverse[1:].tolist() == [0.0, 0.0]
    with pytest.raises(InputError, match="no models"):
        Mixture([]).fit(X, Y)


def test_a_missing_source():
    """A third lacks images: they help train the clinical model, and are predicted from it alone."""
    gone = X.copy()
    gone.loc[:99, SOURCES["image"]] = np.nan
    model = LateFusion(SOURCES, ridge()).fit(gone, Y)
    fresh, label, truth = patients(2000, 1)
    whole = probability(model, fresh)
    fresh.loc[:, SOURCES["image"]] = np.nan
    clinical = probability(model, fresh)
    assert metrics.auroc(label, whole) > metrics.auroc(label, clinical) + 0.08
    assert metrics.auroc(label, clinical) > 0.68
    assert 0.8 < metrics.calibration_line(label, clinical)[0] < 1.3
    fresh.loc[:, SOURCES["clinical"]] = np.nan
    assert probability(model, fresh) == pytest.approx(Y.mean())
    with pytest.raises(InputError, match="no column stage"):
        LateFusion({"clinical": ["stage"]}, ridge()).fit(X, Y)
    with pytest.raises(InputError, match="too few patients of one class have the source 'image'"):
        LateFusion(SOURCES, ridge()).fit(X.assign(**{c: np.nan for c in SOURCES["image"]}), Y)


def test_search():
    search = GridSearchCV(Mixture([("ridge", ridge())]), {"shrink": [1.0, 10.0]}, cv=3, scoring="roc_auc").fit(X, Y)
    assert search.best_score_ > 0.75
