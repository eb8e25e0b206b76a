"""Looks for information that identifies a person in a patient folder.

It warns of what programs can see: names, birth dates and record numbers in texts, headers and file names, DICOM files,
and head scans whose face is not covered. It cannot prove that a folder is anonymous. Suspicious text is not repeated in
the findings, as these are passed on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from biomodel.findings import Finding, Severity, Step
from biomodel.imaging.nifti import UNREADABLE, length_units, open_nifti
from biomodel.patient import VIRTUAL
from biomodel.schema import PatientManifest
from biomodel.visit import MAPS

__all__ = ["identification"]

_KEYS = re.compile(r"(^|_)(name|surname|birth|born|dob|mrn|accession|address|phone|email|ssn|insurance)", re.IGNORECASE)
_SIGNS = (
    (re.compile(r"[A-Za-z]{2,}\^[A-Za-z]"), "a DICOM person name"),
    (re.compile(r"\b(patient|name|surname|birth|born|dob|mrn|accession)\b", re.IGNORECASE), "a label of personal data"),
    (re.compile(r"\b(19|20)\d\d[-./]?(0[1-9]|1[0-2])[-./]?(0[1-9]|[12]\d|3[01])\b"), "a date"),
    (re.compile(r"\b(0?[1-9]|[12]\d|3[01])[-./](0?[1-9]|1[0-2])[-./](19|20)\d\d\b"), "a date"),
    (re.compile(r"\d{7,}"), "a record number"),
    (re.compile(r"\b[A-Z][a-z]+,? [A-Z][a-z]+\b"), "a person's name"),
)
_NAME = re.compile(r"^[A-Z][a-z]+[ ,^]+[A-Z][a-z]+$")
#: Text fields of a NIfTI header in which converters leave text.
_HEADER_FIELDS = ("descrip", "aux_file", "intent_name", "db_name")
#: Descriptions that programs write of themselves.
_HARMLESS = re.compile(r"^(FSL|SPM|ITK|nibabel|TE=|AFNI|FreeSurfer|Python|none$|6\.0)", re.IGNORECASE)
#: Part of the voxels around the brain that may be bright before the face counts as not covered.
_FACE = 0.05


def identification(data: object, manifest: PatientManifest | None, folder: Path) -> Iterator[Finding]:
    """Yield what may identify a person.

    Parameters
    ----------
    data
        The manifest as it was read, whether or not it fits the schema.
    manifest
        The same, if it fits.
    folder
        The patient folder.
    """
    yield from _texts(data)
    if manifest is not None:
        yield from _record(manifest)
    named = _named_files(manifest)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file = path.relative_to(folder).as_posix()
        sign = _sign(path.name.split(".")[0].replace("_", " "))
        if sign and sign != "a label of personal data":
            yield _finding("warning", file, f"{file}: the file's name looks like {sign}.", "Rename the file.")
        if path.suffix.lower() in (".dcm", ".ima") or _is_dicom(path):
            message = f"{file}: a DICOM file; its header holds the name, birth date and accession number."
            yield _finding("warning", file, message, "Remove it from the folder once it is converted.")
        elif path.name.endswith((".nii", ".nii.gz")):
            yield from _header(path, file, file in named)
    if manifest is not None and "brain" in manifest.organ.casefold():
        yield from _faces(manifest, folder)


def _finding(severity: Severity, file: str, message: str, remedy: str, step: Step = "identification") -> Finding:
    return Finding(severity, step, file, message, remedy)


def _sign(text: str) -> str | None:
    return next((what for pattern, what in _SIGNS if pattern.search(text)), None)


def _texts(data: object, place: str = "") -> Iterator[Finding]:
    if isinstance(data, dict):
        for key, value in data.items():
            where = f"{place}, {key}" if place else str(key)
            if _KEYS.search(str(key)) and value is not None:
                message = f"patient.json: field '{where}' is meant for personal data."
                yield _finding("warning", "patient.json", message, "Remove it; a pseudonym in 'id' is enough.")
            elif key not in ("date", "baseline", "file", "mask", "schema", "tissues", "units"):
                yield from _texts(value, where)
    elif isinstance(data, list):
        for number, value in enumerate(data, start=1):
            yield from _texts(value, f"{place} {number}")
    elif isinstance(data, str):
        # Two capitalised words are a person in an id, but a place or a drug elsewhere.
        sign = _sign(data)
        if sign == "a person's name" and place != "id":
            sign = None
        if place == "id" and _NAME.match(data):
            sign = "a person's name"
        if sign:
            message = f"patient.json: the text of '{place}' looks like {sign}."
            yield _finding("warning", "patient.json", message, "Remove it, or use a pseudonym.")


def _record(manifest: PatientManifest) -> Iterator[Finding]:
    virtual = any(note.startswith(VIRTUAL) for note in manifest.notes)  # its dates are nobody's
    if not virtual and (manifest.baseline or any(visit.date for visit in manifest.visits)):
        message = "patient.json: real dates; together with other facts they can identify a person."
        yield _finding("info", "patient.json", message, "Give days from day 0 instead before you share the folder.")
    age = manifest.clinical.age if manifest.clinical else None
    if age is not None and age > 89:
        message = "patient.json: an age above 89 years, which is identifying (45 CFR 164.514(b)(2))."
        yield _finding("warning", "patient.json", message, "Give 90 for all ages above 89.")


def _named_files(manifest: PatientManifest | None) -> set[str]:
    if manifest is None:
        return set()
    files = set() if manifest.grid is None else {manifest.grid.mask, *manifest.grid.tissues.values()}
    for visit in manifest.visits:
        files |= {source.file for source in (getattr(visit, kind) for kind in MAPS) if source is not None}
    return files


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _header(path: Path, file: str, named: bool) -> Iterator[Finding]:
    try:
        header = open_nifti(path).header
    except UNREADABLE:
        return  # the second step tells about damaged files
    for name in _HEADER_FIELDS:
        if name not in header:
            continue
        text = bytes(header[name].tobytes()).split(b"\0")[0].decode("latin-1").strip()
        if not text:
            continue
        sign = _sign(text)
        if sign:
            message = f"{file}: header field '{name}' looks like {sign}."
            yield _finding("warning", file, message, "Clear the field and save the file again.")
        elif not _HARMLESS.match(text):
            message = f"{file}: header field '{name}' holds free text."
            yield _finding("info", file, message, "Read it, and clear it if it tells who the patient is.")
    for extension in header.extensions:
        code = extension.get_code()
        kind = "a DICOM header, with name and birth date" if code == 2 else f"an extension of kind {code}"
        message = f"{file}: the header carries {kind}."
        yield _finding("warning", file, message, "Remove the header's extensions and save the file again.")
    if not named:
        return
    if length_units(header) == "unknown":
        message = f"{file}: the header does not say its unit of length; it is read as mm, as NIfTI tools do."
        yield _finding("warning", file, message, "Set the header's xyzt_units to mm.", "geometry")
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        message = f"{file}: the header does not say how the image lies in the patient (sform and qform code 0)."
        yield _finding("warning", file, message, "Export it again with its orientation.", "geometry")


def _faces(manifest: PatientManifest, folder: Path) -> Iterator[Finding]:
    if manifest.grid is None:
        return
    try:
        inside = np.asarray(open_nifti(folder / manifest.grid.mask).dataobj) > 0
    except UNREADABLE:
        return
    for number, visit in enumerate(manifest.visits, start=1):
        if visit.adc is None:
            continue
        try:
            values = np.asarray(open_nifti(folder / visit.adc.file).dataobj, dtype=float)
        except UNREADABLE:
            continue
        if values.shape != inside.shape:
            continue
        around = np.isfinite(values) & (values != 0) & ~inside
        if around.sum() > _FACE * inside.sum():
            message = f"visit {number}, adc ({visit.adc.file}): signal outside the brain; the face may be recognisable."
            remedy = "Set voxels outside the brain's mask to 0, or remove the face."
            yield _finding("warning", visit.adc.file, message, remedy)
