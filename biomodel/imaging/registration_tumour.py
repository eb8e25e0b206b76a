"""What a registration does to the tumour: how much volume it gives or takes, and how it is kept from doing so."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from biomodel.imaging.series_grid import Grid
from biomodel.imaging.transforms import voxel_centres

__all__ = ["VolumeChange", "rigid_inside"]


@dataclass(frozen=True)
class VolumeChange:
    """Volume of a region where it was drawn, and where a registration has put it.

    Parameters
    ----------
    before, after
        mm³. Before on the moving visit's grid, after on the fixed one; voxels that the region fills in part count in
        part.
    """

    before: float
    after: float

    @property
    def percent(self) -> float:
        """Change by the registration, per cent of the volume before; NaN for an empty region."""
        return 100 * (self.after / self.before - 1) if self.before > 0 else float("nan")

    def __str__(self) -> str:
        return f"{self.before / 1000:.3f} cm³ before, {self.after / 1000:.3f} cm³ after ({self.percent:+.1f} %)"


def rigid_inside(displacement: np.ndarray, grid: Grid, zone: np.ndarray, reach: float) -> np.ndarray:
    """Make a displacement rigid inside a region, and go over to what it was within `reach` mm around it.

    A bending that follows a shrinking tumour's edge would swallow the response that is to be measured. Each part of the
    region gets the rigid motion closest to what it had (Kabsch 1976, Acta Crystallogr A 32:922); parts nearer to
    each other than half of `reach` move as one. Between several parts their motions are weighed by the inverse squared
    distance, which is exact inside each (Little, Hill and Hawkes 1997, Comput Vis Image Underst 66:223).

    Parameters
    ----------
    displacement : ndarray, shape (z, y, x, 3)
        mm RAS+, (x, y, z).
    zone : ndarray of bool, shape (z, y, x)
        The region on the same grid.

    Returns
    -------
    ndarray, shape (z, y, x, 3)
    """
    if not zone.any():
        return displacement
    points = voxel_centres(grid)
    gap = ndimage.distance_transform_edt(~zone, grid.spacing)
    joined, count = ndimage.label(gap <= reach / 4)
    rigid = np.zeros_like(displacement, dtype=float)
    total = np.zeros(grid.shape)
    for number in range(1, count + 1):
        part = zone & (joined == number)
        # A single voxel or a row of them does not tell a rotation; its neighbours do.
        told = ndimage.binary_dilation(part, iterations=2)
        motion = _kabsch(points[told], points[told] + displacement[told])
        away = ndimage.distance_transform_edt(~part, grid.spacing)
        weight = 1 / np.maximum(away, 1e-3) ** 2
        rigid += weight[..., None] * (points @ motion[:3, :3].T + motion[:3, 3] - points)
        total += weight
    rigid /= total[..., None]
    # One voxel around the region is rigid, too, since it takes part in drawing the region's edge.
    share = np.clip((gap - max(grid.spacing)) / reach, 0, 1)
    share = (share**2 * (3 - 2 * share))[..., None]
    return share * displacement + (1 - share) * rigid


def _kabsch(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """The rigid motion (4, 4) that brings points closest to others, least squares."""
    middle, target = one.mean(0), two.mean(0)
    left, _, right = np.linalg.svd((one - middle).T @ (two - target))
    sign = np.sign(np.linalg.det(left @ right))
    turn = (left @ np.diag([1, 1, sign]) @ right).T
    motion = np.eye(4)
    motion[:3, :3] = turn
    motion[:3, 3] = target - turn @ middle
    return motion
