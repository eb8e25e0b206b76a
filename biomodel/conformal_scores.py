"""Conformal scores: where values lie in their forecasts, and their distribution over a cohort.

A forecast's own draws say where a value lies among them, on whatever scale; beyond them the scale decides how far is
far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import ndtr, ndtri

from biomodel.diagnostics_forecasts import Coverage
from biomodel.errors import InputError

__all__ = [
    "SCALES",
    "CubeRoot",
    "GroupScores",
    "Identity",
    "Logarithm",
    "Scale",
    "fewest",
    "map_coverage",
    "quantile_crps",
    "score_ends",
    "scores",
    "values_at",
]

#: Most scores kept of a group; a map's are thinned to as many, on the safe side.
KEPT = 2000
#: Score below all others, of a value at the end of its scale.
FLOOR = -1e9
#: Score of the upper quartile.
QUARTILE = float(ndtri(0.75))


class Scale(Protocol):
    """An increasing function and its inverse; no value lies below `lowest`."""

    @property
    def lowest(self) -> float: ...

    def forward(self, values: np.ndarray) -> np.ndarray: ...

    def back(self, values: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Identity:
    """The values themselves; for cell fractions."""

    lowest: float = 0.0

    def forward(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values, float)

    def back(self, values: np.ndarray) -> np.ndarray:
        return np.maximum(values, self.lowest)


@dataclass(frozen=True)
class CubeRoot:
    """Cube root, as a diameter: an edge drawn a voxel too far out is the same error in large and small tumours."""

    @property
    def lowest(self) -> float:
        return 0.0

    def forward(self, values: np.ndarray) -> np.ndarray:
        return np.cbrt(values)

    def back(self, values: np.ndarray) -> np.ndarray:
        return np.maximum(values, 0.0) ** 3


@dataclass(frozen=True)
class Logarithm:
    """log(value + floor): relative errors above the floor.

    Parameters
    ----------
    floor : float
        In the values' unit, more than 0.
    """

    floor: float

    def __post_init__(self):
        if not self.floor > 0:
            raise InputError(f"Logarithm: floor is {self.floor}; expected more than 0, e.g. the least volume measured.")

    @property
    def lowest(self) -> float:
        return 0.0

    def forward(self, values: np.ndarray) -> np.ndarray:
        return np.log(np.asarray(values, float) + self.floor)

    def back(self, values: np.ndarray) -> np.ndarray:
        return np.maximum(np.exp(values) - self.floor, 0.0)


#: By the names in files.
SCALES = {kind.__name__: kind for kind in (Identity, CubeRoot, Logarithm)}


def quantile_crps(quantiles: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """CRPS of distributions given by quantiles at the levels (k - 1/2) / S, in any order.

    Twice the mean pinball loss over the levels (Laio and Tamea 2007, doi:10.5194/hess-11-1267-2007); adjusted draws are
    such quantiles, and the fair CRPS of independent draws would flatter them.

    Parameters
    ----------
    quantiles : ndarray, shape (S, ...)
    observed : ndarray, shape (...)

    Returns
    -------
    ndarray, shape (...)
    """
    q = np.sort(np.asarray(quantiles, float), axis=0)
    levels = ((np.arange(len(q)) + 0.5) / len(q)).reshape(-1, *[1] * (q.ndim - 1))
    off = np.asarray(observed, float) - q
    return 2 * np.mean(np.where(off >= 0, levels * off, (levels - 1) * off), axis=0)


def fewest(level: float) -> int:
    """Fewest patients of a group for a central interval at a level: each tail needs one patient beyond it.

    ceil(2 / (1 - level)) - 1, e.g. 39 for 95 %.
    """
    return math.ceil(2 / (1 - level) - 1e-9) - 1


def score_ends(
    draws: np.ndarray, observed: np.ndarray, scale: Scale, least_spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where values lie in their forecasts, as normal quantiles.

    Parameters
    ----------
    draws : ndarray, shape (draws, n)
    observed : ndarray, shape (n,)
    scale : Scale
        On which distances beyond the draws' middle are measured.
    least_spread : float
        What is added to the spread of every forecast (as variances add), on that scale.

    Returns
    -------
    low, high : ndarray, shape (n,)
        Least and largest score whose value (`values_at`) is the one seen; the same but at atoms, where several draws
        are alike, and at the end of the scale (`FLOOR` there). Both increase with the value seen. Between its quartiles
        the forecast decides: draw k of S in their order has the normal quantile of k / (S + 1), linear between. Beyond,
        one more for every spread, that of a normal distribution with these quartiles: forecasts fail in their tails,
        and the outermost draws are too noisy to start from.
    """
    x, knots, spread = _curve(draws, scale, least_spread)
    y, size = scale.forward(np.asarray(observed, float)), len(knots)
    below, upto = (x < y).sum(0), (x <= y).sum(0)
    at, beside = np.clip(below - 1, 0, size - 1), np.clip(upto, 0, size - 1)
    a, b = (np.take_along_axis(x, i[None], 0)[0] for i in (at, beside))
    found = knots[at] + (knots[beside] - knots[at]) * (y - a) / np.where(b > a, b - a, 1.0)
    found = np.where(below == 0, knots[0] + (y - x[0]) / spread, found)
    found = np.where(below == size, knots[-1] + (y - x[-1]) / spread, found)
    atom = upto > below
    low = np.where(atom, knots[np.clip(below, 0, size - 1)], found)
    # At the end of the scale nothing lies below.
    low = np.where(np.asarray(observed) <= scale.lowest, FLOOR, low)
    return low, np.where(atom, knots[np.clip(upto - 1, 0, size - 1)], found)


def scores(draws: np.ndarray, observed: np.ndarray, scale: Scale, least_spread: float, seed: int = 0) -> np.ndarray:
    """One score (n,) for each value: drawn uniformly in probability between its `score_ends` where they differ."""
    low, high = score_ends(draws, observed, scale, least_spread)
    first, last = ndtr(low), ndtr(high)
    drawn = ndtri(np.maximum(first + np.random.default_rng(seed).random(low.shape) * (last - first), 1e-12))
    return np.where(high > low, np.minimum(drawn, high), high)


def _curve(draws: np.ndarray, scale: Scale, least_spread: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values on the scale (k, n) at scores (k,) between the quartiles, rising, and the spread (n,)."""
    x = np.sort(scale.forward(np.asarray(draws, float)), axis=0)
    every = ndtri(np.arange(1, len(x) + 1) / (len(x) + 1))
    knots = np.concatenate(([-QUARTILE], every[np.abs(every) < QUARTILE - 1e-9], [QUARTILE]))
    middle = _between(x, every, knots)
    return middle, knots, np.hypot((middle[-1] - middle[0]) / (2 * QUARTILE), least_spread)


def _between(x: np.ndarray, knots: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Sorted draws (S, n) at scores (k,), linear between and constant beyond, as (k, n)."""
    place = np.clip(np.searchsorted(knots, at, "right") - 1, 0, len(knots) - 2)
    weight = np.clip((at - knots[place]) / (knots[place + 1] - knots[place]), 0.0, 1.0)[:, None]
    # In this form equal draws stay exactly equal.
    return x[place] + weight * (x[place + 1] - x[place])


def values_at(draws: np.ndarray, at: np.ndarray, scale: Scale, least_spread: float) -> np.ndarray:
    """Values (k, n) that have the scores (k,) in forecasts (S, n): the inverse of `scores`."""
    x, knots, spread = _curve(draws, scale, least_spread)
    beyond = np.minimum(at - knots[0], 0.0) + np.maximum(at - knots[-1], 0.0)
    return scale.back(_between(x, knots, at) + beyond[:, None] * spread)


@dataclass(frozen=True)
class GroupScores:
    """Scores of one group of a calibration cohort; each patient counts 1 in all, each of his voxels alike.

    Attributes
    ----------
    patients : int
    values, levels : tuple of float
        Scores (drawn at atoms), rising, and the share of the cohort up to the middle of each.
    lows, below : tuple of float
        Scores at which intervals may start, rising, and how many patients' worth of values lie below each.
    highs, above : tuple of float
        Scores at which intervals may end, rising, and how many patients' worth of values lie above each.
    """

    patients: int
    values: tuple[float, ...]
    levels: tuple[float, ...]
    lows: tuple[float, ...]
    below: tuple[float, ...]
    highs: tuple[float, ...]
    above: tuple[float, ...]

    @classmethod
    def of(cls, ends: Sequence[tuple[np.ndarray, np.ndarray]], drawn: Sequence[np.ndarray]) -> GroupScores:
        """Gather `score_ends` and `scores` of patients, each (voxels,)."""
        n, weight = len(drawn), np.concatenate([np.full(len(d), 1 / len(d)) for d in drawn])
        values, before, after = _cumulated(np.concatenate(drawn), weight)
        # A value is missed below where the interval starts above the largest of its scores, and above likewise.
        lows, below, _ = _cumulated(np.concatenate([e[1] for e in ends]), weight)
        highs, _, upto = _cumulated(np.concatenate([e[0] for e in ends]), weight)
        columns = (values, (before + after) / 2 / n, lows, below, highs, n - upto)
        return cls(n, *(tuple(c.tolist()) for c in columns))

    def interval(self, level: float) -> tuple[float, float]:
        """Scores between which a new patient's lies with probability at least `level`, a half of the rest on each side.

        Raises
        ------
        InputError
            If the group has too few patients for the level.
        """
        if not 0 < level < 1:
            raise InputError(f"conformal interval: level {level}; expected a share between 0 and 1, e.g. 0.9.")
        if self.patients < fewest(level):
            raise InputError(
                f"conformal interval at {level:.4g}: the calibration group has {self.patients} patients; expected at "
                f"least {fewest(level)}. Ask for a lower level (up to {1 - 2 / (self.patients + 1):.3g}), gather more "
                "patients, or merge groups."
            )
        tail = (1 - level) / 2 * (self.patients + 1) + 1e-6
        start = np.flatnonzero(np.asarray(self.below) + 1 <= tail)[-1]
        end = np.flatnonzero(np.asarray(self.above) + 1 <= tail)[0]
        # Where most values lie at the end of the scale, the lower end may pass the upper one.
        return min(self.lows[start], self.highs[end]), self.highs[end]

    def quantile(self, levels: np.ndarray) -> np.ndarray:
        """Scores at levels (k,), linear between and without the correction for few patients: for draws and CRPS."""
        return np.interp(levels, self.levels, self.values)

    def level(self, found: np.ndarray) -> np.ndarray:
        """Levels of scores, of any shape, between 0 and 1: the inverse of `quantile`."""
        found, values, levels = np.asarray(found, float), self.values, self.levels
        inside = np.interp(found, values, levels)
        # Beyond all scores of the cohort: half of what is left.
        return np.where(found < values[0], levels[0] / 2, np.where(found > values[-1], (1 + levels[-1]) / 2, inside))


def _cumulated(t: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct values, rising, and the weight below each and up to it; at most about `KEPT`, the ends among them."""
    order = np.argsort(t, kind="stable")
    t, total = t[order], np.cumsum(weight[order])
    first = np.flatnonzero(np.concatenate(([True], np.diff(t) > 0)))
    upto = total[np.append(first[1:], len(t)) - 1]
    below = np.concatenate(([0.0], upto[:-1]))
    if len(first) > KEPT:
        # By their mass, so that as little as can be is lost.
        kept = np.unique(np.searchsorted(upto, np.linspace(upto[0], upto[-1], KEPT) - 1e-9))
        first, below, upto = first[kept], below[kept], upto[kept]
    return t[first], below, upto


def map_coverage(pits: Sequence[np.ndarray], levels: Sequence[float], band: float = 0.95) -> Coverage:
    """Coverage of central intervals of maps: the share of voxels held, averaged over patients.

    Parameters
    ----------
    pits : sequence of ndarray, shape (voxels,)
        PIT values of each patient's voxels.
    levels : sequence of float
    band : float
        Of the mean over patients, by its standard error: voxels of a patient are not independent of each other.

    Returns
    -------
    Coverage
        With n the number of patients.

    Raises
    ------
    InputError
        If there are fewer than two patients.
    """
    if len(pits) < 2:
        raise InputError(f"map_coverage: {len(pits)} patients; expected two or more.")
    at = np.asarray(levels, float)
    held = np.array([(np.abs(np.asarray(p)[:, None] - 0.5) <= at / 2).mean(0) for p in pits])
    reach = ndtri((1 + band) / 2) * held.std(0, ddof=1) / np.sqrt(len(pits))
    return Coverage(at, held.mean(0), np.maximum(at - reach, 0.0), np.minimum(at + reach, 1.0), len(pits), band)
