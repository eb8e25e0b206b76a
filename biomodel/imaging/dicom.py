"""DICOM folders in: classic files of one slice each and multi-frame files, Siemens, GE, Philips and others."""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np

from biomodel.errors import GeometryError, InputError, TumorcastError
from biomodel.findings import Finding, from_error
from biomodel.imaging.deidentify import days_from_first, dropped_finding
from biomodel.imaging.dicom_header import DAMAGED, MOSAIC, Frame, NotAnImage, load_pydicom, read_frames
from biomodel.imaging.dicom_order import Arrangement, arrange, sample_times
from biomodel.imaging.series import Intake, Kind, Series, join
from biomodel.imaging.series_grid import canonical_array, canonical_axis

__all__ = ["read_dicom"]

#: Times from these are not when the signal was acquired, or not measured; the series says so.
_DOUBTFUL = {
    "ContentTime": "times are from ContentTime, when the images were made, not when they were acquired",
    "TemporalResolution": "times are from TemporalResolution and the number of the sample, equal steps",
}
#: At least so many scans of the same settings, one after another, count as one dynamic series.
LEAST_PHASES = 3


@dataclass(frozen=True, eq=False)
class _Scan:
    series: Series
    start: float | None
    day: date | None
    number: int


def read_dicom(
    folder: str | os.PathLike[str],
    *,
    kind: Kind | None = None,
    first_visit: date | None = None,
    shift: float = 0.0,
    joined: bool = True,
    scratch: str | os.PathLike[str] | None = None,
) -> Intake:
    """Read all MR series in a folder and its sub-folders.

    Series are told apart by their UID. What a series is follows from what changes in it: b-values (DWI), flip angles
    (VFA), inversion times, or time alone (DCE); a single sample is anatomy. Single scans that scanners store as series
    of their own are put together when they have one grid, TR and TE: different flip angles to a VFA series, different
    inversion times to an inversion series, three or more of the same settings to a dynamic one.

    Values are stored × RescaleSlope + RescaleIntercept. On Philips scanners that is what is displayed, scaled
    differently from series to series; it is divided by RescaleSlope × scale slope (2005,100E) to be linear in the
    receiver's signal (Chenevert et al. 2014, 10.1593/tlo.13811).

    Parameters
    ----------
    folder
        Any depth; files that are no MR images are left out, with a note.
    kind
        What all series in the folder are, where it does not follow from the headers (a B1 map).
    first_visit
        Day 0; the earliest scan in the folder by default.
    shift
        Days added to all days; see :func:`~biomodel.imaging.deidentify.days_from_first`.
    joined
        Whether single scans are put together.
    scratch
        Folder for memory-mapped voxels, so that series larger than the memory can be read. Its files belong to the
        series and are left there.

    Returns
    -------
    Intake
        The series, an error finding for each that was refused, and the names of what was not kept.

    Raises
    ------
    InputError
        If the folder does not exist or holds no MR images, or pydicom is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a folder of DICOM files. Check the path.")
    load_pydicom()
    findings: list[Finding] = []
    groups, dropped = _scan(folder, findings)
    if not groups and not any(item.severity == "error" for item in findings):
        raise InputError(f"{folder.name}: no MR images; expected DICOM files of MR series. Check the folder.")
    scans: list[_Scan] = []
    counts: Counter[int] = Counter()
    for frames in sorted(groups.values(), key=lambda frames: (frames[0].day or date.min, frames[0].number)):
        counts[frames[0].number] += 1
        again = counts[frames[0].number]  # numbers start anew at every visit
        where = f"series {frames[0].number}" + (f" ({again})" if again > 1 else "")
        try:
            scan = _read_series(frames, where, kind, None if scratch is None else Path(scratch))
            if scan is None:
                what = frames[0].content
                message = f"{where}: left out; a {what} is no raw signal."
                findings.append(Finding("info", "schema", folder.name, message, "Nothing to do."))
            else:
                scans.append(scan)
        except TumorcastError as error:
            findings.append(from_error(error, "geometry" if isinstance(error, GeometryError) else "schema", where))
    if joined:
        scans = _join(scans, findings)
    try:
        scans = _dated(scans, first_visit, shift)
    except InputError as error:
        findings.append(from_error(error, "schema", folder.name))
    findings += dropped_finding(dropped, folder.name)
    return Intake(tuple(scan.series for scan in scans), tuple(findings), tuple(sorted(dropped)))


def _scan(folder: Path, findings: list[Finding]) -> tuple[dict[str, list[Frame]], set[str]]:
    """Read all headers; frames by series."""
    groups: dict[str, list[Frame]] = defaultdict(list)
    dropped: set[str] = set()
    seen: set[str] = set()
    others: Counter[str] = Counter()
    copies = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        if path.stat().st_size == 0:
            message = f"{path.name}: empty file."
            findings.append(Finding("error", "schema", path.name, message, "Copy or export it again."))
            continue
        try:
            frames, names = read_frames(path)
        except NotAnImage as reason:
            others[str(reason)] += 1
            continue
        except InputError as error:
            findings.append(from_error(error, "schema", path.name))
            continue
        dropped |= names
        if frames[0].instance_uid in seen:
            copies += 1
            continue
        seen.add(frames[0].instance_uid)
        for frame in frames:
            groups[frame.series].append(frame)
    if others:
        listed = ", ".join(f"{count} × {what}" for what, count in sorted(others.items()))
        message = f"{folder.name}: {sum(others.values())} files are no MR images and were ignored ({listed})."
        findings.append(Finding("info", "schema", folder.name, message, "Nothing to do."))
    if copies:
        message = f"{folder.name}: {copies} files are copies of others and were ignored."
        findings.append(Finding("info", "schema", folder.name, message, "Nothing to do."))
    return groups, dropped


def _read_series(frames: list[Frame], where: str, kind: Kind | None, scratch: Path | None) -> _Scan | None:
    if frames[0].content == MOSAIC:
        raise InputError(
            f"{where}: Siemens mosaics, with all slices in one image; expected one slice per image. Convert the series "
            "with dcm2niix and give the NIfTI files."
        )
    if all(frame.content != "magnitude" for frame in frames) and kind is not Kind.B1:
        return None
    plan = arrange(frames, where)
    kind = kind or _kind(plan)
    notes: list[str] = []
    first = plan.frames[0][0]
    clock = sample_times(plan.frames)
    start = float(clock[0][0]) if clock else None
    times = None
    if kind is Kind.DCE:
        if clock is None:
            raise InputError(
                f"{where}: {len(plan.frames)} samples without times that rise (AcquisitionTime, TriggerTime, "
                "TemporalPositionTimeOffset, TemporalResolution, ContentTime); expected the time of each sample. "
                "Export the series with its times, or give it as NIfTI with VolumeTiming."
            )
        times = clock[0] - clock[0][0]
        if clock[1] in _DOUBTFUL:
            notes.append(_DOUBTFUL[clock[1]])
    b_values, directions = _weighting(plan, kind, where, notes)
    folder = _scratch_file(scratch, where, first)
    shape = (first.columns, first.rows, len(plan.frames[0]))
    data, view, grid = canonical_array(shape, plan.affine, len(plan.frames), folder)
    philips = _philips(frames, where, notes)
    _fill(view, plan, philips, where)
    axis = {"row": 0, "column": 1}.get(first.phase_encoding or "")
    flips = [sample[0].flip_angle for sample in plan.frames]
    tis = [sample[0].ti for sample in plan.frames]
    series = Series(
        kind=kind,
        data=data,
        grid=grid,
        times=times,
        b_values=b_values,
        directions=directions,
        flip_angles=None if any(not flip for flip in flips) else np.array(flips, float),
        inversion_times=None if any(ti is None for ti in tis) else np.array(tis, float),
        tr=first.tr,
        te=first.te,
        field_strength=first.field_strength,
        vendor=first.vendor,
        sequence=first.sequence,
        contrast_agent=next((frame.contrast_agent for frame in frames if frame.contrast_agent), None),
        fat_saturated=first.fat_saturated,
        phase_encoding=None if axis is None else canonical_axis(plan.affine, axis),
        ceiling=_ceiling(plan, philips),
        name=where,
        notes=tuple(notes),
    )
    return _Scan(series, start, first.day, first.number)


def _kind(plan: Arrangement) -> Kind:
    if any(frame.b_value for sample in plan.frames for frame in sample[:1]):
        return Kind.DWI
    if "flip" in plan.varying:
        return Kind.VFA
    if "ti" in plan.varying:
        return Kind.INVERSION
    return Kind.DCE if len(plan.frames) > 1 else Kind.ANATOMY


def _weighting(
    plan: Arrangement, kind: Kind, where: str, notes: list[str]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    if kind is not Kind.DWI:
        return None, None
    firsts = [sample[0] for sample in plan.frames]
    if any(frame.b_value is None for frame in firsts):
        known = sum(frame.b_value is not None for frame in firsts)
        if known == 0:
            return None, None
        raise InputError(
            f"{where}: b-value missing in {len(firsts) - known} of {len(firsts)} samples; expected one in each. Export "
            "the series with its private tags, or give it as NIfTI with a .bval file."
        )
    b_values = np.array([frame.b_value for frame in firsts], float)
    if not all(frame.direction_known for frame in firsts):
        notes.append("gradient directions are given along the scanner's axes, whose signs are not known; not kept")
        return b_values, None
    lps = np.array([frame.direction or (0.0, 0.0, 0.0) for frame in firsts], float)
    return b_values, np.array([-1.0, -1.0, 1.0]) * lps + 0.0


def _philips(frames: Sequence[Frame], where: str, notes: list[str]) -> bool:
    """Whether to undo the scaling for display."""
    known = [frame.philips_slope is not None for frame in frames]
    if frames[0].vendor == "Philips" and not all(known):
        slopes = {frame.slope for frame in frames}
        if len(slopes) > 1:
            raise InputError(
                f"{where}: the scale of values changes within the series and the scale slope (2005,100E) is missing; "
                "expected it, as values cannot be compared without. Export the series with its private tags."
            )
        notes.append("Philips scale slope (2005,100E) missing: values cannot be compared with those of other series")
    return all(known) and any(known)


def _stored_to_signal(frame: Frame, philips: bool) -> tuple[float, float]:
    """Factor and summand from stored values to signal."""
    if not philips or not frame.philips_slope:
        return frame.slope, frame.intercept
    scale = frame.slope * frame.philips_slope
    return frame.slope / scale, frame.intercept / scale


def _ceiling(plan: Arrangement, philips: bool) -> np.ndarray:
    ceilings = []
    for sample in plan.frames:
        tops = {factor * frame.largest + add for frame in sample for factor, add in [_stored_to_signal(frame, philips)]}
        ceilings.append(tops.pop() if len(tops) == 1 else np.nan)
    return np.array(ceilings, np.float32)


def _scratch_file(scratch: Path | None, where: str, first: Frame) -> str | None:
    if scratch is None:
        return None
    scratch.mkdir(parents=True, exist_ok=True)
    number = len(list(scratch.glob("*.f32")))
    return str(scratch / f"{number:04d}_{where.replace(' ', '_')}.f32")


def _fill(view: np.ndarray, plan: Arrangement, philips: bool, where: str) -> None:
    """Read voxels file by file, each frame straight to its place."""
    places: dict[Path, list[tuple[int, int, int, Frame]]] = defaultdict(list)
    for j, sample in enumerate(plan.frames):
        for k, frame in enumerate(sample):
            places[frame.path].append((frame.index, j, k, frame))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom tells of padding and odd headers; cut voxels are errors
        for path, wanted in places.items():
            wanted.sort(key=lambda item: item[0])
            images = _pixels(path, [index for index, *_ in wanted], where)
            for (_, j, k, frame), image in zip(wanted, images, strict=True):
                factor, add = _stored_to_signal(frame, philips)
                signal = image.astype(np.float32)
                if (factor, add) != (1.0, 0.0):
                    signal *= np.float32(factor)
                    signal += np.float32(add)
                view[:, :, k, j] = signal.T


def _pixels(path: Path, indices: list[int], where: str) -> Iterator[np.ndarray]:
    """Yield the wanted frames of a file, of which pydicom reads no more than one at a time."""
    pydicom = load_pydicom()
    try:
        yield from pydicom.pixels.iter_pixels(path, indices=indices)
    except DAMAGED as error:
        detail = (str(error) or type(error).__name__).splitlines()[0]
        if "plugin" in detail.lower() or "decompress" in detail.lower():
            raise InputError(
                f"{where}: {path.name} is compressed in a way that cannot be read here. Export it uncompressed, or "
                "install pylibjpeg with pylibjpeg-openjpeg."
            ) from None
        raise InputError(
            f"{where}: {path.name} is truncated or damaged ({detail[:160]}). Copy or export it again."
        ) from None


def _join(scans: list[_Scan], findings: list[Finding]) -> list[_Scan]:
    """Put single scans of one grid and the same timing together."""
    singles = [scan for scan in scans if scan.series.kind is Kind.ANATOMY and scan.series.tr and scan.series.te]
    groups: list[list[_Scan]] = []
    for scan in singles:
        for group in groups:
            if _alike(group[0], scan):
                group.append(scan)
                break
        else:
            groups.append([scan])
    out = list(scans)
    for group in groups:
        whole = _whole(group, findings)
        if whole is not None:
            out = [whole if scan is group[0] else scan for scan in out if scan is group[0] or scan not in group]
    return out


def _alike(one: _Scan, two: _Scan) -> bool:
    a, b = one.series, two.series
    same = one.day == two.day and a.grid.same_as(b.grid) and a.vendor == b.vendor and a.sequence == b.sequence
    same = same and (a.inversion_times is None) == (b.inversion_times is None)
    assert a.tr and a.te and b.tr and b.te
    return same and abs(a.tr / b.tr - 1) < 1e-3 and abs(a.te / b.te - 1) < 1e-2


def _whole(group: list[_Scan], findings: list[Finding]) -> _Scan | None:
    flips = [None if scan.series.flip_angles is None else float(scan.series.flip_angles[0]) for scan in group]
    tis = [None if scan.series.inversion_times is None else float(scan.series.inversion_times[0]) for scan in group]
    starts = [scan.start for scan in group]
    times = None
    if len(group) < 2 or None in flips:
        return None
    if len(set(flips)) == len(group):
        kind, order = Kind.VFA, np.argsort(np.array(flips, float))
    elif None not in tis and len(set(tis)) == len(group):
        kind, order = Kind.INVERSION, np.argsort(np.array(tis, float))
    elif len(set(flips)) == 1 and len(group) >= LEAST_PHASES and None not in starts and len(set(starts)) == len(group):
        kind, order = Kind.DCE, np.argsort(np.array(starts, float))
        clock = np.sort(np.array(starts, float))
        times = clock - clock[0]
    else:
        return None
    parts = [group[int(at)] for at in order]
    names = ", ".join(str(scan.number) for scan in parts)
    try:
        series = join([scan.series for scan in parts], kind, times, f"series {names}")
    except TumorcastError as error:
        findings.append(from_error(error, "schema", f"series {names}"))
        return None
    message = f"series {names}: {len(parts)} scans of one grid, TR and TE were put together to a {kind.title}."
    findings.append(Finding("info", "schema", series.name, message, "Read them with joined=False to keep them apart."))
    return replace(parts[0], series=series)


def _dated(scans: list[_Scan], first: date | None, shift: float) -> list[_Scan]:
    dates = [scan.day for scan in scans if scan.day is not None]
    if not dates:
        return scans
    days = dict(zip(dates, days_from_first(dates, first=first, shift=shift), strict=True))
    return [
        replace(scan, series=replace(scan.series, day=days[scan.day])) if scan.day is not None else scan
        for scan in scans
    ]
