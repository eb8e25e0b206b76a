"""Motion within a series whose contrast changes: each sample is compared with what the others say it should look like.

A dynamic series brightens while the patient moves, so that no single sample is a fit reference for all. First each
sample is brought near the first one by mutual information (SimpleITK's), then closer by least squares on logarithms, of
which uptake changes less; then references are made for all of them from the principal components of the series so far,
one component first and more from pass to pass, since the first ones hold the uptake that many voxels share and motion
comes in the later ones (progressive principal component registration: Melbourne et al. 2007, Phys Med Biol 52:5147).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from biomodel.errors import GeometryError, InputError
from biomodel.imaging.preprocess import plain_sample
from biomodel.imaging.registration import Image, Kind, Registration, Rigid, register
from biomodel.imaging.registration_search import MutualInformation, check_image, linear, matrix_of
from biomodel.imaging.rigid_search import joined, levelled, like_the_first, like_the_others
from biomodel.imaging.series import Series
from biomodel.imaging.series_signal import shift
from biomodel.imaging.transforms import Transform, from_itk, simpleitk, to_itk

__all__ = ["Corrected", "align", "correct_motion"]

#: Motion below this part of a voxel is left alone: drawing a sample anew costs more (it smooths noise).
LEAST_MOTION = 0.05
RIGID = Rigid()


@dataclass(frozen=True, eq=False)
class Corrected:
    """A series after correction, and what was found.

    Parameters
    ----------
    series
        On the grid of the first sample, which stays as it is. NaN where a sample shows nothing.
    shifts : ndarray, shape (n, 3)
        How far the middle of the region had moved from the first sample, mm RAS+ (x, y, z).
    angles : ndarray, shape (n, 3)
        Rotation from the first sample about the x, y and z axes of the patient, degrees.
    before, after : ndarray, shape (n,)
        Distance from the first sample by phase correlation, mm, a method of its own that sees one translation only:
        what was there and what is left.
    transforms
        From points of the first sample to those of each.
    """

    series: Series
    shifts: np.ndarray
    angles: np.ndarray
    before: np.ndarray
    after: np.ndarray
    transforms: tuple[Transform, ...]

    def __str__(self) -> str:
        size = np.linalg.norm(self.shifts, axis=1)
        turn = np.linalg.norm(self.angles, axis=1)
        one, two = (float(np.sqrt(np.mean(values**2))) for values in (self.before, self.after))
        return (
            f"{self.series.name}: moved up to {size.max():.1f} mm (sample {int(size.argmax()) + 1}) and "
            f"{turn.max():.1f}°; by phase correlation {one:.2f} mm before, {two:.2f} mm after "
            "(root mean square over samples)"
        )


def correct_motion(
    series: Series, mask: np.ndarray | None = None, *, components: int = 3, passes: int = 3, seed: int = 0
) -> Corrected:
    """Correct rigid motion between the samples of a series, whatever its contrast does meanwhile.

    Parameters
    ----------
    series
        Four samples or more.
    mask
        bool (z, y, x): what moves as one, such as the breast with its surface; everything without it.
    components
        Most principal components that a reference is made of. Three do for the uptake of a tumour, of other tissue, and
        of vessels.
    passes
        Over the series; the first with one component.
    seed
        Of the voxels that are looked at.

    Raises
    ------
    InputError
        If the series is too short, or a sample constant or unknown.
    GeometryError
        If the mask lies on another grid, or the series has too few slices.
    """
    sitk = simpleitk("motion correction")
    if series.samples < 4:
        raise InputError(
            f"{series.name}: {series.samples} samples; expected four or more to tell motion from uptake. Use align for "
            "two images."
        )
    if components < 1 or passes < 1:
        raise InputError(f"motion: {components} components, {passes} passes; expected 1 or more of each.")
    if min(series.grid.shape) < 4:
        raise GeometryError(f"{series.name}: {series.grid}; expected at least 4 voxels along each axis.")
    inside = np.ones(series.grid.shape, bool) if mask is None else np.asarray(mask, bool)
    names = [f"{series.name}, sample {number}" for number in range(1, series.samples + 1)]
    factors = joined(series.grid)
    images = []
    for sample, name in zip(series.data, names, strict=True):
        filled, _ = check_image(sample, series.grid, inside, name)
        images.append(sitk.BinShrink(to_itk(filled, series.grid), factors))
    region = sitk.BinShrink(to_itk(inside.astype(np.float32), series.grid), factors) >= 0.5
    small = from_itk(region).astype(bool)
    if not small.any():
        raise InputError(f"{series.name}: the mask is empty or thinner than a voxel; expected the organ.")

    centre = np.argwhere(inside).mean(0)[::-1]
    middle = series.grid.affine[:3, :3] @ centre + series.grid.affine[:3, 3]
    begin = sitk.Euler3DTransform()
    begin.SetCenter((middle * [-1, -1, 1]).tolist())
    images = levelled(images, small)
    found = [begin]
    for image in images[1:]:  # each from where the one before was: patients drift more than they jump
        found.append(linear(images[0], image, region, None, found[-1], MutualInformation(), seed, (2,), step=0.5))
    found = like_the_first(images, found, small)
    for turn in range(passes):
        found = like_the_others(images, found, small, min(turn + 1, components))

    # All of them seen from the first sample, which stays.
    first = np.linalg.inv(matrix_of(found[0]))
    matrices = [np.eye(4), *(matrix_of(motion) @ first for motion in found[1:])]
    shifts = np.array([matrix[:3, :3] @ middle + matrix[:3, 3] - middle for matrix in matrices])
    angles = np.array([_angles(matrix[:3, :3]) for matrix in matrices])
    data = np.array(series.data)
    transforms = []
    for number, matrix in enumerate(matrices):
        path = Transform(series.grid, matrix)
        move = np.linalg.norm(path.displacement()[inside], axis=-1)
        if np.sqrt(np.mean(move**2)) < LEAST_MOTION * min(series.grid.spacing):
            path = Transform(series.grid, np.eye(4))
        else:
            data[number] = path.apply(series.data[number], series.grid)
        transforms.append(path)
    note = f"motion corrected, up to {np.linalg.norm(shifts, axis=1).max():.1f} mm"
    made = replace(series, data=data, ceiling=None, notes=(*series.notes, note))
    crop = ndimage.find_objects(inside.astype(int))[0]
    return Corrected(
        made,
        shifts,
        angles,
        _distance(series, crop),
        _distance(made, crop),
        tuple(transforms),
    )


def _angles(rotation: np.ndarray) -> np.ndarray:
    found: np.ndarray = Rotation.from_matrix(rotation).as_rotvec(degrees=True)
    return found


def _distance(series: Series, crop: tuple[slice, ...]) -> np.ndarray:
    """Distance of each sample from the first, mm, by phase correlation."""
    first = series.data[0][crop]
    steps = np.array(series.grid.spacing)
    return np.array([float(np.linalg.norm(shift(first, sample[crop]) * steps)) for sample in series.data])


def align(
    moving: Series, fixed: Series, kind: Kind = RIGID, mask: np.ndarray | None = None
) -> tuple[Series, Registration]:
    """Bring a series onto another of the same visit, as a diffusion series onto a dynamic one.

    The samples with the plainest anatomy are compared (before the bolus, least diffusion weighting), by measures that
    allow for other contrast; all samples are moved alike.

    Parameters
    ----------
    kind
        ``Rigid()``, or ``BSpline(knots=40, likeness=JointHistogram(), along=moving.phase_encoding)`` where echo-planar
        images are distorted.
    mask
        bool, on the fixed series' grid: where to look.

    Returns
    -------
    Series
        The moving one on the fixed one's grid.
    Registration

    Raises
    ------
    InputError, GeometryError
        As :func:`~biomodel.imaging.registration.register` does.
    """
    one = Image(plain_sample(fixed), fixed.grid, mask, fixed.name)
    found = register(one, Image(plain_sample(moving), moving.grid, None, moving.name), kind)
    data = np.stack([found.apply(sample) for sample in moving.data])
    note = f"aligned with {fixed.name} by a {type(kind).__name__} transform"
    return replace(
        moving, data=data, grid=fixed.grid, ceiling=None, phase_encoding=None, notes=(*moving.notes, note)
    ), found
