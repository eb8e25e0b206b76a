"""What is unknown about the state at the first visit, as white noise and a map from it.

Inside the region it is the noise of the measured cell fraction. Outside nobody saw cells, and the halo of
:mod:`biomodel.calibration.images` says only about how many there are: its shape is off by a share of itself. Both are
smooth over the noise's physical correlation length, so that smaller voxels do not make the start less certain over a
given distance, nor more.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

__all__ = ["HALO_SHARE", "StartNoise"]

#: Standard deviation of the unseen cells' number, relative to what the halo says: a working value. A halo falls off
#: exponentially; the foot of a front may as well be Gaussian.
HALO_SHARE = 0.5
#: Where the halo holds less than this cell fraction, its error changes nothing.
LEAST = 1e-3


class StartNoise:
    """Gaussian change of the initial state: standard deviation times correlated noise of unit variance.

    Parameters
    ----------
    sd : ndarray, shape (z, y, x)
        Standard deviation of the cell fraction at the start; 0 where it is not unknown.
    spacing : (z, y, x)
        mm.
    length : float
        Correlation length, mm: the integral of the correlation along an axis. On axes whose voxels are as large,
        neighbours are independent.
    """

    def __init__(self, sd: np.ndarray, spacing: tuple[float, float, float], length: float):
        self.sd = sd
        self.where = sd > 0
        # White noise smoothed by a Gaussian of width w has the correlation exp(-r² / 4 w²), of integral 2 sqrt(pi) w.
        self.width = tuple(length / (2 * np.sqrt(np.pi)) / s if n > 1 and length > 1.01 * s else 0.0
                           for n, s in zip(sd.shape, spacing, strict=True))  # fmt: skip
        scale = np.ones(sd.shape)
        if any(self.width):
            # Unit variance far from the border of the unknown voxels: the sum of the squared kernel.
            point = np.zeros([2 * int(np.ceil(4 * w)) + 1 for w in self.width])
            point[tuple(n // 2 for n in point.shape)] = 1.0
            kernel = gaussian_filter(point, self.width, mode="constant")
            scale /= np.sqrt((kernel**2).sum())
        self._scale = scale * sd

    @property
    def size(self) -> int:
        """Number of white-noise coordinates."""
        return int(self.where.sum())

    def _smooth(self, values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, self.width, mode="constant") if any(self.width) else values

    def root(self, white: np.ndarray) -> np.ndarray:
        """Change of the state (z, y, x) from white noise (size,)."""
        found = np.zeros(self.sd.shape)
        found[self.where] = white
        return self._scale * self._smooth(found)

    def transpose(self, change: np.ndarray) -> np.ndarray:
        """Transpose of `root`."""
        return np.asarray(self._smooth(self._scale * change)[self.where])
