"""What not knowing exactly where a voxel lies adds to the error of its value."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt

from biomodel.errors import GeometryError
from biomodel.imaging.series_grid import Grid

__all__ = ["UNSEEN", "displacement_sd"]

#: Error of registration over its spread, root mean squares: what repetitions have in common does not show in the spread
#: (0.36 over 0.22 mm on the 20 virtual patients of ``tests/benchmarks/bench_registration.py``).
UNSEEN = 1.6


def displacement_sd(values: np.ndarray, grid: Grid, spread: np.ndarray) -> np.ndarray:
    """Standard deviation of a map that comes from its registration, to first order: slope times displacement.

    The displacement is taken as equal along all directions. Noise counts as slope, so that the result is rather too
    large; where the map is curved within the displacement it is too small.

    Parameters
    ----------
    values : ndarray, shape (z, y, x)
        The map on the grid it was registered to, NaN where there is none.
    grid
    spread : ndarray, shape (z, y, x)
        Of the registration (:class:`~biomodel.imaging.registration.Registration`), mm; :data:`UNSEEN` is applied here.

    Returns
    -------
    ndarray, shape (z, y, x)
        In the map's unit; NaN where the map is.

    Raises
    ------
    GeometryError
        If shapes do not fit together.
    """
    values, spread = np.asarray(values, float), np.asarray(spread, float)
    if values.shape != tuple(grid.shape) or spread.shape != tuple(grid.shape):
        raise GeometryError(
            f"displacement: map of {values.shape}, spread of {spread.shape}; expected {tuple(grid.shape)} (z, y, x)."
        )
    known = np.isfinite(values)
    if not known.any():
        return np.full(values.shape, np.nan)
    # No slope towards where nothing is known.
    nearest = distance_transform_edt(~known, grid.spacing, return_distances=False, return_indices=True)
    filled = values[tuple(nearest)]
    steep = np.zeros(values.shape)
    for axis, step in enumerate(grid.spacing):
        if grid.shape[axis] > 1:
            steep += np.gradient(filled, step, axis=axis) ** 2
    return np.where(known, UNSEEN * spread * np.sqrt(steep / 3), np.nan)
