"""Diffusion weightings: what makes a series usable, and the average over directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from biomodel.errors import GeometryError, InputError, UnitError
from biomodel.imaging.series import B_RANGE

__all__ = ["TraceSeries", "check_b_values", "trace_series"]

#: Two b-values closer than this are one weighting, s/mm²: scanners report b with the imaging gradients' share, which
#: differs by a few s/mm² between directions.
SAME_B = 5.0
#: Up to this b (s/mm²) an image counts as without diffusion weighting.
UNWEIGHTED = SAME_B
#: Largest b-values outside this range are in other units than s/mm².
PLAUSIBLE = B_RANGE
#: Largest deviation of mean(g gᵀ) from a third of the identity at which an average over directions is the trace.
ISOTROPY = 0.02


def check_b_values(b_values: np.ndarray, samples: int, least: int, what: str) -> np.ndarray:
    """Check the b-values of a series.

    Parameters
    ----------
    b_values : array_like, shape (samples,)
        s/mm².
    samples : int
        Number of images that the series has.
    least : int
        Different b-values that the model needs (repeated ones count once).
    what : str
        Name of the model, for messages.

    Returns
    -------
    ndarray of float, shape (samples,)

    Raises
    ------
    InputError
        If a b-value is missing (NaN), infinite or negative, if there is not one per image, or too few differ.
    UnitError
        If the largest is no diffusion weighting in s/mm². Units are never converted by guess.
    """
    try:
        b = np.atleast_1d(np.asarray(b_values, float))
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: b-values {b_values!r}; expected one number per image, s/mm².") from error
    if b.ndim != 1 or len(b) != samples:
        raise InputError(
            f"{what}: {b.size} b-values for {samples} images; expected one per image. Check the series' b-values."
        )
    for bad, name in ((~np.isfinite(b), "missing"), (b < 0, "negative")):
        if bad.any():
            places = ", ".join(map(str, np.flatnonzero(bad)[:10] + 1))
            raise InputError(
                f"{what}: b-value {name} for image {places}; expected a number from 0 up for every image, s/mm². "
                "Complete the b-values or leave those images out."
            )
    distinct = np.unique(b)
    if len(distinct) < least:
        raise InputError(
            f"{what}: {len(distinct)} different b-value{'s' * (len(distinct) != 1)} "
            f"({', '.join(f'{v:g}' for v in distinct)} s/mm²); expected at least {least}. Use a series with more "
            "diffusion weightings, or a model with fewer parameters."
        )
    if not PLAUSIBLE[0] <= b.max() <= PLAUSIBLE[1]:
        raise UnitError(
            f"{what}: largest b-value {b.max():g} s/mm²; expected {PLAUSIBLE[0]:g} to {PLAUSIBLE[1]:g} s/mm². Convert "
            "the b-values (1 ms/µm² = 1000 s/mm²; 1 s/m² = 1e-6 s/mm²); units are never guessed."
        )
    return b


@dataclass(frozen=True, eq=False)
class TraceSeries:
    """A series averaged over directions.

    Attributes
    ----------
    signal : ndarray, shape (voxels, weightings)
    b_values : ndarray, shape (weightings,)
        s/mm², ascending.
    averages : ndarray, shape (weightings,)
        Images behind each of them: the variance of a sample falls as one over this.
    """

    signal: np.ndarray
    b_values: np.ndarray
    averages: np.ndarray


def trace_series(
    signal: np.ndarray, b_values: np.ndarray, directions: np.ndarray, *, same_b: float = SAME_B
) -> TraceSeries:
    """Average a series over its directions at each b-value.

    The geometric mean over directions that are spread evenly is the signal of a third of the tensor's trace, so that
    the ADC fitted to it does not depend on how the tissue lies (Basser, Mattiello and LeBihan 1994, J Magn Reson B
    103:247). Images without weighting are averaged arithmetically.

    Parameters
    ----------
    signal : ndarray, shape (voxels, samples)
    b_values : ndarray, shape (samples,)
        s/mm².
    directions : ndarray, shape (samples, 3)
        Gradient directions; of any length and ignored (zero, NaN) where b is 0. They need three or more axes whose mean
        of g gᵀ is a third of the identity: three perpendicular ones, or a shell.
    same_b : float
        b-values that differ by less are one weighting (s/mm²).

    Returns
    -------
    TraceSeries
        A voxel with a zero or negative image at a b-value has 0 there, one with NaN has NaN.

    Raises
    ------
    InputError
        If directions are missing, or do not average to the trace at some b-value.
    """
    signal = as_signal(signal, "trace")
    b = check_b_values(b_values, signal.shape[1], 1, "trace")
    g = np.asarray(directions, float)
    if g.shape != (len(b), 3):
        raise InputError(f"trace: directions of shape {g.shape}; expected ({len(b)}, 3), one direction per image.")
    order = np.argsort(b, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(b[order]) > same_b) + 1)
    columns, values, counts = [], [], []
    for group in groups:
        level = float(b[group].mean())
        data = signal[:, group].astype(float, copy=False)
        if level <= UNWEIGHTED:
            columns.append(data.mean(1))
        else:
            length = np.linalg.norm(g[group], axis=1)
            if not (np.isfinite(length) & (length > 0)).all():
                raise InputError(
                    f"trace: direction missing at b = {level:g} s/mm²; expected one for every weighted image. "
                    "If the scanner has averaged the directions already, fit without directions."
                )
            unit = g[group] / length[:, None]
            spread = unit.T @ unit / len(group) - np.eye(3) / 3
            if np.abs(spread).max() > ISOTROPY:
                raise InputError(
                    f"trace: {len(group)} direction(s) at b = {level:g} s/mm² are not spread evenly (mean of g gᵀ is "
                    f"off a third of the identity by {np.abs(spread).max():.2g}); expected three perpendicular ones "
                    "or a shell. Add the missing directions or leave this b-value out."
                )
            with np.errstate(divide="ignore", invalid="ignore"):
                mean = np.exp(np.log(np.maximum(data, 0.0)).mean(1))  # log 0 = -inf gives 0
            columns.append(np.where(np.isnan(data).any(1), np.nan, mean))
        values.append(level)
        counts.append(len(group))
    return TraceSeries(np.stack(columns, 1), np.array(values), np.array(counts, float))


def as_signal(signal: np.ndarray, what: str) -> np.ndarray:
    """Check the shape of a signal; float32 and float64 stay as they are."""
    array = np.asarray(signal)
    if array.dtype.kind not in "fiu":
        raise InputError(f"{what}: signal of type {array.dtype}; expected real numbers (magnitude images).")
    if array.ndim != 2 or array.shape[1] == 0:
        raise GeometryError(f"{what}: signal of shape {array.shape}; expected (voxels, samples).")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    return np.ascontiguousarray(array)
