"""The images of one visit from which regions are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from biomodel.errors import GeometryError, InputError
from biomodel.imaging.aif import check_times
from biomodel.imaging.dce.semiquantitative import EARLY, LATE

__all__ = ["Exam"]


@dataclass(frozen=True, eq=False)
class Exam:
    """Three T1-weighted images around a contrast agent's arrival, and an ADC map where there is one.

    Parameters
    ----------
    before, early, late : ndarray, shape (z, y, x)
        Signal before the agent, about 2.5 min and about 7.5 min after it, as in ACRIN 6657 / I-SPY 1 (Hylton et al.
        2012, Radiology 263:663, doi:10.1148/radiol.12110748); any units, the same for all three.
    spacing : (float, float, float)
        Voxel sides (dz, dy, dx), mm.
    adc : ndarray, shape (z, y, x), optional
        mm²/s, on the same grid; NaN where it is not known.

    Raises
    ------
    GeometryError
        If the images differ in shape or the spacing is not three positive numbers.
    InputError
        If an image has no finite signal.
    """

    before: np.ndarray
    early: np.ndarray
    late: np.ndarray
    spacing: tuple[float, float, float]
    adc: np.ndarray | None = None

    def __post_init__(self) -> None:
        images = {"before": self.before, "early": self.early, "late": self.late}
        if self.adc is not None:
            images["adc"] = self.adc
        shape = np.shape(self.before)
        if len(shape) != 3 or any(np.shape(image) != shape for image in images.values()):
            found = ", ".join(f"{name} {np.shape(image)}" for name, image in images.items())
            raise GeometryError(f"Exam: {found}; expected one shape (z, y, x). Resample the images to one grid first.")
        spacing = tuple(float(step) for step in self.spacing)
        if len(spacing) != 3 or not all(np.isfinite(step) and step > 0 for step in spacing):
            raise GeometryError(f"Exam: spacing {self.spacing}; expected three positive numbers (dz, dy, dx) in mm.")
        for name, image in images.items():
            values = np.asarray(image, np.float32)
            if not (np.isfinite(values) & (values > 0)).any():
                raise InputError(f"Exam: the image '{name}' has no positive signal. Check what was handed over.")
            object.__setattr__(self, name, values)
        object.__setattr__(self, "spacing", spacing)

    @classmethod
    def of_series(
        cls,
        data: np.ndarray,
        times: np.ndarray,
        baseline: Sequence[int] | np.ndarray,
        spacing: tuple[float, float, float],
        *,
        arrival: float | None = None,
        early: float = EARLY,
        late: float = LATE,
        adc: np.ndarray | None = None,
    ) -> Exam:
        """Take the three images out of a dynamic series: the mean of the baseline, and the nearest to both times.

        Parameters
        ----------
        data : ndarray, shape (n, z, y, x)
        times : ndarray, shape (n,)
            s.
        baseline : sequence of int
            Samples before the agent arrives.
        spacing, adc
            As for the class.
        arrival
            When the agent arrives, s on the same clock; the last baseline sample's time by default.
        early, late
            s after arrival.

        Raises
        ------
        InputError
            If there is no baseline, or the series ends before the late image (by more than half a step).
        """
        values = np.asarray(data)
        if values.ndim != 4:
            raise InputError(f"Exam: series of shape {values.shape}; expected (n, z, y, x).")
        t = check_times(times, len(values), "Exam")
        samples = np.asarray(baseline, dtype=int)
        if samples.size == 0:
            raise InputError("Exam: no baseline samples; a DCE series needs an image before the agent arrives.")
        begin = float(t[samples.max()]) if arrival is None else float(arrival)
        if not 0 < early < late:
            raise InputError(f"Exam: early {early:g} s and late {late:g} s; expected 0 < early < late.")
        if begin + late > t[-1] + (t[-1] - t[-2]) / 2:
            raise InputError(
                f"Exam: the series ends {t[-1] - begin:g} s after the agent arrives; expected an image at {late:g} s. "
                "Choose an earlier late image if the protocol is shorter; thresholds of the ratio change with it."
            )
        first, last = (int(np.abs(t - begin - after).argmin()) for after in (early, late))
        if first in samples or first == last:
            raise InputError("Exam: the series is too coarse in time: before, early and late are not three images.")
        # Where a sample shows nothing, as at the rim after motion was corrected, the others of the baseline speak.
        base = values[samples]
        known = np.isfinite(base)
        before = np.where(known, base, 0).sum(0) / np.maximum(known.sum(0), 1)
        return cls(np.where(known.any(0), before, np.nan), values[first], values[last], spacing, adc)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels (z, y, x)."""
        z, y, x = self.before.shape
        return z, y, x

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel, mm³."""
        return float(np.prod(self.spacing))

    @property
    def sound(self) -> np.ndarray:
        """Bool (z, y, x): where all three images are finite and the first is positive."""
        finite = np.isfinite(self.before) & np.isfinite(self.early) & np.isfinite(self.late)
        return finite & (self.before > 0)

    def mask(self, mask: np.ndarray, what: str) -> np.ndarray:
        """Return a mask as bool after checking that it fits.

        Raises
        ------
        GeometryError
            If it has another shape.
        InputError
            If no voxel of it has signal.
        """
        inside = np.asarray(mask)
        if inside.shape != self.shape:
            raise GeometryError(f"{what}: mask of shape {inside.shape}; the images have {self.shape}.")
        inside = inside.astype(bool)
        if not (inside & self.sound).any():
            raise InputError(f"{what}: the mask holds no voxel with signal. Is it the mask of this visit?")
        return inside
