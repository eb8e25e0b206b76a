"""Survival curves on METABRIC, GBSG and SUPPORT beside tuned Cox, random survival forest and gradient boosting.

The split is the published one. Everything is chosen by cross-validation on the training part: the weights of the
mixture, and for each peer the best setting, once for the concordance and once for the Brier score. Then the test part
is opened, once. Harrell's C; IBS on 60 times between the 5th and 90th percentile of the test times; differences with
paired bootstrap intervals over test patients.
Data: Katzman et al. 2018, doi:10.1186/s12874-018-0482-1, read from the folder named by TUMORCAST_DATA.

Run: TUMORCAST_DATA=... python tests/benchmarks/bench_survival.py [--only metabric gbsg support]
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer

import survival as sv
from survival.cohorts import benchmark_parts
from survival.metrics import Concordance, bootstrap, brier_by_patient, d_calibration, harrell_c, uno_c

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TARGET), default=list(TARGET))
    asked = parser.parse_args()
    folder = os.environ.get("TUMORCAST_DATA", "")
    if not folder:
        sys.exit("TUMORCAST_DATA is not set: it names the folder with survival/metabric.h5 and the others.")
    rows = [run(Path(folder), name) for name in asked.only]
    print(f"\n{'':10s}{'C':>8s}{'best peer':>11s}{'target':>8s}{'IBS':>9s}{'best peer':>11s}")
    for name, c, peer, loss, other in rows:
        print(f"{name:10s}{c:8.4f}{peer:11.4f}{TARGET[name]:8.2f}{loss:9.4f}{other:11.4f}")


if __name__ == "__main__":
    main()
