"""pCR of I-SPY 2 from MRI features and the clinical record: 384 patients, 10 x 5 nested cross-validation.

Everything is tuned and calibrated inside the training folds, for us and for the ridge logistic regression beside us,
which has the same patients in the same folds and all listed features (receptors, MammaPrint, age; volume, diameter,
their changes, sphericity and background enhancement of each visit). We add the arm, changes in percent and whether a
diameter could be measured at all. AUC and its difference are means over the repeats, with bootstrap intervals over
patients; what a group of features adds is tested over the folds, corrected for shared training patients and for the
number of tests.
Data: Li et al. 2020, doi:10.1038/s41523-020-00203-7, and TCIA (collection ISPY2), read from the folder named by
TUMORCAST_DATA.

Run: TUMORCAST_DATA=... python tests/benchmarks/bench_pcr.py [--repeats 10] [--only T1 T2 T3]
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from survival.cohorts import ispy2
from survival.metrics import (
    at_threshold,
    auprc,
    auroc,
    bootstrap,
    brier,
    calibration_line,
    corrected_t_test,
    expected_calibration_error,
    holm,
    net_benefit,
)
from survival.pcr import Mixture, ridge
from survival.splits import PatientFolds, out_of_fold

TARGET = {"T1": 0.80, "T2": 0.84, "T3": 0.86}
THRESHOLDS = (0.2, 0.3, 0.4, 0.5)
INNER = StratifiedKFold(5, shuffle=True, random_state=11)


def columns(table, arm, percent):
    """Names of columns: the logarithms and their changes, or percent changes besides."""
    names = [c for c in table.X if percent or not c.endswith((" percent", " none"))]
    return [c for c in names if arm or not c.startswith("arm ")]


def tuned(names):
    """Ridge logistic regression on some columns, the penalty by its log loss in five inner folds."""
    search = LogisticRegressionCV(
        Cs=[0.01, 0.03, 0.1],
        l1_ratios=(0,),
        cv=INNER,
        scoring="neg_log_loss",
        max_iter=5000,
        use_legacy_attributes=False,
    )
    return make_pipeline(make_column_transformer(("passthrough", names)), StandardScaler(), search)


def ours(table):
    logs = [c for c in table.X if not c.endswith(" percent")]
    return Mixture([("logs", tuned(logs)), ("percent", tuned(list(table.X)))], folds=3)


def probability(model, rows):
    return model.predict_proba(rows)[:, 1]


def mean_auc(y, p, w=None):
    return float(np.mean([auroc(y, one, w) for one in p]))


def difference(y, p, q, seed=0):
    """Mean difference of AUC over the repeats, patients resampled."""
    return bootstrap(lambda w: mean_auc(y, p, w) - mean_auc(y, q, w), len(y), 500, strata=y, seed=seed, null=0.0)


def run(folder, visits, repeats):
    table, began = ispy2(folder, visits), time.process_time()
    y, last = table.y, f"T{visits - 1}"
    folds = PatientFolds(5, repeats, seed=0)
    floor = out_of_fold(tuned(columns(table, arm=False, percent=False)), table.X, y, folds, probability)
    made = out_of_fold(ours(table), table.X, y, folds, probability)
    prevalence = np.full(len(y), y.mean())
    print(
        f"\nT0-{last}: {len(y)} patients, {y.sum()} with pCR, {len(table.X.columns)} columns; target AUC {TARGET[last]}"
    )
    print(f"  {'model':28s}{'AUC':>7s}{'AUPRC':>8s}{'Brier':>8s}{'slope':>7s}{'ECE':>7s}")
    for name, p in (("tumorcast, mixture", made), ("ridge, all listed features", floor), ("prevalence", None)):
        if p is None:
            print(f"  {name:28s}{0.5:7.3f}{y.mean():8.3f}{brier(y, prevalence):8.4f}{'':7s}{0.0:7.3f}")
            continue
        slope = np.mean([calibration_line(y, one)[0] for one in p])
        print(f"  {name:28s}{mean_auc(y, p):7.4f}{np.mean([auprc(y, one) for one in p]):8.3f}"
              f"{np.mean([brier(y, one) for one in p]):8.4f}{slope:7.2f}"
              f"{np.mean([expected_calibration_error(y, one) for one in p]):7.3f}")  # fmt: skip
    gain = difference(y, made, floor)
    print(f"  ours less ridge: AUC {gain.value:+.4f} ({gain.low:+.4f}, {gain.high:+.4f}), p {gain.p:.3f}; "
          f"interval of our AUC {bootstrap(lambda w: mean_auc(y, made, w), len(y), 500, strata=y)}")  # fmt: skip
    decide = {name: np.mean([net_benefit(y, one, THRESHOLDS) for one in p], 0) for name, p in
              (("ours", made), ("ridge", floor), ("everybody", np.ones((1, len(y)))))}  # fmt: skip
    told = "; ".join(f"{name} " + " ".join(f"{v:+.3f}" for v in values) for name, values in decide.items())
    print(f"  net benefit at {', '.join(map(str, THRESHOLDS))}: {told}")
    called = at_threshold(y, made[0], 0.3)
    print(f"  called at 0.3 (repeat 1): sensitivity {called.sensitivity:.2f}, specificity {called.specificity:.2f}, "
          f"PPV {called.ppv:.2f}, NPV {called.npv:.2f}")  # fmt: skip
    print(f"  {time.process_time() - began:.0f} CPU-seconds", flush=True)
    added(table, folds, repeats)
    return last, mean_auc(y, made), mean_auc(y, floor)


def added(table, folds, repeats):
    """What each group adds to all the others, with a fixed penalty."""
    y, found = table.y, {}

    def by_fold(names):
        p = out_of_fold(ridge(0.03), table.X[names], y, folds, probability)
        tests = [test for _, test in folds.split(table.X, y)]
        return mean_auc(y, p), np.array([auroc(y[t], p[k // folds.folds][t]) for k, t in enumerate(tests)])

    whole, each = by_fold(list(table.X))
    for group, own in table.groups.items():
        less, without = by_fold([c for c in table.X if c not in own])
        found[group] = (whole - less, corrected_t_test(each - without, 1 / (folds.folds - 1)))
    corrected = holm([test.p for _, test in found.values()])
    print(f"  what each group adds to the others (ridge, all {len(table.X.columns)} columns: AUC {whole:.4f}):")
    for (group, (gain, test)), p in zip(found.items(), corrected, strict=True):
        print(f"    {group:12s} {gain:+.4f}  over folds {test.value:+.4f} ({test.low:+.4f}, {test.high:+.4f}), "
              f"p {test.p:.3f}, corrected {p:.3f}")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=list(TARGET), default=list(TARGET))
    asked = parser.parse_args()
    folder = os.environ.get("TUMORCAST_DATA", "")
    if not folder:
        sys.exit("TUMORCAST_DATA is not set: it names the folder with the tables of ispy2.")
    rows = [run(Path(folder), int(last[1]) + 1, asked.repeats) for last in asked.only]
    print(f"\n{'':4s}{'ours':>9s}{'ridge':>9s}{'target':>9s}")
    for last, made, floor in rows:
        print(f"{last:4s}{made:9.4f}{floor:9.4f}{TARGET[last]:9.2f}")


if __name__ == "__main__":
    main()
