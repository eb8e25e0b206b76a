"""Priors by subtype on I-SPY 2: partial pooling beside no pooling and complete pooling, forecasts scored in ten folds.

384 patients with functional tumour volumes at T0 to T3 (see bench_ispy2.py) in four groups by hormone receptor and
HER2. In each fold the priors of one model are learned from the other nine; T2 is forecast from T0-T1, T3 from T0-T2.

- no pooling: each subtype by itself.
- means by subtype: the same, but the spread of patients and the errors are those of all subtypes.
- partial pooling: how much subtypes share is inferred.
- complete pooling: subtypes are not told apart.
- each patient alone: nothing is learned; the model's own priors and the noise of the record.

All but the last are the same function (`learn_hierarchy`) with the same weak belief in the same starting point: one
patient's worth in the mean, five in spread and noise. With the package's own belief (--belief default: 10, 60 and 25
patients), of which the starting point was found by exploring this cohort, "no pooling" is in truth drawn to what all
patients taught.
Data: Li et al. 2020, npj Breast Cancer 6:63, doi:10.1038/s41523-020-00203-7, and TCIA (collection ISPY2), read from
the folder named by TUMORCAST_DATA.

Run: TUMORCAST_DATA=... python tests/benchmarks/bench_hierarchy.py [--seeds 0] [--belief weak default] [--figure F.png]
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from bench_ispy2 import DAYS, DF, FLOOR, TARGETS, candidates, load, patients_of
from scipy.stats import binom
from sklearn.model_selection import KFold

from biomodel.calibration.hierarchy import Hierarchy, learn_hierarchy
from biomodel.calibration.importance import weighted_crps
from biomodel.calibration.population import Population, PseudoPatients
from biomodel.calibration.volumes import VolumeNoise

#: The structure that bench_ispy2.py chooses most often; the same for all rows.
STRUCTURE = "shared resistance, softplus"
BELIEFS = {"weak": PseudoPatients(1.0, 5.0, 5.0), "default": PseudoPatients()}
NONE, MEANS, PARTIAL, COMPLETE, ALONE = (
    "no pooling", "means by subtype", "partial pooling", "complete pooling", "each patient alone",
)  # fmt: skip


def subtypes(folder: Path) -> list[str]:
    """Hormone receptor and HER2 of the 384 patients, in the order of `load`."""
    volumes = pd.read_excel(folder / "ispy2" / "Multi-feature-MRI-NACT-Data.xlsx")["CLINICAL-TRIAL-SUBJECT-ID"]
    clinical = pd.read_excel(folder / "ispy2" / "ISPY2-Imaging-Cohort-1-Clinical-Data.xlsx").set_index("Patient_ID")
    signs = clinical.loc[volumes, ["HR", "HER2"]].to_numpy(int)
    return [f"HR{'-+'[h]} HER2{'-+'[e]}" for h, e in signs]


def learned(patients, groups: list[str], belief: PseudoPatients) -> dict[str, dict[str, Population]]:
    """Population of each subtype by row of the table."""
    model, names = candidates()[STRUCTURE], sorted(set(groups))

    def hierarchy(people, labels, between) -> Hierarchy:
        return learn_hierarchy(model, people, labels, noise_by_visit=True, df=DF, belief=belief, between=between)

    parts = {name: [p for p, g in zip(patients, groups, strict=True) if g == name] for name in names}
    found = {
        NONE: {name: hierarchy(part, [name] * len(part), 0.0).of(name) for name, part in parts.items()},
        MEANS: dict(hierarchy(patients, groups, 10.0).populations),
        PARTIAL: dict(hierarchy(patients, groups, None).populations),
    }
    everyone = hierarchy(patients, ["all"] * len(patients), 0.0).of("all")
    found[COMPLETE] = dict.fromkeys(names, everyone)
    # No learning at all: the priors are those that learning starts from.
    start = learn_hierarchy(model, patients, ["all"] * len(patients), df=DF, between=0.0, iterations=1, draws=16,
                            belief=PseudoPatients(1e9, 1e9, 0.0)).of("all")  # fmt: skip
    found[ALONE] = dict.fromkeys(names, replace(start, noise=VolumeNoise.of(patients[0].volumes)))
    return found


def scores(population: Population, patients, logs: np.ndarray, draws: int) -> np.ndarray:
    """Log predictive density, PIT and CRPS of each patient and target, (patients, targets, 3)."""
    found = []
    for t in TARGETS:
        # What lies after the last known visit never reaches the forecast.
        posterior = population.posterior([p.until(t) for p in patients], [DAYS[t]], draws=draws)
        seen = logs[:, t : t + 1]
        crps = weighted_crps(posterior.measurements()[:, :, 0], posterior.weights, seen[:, 0])
        found.append(np.stack([posterior.log_density(seen)[:, 0], posterior.pit(seen)[:, 0], crps], 1))
    return np.stack(found, 1)


def run(volumes: np.ndarray, groups: list[str], belief: PseudoPatients, seed: int, folds: int) -> dict[str, np.ndarray]:
    """Scores of every row, (patients, targets, 3)."""
    logs, patients, kinds = np.log(volumes + FLOOR), patients_of(volumes), np.array(groups)
    found: dict[str, np.ndarray] = {}
    for k, (train, test) in enumerate(KFold(folds, shuffle=True, random_state=seed).split(logs)):
        rows = learned([patients[i] for i in train], [groups[i] for i in train], belief)
        for row, populations in rows.items():
            mine = found.setdefault(row, np.full((len(logs), len(TARGETS), 3), np.nan))
            for name in sorted(set(kinds[test])):
                who = test[kinds[test] == name]
                mine[who] = scores(populations[name], [patients[i] for i in who], logs[who], 2048)
        print(f"  seed {seed}, fold {k + 1} of {folds}", file=sys.stderr, flush=True)
    return found


def interval(x: np.ndarray) -> str:
    """Mean with its 95 % interval over patients."""
    half = 1.96 * x.std(ddof=1) / len(x) ** 0.5
    return f"{x.mean():+.4f} ({x.mean() - half:+.4f}, {x.mean() + half:+.4f})"


def table(found: dict[str, np.ndarray], groups: list[str], title: str) -> None:
    n, kinds = len(groups), np.array(groups)
    print(f"\n{title}; {n} patients; log predictive density (LPD) of log(FTV + {FLOOR:g} cm³), higher is better")
    print(f"{'':20s}{'LPD T2':>9s}{'LPD T3':>9s}{'CRPS T2':>9s}{'CRPS T3':>9s}{'50 %':>7s}{'90 %':>7s}"
          f"{'partial - row: LPD of a patient, both targets (95 %)':>56s}{'CRPS':>28s}")  # fmt: skip
    for row, r in found.items():
        m, apart = r.mean(0), found[PARTIAL] - r
        cover = [(np.abs(r[..., 1] - 0.5) <= level / 2).mean() for level in (0.5, 0.9)]
        gain = interval(apart[..., 0].sum(1)) if row != PARTIAL else "–"
        crps = interval(apart[..., 2].mean(1)) if row != PARTIAL else "–"
        print(f"{row:20s}{m[0, 0]:9.4f}{m[1, 0]:9.4f}{m[0, 2]:9.4f}{m[1, 2]:9.4f}{cover[0]:7.3f}{cover[1]:7.3f}"
              f"{gain:>56s}{crps:>28s}")  # fmt: skip
    bands = [binom.ppf([0.025, 0.975], 2 * n, level) / (2 * n) for level in (0.5, 0.9)]
    print("exact binomial 95 % bands of the coverages, were a patient's two targets independent: "
          + ", ".join(f"{a:.3f} to {b:.3f}" for a, b in bands))  # fmt: skip
    print("by subtype, partial - row, LPD of a patient, both targets:")
    for name in sorted(set(groups)):
        parts = [f"{row} {interval((found[PARTIAL] - found[row])[kinds == name, :, 0].sum(1))}"
                 for row in (NONE, COMPLETE)]  # fmt: skip
        print(f"  {name} ({(kinds == name).sum()}): " + "; ".join(parts))


def shrinkage(hierarchy: Hierarchy) -> None:
    print("\nshrinkage, all patients: medians of each subtype by itself, partially pooled, and over all subtypes")
    print(f"{'parameter':34s}{'subtype':14s}{'n':>5s}{'itself':>9s}{'partial':>9s}{'90 % interval':>20s}{'overall':>9s}"
          f"{'from others':>13s}  unit")  # fmt: skip
    for r in hierarchy.table():
        span = f"{r['low']:.3g} to {r['high']:.3g}"
        print(f"{r['name']:34s}{r['group']:14s}{r['patients']:5d}{r['own']:9.3g}{r['median']:9.3g}{span:>20s}"
              f"{r['overall']:9.3g}{r['pooled']:13.0%}  {r['units']}")  # fmt: skip
    print("standard deviation between subtypes (transformed coordinates; 5 %, 50 %, 95 %), and between patients:")
    for k, name in enumerate(hierarchy.names):
        low, mid, high = hierarchy.between[:, k]
        print(f"  {name:34s}{low:8.2f}{mid:8.2f}{high:8.2f}   {hierarchy.within[k, k] ** 0.5:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the assignment to folds")
    parser.add_argument("--belief", nargs="+", choices=BELIEFS, default=["weak"], help="in the starting point")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--figure", type=Path, help="write the figure of the shrinkage here")
    arguments = parser.parse_args()
    folder = os.environ.get("TUMORCAST_DATA", "")
    if not folder:
        print("TUMORCAST_DATA is not set: this benchmark reads real volumes from the folder it names.")
        return
    volumes, groups, began = load(Path(folder)), subtypes(Path(folder)), time.process_time()
    for name in arguments.belief:
        for seed in arguments.seeds:
            found = run(volumes, groups, BELIEFS[name], seed, arguments.folds)
            table(found, groups, f"belief {name}, {arguments.folds} folds of seed {seed}")
        hierarchy = learn_hierarchy(candidates()[STRUCTURE], patients_of(volumes), groups, noise_by_visit=True, df=DF,
                                    belief=BELIEFS[name])  # fmt: skip
        shrinkage(hierarchy)
        if arguments.figure:
            from biomodel.figure_diagnostics import shrinkage as draw

            draw(hierarchy).savefig(arguments.figure, dpi=150)
    print(f"\n{time.process_time() - began:.0f} CPU-seconds, one thread. Real volumes; the model structure and its")
    print("fixed choices were found by exploring this cohort, alike for all rows.")


if __name__ == "__main__":
    main()
