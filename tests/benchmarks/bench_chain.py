"""The whole chain on virtual patients: raw series to a forecast, beside the run that starts from true maps.

Small patients (24³ voxels of 2 mm inside a larger field of view) are scanned raw at visits 1 and 2, quantified,
registered rigidly and forecast to visits 3 and 4; beside it the same from the maps and regions that the patient itself
holds. Matched truth with its own priors. All numbers are virtual.

Run: python tests/benchmarks/bench_chain.py [patients] [--first SEED]
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import biomodel as bm
from biomodel.acquisition import SIEMENS_3T, write_raw
from biomodel.errors import TumorcastError
from biomodel.imaging.registration import Rigid
from biomodel.quantify.pipeline import quantify
from biomodel.quantify.study import Study
from biomodel.quantify.visit import Settings
from biomodel.scoring import crps
from biomodel.virtual import Matched, small_patient

DRAWS = 100


def scores(known, days, true, seed):
    """Volume at visit 2, and per later visit: error of the median, whether 90 % covers, CRPS; and the inflation."""
    model = bm.ReactionDiffusion(
        bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy(a) for a in known.schedule.agents]
    ).with_priors(Matched().priors())
    fit = bm.calibrate(model, known)
    draws = bm.forecast(fit, times=days, draws=DRAWS, seed=seed, curve_step=1e3)["volume"].values
    rows = []
    for k, volume in enumerate(true):
        low, middle, high = np.quantile(draws[:, k], [0.05, 0.5, 0.95])
        rows.append((abs(middle - volume), low <= volume <= high, crps(draws[:, k], volume)))
    return rows, fit.inflation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patients", type=int, nargs="?", default=20)
    parser.add_argument("--first", type=int, default=5000)
    arguments = parser.parse_args()
    found: dict[str, list] = {"raw series": [], "true maps": []}
    errors, failed, seconds = [], [], []
    for seed in range(arguments.first, arguments.first + arguments.patients):
        virtual = small_patient(seed)
        true = virtual.truth["volume"].values
        days = [visit.day for visit in virtual.patient.visits[2:]]
        began = time.process_time()
        try:
            with tempfile.TemporaryDirectory() as folder:
                write_raw(virtual, Path(folder) / "S", SIEMENS_3T, visits=[1, 2], seed=seed)
                study = Study.read(Path(folder) / "S")
                patient = quantify(study, Settings(correct_motion=False), Rigid()).patient
            seconds.append(time.process_time() - began)
            both = {"raw series": patient, "true maps": virtual.patient.until(2)}
            here = {name: scores(known, days, true[2:], seed) for name, known in both.items()}
        except TumorcastError as error:
            failed.append(f"{seed}: {error}")
            continue
        for name, score in here.items():
            found[name].append(score)
        errors.append([patient.volume_of(v) - t for v, t in zip(patient.visits, true, strict=False)])
    n = len(errors)
    print(f"{n} virtual patients, {len(failed)} failed; {np.median(seconds):.0f} CPU-seconds from raw to a patient")
    for line in failed:
        print("failed", line[:150])
    print(f"volume found less true, cm³ (median): visit 1 {np.median([e[0] for e in errors]):+.2f}, "
          f"visit 2 {np.median([e[1] for e in errors]):+.2f}")  # fmt: skip
    print(f"{'from':12s}{'visit':>6s}{'median error cm³':>18s}{'90 % covers':>13s}{'CRPS':>8s}{'inflation':>11s}")
    for name, score in found.items():
        for k in range(2):
            parts = [rows[k] for rows, _ in score]
            print(f"{name:12s}{k + 3:6d}{np.median([p[0] for p in parts]):18.2f}{np.mean([p[1] for p in parts]):13.2f}"
                  f"{np.mean([p[2] for p in parts]):8.2f}{np.median([i for _, i in score]):11.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
