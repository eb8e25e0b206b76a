"""Intravoxel incoherent motion: diffusion, perfused fraction and pseudo-diffusion, with errors."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from biomodel.errors import InputError
from biomodel.imaging.dwi import kernels
from biomodel.imaging.dwi.fitting import TO_MS, checked, searched
from biomodel.imaging.dwi.noise import Gaussian, Noise
from biomodel.imaging.voxelfit import VoxelFit

__all__ = ["IvimBounds", "fit_ivim"]

NAMES, UNITS = ("S0", "D", "f", "D*"), ("1", "mm^2/s", "1", "mm^2/s")
#: Points of the grid on which the search starts, along D and along D*.
GRID = (14, 14)


@dataclass(frozen=True)
class IvimBounds:
    """Where the search may go: working values, wider than any tissue of the literature.

    Parameters
    ----------
    d, d_star : (float, float)
        mm²/s; free water has 3.0e-3 at body temperature. D* starts above D, so that the two parts cannot be exchanged.
    f : (float, float)
    """

    d: tuple[float, float] = (0.0, 4e-3)
    f: tuple[float, float] = (0.0, 1.0)
    d_star: tuple[float, float] = (4e-3, 0.5)

    def __post_init__(self) -> None:
        for item in fields(self):
            low, high = getattr(self, item.name)
            if not 0 <= low < high < np.inf:
                raise InputError(f"IVIM: bounds {item.name} {low:g} to {high:g}; expected 0 ≤ low < high.")
        if self.f[1] > 1:
            raise InputError(f"IVIM: upper bound of f {self.f[1]:g}; expected at most 1.")
        if self.d_star[0] <= 0:
            raise InputError("IVIM: lower bound of D* is 0; expected a value above 0, usually above D.")


def fit_ivim(
    signal: np.ndarray,
    b_values: np.ndarray,
    *,
    noise: Noise = Gaussian(),  # noqa: B008 (immutable)
    bounds: IvimBounds = IvimBounds(),  # noqa: B008 (immutable)
    averages: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    ceiling: float | None = None,
) -> VoxelFit:
    """Fit S = S0 [(1 - f) exp(-b D) + f exp(-b D*)] to each voxel (Le Bihan et al. 1988, Radiology 168:497).

    All four parameters at once, by least squares or by the likelihood of magnitudes. The search starts from the best
    pair of exponentials on a grid of (D, D*), whose amplitudes follow in closed form, so that it does not depend on a
    first guess.

    Parameters
    ----------
    signal : ndarray, shape (voxels, samples)
        Magnitude images.
    b_values : array_like, shape (samples,)
        s/mm², at least four different ones; f and D* need several under 100 s/mm².
    noise : Gaussian or Rician
    bounds : IvimBounds
    averages, mask, ceiling
        As in :func:`fit_adc`.

    Returns
    -------
    VoxelFit
        ``S0``, ``D``, ``f`` and ``D*`` with covariance; a parameter on its bound has none (``AT_BOUND``).

    Raises
    ------
    InputError
        If b-values are missing, negative, too few, or do not fit the signal.
    """
    data = checked("IVIM", signal, b_values, 4, noise, averages, mask, ceiling)
    lower = tuple(v[0] / TO_MS for v in (bounds.d, bounds.d_star))
    upper = tuple(v[1] / TO_MS for v in (bounds.d, bounds.d_star))
    slow_d = np.linspace(max(lower[0], 0.05), upper[0], GRID[0])
    fast_d = np.geomspace(lower[1], upper[1], GRID[1] + 2)[1:-1]
    slow, fast = np.exp(-np.outer(slow_d, data.b)), np.exp(-np.outer(fast_d, data.b))
    w = data.averages
    gram = np.stack(
        np.broadcast_arrays((w * slow**2).sum(1)[:, None], (slow * w) @ fast.T, (w * fast**2).sum(1)[None]), -1
    )
    start = np.tile([1.0, 1.0, 0.1, 10.0], (data.voxels, 1))
    kernels.over_voxels(
        kernels.two_exponentials, data.voxels, data.signal, w, slow, fast, slow_d, fast_d,
        np.ascontiguousarray(gram), start, data.code,
    )  # fmt: skip
    return searched(
        data, kernels.IVIM, start, (0.0, lower[0], bounds.f[0], lower[1]), (10.0, upper[0], bounds.f[1], upper[1]),
        NAMES, UNITS, (1.0, TO_MS, 1.0, TO_MS), noise,
    )  # fmt: skip
