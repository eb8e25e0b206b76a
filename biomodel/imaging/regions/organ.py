"""The organ's mask: a body, a breast in front of the chest wall, or a mask that the user brings (a brain).

A mask without a doubt is never returned silently: each comes with what was measured on it and what is not plausible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from biomodel.errors import GeometryError, InputError

__all__ = ["BRAIN", "BREAST", "Organ", "Usual", "body_mask", "breast_mask", "given_mask"]


@dataclass(frozen=True)
class Usual:
    """What is plausible for a mask of an organ.

    Parameters
    ----------
    name : str
    volume : (float, float)
        cm³.
    parts : int
        Most parts of some size: two breasts, one brain.
    """

    name: str
    volume: tuple[float, float]
    parts: int = 1


#: Wide on purpose: what lies outside is an error of the mask or the units, not a rare person. A breast has some 200 to
#: 2500 cm³, two with what a small field of view cuts off 30 to 6000; an adult brain 900 to 1700 cm³.
BREAST, BRAIN, BODY = (
    Usual("breast", (30.0, 6000.0), 2),
    Usual("brain", (700.0, 2200.0)),
    Usual("body", (30.0, 150_000.0), 2),
)
#: Smooth surfaces (in mm) of masks, against specks and whiskers of noise.
SMOOTH = 3.0
#: The surface lies where the signal falls to this part of that inside: a half for one tissue against air, less where
#: dark fat under it lies beside bright gland.
EDGE = 0.4
#: Part of the columns (percent) that surely show the chest, and how stiff its surface is against bending.
LOWEST, STIFF = 5.0, 0.05


@dataclass(frozen=True, eq=False)
class Organ:
    """An organ's mask and what is known of its quality.

    Attributes
    ----------
    mask : ndarray of bool, shape (z, y, x)
    volume : float
        cm³.
    notes : tuple of str
        How it came about.
    doubts : tuple of str
        What is not plausible; none for a mask that passes.
    """

    mask: np.ndarray
    volume: float
    notes: tuple[str, ...]
    doubts: tuple[str, ...]

    @property
    def plausible(self) -> bool:
        return not self.doubts


def _spacing(spacing: Sequence[float], shape: tuple[int, ...], what: str) -> np.ndarray:
    steps = np.asarray(spacing, float)
    if len(shape) != 3 or steps.shape != (3,) or not (np.isfinite(steps).all() and (steps > 0).all()):
        raise GeometryError(
            f"{what}: shape {shape}, spacing {tuple(spacing)}; expected (z, y, x) and three sides in mm."
        )
    return steps


def _assess(mask: np.ndarray, spacing: np.ndarray, usual: Usual, notes: Sequence[str]) -> Organ:
    volume = float(mask.sum() * spacing.prod() / 1000)
    doubts = []
    low, high = usual.volume
    if not low <= volume <= high:
        doubts.append(f"{usual.name}: {volume:.1f} cm³; expected {low:g} to {high:g} cm³.")
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())[1:]
    large = int((sizes >= 0.05 * sizes.max()).sum()) if sizes.size else 0
    if large > usual.parts:
        doubts.append(f"{usual.name}: {large} separate parts; expected at most {usual.parts}.")
    loose = 1 - sizes[np.argsort(sizes)[-usual.parts :]].sum() / mask.sum() if sizes.size else 0.0
    if loose > 0.05:
        doubts.append(f"{usual.name}: {loose:.0%} of the mask lie in small loose parts.")
    filled = ndimage.binary_fill_holes(mask)
    if (holes := int(filled.sum() - mask.sum())) > 0.02 * mask.sum():
        doubts.append(f"{usual.name}: holes of {holes} voxels.")
    if mask.mean() > 0.98:
        doubts.append(f"{usual.name}: the mask fills the image; nothing outside was found.")
    return Organ(mask, volume, tuple(notes), tuple(doubts))


def given_mask(mask: np.ndarray, spacing: Sequence[float], usual: Usual) -> Organ:
    """Check a mask that somebody else made, such as a brain.

    Raises
    ------
    GeometryError
        If shape or spacing cannot be used.
    InputError
        If it is empty or not a mask.
    """
    inside = np.asarray(mask)
    steps = _spacing(spacing, inside.shape, "organ mask")
    if inside.dtype != bool and not np.isin(inside, (0, 1)).all():
        raise InputError("organ mask: values other than 0 and 1. Choose the organ's label first.")
    if not inside.any():
        raise InputError("organ mask: it is empty.")
    return _assess(inside.astype(bool), steps, usual, ["Given by the user."])


def _ball(spacing: np.ndarray, radius: float) -> np.ndarray:
    reach = np.maximum(np.floor(radius / spacing).astype(int), 0)
    grids = np.ogrid[tuple(slice(-r, r + 1) for r in reach)]
    return sum((g * s) ** 2 for g, s in zip(grids, spacing, strict=True)) <= radius**2 + 1e-9


def body_mask(image: np.ndarray, spacing: Sequence[float], *, usual: Usual = BODY) -> Organ:
    """Where the patient is in an image.

    The lower of two thresholds by Otsu (1979, doi:10.1109/TSMC.1979.4310076) on the logarithm of the signal after a
    slight smoothing: it parts air from dark tissue, such as suppressed fat, the upper one dark from bright tissue. Then
    opening, the largest parts, and holes filled.

    Parameters
    ----------
    image : ndarray, shape (z, y, x)
        Any image with signal in all tissue; the sum of several has less noise.
    spacing
        Voxel sides (dz, dy, dx), mm.

    Raises
    ------
    InputError
        If the image has no contrast, or SimpleITK is not installed.
    """
    values = np.nan_to_num(np.asarray(image, float))
    steps = _spacing(spacing, values.shape, "body mask")
    if not np.ptp(values) > 0:
        raise InputError("body mask: the image has the same value everywhere.")
    try:
        import SimpleITK as sitk
    except ImportError:
        raise InputError(
            "the body's mask needs SimpleITK, which is not installed. Install it with pip install 'tumorcast[imaging]'."
        ) from None
    soft = ndimage.gaussian_filter(values, 1.5 / steps)
    # Scanners set air to 0; the floor keeps its logarithm within reach of noise.
    logs = np.log(np.maximum(soft, 1e-3 * np.percentile(soft, 99)))
    otsu = sitk.OtsuMultipleThresholdsImageFilter()
    otsu.SetNumberOfThresholds(2)
    otsu.SetNumberOfHistogramBins(256)
    otsu.Execute(sitk.GetImageFromArray(logs.astype(np.float32)))
    threshold = otsu.GetThresholds()[0]
    bright = logs > threshold
    # The image's edge is no edge of the body.
    padded = np.pad(bright, 3, mode="edge")
    padded = ndimage.binary_opening(ndimage.binary_closing(padded, _ball(steps, SMOOTH)), _ball(steps, SMOOTH))
    bright = padded[3:-3, 3:-3, 3:-3]
    labels, count = ndimage.label(bright)
    if count == 0:
        raise InputError("body mask: nothing of some size lies above Otsu's threshold.")
    sizes = np.bincount(labels.ravel())[1:]
    kept = np.isin(labels, 1 + np.flatnonzero(sizes >= 0.2 * sizes.max()))
    kept &= ndimage.gaussian_filter(values, 0.8 / steps) >= _surface(soft, kept, steps)
    kept = ndimage.binary_opening(np.pad(kept, 3, mode="edge"), _ball(steps, SMOOTH))[3:-3, 3:-3, 3:-3]
    for z in range(kept.shape[0]):
        kept[z] = ndimage.binary_fill_holes(kept[z])
    return _assess(
        kept, steps, usual, [f"Above a signal of {np.exp(threshold):.3g} (the lower of two by Otsu on its logarithm)."]
    )


def _surface(soft: np.ndarray, body: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Signal at the body's surface: a part of that just inside (geometric mean over some mm), everywhere.

    A threshold far below the tissue's signal, as one on logarithms is where there is little noise, lies outside of the
    true surface by the width of the blur.
    """
    inner = ndimage.binary_erosion(np.pad(body, 1, mode="edge"), _ball(spacing, SMOOTH))[1:-1, 1:-1, 1:-1]
    if not inner.any():
        return np.zeros(body.shape)
    weight = ndimage.gaussian_filter(inner.astype(float), 5.0 / spacing) + 1e-6
    logs = np.log(np.maximum(soft, soft[inner].min() + 1e-12))
    mean = ndimage.gaussian_filter(np.where(inner, logs, 0.0), 5.0 / spacing) + 1e-6 * logs[inner].mean()
    return EDGE * np.exp(mean / weight)


def breast_mask(
    image: np.ndarray,
    spacing: Sequence[float],
    *,
    wall: np.ndarray | None = None,
    usual: Usual = BREAST,
) -> Organ:
    """The breasts: what stands out of the chest wall.

    The front of the body is a height over (z, x). A smooth surface, quadratic in z and x, is laid under it by
    asymmetric least squares (Eilers and Boelens 2005, as for baselines of spectra): it follows the columns beside and
    between the breasts, where the front is the chest itself. What lies in front of it is breast. Signals play no part
    behind the skin, so that it works with and without fat suppression; what the breast has behind that surface, and the
    axilla, are not in it.

    Parameters
    ----------
    image : ndarray, shape (z, y, x)
        T1-weighted; y grows to the front (as all images come in here), the patient lying prone.
    spacing
        Voxel sides (dz, dy, dx), mm.
    wall : ndarray, shape (z, x), optional
        Height of the chest wall, voxels along y, where it is known better.

    Raises
    ------
    GeometryError, InputError
        As for :func:`body_mask`, and if no column stands out.
    """
    body = body_mask(image, spacing)
    steps = np.asarray(spacing, float)
    mask = body.mask
    count = mask.shape[1]
    filled = np.asarray(mask.any(1))
    front = np.where(filled, count - mask[:, ::-1].argmax(1), 0).astype(float)
    if wall is None:
        wall = _wall(front, filled, steps)
    elif np.shape(wall) != filled.shape:
        raise GeometryError(f"breast mask: wall of shape {np.shape(wall)}; expected {filled.shape} (z, x).")
    breast = mask & (np.arange(count)[None, :, None] >= np.asarray(wall, float)[:, None, :])
    element = _ball(steps, SMOOTH)
    breast = ndimage.binary_opening(np.pad(breast, 3, mode="edge"), element)[3:-3, 3:-3, 3:-3]
    labels, parts = ndimage.label(breast)
    if parts == 0:
        raise InputError(
            "breast mask: nothing stands out of the chest wall. Is y the axis from back to front, and is the chest in "
            "the field of view? Give the wall, or a mask."
        )
    sizes = np.bincount(labels.ravel())[1:]
    breast = np.isin(labels, 1 + np.flatnonzero(sizes >= 0.1 * sizes.max()))
    organ = _assess(breast, steps, usual, [*body.notes, "In front of a smooth chest wall under the body's front."])
    doubts = list(organ.doubts)
    if (share := organ.volume / body.volume) > 0.98:
        doubts.append(f"breast: {share:.0%} of the body; no chest wall was found behind it.")
    if (cut := breast[:, -1].mean()) > 0.02:
        doubts.append(f"breast: it touches the front of the image over {cut:.0%} of it; the field of view cuts it off.")
    return Organ(organ.mask, organ.volume, organ.notes, tuple(doubts))


def _wall(front: np.ndarray, filled: np.ndarray, spacing: np.ndarray, rounds: int = 30) -> np.ndarray:
    """Smooth surface under the front's lower parts, (z, x), voxels along y."""
    z, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in front.shape), indexing="ij")
    terms = np.stack([np.ones_like(z), z, x, z * z, x * x, z * x], -1).reshape(-1, 6)
    height, inside = front.ravel(), filled.ravel()
    # From the lowest columns, not from all: where the breast fills most of the view, the mean is far up on it.
    weight = (inside & (height <= np.percentile(height[inside], LOWEST) + 1)).astype(float)
    # Little is seen of the chest then, and a slight pull keeps the surface from bending where nothing holds it.
    pull = np.diag([0.0, 0.01, 0.01, *[STIFF] * 3])
    found = np.zeros(6)
    for _ in range(rounds):
        scaled = terms * weight[:, None]
        found = np.linalg.solve(scaled.T @ terms / weight.sum() + pull, scaled.T @ height / weight.sum())
        weight = np.where(inside, np.where(height > terms @ found + 2.0 / spacing[1], 1e-4, 1.0), 0.0)
    return (terms @ found).reshape(front.shape)
