"""Apparent diffusion coefficient with its error."""

from __future__ import annotations

import numpy as np

from biomodel.errors import InputError
from biomodel.imaging.dwi import kernels
from biomodel.imaging.dwi.bvalues import trace_series
from biomodel.imaging.dwi.fitting import TO_MS, Series, checked, searched
from biomodel.imaging.dwi.noise import Gaussian, Noise, Rician, as_sigma
from biomodel.imaging.voxelfit import VoxelFit

__all__ = ["fit_adc"]

NAMES, UNITS = ("S0", "ADC"), ("1", "mm^2/s")
#: Passes of the weights at most, and the change of log S over the range of b at which they rest.
MOST_PASSES, RESTS = 30, 1e-7
#: Range of the Rician search, µm²/ms. Negative values stay possible: noise makes them where diffusion is slow.
LOWEST, HIGHEST = -3.0, 30.0


def fit_adc(
    signal: np.ndarray,
    b_values: np.ndarray,
    *,
    noise: Noise = Gaussian(),  # noqa: B008 (immutable)
    directions: np.ndarray | None = None,
    averages: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    ceiling: float | None = None,
) -> VoxelFit:
    """Fit S = S0 exp(-b ADC) to each voxel.

    With Gaussian noise, log S is fitted linearly, weighted by the squared fitted signal, and the weights are iterated
    until they rest (Salvador et al. 2005, Hum Brain Mapp 24:144; Veraart et al. 2013, NeuroImage 81:335): the variance
    of log S is (σ / S)². With Rician noise the likelihood of the magnitudes is maximised (Sijbers et al. 1998, IEEE
    Trans Med Imaging 17:357), so that the noise floor at high b does not lower the ADC.

    Parameters
    ----------
    signal : ndarray, shape (voxels, samples)
        Magnitude images.
    b_values : array_like, shape (samples,)
        s/mm², at least two different ones; repeated ones are repeated measurements.
    noise : Gaussian or Rician
    directions : ndarray, shape (samples, 3), optional
        Gradient directions, over which the signal is averaged first (:func:`trace_series`); Gaussian noise only.
    averages : array_like, shape (samples,), optional
        How many images the scanner averaged for each sample (1).
    mask : ndarray of bool, shape (voxels,), optional
    ceiling : float, optional
        Largest value that the images can hold; a voxel that reaches it is saturated and has no value.

    Returns
    -------
    VoxelFit
        ``S0`` (units of the signal) and ``ADC`` (mm²/s) with covariance. With as many samples as parameters and
        unknown noise the covariance is NaN.

    Raises
    ------
    InputError
        If b-values are missing, negative, too few, or do not fit the signal (see :func:`check_b_values`).

    Examples
    --------
    >>> fit = fit_adc([[1000.0, 449.3, 201.9]], [0, 800, 1600])
    >>> print(f"{fit['ADC'][0]:.1e}")
    1.0e-03
    """
    if directions is not None:
        if isinstance(noise, Rician):
            raise InputError(
                "ADC: Rician noise with directions; it holds for single images, not for their mean over directions. "
                "Fit each direction and average the ADCs, or use Gaussian()."
            )
        if averages is not None:
            raise InputError("ADC: both directions and averages; expected one of them, directions count by themselves.")
        series = trace_series(signal, b_values, directions)
        signal, b_values, averages = series.signal, series.b_values, series.averages
    data = checked("ADC", signal, b_values, 2, noise, averages, mask, ceiling)
    if isinstance(noise, Gaussian):
        return _log_linear(data, noise)
    rough = _log_linear(data, Gaussian())
    # Voxels that the log-linear fit could not do have no start of their own; the likelihood needs no logarithm.
    start = np.nan_to_num(np.stack([rough["S0"] / data.signal.max(1), rough["ADC"] / TO_MS], 1), nan=1.0)
    return searched(
        data, kernels.MONOEXPONENTIAL, start, (0.0, LOWEST), (10.0, HIGHEST), NAMES, UNITS, (1.0, TO_MS), noise
    )


def _log_linear(data: Series, noise: Gaussian) -> VoxelFit:
    n = data.voxels
    values, covariance, rss = np.empty((n, 2)), np.empty((n, 2, 2)), np.empty(n)
    code = data.code.copy()
    sigma = np.ones(1) if noise.sigma is None else as_sigma(noise.sigma, n, data.what)
    kernels.over_voxels(
        kernels.log_linear, n, data.signal, data.b, data.averages, sigma, noise.sigma is not None, MOST_PASSES, RESTS,
        values, covariance, rss, code,
    )  # fmt: skip
    values[:, 1] *= TO_MS
    covariance[:, 0, 1] *= TO_MS
    covariance[:, 1, 0] *= TO_MS
    covariance[:, 1, 1] *= TO_MS**2
    return VoxelFit(NAMES, UNITS, values, covariance, rss, code, data.signal.shape[1], noise.sigma is not None)
