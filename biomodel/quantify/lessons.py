"""Quantified patients as exams to learn from: their regions, looked through and corrected, teach a network."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from biomodel.errors import InputError
from biomodel.imaging.regions.exam import Exam
from biomodel.imaging.regions.lessons import Lesson
from biomodel.manifest import find_manifest, load_json
from biomodel.quantify.maps import VisitMaps
from biomodel.quantify.nifti_maps import read_maps

__all__ = ["lesson_of", "read_lessons"]

_NUMBER = re.compile(r"visit(\d+)\.json")


def read_lessons(folder: str | os.PathLike[str]) -> tuple[Lesson, ...]:
    """Read all visits of a patient that ``tumorcast quantify`` made.

    What is learnt are the files as they lie there: ``maps/visit1_region.nii.gz`` and
    ``maps/visit1_tissue-fibroglandular.nii.gz``, a mask and fractions that a reader corrects first. An empty region
    says that there is no tumour.

    Parameters
    ----------
    folder
        With ``patient.json`` and ``maps/``.

    Raises
    ------
    InputError
        If it is no such folder, or a file is missing or damaged.
    GeometryError
        If a corrected file lies on another grid.
    """
    manifest = find_manifest(folder, "patient.json")
    content = load_json(manifest)
    patient = str(content.get("id", "")) if isinstance(content, dict) else ""
    maps = manifest.parent / "maps"
    numbers = sorted(int(found[1]) for path in maps.glob("visit*.json") if (found := _NUMBER.fullmatch(path.name)))
    if not patient or not numbers:
        raise InputError(
            f"{Path(folder)}: {'no maps/visit1.json' if patient else 'patient.json has no id'}; expected a folder that "
            "'tumorcast quantify' made."
        )
    return tuple(lesson_of(read_maps(maps, number), patient) for number in numbers)


def lesson_of(visit: VisitMaps, patient: str) -> Lesson:
    """Return a quantified visit as an exam to learn from.

    Raises
    ------
    InputError
        If it has no images before, early and late after the agent.
    """
    images = [np.asarray(visit[name].values, float) for name in ("before", "early", "late")]
    adc = np.asarray(visit["ADC"].values, float) if "ADC" in visit.maps else None
    exam = Exam(images[0], images[1], images[2], visit.grid.spacing, adc)
    region = None if visit.region is None else np.asarray(visit.region, bool)
    # What a reader has drawn belongs to the organ, also where the organ's mask was too small.
    organ = np.asarray(visit.organ, bool) if region is None else np.asarray(visit.organ, bool) | region
    gland = visit.tissues.get("fibroglandular")
    if gland is not None:
        known = np.asarray(visit.organ, bool) & exam.sound & (True if region is None else ~region)
        gland = np.where(known, np.asarray(gland, float), np.nan)
    field = visit.acquisition.get("field_strength")
    site = " ".join(str(part) for part in (visit.acquisition.get("vendor"), f"{field} T" if field else None) if part)
    return Lesson(exam, organ, region, gland, patient, site)
