"""Survival curves on METABRIC, GBSG and SUPPORT beside tuned Cox, random survival forest and gradient boosting.

The split is the published one. Everything is chosen by cross-validation on the training part: the weights of the
mixture, and for each peer the best setting, once for the concordance and once for the Brier score. Then the test part
is opened, once. Harrell's C; IBS on 60 times between the 5th and 90th percentile of the test times; differences with
paired bootstrap intervals over test patients.
Data: Katzman et al. 2018, doi:10.1186/s12874-018-0482-1, read from the folder named by TUMORCAST_DATA.

Then recurrence-free survival of I-SPY 1 (221 patients, 63 events; Hylton et al. 2016, doi:10.1148/radiol.2015150013):
concordance in 10 x 5 cross-validation, everything tuned inside, from the scans before surgery and the clinical record,
and with pCR and RCB class, which are known after surgery (nobody had an event or left before day 179).

Run: TUMORCAST_DATA=... python tests/benchmarks/bench_survival.py [--only metabric gbsg support ispy1] [--repeats 10]
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.compose import make_column_transformer
from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer

import survival as sv
from survival.cohorts import benchmark_parts, ispy1
from survival.metrics import Concordance, bootstrap, brier_by_patient, d_calibration, harrell_c, uno_c
from survival.splits import PatientFolds, out_of_fold

DRAWS = 1000
TARGET = {"metabric": 0.66, "gbsg": 0.69, "support": 0.63}
PUBLISHED = {"metabric": 0.643, "gbsg": 0.668, "support": 0.618}  # DeepSurv, Katzman et al. 2018


def candidates(X, big):
    """Settings by name; the word before the colon is the kind of model. The large table gets fewer and cheaper ones."""
    many = [j for j in range(X.shape[1]) if X.iloc[:, j].nunique() > 12]
    splines = make_column_transformer((SplineTransformer(5, degree=3, knots="quantile"), many), remainder="passthrough")
    trees = 60 if big else 100
    found = {f"Cox: alpha {a:g}": sv.Cox(a) for a in (0.1, 10.0, 100.0)}
    found["splines: Cox, alpha 10"] = make_pipeline(splines, sv.Cox(10.0))
    for leaf in (15, 30) if big else (5, 15, 30):
        for features in ("sqrt", 0.5, 0.8) if big else ("sqrt", 0.6):
            found[f"forest: leaf {leaf}, features {features}"] = sv.Forest(
                trees, leaf, features, times=40 if big else 60
            )
    settings = [(3, 0.1, 60), (5, 0.1, 60)] if big else [(1, 0.1, 300), (2, 0.05, 200), (3, 0.05, 150), (4, 0.03, 150)]
    for depth, rate, count in settings:
        found[f"boosting: depth {depth}"] = sv.Boosting(count, depth, 30, rate, times=50)
    hazard = dict(min_samples_leaf=60, l2_regularization=5.0, random_state=0)
    for leaves, count in ((4, 150), (8, 100), (12, 250)):
        classifier = HistGradientBoostingClassifier(
            learning_rate=0.05, max_iter=count, max_leaf_nodes=leaves, max_features=0.6, **hazard
        )
        found[f"hazards: {leaves} leaves"] = sv.DiscreteHazard(classifier, 15)
    extra = ExtraTreesClassifier(60, min_samples_leaf=40, max_features=0.7, random_state=0)
    found["hazards: extra trees"] = sv.DiscreteHazard(extra, 12)
    if not big:
        found["networks: hazard"] = sv.DeepHazard(members=4, intervals=15)
        found["networks: Cox"] = sv.DeepCox(members=4)
    return found


def run(folder, name):
    train, test = benchmark_parts(folder, name)
    big, began = len(train.X) > 5000, time.process_time()
    models = candidates(train.X, big)
    mixture = sv.Stacked(list(models.items()), folds=3 if big else 5)
    mixture.fit(train.X.to_numpy(), train.y)
    risk = np.stack([1 - c.mean(1) for c in at_events(mixture, train.y)])
    c = np.array([harrell_c(train.y, r) for r in risk])
    loss = np.empty(len(models))
    for k, curves in enumerate(mixture.out_of_fold_):
        inner = mixture.grid_ < train.y["time"].max()
        known = sv.Curves(mixture.grid_[inner], curves[:, inner])
        loss[k] = brier_by_patient(train.y, train.y, known).mean()
    print(
        f"\n{name}: {len(train.X)} patients in training, {len(test.X)} in the test part; cross-validation of training:"
    )
    for k, key in enumerate(models):
        print(f"  {key:34s} C {c[k]:.4f}  IBS {loss[k]:.4f}  weight {mixture.weights_[key]:.2f}")
    chosen = {}
    for kind in ("Cox", "forest", "boosting"):
        own = [k for k, key in enumerate(models) if key.startswith(kind + ":")]
        keys = list(models)
        chosen[kind] = (keys[max(own, key=lambda k: c[k])], keys[min(own, key=lambda k: loss[k])])
    fitted = {key: refit(models[key], train) for key in dict.fromkeys(k for pair in chosen.values() for k in pair)}
    first, last = np.quantile(test.y["time"], (0.05, 0.9))
    grid = np.linspace(first, last, 60)
    return report(name, train, test, grid, mixture, chosen, fitted, time.process_time() - began)


def at_events(mixture, y):
    """Curves out of fold, at the times of the grid nearest to quantiles of the times of events."""
    quantiles = np.quantile(y["time"][y["event"]], np.arange(0.01, 1, 0.01))
    near = np.abs(quantiles[:, None] - mixture.grid_).argmin(1)
    return mixture.out_of_fold_[:, :, near]


def refit(model, train):
    """The chosen setting on the whole training part; forests with more trees."""
    model = clone(model)
    if isinstance(model, sv.Forest):
        model.set_params(trees=300)
    return model.fit(train.X.to_numpy(), train.y)


def report(name, train, test, grid, mixture, chosen, fitted, seconds):
    """Opens the test part: prints the table of one data set."""
    x, y, n = test.X.to_numpy(), test.y, len(test.y)
    ours = mixture.predict(x)
    pairs = {"tumorcast, mixture": Concordance(y, ours)}
    each = {"tumorcast, mixture": brier_each(train.y, y, mixture.predict_curves(x, grid))}
    for kind, (by_c, by_loss) in chosen.items():
        pairs[f"tuned {kind}"] = Concordance(y, fitted[by_c].predict(x))
        each[f"tuned {kind}"] = brier_each(train.y, y, fitted[by_loss].predict_curves(x, grid))
    print(
        f"  test part, target C {TARGET[name]}, DeepSurv as published {PUBLISHED[name]}; differences: ours less theirs"
    )
    print(f"  {'model':20s}{'C':>7s}{'C - C of model':>27s}{'IBS':>8s}{'IBS / model':>13s}{'IBS - IBS of model':>30s}")
    first = next(iter(pairs))
    for key in pairs:
        line = f"  {key:20s}{pairs[key]():7.4f}"
        if key == first:
            print(f"{line}{'':27s}{each[key].mean():8.4f}")
            continue
        dc = bootstrap(lambda w, k=key: pairs[first](w) - pairs[k](w), n, DRAWS, seed=1)
        di = bootstrap(lambda w, k=key: float(w @ (each[first] - each[k]) / w.sum()), n, DRAWS, seed=1)
        ratio = each[first].mean() / each[key].mean()
        print(f"{line}  {dc.value:+.4f} ({dc.low:+.4f}, {dc.high:+.4f}){each[key].mean():8.4f}{ratio:13.3f}"
              f"    {di.value:+.4f} ({di.low:+.4f}, {di.high:+.4f})")  # fmt: skip
    forest = fitted[chosen["forest"][0]]
    read = 1 - forest.predict_curves(x, forest.event_times_).survival.mean(1)
    ends = np.minimum(y["time"], mixture.last_time_)
    curves = mixture.predict_curves(x, np.unique(ends))
    own = curves.survival[np.arange(n), np.searchsorted(curves.times, ends)]
    spread = bootstrap(pairs[first], n, DRAWS, seed=2)
    print(f"  the forest with our reading of risk (probability of the event by the time of a random event): "
          f"C {harrell_c(y, read):.4f}")  # fmt: skip
    print(f"  ours: C {spread}; Uno's C {uno_c(train.y, y, ours, until=grid[-1]):.4f}; D-calibration p "
          f"{d_calibration(y, own).p:.3f}; {seconds:.0f} CPU-seconds for all models of this data set")  # fmt: skip
    return (
        name,
        pairs[first](),
        max(p() for k, p in pairs.items() if k != first),
        each[first].mean(),
        min(e.mean() for k, e in each.items() if k != first),
    )


def brier_each(train, y, curves):
    """Each patient's part of the integrated Brier score."""
    part = brier_by_patient(train, y, curves)
    return np.trapezoid(part, curves.times, axis=1) / np.ptp(curves.times)


def imputed(model):
    """The model after each missing value is predicted from the other columns, learned inside of the fold."""
    return make_pipeline(IterativeImputer(max_iter=10, tol=1e-2, random_state=0), model)


def ispy1_models(columns, surgery):
    """Penalised Cox on all columns, and a mixture of models of few columns and of a forest."""
    after = ["pCR", "RCB class"] if surgery else []

    def some(names, head):
        return make_pipeline(make_column_transformer(("passthrough", [columns.index(n) for n in names])), head)

    plain = [n for n in columns if n != "diameter mean"]
    alphas = {"pipeline__cox__alpha": [5.0, 20.0, 100.0]}
    floor = GridSearchCV(imputed(some(plain, sv.Cox())), alphas, cv=PatientFolds(4, seed=7))
    record = ["age", "PR", "HR", "HER2"]
    heads = [
        ("mean", imputed(some(["PR", "diameter mean", *after], sv.Cox(20.0)))),
        ("third visit", imputed(some(["PR", "diameter 3", *after], sv.Cox(20.0)))),
        ("record", imputed(some([*record, "diameter 3", *after], sv.Cox(20.0)))),
        (
            "forest",
            imputed(some([*record, *(f"diameter {k}" for k in (1, 2, 3, 4)), *after], sv.Forest(100, 15, 0.4, 50))),
        ),
    ]
    return {"tumorcast, mean of ranks": Ranks(heads), "tuned Cox, all columns": floor}


class Ranks(BaseEstimator):
    """The mean of the ranks of risk that several models give a patient among their training patients."""

    def __init__(self, heads):
        self.heads = heads

    def fit(self, X, y):
        self.models_ = [clone(head).fit(X, y) for _, head in self.heads]
        self.known_ = [np.sort(model.predict(X)) for model in self.models_]
        return self

    def predict(self, X):
        pairs = zip(self.models_, self.known_, strict=True)
        return np.mean([np.searchsorted(known, model.predict(X)) / len(known) for model, known in pairs], axis=0)


def recurrence(folder, repeats):
    for surgery, target in ((False, 0.66), (True, 0.72)):
        table, began = ispy1(folder, at_surgery=surgery), time.process_time()
        x, y, n = table.X.to_numpy(), table.y, len(table.y)
        found = {
            name: [
                Concordance(y, p)
                for p in out_of_fold(model, x, y, PatientFolds(5, repeats), lambda m, rows: m.predict(rows))
            ]
            for name, model in ispy1_models(list(table.X), surgery).items()
        }

        def mean(w, name):
            return float(np.mean([pairs(w) for pairs in found[name]]))  # noqa: B023

        ours, floor = found
        print(f"\nI-SPY 1, {'at surgery, with pCR and RCB' if surgery else 'before surgery'}: {n} patients, "
              f"{y['event'].sum()} events, {repeats} x 5 folds; target C {target}")  # fmt: skip
        for name in found:
            print(f"  {name:26s} C {bootstrap(lambda w, name=name: mean(w, name), n, 300)}")  # noqa: B023
        gain = bootstrap(lambda w: mean(w, ours) - mean(w, floor), n, 300, null=0.0)  # noqa: B023
        print(f"  difference {gain.value:+.4f} ({gain.low:+.4f}, {gain.high:+.4f}), p {gain.p:.3f}; "
              f"{time.process_time() - began:.0f} CPU-seconds", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*TARGET, "ispy1"], default=[*TARGET, "ispy1"])
    parser.add_argument("--repeats", type=int, default=10, help="of the cross-validation of I-SPY 1")
    asked = parser.parse_args()
    folder = os.environ.get("TUMORCAST_DATA", "")
    if not folder:
        sys.exit("TUMORCAST_DATA is not set: it names the folder with survival/metabric.h5 and the others.")
    rows = [run(Path(folder), name) for name in asked.only if name in TARGET]
    if "ispy1" in asked.only:
        recurrence(Path(folder), asked.repeats)
    if not rows:
        return
    print(f"\n{'':10s}{'C':>8s}{'best peer':>11s}{'target':>8s}{'IBS':>9s}{'best peer':>11s}")
    for name, c, peer, loss, other in rows:
        print(f"{name:10s}{c:8.4f}{peer:11.4f}{TARGET[name]:8.2f}{loss:9.4f}{other:11.4f}")


if __name__ == "__main__":
    main()
