"""NIfTI in and out, with affine, spacing and orientation respected.

Whatever the order and direction of a file's axes, arrays come in as (z, y, x) on the closest canonical grid: x grows to
the patient's right, y to the front, z to the head (RAS+). Positions of voxels in mm are unchanged by that.
"""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import logger
from nibabel.spatialimages import HeaderDataError

from biomodel.domain import Domain
from biomodel.errors import GeometryError, InputError
from biomodel.files import atomic_write

__all__ = ["Image", "check_same_grid", "read_image", "resample", "write_image"]

#: How far voxels of "the same" grid may lie apart, as a part of the smallest voxel side: affines are stored in single
#: precision, and registration tools write them with a few digits.
SAME_GRID = 0.01

#: What nibabel, gzip and numpy raise for files that are missing, cut, damaged or of another kind.
UNREADABLE = (
    ImageFileError,
    HeaderDataError,
    OSError,
    EOFError,
    zlib.error,
    ArithmeticError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)

_MM_PER_UNIT = {"mm": 1.0, "meter": 1000.0, "micron": 0.001, "unknown": 1.0}


@dataclass(frozen=True, eq=False)
class Image:
    """An image on its canonical grid.

    Parameters
    ----------
    values
        float64 (z, y, x), in the units of the file.
    affine
        (4, 4), from the voxel index (x, y, z) to mm in the patient, RAS+.
    spacing
        (dz, dy, dx), mm.
    length_units
        Units of length recorded in the header; "unknown" is read as mm, as the NIfTI standard's tools do.
    oriented
        Whether the header says where the image lies in the patient (a sform or qform code above 0).
    """

    values: np.ndarray
    affine: np.ndarray
    spacing: tuple[float, float, float]
    length_units: str = "mm"
    oriented: bool = True


def read_image(
    path: str | os.PathLike[str],
    where: str | None = None,
    like: Image | Domain | None = None,
    like_name: str = "MASK",
) -> Image:
    """Read a three-dimensional NIfTI file.

    Parameters
    ----------
    path
        ``.nii`` or ``.nii.gz``. Fewer than three dimensions are read as axes of length 1.
    where
        Place named in messages; the file's name by default.
    like
        Grid on which the image must lie.
    like_name
        File of that grid, named in the remedy.

    Raises
    ------
    InputError
        If the file is missing, truncated, no NIfTI file, or has values that are no numbers.
    GeometryError
        If it has more than three dimensions, its axes are not perpendicular, or its grid differs from `like`.
    """
    path = Path(path)
    where = where or path.name
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{where}: file {path} {found}; expected a NIfTI file (.nii or .nii.gz). Check the name.")
    if path.stat().st_size == 0:
        raise InputError(f"{where}: file {path.name} is empty; expected a NIfTI file. Copy or export it again.")
    try:
        source = open_nifti(path)
        if source.get_data_dtype().kind not in "iufb":
            raise InputError(
                f"{where}: {path.name} holds values of type {source.get_data_dtype()}; expected real numbers. "
                "Export one number per voxel."
            )
        with np.errstate(all="ignore"):  # a damaged scale factor overflows; what comes of it is checked by the caller
            values = np.asarray(source.dataobj, dtype=np.float64)
    except UNREADABLE as error:
        detail = (str(error) or type(error).__name__).splitlines()[0].replace(str(path), path.name)
        raise InputError(
            f"{where}: {path.name} is truncated, damaged or no NIfTI file ({detail}); expected a whole .nii or "
            ".nii.gz. Copy or export it again."
        ) from None
    affine = _millimetre_affine(source, where)
    values = _three_axes(values, where)
    values, affine = _canonical(values, affine, where)
    spacing = tuple(_as_stored(np.linalg.norm(affine[:3, :3], axis=0))[::-1].tolist())
    image = Image(
        values=values,
        affine=affine,
        spacing=spacing,
        length_units=length_units(source.header),
        oriented=int(source.header["sform_code"]) > 0 or int(source.header["qform_code"]) > 0,
    )
    if like is not None:
        check_same_grid(image, like, where, path.name, like_name)
    return image


def open_nifti(path: str | os.PathLike[str]) -> nib.Nifti1Image:
    """Open a NIfTI file, its voxels not yet read.

    Raises
    ------
    ImageFileError
        If it is no NIfTI file; other kinds of error are among ``UNREADABLE``, too.
    """
    # nibabel stops reading before the checksum at the end, so a damaged file would pass as other numbers.
    if Path(path).suffix == ".gz":
        with gzip.open(path) as stream:
            while stream.read(1 << 22):
                pass
    quiet = logger.disabled
    logger.disabled = True  # nibabel tells on standard error which odd header fields it overlooked
    try:
        image = nib.load(path)
    finally:
        logger.disabled = quiet
    if not isinstance(image, (nib.Nifti1Image, nib.Nifti2Image)):
        raise ImageFileError(f"it is a {type(image).__name__}")
    return image


def length_units(header: nib.Nifti1Header) -> str:
    """Return the units of length that a header states: mm, meter, micron or unknown."""
    try:
        return header.get_xyzt_units()[0]
    except KeyError:  # a code that the standard does not know
        return "unknown"


def _millimetre_affine(source: nib.Nifti1Image, where: str) -> np.ndarray:
    affine = np.array(source.affine, float)
    if not np.isfinite(affine).all():
        raise GeometryError(f"{where}: the affine has NaN or infinite entries. Export the image again.")
    units = length_units(source.header)
    affine[:3] = _as_stored(affine[:3]) * _MM_PER_UNIT.get(units, 1.0)
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    if not (steps > 0).all():
        raise GeometryError(
            f"{where}: voxel size {tuple(steps.tolist())} mm; expected positive sides. Correct the header's affine."
        )
    directions = affine[:3, :3] / steps
    skew = np.abs(directions.T @ directions - np.eye(3)).max()
    if skew > 1e-3:
        raise GeometryError(
            f"{where}: the axes are not perpendicular (cosine {skew:.3g}); expected a grid without shear. Resample it "
            "with 'tumorcast resample IMAGE --like MASK --out FILE'."
        )
    return affine


def _as_stored(numbers: np.ndarray) -> np.ndarray:
    """Return the shortest decimals with the same single precision: 0.7, where the header's 0.7 mm reads 0.699999988."""
    shortest = np.array([float(str(np.float32(number))) for number in numbers.ravel()]).reshape(numbers.shape)
    # What rotations leave of a zero turns 256 voxels by less than a tenth of a micrometre.
    return np.where(np.abs(shortest) < 1e-7, 0.0, shortest)


def _three_axes(values: np.ndarray, where: str) -> np.ndarray:
    if values.ndim > 3 and all(count == 1 for count in values.shape[3:]):
        values = values.reshape(values.shape[:3])
    if values.ndim > 3:
        raise GeometryError(
            f"{where}: {values.ndim} dimensions {values.shape}; expected one map (x, y, z). Save the wanted volume."
        )
    values = values.reshape(values.shape + (1,) * (3 - values.ndim))
    if 0 in values.shape:
        raise GeometryError(f"{where}: no voxels {values.shape}; expected a map. Export the image again.")
    return values


def _canonical(values: np.ndarray, affine: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Reorder and flip axes to RAS+, then turn (x, y, z) into (z, y, x)."""
    orientation = nib.io_orientation(affine)
    if np.isnan(orientation).any():
        raise GeometryError(f"{where}: the affine has no invertible axes. Correct the header's affine.")
    shape = values.shape
    values = nib.apply_orientation(values, orientation)
    affine = affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    return np.ascontiguousarray(values.transpose(2, 1, 0)), affine


def check_same_grid(
    image: Image, like: Image | Domain, where: str, image_name: str = "IMAGE", like_name: str = "MASK"
) -> None:
    """Refuse an image that does not lie on the grid of `like`.

    Raises
    ------
    GeometryError
        With the two grids and the command that brings one onto the other.
    """
    out = "FILE" if image_name == "IMAGE" else f"resampled_{image_name}"
    remedy = f"Bring it to the mask's grid with 'tumorcast resample {image_name} --like {like_name} --out {out}'."
    expected = like.mask.shape if isinstance(like, Domain) else like.values.shape
    if image.values.shape != expected:
        raise GeometryError(
            f"{where}: {_times(image.values.shape)} voxels of {_times(image.spacing)} mm (z, y, x); expected "
            f"{_times(expected)} of {_times(like.spacing)} mm like the mask. {remedy}"
        )
    # The corners lie furthest apart, whether the grids differ by a shift, a turn or a scale.
    corners = np.array(np.meshgrid(*[(0, count - 1) for count in expected[::-1]], indexing="ij")).reshape(3, -1)
    apart = np.abs(
        image.affine[:3, :3] @ corners + image.affine[:3, 3:] - like.affine[:3, :3] @ corners - like.affine[:3, 3:]
    )
    distance = float(np.linalg.norm(apart, axis=0).max())
    if distance > SAME_GRID * min(like.spacing):
        raise GeometryError(
            f"{where}: the same number of voxels as the mask, but up to {distance:.3g} mm away from it (voxels of "
            f"{_times(image.spacing)} mm, mask {_times(like.spacing)} mm, z, y, x); expected the mask's grid. {remedy}"
        )


def _times(numbers: tuple[float, ...]) -> str:
    return " × ".join(f"{number:g}" for number in numbers)


def write_image(path: str | os.PathLike[str], values: np.ndarray, affine: np.ndarray) -> None:
    """Write an array as NIfTI; the same array is read back.

    Parameters
    ----------
    path
        ``.nii`` or ``.nii.gz``. The file appears whole or not at all, and is the same for the same values.
    values
        (z, y, x). Booleans are kept as bytes; floats in single precision where that loses nothing, else double.
    affine
        (4, 4), from the voxel index (x, y, z) to mm in the patient, RAS+. NIfTI keeps it in single precision.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    values = np.asarray(values)
    stored = values
    if values.dtype == bool:
        stored = values.astype(np.uint8)
    elif values.dtype.kind == "f":
        single = values.astype(np.float32)
        if np.array_equal(single.astype(values.dtype), values, equal_nan=True):
            stored = single
    image = nib.Nifti1Image(np.ascontiguousarray(stored.transpose(2, 1, 0)), np.asarray(affine, float))
    image.header.set_xyzt_units("mm")
    image.header.set_sform(affine, code="scanner")
    image.header.set_qform(affine, code="scanner")
    with atomic_write(path) as temporary:
        nib.save(image, temporary)


def resample(
    image_path: str | os.PathLike[str],
    like_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    mask: bool | None = None,
) -> None:
    """Bring an image onto the grid of another, by their positions in the patient, and write it.

    Maps are interpolated linearly, masks (values 0 and 1 alone) by the nearest voxel. Outside the image maps become NaN
    (unknown) and masks 0. Nothing is registered: a patient who moved between the scans has moved in the result, too.

    Parameters
    ----------
    image_path, like_path
        NIfTI files.
    out
        NIfTI file to write.
    mask
        Whether the image is a mask; found from its values by default.

    Raises
    ------
    InputError
        If a file cannot be read.
    OutputError
        If `out` cannot be written.
    """
    from scipy.ndimage import map_coordinates

    image = read_image(image_path)
    like = read_image(like_path)
    binary = bool(np.isin(image.values, (0, 1)).all()) if mask is None else mask
    to_image = np.linalg.inv(image.affine) @ like.affine
    count = like.values.shape
    result = np.empty(count)
    y, x = np.meshgrid(np.arange(count[1]), np.arange(count[2]), indexing="ij")
    for z in range(count[0]):  # one slice at a time keeps the memory small
        index = np.stack([x.ravel(), y.ravel(), np.full(x.size, z), np.ones(x.size)])
        places = np.round((to_image @ index)[2::-1], 9)
        result[z] = map_coordinates(
            image.values,
            places,
            order=0 if binary else 1,
            mode="constant" if binary else "nearest",
            cval=0.0,
        ).reshape(count[1:])
        if not binary:
            limits = np.array(image.values.shape)[:, None] - 0.5
            beyond = ((places < -0.5) | (places > limits)).any(axis=0).reshape(count[1:])
            result[z][beyond] = np.nan
    write_image(out, result.astype(bool) if binary else result, like.affine)
