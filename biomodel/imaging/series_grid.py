"""Where the voxels of a series lie in the patient, and how files' axes are brought to the closest canonical ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import nibabel as nib
import numpy as np

from biomodel.domain import Domain
from biomodel.errors import GeometryError
from biomodel.frozen import frozen_array
from biomodel.imaging.nifti import SAME_GRID

__all__ = ["Axis", "Grid", "canonical_array", "canonical_axis"]

Axis = Literal["z", "y", "x"]


@dataclass(frozen=True, eq=False)
class Grid:
    """Where voxels lie in the patient.

    Parameters
    ----------
    shape
        Number of voxels (z, y, x).
    spacing
        (dz, dy, dx), distance of voxel centres, mm.
    affine
        (4, 4), from the voxel index (x, y, z) to mm in the patient, RAS+ (right, anterior, superior grow), as
        :class:`~biomodel.domain.Domain` has it. Without it, the first voxel's centre lies at the origin.

    Raises
    ------
    GeometryError
        If shape, spacing and affine do not fit together, or the axes are not perpendicular.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    affine: np.ndarray = None  # type: ignore[assignment]  # filled in when the object is made

    def __post_init__(self) -> None:
        shape = tuple(int(count) for count in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise GeometryError(f"Grid: shape {self.shape}; expected three positive numbers (z, y, x).")
        spacing = tuple(float(step) for step in self.spacing)
        if len(spacing) != 3 or not all(np.isfinite(step) and step > 0 for step in spacing):
            raise GeometryError(f"Grid: spacing {self.spacing}; expected three positive numbers (dz, dy, dx) in mm.")
        if self.affine is None:
            object.__setattr__(self, "affine", np.diag([*spacing[::-1], 1.0]))
        affine = frozen_array(self.affine, float)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise GeometryError(f"Grid: affine of shape {affine.shape}; expected 4 × 4 finite numbers.")
        steps = np.linalg.norm(affine[:3, :3], axis=0)
        if not np.allclose(steps[::-1], spacing, rtol=1e-4):
            raise GeometryError(
                f"Grid: the affine's voxel size {tuple(np.round(steps[::-1], 5).tolist())} mm differs from the spacing "
                f"{spacing} mm (z, y, x). Give both for the same grid."
            )
        directions = affine[:3, :3] / steps
        skew = float(np.abs(directions.T @ directions - np.eye(3)).max())
        if skew > 1e-3:
            raise GeometryError(
                f"Grid: the axes are not perpendicular (cosine {skew:.3g}); expected a grid without shear. Export the "
                "series without gantry tilt, or resample it."
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "spacing", spacing)
        object.__setattr__(self, "affine", affine)

    @classmethod
    def of(cls, domain: Domain) -> Grid:
        """Return the grid of a domain."""
        return cls(domain.shape, domain.spacing, domain.affine)

    @classmethod
    def at(cls, shape: tuple[int, int, int], affine: np.ndarray) -> Grid:
        """Return the grid of an affine, its spacing taken from it.

        Examples
        --------
        >>> Grid.at((4, 64, 64), np.diag([1.5, 1.5, 5.0, 1.0])).spacing
        (5.0, 1.5, 1.5)
        """
        affine = np.asarray(affine, float)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise GeometryError(f"Grid: affine of shape {affine.shape}; expected 4 × 4 finite numbers.")
        steps = np.linalg.norm(affine[:3, :3], axis=0)[::-1]
        # Direction cosines are stored with some six digits, and so is their product with the step.
        return cls(shape, tuple(float(f"{step:.6g}") for step in steps), affine)  # type: ignore[arg-type]

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel, mm³."""
        return float(np.prod(self.spacing))

    def distance(self, other: Grid) -> float:
        """Return how far voxels of equal index lie apart at most, mm; infinite for another number of voxels."""
        if self.shape != other.shape:
            return float("inf")
        corners = np.array(np.meshgrid(*[(0, count - 1) for count in self.shape[::-1]], indexing="ij")).reshape(3, -1)
        difference = self.affine - other.affine
        return float(np.linalg.norm(difference[:3, :3] @ corners + difference[:3, 3:], axis=0).max())

    def same_as(self, other: Grid) -> bool:
        """Whether both are one grid, up to a hundredth of the smallest voxel side."""
        return self.distance(other) <= SAME_GRID * min(self.spacing)

    def domain(self, mask: np.ndarray | None = None) -> Domain:
        """Return the domain of this grid, inside everywhere unless a mask bool (z, y, x) is given."""
        inside = np.ones(self.shape, bool) if mask is None else mask
        return Domain(mask=inside, spacing=self.spacing, affine=self.affine)

    def __str__(self) -> str:
        count, size = (" × ".join(f"{number:g}" for number in numbers) for numbers in (self.shape, self.spacing))
        return f"{count} voxels of {size} mm (z, y, x)"


def canonical_array(
    shape: tuple[int, int, int], affine: np.ndarray, samples: int, scratch: str | None = None
) -> tuple[np.ndarray, np.ndarray, Grid]:
    """Make room for a series on its closest canonical grid, as images come in elsewhere (RAS+).

    Parameters
    ----------
    shape, affine
        Number of voxels along, and affine of, the axes (x, y, z) in which the file stores them.
    scratch
        File that holds the room instead of the memory.

    Returns
    -------
    ndarray of float32, shape (n, z, y, x)
        To be filled.
    ndarray
        The same memory in the file's order, (x, y, z, n).
    Grid
    """
    orientation = nib.io_orientation(affine)
    if np.isnan(orientation).any():
        raise GeometryError("the affine has no invertible axes. Export the series again.")
    sizes = [0, 0, 0]
    for axis, (target, _) in enumerate(orientation):
        sizes[int(target)] = shape[axis]
    whole = (samples, sizes[2], sizes[1], sizes[0])
    data: np.ndarray
    if scratch is None:
        data = np.zeros(whole, np.float32)
    else:
        data = np.memmap(scratch, np.float32, "w+", shape=whole)
    view = data.transpose(3, 2, 1, 0).transpose([*(int(target) for target, _ in orientation), 3])
    for axis, (_, direction) in enumerate(orientation):
        if direction < 0:
            view = np.flip(view, axis)
    place = affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    place[:3][np.abs(place[:3]) < 1e-9] = 0.0
    return data, view, Grid.at((sizes[2], sizes[1], sizes[0]), place)


def canonical_axis(affine: np.ndarray, axis: int) -> Axis:
    """Return which axis of the canonical array a file's axis (0, 1, 2 for x, y, z) becomes."""
    axes: tuple[Axis, ...] = ("x", "y", "z")
    return axes[int(nib.io_orientation(affine)[axis, 0])]
