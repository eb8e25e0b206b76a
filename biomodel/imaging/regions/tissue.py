"""Fibroglandular and adipose tissue by fuzzy c-means: a fraction in each voxel.

Bezdek, Ehrlich and Full 1984, doi:10.1016/0098-3004(84)90020-7, on the signal in the organ after N4 (Tustison et al.
2010, doi:10.1109/TMI.2010.2046908) has taken out the receiver's slow bias, as is usual for breast density on MRI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from biomodel.errors import GeometryError, InputError
from biomodel.imaging.preprocess import bias_field
from biomodel.imaging.series_grid import Grid

__all__ = ["Clusters", "Tissues", "doubts_of", "fuzzy_c_means", "receiver_bias", "tissues"]

#: Knots of N4's spline are this far apart, mm, then half of it: coils vary over such lengths, tissue over shorter.
KNOTS = 60.0
#: Fewest voxels of the organ.
LEAST = 100


@dataclass(frozen=True, eq=False)
class Clusters:
    """Result of fuzzy c-means.

    Attributes
    ----------
    centres : ndarray, shape (clusters, features)
        By their first feature, from low to high.
    members : ndarray, shape (samples, clusters)
        Memberships, which sum to 1.
    steps : int
    converged : bool
    """

    centres: np.ndarray
    members: np.ndarray
    steps: int
    converged: bool

    @property
    def partition(self) -> float:
        """Mean squared membership summed over the clusters: 1 for crisp ones, 1/clusters where there are none."""
        return float(np.square(self.members).sum(1).mean())


def fuzzy_c_means(
    samples: np.ndarray, clusters: int = 2, *, fuzziness: float = 2.0, tolerance: float = 1e-5, steps: int = 200
) -> Clusters:
    """Cluster samples softly; the same samples give the same clusters.

    Alternates the memberships u_k = 1 / Σ_j (d_k / d_j)^(2 / (m - 1)) and the centres, means weighted by u^m. The start
    are quantiles of the first feature instead of random memberships.

    Parameters
    ----------
    samples : ndarray, shape (n,) or (n, features)
        Finite; features of like scale.
    clusters
    fuzziness
        m > 1; 2 is the usual choice.
    tolerance
        Stop when no centre moves by more than this part of the features' spread.
    steps
        Most iterations.

    Raises
    ------
    InputError
        If samples are not finite, are all alike, or fewer than clusters.
    """
    data = np.asarray(samples, float)
    data = data[:, None] if data.ndim == 1 else data
    if data.ndim != 2 or len(data) < clusters or clusters < 2 or not fuzziness > 1:
        raise InputError(
            f"fuzzy c-means: samples of shape {data.shape}, {clusters} clusters, fuzziness {fuzziness:g}; expected "
            "(n, features) with n of at least the number of clusters, two clusters or more and a fuzziness above 1."
        )
    if not np.isfinite(data).all():
        raise InputError("fuzzy c-means: samples have NaN or infinite values. Leave them out.")
    spread = data.std(0)
    if not (spread > 0).all():
        raise InputError("fuzzy c-means: a feature has the same value everywhere; there is nothing to tell apart.")
    order = np.argsort(data[:, 0], kind="stable")
    parts = ((np.arange(clusters) + 0.5) / clusters * len(data)).astype(int)
    centres, converged, step = data[order[parts]], False, 0
    for step in range(1, steps + 1):  # noqa: B007 (the count is part of the result)
        weight = _members(data, centres, spread, fuzziness) ** fuzziness
        moved = weight.T @ data / weight.sum(0)[:, None]
        converged = bool((np.abs(moved - centres) <= tolerance * spread).all())
        centres = moved
        if converged:
            break
    centres = centres[np.argsort(centres[:, 0], kind="stable")]
    return Clusters(centres, _members(data, centres, spread, fuzziness), step, converged)


def _members(data: np.ndarray, centres: np.ndarray, spread: np.ndarray, fuzziness: float) -> np.ndarray:
    distance = sum(
        ((data[:, f, None] - centres[None, :, f]) / spread[f]) ** 2 for f in range(data.shape[1])
    )  # (n, clusters), without an array of all three axes
    inverse = np.maximum(distance, 1e-12) ** (-1 / (fuzziness - 1))
    return inverse / inverse.sum(1, keepdims=True)


@dataclass(frozen=True, eq=False)
class Tissues:
    """Tissue fractions of an organ.

    Attributes
    ----------
    fibroglandular, adipose : ndarray, shape (z, y, x)
        Fractions that sum to 1 in the organ; 0 outside, and NaN where the image is not finite.
    bias : ndarray, shape (z, y, x)
        The receiver's bias that was divided out; 1 where none was.
    clusters : Clusters, optional
        None where the fractions do not come from clustering.
    notes : tuple of str
        What is doubtful.
    spread : ndarray, shape (z, y, x), optional
        Standard deviation of the fraction between a network's views; None where there are none.
    """

    fibroglandular: np.ndarray
    adipose: np.ndarray
    bias: np.ndarray
    clusters: Clusters | None
    notes: tuple[str, ...]
    spread: np.ndarray | None = None

    @property
    def share(self) -> float:
        """Fibroglandular share of the organ's volume."""
        total = np.nansum(self.fibroglandular) + np.nansum(self.adipose)
        return float(np.nansum(self.fibroglandular) / total)


def receiver_bias(image: np.ndarray, inside: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """The slow multiplicative bias of an image, (z, y, x), with geometric mean 1 inside, by N4.

    Knots closer than :func:`~biomodel.imaging.preprocess.bias_field` has them by default: inside of one organ they
    follow the coil, and what they take away of tissue is less than what they leave of the coil's otherwise.

    Raises
    ------
    InputError
        If there is too little signal, or SimpleITK is not installed.
    """
    grid = Grid(image.shape, (float(spacing[0]), float(spacing[1]), float(spacing[2])))
    found = bias_field(image, grid, inside, knots=KNOTS, iterations=(50, 50))
    return np.asarray(found.values, float)


def doubts_of(gland: np.ndarray) -> tuple[str, ...]:
    """What is not plausible about the fibroglandular fractions (n,) in an organ."""
    share = float(np.nanmean(gland))
    if 0.01 <= share <= 0.9:
        return ()
    return (f"Fibroglandular share {share:.2f}; usual ones lie between 0.01 and 0.9. Is fat_suppressed right?",)


def tissues(
    image: np.ndarray,
    organ: np.ndarray,
    spacing: Sequence[float],
    *,
    fat_suppressed: bool,
    without: np.ndarray | None = None,
    correct_bias: bool = True,
    fuzziness: float = 2.0,
) -> Tissues:
    """Split an organ into fibroglandular and adipose tissue.

    Parameters
    ----------
    image : ndarray, shape (z, y, x)
        T1-weighted, before contrast.
    organ : ndarray of bool, shape (z, y, x)
    spacing
        Voxel sides (dz, dy, dx), mm.
    fat_suppressed
        Whether fat is the darker tissue. It is not guessed: where gland fills most of the breast, signals alone do not
        tell.
    without : ndarray of bool, optional
        Left out of the clustering, such as a tumour; its voxels get memberships all the same.
    correct_bias
        Divide N4's bias field out first.
    fuzziness
        See :func:`fuzzy_c_means`.

    Raises
    ------
    GeometryError
        If shapes differ.
    InputError
        If the organ has too few voxels with signal.

    Notes
    -----
    Memberships follow the distance to the two centres, which is steeper in the middle than the true share of a mixed
    voxel; summed over the organ the difference nearly cancels.
    """
    values, inside = np.asarray(image, float), np.asarray(organ).astype(bool)
    if values.ndim != 3 or inside.shape != values.shape or len(spacing) != 3:
        raise GeometryError(f"tissues: image of {values.shape}, organ of {inside.shape}; expected one shape (z, y, x).")
    sound = inside & np.isfinite(values) & (values > 0)
    learn = sound if without is None else sound & ~np.asarray(without, bool)
    if learn.sum() < LEAST:
        raise InputError(f"tissues: {int(learn.sum())} voxels with signal in the organ; expected at least {LEAST}.")
    bias = receiver_bias(values, learn, spacing) if correct_bias else np.ones_like(values)
    even = values / bias
    found = fuzzy_c_means(even[learn], 2, fuzziness=fuzziness)
    # All voxels by the centres of those learnt from; bright outliers belong to the bright tissue, not to none.
    clipped = np.clip(even[sound], *found.centres[:, 0])
    bright = _members(clipped[:, None], found.centres, even[learn].std(keepdims=True), fuzziness)[:, 1]
    gland = np.where(inside, np.nan, 0.0)
    gland[sound] = bright if fat_suppressed else 1 - bright
    notes = []
    contrast = float(found.centres[1, 0] / max(found.centres[0, 0], 1e-9))
    if contrast < 1.3:
        notes.append(f"The two tissues differ little in signal (a factor of {contrast:.2f}); the split is doubtful.")
    if not found.converged:
        notes.append(f"Fuzzy c-means did not settle in {found.steps} steps.")
    notes.extend(doubts_of(gland[inside]))
    return Tissues(gland, np.where(inside, 1 - gland, 0.0), bias, found, tuple(notes))
