"""Maps from the points of one grid to points elsewhere in the patient, and images brought along them.

A :class:`Transform` takes each point of a fixed grid to the point of a moving image that shows the same tissue, so
that the moving image can be drawn on the fixed grid. Resampling is SimpleITK's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from biomodel.errors import GeometryError, InputError
from biomodel.frozen import frozen_array
from biomodel.imaging.series_grid import Grid

if TYPE_CHECKING:
    import types

    import SimpleITK as sitk

__all__ = ["Transform", "from_itk", "grid_from_json", "grid_to_json", "resample_along", "simpleitk", "to_itk"]

#: From RAS+ (this project) to LPS+ (ITK, DICOM) and back.
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])


def simpleitk(purpose: str) -> types.ModuleType:
    """Import SimpleITK, or say how to install it.

    Raises
    ------
    InputError
        If it is not installed.
    """
    try:
        import SimpleITK
    except ImportError:
        raise InputError(
            f"{purpose} needs SimpleITK, which is not installed. Install it with pip install 'tumorcast[imaging]'."
        ) from None
    return SimpleITK


def to_itk(values: np.ndarray, grid: Grid, *, vector: bool = False) -> sitk.Image:
    """Return an array (z, y, x), or (z, y, x, 3) with `vector`, as an ITK image at its place in the patient (LPS+)."""
    image = simpleitk("an ITK image").GetImageFromArray(np.ascontiguousarray(values), isVector=vector)
    place = FLIP @ grid.affine
    steps = np.linalg.norm(place[:3, :3], axis=0)
    # Direction cosines of headers are perpendicular up to their last digits only; ITK wants them to be.
    left, _, right = np.linalg.svd(place[:3, :3] / steps)
    image.SetSpacing([float(step) for step in steps])
    image.SetDirection((left @ right).ravel().tolist())
    image.SetOrigin(place[:3, 3].tolist())
    return image


def from_itk(image: sitk.Image) -> np.ndarray:
    """Return the values of an ITK image, (z, y, x)."""
    found: np.ndarray = simpleitk("an ITK image").GetArrayFromImage(image)
    return found


def grid_to_json(grid: Grid) -> dict[str, object]:
    """Return a grid as plain numbers, exact in JSON."""
    return {"shape": list(grid.shape), "spacing": list(grid.spacing), "affine": grid.affine.tolist()}


def grid_from_json(found: dict[str, object]) -> Grid:
    """Return the grid that :func:`grid_to_json` wrote."""
    return Grid(tuple(found["shape"]), tuple(found["spacing"]), np.array(found["affine"]))  # type: ignore[arg-type]


def voxel_centres(grid: Grid) -> np.ndarray:
    """Return the positions of all voxels, mm RAS+: float64 (z, y, x, 3), the last axis (x, y, z)."""
    z, y, x = (np.arange(count, dtype=float) for count in grid.shape)
    a = grid.affine
    along = (x[None, None, :, None], y[None, :, None, None], z[:, None, None, None])
    centres: np.ndarray = sum(step * a[:3, axis] for axis, step in enumerate(along)) + a[:3, 3]
    return centres


def resample_along(
    values: np.ndarray, source: Grid, target: Grid, path: sitk.Transform | None = None, *, nearest: bool = False
) -> np.ndarray:
    """Draw an image on another grid, optionally along a transform from the target's points to the source's.

    Parameters
    ----------
    values : ndarray, shape (z, y, x)
        On `source`. Booleans are a mask, whatever `nearest` says.
    source, target
        Grids.
    path
        ITK transform (LPS+).
    nearest
        Take the nearest voxel: for labels, whose numbers must not be mixed.

    Returns
    -------
    ndarray, shape of `target`
        Numbers: linear between voxels, NaN beyond the source's voxels and where most of what counts is NaN. Masks:
        as many voxels as the mask fills, those that it covers most, so that its volume stays (a cut at half of a voxel
        takes a tenth from a small tumour); False beyond. Labels: 0 beyond. Where the target's voxels are larger than
        the source's, the image is first smoothed to their size, so that nothing falls between them: a Gaussian whose
        full width at half maximum is the root of the difference of the squared voxel sizes (Cardoso et al. 2015,
        MICCAI, LNCS 9350:675).
    """
    sitk = simpleitk("resampling")
    values = np.asarray(values)
    if values.shape != source.shape:
        raise GeometryError(
            f"resample: values of shape {values.shape} on a grid of {source.shape} (z, y, x). Give them with the grid "
            "on which they lie."
        )
    path = sitk.Transform(3, sitk.sitkIdentity) if path is None else path
    reference = to_itk(np.zeros(target.shape, np.uint8), target)
    if nearest and values.dtype != bool:
        kind = np.float64 if values.dtype.kind == "f" else np.int64
        found = from_itk(sitk.Resample(to_itk(values.astype(kind), source), reference, path, sitk.sitkNearestNeighbor))
        return found.astype(values.dtype)
    mask = values.dtype == bool
    known = np.ones(values.shape, bool) if mask else np.isfinite(values)
    # Along the source's own axes, as seen from its voxels; a rotated target is judged by its size along them.
    cosines = np.abs((source.affine[:3, :3] / source.spacing[::-1]).T @ (target.affine[:3, :3] / target.spacing[::-1]))
    wanted = np.sqrt(cosines**2 @ np.square(target.spacing[::-1]))
    width = np.sqrt(np.clip(wanted**2 - np.square(source.spacing[::-1]), 0, None)) / 2.3548

    def draw(array: np.ndarray, edge: float) -> np.ndarray:
        image = to_itk(array.astype(np.float32), source)
        if (width > 0.05 * np.array(source.spacing[::-1])).any():
            image = sitk.DiscreteGaussian(image, np.square(width).tolist(), 64, 0.01, True)
        found: np.ndarray = from_itk(sitk.Resample(image, reference, path, sitk.sitkLinear, edge))
        return found

    if mask:
        return _covered(draw(values, 0.0))
    if known.all():
        return draw(values, float("nan"))
    share = draw(known, 0.0)
    total = draw(np.where(known, values, 0.0), 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(share >= 0.5, total / share, np.nan).astype(np.float32)


def _covered(share: np.ndarray) -> np.ndarray:
    """Choose as many voxels as the shares sum to, those with the largest ones; of equal ones the first."""
    count = int(np.round(share.sum(dtype=float)))
    chosen = np.zeros(share.size, bool)
    touched = np.flatnonzero(share.ravel() > 0)
    # Rounded, so that what differs in the last digit is equal.
    order = np.argsort(-np.round(share.ravel()[touched], 5), kind="stable")
    chosen[touched[order[:count]]] = True
    return chosen.reshape(share.shape)


@dataclass(frozen=True, eq=False)
class Transform:
    """Where each point of a fixed grid lies in the moving image.

    Parameters
    ----------
    grid
        The fixed grid.
    matrix
        (4, 4), fixed to moving, mm RAS+: the whole transform, or its linear part where there is a field.
    field
        float32 (z, y, x, 3), mm, (x, y, z) RAS+: the whole displacement on the fixed grid; None for a linear transform.
    """

    grid: Grid
    matrix: np.ndarray
    field: np.ndarray | None = None

    def __post_init__(self) -> None:
        matrix = frozen_array(self.matrix, float)
        if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or not np.linalg.det(matrix[:3, :3]) > 0:
            raise GeometryError("transform: expected a matrix of 4 × 4 finite numbers that does not mirror.")
        object.__setattr__(self, "matrix", matrix)
        if self.field is not None:
            field = frozen_array(self.field, np.float32)
            if field.shape != (*self.grid.shape, 3) or not np.isfinite(field).all():
                raise GeometryError(
                    f"transform: field of shape {field.shape}; expected {(*self.grid.shape, 3)} finite numbers, mm."
                )
            object.__setattr__(self, "field", field)

    @classmethod
    def from_itk(cls, transform: sitk.Transform, grid: Grid, matrix: np.ndarray, *, linear: bool) -> Transform:
        """Return an ITK transform (LPS+, fixed to moving) sampled on the fixed grid."""
        if linear:
            return cls(grid, matrix)
        sitk = simpleitk("a transform")
        like = to_itk(np.zeros(grid.shape, np.uint8), grid)
        sampler = sitk.TransformToDisplacementFieldFilter()
        sampler.SetReferenceImage(like)
        sampler.SetOutputPixelType(sitk.sitkVectorFloat64)
        return cls(grid, matrix, from_itk(sampler.Execute(transform)) * np.diag(FLIP)[:3])

    def displacement(self) -> np.ndarray:
        """Return the displacement on the fixed grid, mm: float32 (z, y, x, 3), (x, y, z) RAS+."""
        if self.field is not None:
            return self.field
        centres = voxel_centres(self.grid)
        return (centres @ (self.matrix[:3, :3] - np.eye(3)).T + self.matrix[:3, 3]).astype(np.float32)

    def jacobian(self) -> np.ndarray:
        """Return the determinant of the transform's derivative on the fixed grid, (z, y, x).

        Volume in the moving image over volume on the fixed grid: above 1 where tissue is drawn smaller than it was, at
        or under 0 where it folds.
        """
        if self.field is None:
            return np.full(self.grid.shape, np.linalg.det(self.matrix[:3, :3]))
        per_index = np.zeros((*self.grid.shape, 3, 3))
        for axis in range(3):
            if self.grid.shape[axis] > 1:
                # Column of the index (x, y, z), the reverse of the array's axes.
                per_index[..., 2 - axis] = np.gradient(self.field.astype(float), axis=axis)
        return np.linalg.det(np.eye(3) + per_index @ np.linalg.inv(self.grid.affine[:3, :3]))

    def itk(self) -> sitk.Transform:
        """Return the ITK transform (LPS+), from points of the fixed grid to points of the moving image."""
        sitk = simpleitk("a transform")
        if self.field is None:
            matrix = FLIP @ self.matrix @ FLIP
            linear = sitk.AffineTransform(3)
            linear.SetMatrix(matrix[:3, :3].ravel().tolist())
            linear.SetTranslation(matrix[:3, 3].tolist())
            return linear
        field = (self.field * np.diag(FLIP)[:3]).astype(np.float64)
        return sitk.DisplacementFieldTransform(to_itk(field, self.grid, vector=True))

    def apply(self, values: np.ndarray, source: Grid, *, nearest: bool = False) -> np.ndarray:
        """Draw an image of the moving visit on the fixed grid; see :func:`resample_along`."""
        return resample_along(values, source, self.grid, self.itk(), nearest=nearest)

    def write(self, folder: Path) -> dict[str, object]:
        """Write the field, if any, as an ITK displacement field that other tools read, and return the rest for JSON."""
        if self.field is not None:
            sitk = simpleitk("writing a transform")
            field = np.ascontiguousarray((self.field * np.diag(FLIP)[:3]).astype(np.float32))
            sitk.WriteImage(to_itk(field, self.grid, vector=True), str(folder / "displacement.nii.gz"), True)
        return {"grid": grid_to_json(self.grid), "matrix": self.matrix.tolist(), "field": self.field is not None}

    @classmethod
    def read(cls, folder: Path, found: dict[str, object]) -> Transform:
        """Return what :meth:`write` wrote.

        Raises
        ------
        InputError, GeometryError
            If the file of the field is missing, damaged, or of another grid.
        """
        grid = grid_from_json(found["grid"])  # type: ignore[arg-type]
        matrix = np.array(found["matrix"])
        if not found["field"]:
            return cls(grid, matrix)
        sitk = simpleitk("reading a transform")
        path = folder / "displacement.nii.gz"
        try:
            image = sitk.ReadImage(str(path))
        except RuntimeError as error:
            raise InputError(f"{path}: cannot be read ({json.dumps(str(error)[-200:])}). Register again.") from None
        return cls(grid, matrix, from_itk(image) * np.diag(FLIP)[:3])
