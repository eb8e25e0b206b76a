"""Arterial inputs: population functions, inputs measured in the series, and when the bolus arrives.

Population functions give the concentration in whole blood (mM) at times (s) from the start of their rise; the plasma
concentration that the models take is that of blood divided by 1 - haematocrit. They are objects with `blood(times)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.special import gammaln

from biomodel.errors import InputError

__all__ = [
    "Georgiou",
    "InputFunction",
    "McGrath",
    "Parker",
    "PopulationInput",
    "arrival_time",
    "baseline_samples",
    "check_times",
    "input_from_mask",
    "select_artery",
]

#: Haematocrit in large vessels where none is measured: the middle of the normal range of adults (women 0.36-0.46, men
#: 0.41-0.53).
HAEMATOCRIT = 0.42

#: A mean curve must rise by this many standard deviations of its baseline to count as contrast.
LEAST_RISE = 5.0


def check_times(times: np.ndarray, samples: int, what: str) -> np.ndarray:
    """Sample times (s) as float64.

    Raises
    ------
    InputError
        If they are not finite, not increasing or not as many as the samples.
    """
    found = np.asarray(times, dtype=float)
    if found.shape != (samples,):
        raise InputError(f"{what}: {found.size} times for {samples} samples; expected one time in s for each.")
    if samples < 2 or not np.isfinite(found).all() or (np.diff(found) <= 0).any():
        raise InputError(f"{what}: times must be finite and increase from sample to sample; at least two are needed.")
    return found


def _fraction(haematocrit: float) -> float:
    if not 0 <= haematocrit < 0.8:
        raise InputError(f"haematocrit is {haematocrit}; expected a fraction from 0 to 0.8 (45 % is 0.45).")
    return float(haematocrit)


@dataclass(frozen=True, eq=False)
class InputFunction:
    """Plasma concentration in the artery, linear between the times given.

    Parameters
    ----------
    times : ndarray, shape (m,)
        s, on the clock of the tissue's series; steps may differ.
    plasma : ndarray, shape (m,) or (voxels, m)
        mM. Shared by all voxels, or one for each.
    """

    times: np.ndarray
    plasma: np.ndarray

    def __post_init__(self) -> None:
        plasma = np.ascontiguousarray(self.plasma, dtype=float)
        times = check_times(self.times, plasma.shape[-1] if plasma.ndim else 0, "arterial input")
        if plasma.ndim > 2 or not np.isfinite(plasma).all():
            raise InputError("arterial input: concentrations must be finite, of shape (times,) or (voxels, times).")
        if (plasma.max(-1) <= 0).any():
            raise InputError("arterial input: no contrast agent in it (its largest concentration is not positive).")
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "plasma", plasma)

    @classmethod
    def from_blood(cls, times: np.ndarray, blood: np.ndarray, haematocrit: float = HAEMATOCRIT) -> InputFunction:
        """From the concentration in whole blood: the agent stays out of the cells."""
        return cls(times, np.asarray(blood, dtype=float) / (1 - _fraction(haematocrit)))

    @classmethod
    def of(
        cls, population: PopulationInput, end: float, haematocrit: float = HAEMATOCRIT, step: float = 0.5
    ) -> InputFunction:
        """A population input from 0 to `end` s, given every `step` s, finer than any scanner samples its bolus."""
        if not (np.isfinite(end) and 0 < step < end):
            raise InputError(f"arterial input: from 0 to {end:g} s in steps of {step:g} s; expected 0 < step < end.")
        times = np.append(np.arange(0.0, end, step), end)
        return cls.from_blood(times, population.blood(times), haematocrit)

    @property
    def shared(self) -> bool:
        """Whether all voxels have the same input."""
        return self.plasma.ndim == 1

    def at(self, times: np.ndarray) -> np.ndarray:
        """Plasma concentration (n,) or (voxels, n): 0 before the first time, constant after the last."""
        rows = np.atleast_2d(self.plasma)
        found = np.stack([np.interp(times, self.times, row, left=0.0) for row in rows])
        return found[0] if self.shared else found


class PopulationInput(Protocol):
    """An input known from other people."""

    def blood(self, times: np.ndarray) -> np.ndarray:
        """Concentration in whole blood, mM, at times in s from the start of the rise."""
        ...


def _check_seconds(times: np.ndarray) -> np.ndarray:
    found = np.asarray(times, dtype=float)
    if not np.isfinite(found).all():
        raise InputError("arterial input: times must be finite.")
    return found


@dataclass(frozen=True)
class Parker:
    """Mean of 67 inputs of 23 cancer patients after 0.1 mmol/kg at 3 mL/s.

    Two Gaussians and an exponential modulated by a sigmoid. Parker et al. 2006, Magn Reson Med 56:993,
    doi:10.1002/mrm.21066, table 1.

    Parameters
    ----------
    arrival
        When the function starts, s. Before it there is no contrast agent.
    scale
        Factor, for another dose.
    """

    arrival: float = 0.0
    scale: float = 1.0

    def blood(self, times: np.ndarray) -> np.ndarray:
        t = (_check_seconds(times) - self.arrival) / 60
        first = 0.809 / (0.0563 * np.sqrt(2 * np.pi)) * np.exp(-((t - 0.17046) ** 2) / (2 * 0.0563**2))
        second = 0.330 / (0.132 * np.sqrt(2 * np.pi)) * np.exp(-((t - 0.365) ** 2) / (2 * 0.132**2))
        with np.errstate(over="ignore"):
            late = 1.050 * np.exp(-0.1685 * t) / (1 + np.exp(-38.078 * (t - 0.483)))
        return np.where(t >= 0, self.scale * (first + second + late), 0.0)


@dataclass(frozen=True)
class Georgiou:
    """Population input with recirculation, from 5 minutes sampled every 0.1 s after 0.1 mmol/kg.

    Sum of three exponentials times a chain of gamma variates. Georgiou et al. 2019, Magn Reson Med 81:1839,
    doi:10.1002/mrm.27524 (the form is that of Horsfield et al. 2009, Phys Med Biol 54:2933,
    doi:10.1088/0031-9155/54/9/023). Table 3 of the paper rounds its parameters to two or three digits, which moves the
    curve by up to 0.08 mM; these are the ones that give the paper's own table of values (supplement) to 3e-5 mM, found
    by least squares.

    Parameters
    ----------
    arrival
        When the function starts, s.
    scale
        Factor, for another dose.
    """

    arrival: float = 0.0
    scale: float = 1.0

    def blood(self, times: np.ndarray) -> np.ndarray:
        t = np.maximum((_check_seconds(times) - self.arrival) / 60, 0.0)
        alpha, beta, tau = _GEORGIOU[6:]
        chain = np.zeros_like(t)
        for turn in range(int(t.max() / tau) + 1 if t.size else 0):
            since, power = t - turn * tau, (turn + 1) * alpha + turn
            ok = since > 0
            log = power * np.log(since[ok]) - since[ok] / beta - (power + 1) * np.log(beta) - gammaln(power + 1)
            chain[ok] += np.exp(log)
        decay = sum(a * np.exp(-m * t) for a, m in zip(_GEORGIOU[0:6:2], _GEORGIOU[1:6:2], strict=True))
        return self.scale * decay * chain


#: A1, m1, A2, m2, A3, m3 (mM, 1/min), α, β (min), τ (min). Rounded they are table 3 of Georgiou et al. 2019.
_GEORGIOU = (0.37432171, 0.11270067, 0.33118441, 1.17464623, 10.06122581, 16.01996202, 5.26698902, 0.03207883, 0.128556)


@dataclass(frozen=True)
class McGrath:
    """Rat, 0.1 mmol/kg of gadopentetate: a linear rise of 7 s and two exponentials.

    McGrath et al. 2009, Magn Reson Med 61:1173, doi:10.1002/mrm.21959, table 1, model B.

    Parameters
    ----------
    arrival
        When the rise starts, s.
    scale
        Factor, for another dose.
    """

    arrival: float = 0.0
    scale: float = 1.0

    def blood(self, times: np.ndarray) -> np.ndarray:
        t = _check_seconds(times) - self.arrival
        since = np.maximum(t - 7.0, 0.0)
        fall = 3.4 * np.exp(-0.045 * since) + 1.81 * np.exp(-0.0015 * since)
        return self.scale * fall * np.clip(t / 7.0, 0.0, 1.0)


def arrival_time(curves: np.ndarray, times: np.ndarray) -> np.ndarray:
    """When curves leave their baseline: a constant that turns into a parabola, by least squares.

    The break may lie between samples: quarter steps are tried. Cheong, Koh and Hou 2003, Phys Med Biol 48:N83,
    doi:10.1088/0031-9155/48/5/403, with the samples up to half of the peak instead of the whole rise, since tissue
    goes on filling for minutes after the bolus, which no parabola describes.

    Parameters
    ----------
    curves : ndarray, shape (voxels, n)
        Signal or concentration.
    times : ndarray, shape (n,)
        s.

    Returns
    -------
    ndarray, shape (voxels,)
        s; NaN for curves that are not finite, never rise, or are at half of their peak within the first two samples.
    """
    data = np.atleast_2d(np.asarray(curves, dtype=float))
    t = check_times(times, data.shape[1], "bolus arrival")
    found = np.full(len(data), np.nan)
    ok = np.isfinite(data).all(1)
    sound = np.where(ok[:, None], data, 0.0)
    half = 0.5 * (sound[:, :2].mean(1) + sound.max(1))
    peaks = np.where(ok & (sound.max(1) > sound[:, :2].mean(1)), np.argmax(sound >= half[:, None], axis=1), 0)
    for peak in np.unique(peaks[peaks >= 2]):
        rows = np.flatnonzero(ok & (peaks == peak))
        here, y = t[: peak + 1], data[rows, : peak + 1]
        best = np.full(len(rows), np.inf)
        for k in range(peak):
            for part in (0.0, 0.25, 0.5, 0.75):
                start = t[k] + part * (t[k + 1] - t[k])
                after = np.maximum(here - start, 0.0) / (here[-1] - start)
                # A parabola of two terms needs two points after the break besides.
                design = np.stack([np.ones_like(here), after, after**2][: 3 if (after > 0).sum() > 2 else 2], 1)
                basis = np.linalg.qr(design)[0]
                left = (y**2).sum(1) - ((y @ basis) ** 2).sum(1)
                better = left < best * (1 - 1e-9)
                best[better], found[rows[better]] = left[better], start
        found[rows[np.ptp(y, axis=1) == 0]] = np.nan
    return found


def baseline_samples(curve: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Indices of the samples before the agent arrives, from a mean curve.

    Parameters
    ----------
    curve : ndarray, shape (n,)
        Mean signal or concentration of enhancing tissue or of the artery.
    times : ndarray, shape (n,)
        s.

    Raises
    ------
    InputError
        If the curve does not rise (no bolus in the series) or has risen at its second sample already (no baseline).
    """
    data = np.asarray(curve, dtype=float)
    t = check_times(times, data.size, "DCE series")
    if not np.isfinite(data).all():
        raise InputError("DCE series: the mean curve is not finite; leave out voxels that are not.")
    arrival = arrival_time(data, t)[0]
    if not np.isfinite(arrival):
        if np.ptp(data) > 0:
            raise InputError(
                "DCE series: the curve is at its height in its first two images: there is no baseline before the bolus."
            )
        raise InputError("DCE series: the curve does not rise: no bolus within the series. Check times and injection.")
    before = np.flatnonzero(t <= arrival)
    if before.size < 2:
        raise InputError(
            f"DCE series: the agent arrives {arrival - t[0]:.1f} s after the first image; expected a baseline of two "
            "images or more. Give the signal before contrast from another image, as the baseline sample."
        )
    sd = data[before].std(ddof=1)
    rise = data.max() - data[before].mean()
    if data[-max(data.size // 4, 1) :].mean() < data[before].mean() - 0.1 * rise:
        raise InputError(
            "DCE series: the curve ends below where it starts, so that its first images are no baseline: contrast "
            "agent was there before."
        )
    if rise < LEAST_RISE * sd:
        raise InputError(
            "DCE series: the curve does not rise above the noise of its baseline: no bolus within the series."
        )
    return before


def input_from_mask(
    concentrations: np.ndarray, mask: np.ndarray, times: np.ndarray, haematocrit: float = HAEMATOCRIT
) -> InputFunction:
    """Mean input over the voxels of a mask.

    Parameters
    ----------
    concentrations : ndarray, shape (voxels, n)
        mM, in whole blood, as :func:`biomodel.imaging.concentration.concentration` gives it.
    mask : ndarray of bool, shape (voxels,)
    times : ndarray, shape (n,)
        s.

    Raises
    ------
    InputError
        If no voxel of the mask has a finite curve, or the mean never rises.
    """
    data, inside = np.asarray(concentrations, dtype=float), np.asarray(mask, dtype=bool)
    if data.ndim != 2 or inside.shape != data.shape[:1]:
        raise InputError(f"arterial input: mask of shape {inside.shape} for curves of shape {data.shape}.")
    rows = inside & np.isfinite(data).all(1)
    if not rows.any():
        raise InputError(f"arterial input: none of the {inside.sum()} voxels of the mask has a finite curve.")
    mean = data[rows].mean(0)
    baseline_samples(mean, times)
    return InputFunction.from_blood(times, mean, haematocrit)


def select_artery(
    concentrations: np.ndarray, times: np.ndarray, *, largest: float = 0.05, smoothest: float = 0.75, clusters: int = 5
) -> np.ndarray:
    """Voxels that look like artery: large, smooth, early and sharp curves.

    The voxels of the largest areas under the curve, of them the smoothest (late, where the bolus is over), are put into
    clusters by shape; the cluster with the highest mean peak per time to peak is taken. After Mouridsen et al. 2006,
    Magn Reson Med 55:524, doi:10.1002/mrm.20759 (for the first pass of DSC, with the roughness of the whole curve and
    the least first moment; recirculation and washout of DCE move the moment, so the slope to the peak replaces it).

    Parameters
    ----------
    concentrations : ndarray, shape (voxels, n)
        mM. Voxels that are not finite are left out.
    times : ndarray, shape (n,)
        s.
    largest, smoothest
        Parts of the voxels that are kept in the first two steps.
    clusters
        Number of clusters.

    Returns
    -------
    ndarray of bool, shape (voxels,)

    Raises
    ------
    InputError
        If fewer than ten voxels are left to choose from, or the chosen ones never rise.
    """
    data = np.asarray(concentrations, dtype=float)
    t = check_times(times, data.shape[1] if data.ndim == 2 else 0, "arterial input")
    whole = np.flatnonzero(np.isfinite(data).all(1))
    area = np.trapezoid(data[whole], t, axis=1)
    whole, area = whole[area > 0], area[area > 0]
    count = min(max(int(len(whole) * largest), 10), len(whole))
    if count < 10:
        raise InputError(
            f"arterial input: {count} voxels with contrast agent; expected ten or more to choose from. Give a mask."
        )
    order = np.argsort(area)[-count:]
    shapes = data[whole[order]] / area[order][:, None]
    # Squared second derivatives of the second half of the series, where true curves are smooth: a bolus is not.
    bend = np.diff(np.diff(shapes, axis=1) / np.diff(t), axis=1)[:, len(t) // 2 :]
    rough = (bend**2).sum(1)
    keep = np.argsort(rough)[: max(int(count * smoothest), 5)]
    chosen, shapes = whole[order][keep], shapes[keep]
    centres, label = kmeans2(shapes, min(clusters, len(shapes)), minit="++", rng=0, missing="warn")
    best, value = 0, -np.inf
    for c in np.unique(label):
        mean = data[chosen[label == c]].mean(0)
        peak = int(mean.argmax())
        begin = arrival_time(mean, t)[0]
        sharp = mean[peak] / max(t[peak] - (begin if np.isfinite(begin) else t[0]), np.diff(t).min())
        if sharp > value:
            best, value = c, sharp
    mask = np.zeros(len(data), dtype=bool)
    mask[chosen[label == best]] = True
    baseline_samples(data[mask].mean(0), t)
    return mask
