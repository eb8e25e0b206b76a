"""Where the uncertainty of a forecast comes from: shares by stage, each checked by switching its stage off.

Small virtual patients (24³ voxels of 2 mm), calibrated on visits 1 and 2 with stated errors of outlines and
registration, by a model in which every cell is alike and one with a resistant fraction; forecast to visit 3. For each
stage: its contribution to the variance, what would go if its error alone became known (first) and what would be left if
all others were (total), and by how much the variance fell when its error was set to 0, each with a 90 % interval by
bootstrap. No peer does this; beside it stands the variance of the averaged forecast's own draws. All numbers are
virtual.

Run: python tests/benchmarks/bench_stages.py [patients] [--draws 300] [--first SEED] [--one-model] [--mismatched]
"""

import argparse
import time
from dataclasses import replace

import numpy as np
from bench_recovery import plain, sparing

import biomodel as bm
from biomodel.averaging import average
from biomodel.stages import stages
from biomodel.virtual import Matched, Mismatched, small_patient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patients", type=int, nargs="?", default=3)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--first", type=int, default=7)
    parser.add_argument("--one-model", action="store_true")
    parser.add_argument("--mismatched", action="store_true")
    parser.add_argument("--quantity", default="log_cells", choices=["volume", "cells", "log_cells"])
    arguments = parser.parse_args()
    truth = Mismatched() if arguments.mismatched else Matched()
    inside = tried = 0
    for seed in range(arguments.first, arguments.first + arguments.patients):
        patient = small_patient(seed, truth).patient
        record = replace(patient.cellularity, edge_sd_mm=0.7, misalignment_sd_mm=0.5)
        patient = replace(patient, cellularity=record)
        known, day, agents = patient.until(2), patient.visits[2].day, patient.schedule.agents
        makes = [plain] if arguments.one_model else [plain, sparing]
        began = time.process_time()
        fits = bm.compare([make(agents) for make in makes], known)
        fitted = time.process_time()
        found = stages(fits, day, draws=arguments.draws, seed=seed)
        divided = time.process_time()
        found = stages(fits, day, draws=arguments.draws, seed=seed, switch_off=True)
        checked = time.process_time()
        quantity = arguments.quantity
        total, low, high = found.sum(quantity)
        print(f"\nvirtual patient {seed} ({'mis' * arguments.mismatched}matched), {quantity} on day {day:g}; models' "
              f"weights {' '.join(f'{w:.2f}' for w in fits.evidence_weights)}")  # fmt: skip
        print(f"{'stage':30s}{'contribution':>13s}{'90 %':>18s}{'first':>8s}{'total':>8s}{'fall without':>14s}"
              f"{'90 %':>18s}")  # fmt: skip
        for row in found.table(quantity):
            meets = row.off_low <= row.high and row.off_high >= row.low
            inside, tried = inside + meets, tried + 1
            print(f"{row.label:30s}{row.contribution:13.3f}{row.low:10.3f} –{row.high:6.3f}{row.first:8.3f}"
                  f"{row.total_effect:8.3f}{row.off:14.3f}{row.off_low:10.3f} –{row.off_high:6.3f}"
                  f"{'' if meets else '  apart'}")  # fmt: skip
        print(f"{'sum':30s}{total:13.3f}{low:10.3f} –{high:6.3f}")
        for name, why in found.absent.items():
            print(f"{name:30s}{'–':>13s}  {why}")
        drawn = average([bm.forecast(f, times=[day], draws=arguments.draws, seed=seed, curve_step=1e3)
                         for f in fits.fits], fits.evidence_weights, seed)["volume"].values[:, 0]  # fmt: skip
        fixed = stages(fits, day, draws=arguments.draws, seed=seed + 1, treatment=None).variance()
        print(f"sd of the volume, treatment as planned: {np.sqrt(fixed):.3f} cm³; of the averaged forecast's draws "
              f"{drawn.std():.3f} cm³. CPU-seconds: calibrations {fitted - began:.1f}, stages {divided - fitted:.1f}, "
              f"with each switched off {checked - divided:.1f}")  # fmt: skip
    print(f"\nfall without a stage and its contribution agree (90 % intervals meet) in {inside} of {tried}")


if __name__ == "__main__":
    main()
