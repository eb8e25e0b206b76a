"""Misfit beyond the stated noise: outliers and errors that neighbouring voxels share.

A model of a patient is never quite right: regions are drawn askew, images do not lie exactly on each other, cells do
what the equations leave out. Thousands of voxels taken as independent witnesses of such errors would make any estimate
look certain. Three measures bound that, and all do nothing where the stated noise is right.

- Voxels at the edge of a region, where readers differ, have a noise of their own: its scale is estimated from their
  residuals, and so is that of the others.
- Voxels whose residual exceeds `OUTLIER` standard deviations pull with a bounded force (Huber 1964, Ann Math Stat
  35:73, doi:10.1214/aoms/1177703732).
- The data as a whole count less where their score varies more from block to block of the image than the noise
  explains: the log-likelihood is divided by the ratio of both (magnitude adjustment of a composite likelihood, Ribatet,
  Cooley and Davison 2012, Statistica Sinica 22:813).
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt

#: Residuals beyond this many standard deviations are outliers.
OUTLIER = 3.0
#: Edge of the blocks within which errors may be shared, mm: half a small tumour, and several voxels.
BLOCK = 8.0
#: Voxels' worth of belief that the stated noise is right, before any residual is seen; for the scales.
PRIOR_VOXELS = 20.0
#: Blocks' worth of the same, for the weight of the data as a whole.
BELIEF = 10.0


def weights(residual: np.ndarray, variance: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Weights of residuals: reciprocal of the noise's scale in each group, and less for outliers.

    Parameters
    ----------
    residual, variance : ndarray, shape (n,)
        A residual of exactly 0 is one that does not count (nothing seen, and nothing predicted).
    groups : ndarray of int, shape (n,)

    Returns
    -------
    ndarray, shape (n,)
    """
    square = residual**2 / variance
    count = np.bincount(groups, square > 0)
    # Never below 1: `variance` may hold carried noise in full, of which diffusion smooths a part away.
    scale = np.maximum((PRIOR_VOXELS + np.bincount(groups, square)) / (PRIOR_VOXELS + count), 1.0)[groups]
    return OUTLIER / np.maximum(np.sqrt(square / scale), OUTLIER) / scale


def edge_groups(rows: np.ndarray, regions: list[np.ndarray], spacing: tuple[float, float, float]) -> np.ndarray:
    """Group (n,) of each true entry of `rows` (visit, z, y, x): 0 inside, 1 at an edge, 2 outside.

    An edge is what lies within one voxel (the largest spacing) of the boundary of the region of that visit or of the
    first, ``regions[0]``; inside is the rest of what the visit's region, ``regions[1 + visit]``, holds.
    """
    reach = max(s for s, n in zip(spacing, rows.shape[1:], strict=True) if n > 1) if max(rows.shape[1:]) > 1 else 1.0
    edges = []
    for region in regions:
        apart = distance_transform_edt(region, sampling=spacing) + distance_transform_edt(~region, sampling=spacing)
        edges.append((apart < 1.01 * reach) if region.any() else np.zeros(region.shape, bool))
    group = np.stack([np.where(edge | edges[0], 1, np.where(region, 0, 2))
                      for region, edge in zip(regions[1:], edges[1:], strict=True)])  # fmt: skip
    return group.astype(np.int8)[rows]


def blocks_of(rows: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Number of the block, (n,), in which each true entry of `rows` (visit, z, y, x) lies."""
    visit, *where = np.nonzero(rows)
    found = visit
    for index, step, size in zip(where, spacing, rows.shape[1:], strict=True):
        cells = (index * step // BLOCK).astype(int)
        found = found * (int(size * step // BLOCK) + 1) + cells
    return np.unique(found, return_inverse=True)[1].astype(np.int32)


def inflation(scores: np.ndarray, blocks: np.ndarray, information: np.ndarray, precision: np.ndarray) -> float:
    """How many times more the score varies than the noise explains, at least 1: the stated noise is a floor.

    Parameters
    ----------
    scores : ndarray, shape (p, n)
        Share of each residual in the gradient of the log-likelihood.
    blocks : ndarray of int, shape (n,)
    information : ndarray, shape (p, p)
        Gauss-Newton Hessian of the data: the score's covariance if the noise is as stated.
    precision : ndarray, shape (p, p)
        Of the prior; directions that only it informs do not count.
    """
    used = np.unique(blocks[np.abs(scores).max(0) > 0]) if scores.size else np.array([])
    if len(used) < 2:
        return 1.0
    sums = np.stack([np.bincount(blocks, s, blocks.max() + 1) for s in scores])[:, used]
    sums -= sums.mean(1, keepdims=True)
    covariance = sums @ sums.T * (len(used) / (len(used) - 1))
    weight = np.linalg.inv(information + precision)
    expected = float(np.trace(weight @ information))
    if expected <= 0:
        return 1.0
    ratio = float(np.trace(weight @ covariance)) / expected
    return max((BELIEF + len(used) * ratio) / (BELIEF + len(used)), 1.0)
