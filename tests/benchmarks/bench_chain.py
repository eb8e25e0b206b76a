"""The whole chain on virtual patients: raw series to a forecast, beside the run that starts from true maps.

Small patients (24³ voxels of 2 mm inside a larger field of view) are scanned raw at visits 1 and 2, quantified,
registered and forecast to visits 3 and 4; beside it the same from the maps and regions that the patient itself holds,
and the last visit's volume carried forward. A region from raw series ends at a lower cell fraction than a drawn one
(its visible fraction says where), so the true volumes beside differ, too. Each run has the priors of its setting.
All numbers are virtual.

Run: python tests/benchmarks/bench_chain.py [patients] [--first SEED] [--setting matched|mismatched|both]
     [--registration rigid|bspline]
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import biomodel as bm
from biomodel.acquisition import SIEMENS_3T, write_raw
from biomodel.errors import TumorcastError
from biomodel.imaging.registration import BSpline, Rigid
from biomodel.quantify.pipeline import quantify
from biomodel.quantify.study import Study
from biomodel.quantify.visit import Settings
from biomodel.scoring import crps
from biomodel.virtual import Matched, Mismatched, small_patient

DRAWS = 100
SETTINGS = {"matched": Matched(), "mismatched": Mismatched()}
KINDS = {"rigid": Rigid(), "bspline": BSpline()}


def volumes(virtual, known):
    """True volumes (cm³) of what lies above the visible fraction of the record, visit by visit."""
    cells = np.asarray(virtual.truth["cell_fraction"].values)
    voxel = virtual.patient.domain.voxel_volume / 1e3
    return [float((u >= known.cellularity.visible_fraction).sum()) * voxel for u in cells]


def scores(known, days, true, seed):
    """Per later visit: true volume, error of the median, whether 90 % covers, CRPS, carry-forward's; inflation."""
    model = bm.ReactionDiffusion(
        bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy(a) for a in known.schedule.agents]
    ).with_priors(Matched().priors())
    fit = bm.calibrate(model, known)
    draws = bm.forecast(fit, times=days, draws=DRAWS, seed=seed, curve_step=1e3)["volume"].values
    last = known.volume_of(known.visits[-1])
    rows = []
    for k, volume in enumerate(true):
        low, middle, high = np.quantile(draws[:, k], [0.05, 0.5, 0.95])
        covers = low <= volume <= high
        rows.append((volume, abs(middle - volume), covers, crps(draws[:, k], volume), abs(last - volume)))
    return rows, fit.inflation


def study(name, kind, patients, first):
    """One setting, one kind of registration."""
    found: dict[str, list] = {"raw series": [], "true maps": []}
    errors, failed, seconds = [], [], []
    for seed in range(first, first + patients):
        virtual = small_patient(seed, SETTINGS[name])
        days = [visit.day for visit in virtual.patient.visits[2:]]
        began = time.process_time()
        try:
            with tempfile.TemporaryDirectory() as folder:
                write_raw(virtual, Path(folder) / "S", SIEMENS_3T, visits=[1, 2], seed=seed)
                patient = quantify(Study.read(Path(folder) / "S"), Settings(correct_motion=False), kind).patient
            seconds.append(time.process_time() - began)
            both = {"raw series": patient, "true maps": virtual.patient.until(2)}
            here = {n: scores(known, days, volumes(virtual, known)[2:], seed) for n, known in both.items()}
        except TumorcastError as error:
            failed.append(f"{seed}: {error}")
            continue
        for which, score in here.items():
            found[which].append(score)
        true = volumes(virtual, patient)
        errors.append([patient.volume_of(v) - t for v, t in zip(patient.visits, true, strict=False)])
    n = len(errors)
    print(f"\n{name}, registration {type(kind).__name__}: {n} virtual patients, {len(failed)} failed; "
          f"{np.median(seconds):.0f} CPU-seconds from raw to a patient")  # fmt: skip
    for line in failed:
        print("failed", line[:150])
    print(f"volume found less true, cm³ (median): visit 1 {np.median([e[0] for e in errors]):+.2f}, "
          f"visit 2 {np.median([e[1] for e in errors]):+.2f}")  # fmt: skip
    print(f"{'from':12s}{'visit':>6s}{'true cm³':>10s}{'median error':>14s}{'90 % covers':>13s}{'CRPS':>8s}"
          f"{'carry-forward':>15s}{'inflation':>11s}")  # fmt: skip
    for which, score in found.items():
        for k in range(2):
            true, error, covers, skill, carried = np.array([rows[k] for rows, _ in score], float).T
            print(f"{which:12s}{k + 3:6d}{np.mean(true):10.2f}{np.median(error):14.2f}{np.mean(covers):13.2f}"
                  f"{np.mean(skill):8.2f}{np.mean(carried):15.2f}"
                  f"{np.median([i for _, i in score]):11.1f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patients", type=int, nargs="?", default=20)
    parser.add_argument("--first", type=int, default=5100)
    parser.add_argument("--setting", choices=[*SETTINGS, "both"], default="both")
    parser.add_argument("--registration", choices=list(KINDS), default="rigid")
    arguments = parser.parse_args()
    for name in SETTINGS if arguments.setting == "both" else [arguments.setting]:
        study(name, KINDS[arguments.registration], arguments.patients, arguments.first)


if __name__ == "__main__":
    main()
