"""A study: raw series of one patient at several visits, with what images cannot say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

from biomodel.errors import InputError
from biomodel.frozen import FrozenDict
from biomodel.imaging.bids import read_bids
from biomodel.imaging.dicom import read_dicom
from biomodel.imaging.series import Intake, Kind
from biomodel.imaging.series_train import TrainTiming
from biomodel.manifest import find_manifest, load_json, validate
from biomodel.records import baseline_of, cellularity_settings, read_schedule, train_timing, visit_days
from biomodel.schedule import Schedule
from biomodel.schema import StudyManifest
from biomodel.visit import CellularitySettings

__all__ = ["Study", "StudyVisit"]

#: Day 0 of series that carry dates; the days of study.json are the ones that count.
_ANY_DAY = date(1900, 1, 1)


@dataclass(frozen=True)
class StudyVisit:
    """One day of imaging.

    Parameters
    ----------
    number, day
        From 1, and days from day 0.
    folder
        Of BIDS or DICOM series.
    haematocrit
        As measured, a fraction; None where it was not.
    train
        How inversion-prepared series were read, where their sidecars do not say it.
    """

    number: int
    day: float
    folder: Path
    haematocrit: float | None = None
    train: TrainTiming | None = None

    def read(self) -> Intake:
        """Read the series: BIDS where there are NIfTI files, DICOM otherwise (and a B1 map beside it).

        Raises
        ------
        InputError
            If the folder does not exist or holds no images, or a train is given and no series that it could be of.
        """
        if not self.folder.is_dir():
            raise InputError(f"visit {self.number}: there is no folder '{self.folder.name}'. Correct 'folder'.")
        found = self._series()
        timing = self.train
        if timing is None:
            return found
        if not found.of(Kind.INVERSION):
            raise InputError(
                f"visit {self.number}: inversion_train in study.json, but no inversion-prepared series in "
                f"'{self.folder.name}'; expected one (BIDS _IRT1, or DICOM with two or more inversion times). Add it, "
                "or leave inversion_train out."
            )
        try:
            series = tuple(timing.of(one) if one.kind is Kind.INVERSION else one for one in found.series)
        except InputError as error:
            raise type(error)(f"visit {self.number}, inversion_train: {error}") from None
        return replace(found, series=series)

    def _series(self) -> Intake:
        nifti = any(self.folder.rglob("*.nii")) or any(self.folder.rglob("*.nii.gz"))
        intake = read_bids(self.folder, first_visit=_ANY_DAY) if nifti else Intake(())
        if intake.series and any(series.samples > 1 for series in intake.series):
            return intake
        found = read_dicom(self.folder, first_visit=_ANY_DAY)
        return Intake(
            (*found.series, *intake.series), (*found.findings, *intake.findings), (*found.dropped, *intake.dropped)
        )


@dataclass(frozen=True, eq=False)
class Study:
    """A patient's raw series.

    Parameters
    ----------
    id, organ
        As in a patient's manifest.
    visits
        In the order of days; the first is the reference.
    cellularity
        How ADC becomes cell fraction.
    schedule, clinical, baseline, notes
        As in a patient's manifest.
    """

    id: str
    organ: str
    visits: tuple[StudyVisit, ...]
    cellularity: CellularitySettings
    schedule: Schedule = Schedule()
    clinical: Mapping[str, object] = field(default_factory=dict)
    baseline: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "clinical", FrozenDict(self.clinical))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Study:
        """Read ``study.json``, given it or its folder; the series are read visit by visit, later.

        Raises
        ------
        InputError, UnitError
            With every problem, one per line.
        """
        found = find_manifest(path, "study.json")
        manifest = validate(StudyManifest, load_json(found), found.name)
        name = found.name
        days = visit_days(manifest, name)
        for number, visit in enumerate(manifest.visits, start=1):
            if Path(visit.folder).is_absolute() or ".." in Path(visit.folder).parts:
                raise InputError(
                    f"{name}: visit {number}, folder: '{visit.folder}'; expected a folder below that of study.json, "
                    "relative to it. Move the series there."
                )
        settings = cellularity_settings(manifest.cellularity, name)
        assert settings is not None  # the manifest requires it
        return cls(
            id=manifest.id,
            organ=manifest.organ,
            visits=tuple(
                StudyVisit(
                    number, day, found.parent / visit.folder, visit.haematocrit,
                    train_timing(visit.inversion_train, f"{name}: visit {number}"),
                )
                for number, (visit, day) in enumerate(zip(manifest.visits, days, strict=True), start=1)
            ),  # fmt: skip
            cellularity=settings,
            schedule=read_schedule(manifest, name),
            clinical={} if manifest.clinical is None else manifest.clinical.model_dump(exclude_none=True),
            baseline=baseline_of(manifest, name),
            notes=tuple(manifest.notes),
        )
