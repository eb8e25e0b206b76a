"""The unknown state at the first visit: its noise is correlated over a physical length, on any grid."""

import numpy as np
import pytest

from biomodel.calibration.field_noise import StartNoise


def around(sd, spacing, length, axis):
    """Covariance of the middle voxel with the others along an axis."""
    noise = StartNoise(sd, spacing, length)
    point = np.zeros(sd.shape)
    middle = tuple(n // 2 for n in sd.shape)
    point[middle] = 1.0
    found = noise.root(noise.transpose(point))
    return np.moveaxis(found, axis, 0)[(slice(None), *[m for a, m in enumerate(middle) if a != axis])]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 1.0, 0.5)])
def test_variance_and_length_are_as_asked(spacing):
    sd = np.full((31, 31, 31), 0.04)
    for axis in range(3):
        covariance = around(sd, spacing, 4.0, axis)
        assert covariance[15] == pytest.approx(0.04**2, rel=1e-6)
        # The integral of the correlation is the length.
        assert covariance.sum() * spacing[axis] / covariance[15] == pytest.approx(4.0, rel=0.03)


def test_voxels_as_large_as_the_length_are_independent():
    covariance = around(np.full((1, 9, 9), 0.04), (5.0, 2.0, 2.0), 2.0, 2)
    assert np.flatnonzero(covariance).tolist() == [4]


def test_root_and_its_transpose():
    rng = np.random.default_rng(0)
    sd = np.where(rng.uniform(size=(6, 7, 8)) < 0.5, 0.1 * rng.uniform(size=(6, 7, 8)), 0.0)
    noise = StartNoise(sd, (1.0, 1.5, 2.0), 3.0)
    white, change = rng.standard_normal(noise.size), rng.standard_normal(sd.shape)
    assert (noise.root(white) * change).sum() == pytest.approx(white @ noise.transpose(change), rel=1e-12)
    assert not noise.root(white)[sd == 0].any()
