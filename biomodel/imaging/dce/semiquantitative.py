"""What is read off a DCE curve without a model, and the functional tumour volume.

Relative enhancement is (S - S0)/S0 with S0 the mean of the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import convolve as stencil

from biomodel.errors import InputError
from biomodel.imaging.aif import check_times
from biomodel.imaging.voxelfit import Code

__all__ = ["Enhancement", "enhancement", "functional_tumour", "functional_tumour_volume"]

#: When the early and the late image are taken, s after the agent arrives: images with the centre of k-space about 2.5
#: and 7.5 minutes after injection, as in ACRIN 6657 / I-SPY 1 (Hylton et al. 2012, Radiology 263:663,
#: doi:10.1148/radiol.12110748).
EARLY, LATE = 150.0, 450.0


@dataclass(frozen=True, eq=False)
class Enhancement:
    """Curve descriptors, (voxels,) each; NaN where `code` is not FITTED, and where the series is too short for one.

    Attributes
    ----------
    auc60, auc90 : ndarray
        Area under the relative enhancement in the first 60 and 90 s after arrival, s (mM s if concentrations were
        given).
    peak : ndarray
        Largest relative enhancement, a fraction (mM).
    time_to_peak : ndarray
        From arrival, s.
    wash_in : ndarray
        Peak over time to peak, 1/s (mM/s).
    wash_out : ndarray
        Slope from the peak to the last sample, 1/s (mM/s): negative where the agent leaves; NaN for a peak at the end.
    early : ndarray
        Relative enhancement at the early time (150 s), a fraction: PE/100 of the I-SPY trials.
    ser : ndarray
        Signal enhancement ratio (S_early - S0)/(S_late - S0). Hylton 1999, Magn Reson Imaging Clin N Am 7:411.
    code : ndarray of uint8
        :class:`~biomodel.imaging.voxelfit.Code`.
    """

    auc60: np.ndarray
    auc90: np.ndarray
    peak: np.ndarray
    time_to_peak: np.ndarray
    wash_in: np.ndarray
    wash_out: np.ndarray
    early: np.ndarray
    ser: np.ndarray
    code: np.ndarray


def _area(curves: np.ndarray, times: np.ndarray, begin: float, end: float) -> np.ndarray:
    """Integral from begin to end of curves that are linear between samples; NaN beyond the series."""
    if end > times[-1] or begin < times[0]:
        return np.full(len(curves), np.nan)
    grid = np.unique(np.concatenate([[begin, end], times[(times > begin) & (times < end)]]))
    return np.trapezoid(_at(curves, times, grid), grid, axis=1)


def _at(curves: np.ndarray, times: np.ndarray, where: np.ndarray) -> np.ndarray:
    right = np.clip(np.searchsorted(times, where), 1, len(times) - 1)
    part = (where - times[right - 1]) / (times[right] - times[right - 1])
    return curves[:, right - 1] * (1 - part) + curves[:, right] * part


def enhancement(
    signal: np.ndarray,
    times: np.ndarray,
    baseline: Sequence[int] | np.ndarray,
    *,
    arrival: float | None = None,
    early: float = EARLY,
    late: float = LATE,
    relative: bool = True,
) -> Enhancement:
    """Descriptors of every curve.

    Parameters
    ----------
    signal : ndarray, shape (voxels, n)
        Signal, or concentration with ``relative=False``.
    times : ndarray, shape (n,)
        s.
    baseline : sequence of int
        Samples before the agent arrives.
    arrival
        When it does, s on the same clock; the last baseline sample's time by default.
    early, late
        Times after arrival of the two images of the signal enhancement ratio, s. The nearest samples are taken, as the
        trials do; NaN where the series ends before half a step of the late time.
    relative
        Divide by the baseline. Concentrations have none to divide by.

    Raises
    ------
    InputError
        If there is no baseline, the arrival lies outside the series, or early is not before late.
    """
    data = np.asarray(signal, dtype=float)
    if data.ndim != 2:
        raise InputError(f"enhancement: signal of shape {data.shape}; expected (voxels, samples).")
    t = check_times(times, data.shape[1], "enhancement")
    if len(baseline) == 0:
        raise InputError(
            "enhancement: no baseline samples; a DCE series needs at least one image before the agent arrives."
        )
    samples = np.asarray(baseline, dtype=int)
    begin = float(t[samples.max()]) if arrival is None else float(arrival)
    if not t[0] <= begin < t[-1]:
        raise InputError(f"enhancement: arrival at {begin:g} s lies outside of the series ({t[0]:g} to {t[-1]:g} s).")
    if not 0 < early < late:
        raise InputError(f"enhancement: early {early:g} s and late {late:g} s; expected 0 < early < late.")
    code = np.full(len(data), Code.FITTED, dtype=np.uint8)
    if relative:
        code[(data <= 0).any(1)] = Code.NO_SIGNAL
    code[~np.isfinite(data).all(1)] = Code.NOT_FINITE
    ok = code == Code.FITTED
    curves = np.where(ok[:, None], data, np.nan)
    before = curves[:, samples].mean(1, keepdims=True)
    curves = (curves - before) / before if relative else curves - before
    after = np.flatnonzero(t > begin)
    top = after[np.argmax(np.where(ok[:, None], curves, 0.0)[:, after], axis=1)]
    peak = np.take_along_axis(curves, top[:, None], 1)[:, 0]
    first, last = int(np.abs(t - begin - early).argmin()), int(np.abs(t - begin - late).argmin())
    nothing = np.full(len(data), np.nan)
    reached = begin + early <= t[-1] + (t[-1] - t[-2]) / 2
    at_early = curves[:, first] if reached else nothing
    long_enough = begin + late <= t[-1] + (t[-1] - t[-2]) / 2 and last > first
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = at_early / curves[:, last] if long_enough else nothing
        fall = (curves[:, -1] - peak) / (t[-1] - t[top])
    return Enhancement(
        auc60=_area(curves, t, begin, begin + 60),
        auc90=_area(curves, t, begin, begin + 90),
        peak=peak,
        time_to_peak=np.where(ok, t[top] - begin, np.nan),
        wash_in=peak / (t[top] - begin),
        wash_out=np.where(top < len(t) - 1, fall, np.nan),
        early=at_early,
        ser=np.where(np.isfinite(ratio), ratio, np.nan),
        code=code,
    )


def functional_tumour(
    before: np.ndarray,
    early: np.ndarray,
    late: np.ndarray,
    box: np.ndarray,
    *,
    least_enhancement: float = 0.70,
    least_ratio: float = 0.0,
    background: float = 0.60,
    neighbours: int = 4,
) -> np.ndarray:
    """Functional tumour as in the I-SPY trials: voxels that enhance early, in a box drawn around the tumour.

    A voxel counts if its early enhancement is at least 70 %, its signal enhancement ratio at least `least_ratio`, its
    signal before contrast at least 60 % of the 95th percentile in the box (which leaves out fat-suppressed tissue and
    air), and enough of its 26 neighbours enhance too.

    Parameters
    ----------
    before, early, late : ndarray, shape (z, y, x)
        Signal before contrast, about 2.5 min and about 7.5 min after.
    box : ndarray of bool, shape (z, y, x)
        Where the tumour is looked for, without what the reader omits.
    least_enhancement, least_ratio, background, neighbours
        Thresholds: fractions, a ratio, a fraction and a number of voxels.

    Returns
    -------
    ndarray of bool, shape (z, y, x)

    Notes
    -----
    Enhancement threshold and ratio: Hylton et al. 2012, Radiology 263:663, doi:10.1148/radiol.12110748; both depend on
    the subtype and may be moved (Li et al. 2016, Tomography 2:378). The trial's open
    implementation (3D Slicer extension "Breast DCE-MRI FTV") takes a ratio of 0 or more; a negative ratio means late
    signal below that before contrast.

    Raises
    ------
    InputError
        If shapes differ or nothing in the box has signal.
    """
    a, b, c = (np.asarray(i, dtype=float) for i in (before, early, late))
    inside = np.asarray(box, dtype=bool)
    if not a.shape == b.shape == c.shape == inside.shape or a.ndim != 3:
        raise InputError(
            f"functional tumour: images of {a.shape}, {b.shape}, {c.shape} and a box of {inside.shape}; "
            "expected one 3D shape."
        )
    sound = np.isfinite(a) & np.isfinite(b) & np.isfinite(c) & (a > 0)
    if not (inside & sound).any():
        raise InputError("functional tumour: no voxel of the box has a finite, positive signal before contrast.")
    with np.errstate(divide="ignore", invalid="ignore"):
        enhancing, ratio = (b - a) / a, (b - a) / (c - a)
    bright = (
        sound & inside & (a >= background * np.percentile(a[inside & sound], 95)) & (enhancing >= least_enhancement)
    )
    window = np.ones((3, 3, 3))
    window[1, 1, 1] = 0
    around = stencil(bright.astype(float), window, mode="constant")
    # Late signal equal to that before contrast is a complete wash-out: an infinite ratio, which passes.
    return bright & (around >= neighbours) & ((ratio >= least_ratio) | np.isposinf(ratio))


def functional_tumour_volume(tumour: np.ndarray, spacing: Sequence[float]) -> float:
    """Volume of a functional tumour in cm³, from the voxel sides (dz, dy, dx) in mm."""
    if len(spacing) != 3 or min(spacing) <= 0:
        raise InputError(f"functional tumour: spacing {spacing}; expected three positive voxel sides in mm.")
    return float(np.count_nonzero(tumour) * np.prod(np.asarray(spacing, dtype=float)) / 1000)
