"""What an uncertain place adds to the error of a map."""

import numpy as np
import pytest
from scipy import ndimage

from biomodel.errors import GeometryError
from biomodel.imaging.series_grid import Grid
from biomodel.quantify.displaced import UNSEEN, displacement_sd

GRID = Grid((10, 16, 14), (3.0, 2.0, 1.5))


def test_of_a_ramp():
    z, y, x = (np.arange(n) * s for n, s in zip(GRID.shape, GRID.spacing, strict=True))
    ramp = 2.0 * z[:, None, None] - 1.0 * y[:, None] + 0.5 * x
    found = displacement_sd(ramp, GRID, np.full(GRID.shape, 0.6))
    np.testing.assert_allclose(found, UNSEEN * 0.6 * np.sqrt((4 + 1 + 0.25) / 3), rtol=1e-12)
    hole = ramp.copy()
    hole[4:6] = np.nan
    found = displacement_sd(hole, GRID, np.full(GRID.shape, 0.6))
    assert np.isnan(found[4:6]).all() and np.isfinite(found[:4]).all()
    # Beside the hole nothing is steeper than anywhere else.
    assert found[3].max() <= UNSEEN * 0.6 * np.sqrt(5.25 / 3) + 1e-12
    assert np.isnan(displacement_sd(np.full(GRID.shape, np.nan), GRID, np.zeros(GRID.shape))).all()


def test_is_what_displacements_do():
    """A smooth map moved at random, many times."""
    rng = np.random.default_rng(0)
    values = ndimage.gaussian_filter(rng.normal(size=GRID.shape), [2.5, 3.5, 4.5], mode="wrap")
    total = 0.4
    off = []
    for _ in range(150):
        move = rng.normal(0, total / np.sqrt(3), 3) / GRID.spacing
        off.append(ndimage.shift(values, move, order=3, mode="grid-wrap") - values)
    actual = np.sqrt(np.mean(np.square(off), axis=0))
    stated = displacement_sd(values, GRID, np.full(GRID.shape, total / UNSEEN))
    inner = (slice(1, -1),) * 3
    assert np.sqrt((stated[inner] ** 2).mean() / (actual[inner] ** 2).mean()) == pytest.approx(1, abs=0.08)


def test_other_shapes():
    with pytest.raises(GeometryError, match="map of .10, 16, 14., spread of .9, 16, 14."):
        displacement_sd(np.zeros(GRID.shape), GRID, np.zeros((9, 16, 14)))
