"""A patient: what was measured at each visit, on which domain, under which treatments."""

from __future__ import annotations

import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike

import numpy as np

from biomodel.domain import Domain
from biomodel.errors import InputError
from biomodel.schedule import Schedule
from biomodel.tables import html_table
from biomodel.visit import (
    MAPS,
    CellularitySettings,
    Visit,
    VolumeSettings,
    check_order,
    check_visit,
    plain_fields,
    require,
)

__all__ = ["CellularitySettings", "Patient", "Visit", "VolumeSettings"]

#: How the note begins that says how a virtual patient was made.
VIRTUAL = "Virtual:"


@dataclass(frozen=True, eq=False)
class Patient:
    """Everything known about one patient, immutable.

    Parameters
    ----------
    id
        Pseudonym.
    organ
        ``breast``, ``brain`` or any other text.
    domain
        Grid and mask, or the well-mixed point for a patient without images.
    visits
        By day, numbered from 1.
    schedule
        Treatments.
    cellularity
        Needed when a visit has an ADC map.
    volumes
        Noise of measured volumes.
    clinical
        Age, menopausal state, HR, HER2, subtype, histology, grade, breast density and the like.
    outcome
        What was found in the end (pathology, follow-up); never kept by :meth:`until`.
    baseline
        ISO date of day 0.
    notes
        Remarks that a forecast of this patient and its report show. One that starts with ``Virtual:`` says how a
        patient that is no person was made, and is never dropped.

    Raises
    ------
    InputError
        If visits are out of order, or a map cannot be used.
    GeometryError
        If a map does not lie on the domain's grid.
    """

    id: str
    organ: str
    domain: Domain
    visits: tuple[Visit, ...]
    schedule: Schedule = field(default_factory=Schedule)
    cellularity: CellularitySettings | None = None
    volumes: VolumeSettings | None = None
    clinical: Mapping[str, object] = field(default_factory=dict)
    outcome: Mapping[str, object] | None = None
    baseline: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"patient {self.id}"
        require(isinstance(self.id, str) and bool(self.id.strip()), "patient: the id is empty; expected a pseudonym.")
        visits = tuple(self.visits)
        require(bool(visits), f"{where}: no visits; expected at least one.")
        for expected, visit in enumerate(visits, start=1):
            require(
                visit.number == expected,
                f"{where}: visit {expected} in order carries number {visit.number}; expected {expected}. Number visits "
                "from 1.",
            )
            if expected > 1:
                check_order(visits[expected - 2].day, visit.day, expected, where)
            place = f"{where}: visit {expected}"
            check_visit(visit, self.domain, {name: f"{place}, {name}" for name in MAPS})
            require(
                visit.adc is None or self.cellularity is not None,
                f"{place}, adc: no 'cellularity' settings; expected adc_w and adc_min, which have no default. Add "
                "'cellularity' to the manifest.",
            )
        object.__setattr__(self, "visits", visits)
        object.__setattr__(self, "clinical", plain_fields(self.clinical))
        if self.outcome is not None:
            object.__setattr__(self, "outcome", plain_fields(self.outcome))
        object.__setattr__(self, "notes", tuple(self.notes))

    @classmethod
    def from_volumes(
        cls,
        id: str,
        days: Iterable[float],
        volumes_cm3: Iterable[float],
        schedule: Schedule | None = None,
        *,
        cv: float = 0.2,
        floor: float = 0.05,
        clinical: Mapping[str, object] | None = None,
        longest_diameters: Iterable[float] | None = None,
        organ: str = "unknown",
        outcome: Mapping[str, object] | None = None,
    ) -> Patient:
        """Return a patient without images, on the well-mixed domain.

        Parameters
        ----------
        id
            Pseudonym.
        days
            Days of the visits, growing.
        volumes_cm3
            Tumour volume at each visit, cm³; NaN where it was not measured.
        schedule
            Treatments.
        cv, floor
            Noise and detection floor (cm³) of the volumes: see :class:`VolumeSettings`.
        clinical
            Clinical data.
        longest_diameters
            At each visit, mm; NaN where it was not measured.
        organ
            Any text.
        outcome
            What was found in the end.

        Raises
        ------
        InputError
            If the lengths differ, days do not grow, or a volume is negative or infinite.

        Examples
        --------
        >>> patient = Patient.from_volumes("P1", days=[0, 21, 84], volumes_cm3=[12.0, 7.5, 1.1])
        >>> patient.until(visit=2).visits[-1].day
        21.0
        """
        days = [float(day) for day in days]
        sizes = [float(volume) for volume in volumes_cm3]
        spans = [math.nan] * len(days) if longest_diameters is None else [float(span) for span in longest_diameters]
        require(
            len(days) == len(sizes) == len(spans),
            f"patient {id}: {len(days)} days, {len(sizes)} volumes and {len(spans)} diameters; expected one of "
            "each per visit.",
        )
        visits = tuple(
            Visit(
                number=number,
                day=day,
                volume=None if math.isnan(size) else size,
                longest_diameter=None if math.isnan(span) else span,
            )
            for number, (day, size, span) in enumerate(zip(days, sizes, spans, strict=True), start=1)
        )
        return cls(
            id=id,
            organ=organ,
            domain=Domain.point(),
            visits=visits,
            schedule=Schedule() if schedule is None else schedule,
            volumes=VolumeSettings(cv=cv, floor=floor),
            clinical=clinical or {},
            outcome=outcome,
        )

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Patient:
        """Read a patient from its manifest ``patient.json`` or the folder that holds it.

        Schema, units and geometry are checked; the domain is the mask's whole grid, whatever the visits.

        Raises
        ------
        InputError
            With what is wrong, where, what was found and how to mend it (UnitError and GeometryError for these kinds).
        """
        from biomodel.records import read_patient

        return read_patient(path)

    def write(self, folder: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write ``patient.json`` and its NIfTI files into a new `folder`; :meth:`read` gives the same patient back.

        Parameters
        ----------
        folder
            Folder to make. It appears whole or not at all.
        overwrite
            Whether an existing patient folder may be replaced as a whole.

        Raises
        ------
        OutputError
            If the folder exists already or cannot be written.
        """
        from biomodel.records import write_patient

        write_patient(self, folder, overwrite=overwrite)

    @property
    def virtual(self) -> bool:
        """Whether the patient was made by a generator, as a note says."""
        return any(note.startswith(VIRTUAL) for note in self.notes)

    def visit(self, number: int) -> Visit:
        """Return visit `number`, counted from 1.

        Raises
        ------
        InputError
            If there is no such visit.
        """
        count = len(self.visits)
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or not 1 <= number <= count:
            days = ", ".join(f"{visit.number} (day {visit.day:g})" for visit in self.visits)
            raise InputError(f"patient {self.id}: no visit {number}; it has {days}. Visits are numbered from 1.")
        return self.visits[number - 1]

    def until(self, visit: int) -> Patient:
        """Return what was known right after visit number `visit`.

        Later visits, everything derived from them, the outcome, the notes and every dose marked ``given`` after that
        day are dropped; ``planned`` doses stay, also those before that day. A record in which nothing is marked planned
        keeps its later doses, as there is no other knowledge of the plan, and carries a note that says so. A dose on
        the day of the visit is kept, and so is the note that a patient is virtual.

        No note tells that given doses were dropped: that there were any is itself knowledge of what came later. The
        report, which sees the whole record, says so. A dose entered both as planned and as given stays two doses here
        as everywhere; the quality check warns of it.

        Raises
        ------
        InputError
            If there is no such visit.
        """
        last = self.visit(visit)
        later = self.schedule.given_after(last.day)
        notes = tuple(note for note in self.notes if note.startswith(VIRTUAL))
        schedule = self.schedule
        if later and schedule.given_only:
            noun = "treatment" if later == 1 else "treatments"
            note = (
                f"The record marks no treatment as planned, so {later} {noun} recorded as given after day "
                f"{last.day:g} stay in the schedule: the forecast knows what was really given."
            )
            notes = (*notes, note)
        else:
            schedule = schedule.until(last.day)
        return replace(
            self,
            visits=self.visits[: last.number],
            schedule=schedule,
            outcome=None,
            notes=notes,
        )

    def without_images(self, *, cv: float | None = None, floor: float | None = None) -> Patient:
        """Return the same patient on the well-mixed domain, with the volumes of the regions.

        A measured volume is kept where a visit has one. Noise settings are the patient's own, unless given here.

        Parameters
        ----------
        cv, floor
            See :class:`VolumeSettings`; the default for `floor` is the patient's own, or one voxel.
        """
        settings = self.volumes or VolumeSettings(
            floor=0.05 if self.domain.well_mixed else self.domain.voxel_volume / 1e3
        )
        settings = VolumeSettings(
            cv=settings.cv if cv is None else cv, floor=settings.floor if floor is None else floor
        )
        visits = tuple(
            replace(visit, adc=None, adc_sd=None, region=None, drug_map=None, volume=self.volume_of(visit))
            for visit in self.visits
        )
        return replace(self, domain=Domain.point(), visits=visits, cellularity=None, volumes=settings)

    def volume_of(self, visit: Visit) -> float | None:
        """Return the tumour volume of `visit`, cm³: the measured one, or else that of its region; None without both."""
        if visit.volume is not None or visit.region is None:
            return visit.volume
        return int(visit.region.sum()) * self.domain.voxel_volume / 1e3

    def replace_schedule(self, schedule: Schedule) -> Patient:
        """Return the same patient under another schedule (a what-if)."""
        return replace(self, schedule=schedule)

    def fingerprint(self) -> str:
        """Return a SHA-256 over all contents: equal for patients that hold the same data."""
        digest = hashlib.sha256()

        def add(name: str, values: np.ndarray | None) -> None:
            if values is not None:
                digest.update(f"{name}{values.dtype}{values.shape}".encode())
                digest.update(np.ascontiguousarray(values).tobytes())

        text = [
            self.id,
            self.organ,
            self.domain.spacing,
            self.domain.well_mixed,
            repr(self.schedule),
            repr(self.cellularity),
            repr(self.volumes),
            dict(self.clinical),
            None if self.outcome is None else dict(self.outcome),
            self.baseline,
            self.notes,
            [(v.number, v.day, v.volume, v.longest_diameter, dict(v.acquisition)) for v in self.visits],
        ]
        digest.update(json.dumps(text, sort_keys=True, default=str).encode())
        add("mask", self.domain.mask)
        add("affine", self.domain.affine)
        for name in sorted(self.domain.tissues):
            add(f"tissue {name}", self.domain.tissues[name])
        for visit in self.visits:
            for name in MAPS:
                add(f"visit {visit.number} {name}", getattr(visit, name))
        return digest.hexdigest()

    def __repr__(self) -> str:
        days = ", ".join(f"{visit.day:g}" for visit in self.visits)
        treatments = f"{len(self.schedule)} treatments"
        return f"Patient({self.id!r}, {self.organ}, visits on days {days}, {treatments}, {self.domain!r})"

    def _repr_html_(self) -> str:
        rows = []
        for visit in self.visits:
            volume = self.volume_of(visit)
            cells = (
                str(visit.number),
                f"{visit.day:g}",
                "–" if visit.adc is None else "yes",
                "–" if visit.region is None else f"{int(visit.region.sum())} voxels",
                "–" if volume is None else f"{volume:.3g}",
                "–" if visit.longest_diameter is None else f"{visit.longest_diameter:.3g}",
            )
            rows.append(cells)
        table = html_table(("visit", "day", "ADC", "region", "volume, cm³", "diameter, mm"), rows)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        agents = ", ".join(self.schedule.agents) or "no drugs"
        fractions = f", {len(self.schedule.fractions)} radiotherapy fractions" if self.schedule.fractions else ""
        return (
            f"<p><b>{html.escape(self.id)}</b>, {html.escape(self.organ)}; {html.escape(repr(self.domain))}; "
            f"{html.escape(agents)}{fractions}</p>{table}{notes}"
        )
