"""Patient folders: from ``patient.json`` and its NIfTI files to a :class:`~biomodel.patient.Patient`, and back."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import numpy as np

from biomodel.domain import Domain
from biomodel.errors import InputError, TumorcastError
from biomodel.files import atomic_folder
from biomodel.imaging.nifti import Image, read_image, write_image
from biomodel.imaging.series_train import Train, TrainTiming
from biomodel.manifest import find_manifest, load_outcome, load_patient, validate
from biomodel.patient import Patient
from biomodel.schedule import Dose, Fraction, Ongoing, Schedule
from biomodel.schema import (
    Acquisition,
    Cellularity,
    Clinical,
    InversionTrain,
    Map,
    Outcome,
    PatientManifest,
    Quantity,
    StudyManifest,
    Timed,
    VisitRecord,
    Volumes,
)
from biomodel.units import convert
from biomodel.visit import MAPS, CellularitySettings, Visit, VolumeSettings, check_order, check_visit

#: Units of the maps in files that we write; a region has none.
UNITS = {"adc": "mm^2/s", "adc_sd": "mm^2/s", "drug_map": "1"}

__all__ = ["read_patient", "write_patient"]


def read_patient(path: str | os.PathLike[str]) -> Patient:
    """Read a patient; see :meth:`biomodel.patient.Patient.read`."""
    manifest_path = find_manifest(path)
    manifest = load_patient(manifest_path)
    folder, name = manifest_path.parent, manifest_path.name
    days = visit_days(manifest, name)
    settings = cellularity_settings(manifest.cellularity, name)
    domain = read_domain(manifest, folder, name)
    visits = tuple(
        read_visit(record, number, day, domain, manifest, folder, name)
        for number, (record, day) in enumerate(zip(manifest.visits, days, strict=True), start=1)
    )
    outcome = load_outcome(manifest, folder, name)
    with_name = f"{name}: patient {manifest.id}"
    try:
        return Patient(
            id=manifest.id,
            organ=manifest.organ,
            domain=domain,
            visits=visits,
            schedule=read_schedule(manifest, name),
            cellularity=settings,
            volumes=volume_settings(manifest.volumes, name),
            clinical=_held(manifest.clinical),
            outcome=None if outcome is None else _held(outcome),
            baseline=baseline_of(manifest, name),
            notes=tuple(manifest.notes),
        )
    except TumorcastError as error:
        raise type(error)(str(error).replace(f"patient {manifest.id}", with_name, 1)) from None


def _held(record: Clinical | Outcome | Acquisition | None) -> dict[str, object]:
    return {} if record is None else record.model_dump(exclude_none=True, exclude={"schema_"})


def baseline_of(manifest: PatientManifest | StudyManifest, name: str) -> str | None:
    """Return the date of day 0: the stated one, or the first visit's.

    Raises
    ------
    InputError
        If it is no date.
    """
    baseline = manifest.baseline or manifest.visits[0].date
    if baseline is not None:
        _moment(baseline, f"{name}: baseline")
    return baseline


def _moment(text: str, where: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(
            f"{where}: date '{text}' ({error}); expected a real date like 2024-03-01. Correct it."
        ) from None


def day_of(record: Timed, baseline: str | None, where: str) -> float:
    """Return the day of an entry, counted from the baseline if it carries a date.

    Raises
    ------
    InputError
        If a date is none, or there is no baseline to count from.
    """
    if record.day is not None:
        return record.day
    if record.date is None or baseline is None:
        raise InputError(
            f"{where}: date '{record.date}', but the patient has no 'baseline'; expected the date of day 0. Add "
            "'baseline' to the manifest, or give days."
        )
    return (_moment(record.date, where) - _moment(baseline, f"{where}: baseline")).total_seconds() / 86400.0


def visit_days(manifest: PatientManifest | StudyManifest, name: str) -> list[float]:
    """Return the day of each visit.

    Raises
    ------
    InputError
        If days do not grow from visit to visit.
    """
    baseline = baseline_of(manifest, name)
    days = [day_of(record, baseline, f"{name}: visit {n}") for n, record in enumerate(manifest.visits, start=1)]
    for number in range(2, len(days) + 1):
        check_order(days[number - 2], days[number - 1], number, name)
    return days


def _quantity(quantity: Quantity, to: str, where: str) -> float:
    return convert(quantity.value, quantity.units, to, where)


def cellularity_settings(record: Cellularity | None, name: str) -> CellularitySettings | None:
    """Return the settings in internal units."""
    if record is None:
        return None
    where = f"{name}: cellularity"
    adc_w = _quantity(record.adc_w, "mm^2/s", f"{where}, adc_w")
    adc_min = _quantity(record.adc_min, "mm^2/s", f"{where}, adc_min")
    radius = _quantity(record.cell_radius, "mm", f"{where}, cell_radius")
    lengths = {f"{n}_mm": _quantity(getattr(record, n), "mm", f"{where}, {n}")
               for n in ("noise_length", "edge_sd", "region_shift_sd", "misalignment_sd")}  # fmt: skip
    try:
        return CellularitySettings(
            adc_w=adc_w,
            adc_min=adc_min,
            packing=record.packing,
            cell_radius_mm=radius,
            repeatability_cv=record.repeatability_cv,
            voxel_cv=record.voxel_cv,
            visible_fraction=record.visible_fraction,
            **lengths,
        )
    except InputError as error:
        raise type(error)(f"{name}: {error}") from None


def train_timing(record: InversionTrain | None, where: str) -> TrainTiming | None:
    """Return the timing of inversion-prepared series in internal units."""
    if record is None:
        return None
    where = f"{where}, inversion_train"
    times = {
        name: None if value is None else _quantity(value, "s", f"{where}, {name}")
        for name, value in (("cycle", record.cycle), ("delay", record.delay))
    }
    spacing = _quantity(record.spacing, "s", f"{where}, spacing")
    try:
        train = Train(record.pulses, spacing, record.centre)
        return TrainTiming(train, times["cycle"], times["delay"], record.inversion_time_to == "first pulse")
    except InputError as error:
        raise type(error)(f"{where}: {error}") from None


def volume_settings(record: Volumes | None, name: str) -> VolumeSettings | None:
    """Return the settings in internal units."""
    if record is None:
        return None
    floor = _quantity(record.floor, "cm^3", f"{name}: volumes, floor")
    try:
        return VolumeSettings(cv=record.cv, floor=floor, df=record.df)
    except InputError as error:
        raise type(error)(f"{name}: {error}") from None


def read_schedule(manifest: PatientManifest | StudyManifest, name: str) -> Schedule:
    """Return the treatments in internal units.

    Raises
    ------
    InputError
        If a dose is negative or absurd, or a date is none.
    """
    baseline = baseline_of(manifest, name)
    doses: list[Dose] = []
    fractions: list[Fraction] = []
    ongoing: list[Ongoing] = []
    for number, record in enumerate(manifest.treatments, start=1):
        where = f"{name}: treatment {number}"
        day = day_of(record, baseline, where)
        try:
            if record.kind == "chemotherapy":
                doses.append(Dose(day, record.agent, record.dose.value, record.dose.units, record.status))
            elif record.kind == "radiotherapy":
                gray = _quantity(record.dose, "Gy", "dose")
                fractions.append(Fraction(day, gray, record.status))
            else:
                ongoing.append(Ongoing(day, record.agent, record.status))
        except InputError as error:
            raise type(error)(f"{where}, {error}") from None
    try:
        return Schedule(tuple(doses), tuple(fractions), tuple(ongoing))
    except InputError as error:
        raise type(error)(f"{name}: {error}") from None


def _image(file: str, folder: Path, where: str, like: Image | Domain | None, like_name: str = "MASK") -> Image:
    if Path(file).is_absolute():
        raise InputError(
            f"{where}: file '{file}' is an absolute path; expected one relative to the manifest's folder. Move the "
            "file there, so that the folder can be moved as a whole."
        )
    return read_image(folder / file, f"{where} ({file})", like, like_name)


def read_mask(image: Image, where: str) -> np.ndarray:
    """Return the values of a mask as booleans.

    Raises
    ------
    InputError
        If values are other than 0 and 1.
    """
    odd = ~np.isin(image.values, (0, 1))
    if odd.any():
        some = ", ".join(f"{value:g}" for value in np.unique(image.values[odd])[:4])
        raise InputError(
            f"{where}: values {some} in {int(odd.sum())} voxels; expected a mask of 0 and 1 alone. Save the wanted "
            "label as 1 and all else as 0."
        )
    return image.values == 1


def read_domain(manifest: PatientManifest, folder: Path, name: str) -> Domain:
    """Return the domain: the mask's whole grid with the tissues, or the well-mixed point if there is no grid.

    Raises
    ------
    InputError
        If images are named but no grid, or a file cannot be used.
    """
    if manifest.grid is None:
        for number, record in enumerate(manifest.visits, start=1):
            for kind in MAPS:
                if getattr(record, kind) is not None:
                    raise InputError(
                        f"{name}: visit {number}, {kind}: an image, but the manifest has no 'grid'; expected the mask "
                        "of the organ. Add 'grid': {'mask': FILE}."
                    )
        return Domain.point()
    grid = manifest.grid
    where = f"{name}: grid, mask"
    image = _image(grid.mask, folder, where, None)
    mask = read_mask(image, f"{where} ({grid.mask})")
    if not mask.any():
        raise InputError(f"{where} ({grid.mask}): the mask is empty; expected the organ as 1. Check the file.")
    tissues = {}
    for tissue, file in grid.tissues.items():
        values = _image(file, folder, f"{name}: grid, tissue {tissue}", image, grid.mask).values
        tissues[tissue] = _cleared(values, mask)
    try:
        return Domain(mask=mask, spacing=image.spacing, affine=image.affine, tissues=tissues)
    except InputError as error:
        raise type(error)(str(error).replace("Domain:", f"{name}: grid,", 1)) from None


def _cleared(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    # Maps are often undefined outside the organ; nothing is read there, and a NaN would spread through sums.
    return np.where(mask | np.isfinite(values), values, 0.0)


def _map(record: Map, units: str, domain: Domain, folder: Path, where: str, like_name: str) -> np.ndarray:
    # Units first: a wrong one is told without reading the file.
    convert(1.0, record.units, units, where)
    values = _image(record.file, folder, where, domain, like_name).values
    return _cleared(convert(values, record.units, units, where), domain.mask)


def read_visit(
    record: VisitRecord,
    number: int,
    day: float,
    domain: Domain,
    manifest: PatientManifest,
    folder: Path,
    name: str,
) -> Visit:
    """Return one visit, its maps checked against the domain.

    Raises
    ------
    InputError
        If a file or a value cannot be used.
    """
    where = f"{name}: visit {number}"
    like_name = manifest.grid.mask if manifest.grid is not None else "MASK"
    places = {}
    for kind in MAPS:
        source = getattr(record, kind)
        places[kind] = f"{where}, {kind}" + ("" if source is None else f" ({source.file})")
    if record.adc is not None and manifest.cellularity is None:
        raise InputError(
            f"{where}, adc: the manifest has no 'cellularity'; expected adc_w and adc_min, which have no default. Add "
            "'cellularity'."
        )
    region = volume = diameter = None
    maps = {}
    for kind, units in UNITS.items():
        source = getattr(record, kind)
        maps[kind] = None if source is None else _map(source, units, domain, folder, f"{where}, {kind}", like_name)
    if record.region is not None:
        image = _image(record.region.file, folder, f"{where}, region", domain, like_name)
        region = read_mask(image, places["region"])
    if record.volume is not None:
        volume = _quantity(record.volume, "cm^3", f"{where}, volume")
    if record.longest_diameter is not None:
        diameter = _quantity(record.longest_diameter, "mm", f"{where}, longest_diameter")
    acquisition = _held(record.acquisition)
    if record.acquisition is not None and record.acquisition.field_strength is not None:
        acquisition["field_strength"] = _quantity(
            record.acquisition.field_strength, "T", f"{where}, acquisition, field_strength"
        )
    try:
        visit = Visit(number, day, region=region, volume=volume, longest_diameter=diameter, acquisition=acquisition,
                      **maps)  # fmt: skip
    except InputError as error:
        raise type(error)(f"{name}: {error}") from None
    check_visit(visit, domain, places)
    return visit


def write_patient(patient: Patient, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a patient folder; see :meth:`biomodel.patient.Patient.write`."""
    images: dict[str, np.ndarray] = {}
    data = _manifest(patient, images)
    validate(PatientManifest, data, f"patient {patient.id}")
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    with atomic_folder(folder, overwrite=overwrite, marker="patient.json") as temporary:
        for file, values in images.items():
            write_image(temporary / file, values, patient.domain.affine)
        (temporary / "patient.json").write_text(text, encoding="utf-8")


def _written(value: float, units: str) -> dict[str, object]:
    return {"value": value, "units": units}


def _manifest(patient: Patient, images: dict[str, np.ndarray]) -> dict[str, object]:
    data: dict[str, object] = {"schema": "tumorcast/patient/v1", "id": patient.id, "organ": patient.organ}
    if patient.baseline is not None:
        data["baseline"] = patient.baseline
    if not patient.domain.well_mixed:
        images["mask.nii.gz"] = patient.domain.mask
        tissues = {}
        for tissue, fraction in patient.domain.tissues.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", tissue):
                raise InputError(
                    f"patient {patient.id}: tissue '{tissue}'; expected a name of letters, digits and underscores, as "
                    "it names a file and a parameter. Rename it."
                )
            tissues[tissue] = f"tissue_{tissue}.nii.gz"
            images[tissues[tissue]] = fraction
        data["grid"] = {"mask": "mask.nii.gz", **({"tissues": tissues} if tissues else {})}
    if patient.cellularity is not None:
        settings = patient.cellularity
        stated: dict[str, object] = {
            "adc_w": _written(settings.adc_w, "mm^2/s"),
            "adc_min": _written(settings.adc_min, "mm^2/s"),
            "packing": settings.packing,
            "cell_radius": _written(settings.cell_radius_mm, "mm"),
            "repeatability_cv": settings.repeatability_cv,
            "voxel_cv": settings.voxel_cv,
            "visible_fraction": settings.visible_fraction,
        }
        # Written only where something is stated, so that records without stay as they were.
        for name in ("noise_length", "edge_sd", "region_shift_sd", "misalignment_sd"):
            if value := getattr(settings, f"{name}_mm"):
                stated[name] = _written(value, "mm")
        data["cellularity"] = stated
    if patient.volumes is not None:
        noise = patient.volumes
        data["volumes"] = {"cv": noise.cv, "floor": _written(noise.floor, "cm^3"), "df": noise.df}
    data["visits"] = [_visit_data(visit, images) for visit in patient.visits]
    treatments = _treatment_data(patient.schedule)
    if treatments:
        data["treatments"] = treatments
    if patient.clinical:
        data["clinical"] = dict(patient.clinical)
    if patient.outcome is not None:
        data["outcome"] = dict(patient.outcome)
    if patient.notes:
        data["notes"] = list(patient.notes)
    return data


def _visit_data(visit: Visit, images: dict[str, np.ndarray]) -> dict[str, object]:
    entry: dict[str, object] = {"day": visit.day}
    for kind in MAPS:
        values = getattr(visit, kind)
        if values is not None:
            file = f"visit{visit.number}_{kind}.nii.gz"
            images[file] = values
            entry[kind] = {"file": file, "units": UNITS[kind]} if kind in UNITS else {"file": file}
    if visit.volume is not None:
        entry["volume"] = _written(visit.volume, "cm^3")
    if visit.longest_diameter is not None:
        entry["longest_diameter"] = _written(visit.longest_diameter, "mm")
    if visit.acquisition:
        entry["acquisition"] = _acquisition_data(visit.acquisition)
    return entry


def _acquisition_data(acquisition: Mapping[str, object]) -> dict[str, object]:
    data = dict(acquisition)
    strength = data.get("field_strength")
    if isinstance(strength, (int, float)):
        data["field_strength"] = _written(float(strength), "T")
    return data


def _treatment_data(schedule: Schedule) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = []
    for dose in schedule.doses:
        amount = _written(dose.amount, dose.units)
        entry = {"kind": "chemotherapy", "agent": dose.agent, "day": dose.day, "dose": amount, "status": dose.status}
        entries.append(entry)
    for fraction in schedule.fractions:
        amount = _written(fraction.gray, "Gy")
        entries.append({"kind": "radiotherapy", "day": fraction.day, "dose": amount, "status": fraction.status})
    for one in schedule.ongoing:
        entries.append({"kind": "ongoing", "agent": one.agent, "day": one.start_day, "status": one.status})
    # Python's sort is stable, so entries of one day keep their order.
    return sorted(entries, key=lambda entry: float(entry["day"]))  # type: ignore[arg-type]
