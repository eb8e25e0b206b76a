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
from collections import Counter
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


def judge(population: Population, patients: list[bm.Patient], logs: np.ndarray, draws: int) -> np.ndarray:
    """Scores (patients, targets, 4); what lies after the last known visit never reaches the forecast."""
    found = []
    for t in TARGETS:
        posterior = population.posterior([p.until(t) for p in patients], [DAYS[t]], draws=draws)
        found.append(scores(posterior.measurements()[:, :, 0], posterior.weights, logs[:, t]))
    return np.stack(found, 1)


def learn(model: bm.ReactionDiffusion, patients: list[bm.Patient], iterations: int, draws: int) -> Population:
    return learn_priors(model, patients, noise_by_visit=True, df=DF, iterations=iterations, draws=draws)


def choose(patients: list[bm.Patient], logs: np.ndarray, models: dict[str, bm.ReactionDiffusion]) -> str:
    """Name of the candidate with the lowest CRPS in three folds of these patients alone."""
    total = dict.fromkeys(models, 0.0)
    for train, test in KFold(3, shuffle=True, random_state=0).split(logs):
        for name, model in models.items():
            population = learn(model, [patients[i] for i in train], 15, 64)
            total[name] += judge(population, [patients[i] for i in test], logs[test], 512)[..., 1].sum()
    return min(total, key=total.__getitem__)


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


def run(volumes: np.ndarray, seed: int) -> tuple[dict[str, np.ndarray], Counter]:
    """Scores of every predictor in ten folds, and how often each structure was chosen."""
    logs, patients, chosen = np.log(volumes + FLOOR), patients_of(volumes), Counter()
    models = candidates()
    found: dict[str, np.ndarray] = {}
    for k, (train, test) in enumerate(KFold(10, shuffle=True, random_state=seed).split(logs)):
        mine = [patients[i] for i in train]
        name = choose(mine, logs[train], models)
        chosen[name] += 1
        here = {"tumorcast": judge(learn(models[name], mine, 40, 128), [patients[i] for i in test], logs[test], 2048)}
        for predictor, values in {**here, **plain(logs[train], logs[test])}.items():
            found.setdefault(predictor, np.full((len(logs), 2, 4), np.nan))[test] = values
        print(f"  seed {seed}, fold {k + 1}: {name}", file=sys.stderr, flush=True)
    return found, chosen


def table(found: dict[str, np.ndarray], chosen: Counter, seed: int) -> None:
    n = len(found["ridge"])
    print(f"\nfolds of seed {seed}; {n} patients; errors of log(FTV + {FLOOR:g} cm³)")
    print(f"{'':20s}{'MAE T2':>8s}{'MAE T3':>8s}{'CRPS T2':>9s}{'CRPS T3':>9s}{'pooled':>8s}{'90 % covers':>13s}"
          f"{'50 % covers':>13s}{'CRPS - ridge (pooled)':>24s}")  # fmt: skip
    for name, r in found.items():
        m, d = r.mean(0), (r - found["ridge"])[..., 1].mean(1)
        cover = f"{m[:, 2].mean():13.3f}{m[:, 3].mean():13.3f}" if np.isfinite(m[:, 2]).all() else " " * 26
        print(f"{name:20s}{m[0, 0]:8.3f}{m[1, 0]:8.3f}{m[0, 1]:9.4f}{m[1, 1]:9.4f}{m[:, 1].mean():8.4f}{cover}"
              f"{d.mean():+15.4f} ± {d.std() / n**0.5:.4f}")  # fmt: skip
    print("chosen inside the training folds: " + ", ".join(f"{k} in {v}" for k, v in chosen.most_common()))


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
        "the folds of seed 0. The other seeds only show that the figures do not hang on one split; they are no fresh\n"
        "data."
    )


if __name__ == "__main__":
    main()
