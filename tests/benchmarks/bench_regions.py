"""Tumour regions on the virtual cohort: the default method and the network, both settings, seen and unseen sites.

Run: python tests/benchmarks/bench_regions.py [--raw] [--quick]
Peers: the functional tumour of the I-SPY trials alone (70 % enhancement in the organ, without the box that a reader
draws in the trials), and Otsu's threshold on the early gain of signal with the largest part kept.

Patients 1000-1047 at sites A-F are learnt from. Patients 5000-5019 (Matched) and 5020-5039 (Mismatched) are scored,
each imaged once at one of those sites and once at one of the sites U-W, at both visits; the truth is where the cell
fraction reaches the visible one. An exam whose tumour has gone has no surface; exams with less than 0.1 cm³ of tumour
are left out of Dice and counted, with what the method finds in those without any.

With --raw the images are the raw dynamic series of :mod:`biomodel.acquisition`, which was built without these methods
in view: two vendors are learnt from, the third is unseen; flaws of the acquisition in the mismatched setting. It takes
about half an hour, most of it the series.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time

import numpy as np
import torch
from scipy import ndimage

from biomodel.acquisition import GE_15T, PHILIPS_3T, SIEMENS_3T, Protocol, acquire
from biomodel.imaging.dce import functional_tumour
from biomodel.imaging.regions import (
    Case,
    Exam,
    Network,
    Training,
    bootstrap,
    breast_mask,
    find_tumour,
    score_region,
    tissues,
    train,
)
from biomodel.imaging.regions.practice import FAMILIAR, UNSEEN, Practice, Site, practice_exam
from biomodel.imaging.series import Kind
from biomodel.virtual import Matched, Mismatched, VirtualPatient, virtual_patient

torch.set_num_threads(1)
Found = tuple[np.ndarray, str]
LEAST = 0.1  # cm³


Source = Site | Protocol


def image(patient: VirtualPatient, visit: int, source: Source, seed: int) -> Practice:
    if isinstance(source, Site):
        return practice_exam(patient, visit, source, seed)
    mismatched = "truth.resistant_fraction" in patient.parameters
    scan = acquire(patient, visit, source.mismatched() if mismatched else source, seed=seed)
    series, baseline = scan.one(Kind.DCE), range(source.baseline)
    times = np.asarray(series.times)
    arrival = float(times[source.baseline - 1])
    exam = Exam.of_series(
        series.data, times, baseline, series.grid.spacing, arrival=arrival, late=min(450.0, times[-1] - arrival)
    )
    organ, gland = np.zeros(exam.shape, bool), np.zeros(exam.shape)
    organ[scan.box] = patient.patient.domain.mask
    gland[scan.box] = patient.patient.domain.tissues["fibroglandular"]
    region, body = (scan.scanned[name].values.astype(bool) for name in ("region", "body"))
    setting = "Mismatched" if mismatched else "Matched"
    return Practice(exam, region, organ, body, gland, patient.patient.id, visit, source.vendor, setting)


def exams(seeds: range, truth: Matched, sites: Sequence[Sequence[Source]]) -> Iterator[tuple[int, Practice]]:
    """Both visits of each patient at a site of every group, with the group's number."""
    for number, seed in enumerate(seeds):
        patient = virtual_patient(seed, truth, visit_days=(0.0, 19.0))
        for group, choice in enumerate(sites):
            for visit in (1, 2):
                yield group, image(patient, visit, choice[number % len(choice)], seed)


def organ_of(exam: Exam) -> np.ndarray:
    return breast_mask(exam.before + exam.early + exam.late, exam.spacing).mask


def default(exam: Exam, organ: np.ndarray) -> np.ndarray:
    tissue = tissues(exam.before, organ, exam.spacing, fat_suppressed=True)
    return find_tumour(exam, organ, tissue=tissue).mask


def i_spy(exam: Exam, organ: np.ndarray) -> np.ndarray:
    return functional_tumour(exam.before, exam.early, exam.late, organ)


def otsu(exam: Exam, organ: np.ndarray) -> np.ndarray:
    import SimpleITK as sitk

    gain = np.where(organ, exam.early - exam.before, 0)
    method = sitk.OtsuThresholdImageFilter()
    method.SetMaskValue(1)
    method.SetMaskOutput(False)
    method.Execute(sitk.GetImageFromArray(gain.astype(np.float32)), sitk.GetImageFromArray(organ.astype(np.uint8)))
    labels, _ = ndimage.label(organ & (gain > method.GetThreshold()))
    return labels == np.bincount(labels.ravel())[1:].argmax() + 1 if labels.any() else organ & False


def trained(count: int, steps: int, familiar: Sequence[Source]) -> Network:
    began = time.process_time()
    cases = []
    for truth, seeds in ((Matched(), range(1000, 1000 + count // 2)), (Mismatched(), range(1024, 1024 + count // 2))):
        for _, p in exams(seeds, truth, (familiar,)):
            cases.append(Case(p.exam, organ_of(p.exam), p.region, p.patient, p.site))
    ready = time.process_time()
    network = train(cases, training=Training(steps=steps))
    print(
        f"network: {len(cases)} exams of {count} virtual patients at sites "
        f"{', '.join(network.provenance['sites'])}; {steps} steps in {time.process_time() - ready:.0f} s of CPU "
        f"(images {ready - began:.0f} s), digest {network.digest[:12]}"
    )
    return network


def main(quick: bool, raw: bool) -> None:
    groups: tuple[Sequence[Source], ...] = ((SIEMENS_3T, GE_15T), (PHILIPS_3T,)) if raw else (FAMILIAR, UNSEEN)
    network = trained(8 if quick else 48, 100 if quick else STEPS, groups[0])
    methods: dict[str, Callable[[Exam, np.ndarray], np.ndarray]] = {
        "default (thresholds and growing)": default,
        "network, 8 views": lambda exam, organ: network.find(exam, organ).mask,
        "network, 1 view": lambda exam, organ: network.find(exam, organ, augment=False).mask,
        "peer: I-SPY functional tumour": i_spy,
        "peer: Otsu on the gain, largest part": otsu,
    }
    rows: dict[tuple[str, str, int], list[tuple[str, float, float, float, float]]] = {}
    left, false = 0, dict.fromkeys(methods, 0.0)
    organs, gland, empty = [], [], 0
    first, count = (4000, 2) if quick else (5000, 20)  # quick runs leave those that are scored alone
    for truth, seeds in (
        (Matched(), range(first, first + count)),
        (Mismatched(), range(first + 20, first + 20 + count)),
    ):
        for group, p in exams(seeds, truth, groups):
            organ = organ_of(p.exam)
            organs.append(score_region(organ, p.organ, p.exam.spacing).dice)
            if p.visit == 1:
                healthy = organ & p.organ & ~p.region
                tissue = tissues(p.exam.before, organ, p.exam.spacing, fat_suppressed=True)
                gland.append(tissue.fibroglandular[healthy].mean() - p.fibroglandular[healthy].mean())
            volume = p.region.sum() * p.exam.voxel_volume / 1000
            for name, method in methods.items():
                began = time.process_time()
                score = score_region(method(p.exam, organ), p.region, p.exam.spacing)
                seconds = time.process_time() - began
                if volume >= LEAST:
                    rows.setdefault((name, p.setting, group), []).append(
                        (p.patient, score.dice, score.hd95, score.volume_error, seconds)
                    )
                elif volume == 0:
                    false[name] += score.found
            left += volume < LEAST
            empty += volume == 0
    print(
        f"organ: median Dice {np.median(organs):.3f}, least {min(organs):.3f}; fibroglandular share off by "
        f"{np.mean(gland):+.3f} ± {np.std(gland):.3f}"
    )
    print(f"{left} exams with under {LEAST} cm³ of tumour left out, {empty} of them without any\n")
    print(f"{'':38s}{'setting':12s}{'sites':9s}{'n':>4s}  {'Dice, median (95 %)':24s}{'least':>6s}"
          f"{'HD95 mm':>9s}{'volume':>9s}{'s CPU':>7s}")  # fmt: skip
    for (name, setting, group), found in sorted(rows.items(), key=lambda r: (list(methods).index(r[0][0]), r[0][1:])):
        patients, dice, far, error, seconds = zip(*found, strict=True)
        bar = " bar 0.85" if name.startswith("default") else " bar 0.90" if name.startswith("network, 8") else ""
        print(
            f"{name:38s}{setting:12s}{('seen', 'unseen')[group]:9s}{len(dice):4d}  {str(bootstrap(dice, patients)):24s}"
            f"{min(dice):6.2f}{np.median(far):9.2f}{np.median(error):+9.1%}{np.mean(seconds):7.2f}"
            f"{bar if group else ''}"
        )
    if empty:
        print("\nfound where no tumour is left, cm³ an exam: "
              + ", ".join(f"{name} {total / empty:.2f}" for name, total in false.items()))  # fmt: skip


STEPS = 2000

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few patients and steps, to see that it runs")
    parser.add_argument("--raw", action="store_true", help="raw series of biomodel.acquisition")
    given = parser.parse_args()
    main(given.quick, given.raw)
