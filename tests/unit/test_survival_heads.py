"""Models of the time to an event: against lifelines and scikit-survival, in pipelines and searches, and bad input."""

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("sksurv")
lifelines = pytest.importorskip("lifelines")

import torch  # noqa: E402
from sklearn.base import clone  # noqa: E402
from sklearn.dummy import DummyClassifier  # noqa: E402
from sklearn.impute import SimpleImputer  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sksurv.ensemble import RandomSurvivalForest  # noqa: E402
from sksurv.linear_model import CoxPHSurvivalAnalysis  # noqa: E402
from sksurv.util import Surv  # noqa: E402

from biomodel.errors import InputError, ModelError  # noqa: E402
from survival.curves import Curves, predict_curves  # noqa: E402
from survival.hazard import (  # noqa: E402
    AFT,
    Boosting,
    Cox,
    DiscreteHazard,
    ElasticCox,
    Forest,
    coarsened,
    curve_from_hazards,
    interval_edges,
    person_periods,
)
from survival.networks import DeepCox, DeepHazard  # noqa: E402
from survival.outcome import checked_follow_up, follow_up  # noqa: E402
from survival.stacking import Stacked, simplex_weights  # noqa: E402

NETWORK = dict(hidden=(8,), dropout=0.0, members=2, epochs=40, rate=0.01)
HEADS = {
    "Cox": Cox(),
    "ElasticCox": ElasticCox(),
    "Forest": Forest(trees=20),
    "Boosting": Boosting(trees=40),
    "AFT": AFT(),
    "log-normal AFT": AFT(lifelines.LogNormalAFTFitter(penalizer=0.01)),
    "DiscreteHazard": DiscreteHazard(LogisticRegression(), intervals=8),
    "DeepHazard": DeepHazard(**NETWORK, intervals=8),
    "DeepCox": DeepCox(**NETWORK),
    "Stacked": Stacked([("cox", Cox()), ("aft", AFT())], folds=3, points=20),
}
TIMES = np.linspace(0.1, 2.0, 12)


def patients(n=240, seed=0):
    """Exponential times with two columns that matter and one that does not; a third censored."""
    rng = np.random.default_rng(seed)
    x = pd.DataFrame(rng.normal(size=(n, 3)), columns=["size", "grade", "noise"])
    time = rng.exponential(np.exp(-(1.2 * x["size"] + 0.6 * x["grade"])))
    end = rng.exponential(2.0, n)
    return x, follow_up(np.minimum(time, end) + 1e-3, time <= end)


X, Y = patients()


@pytest.fixture(scope="module", params=sorted(HEADS))
def fitted(request):
    return clone(HEADS[request.param]).fit(X, Y)


def test_risks_and_curves(fitted):
    risk, found = fitted.predict(X), fitted.predict_curves(X, TIMES)
    assert risk.shape == (len(X),) and found.survival.shape == (len(X), len(TIMES))
    assert np.all(np.diff(found.survival, axis=1) <= 1e-9)
    assert fitted.score(X, Y) > 0.72
    # Risks and curves say the same of who is worse.
    assert np.corrcoef(np.argsort(np.argsort(risk)), np.argsort(np.argsort(-found.survival[:, 6])))[0, 1] > 0.9
    # Curves are of the right height: their mean is near the Kaplan-Meier curve of the same patients.
    kaplan = lifelines.KaplanMeierFitter().fit(Y["time"], Y["event"]).predict(TIMES).to_numpy()
    assert np.abs(found.survival.mean(0) - kaplan).max() < 0.08


def test_same_seed_same_result_and_no_trace_on_global_randomness(fitted):
    before = torch.random.get_rng_state()
    again = clone(fitted).fit(X, Y)
    assert np.array_equal(torch.random.get_rng_state(), before)
    assert np.array_equal(again.predict(X), fitted.predict(X))


def test_columns_are_taken_by_name(fitted):
    assert list(fitted.feature_names_in_) == list(X) and fitted.n_features_in_ == 3
    assert np.array_equal(fitted.predict(X[["noise", "grade", "size"]]), fitted.predict(X))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.drop(columns="grade"), "lacks grade"),
        (lambda x: x.assign(extra=1.0), "has extra, which the model was not fitted on"),
        (lambda x: x.assign(grade=np.nan), "missing or infinite values, in column grade"),
        (lambda x: x.assign(grade="high"), "columns grade hold something other than numbers"),
        (lambda x: x.to_numpy()[:, :2], "2 columns, the model was fitted on 3"),
        (lambda x: x.iloc[:0], "at least one of each"),
        (lambda x: pd.concat([x, x[["size"]]], axis=1), "columns of the same name: size"),
    ],
)
def test_bad_tables_at_prediction(fitted, change, message):
    with pytest.raises(InputError, match=message):
        fitted.predict(change(X))
    with pytest.raises(InputError, match=message):
        fitted.predict_curves(change(X), TIMES)


def test_bad_times_at_prediction(fitted):
    with pytest.raises(InputError, match="rise and lie above 0"):
        fitted.predict_curves(X, [2.0, 1.0])
    past = [1.0, Y["time"].max() * 2]
    if isinstance(fitted, AFT):
        assert fitted.predict_curves(X, past).survival.shape == (len(X), 2)
    else:
        with pytest.raises(InputError, match="nothing is known past that"):
            fitted.predict_curves(X, past)


def lists(y):
    return [tuple(row) for row in y]


def zeros(y):
    y = y.copy()
    y["time"][3] = 0.0
    return y


def censored(y):
    return follow_up(y["time"], np.zeros(len(y)))


@pytest.mark.parametrize("name", sorted(HEADS))
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X, lists(Y), "y is list; make it with survival.follow_up"),
        (X, Y["time"], "make it with survival.follow_up"),
        (X, zeros(Y), r"1 of 240 times are missing, zero or negative \(the first at position 3"),
        (X, censored(Y), "all 240 patients are censored"),
        (X[:100], Y, "X has 100 rows, y 240"),
        (X.assign(size=np.nan), Y, "X holds 240 missing or infinite values, in column size"),
        (X.assign(size="large"), Y, "columns size hold something other than numbers"),
    ],
)
def test_bad_input_to_fit(name, x, y, message):
    with pytest.raises(InputError, match=message):
        clone(HEADS[name]).fit(x, y)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_not_fitted(name):
    with pytest.raises(InputError, match="not fitted"):
        clone(HEADS[name]).predict(X)


def test_fewer_events_than_columns():
    wide = np.random.default_rng(0).normal(size=(30, 20))
    few = follow_up(np.arange(1, 31), [1] * 10 + [0] * 20)
    with pytest.raises(InputError, match="10 events for 20 columns"):
        Cox(alpha=0.0).fit(wide, few)
    assert np.isfinite(Cox(alpha=10.0).fit(wide, few).predict(wide)).all()
    with pytest.raises(InputError, match="10 events for 22 parameters"):
        AFT(lifelines.WeibullAFTFitter(penalizer=0.0)).fit(wide, few)
    with pytest.raises(InputError, match="a column is constant"):
        Cox(alpha=0.0).fit(X.assign(noise=1.0), Y)


def test_an_impossible_fit_is_said():
    with pytest.raises(ModelError, match="larger penalizer"):
        # One column tells the time: without a penalty its coefficient has no bound.
        AFT(lifelines.WeibullAFTFitter(penalizer=0.0)).fit(
            np.log(Y["time"])[:, None], follow_up(Y["time"], Y["time"] > 0)
        )


@pytest.mark.parametrize(
    ("time", "event", "message"),
    [
        ([1.0, -2.0], [1, 0], "first at position 1: -2"),
        ([1.0, np.nan], [1, 0], "missing, zero or negative"),
        ([1.0, 2.0], [1, 2], "event at position 1 is 2"),
        ([1.0, 2.0], ["yes", "no"], "event holds 'yes'"),
        (["soon", "late"], [1, 0], "no number"),
        ([1.0, 2.0], [1], "shape"),
        ([], [], "shape"),
    ],
)
def test_bad_follow_up(time, event, message):
    with pytest.raises(InputError, match=message):
        follow_up(time, event)


def test_follow_up_is_what_scikit_survival_takes():
    y = Surv.from_arrays(Y["event"], Y["time"], "dead", "days")
    assert np.array_equal(checked_follow_up(y, "here"), Y)
    with pytest.raises(InputError, match="here: only 1 of 2 patients had the event; at least 2 events are needed"):
        checked_follow_up(follow_up([1, 2], [1, 0]), "here", events=2)


def test_cox_is_that_of_lifelines_and_scikit_survival():
    table = X.assign(time=Y["time"], event=Y["event"])
    theirs = lifelines.CoxPHFitter().fit(table, "time", "event")
    ours = Cox(alpha=0.0).fit(X, Y)
    assert ours.coef_ / X.to_numpy().std(0) == pytest.approx(theirs.params_.to_numpy(), abs=1e-6)
    plain = CoxPHSurvivalAnalysis(alpha=0.0, ties="efron").fit(X, Y)
    expected = np.array([f(TIMES) for f in plain.predict_survival_function(X)])
    assert ours.predict_curves(X, TIMES).survival == pytest.approx(expected, abs=1e-8)


def test_aft_is_that_of_lifelines():
    table = (X - X.mean()) / X.std(ddof=0)
    theirs = lifelines.WeibullAFTFitter(penalizer=0.01).fit(
        table.assign(time=Y["time"], event=Y["event"]), "time", "event"
    )
    expected = theirs.predict_survival_function(table, times=TIMES).to_numpy().T
    assert AFT().fit(X, Y).predict_curves(X, TIMES).survival == pytest.approx(expected, abs=1e-6)


def test_forest_is_that_of_scikit_survival_when_times_are_not_coarsened():
    theirs = RandomSurvivalForest(20, min_samples_leaf=15, min_samples_split=30, random_state=0).fit(X, Y)
    ours = Forest(trees=20, times=10_000).fit(X, Y)
    assert ours.predict(X) == pytest.approx(theirs.predict(X), rel=1e-12)
    assert predict_curves(theirs, X, TIMES).survival == pytest.approx(ours.predict_curves(X, TIMES).survival, abs=1e-12)


def test_coarsened_times_are_near_and_balanced():
    rough = coarsened(Y, 50)
    assert len(np.unique(rough["time"])) <= 50 and np.array_equal(rough["event"], Y["event"])
    assert np.array_equal(coarsened(Y, 10_000), Y)
    moved = (rough["time"] - Y["time"])[Y["event"]]
    assert abs(np.median(moved)) < 0.01 and np.mean(moved > 0) == pytest.approx(0.5, abs=0.1)


def test_person_periods():
    y = follow_up([0.5, 1.0, 1.4, 1.6, 2.0, 0.4], [1, 1, 0, 0, 1, 0])
    rows, columns, event = person_periods(y, np.array([0.0, 1.0, 2.0]))
    assert rows.tolist() == [0, 1, 2, 3, 3, 4, 4]
    assert columns.tolist() == [0, 0, 0, 0, 1, 0, 1]
    assert event.tolist() == [1, 1, 0, 0, 0, 0, 1]


def test_hazards_without_covariates_are_kaplan_meier_at_the_edges():
    y = follow_up(np.random.default_rng(1).exponential(size=300), np.ones(300))
    model = DiscreteHazard(ByInterval(), intervals=10).fit(np.zeros((300, 1)), y)
    edges = interval_edges(y, 10)[1:-1]
    kaplan = lifelines.KaplanMeierFitter().fit(y["time"], y["event"]).predict(edges).to_numpy()
    assert model.predict_curves(np.zeros((1, 1)), edges).survival[0] == pytest.approx(kaplan, abs=1e-12)


class ByInterval(DummyClassifier):
    """The share of events in each interval."""

    def fit(self, X, y):
        self.share_ = np.bincount(X[:, -1].astype(int), y) / np.bincount(X[:, -1].astype(int))
        return self

    def predict_proba(self, X):
        share = self.share_[X[:, -1].astype(int)]
        return np.column_stack((1 - share, share))


def test_curve_from_hazards():
    edges, hazard = np.array([0.0, 1.0, 3.0]), np.array([[0.2, 0.5]])
    found = curve_from_hazards(hazard, edges, np.array([0.5, 1.0, 2.0, 3.0]))
    assert found[0] == pytest.approx([0.8**0.5, 0.8, 0.8 * 0.5**0.5, 0.4])


def test_loss_of_deep_cox_is_the_partial_likelihood():
    rng = np.random.default_rng(3)
    time, event, risk = rng.integers(1, 8, 40).astype(float), rng.random(40) < 0.6, rng.normal(size=40)
    expected = -sum(risk[i] - np.log(np.exp(risk[time >= time[i]]).sum()) for i in np.flatnonzero(event)) / event.sum()
    target = torch.tensor(np.column_stack((time, event)))
    assert float(DeepCox()._loss(torch.tensor(risk)[:, None], target)) == pytest.approx(expected, rel=1e-12)


def test_deep_hazard_sees_hazards_that_cross():
    """Early deaths in one group, late ones in the other: the same risk over all, opposite curves."""
    rng = np.random.default_rng(0)
    group = np.repeat([0.0, 1.0], 200)
    time = np.where(group == 1, rng.weibull(0.5, 400), 0.9 * rng.weibull(4.0, 400)) + 1e-3
    model = DeepHazard(hidden=(16,), dropout=0.0, members=2, intervals=12).fit(
        group[:, None], follow_up(time, time > 0)
    )
    found = model.predict_curves([[0.0], [1.0]], [0.3, 1.6]).survival
    assert found[0, 0] - found[1, 0] > 0.25 and found[1, 1] - found[0, 1] > 0.08


def test_weights_of_a_mixture_are_the_best():
    rng = np.random.default_rng(0)
    times = np.array([0.5, 1.0, 1.5])
    truth = np.exp(-times * np.exp(1.2 * X["size"] + 0.6 * X["grade"]).to_numpy()[:, None])
    noise = np.exp(-times * np.exp(rng.normal(size=(len(X), 1))))
    flat = np.tile(np.exp(-times), (len(X), 1))
    w = simplex_weights(np.stack([noise, truth, flat]), Y, times)
    assert w.sum() == pytest.approx(1) and w.min() >= 0 and w[1] > 0.8
    from sksurv.metrics import brier_score

    def score(v):
        return brier_score(Y, Y, v[0] * noise + v[1] * truth + v[2] * flat, times)[1].mean()

    others = rng.dirichlet(np.ones(3), 200)
    assert score(w) <= min(map(score, others)) + 1e-9


def test_a_mixture_leaves_out_what_does_not_help():
    model = Stacked([("cox", Cox()), ("noise", make_pipeline(Shuffle(), Cox(1e-3)))], folds=3).fit(X, Y)
    assert model.weights_["cox"] > 0.9 and sum(model.weights_.values()) == pytest.approx(1)
    with pytest.raises(InputError, match="no heads"):
        Stacked().fit(X, Y)
    with pytest.raises(InputError, match="take fewer folds"):
        Stacked([("cox", Cox())]).fit(X[:40], follow_up(np.arange(1, 41), [1] * 3 + [0] * 37))


class Shuffle(SimpleImputer):
    """A step that destroys what the columns say."""

    def transform(self, X):
        return np.random.default_rng(0).permutation(super().transform(X))


def test_pipelines_and_searches():
    holes = X.mask(np.random.default_rng(0).random(X.shape) < 0.1)
    pipeline = make_pipeline(SimpleImputer(), Cox())
    search = GridSearchCV(pipeline, {"cox__alpha": [0.1, 1e4]}, cv=3).fit(holes, Y)
    assert search.best_params_ == {"cox__alpha": 0.1}
    curves = predict_curves(search, holes, TIMES)
    assert curves.survival == pytest.approx(predict_curves(search.best_estimator_, holes, TIMES).survival)
    assert cross_val_score(pipeline, holes, Y, cv=3).min() > 0.65
    with pytest.raises(InputError, match="LogisticRegression predicts no survival curves"):
        predict_curves(LogisticRegression().fit(X, Y["event"]), X, TIMES)


def test_curves():
    curves = Curves(np.array([1.0, 2.0, 4.0]), np.array([[0.9, 0.6, 0.5], [1.0, 0.9, 0.8]]))
    assert curves.at([0.5, 1.0, 3.9]).tolist() == [[1.0, 0.9, 0.6], [1.0, 1.0, 0.9]]
    assert curves.mean_time(3.0) == pytest.approx([1 + 0.9 + 0.6, 1 + 1 + 0.9])
    assert curves.median().tolist() == [4.0, np.inf]
    with pytest.raises(InputError, match="say nothing past that"):
        curves.at([4.1])
    with pytest.raises(InputError, match="say nothing past that"):
        curves.mean_time(5.0)


@pytest.mark.parametrize(
    ("times", "values", "message"),
    [
        ([1.0, 2.0], [[0.5, 0.6]], "rises"),
        ([1.0, 2.0], [[1.1, 0.6]], "leaves"),
        ([1.0, 2.0], [[np.nan, 0.6]], "leaves"),
        ([0.0, 2.0], [[1.0, 0.6]], "above 0"),
        ([1.0, 2.0], [[0.6]], "expected"),
    ],
)
def test_bad_curves(times, values, message):
    with pytest.raises(InputError, match=message):
        Curves(np.array(times), np.array(values))
