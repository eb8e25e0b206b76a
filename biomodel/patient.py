"""A patient: what was measured at each visit, on which domain, under which treatments."""

from __future__ import annotations

import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from types import MappingProxyType

import numpy as np

from biomodel.domain import Domain, frozen_array
from biomodel.errors import GeometryError, InputError
from biomodel.schedule import LARGEST_DAY, Schedule

__all__ = ["CellularitySettings", "Patient", "Visit", "VolumeSettings"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class CellularitySettings:
    """How an ADC map is turned into cell fractions, and how noisy it is.

    Parameters
    ----------
    adc_w
        ADC of free water at body temperature, mm²/s. No default: 3.0e-3 is used for breast tumours in Jarrett et al.
        2021 (10.1038/s41596-021-00617-y) and its predecessors; a phantom or the scanner's protocol may say otherwise.
    adc_min
        ADC at which a voxel is full of cells, mm²/s. No default: often the smallest ADC inside the tumour, over all
        patients of a study, so that it does not depend on one patient's noise.
    packing
        Largest fraction of a voxel's volume that spherical cells can fill: 0.7405, the densest packing of spheres.
    cell_radius_mm
        Radius of a tumour cell, mm: 0.010 as in Jarrett et al. 2021 (10.1038/s41596-021-00617-y).
    repeatability_cv
        Within-subject coefficient of variation of the mean ADC of a tumour between repeated scans: 0.05, between the 4.8 %
        of the ACRIN 6698 trial (Newitt et al. 2019, 10.1002/jmri.26539) and the 5.4 % of Sorace et al. 2018
        (10.1002/jmri.26011) in the breast.
    voxel_cv
        Further coefficient of variation of a single voxel's ADC, independent between voxels.
    visible_fraction
        Cell fraction from which a voxel counts as tumour in volumes and diameters.
    """

    adc_w: float
    adc_min: float
    packing: float = 0.7405
    cell_radius_mm: float = 0.010
    repeatability_cv: float = 0.05
    voxel_cv: float = 0.05
    visible_fraction: float = 0.15

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            _require(good, f"cellularity: {item.name} is {value!r}; expected a number.")
            object.__setattr__(self, item.name, float(value))
        _require(
            0 <= self.adc_min < self.adc_w,
            f"cellularity: adc_min {self.adc_min:g} and adc_w {self.adc_w:g} mm²/s; expected 0 ≤ adc_min < adc_w. "
            "Check both values and their units.",
        )
        _require(
            1e-3 <= self.adc_w <= 5e-3,
            f"cellularity: adc_w {self.adc_w:g} mm²/s; expected about 3e-3 (free water), at least 1e-3 and at most 5e-3. "
            "Check the value and its units.",
        )
        _require(0 < self.packing <= 1, f"cellularity: packing {self.packing:g}; expected above 0 and at most 1.")
        _require(
            1e-3 <= self.cell_radius_mm <= 0.1,
            f"cellularity: cell_radius {self.cell_radius_mm:g} mm; expected 0.001 to 0.1 mm. Check its units.",
        )
        for name in ("repeatability_cv", "voxel_cv"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"cellularity: {name} {value:g}; expected a fraction from 0 to below 1.")
        _require(
            0 < self.visible_fraction < 1,
            f"cellularity: visible_fraction {self.visible_fraction:g}; expected above 0 and below 1.",
        )

    def carrying_capacity(self, voxel_volume: float) -> float:
        """Return θ, the number of cells in a full voxel of `voxel_volume` mm³: packing · V / (4/3 π r³)."""
        return self.packing * voxel_volume / (4.0 / 3.0 * math.pi * self.cell_radius_mm**3)


@dataclass(frozen=True)
class VolumeSettings:
    """How noisy a measured tumour volume is.

    Parameters
    ----------
    cv
        Coefficient of variation of a repeated measurement. 0.2 is a working default, not a published repeatability.
    floor
        Volume under which nothing is seen, cm³. 0.05 is a working default (about a sphere of 4.6 mm).
    """

    cv: float = 0.2
    floor: float = 0.05

    def __post_init__(self) -> None:
        for name in ("cv", "floor"):
            value = getattr(self, name)
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            _require(good, f"volumes: {name} is {value!r}; expected a number.")
            object.__setattr__(self, name, float(value))
        _require(0 < self.cv < 2, f"volumes: cv {self.cv:g}; expected a fraction above 0 and below 2.")
        _require(0 <= self.floor <= 100, f"volumes: floor {self.floor:g} cm³; expected 0 to 100 cm³. Check its units.")


@dataclass(frozen=True, eq=False)
class Visit:
    """What was measured on one day.

    Parameters
    ----------
    number
        From 1, in the order of days.
    day
        Days from the patient's day 0.
    adc
        Apparent diffusion coefficient, mm²/s (z, y, x).
    region
        bool (z, y, x), true inside the tumour.
    volume
        Tumour volume, cm³. 0 says that no tumour was seen.
    longest_diameter
        mm.
    drug_map
        Relative supply of drug, from 0 up (z, y, x).
    acquisition
        How the scan was made: ``vendor``, ``field_strength`` (T), ``institution``, ``sequence``.
    """

    number: int
    day: float
    adc: np.ndarray | None = None
    region: np.ndarray | None = None
    volume: float | None = None
    longest_diameter: float | None = None
    drug_map: np.ndarray | None = None
    acquisition: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(
            isinstance(self.number, int) and self.number >= 1,
            f"visit: number {self.number!r}; expected a whole number from 1.",
        )
        where = f"visit {self.number}"
        day = float(self.day)
        _require(
            math.isfinite(day) and abs(day) <= LARGEST_DAY,
            f"{where}: day {day:g}; expected a number of days from day 0. Check the day or the date.",
        )
        object.__setattr__(self, "day", day)
        for name, largest, units in (("volume", 2e4, "cm³"), ("longest_diameter", 1e3, "mm")):
            value = getattr(self, name)
            if value is None:
                continue
            value = float(value)
            _require(
                math.isfinite(value) and 0 <= value <= largest,
                f"{where}, {name}: {value:g} {units}; expected 0 to {largest:g} {units}. Check the value and its units.",
            )
            object.__setattr__(self, name, value)
        for name in ("adc", "drug_map"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, frozen_array(getattr(self, name), float))
        if self.region is not None:
            region = np.asarray(self.region)
            _require(
                region.dtype == bool or bool(np.isin(region, (0, 1)).all()),
                f"{where}, region: values other than 0 and 1; expected a mask. Save the tumour's label alone as 0 and 1.",
            )
            object.__setattr__(self, "region", frozen_array(region, bool))
        object.__setattr__(self, "acquisition", MappingProxyType(dict(self.acquisition)))


def check_visit(visit: Visit, domain: Domain, where: Mapping[str, str]) -> None:
    """Check the maps of `visit` against the `domain`.

    Parameters
    ----------
    where
        Place to be named in a message, for ``adc``, ``region`` and ``drug_map``.

    Raises
    ------
    GeometryError
        If a map has another shape than the domain.
    InputError
        If voxels are NaN or infinite inside the mask, or the region is empty or leaves the mask.
    """
    for name in ("adc", "region", "drug_map"):
        values = getattr(visit, name)
        if values is not None and values.shape != domain.shape:
            raise GeometryError(
                f"{where[name]}: {' × '.join(map(str, values.shape))} voxels (z, y, x); expected "
                f"{' × '.join(map(str, domain.shape))} like the mask. Bring it to the mask's grid with "
                "'tumorcast resample IMAGE --like MASK --out FILE'."
            )
    for name in ("adc", "drug_map"):
        values = getattr(visit, name)
        if values is None:
            continue
        bad = ~np.isfinite(values) & domain.mask
        if bad.any():
            inside = f", {int((bad & visit.region).sum())} of them in the region" if visit.region is not None else ""
            raise InputError(
                f"{where[name]}: {int(bad.sum())} voxels are NaN or infinite inside the mask{inside}; expected numbers "
                "there. Repair the map, or leave these voxels out of the mask."
            )
        if values[domain.mask].min() < 0 and name == "drug_map":
            raise InputError(
                f"{where[name]}: smallest value {values[domain.mask].min():.4g}; expected a supply from 0 up. "
                "Repair the map."
            )
    if visit.region is not None:
        if not visit.region.any():
            raise InputError(
                f"{where['region']}: the region is empty; expected at least one voxel. If no tumour was seen at this "
                "visit, leave 'region' out and give 'volume': {'value': 0, 'units': 'cm^3'}."
            )
        outside = int((visit.region & ~domain.mask).sum())
        if outside:
            raise InputError(
                f"{where['region']}: {outside} of {int(visit.region.sum())} voxels lie outside the mask; expected none. "
                "Enlarge the mask or cut the region."
            )


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
        Remarks that a forecast of this patient and its report show.

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
        _require(isinstance(self.id, str) and bool(self.id.strip()), "patient: the id is empty; expected a pseudonym.")
        visits = tuple(self.visits)
        _require(bool(visits), f"{where}: no visits; expected at least one.")
        for expected, visit in enumerate(visits, start=1):
            _require(
                visit.number == expected,
                f"{where}: visit {expected} in order carries number {visit.number}; expected {expected}. Number visits "
                "from 1.",
            )
            if expected > 1:
                check_order(visits[expected - 2].day, visit.day, expected, where)
            place = f"{where}: visit {expected}"
            check_visit(visit, self.domain, {name: f"{place}, {name}" for name in ("adc", "region", "drug_map")})
            _require(
                visit.adc is None or self.cellularity is not None,
                f"{place}, adc: no 'cellularity' settings; expected adc_w and adc_min, which have no default. Add "
                "'cellularity' to the manifest.",
            )
        object.__setattr__(self, "visits", visits)
        object.__setattr__(self, "clinical", MappingProxyType(dict(self.clinical)))
        if self.outcome is not None:
            object.__setattr__(self, "outcome", MappingProxyType(dict(self.outcome)))
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
        _require(
            len(days) == len(sizes) == len(spans),
            f"patient {id}: {len(days)} days, {len(sizes)} volumes and {len(spans)} diameters; expected as many of each.",
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

        Later visits, everything derived from them, the outcome, all notes and every dose marked ``given`` after that day
        are dropped; ``planned`` doses stay. A record in which nothing is marked planned keeps its later doses, as there
        is no other knowledge of the plan, and carries a note that says so. A dose on the day of the visit is kept.

        Raises
        ------
        InputError
            If there is no such visit.
        """
        last = self.visit(visit)
        later = self.schedule.given_after(last.day)
        notes: tuple[str, ...] = ()
        schedule = self.schedule
        if later and schedule.given_only:
            noun = "treatment" if later == 1 else "treatments"
            note = (
                f"The record marks no treatment as planned, so {later} {noun} recorded as given after day "
                f"{last.day:g} stay in the schedule: the forecast knows what was really given."
            )
            notes = (note,)
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
            replace(visit, adc=None, region=None, drug_map=None, volume=self.volume_of(visit)) for visit in self.visits
        )
        return replace(self, domain=Domain.point(), visits=visits, cellularity=None, volumes=settings)

    def volume_of(self, visit: Visit) -> float | None:
        """Return the tumour volume of `visit` in cm³: the measured one, or else that of its region; None without both."""
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
            for name in ("adc", "region", "drug_map"):
                add(f"visit {visit.number} {name}", getattr(visit, name))
        return digest.hexdigest()

    def __repr__(self) -> str:
        days = ", ".join(f"{visit.day:g}" for visit in self.visits)
        return f"Patient({self.id!r}, {self.organ}, visits on days {days}, {len(self.schedule)} treatments, {self.domain!r})"

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
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
        head = "".join(f"<th>{name}</th>" for name in ("visit", "day", "ADC", "region", "volume, cm³", "diameter, mm"))
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        agents = ", ".join(self.schedule.agents) or "no drugs"
        fractions = f", {len(self.schedule.fractions)} radiotherapy fractions" if self.schedule.fractions else ""
        return (
            f"<p><b>{html.escape(self.id)}</b>, {html.escape(self.organ)}; {html.escape(repr(self.domain))}; "
            f"{html.escape(agents)}{fractions}</p><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
            f"</table>{notes}"
        )


def check_order(before: float, day: float, number: int, where: str) -> None:
    """Refuse a visit that is not later than the one before it."""
    if day <= before:
        what = "the same day as" if day == before else "before"
        raise InputError(
            f"{where}: visit {number} is on day {day:g}, {what} visit {number - 1} (day {before:g}); expected growing "
            "days. Correct the days or dates, or list the visits in order."
        )
