"""What the noise of a magnitude image is taken to be, and how large it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.integrate import quad
from scipy.special import ive
from scipy.stats import chi2

from biomodel.errors import InputError
from biomodel.imaging.voxelfit import VALID, VoxelFit

__all__ = ["Gaussian", "Rician", "background_noise", "residual_noise"]

#: Fewest voxels from which a noise level is estimated.
LEAST_VOXELS = 50
#: Signal over noise from which the noise of a magnitude is nearly Gaussian (its variance is then within 5 % of σ²;
#: Gudbjartsson and Patz 1995, Magn Reson Med 34:910).
GAUSSIAN_FROM = 3.0


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Noise of equal spread on each image, symmetric: right where the signal is well above the noise.

    Parameters
    ----------
    sigma : float or ndarray of shape (voxels,), optional
        Standard deviation in the signal's units. Without it each voxel's own residuals tell.
    """

    sigma: float | np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Rician:
    """Noise of a magnitude image from one coil, or from several combined with weights (Rice distribution).

    Parameters
    ----------
    sigma : float or ndarray of shape (voxels,), optional
        Standard deviation of the noise in the real and in the imaginary part. Without it one value for the whole series
        is taken from the residuals of voxels far above the noise (:func:`residual_noise`); where the noise differs over
        the image, as in parallel imaging, give a map.
    """

    sigma: float | np.ndarray | None = None


Noise = Gaussian | Rician


def as_sigma(sigma: float | np.ndarray, voxels: int, what: str) -> np.ndarray:
    """Check a noise level and return it for each voxel, (voxels,)."""
    values = np.asarray(sigma, float)
    if values.ndim > 1 or values.size not in (1, voxels):
        raise InputError(
            f"{what}: sigma of shape {values.shape}; expected one number or one for each of {voxels} voxels."
        )
    if not (np.isfinite(values) & (values > 0)).all():
        raise InputError(f"{what}: sigma holds values that are not above 0; expected the noise in the signal's units.")
    return np.ascontiguousarray(np.broadcast_to(values, (voxels,)))


def background_noise(values: np.ndarray) -> float:
    """Noise level from voxels of air, where there is no signal: sqrt(mean(M²) / 2) (Rayleigh distribution).

    Parameters
    ----------
    values : ndarray
        Magnitudes in air, without ghosts. Not for images that the scanner has masked or corrected for parallel
        imaging, whose noise differs from place to place.

    Raises
    ------
    InputError
        If there are too few, or they are zero (masked).
    """
    values = np.asarray(values, float).ravel()
    values = values[np.isfinite(values)]
    if values.size < LEAST_VOXELS or not (values > 0).mean() > 0.5:
        raise InputError(
            f"noise: {values.size} background values, {int((values > 0).sum())} of them above 0; expected at least "
            f"{LEAST_VOXELS}, most above 0. Choose a region of air that the scanner has not masked."
        )
    return math.sqrt(float(np.mean(values**2)) / 2)


def residual_noise(fit: VoxelFit, smallest: np.ndarray) -> float:
    """One noise level for a series, from the residuals of the voxels that are far above it.

    The median over voxels of the residual variance, over the median of its distribution, so that voxels which the model
    does not describe hardly count. Voxels whose smallest signal is under three times the noise are left out, since the
    spread of a magnitude is smaller there.

    Parameters
    ----------
    fit : VoxelFit
    smallest : ndarray, shape (voxels,)
        Smallest fitted signal of each voxel.

    Raises
    ------
    InputError
        If there are too few such voxels, or as many parameters as samples.
    """
    if fit.freedom < 1:
        raise InputError(
            f"noise: {fit.samples} samples for {len(fit.names)} parameters leave no residuals to estimate it from; "
            "give sigma."
        )
    usable = np.isin(fit.code, VALID) & np.isfinite(fit.rss)
    sigma = 0.0
    for _ in range(10):
        chosen = usable & (smallest > GAUSSIAN_FROM * sigma)
        if chosen.sum() < LEAST_VOXELS:
            raise InputError(
                f"noise: {int(chosen.sum())} voxels have a signal of more than {GAUSSIAN_FROM:g} times the noise in "
                f"every image; expected at least {LEAST_VOXELS}. Give sigma, for instance from background_noise."
            )
        before, sigma = sigma, math.sqrt(float(np.median(fit.rss[chosen])) / float(chi2.median(fit.freedom)))
        if abs(sigma - before) <= 1e-3 * sigma:
            break
    if sigma == 0:
        raise InputError("noise: the residuals are exactly zero; give sigma.")
    return sigma


def _fisher(nu: float) -> float:
    # E[(d log p / dA)²] σ² at A = nu σ: the part of Gaussian information that a magnitude keeps.
    def integrand(m: float) -> float:
        x = m * nu
        i0 = ive(0, x)
        return m * math.exp(-((m - nu) ** 2) / 2) * (ive(1, x) * m) ** 2 / i0 if i0 > 0 else 0.0

    value, _ = quad(integrand, max(0.0, nu - 12), nu + 12, epsabs=1e-12, epsrel=1e-10, limit=200)
    return value - nu * nu


#: Grid of A / σ on which the information of the Rice distribution is tabulated; beyond its end 1 - 1 / (2 (A/σ)²).
FISHER_STEP, FISHER_END = 0.05, 12.0
_TABLE: list[np.ndarray] = []


def fisher_table() -> np.ndarray:
    """Information of one Rician magnitude about its signal, relative to Gaussian noise, at multiples of the step."""
    if not _TABLE:
        steps = round(FISHER_END / FISHER_STEP)
        _TABLE.append(np.array([_fisher(i * FISHER_STEP) for i in range(steps + 1)]))
    return _TABLE[0]
