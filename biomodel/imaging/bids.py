"""NIfTI files with JSON sidecars in, named and described as BIDS has it (bids-specification.readthedocs.io).

What BIDS fixes: ``_dwi`` with ``.bval`` and ``.bvec``; ``_VFA``, one file per ``flip-``; ``_IRT1``, one file per
``inv-``; ``_TB1map``; ``_T1w``, ``_T2w`` and other anatomy. It has no name for dynamic contrast-enhanced series;
``_DCE`` is what tools use, and is read whatever its case. Of the two repetition times, ``RepetitionTimeExcitation`` is
the one that signal equations mean; converters write it as ``RepetitionTime``, which elsewhere is the time between
volumes. ``_IRT1`` is read by one pulse, or by a train where ``NumberShots`` says so (a number, or [before, after] the
centre of k-space, as for MP2RAGE): then ``RepetitionTimeExcitation`` is from pulse to pulse and
``RepetitionTimePreparation`` from inversion to inversion.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from biomodel.errors import GeometryError, InputError, TumorcastError, UnitError
from biomodel.findings import Finding, Step, from_error
from biomodel.imaging.deidentify import (
    days_from_first,
    dropped_fields,
    dropped_finding,
    known_agent,
    known_vendor,
    plain_code,
)
from biomodel.imaging.nifti import UNREADABLE, length_units, open_nifti
from biomodel.imaging.series import Intake, Kind, Series, join
from biomodel.imaging.series_grid import Axis, canonical_array, canonical_axis
from biomodel.imaging.series_train import Train
from biomodel.units import factor

__all__ = ["read_bids", "read_series"]

_SUFFIXES = {
    "dce": Kind.DCE,
    "dwi": Kind.DWI,
    "vfa": Kind.VFA,
    "irt1": Kind.INVERSION,
    "tb1map": Kind.B1,
    "t1w": Kind.ANATOMY,
    "t2w": Kind.ANATOMY,
    "pdw": Kind.ANATOMY,
    "flair": Kind.ANATOMY,
    "t2starw": Kind.ANATOMY,
}
#: The entity in a name that numbers the files of one series.
_NUMBERED = {Kind.VFA: "flip", Kind.INVERSION: "inv"}
_SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}
_MILLIMETRES = {"mm": 1.0, "meter": 1e3, "micron": 1e-3, "unknown": 1.0}
#: A repetition time this close to the time between volumes is that time, not the one between excitations.
SAME_INTERVAL = 1e-2


@dataclass(frozen=True)
class _File:
    path: Path
    entities: tuple[tuple[str, str], ...]
    suffix: str

    @property
    def stem(self) -> str:
        return _stem(self.path)


def _stem(path: Path) -> str:
    return re.sub(r"\.(nii\.gz|nii|json|bval|bvec)$", "", path.name)


def _parse(path: Path) -> _File:
    *pairs, suffix = _stem(path).split("_")
    entities = tuple((key, value) for key, _, value in (pair.partition("-") for pair in pairs) if value)
    return _File(path, entities, suffix)


def read_bids(
    folder: str | os.PathLike[str],
    *,
    first_visit: date | None = None,
    shift: float = 0.0,
    scratch: str | os.PathLike[str] | None = None,
) -> Intake:
    """Read all series of a BIDS folder: a data set, a subject, a session or any part of them.

    Parameters
    ----------
    folder
        Sidecars above a file count too, down from this folder (BIDS' inheritance principle).
    first_visit, shift
        Day 0 and days added, where ``_scans.tsv`` gives times of acquisition; see
        :func:`~biomodel.imaging.deidentify.days_from_first`.
    scratch
        Folder for memory-mapped voxels; its files belong to the series and are left there.

    Returns
    -------
    Intake
        The series, an error finding for each that was refused, and the names of what was not kept.

    Raises
    ------
    InputError
        If the folder does not exist or holds no NIfTI file with a known suffix.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a BIDS folder. Check the path.")
    findings: list[Finding] = []
    dropped: set[str] = set()
    groups: dict[tuple[Path, tuple[tuple[str, str], ...], Kind], list[_File]] = defaultdict(list)
    unknown = 0
    for path in sorted([*folder.rglob("*.nii"), *folder.rglob("*.nii.gz")]):
        file = _parse(path)
        kind = _SUFFIXES.get(file.suffix.casefold())
        if kind is None or ("part", "mag") not in file.entities and "part" in dict(file.entities):
            unknown += 1  # phase, real and imaginary parts are no raw signal
            continue
        if "derivatives" in path.relative_to(folder).parts[:-1]:
            unknown += 1
            continue
        kept = tuple(pair for pair in file.entities if pair[0] != _NUMBERED.get(kind))
        groups[(path.parent, kept, kind)].append(file)
    if not groups:
        raise InputError(
            f"{folder.name}: no NIfTI file with a known suffix (_DCE, _dwi, _VFA, _IRT1, _TB1map, _T1w, _T2w); "
            "expected BIDS names. Rename the files."
        )
    if unknown:
        message = f"{folder.name}: {unknown} NIfTI files with other suffixes were ignored."
        findings.append(Finding("info", "schema", folder.name, message, "Rename them if they are needed."))
    series: list[Series] = []
    dates: list[date | None] = []
    for (_, _, found), files in groups.items():
        try:
            series.append(_read_group(files, found, folder, dropped, None if scratch is None else Path(scratch)))
            dates.append(_acquired(files[0].path, folder))
        except TumorcastError as error:
            step: Step = "geometry" if isinstance(error, GeometryError) else "schema"
            findings.append(from_error(error, step, files[0].path.name))
    try:
        series = _dated(series, dates, first_visit, shift)
    except InputError as error:
        findings.append(from_error(error, "schema", folder.name))
    findings += dropped_finding(dropped, folder.name)
    return Intake(tuple(series), tuple(findings), tuple(sorted(dropped)))


def read_series(path: str | os.PathLike[str], kind: Kind | None = None) -> Series:
    """Read one NIfTI file with the sidecars beside it.

    Parameters
    ----------
    kind
        Found from the suffix of the name by default.

    Raises
    ------
    InputError
        If the file or what its kind needs is missing or damaged (UnitError and GeometryError for these kinds).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: does not exist; expected a NIfTI file. Check the name.")
    file = _parse(path)
    found = kind or _SUFFIXES.get(file.suffix.casefold())
    if found is None:
        raise InputError(
            f"{path.name}: suffix '{file.suffix}' is not known; expected _DCE, _dwi, _VFA, _IRT1 or others."
        )
    return _read_file(file, found, path.parent, set(), None)


def _read_group(files: list[_File], kind: Kind, root: Path, dropped: set[str], scratch: Path | None) -> Series:
    key = _NUMBERED.get(kind)
    if len({file.stem for file in files}) < len(files) or len(files) > 1 and key is None:
        raise InputError(f"{files[0].path.name}: there twice ({files[1].path.name}); expected one. Remove one.")
    parts = [_read_file(file, kind, root, dropped, scratch, part=len(files) > 1) for file in files]
    if len(parts) == 1 or key is None:
        return parts[0]
    name = re.sub(rf"_{key}-[^_]+", "", files[0].stem)
    order = {"flip": "flip_angles", "inv": "inversion_times"}[key]
    if all(getattr(part, order) is not None for part in parts):
        parts.sort(key=lambda part: float(getattr(part, order)[0]))
    return join(parts, kind, name=name)


def _sidecar(file: _File, root: Path, ending: str) -> list[Path]:
    """Return the files that describe an image, from the top folder down."""
    found = []
    folders = [folder for folder in (file.path.parent, *file.path.parents) if folder == root or root in folder.parents]
    for folder in reversed(folders):
        for path in sorted(folder.glob(f"*{file.suffix}{ending}")):
            other = _parse(path)
            if other.suffix == file.suffix and set(other.entities) <= set(file.entities):
                found.append((folder, len(other.entities), path))
    return [path for _, _, path in sorted(found, key=lambda item: (len(item[0].parts), item[1]))]


def _fields(file: _File, root: Path, dropped: set[str]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for path in _sidecar(file, root, ".json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            detail = str(error).splitlines()[0]
            raise InputError(f"{path.name}: cannot be read as JSON ({detail}). Correct or export it again.") from None
        if not isinstance(content, dict):
            raise InputError(f"{path.name}: holds {type(content).__name__}; expected an object of fields. Correct it.")
        merged.update(content)
    dropped |= dropped_fields(merged)
    return merged


def _read_file(
    file: _File, kind: Kind, root: Path, dropped: set[str], scratch: Path | None, part: bool = False
) -> Series:
    where = file.path.name
    fields = _fields(file, root, dropped)
    data, affine, view_grid, header = _voxels(file, scratch, where)
    samples = data.shape[0]
    notes: list[str] = []
    b_values = directions = None
    if kind is Kind.DWI:
        b_values, directions = _gradients(file, root, fields, affine, samples, where)
    times = _times(fields, header, samples, where) if kind is Kind.DCE else None
    scale = 1.0
    if kind is Kind.B1:
        units = fields.get("Units")
        scale = 0.01 if units == "%" else factor(units, "1", f"{where}: B1 map")
    flips = _numbers(fields, "FlipAngle", where)
    series = Series(
        # One file of several is a part: whether it is enough is asked of the whole.
        kind=Kind.ANATOMY if part else kind,
        data=data if scale == 1.0 else data * np.float32(scale),
        grid=view_grid,
        times=times,
        b_values=b_values,
        directions=directions,
        flip_angles=flips if flips is None or flips.size > 1 else flips[0],
        inversion_times=_inversion(fields, "InversionTime", samples, where),
        cycles=_inversion(fields, "RepetitionTimePreparation", samples, where) if kind is Kind.INVERSION else None,
        train=_train(fields, where) if kind is Kind.INVERSION else None,
        tr=_repetition(fields, times, kind, where),
        te=_number(fields, "EchoTime", where),
        field_strength=_number(fields, "MagneticFieldStrength", where),
        vendor=known_vendor(fields.get("Manufacturer")),
        sequence=plain_code(fields.get("SequenceName")) or plain_code(fields.get("PulseSequenceType")),
        contrast_agent=known_agent(fields.get("ContrastBolusAgent")),
        fat_saturated=_fat(fields),
        phase_encoding=_phase_encoding(fields, affine),
        name=file.stem,
        notes=tuple(notes),
    )
    return series


def _voxels(file: _File, scratch: Path | None, where: str) -> tuple[np.ndarray, np.ndarray, Any, nib.Nifti1Header]:
    """Read volume by volume into the canonical array, so that a file is never in memory twice."""
    try:
        image = open_nifti(file.path)
        if image.get_data_dtype().kind not in "iufb":
            raise InputError(f"{where}: values of type {image.get_data_dtype()}; expected real numbers.")
        sizes = (*image.shape, 1, 1, 1)
        shape = (int(sizes[0]), int(sizes[1]), int(sizes[2]))
        samples = int(np.prod(image.shape[3:], dtype=int))
        if 0 in shape or samples == 0 or len(image.shape) > 4 and max(image.shape[4:]) > 1:
            raise GeometryError(f"{where}: shape {image.shape}; expected (x, y, z) or (x, y, z, samples).")
        affine = np.array(image.affine, float)
        affine[:3] *= _MILLIMETRES.get(length_units(image.header), 1.0)
        if not np.isfinite(affine).all() or not (np.linalg.norm(affine[:3, :3], axis=0) > 0).all():
            raise GeometryError(f"{where}: the affine is not finite, or has an axis of no length. Export it again.")
        target = None
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
            target = str(scratch / f"{file.stem}.f32")
        data, view, grid = canonical_array(shape, affine, samples, target)
        # Opened once: a compressed file would else be unpacked from its start for each volume.
        stored: Any = image.dataobj
        layout = (image.shape, stored.dtype, stored.offset, stored.slope, stored.inter)
        proxy = nib.arrayproxy.ArrayProxy(str(file.path), layout, keep_file_open=True)
        with np.errstate(all="ignore"):
            for sample in range(samples):
                volume = proxy[..., sample] if len(image.shape) > 3 else np.asarray(proxy)
                view[..., sample] = np.asarray(volume).reshape(shape)
    except UNREADABLE as error:
        if isinstance(error, TumorcastError):
            raise
        detail = (str(error) or type(error).__name__).splitlines()[0].replace(str(file.path), where)
        raise InputError(f"{where}: truncated, damaged or no NIfTI file ({detail}). Copy or export it again.") from None
    return data, affine, grid, image.header


def _number(fields: Mapping[str, Any], name: str, where: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{where}: {name} is {value!r}; expected one number. Correct the sidecar.")
    return float(value)


def _numbers(fields: Mapping[str, Any], name: str, where: str) -> np.ndarray | None:
    value = fields.get(name)
    if value is None:
        return None
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        raise InputError(f"{where}: {name} is {value!r}; expected numbers. Correct the sidecar.")
    return np.array(values, float)


def _inversion(fields: Mapping[str, Any], name: str, samples: int, where: str) -> np.ndarray | None:
    values = _numbers(fields, name, where)
    return values if values is None or values.size != 1 else np.broadcast_to(values, (samples,))


def _train(fields: Mapping[str, Any], where: str) -> Train | None:
    shots = _numbers(fields, "NumberShots", where)
    if shots is None:
        return None
    spacing = _number(fields, "RepetitionTimeExcitation", where)
    if spacing is None:
        raise InputError(
            f"{where}: NumberShots without RepetitionTimeExcitation; expected the time from pulse to pulse, s. Give it "
            "in the sidecar."
        )
    if shots.size > 2 or not (shots >= 0).all() or not shots.sum() >= 1 or (shots % 1 != 0).any():
        raise InputError(
            f"{where}: NumberShots {shots.tolist()}; expected the number of pulses after each inversion, or two "
            "numbers, before and from the centre of k-space on. Correct the sidecar."
        )
    total = int(shots.sum())
    try:
        return Train(total, spacing, float(shots[0]) / total if shots.size == 2 else 0.5)
    except InputError as error:
        raise type(error)(f"{where}: {error}") from None


def _repetition(fields: Mapping[str, Any], times: np.ndarray | None, kind: Kind, where: str) -> float | None:
    excitation = _number(fields, "RepetitionTimeExcitation", where)
    if excitation is not None:
        return excitation
    repetition = _number(fields, "RepetitionTime", where)
    if kind is Kind.DCE and repetition is not None and times is not None and len(times) > 1:
        interval = float(np.median(np.diff(times)))
        if abs(repetition - interval) <= SAME_INTERVAL * interval:
            raise UnitError(
                f"{where}: RepetitionTime {repetition:g} s is the time between volumes; expected the time between "
                "excitations. Give RepetitionTimeExcitation, s, in the sidecar."
            )
    return repetition


def _times(fields: Mapping[str, Any], header: nib.Nifti1Header, samples: int, where: str) -> np.ndarray | None:
    for name in ("VolumeTiming", "FrameTimesStart"):
        values = _numbers(fields, name, where)
        if values is not None:
            if values.size != samples:
                raise InputError(
                    f"{where}: {name} has {values.size} times for {samples} volumes; expected one per volume, s. "
                    "Correct the sidecar."
                )
            return values - values[0]
    if samples < 2:
        return None
    step = float(header["pixdim"][4])
    try:
        units = header.get_xyzt_units()[1]
    except KeyError:
        units = "unknown"
    if not (math.isfinite(step) and step > 0) or units not in _SECONDS:
        raise InputError(
            f"{where}: times of the volumes missing (no VolumeTiming, and the header's time step is {step:g} in units "
            f"'{units}'); expected one time per volume. Give VolumeTiming, s, in the sidecar."
        )
    # Single precision in the header: its shortest decimals.
    return np.arange(samples) * float(str(np.float32(step))) * _SECONDS[units]


def _gradients(
    file: _File, root: Path, fields: Mapping[str, Any], affine: np.ndarray, samples: int, where: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    found = _sidecar(file, root, ".bval")
    if not found:
        return None, None
    b_values = _table(found[-1]).ravel()
    units = fields.get("BValueUnits")
    # BIDS and FSL define .bval files to be in s/mm²; a sidecar that says otherwise is believed.
    if units is not None:
        b_values = b_values * factor(units, "s/mm^2", f"{where}: b-values")
    vectors = _sidecar(file, root, ".bvec")
    if not vectors or len(b_values) != samples:  # the series tells of the wrong number
        return b_values, None
    table = _table(vectors[-1])
    if table.shape != (3, samples):
        table = table.T if table.shape == (samples, 3) else table
    if table.shape != (3, samples) or not np.isfinite(table).all():
        raise InputError(
            f"{vectors[-1].name}: {' × '.join(map(str, table.shape))} numbers for {samples} volumes; expected 3 rows "
            "with one number per volume. Export it again."
        )
    # FSL's convention: along the image's axes, the first one turned round where the axes are right-handed.
    if np.linalg.det(affine[:3, :3]) > 0:
        table = table * np.array([[-1.0], [1.0], [1.0]])
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    world = (axes @ table).T + 0.0
    world[b_values <= 0] = 0.0
    return b_values, world


def _table(path: Path) -> np.ndarray:
    try:
        rows = [[float(word) for word in line.split()] for line in path.read_text().splitlines() if line.strip()]
        if len({len(row) for row in rows}) != 1:
            raise ValueError("rows of unequal length" if rows else "no numbers")
        return np.array(rows)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path.name}: {str(error).splitlines()[0]}; expected rows of numbers. Export it again."
        ) from None


def _fat(fields: Mapping[str, Any]) -> bool | None:
    options = fields.get("ScanOptions")
    if options is None:
        return None
    words = {word.strip().upper() for word in re.split(r"[\\_, ]", str(options))}
    return bool(words & {"FS", "FATSAT", "SFS"})


def _phase_encoding(fields: Mapping[str, Any], affine: np.ndarray) -> Axis | None:
    word = str(fields.get("PhaseEncodingDirection") or fields.get("PhaseEncodingAxis") or "").rstrip("-")
    axis = {"i": 0, "j": 1, "k": 2}.get(word)
    return None if axis is None else canonical_axis(affine, axis)


def _acquired(path: Path, root: Path) -> date | None:
    """Return the date of a file in the ``_scans.tsv`` of its session."""
    for folder in (path.parent, *path.parents):
        for table in sorted(folder.glob("*_scans.tsv")):
            with table.open(encoding="utf-8", newline="") as stream:
                for row in csv.DictReader(stream, delimiter="\t"):
                    if row.get("filename") == path.relative_to(folder).as_posix():
                        try:
                            return date.fromisoformat(str(row.get("acq_time"))[:10])
                        except ValueError:
                            return None
        if folder == root:
            break
    return None


def _dated(series: list[Series], dates: list[date | None], first: date | None, shift: float) -> list[Series]:
    known = [day for day in dates if day is not None]
    if not known:
        return series
    days = dict(zip(known, days_from_first(known, first=first, shift=shift), strict=True))
    return [one if day is None else replace(one, day=days[day]) for one, day in zip(series, dates, strict=True)]
