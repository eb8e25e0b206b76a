"""Exams to learn from, with what is known of them; those of virtual patients are made here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from biomodel.errors import InputError
from biomodel.imaging.regions.exam import Exam
from biomodel.imaging.regions.network_tissue import TissueCase
from biomodel.imaging.regions.organ import breast_mask
from biomodel.imaging.regions.practice import FAMILIAR, Practice, Site, practice_exam, without_tumour
from biomodel.imaging.regions.training import Case
from biomodel.virtual import Matched, Mismatched, virtual_patient

__all__ = ["Lesson", "virtual_lessons"]

#: Days of the visits of virtual patients: before treatment, and under it.
DAYS = (0.0, 19.0)


@dataclass(frozen=True, eq=False)
class Lesson:
    """An exam with all that is known of it.

    Attributes
    ----------
    exam : Exam
    organ : ndarray of bool, shape (z, y, x)
    region : ndarray of bool, shape (z, y, x), optional
        The tumour; None where nobody has drawn it.
    fibroglandular : ndarray, shape (z, y, x), optional
        Fraction; NaN where it is not known, such as in the tumour.
    patient, site : str
    """

    exam: Exam
    organ: np.ndarray
    region: np.ndarray | None
    fibroglandular: np.ndarray | None
    patient: str
    site: str

    def tumour(self) -> Case:
        """Return it for :func:`biomodel.imaging.regions.train`.

        Raises
        ------
        InputError
            If it has no region.
        """
        if self.region is None:
            raise InputError(f"{self.patient}: an exam without a region cannot teach where tumours are. Draw it first.")
        return Case(self.exam, self.organ, self.region, self.patient, self.site)

    def tissue(self, *, fat_suppressed: bool) -> TissueCase:
        """Return it for :func:`biomodel.imaging.regions.train_tissues`.

        Raises
        ------
        InputError
            If it has no fractions.
        """
        if self.fibroglandular is None:
            raise InputError(f"{self.patient}: an exam without tissue fractions cannot teach them.")
        return TissueCase(self.exam, self.organ, self.fibroglandular, fat_suppressed, self.patient, self.site)

    @classmethod
    def of(cls, practice: Practice) -> Lesson:
        """Return a practice exam as a lesson, with the breast as it is found in the images."""
        exam = practice.exam
        organ = breast_mask(exam.before + exam.early + exam.late, exam.spacing).mask
        gland = np.where(organ & practice.organ & ~practice.region, practice.fibroglandular, np.nan)
        return cls(exam, organ, practice.region, gland, practice.patient, f"virtual {practice.site}")


def virtual_lessons(seeds: Sequence[int], sites: Sequence[Site] = FAMILIAR) -> Iterator[Lesson]:
    """Yield exams of virtual patients with fat suppression: two visits each, and the same breast without a tumour.

    Even seeds are patients of the matched setting, odd ones of the mismatched; sites take turns, two seeds each.

    Parameters
    ----------
    seeds
        One for each patient.
    sites
        Where they are imaged.
    """
    for seed in seeds:
        patient = virtual_patient(seed, Mismatched() if seed % 2 else Matched(), visit_days=DAYS)
        site = sites[seed // 2 % len(sites)]  # so that each site sees both settings
        for visit in range(1, len(DAYS) + 1):
            yield Lesson.of(practice_exam(patient, visit, site, seed))
        yield Lesson.of(practice_exam(without_tumour(patient), 1, site, seed))
