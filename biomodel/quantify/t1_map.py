"""T1 of one visit from whatever it has: flip angles, inversion recovery, inversion-prepared trains, or mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from biomodel.errors import InputError
from biomodel.imaging.series import Kind, Series
from biomodel.imaging.t1 import Acquisition, InversionPrepared, InversionRecovery, SpoiledGradientEcho, fit_t1
from biomodel.imaging.voxelfit import Code, VoxelFit

__all__ = ["T1Map", "acquisitions", "t1_map"]

#: Flip angles below, degrees, read by a train of pulses; 90° read all at once.
TRAIN_ANGLE = 60.0
#: Smoothness of a fitted flip-angle factor, standard deviation in mm: the transmit field varies over many cm.
SMOOTH = 8.0
#: Most voxels in which the flip-angle factor is fitted, evenly chosen; it is smooth.
MOST_FITTED = 20_000


@dataclass(frozen=True, eq=False)
class T1Map:
    """T1 in the voxels of a mask, and the flip-angle factor with which it was fitted.

    Parameters
    ----------
    fit
        Voxels in the mask's order.
    b1
        (z, y, x), true over nominal flip angle; None where it was taken as nominal.
    fitted
        Whether `b1` comes from the same images instead of a measured map.
    method
        In a few words.
    notes
        What was done and assumed, in sentences.
    """

    fit: VoxelFit
    b1: np.ndarray | None
    fitted: bool
    method: str
    notes: tuple[str, ...]


def acquisitions(series: Series) -> list[Acquisition]:
    """Return how the samples of a series for T1 were acquired.

    Raises
    ------
    InputError
        If the series does not say enough, or says what cannot be.
    """
    if series.kind is Kind.VFA:
        assert series.flip_angles is not None and series.tr is not None
        return [SpoiledGradientEcho(float(angle), series.tr, series.te) for angle in series.flip_angles]
    if series.kind is not Kind.INVERSION:
        raise InputError(f"{series.name}: a {series.kind.title}; expected flip angles or inversion times.")
    try:
        return list(_trains(series) if _by_train(series) else _recoveries(series))
    except InputError as error:
        known = str(error).startswith(series.name)
        raise error if known else type(error)(f"{series.name}: {error}") from None


def _by_train(series: Series) -> bool:
    angles = series.flip_angles
    return series.train is not None or (angles is not None and float(angles.max()) < TRAIN_ANGLE)


def _recoveries(series: Series) -> list[Acquisition]:
    assert series.inversion_times is not None
    repetition = np.full(series.samples, series.tr) if series.cycles is None else series.cycles
    return [
        InversionRecovery(float(time), None if cycle is None else float(cycle))
        for time, cycle in zip(series.inversion_times, repetition, strict=True)
    ]


def _trains(series: Series) -> list[Acquisition]:
    train, times, cycles, angles = series.train, series.inversion_times, series.cycles, series.flip_angles
    assert times is not None
    missing = [
        what
        for what, value in (
            ("number of pulses (NumberShots, with RepetitionTimeExcitation)", train),
            ("flip angle (FlipAngle)", angles),
            ("time from inversion to inversion (RepetitionTimePreparation)", cycles),
        )
        if value is None
    ]
    if train is None or cycles is None or angles is None:
        shown = "" if angles is None else f", flip angle {angles.max():g}°,"
        raise InputError(
            f"{series.name}: inversion-prepared{shown} and so read by a train of pulses after each inversion, but "
            f"without {' and '.join(missing)}; T1 cannot be told without. Give it in the sidecar, or the whole as "
            "'inversion_train' of the visit in study.json."
        )
    found: list[Acquisition] = []
    for time, cycle, angle in zip(times, cycles, angles, strict=True):
        first = float(time) - train.lead
        if first <= 0:
            raise InputError(
                f"{series.name}: inversion time {time:g} s, and the centre of k-space is read {train.lead:.4g} s after "
                f"the first of {train.pulses} pulses, so that these would begin before the inversion; expected more "
                f"than {train.lead:.4g} s. Where the scanner counts to the first pulse, say so in study.json "
                "(inversion_train: 'inversion_time_to': 'first pulse'); else correct pulses, spacing or centre."
            )
        delay = float(cycle) - first - train.length
        if delay < -1e-3:
            raise InputError(
                f"{series.name}: {cycle:g} s from inversion to inversion, but the inversion time and a train of "
                f"{train.pulses} pulses take {first + train.length:.4g} s; expected more. Correct one of them."
            )
        found.append(InversionPrepared(first, float(angle), train.spacing, train.pulses, max(delay, 0.0), train.centre))
    return found


def t1_map(series: Sequence[Series], inside: np.ndarray, b1: np.ndarray | None = None) -> T1Map:
    """Fit T1 to all series of a visit that tell it.

    Series read by trains and flip angles share a scale and are fitted together, with the flip-angle factor where that
    was not measured (DESPOT1-HIFI, Deoni 2007, doi:10.1002/jmri.21130), smoothed, as the transmit field is smooth.
    Images read by 90° pulses have a scale of their own: where there are three or more they are fitted alone, since they
    need no flip angle.

    Parameters
    ----------
    series
        Of flip angles and inversion times, on one grid.
    inside
        bool (z, y, x).
    b1
        Measured flip-angle factor (z, y, x).

    Raises
    ------
    InputError
        If there are too few images, or their headers say too little.
    """
    notes: list[str] = []
    parts = [(one, acquisitions(one)) for one in series]
    alone = [pair for pair in parts if isinstance(pair[1][0], InversionRecovery)]
    together = [pair for pair in parts if pair not in alone]
    if alone and together:
        recovery = sum(len(kinds) for _, kinds in alone) >= 3
        left, parts = (together, alone) if recovery else (alone, together)
        notes.append(f"T1 from {_names(parts)} alone: {_names(left)} left out, whose signal has another scale.")
    if not parts:
        raise InputError("T1: no series; expected flip angles or inversion times.")
    kinds = [kind for _, found in parts for kind in found]
    signal = np.concatenate([one.signal(inside) for one, _ in parts], 1)
    echoes = sum(isinstance(kind, SpoiledGradientEcho) for kind in kinds)
    trains = sum(isinstance(kind, InversionPrepared) for kind in kinds)
    blind = echoes + trains == 0  # of flip angles: nothing to correct
    factor = None if b1 is None or blind else np.where(np.isfinite(b1), b1, 1.0)
    fitted = b1 is None and trains > 0 and len(set(kinds)) >= 4
    if fitted:
        factor, spread = _factor(signal, kinds, inside, parts[0][0].grid.spacing)
        notes.append(
            "True over nominal flip angle was fitted together with T1 and smoothed: "
            f"median {np.median(factor[inside]):.2f}, middle 95 % {spread[0]:.2f} to {spread[1]:.2f}; T1's errors do "
            "not hold its error."
        )
    elif b1 is None and not blind:
        notes.append("No B1 map: flip angles are taken as nominal, so T1 and concentrations may be off by it.")
    fit = fit_t1(signal, kinds, b1=None if factor is None else factor[inside])
    if any(one.kind is Kind.INVERSION and one.flip_angles is None for one, _ in parts):
        notes.append("The inversion recovery states no flip angle; read-out by 90° pulses was taken.")
    # A measured factor serves the concentrations, also where T1 did without.
    kept = factor if factor is not None or b1 is None else np.where(np.isfinite(b1), b1, 1.0)
    how = "" if kept is None else (", B1 fitted" if fitted else ", B1")
    return T1Map(fit, kept, fitted, f"nonlinear least squares, {_names(parts)}{how}", tuple(notes))


def _names(parts: Sequence[tuple[Series, list[Acquisition]]]) -> str:
    return " and ".join(dict.fromkeys(one.kind.title for one, _ in parts))


def _factor(
    signal: np.ndarray, kinds: list[Acquisition], inside: np.ndarray, spacing: tuple[float, ...]
) -> tuple[np.ndarray, tuple[float, float]]:
    """The flip-angle factor, smooth (z, y, x), and its range in the mask."""
    chosen = np.arange(0, len(signal), max(1, -(-len(signal) // MOST_FITTED)))
    rough = fit_t1(signal[chosen], kinds, fit_b1=True)
    sound = (rough.code == Code.FITTED) & np.isfinite(rough.sd("B1")) & (rough.sd("B1") > 0)
    if not sound.any():
        raise InputError(
            "T1: the flip-angle factor could not be fitted in any voxel. Check that pulses, spacing and inversion "
            "times are those of the scan, and that all series share one scale; or give a B1 map."
        )
    place = tuple(index[chosen[sound]] for index in np.nonzero(inside))
    # A floor keeps a few voxels with nearly no residual from deciding alone.
    sd = np.maximum(rough.sd("B1")[sound], np.median(rough.sd("B1")[sound]))
    weight, sums = np.zeros(inside.shape), np.zeros(inside.shape)
    weight[place] = 1 / sd**2
    sums[place] = rough["B1"][sound] / sd**2
    width = [SMOOTH / step for step in spacing]
    weight, sums = (ndimage.gaussian_filter(values, width, mode="constant") for values in (weight, sums))
    far = weight < 1e-6 * weight.max()
    smooth = np.where(far, np.average(rough["B1"][sound], weights=1 / sd**2), sums / np.where(far, 1.0, weight))
    low, high = np.quantile(smooth[inside], [0.025, 0.975])
    return smooth, (float(low), float(high))
