"""What the fits of diffusion-weighted series share: checks of a series, noise, and the search with its result."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from biomodel.errors import GeometryError, InputError
from biomodel.imaging.dwi import kernels
from biomodel.imaging.dwi.bvalues import as_signal, check_b_values
from biomodel.imaging.dwi.noise import Gaussian, Noise, Rician, as_sigma, fisher_table, residual_noise
from biomodel.imaging.dwi.signals import rician_mean
from biomodel.imaging.voxelfit import Code, VoxelFit

#: From s/mm² to ms/µm², in which the kernels work.
TO_MS = 1e-3
#: Most steps of the search; it rarely takes more than ten.
MOST_STEPS = 100


@dataclass(frozen=True, eq=False)
class Series:
    """A checked series: signal (voxels, samples), b in ms/µm², images behind each sample, and codes so far."""

    what: str
    signal: np.ndarray
    b: np.ndarray
    averages: np.ndarray
    code: np.ndarray

    @property
    def voxels(self) -> int:
        return len(self.signal)


def checked(
    what: str,
    signal: np.ndarray,
    b_values: np.ndarray,
    least: int,
    noise: Noise,
    averages: np.ndarray | None,
    mask: np.ndarray | None,
    ceiling: float | None,
) -> Series:
    """Check a series and mark the voxels without usable signal."""
    if not isinstance(noise, (Gaussian, Rician)):
        raise InputError(f"{what}: noise {noise!r}; expected Gaussian(...) or Rician(...).")
    signal = as_signal(signal, what)
    b = check_b_values(b_values, signal.shape[1], least, what)
    if len(signal) == 0:
        raise InputError(f"{what}: no voxels; expected a signal of shape (voxels, samples).")
    counts = np.ones(len(b)) if averages is None else np.asarray(averages, float)
    if counts.shape != b.shape or not (np.isfinite(counts) & (counts > 0)).all():
        raise InputError(f"{what}: averages {averages!r}; expected one number above 0 for each of {len(b)} samples.")
    if isinstance(noise, Rician) and np.ptp(counts) + abs(counts[0] - 1) > 0:
        raise InputError(
            f"{what}: Rician noise with averaged images; it holds for single magnitude images only. Give each image as "
            "its own sample, or use Gaussian()."
        )
    if ceiling is not None and not ceiling > 0:
        raise InputError(f"{what}: ceiling {ceiling!r}; expected the largest value that the images can hold.")
    code = np.zeros(len(signal), np.uint8)
    if mask is not None:
        mask = np.asarray(mask)
        if mask.shape != (len(signal),) or mask.dtype != bool:
            raise GeometryError(
                f"{what}: mask of shape {mask.shape} and type {mask.dtype}; expected bool, ({len(signal)},)."
            )
        code[~mask] = Code.OUTSIDE
    largest = np.inf if ceiling is None else float(ceiling)
    kernels.over_voxels(kernels.classify, len(signal), signal, largest, code)
    return Series(what, signal, np.ascontiguousarray(b * TO_MS), np.ascontiguousarray(counts), code)


def searched(
    series: Series,
    model: int,
    start: np.ndarray,
    lower: tuple[float, ...],
    upper: tuple[float, ...],
    names: tuple[str, ...],
    units: tuple[str, ...],
    scale: tuple[float, ...],
    noise: Noise,
) -> VoxelFit:
    """Search from `start` (S0 relative to the voxel's largest signal) and return the parameters times `scale`."""
    n = series.voxels
    sigma = None if noise.sigma is None else as_sigma(noise.sigma, n, series.what)
    if sigma is None and isinstance(noise, Rician):
        gaussian = searched(series, model, start, lower, upper, names, units, scale, Gaussian())
        sigma = as_sigma(residual_noise(gaussian, smallest_signal(gaussian, series, model, scale)), n, series.what)
    rician, known = isinstance(noise, Rician), sigma is not None
    p = start.shape[1]
    values, covariance, rss = np.empty((n, p)), np.empty((n, p, p)), np.empty(n)
    code = series.code.copy()
    kernels.over_voxels(
        kernels.search, n, model, series.signal, series.b, series.averages,
        np.ones(n) if sigma is None else sigma, known, rician, np.array(lower), np.array(upper),
        fisher_table() if rician else np.zeros(2), MOST_STEPS, start, values, covariance, rss, code,
    )  # fmt: skip
    factor = np.array(scale)
    fit = VoxelFit(
        names, units, values * factor, covariance * np.outer(factor, factor), rss, code, series.signal.shape[1], known
    )
    if rician:
        assert sigma is not None
        expected = _magnitude(model_signal(fit, series, model, scale), sigma)
        fit = replace(fit, rss=((series.signal - expected) ** 2).sum(1))
    return fit


def model_signal(fit: VoxelFit, series: Series, model: int, scale: tuple[float, ...]) -> np.ndarray:
    """Fitted signal, (voxels, samples)."""
    s0, d, *rest = (fit.values / np.array(scale)).T[..., None]
    bd = series.b * d
    with np.errstate(over="ignore"):
        if model == kernels.MONOEXPONENTIAL:
            return s0 * np.exp(-bd)
        if model == kernels.KURTOSIS:
            return s0 * np.exp(-bd + bd**2 * rest[0] / 6)
        f, fast = rest
        return s0 * ((1 - f) * np.exp(-bd) + f * np.exp(-series.b * fast))


def smallest_signal(fit: VoxelFit, series: Series, model: int, scale: tuple[float, ...]) -> np.ndarray:
    """Smallest fitted signal of each voxel; 0 where there is none."""
    return np.nan_to_num(model_signal(fit, series, model, scale).min(1), nan=0.0)


def _magnitude(signal: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    import torch

    return rician_mean(torch.from_numpy(signal), torch.from_numpy(sigma[:, None].copy())).numpy()
