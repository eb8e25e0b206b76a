"""Simple measures of a raw series: where the body is, noise, shift, ghosts, fat that was not suppressed, clipping.

Each is a number with a plain meaning, on one image (z, y, x) or a series; what is too much is decided in
:mod:`biomodel.imaging.series_quality`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from biomodel.errors import InputError

__all__ = ["body", "clipped", "ghost_ratio", "noise_level", "rim_sectors", "shift", "unsuppressed_fat"]

#: Median of |x| of a standard normal variable.
_MEDIAN_ABS = 0.674489750196
#: Fewest voxels from which a measure is taken.
LEAST_VOXELS = 50
#: Width of the low pass of the phase correlation, cycles per voxel: single voxels are noise, several are anatomy.
LOW_PASS = 0.12
#: Fewest slices from which a shift across slices can be told.
LEAST_SLICES = 8
#: Depth of subcutaneous fat under the surface, mm: deeper than skin (1 to 2 mm in the breast), less deep than most
#: layers of fat.
RIM = (2.5, 8.0)
#: Number of sectors around the body in which fat suppression is compared.
SECTORS = 12


def in_plane(spacing: Sequence[float]) -> tuple[int, int]:
    """Return the two axes of a slice: all but the one with the largest distance between voxels (z for equal ones)."""
    across = int(np.argmax(np.round(np.asarray(spacing, float), 3)))
    first, second = (axis for axis in range(3) if axis != across)
    return first, second


def body(image: np.ndarray) -> np.ndarray:
    """Return where the patient is, bool (z, y, x): above half of Otsu's threshold, holes filled, without specks.

    Half of the threshold, since it lies between bright and dark tissue where fat is suppressed; skin is bright again
    and closes the outline.

    Raises
    ------
    InputError
        If SimpleITK is not installed.
    """
    try:
        import SimpleITK as sitk
    except ImportError:
        raise InputError(
            "the check of a series needs SimpleITK, which is not installed. Install it with pip install "
            "'tumorcast[imaging]'."
        ) from None
    clean = np.nan_to_num(np.asarray(image, np.float32))
    if not np.ptp(clean) > 0:
        return np.zeros(clean.shape, bool)
    otsu = sitk.OtsuThresholdImageFilter()
    otsu.Execute(sitk.GetImageFromArray(clean))
    plane = ndimage.generate_binary_structure(2, 1)[None]
    # Repeated beyond the edges of the image: a body that leaves it does not end there.
    edge = ((0, 0), (4, 4), (4, 4))
    bright = ndimage.binary_closing(np.pad(clean > otsu.GetThreshold() / 2, edge, mode="edge"), plane, iterations=2)
    for z in range(bright.shape[0]):
        bright[z] = ndimage.binary_fill_holes(bright[z])
    bright = ndimage.binary_opening(bright, plane, iterations=2)[:, 4:-4, 4:-4]
    parts, count = ndimage.label(bright)
    if count == 0:
        return bright
    # All parts of some size: both breasts, both legs.
    sizes = np.bincount(parts.ravel())[1:]
    return np.isin(parts, 1 + np.flatnonzero(sizes >= 0.2 * sizes.max()))


def noise_level(image: np.ndarray, inside: np.ndarray, axes: tuple[int, int]) -> float:
    """Return the standard deviation of the noise inside the body, from neighbours in the slice.

    Second differences along both axes, (1, -2, 1) ⊗ (1, -2, 1) / 6, cancel all that changes smoothly and keep the
    noise's standard deviation (Immerkær 1996, Comput Vis Image Underst 64:300); the median of their magnitude over
    0.6745 estimates it. It is taken over the half of the body with the least slope, away from edges; what is
    left of them makes it up to a fifth too high. Images that the scanner interpolated have smoother noise, so that the
    estimate is too low there.

    Returns
    -------
    float
        NaN if there are too few voxels.
    """
    detail = np.nan_to_num(np.asarray(image, np.float32))
    widths = [1.5 if axis in axes else 0.0 for axis in range(3)]
    slope = sum(
        ndimage.gaussian_filter(detail, widths, order=[1 if a == axis else 0 for a in range(3)]) ** 2 for axis in axes
    )
    whole = inside
    for axis in axes:
        detail = ndimage.correlate1d(detail, [1.0, -2.0, 1.0], axis)
        shape = [3 if a == axis else 1 for a in range(3)]
        whole = ndimage.binary_erosion(whole, np.ones(shape))
    if whole.sum() < 2 * LEAST_VOXELS:
        return float("nan")
    whole = whole & (slope <= np.median(slope[whole]))
    detail = detail[whole] / 6
    return float(np.median(np.abs(detail)) / _MEDIAN_ABS) if detail.size >= LEAST_VOXELS else float("nan")


def shift(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """Return how far `moving` lies from `fixed`, voxels (z, y, x), as one translation.

    Phase correlation (Kuglin and Hines 1975, Proc IEEE Conf Cybernetics and Society, 163): the phases of the Fourier
    transforms alone, so that brighter tissue in one of them does not count as motion; of the images' gradients, so
    that tissue that turns from bright to dark keeps its edges. They are weighted by a Gaussian, which gives the peak
    the shape of a Gaussian, whose top lies between voxels. With fewer than eight slices only the shift in the plane is
    told. Breathing and other motion of parts gives some average.
    """
    axes = (0, 1, 2) if fixed.shape[0] >= LEAST_SLICES else (1, 2)
    spectrum = _spectrum(fixed, axes) * np.conj(_spectrum(moving, axes))
    for axis in set(range(3)) - set(axes):
        spectrum = spectrum.sum(axis, keepdims=True)
    spectrum /= np.maximum(np.abs(spectrum), np.finfo(np.float32).tiny)
    shape = [fixed.shape[axis] if axis in axes else 1 for axis in range(3)]
    for axis in axes:
        frequency = np.fft.rfftfreq(shape[axis]) if axis == axes[-1] else np.fft.fftfreq(shape[axis])
        weight = np.exp(-(frequency**2) / (2 * LOW_PASS**2))
        spectrum = spectrum * weight.reshape([-1 if a == axis else 1 for a in range(3)])
    peak = np.fft.irfftn(spectrum, [shape[axis] for axis in axes], axes)
    top = np.unravel_index(int(np.argmax(peak)), peak.shape)
    found = np.zeros(3)
    for axis in axes:
        values = []
        for step in (-1, 0, 1):
            place = list(top)
            place[axis] = (place[axis] + step) % peak.shape[axis]
            values.append(np.log(max(float(peak[tuple(place)]), 1e-12)))
        curve = values[0] - 2 * values[1] + values[2]
        offset = 0.0 if curve >= 0 else 0.5 * (values[0] - values[2]) / curve
        whole = top[axis] - peak.shape[axis] if top[axis] > peak.shape[axis] // 2 else top[axis]
        found[axis] = -(whole + np.clip(offset, -0.5, 0.5))
    return found + 0.0


def _spectrum(image: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    values = ndimage.gaussian_gradient_magnitude(np.nan_to_num(np.asarray(image, np.float32)), 1.0)
    values = values - values.mean()
    for axis in axes:  # without a window, opposite edges of the image would be an edge of their own
        window = np.hanning(values.shape[axis] + 2)[1:-1].astype(np.float32)
        values = values * window.reshape([-1 if a == axis else 1 for a in range(3)])
    return np.fft.rfftn(values, axes=axes)


def ghost_ratio(image: np.ndarray, inside: np.ndarray, axis: int, other: int) -> float:
    """Return the signal of ghosts in the air beside the body, along `axis`, as a part of the body's signal.

    Mean of the air beside the body along `axis` minus that along `other` (the second axis of the slices), over twice
    the mean of the body, as the American College of Radiology measures it on its phantom. Noise counts in both and
    cancels.

    Returns
    -------
    float
        NaN if there is too little air on a side, or the scanner has set it to 0.
    """
    near = ndimage.binary_dilation(inside, iterations=3)
    along, across = (inside.any(a, keepdims=True) & ~near for a in (axis, other))
    one, two = image[along & ~across], image[across & ~along]
    if min(one.size, two.size) < LEAST_VOXELS or not (np.any(one) and np.any(two)):
        return float("nan")
    return float((np.nanmean(one) - np.nanmean(two)) / (2 * np.nanmean(image[inside])))


def rim_sectors(image: np.ndarray, inside: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, float]:
    """Return the median signal of subcutaneous fat in sectors around the body, and that of the tissue deeper inside.

    Returns
    -------
    ndarray, shape (SECTORS,)
        Of the rim 2.5 to 8 mm under the surface, by the angle around the body's middle; NaN where there is none.
    float
    """
    padded = np.pad(inside, ((0, 0), (1, 1), (1, 1)))  # a body cut by the image's edge has its surface there
    depth = np.stack([ndimage.distance_transform_edt(plane, spacing[1:]) for plane in padded])[:, 1:-1, 1:-1]
    rim = (depth >= RIM[0]) & (depth <= RIM[1])
    deep = depth > RIM[1]
    values = np.full(SECTORS, np.nan)
    if not (rim.any() and deep.any()):
        return values, float("nan")
    places = np.argwhere(rim)
    middle = np.argwhere(inside).mean(0)
    angle = np.arctan2((places[:, 1] - middle[1]) * spacing[1], (places[:, 2] - middle[2]) * spacing[2])
    sector = ((angle + np.pi) / (2 * np.pi) * SECTORS).astype(int) % SECTORS
    signal = image[rim]
    for number in range(SECTORS):
        if (sector == number).sum() >= LEAST_VOXELS:
            values[number] = np.nanmedian(signal[sector == number])
    return values, float(np.nanmedian(image[deep]))


def unsuppressed_fat(
    low: np.ndarray, high: np.ndarray, difference: float, inside: np.ndarray, sigma: float, largest_adc: float
) -> float:
    """Return the part of the body that does not lose signal with diffusion weighting, as fat does.

    Parameters
    ----------
    low, high
        Images of the lowest and the highest b-value, (z, y, x).
    difference
        Of the two b-values, s/mm².
    sigma
        Noise of `high`; voxels under five times that are left out, as their floor is noise.
    largest_adc
        mm²/s.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        adc = np.log(low / high) / difference
    slow = inside & (high > 5 * sigma) & (adc < largest_adc)
    # Single voxels are noise; fat lies in patches.
    slow = ndimage.binary_opening(slow, np.ones((1, 2, 2)))
    return float(slow.sum() / max(int(inside.sum()), 1))


def clipped(sample: np.ndarray, ceiling: float) -> int:
    """Return how many voxels of an image are at the largest value that could be stored.

    Without a known ceiling those that share the image's largest value, which noise makes rare unless it is a limit.
    """
    top = ceiling if np.isfinite(ceiling) else float(np.nanmax(sample))
    # Scaled in single precision on the way.
    return int((sample >= top - 1e-6 * abs(top)).sum()) if top > 0 else 0
