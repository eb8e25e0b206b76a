"""A quality check of patient folders, before anything is computed from them.

Three steps: the schema of the manifest; the geometry and units of the images; the plausibility of what they hold.
Beside them the check looks for information that identifies a person. It reports all that it can reach and never raises.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
from pydantic import ValidationError

from biomodel import records
from biomodel.cohort import Cohort
from biomodel.domain import Domain
from biomodel.errors import InputError, TumorcastError, UnitError
from biomodel.findings import Finding, Findings, Step, from_error
from biomodel.identification import identification
from biomodel.imaging.nifti import read_image, resample
from biomodel.manifest import load_json, load_outcome, problems
from biomodel.patient import Patient
from biomodel.plausibility import plausibility
from biomodel.schedule import Schedule
from biomodel.schema import PatientManifest, VisitRecord
from biomodel.visit import MAPS, Visit, check_order, check_visit

__all__ = ["Finding", "Findings", "check", "resample"]

P = ParamSpec("P")
T = TypeVar("T")

# The region first: what the others say depends on it.
_MAPS = ("region", *(kind for kind in MAPS if kind != "region"))


@dataclass
class _Patient:
    """What could be read of one patient, and what was found on the way."""

    id: str = ""
    items: list[Finding] = field(default_factory=list)
    scans: dict[str, str] = field(default_factory=dict)
    """Place of each scan, by a digest of its voxels."""
    volumes: tuple[tuple[float, float], ...] = ()


def check(folder: str | os.PathLike[str]) -> Findings:
    """Check a patient folder, a cohort (``cohort.json``), or a folder of patient folders.

    Parameters
    ----------
    folder
        The folder, or the manifest inside it.

    Returns
    -------
    Findings
        Everything found; a folder that cannot be read at all gives an error among them.

    Examples
    --------
    >>> check("no such folder").ok
    False
    """
    path = Path(folder)
    if path.is_file():
        path = path.parent
    name = path.resolve().name or str(path)
    try:
        if not path.is_dir():
            missing = f"{path}: does not exist; expected a patient folder or a cohort."
            return Findings(name, (Finding("error", "schema", str(path), missing, "Check the path."),), 0)
        if (path / "patient.json").is_file():
            return Findings(name, tuple(_check_patient(path).items))
        items, patients = _check_cohort(path)
        return Findings(name, tuple(items), patients)
    except TumorcastError as error:
        return Findings(name, (from_error(error, "schema", name),), 0)
    except OSError as error:
        unread = f"{path}: cannot be read ({error.strerror or error})."
        return Findings(name, (Finding("error", "schema", name, unread, "Check its permissions."),), 0)


def _check_patient(folder: Path) -> _Patient:
    seen = _Patient()
    manifest_path = folder / "patient.json"
    data = _attempt(seen, "schema", manifest_path.name, load_json, manifest_path)
    if data is None:
        return seen
    manifest = _check_schema(seen, data, folder, manifest_path.name)
    if manifest is not None:
        seen.id = manifest.id
        _check_contents(seen, manifest, folder, manifest_path.name)
    try:
        seen.items.extend(identification(data, manifest, folder))
    except OSError as error:
        unread = f"{folder.name}: cannot be searched ({error.strerror or error})."
        seen.items.append(Finding("warning", "identification", folder.name, unread, "Check its permissions."))
    return seen


def _attempt(
    seen: _Patient, step: Step, file: str, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T | None:
    try:
        return action(*args, **kwargs)
    except TumorcastError as error:
        seen.items.append(from_error(error, step, file))
        return None


def _check_schema(seen: _Patient, data: object, folder: Path, name: str) -> PatientManifest | None:
    try:
        manifest = PatientManifest.model_validate(data)
    except ValidationError as error:
        for line in problems(error, PatientManifest, name):
            seen.items.append(from_error(InputError(line), "schema", name))
        return None
    _attempt(seen, "schema", "outcome.json", load_outcome, manifest, folder, name)
    return manifest


def _check_contents(seen: _Patient, manifest: PatientManifest, folder: Path, name: str) -> None:
    """Run the second and third step on as much as can be read."""
    settings = _attempt(seen, "geometry", name, records.cellularity_settings, manifest.cellularity, name)
    volumes = _attempt(seen, "geometry", name, records.volume_settings, manifest.volumes, name)
    domain = _attempt(seen, "geometry", _mask_of(manifest, name), records.read_domain, manifest, folder, name)
    visits = _read_visits(seen, manifest, domain, folder, name)
    schedule = _read_schedule(seen, manifest, name)
    files = {number: _files(record, name) for number, record in enumerate(manifest.visits, start=1)}
    if domain is not None and not any(item.severity == "error" for item in seen.items):
        # What is left to refuse is told here, so that a folder without errors can be read.
        _attempt(
            seen,
            "schema",
            name,
            Patient,
            id=manifest.id,
            organ=manifest.organ,
            domain=domain,
            visits=tuple(visits),
            schedule=schedule,
            cellularity=settings,
            volumes=volumes,
        )
    seen.items.extend(plausibility(manifest, domain, visits, schedule, settings, files, name))
    seen.items.extend(_duplicated_scans(seen, visits, files))
    measured = [(visit.day, visit.volume) for visit in visits if visit.volume is not None]
    seen.volumes = tuple(measured) if all(visit.adc is None for visit in visits) else ()


def _mask_of(manifest: PatientManifest, name: str) -> str:
    return name if manifest.grid is None else manifest.grid.mask


def _files(record: VisitRecord, name: str) -> dict[str, str]:
    return {kind: name if (source := getattr(record, kind)) is None else source.file for kind in _MAPS}


def _read_visits(
    seen: _Patient, manifest: PatientManifest, domain: Domain | None, folder: Path, name: str
) -> list[Visit]:
    baseline = _attempt(seen, "schema", name, records.baseline_of, manifest, name)
    visits: list[Visit] = []
    before: float | None = None
    for number, record in enumerate(manifest.visits, start=1):
        where = f"{name}: visit {number}"
        day = _attempt(seen, "schema", name, records.day_of, record, baseline, where)
        if day is None:
            continue
        if before is not None:
            _attempt(seen, "plausibility", name, check_order, before, day, number, name)
        before = day
        if domain is None:
            _read_alone(seen, record, folder, where)
            continue
        visit = _read_parts(seen, record, number, day, domain, manifest, folder, name)
        if visit is not None:
            visits.append(visit)
    return visits


def _read_alone(seen: _Patient, record: VisitRecord, folder: Path, where: str) -> None:
    # Without a grid the images cannot be compared, but damaged files can be told.
    for kind in _MAPS:
        source = getattr(record, kind)
        if source is not None:
            place = f"{where}, {kind} ({source.file})"
            _attempt(seen, "geometry", source.file, read_image, folder / source.file, place)


def _read_parts(
    seen: _Patient,
    record: VisitRecord,
    number: int,
    day: float,
    domain: Domain,
    manifest: PatientManifest,
    folder: Path,
    name: str,
) -> Visit | None:
    """Read map by map, so that one that cannot be used does not hide the next."""
    parts: dict[str, np.ndarray | None] = {}
    for kind in _MAPS:
        source = getattr(record, kind)
        if source is None:
            continue
        with_it = ("adc", "region") if kind == "adc_sd" else ()
        if any(getattr(record, other) is not None and parts[other] is None for other in with_it):
            continue  # what it belongs to cannot be used, which is said already
        others = {*_MAPS, "volume", "longest_diameter", "acquisition"} - {kind, *with_it}
        alone = record.model_copy(update=dict.fromkeys(others))
        part = _attempt(
            seen, "geometry", source.file, records.read_visit, alone, number, day, domain, manifest, folder, name
        )
        parts[kind] = None if part is None else getattr(part, kind)
    rest = record.model_copy(update={kind: None for kind in _MAPS})
    visit = _attempt(seen, "geometry", name, records.read_visit, rest, number, day, domain, manifest, folder, name)
    if visit is None:
        return None
    found = {kind: parts.get(kind) for kind in _MAPS}
    whole = replace(visit, adc=found["adc"], adc_sd=found["adc_sd"] if found["adc"] is not None else None,
                    region=found["region"], drug_map=found["drug_map"])  # fmt: skip
    if len(parts) > 1:
        files = _files(record, name)
        places = {kind: f"{name}: visit {number}, {kind} ({files[kind]})" for kind in _MAPS}
        _attempt(seen, "geometry", files["adc"], check_visit, whole, domain, places)
    return whole


def _read_schedule(seen: _Patient, manifest: PatientManifest, name: str) -> Schedule:
    """Read treatment by treatment, so that one that cannot be used does not hide the next."""
    schedule = Schedule()
    for number, record in enumerate(manifest.treatments, start=1):
        one = manifest.model_copy(update={"treatments": [record]})
        try:
            schedule = schedule + records.read_schedule(one, name)
        except InputError as error:
            told = type(error)(str(error).replace("treatment 1", f"treatment {number}", 1))
            step: Step = "geometry" if isinstance(error, UnitError) else "plausibility"
            seen.items.append(from_error(told, step, name))
    return schedule


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(repr(values.shape).encode() + np.ascontiguousarray(values).tobytes()).hexdigest()


def _duplicated_scans(seen: _Patient, visits: list[Visit], files: dict[int, dict[str, str]]) -> Iterator[Finding]:
    regions: dict[str, int] = {}
    for visit in visits:
        if visit.adc is not None:
            digest = _digest(visit.adc)
            place = f"visit {visit.number}"
            if digest in seen.scans:
                same = f"{place} and {seen.scans[digest]} hold the same ADC map, voxel by voxel."
                remedy = "Scans of different days never agree exactly: put the right file there."
                yield Finding("error", "plausibility", files[visit.number]["adc"], same, remedy)
            seen.scans.setdefault(digest, place)
        if visit.region is not None:
            digest = _digest(visit.region)
            if digest in regions:
                same = f"Visit {visit.number} and visit {regions[digest]} have the same region, voxel by voxel."
                remedy = "Check that the region was drawn on this visit's scan."
                yield Finding("warning", "plausibility", files[visit.number]["region"], same, remedy)
            regions.setdefault(digest, visit.number)


def _check_cohort(folder: Path) -> tuple[list[Finding], int]:
    items: list[Finding] = []
    try:
        members = Cohort.read(folder).members
    except TumorcastError as error:
        items.append(from_error(error, "schema", "cohort.json" if (folder / "cohort.json").is_file() else folder.name))
        members = tuple(sorted(found.parent.name for found in folder.glob("*/patient.json")))
    ids: dict[str, str] = {}
    scans: dict[str, str] = {}
    courses: dict[tuple[tuple[float, float], ...], str] = {}
    for member in members:
        seen = _check_patient(folder / member)
        items.extend(replace(item, file=f"{member}/{item.file}") for item in seen.items)
        file = f"{member}/patient.json"
        key = seen.id.strip().casefold()
        if key and key in ids:
            same = f"{member} and {ids[key]} have the same id '{seen.id}'."
            items.append(Finding("error", "plausibility", file, same, "Give each patient one folder and one id."))
        ids.setdefault(key, member)
        for digest, place in seen.scans.items():
            if digest in scans:
                same = f"{place} of {member} and {scans[digest]} hold the same ADC map, voxel by voxel."
                remedy = "The same person seems to be in the cohort twice: keep one of them, in one split."
                items.append(Finding("error", "plausibility", file, same, remedy))
            scans.setdefault(digest, f"{place} of {member}")
        if len(seen.volumes) > 1:
            if seen.volumes in courses:
                same = f"{member} and {courses[seen.volumes]} have the same days and volumes."
                remedy = "Check whether the same person is in the cohort twice."
                items.append(Finding("warning", "plausibility", file, same, remedy))
            courses.setdefault(seen.volumes, member)
    return items, len(members)
