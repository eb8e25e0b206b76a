"""Regions and tissue on the virtual cohort: methods without weights and networks, both settings, seen and unseen sites.

Run: python tests/benchmarks/bench_regions.py [--raw] [--quick]
Peers: the functional tumour of the I-SPY trials alone (70 % enhancement in the organ, without the box that a reader
draws in the trials), and Otsu's threshold on the early gain of signal with the largest part kept.

Patients 1000-1047 at sites A-F are learnt from, at two visits and as if no tumour had grown. Patients 5000-5019
(Matched) and 5020-5039 (Mismatched) are scored, each imaged once at one of those sites and once at one of the sites
U-W, at both visits; the truth is where the cell fraction reaches the visible one. An exam whose tumour has gone has no
surface; exams with less than 0.1 cm³ of tumour are left out of Dice and counted.

Tissue: fibroglandular and adipose at visit 1, each as the voxels with a fraction of a half or more, in the healthy part
of the organ.

False positives: the volume that each method reports where there is none, in exams of the same breasts in which no
tumour ever grew, and at visits where treatment has left nothing visible.

It takes about 25 minutes of CPU.

With --raw the images are the raw dynamic series of :mod:`biomodel.acquisition`, which was built without these methods
in view: two vendors are learnt from, the third is unseen; flaws of the acquisition in the mismatched setting. It takes
about half an hour, most of it the series.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

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
    FuzzyClusters,
    NetworkTissues,
    ThresholdRegions,
    TissueCase,
    TissueMethod,
    TissueNetwork,
    Training,
    TumourNetwork,
    bootstrap,
    breast_mask,
    score_region,
    train,
    train_tissues,
)
from biomodel.imaging.regions.practice import FAMILIAR, UNSEEN, Practice, Site, practice_exam, without_tumour
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


def exams(
    seeds: range, truth: Matched, sites: Sequence[Sequence[Source]], *, tumour_free: bool = False
) -> Iterator[tuple[int, Practice]]:
    """Both visits of each patient at a site of every group, with the group's number; without a tumour the first."""
    for number, seed in enumerate(seeds):
        patient = virtual_patient(seed, truth, visit_days=(0.0, 19.0))
        patient = without_tumour(patient) if tumour_free else patient
        for group, choice in enumerate(sites):
            for visit in (1,) if tumour_free else (1, 2):
                yield group, image(patient, visit, choice[number % len(choice)], seed)


def organ_of(exam: Exam) -> np.ndarray:
    return breast_mask(exam.before + exam.early + exam.late, exam.spacing).mask


def default(exam: Exam, organ: np.ndarray) -> np.ndarray:
    tissue = FuzzyClusters().tissues(exam, organ, fat_suppressed=True)
    return ThresholdRegions().region(exam, organ, tissue).mask


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


def trained(count: int, steps: int, familiar: Sequence[Source]) -> tuple[TumourNetwork, TissueNetwork]:
    began = time.process_time()
    cases, tissues = [], []
    for truth, seeds in ((Matched(), range(1000, 1000 + count // 2)), (Mismatched(), range(1024, 1024 + count // 2))):
        # The same breasts without a tumour, too: that there is nothing has to be learnt.
        both = chain(*(exams(seeds, truth, (familiar,), tumour_free=free) for free in (False, True)))
        for _, p in both:
            organ = organ_of(p.exam)
            cases.append(Case(p.exam, organ, p.region, p.patient, p.site))
            if p.visit == 1 and p.region.any():
                gland = np.where(healthy(p, organ), p.fibroglandular, np.nan)
                tissues.append(TissueCase(p.exam, organ, gland, True, p.patient, p.site))
    ready = time.process_time()
    print(f"images to learn from: {ready - began:.0f} s of CPU")
    network = train(cases, training=Training(steps=steps))
    done = time.process_time()
    tissue = train_tissues(tissues, training=Training(steps=max(1, round(steps * TISSUE_SHARE))))
    seconds = (done - ready, time.process_time() - done)
    for made, spent in zip((network, tissue), seconds, strict=True):
        known = made.provenance
        print(
            f"network for {made.SUBJECT}: {known['cases']} exams of {known['patients']} virtual patients at sites "
            f"{', '.join(known['sites'])}; {known['training']['steps']} steps in {spent:.0f} s of CPU, "
            f"digest {made.digest[:12]}",
            flush=True,
        )
    return network, tissue


def healthy(p: Practice, organ: np.ndarray) -> np.ndarray:
    return organ & p.organ & ~p.region


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    return 2 * float((found & truth).sum()) / float(found.sum() + truth.sum())


Rows = dict[tuple[str, str, int], list[tuple]]


def score_tissue(p: Practice, organ: np.ndarray, group: int, methods: dict[str, TissueMethod], rows: Rows) -> None:
    where = healthy(p, organ)
    truth = p.fibroglandular[where]
    for name, method in methods.items():
        began = time.process_time()
        found = method.tissues(p.exam, organ, fat_suppressed=True)
        seconds = time.process_time() - began
        gland, error = found.fibroglandular[where], np.abs(found.fibroglandular[where] - truth)
        alike = np.nan if found.spread is None else np.corrcoef(found.spread[where], error)[0, 1]
        rows.setdefault((name, p.setting, group), []).append(
            (p.patient, dice(gland >= 0.5, truth >= 0.5), dice(gland < 0.5, truth < 0.5), error.mean(),
             gland.mean() - truth.mean(), alike, seconds)
        )  # fmt: skip


def show_tissue(rows: Rows, methods: dict[str, TissueMethod]) -> None:
    print(f"\n{'tissue at visit 1':38s}{'setting':12s}{'sites':9s}{'n':>4s}  {'Dice fibroglandular (95 %)':28s}"
          f"{'Dice adipose (95 %)':26s}{'error':>7s}{'share':>8s}{'spread~error':>14s}{'s CPU':>7s}")  # fmt: skip
    for (name, setting, group), found in sorted(rows.items(), key=lambda r: (list(methods).index(r[0][0]), r[0][1:])):
        patients, gland, fat, error, share, alike, seconds = zip(*found, strict=True)
        print(
            f"{name:38s}{setting:12s}{SITES[group]:9s}{len(gland):4d}  {str(bootstrap(gland, patients)):28s}"
            f"{str(bootstrap(fat, patients)):26s}{np.mean(error):7.3f}{np.mean(share):+8.3f}{np.mean(alike):14.2f}"
            f"{np.mean(seconds):7.2f}"
        )


def show_regions(rows: Rows, methods: Sequence[str]) -> None:
    print(f"\n{'tumour':38s}{'setting':12s}{'sites':9s}{'n':>4s}  {'Dice, median (95 %)':24s}{'least':>6s}"
          f"{'HD95 mm':>9s}{'volume':>9s}{'s CPU':>7s}")  # fmt: skip
    for (name, setting, group), found in sorted(rows.items(), key=lambda r: (methods.index(r[0][0]), r[0][1:])):
        patients, overlap, far, error, seconds = zip(*found, strict=True)
        bar = " bar 0.85" if name.startswith("default") else " bar 0.90" if name.startswith("network, 8") else ""
        print(
            f"{name:38s}{setting:12s}{SITES[group]:9s}{len(overlap):4d}  {str(bootstrap(overlap, patients)):24s}"
            f"{min(overlap):6.2f}{np.median(far):9.2f}{np.median(error):+9.1%}{np.mean(seconds):7.2f}"
            f"{bar if group else ''}"
        )


def show_false(rows: dict[tuple[str, str, int], list[float]], methods: Sequence[str]) -> None:
    print(f"\n{'found where there is no tumour, cm³':38s}{'exams':26s}{'sites':9s}{'n':>4s}{'with any':>10s}"
          f"{'median':>9s}{'mean':>9s}{'most':>9s}")  # fmt: skip
    for (name, kind, group), found in sorted(rows.items(), key=lambda r: (methods.index(r[0][0]), r[0][1:])):
        print(
            f"{name:38s}{kind:26s}{SITES[group]:9s}{len(found):4d}{np.mean(np.array(found) > 0):10.0%}"
            f"{np.median(found):9.2f}{np.mean(found):9.2f}{max(found):9.2f}"
        )


def main(quick: bool, raw: bool) -> None:
    groups: tuple[Sequence[Source], ...] = ((SIEMENS_3T, GE_15T), (PHILIPS_3T,)) if raw else (FAMILIAR, UNSEEN)
    network, tissue = trained(8 if quick else 48, 100 if quick else STEPS, groups[0])
    methods: dict[str, Callable[[Exam, np.ndarray], np.ndarray]] = {
        "default (thresholds and growing)": default,
        "network, 8 views": lambda exam, organ: network.find(exam, organ).mask,
        "network, 1 view": lambda exam, organ: network.find(exam, organ, augment=False).mask,
        "peer: I-SPY functional tumour": i_spy,
        "peer: Otsu on the gain, largest part": otsu,
    }
    splits: dict[str, TissueMethod] = {"fuzzy c-means": FuzzyClusters(), "network, 8 views": NetworkTissues(tissue)}
    regions: Rows = {}
    tissues: Rows = {}
    false: dict[tuple[str, str, int], list[float]] = {}
    organs, left, empty = [], 0, 0
    first, count = (4000, 2) if quick else (5000, 20)  # quick runs leave those that are scored alone
    parts = ((Matched(), range(first, first + count)), (Mismatched(), range(first + 20, first + 20 + count)))
    for truth, seeds in parts:
        for group, p in exams(seeds, truth, groups):
            organ = organ_of(p.exam)
            organs.append(score_region(organ, p.organ, p.exam.spacing).dice)
            if p.visit == 1:
                score_tissue(p, organ, group, splits, tissues)
            volume = p.region.sum() * p.exam.voxel_volume / 1000
            left += volume < LEAST
            empty += volume == 0
            for name, method in methods.items():
                began = time.process_time()
                score = score_region(method(p.exam, organ), p.region, p.exam.spacing)
                seconds = time.process_time() - began
                if volume >= LEAST:
                    regions.setdefault((name, p.setting, group), []).append(
                        (p.patient, score.dice, score.hd95, score.volume_error, seconds)
                    )
                elif volume == 0:
                    false.setdefault((name, "after complete response", group), []).append(score.found)
        for group, p in exams(seeds, truth, groups, tumour_free=True):
            organ = organ_of(p.exam)
            for name, method in methods.items():
                found = float(method(p.exam, organ).sum()) * p.exam.voxel_volume / 1000
                false.setdefault((name, "never a tumour", group), []).append(found)
    print(f"organ: median Dice {np.median(organs):.3f}, least {min(organs):.3f}")
    print(f"{left} exams with under {LEAST} cm³ of tumour left out, {empty} of them without any")
    show_tissue(tissues, splits)
    show_regions(regions, list(methods))
    show_false(false, list(methods))


STEPS = 2000
TISSUE_SHARE = 0.3  # steps of the tissue network, of those of the tumour's
SITES = ("seen", "unseen")

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few patients and steps, to see that it runs")
    parser.add_argument("--raw", action="store_true", help="raw series of biomodel.acquisition")
    given = parser.parse_args()
    main(given.quick, given.raw)
