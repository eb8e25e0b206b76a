"""From the frames of one DICOM series to samples of slices: which frame belongs where, and when it was acquired."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from biomodel.errors import GeometryError, InputError
from biomodel.imaging.dicom_header import Frame

__all__ = ["Arrangement", "arrange", "sample_times"]

#: Slices closer than this along the normal are at one place, mm: positions are written with some six digits.
SAME_PLACE = 0.01
#: Distances between slices may differ by this part; single precision and rounded positions stay far below.
SAME_STEP = 0.02
#: Slices may be shifted in their plane against one another by this part of a pixel.
SAME_COLUMN = 0.1
#: Direction cosines and pixel sizes of one series agree to this, as they are written with some six digits.
SAME_COSINE, SAME_PIXEL = 1e-3, 1e-3
#: Clocks that fall by more than this have passed midnight, s.
MIDNIGHT = 12 * 3600.0

#: Clocks in the order in which they are trusted.
CLOCKS = (
    "FrameAcquisitionDateTime",
    "AcquisitionTime",
    "AcquisitionDateTime",
    "TriggerTime",
    "TemporalPositionTimeOffset",
    "TemporalResolution",
    "ContentTime",
)

Key = tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Frames by sample and slice.

    Parameters
    ----------
    frames
        By sample, then by slice along the normal.
    affine
        (4, 4), from the index (column, row, slice) to mm in the patient, RAS+.
    varying
        What changes from sample to sample, of ``b``, ``flip`` and ``ti``; nothing for a series in time.
    """

    frames: tuple[tuple[Frame, ...], ...]
    affine: np.ndarray
    varying: frozenset[str]


def arrange(frames: Sequence[Frame], where: str) -> Arrangement:
    """Sort the frames of one series into samples of slices.

    Slices are sorted by their position along the slice normal; samples by flip angle or inversion time where these
    change, and within them by temporal position, clock and number of the image, whichever tells the images at each
    slice apart. Diffusion-weighted samples are told apart by b-value and direction and keep the order of their image
    numbers.

    Raises
    ------
    GeometryError
        If slices are missing or there twice, or geometry changes within the series.
    InputError
        If the series mixes scans that do not belong together.
    """
    first = frames[0]
    _check_one_scan(frames, where)
    normal = np.cross(first.row, first.column)
    along = np.array([float(frame.position @ normal) for frame in frames])
    place = _cluster(along)
    count = int(place.max()) + 1
    levels = np.array([along[place == k].mean() for k in range(count)])
    per_place = np.bincount(place)
    if len(set(per_place.tolist())) > 1 or not _regular(levels):
        raise GeometryError(_diagnosis(frames, along, levels, per_place, where))
    shifts = np.array([frame.position for frame in frames]) - along[:, None] * normal
    drift = float(np.linalg.norm(shifts - shifts[0], axis=1).max())
    if drift > SAME_COLUMN * min(first.pixel):
        raise GeometryError(
            f"{where}: images are shifted by up to {drift:.3g} mm in their plane against one another; expected slices "
            "straight above one another, at the same place in every sample. The geometry differs between samples, or "
            "the scan is tilted: export its samples as separate series, or resample them."
        )
    varying = frozenset(
        name for name, key in (("b", _b), ("flip", _flip), ("ti", _ti)) if len({key(frame) for frame in frames}) > 1
    )
    by_place: list[list[Frame]] = [[] for _ in range(count)]
    for frame, k in zip(frames, place, strict=True):
        by_place[int(k)].append(frame)
    columns = _order(by_place, varying, where)
    samples = tuple(tuple(column[j] for column in columns) for j in range(len(columns[0])))
    if "b" in varying:  # directions have no order of their own: as acquired
        samples = tuple(sorted(samples, key=lambda sample: min(frame.instance for frame in sample)))
    for number, sample in enumerate(samples, start=1):
        if len({_primary(frame, varying) for frame in sample}) > 1:
            raise InputError(
                f"{where}: slices of sample {number} have different b-values, directions, flip angles or inversion "
                "times; expected one for all slices. Export the series again, whole."
            )
    step = (
        float(np.median(np.diff(levels))) if count > 1 else (first.thickness or 0.0)
    )  # one slice alone says nothing of its distance to others
    if not step > 0:
        raise GeometryError(f"{where}: one slice without a thickness; expected SliceThickness, mm. Export it again.")
    lps = np.eye(4)
    lps[:3, 0] = first.row * first.pixel[1]
    lps[:3, 1] = first.column * first.pixel[0]
    lps[:3, 2] = normal * step
    lps[:3, 3] = samples[0][0].position
    return Arrangement(samples, np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps, varying)


def _check_one_scan(frames: Sequence[Frame], where: str) -> None:
    remedy = "Export them as separate series, or remove those that do not belong."
    contents = Counter(frame.content for frame in frames)
    if len(contents) > 1:
        listed = ", ".join(f"{n} images of kind '{what}'" for what, n in contents.most_common())
        raise InputError(f"{where}: mixes {listed}; expected one kind in a series. {remedy}")
    first = frames[0]
    sizes = {(frame.rows, frame.columns) for frame in frames}
    if len(sizes) > 1:
        listed = ", ".join(f"{r} × {c}" for r, c in sorted(sizes))
        raise GeometryError(f"{where}: mixes images of {listed} pixels; expected one size in a series. {remedy}")
    for frame in frames:
        turned = max(np.abs(frame.row - first.row).max(), np.abs(frame.column - first.column).max())
        if turned > SAME_COSINE:
            raise GeometryError(
                f"{where}: mixes orientations (direction cosines differ by {turned:.3g}); expected parallel slices. "
                f"{remedy}"
            )
        if np.abs(np.array(frame.pixel) / first.pixel - 1).max() > SAME_PIXEL:
            raise GeometryError(
                f"{where}: mixes pixels of {first.pixel[0]:g} and {frame.pixel[0]:g} mm; expected one size in a "
                f"series. {remedy}"
            )
    for field, word, units, scale in (("te", "echo time", "ms", 1e3), ("tr", "repetition time", "ms", 1e3)):
        found = sorted({round(value * scale, 3) for frame in frames if (value := getattr(frame, field)) is not None})
        if found and found[-1] > found[0] * 1.01:
            listed = ", ".join(f"{value:g}" for value in found[:5])
            raise InputError(
                f"{where}: mixes {len(found)} {word}s ({listed} {units}); expected one {word} in a series. {remedy}"
            )


def _cluster(along: np.ndarray) -> np.ndarray:
    order = np.argsort(along)
    steps = np.diff(along[order]) > SAME_PLACE
    place = np.empty(len(along), int)
    place[order] = np.concatenate([[0], np.cumsum(steps)])
    return place


def _regular(levels: np.ndarray) -> bool:
    if len(levels) < 3:
        return True
    steps = np.diff(levels)
    return bool((np.abs(steps - np.median(steps)) <= max(SAME_PLACE, SAME_STEP * float(np.median(steps)))).all())


def _b(frame: Frame) -> Key:
    # Weighted by less than a few s/mm² counts as not weighted; the direction tells images of one b-value apart.
    return (round(frame.b_value or 0.0, 3), tuple(round(part, 4) for part in frame.direction))


def _flip(frame: Frame) -> Key:
    return (round(frame.flip_angle or 0.0, 4),)


def _ti(frame: Frame) -> Key:
    return (round(frame.ti or 0.0, 6),)


def _primary(frame: Frame, varying: frozenset[str]) -> Key:
    key: Key = ()
    for name, part in (("b", _b), ("flip", _flip), ("ti", _ti)):
        if name in varying:
            key += part(frame)
    return key


def _secondary() -> list[tuple[str, Callable[[Frame], float | None]]]:
    found: list[tuple[str, Callable[[Frame], float | None]]] = [("temporal position", lambda frame: frame.temporal)]
    found += [(name, lambda frame, name=name: frame.clocks.get(name)) for name in CLOCKS]  # type: ignore[misc]
    return [*found, ("image number", lambda frame: frame.instance)]


def _order(by_place: list[list[Frame]], varying: frozenset[str], where: str) -> list[list[Frame]]:
    """Sort the frames at each slice in the same way, by the first attribute that tells all of them apart."""
    if len(by_place[0]) == 1:
        return by_place
    for _, value in _secondary():
        keys = [[(_primary(frame, varying), value(frame)) for frame in column] for column in by_place]
        if all(len(set(column)) == len(column) and all(second is not None for _, second in column) for column in keys):
            return [
                [frame for _, frame in sorted(zip(key, column, strict=True), key=lambda pair: pair[0])]
                for key, column in zip(keys, by_place, strict=True)
            ]
    raise InputError(
        f"{where}: {len(by_place[0])} images at each slice, and nothing in the headers (b-value, flip angle, temporal "
        "position, times, image number) tells them apart; expected an order. Images may be there twice: remove copies, "
        "or export the series again."
    )


def _diagnosis(
    frames: Sequence[Frame], along: np.ndarray, levels: np.ndarray, per_place: np.ndarray, where: str
) -> str:
    """Say which slices are missing or there twice, or which samples lie elsewhere."""
    again = "Export the series again, whole."
    groups = _phases(frames)
    if len(groups) > 1:
        places = {name: np.sort(along[members]) for name, members in groups.items()}
        usual = Counter(len(values) for values in places.values()).most_common(1)[0][0]
        whole = next(values for values in places.values() if len(values) == usual)
        for number, values in enumerate(places.values(), start=1):
            twice = values[1:][np.diff(values) <= SAME_PLACE]
            if twice.size:
                return f"{where}: the slice at {twice[0]:.4g} mm is there twice in sample {number}. Remove the copy."
            if len(values) == usual and _regular(values):
                apart = float(np.abs(values - whole).max())
                if apart > SAME_PLACE:
                    return (
                        f"{where}: sample {number} has another geometry: its slices lie up to {apart:.4g} mm from "
                        "those of the first; expected the same place in every sample. Leave it out, or resample it."
                    )
        for number, values in enumerate(places.values(), start=1):
            if len(values) < usual:
                lost = [level for level in whole if np.abs(values - level).min() > SAME_PLACE]
                at = f" (at {', '.join(f'{level:.4g}' for level in lost[:5])} mm)" if lost else ""
                return f"{where}: sample {number} has {len(values)} slices, others {usual}{at}: missing slices. {again}"
    if len(set(per_place.tolist())) > 1:
        usual = Counter(per_place.tolist()).most_common(1)[0][0]
        few, many = levels[per_place < usual], levels[per_place > usual]
        if few.size:
            return f"{where}: images are missing at the slice at {few[0]:.4g} mm ({usual} at other slices). {again}"
        return f"{where}: more images than elsewhere ({usual}) at the slice at {many[0]:.4g} mm. Remove the copies."
    steps = np.diff(levels)
    usual_step = float(np.median(steps))
    for below, above in pairwise(levels):
        if above - below > 1.5 * usual_step:
            lost_count = round((above - below) / usual_step) - 1
            return (
                f"{where}: {lost_count} slice{'s' * (lost_count > 1)} missing between {below:.4g} and {above:.4g} mm "
                f"(others lie {usual_step:.4g} mm apart). {again}"
            )
    return (
        f"{where}: slices lie {steps.min():.4g} to {steps.max():.4g} mm apart; expected equal distances. Export it as "
        "one stack, or leave out what does not belong."
    )


def _phases(frames: Sequence[Frame]) -> dict[object, list[int]]:
    """Group frames by sample, as well as an irregular series allows."""
    candidates: list[Callable[[Frame], object]] = [
        lambda frame: frame.temporal,
        _b,
        _flip,
        _ti,
        lambda frame: frame.clocks.get("TriggerTime"),
        lambda frame: frame.clocks.get("FrameAcquisitionDateTime"),
        lambda frame: frame.clocks.get("AcquisitionTime"),
    ]
    for key in candidates:
        groups: dict[object, list[int]] = defaultdict(list)
        for number, frame in enumerate(frames):
            groups[key(frame)].append(number)
        # A clock of its own for each slice tells nothing of samples.
        if len(groups) > 1 and None not in groups and np.median([len(group) for group in groups.values()]) > 1:
            return dict(sorted(groups.items(), key=lambda item: item[0]))  # type: ignore[arg-type,return-value]
    return {}


def sample_times(samples: Sequence[Sequence[Frame]]) -> tuple[np.ndarray, str] | None:
    """Return when each sample began (s), and the attribute that told; None if none of them rises with the samples.

    A sample begins with the first of its slices. Clocks without a date that pass midnight go on.
    """
    for name in CLOCKS:
        rows = [[frame.clocks.get(name) for frame in sample] for sample in samples]
        if any(value is None for row in rows for value in row):
            continue
        times = np.array([min(value for value in row if value is not None) for row in rows])
        fallen = np.diff(times) < -MIDNIGHT
        times[1:] += 86400.0 * np.cumsum(fallen)
        if (np.diff(times) > 0).all():
            return times, name
    return None
