"""The search for small rigid motions by least squares: of the samples of a series, and between visits.

A rigid motion of few voxels against a reference of the same contrast is a least-squares problem of six unknowns, whose
normal equations stay the same from step to step (inverse compositional Gauss-Newton: Baker and Matthews 2004, Int J
Comput Vis 56:221, doi:10.1023/B:VISI.0000011205.11775.fd). A handful of steps does what SimpleITK's descent does in
forty, and ends nearer to the minimum. What images look like between voxels is SimpleITK's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from biomodel.imaging.series_grid import Grid
from biomodel.imaging.transforms import from_itk, simpleitk, to_itk

if TYPE_CHECKING:
    import SimpleITK as sitk

__all__ = ["joined", "levelled", "like_the_first", "like_the_others", "sharpened"]

#: Voxels are joined until about this many are left: a rigid motion needs no more.
MOST_VOXELS = 150_000
#: Offset under the logarithm, in parts of the signal that one voxel in ten exceeds: bright uptake counts less then, and
#: noise in air stays small. From half to four times of it the error on virtual patients differs by a tenth.
OFFSET, BRIGHT = 2.0, 90.0
#: Most steps of one search, and the step, in voxels, after which it ends.
STEPS, LEAST_STEP = 15, 0.01
#: Least share of the region that is compared, where samples have moved out of view.
LEAST_SEEN = 0.3
#: Over which images of two visits are brought to one local mean and contrast, mm (standard deviation), and the part of
#: the whole image's contrast below which places count less. Within a series it would let uptake look like motion.
LOCAL, QUIET = 10.0, 0.25


def joined(grid: Grid) -> list[int]:
    """Return how many voxels to join along x, y, z: the smallest first, until few enough are left."""
    size, side, factors = np.array(grid.shape[::-1], float), np.array(grid.spacing[::-1]), np.ones(3, int)
    while np.prod(size / factors) > MOST_VOXELS:
        able = np.where(size / (factors + 1) >= 8, side * factors, np.inf)
        if not np.isfinite(able).any():
            break
        factors[int(np.argmin(able))] += 1
    return [int(factor) for factor in factors]


def sharpened(
    fixed: np.ndarray, weight: np.ndarray, grid: Grid, moving: np.ndarray, moving_weight: np.ndarray, moving_grid: Grid,
    start: sitk.Euler3DTransform,
) -> sitk.Euler3DTransform:  # fmt: skip
    """Return the rigid motion between two images of the same contrast, up to shading and gain, from one close by.

    Both images are brought to one local mean and contrast first. `start` is returned where the search finds nothing.

    Parameters
    ----------
    fixed, moving
        (z, y, x), no unknown voxels.
    weight, moving_weight
        (z, y, x): how much voxels count; 0 where they do not.
    start
        From points of the fixed to points of the moving image.
    """
    sitk = simpleitk("registration")
    even = to_itk(_local(fixed, weight > 0, grid.spacing), grid)
    level = to_itk(_local(moving, moving_weight > 0, moving_grid.spacing), moving_grid)
    factors = joined(grid)
    small = sitk.BinShrink(even, factors)
    share = from_itk(sitk.BinShrink(to_itk(weight.astype(np.float32), grid), factors)).astype(float)
    other = sitk.BinShrink(level, joined(moving_grid))
    use = share > 0
    return _Reference(small, from_itk(small).astype(float), use, share[use]).search(other, start)


def _local(values: np.ndarray, counts: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Values less their local mean, over their local contrast; voxel sides (z, y, x) in mm."""
    width = [LOCAL / step for step in spacing]

    def mean(array: np.ndarray) -> np.ndarray:
        found: np.ndarray = ndimage.gaussian_filter(np.where(counts, array, 0.0), width, mode="constant") / share
        return found

    share = np.maximum(ndimage.gaussian_filter(counts.astype(float), width, mode="constant"), 1e-3)
    data = np.asarray(values, float)
    middle = mean(data)
    contrast = np.sqrt(np.maximum(mean((data - middle) ** 2), 0)) + QUIET * float(data[counts].std())
    return np.asarray((data - middle) / np.maximum(contrast, 1e-12), np.float32)


def levelled(images: Sequence[sitk.Image], inside: np.ndarray) -> list[sitk.Image]:
    """Return logarithms of images, in which uptake changes less of what moves.

    Parameters
    ----------
    images
        Of one grid, no unknown voxels.
    inside
        bool (z, y, x): where signals count.
    """
    values = [np.maximum(from_itk(image), 0) for image in images]
    bright = float(np.median([np.percentile(value[inside], BRIGHT) for value in values]))
    return [
        _like(np.log(value + max(OFFSET * bright, 1e-6)), image) for value, image in zip(values, images, strict=True)
    ]


def like_the_first(
    images: Sequence[sitk.Image], found: Sequence[sitk.Euler3DTransform], inside: np.ndarray
) -> list[sitk.Euler3DTransform]:
    """Return the motions that bring each image to the first, from those found so far."""
    _, use = _aligned(images, found, inside)
    first = _Reference(images[0], from_itk(images[0]).astype(float), use, np.ones(int(use.sum())))
    return [found[0], *(first.search(one, start) for one, start in zip(images[1:], found[1:], strict=True))]


def like_the_others(
    images: Sequence[sitk.Image], found: Sequence[sitk.Euler3DTransform], inside: np.ndarray, components: int
) -> list[sitk.Euler3DTransform]:
    """Return the motions that bring each image to what the leading principal components of all say it looks like.

    Parameters
    ----------
    images
        n, of one grid.
    found
        From points of the common grid to points of each image, so far.
    inside
        bool (z, y, x).
    components
        Number of principal components.
    """
    aligned, use = _aligned(images, found, inside)
    mean = aligned.mean(0)
    centred = aligned - mean
    rows = centred[:, use]
    weights, vectors = np.linalg.eigh(rows @ rows.T)
    leading = vectors[:, np.argsort(weights)[::-1][:components]]
    drawn = np.tensordot(leading, np.tensordot(leading.T, centred, 1), 1)
    return [
        _Reference(images[0], mean + part, use, np.ones(int(use.sum()))).search(image, start)
        for part, image, start in zip(drawn, images, found, strict=True)
    ]


def _like(values: np.ndarray, image: sitk.Image) -> sitk.Image:
    made = simpleitk("motion correction").GetImageFromArray(values.astype(np.float32))
    made.CopyInformation(image)
    return made


def _aligned(
    images: Sequence[sitk.Image], found: Sequence[sitk.Euler3DTransform], inside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """All images on the common grid, float64 (n, z, y, x), and the voxels that (nearly) all of them show.

    At the rim a mean over those samples alone that show it would look like their contrast, not like the anatomy.
    """
    sitk = simpleitk("motion correction")
    stack = np.stack(
        [
            from_itk(sitk.Resample(image, images[0], motion, sitk.sitkLinear, float("nan")))
            for image, motion in zip(images, found, strict=True)
        ]
    ).astype(float)
    known = np.isfinite(stack)
    share = known.mean(0)
    seen = ndimage.binary_erosion(share >= np.quantile(share[inside], 1 - LEAST_SEEN), border_value=1)
    if not known.all():
        mean = np.where(known, stack, 0).sum(0) / np.maximum(known.sum(0), 1)
        stack = np.where(known, stack, mean)
    return stack, inside & (seen if (inside & seen).any() else share > 0)


class _Reference:
    """An image, and how it changes where it moves: S(W x) ≈ S + ∇S · (w × x + t), x from the centre of rotation."""

    def __init__(self, image: sitk.Image, values: np.ndarray, use: np.ndarray, weight: np.ndarray) -> None:
        self.image, self.use, self.weight = image, use, weight
        self.size = np.array(image.GetSpacing())
        axes = np.array(image.GetDirection()).reshape(3, 3) * self.size
        slopes = np.stack(np.gradient(values)[::-1], -1)[use] @ np.linalg.inv(axes)
        self.points = np.argwhere(use)[:, ::-1] @ axes.T + np.array(image.GetOrigin())
        self.values, self.slopes = values[use], slopes

    def search(self, moving: sitk.Image, start: sitk.Euler3DTransform) -> sitk.Euler3DTransform:
        """Return the motion, from points of the reference to points of the image; `start` where none is better."""
        sitk = simpleitk("motion correction")
        centre = np.array(start.GetCenter())
        away = self.points - centre
        radius = max(float(np.sqrt((away**2).sum(1).mean())), 1.0)
        columns = np.column_stack([self.slopes, np.cross(away, self.slopes), self.values, np.ones(len(away))])
        weighted = (columns * self.weight[:, None]).T
        products = weighted @ columns
        turn, shift = np.array(start.GetMatrix()).reshape(3, 3), np.array(start.GetTranslation())
        best, likest = start, -1.0
        for _ in range(STEPS):
            here = sitk.Euler3DTransform()
            here.SetCenter(centre.tolist())
            here.SetMatrix(turn.ravel().tolist(), 1e-6)
            here.SetTranslation(shift.tolist())
            seen = from_itk(sitk.Resample(moving, self.image, here, sitk.sitkLinear, float("nan")))[self.use]
            known = np.isfinite(seen)
            alike = _correlation(self.values[known], seen[known], self.weight[known])
            if not alike > likest - 1e-4:
                break
            if alike > likest:
                best, likest = here, alike
            try:
                solved = np.linalg.solve(
                    products - weighted[:, ~known] @ columns[~known], weighted @ np.where(known, seen, 0.0)
                )
            except np.linalg.LinAlgError:
                break
            if not solved[6] > 0:
                break
            move, angle = solved[:3] / solved[6], solved[3:6] / solved[6]
            # What the image shows at T x the reference shows at W x, so that T W⁻¹ is better than T.
            turn = turn @ Rotation.from_rotvec(angle).as_matrix().T
            shift = shift - turn @ move
            if np.linalg.norm(move) + np.linalg.norm(angle) * radius < LEAST_STEP * self.size.min():
                break
        return best


def _correlation(one: np.ndarray, two: np.ndarray, weight: np.ndarray) -> float:
    if one.size < 8:
        return -1.0
    a, b = one - np.average(one, weights=weight), two - np.average(two, weights=weight)
    length = float(np.sqrt((weight @ a**2) * (weight @ b**2)))
    return float(weight @ (a * b)) / length if length > 0 else -1.0
