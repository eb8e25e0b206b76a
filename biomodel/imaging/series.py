"""Raw image series: samples of one sequence on one grid, with how each of them was acquired.

A :class:`Series` holds only what the quantification needs, in fixed units, and cannot be made without it: a diffusion
series without b-values or a dynamic one without flip angle is refused where it enters, not where it is fitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from biomodel.errors import GeometryError, InputError, UnitError
from biomodel.findings import Finding
from biomodel.frozen import frozen_array
from biomodel.imaging.series_grid import Axis, Grid
from biomodel.imaging.series_train import Train

__all__ = ["Grid", "Intake", "Kind", "Series", "join"]

#: b-values closer than this are one weighting, s/mm²: scanners report the share of the imaging gradients, too.
SAME_B = 5.0
#: The largest b-value of a series in vivo, s/mm²; a largest one outside is in another unit (1 ms/µm² = 1000 s/mm²,
#: 1 s/m² = 1e-6 s/mm²).
B_RANGE = (50.0, 1e5)
#: Longest repetition time of spoiled gradient echoes, s: those of T1 mapping and dynamic series have some ms to some
#: hundred ms, so that 2 and more is the time in ms, or the time from volume to volume.
LONGEST_TR_SPOILED = 2.0
#: Longest times of any sequence, s; beyond, they are in ms.
LONGEST_TR, LONGEST_TE, LONGEST_TI = 60.0, 1.0, 20.0
#: Field strengths of scanners for people and animals, T; 15000 would be in gauss.
FIELD_RANGE = (0.01, 25.0)
#: Largest plausible median of a B1 map given as a factor; 100 would be in per cent.
LARGEST_B1 = 5.0
#: Relative difference of TR or TE from which two scans are no longer of one sequence; they are stored with few digits.
SAME_TIMING = 1e-2


class Kind(Enum):
    """What changes from sample to sample, and so what a series can be used for."""

    DCE = "dce"
    """Spoiled gradient echo repeated while contrast agent arrives; the time changes."""
    DWI = "dwi"
    """Diffusion-weighted; the b-value and the gradient's direction change."""
    VFA = "vfa"
    """Spoiled gradient echo at several flip angles, for T1."""
    INVERSION = "inversion"
    """Inversion-prepared, at one or more inversion times, for T1."""
    ANATOMY = "anatomy"
    """Looked at, not fitted."""
    B1 = "b1"
    """Map of the actual over the nominal flip angle, as a factor."""

    @property
    def title(self) -> str:
        """Words for messages."""
        return _TITLES[self]


_TITLES = {
    Kind.DCE: "dynamic contrast-enhanced series",
    Kind.DWI: "diffusion-weighted series",
    Kind.VFA: "variable-flip-angle series",
    Kind.INVERSION: "inversion-prepared series",
    Kind.ANATOMY: "anatomical series",
    Kind.B1: "B1 map",
}


@dataclass(frozen=True, eq=False)
class Series:
    """Samples of one sequence on one grid.

    Parameters
    ----------
    kind
        What changes from sample to sample.
    data
        float32 (n, z, y, x), n samples, linear in the receiver's signal; may be memory-mapped. A view is kept, not a
        copy. Voxels that are not known are NaN.
    grid
        Of every sample.
    times
        (n,), s, rising. Start of each sample; from the first one where a reader made the series.
    b_values
        (n,), s/mm².
    directions
        (n, 3), of the diffusion gradient, RAS+, of length 1; (0, 0, 0) where there is none (b = 0, or an average over
        directions).
    flip_angles
        (n,), degrees; one number where they are all the same.
    inversion_times
        (n,), s; to the pulse that reads the centre of k-space, as DICOM and BIDS define them.
    cycles
        (n,), s; from inversion to inversion.
    train
        Pulses that read after each inversion; None where one pulse does.
    tr, te
        Time between excitations and echo time, s.
    field_strength
        T.
    vendor, sequence, contrast_agent
        In words; None where not known.
    fat_saturated
        Whether fat was suppressed; None where not known.
    phase_encoding
        Axis of the array (``z``, ``y`` or ``x``) along which phase was encoded and ghosts appear.
    ceiling
        (n,) largest value that the storage could hold, in the units of `data`; NaN where not known.
    day
        Days from the first visit.
    name
        Names the series in messages.
    notes
        What a reader noticed.

    Raises
    ------
    InputError
        If what the kind needs is missing or impossible.
    UnitError
        If a number cannot be in the unit it is meant to be in. Units are never guessed.
    GeometryError
        If shapes do not fit together.
    """

    kind: Kind
    data: np.ndarray
    grid: Grid
    times: np.ndarray | None = None
    b_values: np.ndarray | None = None
    directions: np.ndarray | None = None
    flip_angles: np.ndarray | None = None
    inversion_times: np.ndarray | None = None
    cycles: np.ndarray | None = None
    train: Train | None = None
    tr: float | None = None
    te: float | None = None
    field_strength: float | None = None
    vendor: str | None = None
    sequence: str | None = None
    contrast_agent: str | None = None
    fat_saturated: bool | None = None
    phase_encoding: Axis | None = None
    ceiling: np.ndarray | None = None
    day: float | None = None
    name: str = "series"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _set(self, "data", _samples(self.data, self.grid, self.name))
        for field, units in (
            ("times", "s"),
            ("b_values", "s/mm²"),
            ("flip_angles", "degrees"),
            ("inversion_times", "s"),
            ("cycles", "s"),
        ):
            _set(self, field, _per_sample(getattr(self, field), self.samples, f"{self.name}: {field}", units))
        if self.ceiling is not None:
            ceiling = np.broadcast_to(np.asarray(self.ceiling, float), (self.samples,))
            _set(self, "ceiling", frozen_array(ceiling, float))
        _set(self, "directions", _unit_vectors(self.directions, self.samples, f"{self.name}: directions"))
        for field, longest in (("tr", LONGEST_TR), ("te", LONGEST_TE)):
            _set(self, field, _duration(getattr(self, field), longest, f"{self.name}: {field}"))
        _set(self, "notes", tuple(self.notes))
        if self.phase_encoding not in (None, "z", "y", "x"):
            raise InputError(f"{self.name}: phase_encoding {self.phase_encoding!r}; expected 'z', 'y' or 'x'.")
        self._check_plain()
        self._check_kind()

    def _check_plain(self) -> None:
        """Check what is given, whether or not the kind needs it."""
        if self.times is not None and not (np.diff(self.times) > 0).all():
            at = int(np.flatnonzero(np.diff(self.times) <= 0)[0]) + 2
            raise InputError(
                f"{self.name}: times do not rise at sample {at} ({self.times[at - 2]:g} s, then "
                f"{self.times[at - 1]:g} s); expected the start of each sample, rising. Correct the order or the times."
            )
        if self.b_values is not None:
            _check_b_values(self.b_values, self.name)
        if self.flip_angles is not None:
            low, high = float(self.flip_angles.min()), float(self.flip_angles.max())
            if low <= 0 or high > 360:
                raise InputError(f"{self.name}: flip angles from {low:g} to {high:g}; expected degrees above 0.")
            if high < 1:
                raise UnitError(
                    f"{self.name}: largest flip angle {high:g}; expected degrees, and no scan is made with less than "
                    "1 degree alone. Convert radians to degrees; units are never guessed."
                )
        if self.inversion_times is not None:
            low, high = float(self.inversion_times.min()), float(self.inversion_times.max())
            if low < 0:
                raise InputError(f"{self.name}: inversion time {low:g} s; expected 0 or more.")
            if high > LONGEST_TI:
                raise UnitError(f"{self.name}: inversion time {high:g}; expected s. Convert ms to s.")
        if self.cycles is not None and not (0 < self.cycles.min() and self.cycles.max() <= LONGEST_TR):
            raise UnitError(
                f"{self.name}: {self.cycles.min():g} to {self.cycles.max():g} from inversion to inversion; expected s, "
                f"above 0 and at most {LONGEST_TR:g}. Convert ms to s."
            )
        if self.field_strength is not None:
            field = float(self.field_strength)
            if not FIELD_RANGE[0] <= field <= FIELD_RANGE[1]:
                raise UnitError(
                    f"{self.name}: field strength {field:g}; expected tesla, {FIELD_RANGE[0]:g} to {FIELD_RANGE[1]:g}. "
                    "Convert it (1 T = 10000 gauss); units are never guessed."
                )
            _set(self, "field_strength", field)

    def _check_kind(self) -> None:
        if self.kind in (Kind.DCE, Kind.VFA):
            self._need("flip_angles", "flip angle", "FlipAngle, degrees")
            self._need("tr", "repetition time", "RepetitionTimeExcitation, s")
            if self.tr is not None and self.tr > LONGEST_TR_SPOILED:
                raise UnitError(
                    f"{self.name}: repetition time {self.tr:g}; expected s between excitations, at most "
                    f"{LONGEST_TR_SPOILED:g} for a spoiled gradient echo. Convert ms to s, or give the time between "
                    "excitations instead of that between volumes (RepetitionTimeExcitation)."
                )
        if self.kind is Kind.DCE:
            self._need("times", "time of each sample", "VolumeTiming, s")
            self._several(np.arange(self.samples), "sample", "")
            self.flip_angle  # noqa: B018  # refuses more than one
        elif self.kind is Kind.DWI:
            self._need("b_values", "b-values", "a .bval file, s/mm²")
            assert self.b_values is not None
            levels = np.unique(self.b_values)
            self._several(levels[np.append(True, np.diff(levels) > SAME_B)], "b-value", " s/mm²")
        elif self.kind is Kind.VFA:
            assert self.flip_angles is not None
            self._several(np.unique(self.flip_angles), "flip angle", "°")
        elif self.kind is Kind.INVERSION:
            self._need("inversion_times", "inversion time", "InversionTime, s")
        elif self.kind is Kind.B1:
            if self.samples != 1:
                raise InputError(f"{self.name}: {self.samples} maps; expected one B1 map. Choose one.")
            known = self.data[np.isfinite(self.data) & (self.data > 0)]
            if known.size and float(np.median(known)) > LARGEST_B1:
                raise UnitError(
                    f"{self.name}: median {float(np.median(known)):g}; expected the actual over the nominal flip "
                    "angle, about 1. Convert per cent to a factor; units are never guessed."
                )

    def _need(self, field: str, what: str, source: str) -> None:
        if getattr(self, field) is None:
            raise InputError(
                f"{self.name}: {what} missing; a {self.kind.title} cannot be used without it. Give {source}."
            )

    def _several(self, values: np.ndarray, what: str, units: str) -> None:
        if len(values) < 2:
            found = f" ({values[0]:g}{units})" if units and len(values) else ""
            raise InputError(
                f"{self.name}: a single {what}{found}; expected at least two different ones in a {self.kind.title}. "
                "Add the other samples, or use the series as anatomy."
            )

    @property
    def samples(self) -> int:
        """Number of samples, n."""
        return int(self.data.shape[0])

    @property
    def flip_angle(self) -> float:
        """The one flip angle of all samples, degrees.

        Raises
        ------
        InputError
            If there is none, or more than one.
        """
        if self.flip_angles is None:
            raise InputError(f"{self.name}: flip angle missing; expected degrees. Give FlipAngle.")
        if np.ptp(self.flip_angles) > 0:
            raise InputError(
                f"{self.name}: flip angles from {self.flip_angles.min():g} to {self.flip_angles.max():g} degrees; "
                "expected the same for all samples. Separate the series by flip angle."
            )
        return float(self.flip_angles[0])

    def signal(self, inside: np.ndarray) -> np.ndarray:
        """Return the signal of the voxels inside a mask bool (z, y, x): float32 (voxels, n), in the mask's order."""
        inside = np.asarray(inside, bool)
        if inside.shape != self.grid.shape:
            raise GeometryError(f"{self.name}: mask of shape {inside.shape}; expected {self.grid.shape} (z, y, x).")
        # Sample by sample, as a mask on all of them at once would copy the whole series first.
        out = np.empty((int(inside.sum()), self.samples), np.float32)
        for number, sample in enumerate(self.data):
            out[:, number] = sample[inside]
        return out

    def blocks(self, inside: np.ndarray, voxels: int = 65536) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the signal inside a mask in blocks, so that a large series need not be in memory twice.

        Yields
        ------
        slice
            Place among the voxels inside the mask.
        ndarray of float32, shape (up to voxels, n)
        """
        inside = np.asarray(inside, bool)
        if inside.shape != self.grid.shape:
            raise GeometryError(f"{self.name}: mask of shape {inside.shape}; expected {self.grid.shape} (z, y, x).")
        places = np.nonzero(inside)
        for start in range(0, len(places[0]), voxels):
            part = slice(start, min(start + voxels, len(places[0])))
            z, y, x = (place[part] for place in places)
            out = np.empty((len(z), self.samples), np.float32)
            for number, sample in enumerate(self.data):
                out[:, number] = sample[z, y, x]
            yield part, out

    def __repr__(self) -> str:
        return f"Series({self.name!r}, {self.kind.value}, {self.samples} samples, {self.grid})"


@dataclass(frozen=True)
class Intake:
    """What was found in a folder of images.

    Parameters
    ----------
    series
        Those that can be used.
    findings
        Why others cannot (errors), and what else was noticed.
    dropped
        Names of header fields that were not kept; never their values.
    """

    series: tuple[Series, ...]
    findings: tuple[Finding, ...] = ()
    dropped: tuple[str, ...] = ()

    def of(self, kind: Kind) -> tuple[Series, ...]:
        """Return the series of one kind."""
        return tuple(series for series in self.series if series.kind is kind)

    def one(self, kind: Kind) -> Series:
        """Return the only series of a kind.

        Raises
        ------
        InputError
            If there is none, with the reasons why series were refused, or more than one.
        """
        found = self.of(kind)
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(series.name for series in found)
            raise InputError(
                f"{len(found)} series are each a {kind.title} ({names}); expected one. Choose one of them."
            )
        refused = " ".join(f"{item.message} {item.remedy}" for item in self.findings if item.severity == "error")
        raise InputError(f"no {kind.title} was found. {refused}".rstrip())


def join(parts: Sequence[Series], kind: Kind, times: np.ndarray | None = None, name: str | None = None) -> Series:
    """Put series of one sample each together, as scanners and converters store flip angles and phases one by one.

    Parameters
    ----------
    parts
        On one grid and with the same TR and TE; in the order wanted.
    kind
        Of the whole.
    times
        (n,), s; needed for a dynamic series.

    Raises
    ------
    GeometryError
        If the parts do not lie on one grid.
    InputError
        If TR or TE differ, or the whole is not what its kind needs.
    """
    if not parts:
        raise InputError(f"join: no series; expected the samples of a {kind.title}.")
    first = parts[0]
    name = name or first.name
    for other in parts[1:]:
        if not other.grid.same_as(first.grid):
            raise GeometryError(
                f"{name}: {other.name} has another geometry ({other.grid}) than {first.name} ({first.grid}), or lies "
                f"elsewhere; expected one grid. Resample one onto the other, or leave it out."
            )
        for field, word in (("tr", "repetition time"), ("te", "echo time")):
            one, two = getattr(first, field), getattr(other, field)
            if (one is None) != (two is None) or (one is not None and abs(one - two) > SAME_TIMING * one):
                raise InputError(
                    f"{name}: {word} {_seconds(two)} in {other.name}, {_seconds(one)} in {first.name}; expected the "
                    f"same in all samples of a {kind.title}. Leave one out."
                )

    if any(part.train != first.train for part in parts):
        raise InputError(
            f"{name}: trains of pulses differ ({', '.join(dict.fromkeys(str(part.train) for part in parts))}); "
            "expected one for all inversion times. Leave one out."
        )

    def together(field: str) -> np.ndarray | None:
        values = [getattr(part, field) for part in parts]
        return None if any(value is None for value in values) else np.concatenate(values)

    return replace(
        first,
        kind=kind,
        data=np.concatenate([part.data for part in parts]),
        times=times,
        b_values=together("b_values"),
        directions=together("directions"),
        flip_angles=together("flip_angles"),
        inversion_times=together("inversion_times"),
        cycles=together("cycles"),
        ceiling=together("ceiling"),
        contrast_agent=next((part.contrast_agent for part in parts if part.contrast_agent), None),
        name=name,
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def _seconds(value: float | None) -> str:
    return "missing" if value is None else f"{value:g} s"


def _set(series: Series, field: str, value: object) -> None:
    object.__setattr__(series, field, value)


def _samples(data: np.ndarray, grid: Grid, name: str) -> np.ndarray:
    array = np.asarray(data)
    if array.dtype.kind not in "fiu":
        raise InputError(f"{name}: values of type {array.dtype}; expected real numbers. Export magnitude images.")
    if array.ndim != 4 or array.shape[0] < 1 or array.shape[1:] != grid.shape:
        raise GeometryError(
            f"{name}: data of shape {array.shape}; expected (samples, {', '.join(map(str, grid.shape))}), samples "
            "before (z, y, x) of the grid."
        )
    array = array.astype(np.float32) if array.dtype != np.float32 else array.view()
    array.setflags(write=False)
    return array


def _per_sample(values: object, count: int, where: str, units: str) -> np.ndarray | None:
    if values is None:
        return None
    try:
        array = np.asarray(values, float)
    except (TypeError, ValueError):
        raise InputError(f"{where}: {values!r}; expected numbers, {units}.") from None
    if array.ndim == 0:
        array = np.broadcast_to(array, (count,))
    if array.shape != (count,):
        raise InputError(
            f"{where}: {array.size} values for {count} samples; expected one per sample, {units}. Complete them, or "
            "leave out the samples without one."
        )
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0]) + 1
        raise InputError(f"{where}: missing or infinite for sample {at}; expected a number, {units}. Complete it.")
    return frozen_array(array, float)


def _unit_vectors(values: object, count: int, where: str) -> np.ndarray | None:
    if values is None:
        return None
    array = np.array(values, float)
    if array.shape != (count, 3) or not np.isfinite(array).all():
        raise InputError(
            f"{where}: shape {array.shape}; expected ({count}, 3) finite numbers, one direction per sample "
            "((0, 0, 0) without one)."
        )
    length = np.linalg.norm(array, axis=1, keepdims=True)
    # Rounded to a few digits in files; anything further from 1 is no direction.
    if ((length > 1e-3) & (np.abs(length - 1) > 0.1)).any():
        raise InputError(f"{where}: a direction of length {float(length.max()):g}; expected 1, or 0 without one.")
    return frozen_array(np.divide(array, length, out=np.zeros_like(array), where=length > 1e-3), float)


def _duration(value: float | None, longest: float, where: str) -> float | None:
    if value is None:
        return None
    value = float(value)
    if not np.isfinite(value) or value <= 0:
        raise InputError(f"{where}: {value:g}; expected seconds above 0. Correct or complete it.")
    if value > longest:
        raise UnitError(f"{where}: {value:g}; expected seconds, at most {longest:g}. Convert ms to s.")
    return value


def _check_b_values(b_values: np.ndarray, name: str) -> None:
    low, high = float(b_values.min()), float(b_values.max())
    if low < 0:
        raise InputError(f"{name}: b-value {low:g} s/mm²; expected 0 or more. Correct it.")
    if high > 0 and not B_RANGE[0] <= high <= B_RANGE[1]:
        raise UnitError(
            f"{name}: largest b-value {high:g}; expected {B_RANGE[0]:g} to {B_RANGE[1]:g} s/mm². Give the unit "
            "(BValueUnits in a sidecar) or convert (1 ms/µm² = 1000 s/mm², 1 s/m² = 1e-6 s/mm²); units are never "
            "guessed."
        )
