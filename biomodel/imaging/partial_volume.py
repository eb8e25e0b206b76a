"""ADC of tumour in voxels that it shares with other tissue.

At the edge of a tumour a voxel holds tumour and fat or gland, and its ADC lies between theirs. Fat has a low ADC and
gland one of half-full tumour: read as cells, such voxels would tell of many cells where there are few. The enhancement
of the same voxel tells the share of tumour in it (two tissues mix linearly, in signal gained as, for small b, in ADC).
With the share, the tumour's own ADC follows, with an error that grows as the share falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from biomodel.errors import GeometryError, InputError

__all__ = ["TumourShare", "tumour_adc", "tumour_share"]

#: Standard deviation of an estimated share at the edge: uptake is patchy, and a tumour's rim enhances unlike its core.
#: In single voxels of virtual patients it is 0.2, but all of an edge err together, while users of the error take voxels
#: as independent: so that the edge does not outweigh the core, a working value.
SHARE_SD = 0.5
#: Smallest share from which the tumour's ADC is computed; below, it would be mostly noise.
LEAST_SHARE = 0.4
#: Lengths over which enhancement and ADC of tumour and of what surrounds it are averaged, mm.
CORE, SURROUNDINGS, NEIGHBOURS = 3.0, 6.0, 3.0
#: What is farther away from the tumour than this is not its surroundings, mm.
REACH = 12.0

Spacing = Sequence[float] | np.ndarray


@dataclass(frozen=True, eq=False)
class TumourShare:
    """Share of tumour in the voxels of a diffusion series.

    Attributes
    ----------
    share, sd : ndarray, shape (z, y, x)
        Share of tumour, 0 to 1, and its standard deviation.
    outside : ndarray of bool, shape (z, y, x)
        Voxels of the organ near the tumour, but free of it.
    """

    share: np.ndarray
    sd: np.ndarray
    outside: np.ndarray


def tumour_share(
    gain: np.ndarray, region: np.ndarray, organ: np.ndarray, spacing: Spacing, resolution: Sequence[float]
) -> TumourShare:
    """Share of tumour in each voxel, as a diffusion series of a given resolution sees it.

    Parameters
    ----------
    gain : ndarray, shape (z, y, x)
        Signal after the agent less that before.
    region, organ : ndarray of bool, shape (z, y, x)
        Tumour, as drawn or found, and the organ.
    spacing : (dz, dy, dx)
        Of these arrays, mm.
    resolution : (dz, dy, dx)
        Voxel sizes at which the diffusion series was acquired, mm. A voxel of size w averages over a box of that width,
        and linear interpolation onto this grid over a triangle of twice that width: together a variance of
        w²/12 + w²/6, so a Gaussian with a standard deviation of w / 2.

    Raises
    ------
    GeometryError
        If shapes differ.
    InputError
        If the region is empty, or the organ has nothing beside it.
    """
    region, organ = np.asarray(region, bool), np.asarray(organ, bool)
    gain = np.nan_to_num(np.asarray(gain, float))
    if not gain.shape == region.shape == organ.shape:
        raise GeometryError(
            f"tumour_share: gain {gain.shape}, region {region.shape}, organ {organ.shape}; expected one grid."
        )
    if not region.any():
        raise InputError("tumour_share: the region is empty.")
    step = max(float(s) for s, n in zip(spacing, region.shape, strict=True) if n > 1)
    deep, away = (ndimage.distance_transform_edt(m, spacing) for m in (region, ~region))
    outside = organ & (away > 2.01 * step) & (away < REACH)
    if not outside.any():
        raise InputError("tumour_share: the organ has no tissue beside the tumour to compare it with.")
    inner = region & (deep > 1.01 * step)
    inner = inner if inner.sum() >= 0.1 * region.sum() else region
    full = mean_over(gain, inner, spacing, CORE)
    around = mean_over(gain, outside, spacing, SURROUNDINGS)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(full > around, (gain - around) / (full - around), 1.0)
    share = np.clip(share, 0.0, 1.0)
    # Deep inside, weak enhancement is poor supply, not other tissue.
    share[deep > 1.51 * step] = 1.0
    blur = np.asarray(resolution, float) / 2 / np.asarray(spacing, float)
    share = ndimage.gaussian_filter(share, blur)
    share[deep > 2.01 * step] = 1.0
    # Where the voxel's neighbourhood may hold the edge: the region may be wrong by a voxel.
    edge = 1.0 - ndimage.gaussian_filter((deep > 1.01 * step).astype(float), blur)
    return TumourShare(share, SHARE_SD * edge, outside)


def tumour_adc(
    adc: np.ndarray, sd: np.ndarray, share: TumourShare, region: np.ndarray, spacing: Spacing
) -> tuple[np.ndarray, np.ndarray]:
    """ADC of the tumour's part of each voxel of the region, with its standard deviation.

    ADC = share tumour + (1 - share) surroundings, solved for the tumour's; errors of ADC, share and surroundings to
    first order. Outside of the region ADC and error are returned as they are.

    Parameters
    ----------
    adc, sd : ndarray, shape (z, y, x)
        mm²/s; NaN where unknown.
    share : TumourShare
    region : ndarray of bool, shape (z, y, x)
    spacing : (dz, dy, dx)
        mm.

    Returns
    -------
    adc, sd : ndarray, shape (z, y, x)
    """
    adc, sd = np.asarray(adc, float), np.asarray(sd, float)
    known = share.outside & np.isfinite(adc)
    if not known.any():
        raise InputError("tumour_adc: the tissue beside the tumour has no ADC.")
    beside = mean_over(np.nan_to_num(adc), known, spacing, NEIGHBOURS)
    spread = np.maximum(mean_over(np.nan_to_num(adc) ** 2, known, spacing, NEIGHBOURS) - beside**2, 0.0)
    part = np.clip(share.share, LEAST_SHARE, 1.0)
    own = (adc - (1.0 - part) * beside) / part
    variance = sd**2 + (1.0 - part) ** 2 * spread + share.sd**2 * (own - beside) ** 2
    return np.where(region, own, adc), np.where(region, np.sqrt(variance) / part, sd)


def mean_over(values: np.ndarray, where: np.ndarray, spacing: Spacing, length: float) -> np.ndarray:
    """Mean of values over a mask with Gaussian weights, everywhere; far from the mask, that of the whole mask."""
    if not where.any():
        return np.zeros(values.shape)
    mean = float(values[where].mean())
    steps = length / np.asarray(spacing, float)
    weight = ndimage.gaussian_filter(where.astype(float), steps)
    total = ndimage.gaussian_filter(np.where(where, values, 0.0), steps)
    return np.asarray((total + 1e-3 * mean) / (weight + 1e-3))
