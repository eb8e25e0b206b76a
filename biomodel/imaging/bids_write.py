"""NIfTI files with JSON sidecars out, named and described as BIDS has it."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np

from biomodel.errors import InputError
from biomodel.files import atomic_write
from biomodel.imaging.deidentify import written_date
from biomodel.imaging.series import Kind, Series

__all__ = ["write_bids"]

_PLACES = {
    Kind.DCE: ("perf", "DCE"),
    Kind.DWI: ("dwi", "dwi"),
    Kind.VFA: ("anat", "VFA"),
    Kind.INVERSION: ("anat", "IRT1"),
    Kind.B1: ("fmap", "TB1map"),
}


def write_bids(
    series: Series, folder: str | os.PathLike[str], name: str, *, suffix: str | None = None
) -> tuple[Path, ...]:
    """Write a series; :func:`~biomodel.imaging.bids.read_bids` gives it back.

    Parameters
    ----------
    folder
        Of the subject or session; the file goes to its ``perf``, ``dwi``, ``anat`` or ``fmap``.
    name
        What names begin with (``sub-01_ses-01``).
    suffix
        Of an anatomical series (``T1w``), which has no suffix of its own.

    Returns
    -------
    tuple of Path
        The NIfTI files, one for each flip angle or inversion time, one for other series. Each file appears whole or not
        at all; files of the same name are replaced.

    Raises
    ------
    InputError
        If the suffix of an anatomical series is missing.
    OutputError
        If a file cannot be written.
    """
    place, ending = _PLACES.get(series.kind, ("anat", suffix or ""))
    if not ending:
        raise InputError(f"{series.name}: suffix missing; expected that of an anatomical series, such as 'T1w'.")
    target = Path(folder) / place
    written: list[Path] = []
    if series.kind in (Kind.VFA, Kind.INVERSION):
        key = "flip" if series.kind is Kind.VFA else "inv"
        for sample in range(series.samples):
            stem = f"{name}_{key}-{sample + 1}_{ending}"
            written.append(_write(series, target, stem, slice(sample, sample + 1)))
    else:
        written.append(_write(series, target, f"{name}_{ending}", slice(None)))
    if series.day is not None:
        _note_day(Path(folder), name, written, series.day)
    return tuple(written)


def _write(series: Series, folder: Path, stem: str, samples: slice) -> Path:
    data = series.data[samples]
    voxels = data.transpose(3, 2, 1, 0)
    image = nib.Nifti1Image(voxels[..., 0] if len(data) == 1 else voxels, series.grid.affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_sform(series.grid.affine, code="scanner")
    image.header.set_qform(series.grid.affine, code="scanner")
    if series.b_values is not None:
        # FSL's convention; see read_bids.
        axes = series.grid.affine[:3, :3] / np.linalg.norm(series.grid.affine[:3, :3], axis=0)
        _write_text(folder / f"{stem}.bval", " ".join(f"{b:.10g}" for b in series.b_values) + "\n")
        if series.directions is not None:
            table = axes.T @ series.directions.T
            if np.linalg.det(axes) > 0:
                table = table * np.array([[-1.0], [1.0], [1.0]])
            rows = (" ".join(f"{value + 0.0:.10g}" for value in row) for row in table)
            _write_text(folder / f"{stem}.bvec", "\n".join(rows) + "\n")
    _write_text(folder / f"{stem}.json", json.dumps(_fields(series, samples), indent=2) + "\n")
    path = folder / f"{stem}.nii.gz"
    with atomic_write(path) as temporary:
        nib.save(image, temporary)
    return path


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _fields(series: Series, samples: slice) -> dict[str, object]:
    fields: dict[str, object] = {"Manufacturer": series.vendor, "MagneticFieldStrength": series.field_strength}
    fields |= {"RepetitionTimeExcitation": series.tr, "EchoTime": series.te, "SequenceName": series.sequence}
    if series.flip_angles is not None:
        part = series.flip_angles[samples]
        fields["FlipAngle"] = float(part[0]) if np.ptp(part) == 0 else part.tolist()
    if series.inversion_times is not None:
        part = series.inversion_times[samples]
        fields["InversionTime"] = float(part[0]) if np.ptp(part) == 0 else part.tolist()
    if series.cycles is not None:
        part = series.cycles[samples]
        fields["RepetitionTimePreparation"] = float(part[0]) if np.ptp(part) == 0 else part.tolist()
    if series.train is not None:
        before = round(series.train.centre * series.train.pulses)
        fields["RepetitionTimeExcitation"] = series.train.spacing
        fields["NumberShots"] = [before, series.train.pulses - before]
    if series.times is not None and series.kind is Kind.DCE:
        fields["VolumeTiming"] = series.times.tolist()
    if series.contrast_agent:
        fields |= {"ContrastBolusIngredient": "GADOLINIUM", "ContrastBolusAgent": series.contrast_agent}
    if series.fat_saturated is not None:
        fields["ScanOptions"] = "FS" if series.fat_saturated else "NONE"
    if series.phase_encoding is not None:
        # Of the polarity nothing is known; BIDS' own field has a sign, that of converters has none.
        fields["PhaseEncodingAxis"] = {"x": "i", "y": "j", "z": "k"}[series.phase_encoding]
    if series.kind is Kind.B1:
        fields["Units"] = "1"
    return {name: value for name, value in fields.items() if value is not None}


def _note_day(folder: Path, name: str, files: list[Path], day: float) -> None:
    """Note the day in ``_scans.tsv``, as a date counted from 1900, which BIDS takes for shifted."""
    path = folder / f"{name}_scans.tsv"
    rows: dict[str, str] = {}
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as stream:
            rows = {row["filename"]: row["acq_time"] for row in csv.DictReader(stream, delimiter="\t")}
    rows |= {file.relative_to(folder).as_posix(): f"{written_date(day).isoformat()}T00:00:00" for file in files}
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerows([("filename", "acq_time"), *sorted(rows.items())])
    _write_text(path, text.getvalue())
