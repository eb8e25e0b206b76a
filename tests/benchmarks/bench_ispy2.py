"""Functional tumour volumes of I-SPY 2: forecasts with priors and model chosen on training folds, beside plain models.

384 patients, volumes at about weeks 0, 3, 12 and 22 of the published protocol (T0 to T3): twelve weekly doses of
paclitaxel, then four of doxorubicin (with cyclophosphamide) every two weeks. Ten folds; T2 is forecast from T0-T1, T3
from T0-T2.
Data: Li et al. 2020, npj Breast Cancer 6:63, doi:10.1038/s41523-020-00203-7, and TCIA (collection ISPY2), read from
the folder named by TUMORCAST_DATA.

Run: TUMORCAST_DATA=... python tests/benchmarks/bench_ispy2.py [--seeds 0 1 2]
"""

import argparse
import os
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm
from sklearn.linear_model import QuantileRegressor, Ridge
from sklearn.model_selection import KFold

import biomodel as bm
from biomodel.calibration.importance import weighted_crps, weighted_quantile
from biomodel.calibration.population import Population, learn_priors
from biomodel.parameters import SoftplusNormal
from biomodel.schedule import Dose
from biomodel.terms import NoGrowth

FLOOR, DF = 0.05, 8.0
DAYS = (0.0, 21.0, 84.0, 154.0)
#: The published order of treatment; actual days of doses are not in the tables, nor are the arms' study drugs modelled.
PLAN = bm.Schedule.weekly("paclitaxel", 1, 12, 80, "mg/m^2", status="planned") + bm.Schedule(
    doses=tuple(Dose(day, "doxorubicin", 60, "mg/m^2", "planned") for day in (91, 105, 119, 133))
)
TARGETS = (2, 3)
ONE, SEVERAL = "tumorcast, one structure", "tumorcast, structures mixed"


def load(folder: Path) -> np.ndarray:
    """Volumes (384, 4), cm³."""
    table = pd.read_excel(folder / "ispy2" / "Multi-feature-MRI-NACT-Data.xlsx")
    return table[[f"VOLUME_TUM_BLU_V{k}0" for k in (1, 2, 3, 4)]].to_numpy(float)


def patients_of(volumes: np.ndarray) -> list[bm.Patient]:
    return [bm.Patient.from_volumes(f"P{i:03d}", DAYS, v, PLAN, cv=0.4, floor=FLOOR) for i, v in enumerate(volumes)]


def candidates() -> dict[str, bm.ReactionDiffusion]:
    """Model structures. Effects decay at 0.3 per day (half-life 2.3 days) in all of them."""
    drugs, decay, still = ("paclitaxel", "doxorubicin"), bm.Fixed(0.3), bm.NoDiffusion()
    # Exposures to the whole courses: 39.4 and 13.3 reference doses times days.
    soft, weekly = SoftplusNormal(0.0655, 1.3, 1 / 39.4), bm.LogNormal(0.0625, 0.6)
    second, spared = bm.LogNormal(0.336, 0.7), bm.LogitNormal(0.0474, 1.2)

    def alone(drug, efficacy, resistant):
        return bm.Chemotherapy(drug, efficacy, decay, resistant=resistant)

    return {
        "shared resistance, softplus": bm.ReactionDiffusion(
            NoGrowth(), still, [bm.Combination(drugs, (soft, second), spared, decay)]
        ),
        "shared resistance": bm.ReactionDiffusion(
            NoGrowth(), still, [bm.Combination(drugs, (weekly, second), spared, decay)]
        ),
        "resistance by drug": bm.ReactionDiffusion(
            NoGrowth(), still, [alone(drugs[0], weekly, spared), alone(drugs[1], second, bm.LogitNormal(0.1, 1.2))]
        ),
        "no resistance, regrowth": bm.ReactionDiffusion(
            bm.Exponential(bm.LogNormal(0.005, 0.7)), still,
            [alone(drugs[0], weekly, None), alone(drugs[1], bm.LogNormal(0.1, 0.7), None)],
        ),
    }  # fmt: skip


def scores(x: np.ndarray, w: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Absolute error of the median, CRPS, and whether the 90 % and 50 % intervals cover, by patient."""
    q = weighted_quantile(x, w, [0.05, 0.25, 0.5, 0.75, 0.95])
    return np.stack([np.abs(seen - q[:, 2]), weighted_crps(x, w, seen), (seen >= q[:, 0]) & (seen <= q[:, 4]),
                     (seen >= q[:, 1]) & (seen <= q[:, 3])], 1)  # fmt: skip


def predict(population: Population, patients: list[bm.Patient], draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws of log(V + floor) at the targets and their weights, (patients, targets, draws).

    What lies after the last known visit never reaches the forecast.
    """
    x, w = [], []
    for t in TARGETS:
        posterior = population.posterior([p.until(t) for p in patients], [DAYS[t]], draws=draws)
        x.append(posterior.measurements()[:, :, 0])
        w.append(posterior.weights)
    return np.stack(x, 1), np.stack(w, 1)


def mixed(predictions: list[tuple[np.ndarray, np.ndarray]], shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One set of weighted draws out of those of several models."""
    return (np.concatenate([x for x, _ in predictions], -1),
            np.concatenate([s * w for (_, w), s in zip(predictions, shares, strict=True)], -1))  # fmt: skip


def judge(x: np.ndarray, w: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Scores (patients, targets, 4)."""
    return np.stack([scores(x[:, k], w[:, k], logs[:, t]) for k, t in enumerate(TARGETS)], 1)


def learn(model: bm.ReactionDiffusion, patients: list[bm.Patient], iterations: int, draws: int) -> Population:
    return learn_priors(model, patients, noise_by_visit=True, df=DF, iterations=iterations, draws=draws)


def choose(patients: list[bm.Patient], logs: np.ndarray, models: dict[str, bm.ReactionDiffusion]):
    """Shares of the candidates that give the lowest CRPS in three folds of these patients alone: for one candidate, and
    for a mixture of their predictions in steps of a quarter (stacking: Yao et al. 2018, doi:10.1214/17-BA1091)."""
    parts = [[] for _ in models]
    order = []
    for train, test in KFold(3, shuffle=True, random_state=0).split(logs):
        order.append(test)
        for part, model in zip(parts, models.values(), strict=True):
            part.append(predict(learn(model, [patients[i] for i in train], 15, 64), [patients[i] for i in test], 256))
    predictions = [tuple(np.concatenate(p) for p in zip(*part, strict=True)) for part in parts]
    seen = logs[np.concatenate(order)][:, list(TARGETS)]

    def loss(shares):
        return weighted_crps(*mixed(predictions, np.array(shares)), seen).mean()

    single = min(map(tuple, np.eye(len(models))), key=loss)
    quarters = [s for s in product(np.arange(5) / 4, repeat=len(models)) if sum(s) == 1]
    return single, min(quarters, key=loss)


def gaussian_crps(mean: np.ndarray, sd: float, seen: np.ndarray) -> np.ndarray:
    z = (seen - mean) / sd
    return sd * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))


def plain(train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
    """The plain models on one fold, (patients, targets, 4) each, NaN where a model has no distribution."""
    found: dict[str, list] = {"carry-forward": [], "exponential": [], "ridge": [], "median regression": []}
    for t in TARGETS:
        known, seen = test[:, :t], test[:, t]
        ridge = Ridge(1.0).fit(train[:, :t], train[:, t])
        mean = ridge.predict(known)
        sd = float(np.std(train[:, t] - ridge.predict(train[:, :t]), ddof=t + 1))
        middle = QuantileRegressor(alpha=0, quantile=0.5, solver="highs").fit(train[:, :t], train[:, t]).predict(known)
        slope = (known[:, -1] - known[:, -2]) / (DAYS[t - 1] - DAYS[t - 2])
        straight = known[:, -1] + slope * (DAYS[t] - DAYS[t - 1])
        for name, guess in (("carry-forward", known[:, -1]), ("exponential", straight), ("median regression", middle)):
            error = np.abs(seen - guess)
            found[name].append(np.stack([error, error, error * np.nan, error * np.nan], 1))
        error = np.abs(seen - mean)
        found["ridge"].append(np.stack([error, gaussian_crps(mean, sd, seen), error <= 1.644854 * sd,
                                        error <= 0.674490 * sd], 1))  # fmt: skip
    return {name: np.stack(parts, 1) for name, parts in found.items()}


def run(volumes: np.ndarray, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores of every predictor in ten folds, and the mean shares of the structures."""
    logs, patients, models = np.log(volumes + FLOOR), patients_of(volumes), candidates()
    used: dict[str, list] = {ONE: [], SEVERAL: []}
    found: dict[str, np.ndarray] = {}
    for k, (train, test) in enumerate(KFold(10, shuffle=True, random_state=seed).split(logs)):
        mine = [patients[i] for i in train]
        shares = dict(zip(used, choose(mine, logs[train], models), strict=True))
        needed = [i for i in range(len(models)) if any(s[i] for s in shares.values())]
        fitted = [learn(list(models.values())[i], mine, 40, 128) for i in needed]
        predictions = [predict(population, [patients[i] for i in test], 2048) for population in fitted]
        here = {}
        for name, share in shares.items():
            used[name].append(share)
            here[name] = judge(*mixed(predictions, np.array(share)[needed]), logs[test])
        for predictor, values in {**here, **plain(logs[train], logs[test])}.items():
            found.setdefault(predictor, np.full((len(logs), 2, 4), np.nan))[test] = values
        print(f"  seed {seed}, fold {k + 1} of 10", file=sys.stderr, flush=True)
    return found, {name: np.mean(share, 0) for name, share in used.items()}


def table(found: dict[str, np.ndarray], used: dict[str, np.ndarray], seed: int) -> None:
    n = len(found["ridge"])
    print(f"\nfolds of seed {seed}; {n} patients; errors of log(FTV + {FLOOR:g} cm³)")
    print(f"{'':28s}{'MAE T2':>8s}{'MAE T3':>8s}{'CRPS T2':>9s}{'CRPS T3':>9s}{'pooled':>8s}{'90 % covers':>13s}"
          f"{'50 % covers':>13s}{'CRPS - ridge (pooled)':>24s}")  # fmt: skip
    for name, r in found.items():
        m, d = r.mean(0), (r - found["ridge"])[..., 1].mean(1)
        cover = f"{m[:, 2].mean():13.3f}{m[:, 3].mean():13.3f}" if np.isfinite(m[:, 2]).all() else " " * 26
        print(f"{name:28s}{m[0, 0]:8.3f}{m[1, 0]:8.3f}{m[0, 1]:9.4f}{m[1, 1]:9.4f}{m[:, 1].mean():8.4f}{cover}"
              f"{d.mean():+15.4f} ± {d.std() / n**0.5:.4f}")  # fmt: skip
    for name, share in used.items():
        parts = ", ".join(f"{k} {s:.0%}" for k, s in zip(candidates(), share, strict=True))
        print(f"{name}, chosen inside the training folds (mean of folds): {parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the assignment to folds")
    arguments = parser.parse_args()
    folder = os.environ.get("TUMORCAST_DATA", "")
    if not folder:
        print("TUMORCAST_DATA is not set: this benchmark reads real volumes from the folder it names.")
        return
    volumes, began = load(Path(folder)), time.process_time()
    print("I-SPY 2: T2 forecast from T0-T1 and T3 from T0-T2; priors, noise and structure from the training folds.")
    for seed in arguments.seeds:
        table(*run(volumes, seed), seed)
    seconds = time.process_time() - began
    print(f"\n{seconds:.0f} CPU-seconds, one thread. Without a distribution, CRPS is the absolute error.")
    print(
        "What the folds do not undo: the four candidate structures and the fixed choices (decay of the effect, df,\n"
        "weight of the starting point) were found by exploring this same cohort, about 120 configurations scored on\n"
        "the folds of seed 0; the mixture was added after the figures of one structure had been seen. The other seeds\n"
        "only show that the figures do not hang on one split; they are no fresh data."
    )


if __name__ == "__main__":
    main()
