"""The search for a rigid or affine transform, SimpleITK's, and the checks of what goes into it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from scipy import ndimage

from biomodel.errors import GeometryError, InputError
from biomodel.imaging.series_grid import Grid
from biomodel.imaging.transforms import FLIP, simpleitk, to_itk

if TYPE_CHECKING:
    import SimpleITK as sitk

#: A rigid or affine ITK transform; the search gives back the kind it was given.
Linear = TypeVar("Linear", "sitk.Euler3DTransform", "sitk.AffineTransform")

__all__ = ["MutualInformation", "check_image", "check_overlap", "linear", "mask_image", "matrix_of"]

#: Least share of the fixed image's voxels that must lie within the moving image.
LEAST_OVERLAP = 0.25
#: Largest share of unknown voxels.
MOST_UNKNOWN = 0.5
#: Fewest voxels that a search can be led by.
LEAST_VOXELS = 500


@dataclass(frozen=True)
class MutualInformation:
    """For images of other contrast: with the histogram of Mattes et al. 2003 (doi:10.1109/TMI.2003.809072).

    Parameters
    ----------
    bins
        Of the joint histogram along each axis.
    samples
        About how many voxels are looked at in each step; all where there are fewer.
    """

    bins: int = 32
    samples: int = 30_000

    def use(self, method: sitk.ImageRegistrationMethod) -> None:
        """Set the metric of a search."""
        method.SetMetricAsMattesMutualInformation(self.bins)


def check_image(values: np.ndarray, grid: Grid, mask: np.ndarray | None, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return values without gaps (float32) and where they are known and inside the mask.

    Raises
    ------
    GeometryError
        If values or mask do not lie on the grid.
    InputError
        If too little is known, the mask is empty, or there is no contrast.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise InputError(f"{name}: values of type {values.dtype}; expected real numbers. Use the magnitude.")
    if values.shape != grid.shape:
        raise GeometryError(f"{name}: values of shape {values.shape} on a grid of {grid.shape} (z, y, x).")
    inside = np.ones(grid.shape, bool) if mask is None else np.asarray(mask, bool)
    if inside.shape != grid.shape:
        raise GeometryError(
            f"{name}: mask of shape {inside.shape}; expected {grid.shape} (z, y, x). Resample the mask to the image."
        )
    if not inside.any():
        raise InputError(f"{name}: the mask is empty. Draw the organ, or leave the mask away.")
    known = np.isfinite(values)
    unknown = 1 - float(known[inside].mean())
    if unknown > MOST_UNKNOWN:
        raise InputError(
            f"{name}: {100 * unknown:.0f} % of the voxels are NaN or infinite; expected at most "
            f"{100 * MOST_UNKNOWN:.0f} %. Give an image that covers the region, or a smaller mask."
        )
    if inside.sum() < LEAST_VOXELS:
        raise InputError(f"{name}: {int(inside.sum())} voxels to compare; expected at least {LEAST_VOXELS}.")
    low, high = np.percentile(values[inside & known], [1, 99])
    if not high > low:
        raise InputError(f"{name}: constant ({low:g}) inside the mask; expected contrast to register by.")
    filled = np.where(known, values, 0).astype(np.float32)
    if not known.all():
        # From the nearest voxel, so that no edge appears where something is missing.
        nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
        filled = filled[tuple(nearest)]
        known = ndimage.binary_erosion(known, border_value=1)
    # Single hot voxels would leave the rest of the image in a few bins of the histogram.
    low, high = np.percentile(filled, [0.1, 99.9])
    if high > low:
        filled = np.clip(filled, np.float32(low), np.float32(high))
    return filled, inside & known


def check_overlap(fixed: Grid, inside: np.ndarray, moving: Grid, path: sitk.Transform | None, when: str) -> None:
    """Refuse images that show different parts of the patient.

    Raises
    ------
    GeometryError
    """
    index = np.argwhere(inside)[:: max(1, int(inside.sum()) // 2000), ::-1]
    points = index @ fixed.affine[:3, :3].T + fixed.affine[:3, 3]
    if path is not None:
        flip = np.diag(FLIP)[:3]
        points = np.array([path.TransformPoint(point) for point in (points * flip).tolist()]) * flip
    places = (points - moving.affine[:3, 3]) @ np.linalg.inv(moving.affine[:3, :3]).T
    within = ((places >= -0.5) & (places <= np.array(moving.shape[::-1]) - 0.5)).all(1).mean()
    if within < LEAST_OVERLAP:
        raise GeometryError(
            f"registration: {100 * within:.0f} % of the fixed image's region lies within the moving image {when}; "
            f"expected at least {100 * LEAST_OVERLAP:.0f} %. Check that both show the same part of the patient and "
            "that their affines are right."
        )


def _method(
    metric: MutualInformation, shape: tuple[int, ...], shrink: list[int], seed: int
) -> sitk.ImageRegistrationMethod:
    sitk = simpleitk("registration")
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)  # sums in another order would give another result
    metric.use(method)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel(shrink)
    method.SetSmoothingSigmasPerLevel([0.5 * (factor - 1) for factor in shrink])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    method.SetMetricSamplingStrategy(method.RANDOM)
    shares = [min(1.0, metric.samples / math.prod(max(n // f, 1) for n in shape)) for f in shrink]
    method.SetMetricSamplingPercentagePerLevel(shares, seed + 1)  # 0 would be the clock
    return method


def linear(
    fixed: sitk.Image,
    moving: sitk.Image,
    fixed_mask: sitk.Image,
    moving_mask: sitk.Image | None,
    start: Linear,
    metric: MutualInformation,
    seed: int,
    levels: tuple[int, ...] = (4, 2, 1),
    iterations: int = 100,
    step: float = 2.0,
) -> Linear:
    """Search a rigid or affine transform from `start`, with voxels joined by each of `levels` in turn.

    `step` is the length of the first one, in units that move the image by about a voxel.
    """
    smallest = min(fixed.GetSize())
    shrink = [factor for factor in levels if factor == 1 or smallest // factor >= 8] or [1]
    method = _method(metric, fixed.GetSize(), shrink, seed)
    method.SetMetricFixedMask(fixed_mask)
    if moving_mask is not None:
        method.SetMetricMovingMask(moving_mask)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=step, minStep=min(0.01, step / 50), numberOfIterations=iterations, relaxationFactor=0.6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(start, inPlace=False)
    found = _run(method, fixed, moving)
    composite = simpleitk("registration").CompositeTransform
    inner = found.GetNthTransform(0) if isinstance(found, composite) else found
    made = type(start)(start)  # of the kind that was searched, instead of a transform of any kind
    made.SetParameters(inner.GetParameters())
    return made


def _run(method: sitk.ImageRegistrationMethod, fixed: sitk.Image, moving: sitk.Image) -> sitk.Transform:
    try:
        return method.Execute(fixed, moving)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(
            f"registration: the search stopped ({reason}). Check that both images show the same part of the patient, "
            "or use a simpler kind of transform."
        ) from None


def matrix_of(transform: sitk.Transform) -> np.ndarray:
    """Return a linear ITK transform as a matrix, mm RAS+."""
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    matrix = np.eye(4)
    for axis in range(3):
        unit = [0.0, 0.0, 0.0]
        unit[axis] = 1.0
        matrix[:3, axis] = np.array(transform.TransformPoint(unit)) - origin
    matrix[:3, 3] = origin
    return FLIP @ matrix @ FLIP


def mask_image(inside: np.ndarray, grid: Grid) -> sitk.Image:
    """Return a mask as ITK takes it."""
    return to_itk(inside.astype(np.uint8), grid)
