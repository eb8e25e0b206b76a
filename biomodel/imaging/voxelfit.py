"""What a voxel-wise fit gives: parameters with covariance, goodness of fit, and why a voxel has none."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from scipy.stats import t as student

from biomodel.errors import InputError

__all__ = ["Code", "VoxelFit"]


class Code(IntEnum):
    """Why a voxel has no value (NaN), or a doubtful one."""

    FITTED = 0
    NOT_FINITE = 1  # NaN or infinite signal
    NO_SIGNAL = 2  # zero or negative where the model needs a positive one
    NO_ENHANCEMENT = 3  # contrast never rises above the noise of the baseline
    SATURATED = 4  # at the largest value that the series can hold, or beyond what the signal model can reach
    AT_BOUND = 5  # fitted, but a parameter lies on a bound: its interval means little
    NOT_CONVERGED = 6  # fitted, but the search stopped early
    OUTSIDE = 7  # not in the mask


#: Codes whose voxels hold a value.
VALID = (Code.FITTED, Code.AT_BOUND, Code.NOT_CONVERGED)


@dataclass(frozen=True, eq=False)
class VoxelFit:
    """Result of fitting one model to many voxels.

    Attributes
    ----------
    names : tuple of str
        Parameters, p of them, in the field's standard terms (OSIPI CAPLEX for DCE).
    units : tuple of str
    values : ndarray, shape (voxels, p)
        NaN where `code` is not one of the valid ones.
    covariance : ndarray, shape (voxels, p, p)
        From the model's derivatives and the residual variance (or the noise that was given).
    rss : ndarray, shape (voxels,)
        Residual sum of squares, in the signal's units squared.
    code : ndarray of uint8, shape (voxels,)
        :class:`Code` of each voxel.
    samples : int
        Number of measured values per voxel.
    known_noise : bool
        Whether the noise was given (normal intervals) or estimated from residuals (Student-t intervals).
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    values: np.ndarray
    covariance: np.ndarray
    rss: np.ndarray
    code: np.ndarray
    samples: int
    known_noise: bool = False

    def __getitem__(self, name: str) -> np.ndarray:
        """Values of one parameter, (voxels,)."""
        return self.values[:, self._index(name)]

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise InputError(f"fit: no parameter {name!r}; there are {', '.join(self.names)}.")
        return self.names.index(name)

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the residuals."""
        return self.samples - len(self.names)

    def sd(self, name: str) -> np.ndarray:
        """Standard deviation of one parameter, (voxels,)."""
        i = self._index(name)
        return np.sqrt(self.covariance[:, i, i])

    def interval(self, name: str, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the interval of one parameter, (voxels,) each."""
        quantile = (1 + level) / 2
        width = float(student.ppf(quantile, np.inf if self.known_noise else max(self.freedom, 1)))
        value, sd = self[name], self.sd(name)
        return value - width * sd, value + width * sd

    @property
    def aic(self) -> np.ndarray:
        """Akaike's criterion with the correction for few samples (Hurvich and Tsai 1989, Biometrika 76:297).

        Of models fitted to the same samples of a voxel the least is best; n log(rss / n) + 2 q + 2 q (q + 1) /
        (n - q - 1) with q = p + 1 for the noise.
        """
        n, q = self.samples, len(self.names) + 1
        if n - q - 1 <= 0:
            raise InputError(f"fit: {n} samples are too few to compare a model of {len(self.names)} parameters.")
        with np.errstate(divide="ignore"):
            return n * np.log(self.rss / n) + 2 * q + 2 * q * (q + 1) / (n - q - 1)

    def counts(self) -> dict[str, int]:
        """Number of voxels by code, those that occur."""
        found, count = np.unique(self.code, return_counts=True)
        return {Code(int(c)).name.lower(): int(n) for c, n in zip(found, count, strict=True)}
