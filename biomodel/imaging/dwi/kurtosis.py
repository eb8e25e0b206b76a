"""Non-Gaussian diffusion: diffusion and kurtosis, with errors."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from biomodel.errors import InputError
from biomodel.imaging.dwi import kernels
from biomodel.imaging.dwi.fitting import TO_MS, checked, searched
from biomodel.imaging.dwi.noise import Gaussian, Noise
from biomodel.imaging.voxelfit import VoxelFit

__all__ = ["KurtosisBounds", "fit_kurtosis"]

NAMES, UNITS = ("S0", "D", "K"), ("1", "mm^2/s", "1")


@dataclass(frozen=True)
class KurtosisBounds:
    """Where the search may go: working values, wider than those of tissue.

    Parameters
    ----------
    d : (float, float)
        mm²/s.
    k : (float, float)
        Negative values are no tissue's, but noise makes them around 0.
    """

    d: tuple[float, float] = (0.0, 6e-3)
    k: tuple[float, float] = (-1.0, 5.0)

    def __post_init__(self) -> None:
        for item in fields(self):
            low, high = getattr(self, item.name)
            if not -np.inf < low < high < np.inf:
                raise InputError(f"kurtosis: bounds {item.name} {low:g} to {high:g}; expected low < high.")
        if self.d[0] < 0:
            raise InputError(f"kurtosis: lower bound of D {self.d[0]:g}; expected 0 or more.")


def fit_kurtosis(
    signal: np.ndarray,
    b_values: np.ndarray,
    *,
    noise: Noise = Gaussian(),  # noqa: B008 (immutable)
    bounds: KurtosisBounds = KurtosisBounds(),  # noqa: B008 (immutable)
    averages: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    ceiling: float | None = None,
) -> VoxelFit:
    """Fit S = S0 exp(-b D + b² D² K / 6) to each voxel (Jensen et al. 2005, doi:10.1002/mrm.20508).

    By least squares or by the likelihood of magnitudes; at the high b that kurtosis needs, the noise floor looks like
    kurtosis, so Rician noise is worth its time there. The model holds up to about b = 3 / (D K).

    Parameters
    ----------
    signal : ndarray, shape (voxels, samples)
        Magnitude images.
    b_values : array_like, shape (samples,)
        s/mm², at least three different ones.
    noise : Gaussian or Rician
    bounds : KurtosisBounds
    averages, mask, ceiling
        As in :func:`fit_adc`.

    Returns
    -------
    VoxelFit
        ``S0``, ``D`` and ``K`` with covariance; a parameter on its bound has none (``AT_BOUND``).

    Raises
    ------
    InputError
        If b-values are missing, negative, too few, or do not fit the signal.
    """
    data = checked("kurtosis", signal, b_values, 3, noise, averages, mask, ceiling)
    start = np.tile([1.0, 1.0, 0.0], (data.voxels, 1))
    kernels.over_voxels(kernels.log_quadratic, data.voxels, data.signal, data.b, data.averages, start, data.code)
    lower = (0.0, bounds.d[0] / TO_MS, bounds.k[0])
    upper = (10.0, bounds.d[1] / TO_MS, bounds.k[1])
    return searched(data, kernels.KURTOSIS, start, lower, upper, NAMES, UNITS, (1.0, TO_MS, 1.0), noise)
