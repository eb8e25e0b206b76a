"""How well a region matches another: overlap, distances of the surfaces and volume, with intervals over patients.

Definitions follow Taha and Hanbury 2015 (doi:10.1186/s12880-015-0068-x); that an overlap is shown beside a distance is
the advice of Maier-Hein et al. 2024 (doi:10.1038/s41592-023-02151-z). Empty regions are frequent after treatment:

===============  ======  ====  ======================  ============
found, truth     Dice    HD95  mean surface distance   volume error
===============  ======  ====  ======================  ============
both empty       1       0     0                       0
only the found   0       inf   inf                     -1
only the truth   0       inf   inf                     inf
===============  ======  ====  ======================  ============
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from biomodel.errors import GeometryError, InputError

__all__ = ["Interval", "RegionScore", "bootstrap", "score_region", "surface_distances"]


@dataclass(frozen=True)
class RegionScore:
    """Scores of one region.

    Attributes
    ----------
    dice : float
        2 |A ∩ B| / (|A| + |B|). Dice 1945, Ecology 26:297.
    hd95 : float
        mm; the larger of the two 95th percentiles of the distances from one surface to the other.
    surface : float
        Mean surface distance, mm: mean of the distances of both surfaces to each other.
    volume_error : float
        (found - truth) / truth.
    found, truth : float
        Volumes, cm³.
    """

    dice: float
    hd95: float
    surface: float
    volume_error: float
    found: float
    truth: float


@dataclass(frozen=True)
class Interval:
    """A statistic and its bootstrap interval.

    Attributes
    ----------
    value, low, high : float
    patients : int
        Number of patients that were drawn from.
    """

    value: float
    low: float
    high: float
    patients: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def _pair(
    found: np.ndarray, truth: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    a, b = np.asarray(found), np.asarray(truth)
    if a.shape != b.shape:
        raise GeometryError(f"region score: regions of shape {a.shape} and {b.shape}; expected one grid.")
    for region in (a, b):
        if region.dtype != bool and not np.isin(region, (0, 1)).all():
            raise InputError("region score: a region has values other than 0 and 1. Threshold probabilities first.")
    steps = tuple(float(step) for step in spacing)
    if len(steps) != a.ndim or not all(np.isfinite(step) and step > 0 for step in steps):
        raise GeometryError(f"region score: spacing {spacing}; expected {a.ndim} positive voxel sides in mm.")
    return a.astype(bool), b.astype(bool), steps


def surface_distances(found: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Distances from each surface to the other, mm.

    The surface is made of the region's voxels that touch its outside by a face; distances are between centres of
    voxels. The image's edge counts as outside.

    Returns
    -------
    ndarray, shape (surface voxels of found,)
    ndarray, shape (surface voxels of truth,)
        Infinite where the other region is empty.
    """
    a, b, steps = _pair(found, truth, spacing)
    either = a | b
    if not either.any():
        return np.empty(0), np.empty(0)
    # Nothing outside of both regions takes part.
    box = tuple(slice(int(w.min()), int(w.max()) + 1) for w in np.nonzero(either))
    edges = [np.pad(region[box], 1) for region in (a, b)]
    edges = [region & ~ndimage.binary_erosion(region) for region in edges]
    if not (edges[0].any() and edges[1].any()):
        return tuple(np.full(int(edge.sum()), np.inf) for edge in edges)  # type: ignore[return-value]
    one, two = (ndimage.distance_transform_edt(~edge, steps) for edge in edges)
    return two[edges[0]], one[edges[1]]


def score_region(found: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> RegionScore:
    """Score a region against the true one.

    Parameters
    ----------
    found, truth : ndarray of bool, shape (z, y, x)
    spacing : (float, float, float)
        Voxel sides (dz, dy, dx), mm.

    Raises
    ------
    GeometryError
        If the regions lie on different grids.
    InputError
        If one is not a mask.
    """
    a, b, steps = _pair(found, truth, spacing)
    sizes = int(a.sum()), int(b.sum())
    voxel = float(np.prod(steps)) / 1000
    if sizes == (0, 0):
        return RegionScore(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    there, back = surface_distances(a, b, steps)
    if 0 in sizes:
        hd95 = surface = float("inf")
    else:
        hd95 = float(max(np.percentile(there, 95), np.percentile(back, 95)))
        surface = float(np.concatenate([there, back]).mean())
    error = (sizes[0] - sizes[1]) / sizes[1] if sizes[1] else float("inf")
    dice = 2 * int((a & b).sum()) / sum(sizes)
    return RegionScore(dice, hd95, surface, error, sizes[0] * voxel, sizes[1] * voxel)


def bootstrap(
    values: Sequence[float] | np.ndarray,
    patients: Sequence[object],
    *,
    statistic: Callable[[np.ndarray], float] = np.median,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a statistic; whole patients are drawn, with all of their values.

    Efron 1979, Ann Stat 7:1, doi:10.1214/aos/1176344552. Visits of one patient resemble each other, so that drawing
    them one by one would make the interval too narrow.

    Parameters
    ----------
    values : (n,)
        One per region; infinite ones are allowed where the statistic stands them, as the median does.
    patients : (n,)
        Whose each value is.
    statistic
        Of an array of values.
    level
        Of the interval.

    Raises
    ------
    InputError
        If there is no value, one is NaN, or the lengths differ.
    """
    numbers = np.asarray(values, float)
    if numbers.ndim != 1 or numbers.size == 0 or len(patients) != numbers.size:
        raise InputError(f"bootstrap: {numbers.size} values of {len(patients)} patients; expected a patient for each.")
    if np.isnan(numbers).any():
        raise InputError("bootstrap: a value is NaN. Leave out what has no score, and say how many were left out.")
    if not 0 < level < 1 or draws < 1:
        raise InputError(f"bootstrap: level {level:g} and {draws} draws; expected 0 < level < 1 and draws.")
    names = {name: index for index, name in enumerate(dict.fromkeys(patients))}
    whose = np.array([names[name] for name in patients])
    groups = [numbers[whose == index] for index in range(len(names))]
    rng = np.random.default_rng(seed)
    drawn = np.sort(
        [
            float(statistic(np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])))
            for _ in range(draws)
        ]
    )
    # Ranks, not interpolation: between a finite and an infinite value there is nothing.
    low = drawn[int(np.floor((1 - level) / 2 * (draws - 1)))]
    high = drawn[int(np.ceil((1 + level) / 2 * (draws - 1)))]
    return Interval(float(statistic(numbers)), float(low), float(high), len(groups))
