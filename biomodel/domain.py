"""The region of space in which a tumour lives: a voxel grid with a mask and tissue fractions, or a single point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from biomodel.errors import GeometryError, InputError
from biomodel.frozen import FrozenDict, frozen_array

__all__ = ["Domain"]


def _as_bool(values: object, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype != bool and not np.isin(array, (0, 1)).all():
        raise GeometryError(f"Domain: {name} has values other than 0 and 1. Give a boolean array (z, y, x).")
    return frozen_array(array, bool)


@dataclass(frozen=True, eq=False)
class Domain:
    """A voxel grid, the organ's mask on it, and tissue fractions.

    One- and two-dimensional domains are grids with axes of length one; the mask's boundary carries zero flux, so
    nothing flows along such an axis.

    Parameters
    ----------
    mask
        bool (z, y, x), true inside the organ.
    spacing
        (dz, dy, dx), distance of voxel centres, mm.
    affine
        (4, 4), from the voxel index (x, y, z) to mm in the patient (RAS+: right, anterior, superior grow). Without it,
        the first voxel's centre lies at the origin.
    tissues
        Fraction of each voxel, 0 to 1, by name of the tissue; each (z, y, x).
    well_mixed
        True for a single point without spatial extent, as used for patients without images.

    Raises
    ------
    GeometryError
        If shapes, spacing and affine do not fit together, or the mask is empty.
    """

    mask: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray = None  # type: ignore[assignment]  # filled in when the object is made
    tissues: Mapping[str, np.ndarray] = field(default_factory=dict)
    well_mixed: bool = False

    def __post_init__(self) -> None:
        mask = _as_bool(self.mask, "mask")
        if mask.ndim != 3:
            raise GeometryError(
                f"Domain: mask has {mask.ndim} axes; expected 3 (z, y, x). Use axes of length 1 for fewer dimensions."
            )
        if not mask.any():
            raise GeometryError("Domain: the mask is empty; expected at least one voxel inside. Check the mask.")
        spacing = tuple(float(step) for step in self.spacing)
        if len(spacing) != 3 or not all(np.isfinite(step) and step > 0 for step in spacing):
            raise GeometryError(f"Domain: spacing {self.spacing}; expected three positive numbers (dz, dy, dx) in mm.")
        if self.affine is None:
            affine = frozen_array(np.diag([*spacing[::-1], 1.0]), float)
        else:
            affine = frozen_array(self.affine, float)
            if affine.shape != (4, 4) or not np.isfinite(affine).all():
                raise GeometryError(f"Domain: affine of shape {affine.shape}; expected 4 × 4 finite numbers.")
            steps = np.linalg.norm(affine[:3, :3], axis=0)[::-1]
            if not np.allclose(steps, spacing, rtol=1e-4):
                raise GeometryError(
                    f"Domain: the affine's voxel size {tuple(np.round(steps, 5).tolist())} mm differs from the spacing "
                    f"{spacing} mm (z, y, x). Give both for the same grid."
                )
        tissues = {}
        for name, values in self.tissues.items():
            fraction = frozen_array(values, float)
            if fraction.shape != mask.shape:
                raise GeometryError(
                    f"Domain: tissue '{name}' has shape {fraction.shape}; expected that of the mask, {mask.shape}."
                )
            inside = fraction[mask]
            if not np.isfinite(inside).all() or inside.min() < -1e-6 or inside.max() > 1 + 1e-6:
                raise InputError(
                    f"Domain: tissue '{name}' ranges from {inside.min():.4g} to {inside.max():.4g} inside the mask; "
                    "expected fractions from 0 to 1."
                )
            tissues[str(name)] = fraction
        if self.well_mixed and mask.shape != (1, 1, 1):
            raise GeometryError(f"Domain: a well-mixed domain has one point; found shape {mask.shape}.")
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "spacing", spacing)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "tissues", FrozenDict(tissues))

    @classmethod
    def box(
        cls,
        shape: tuple[int, int, int],
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
        mask: np.ndarray | None = None,
        tissues: Mapping[str, np.ndarray] | None = None,
    ) -> Domain:
        """Return a box of `shape` (z, y, x) voxels of `spacing` (dz, dy, dx) mm, all inside unless a mask is given.

        Examples
        --------
        >>> Domain.box((1, 64, 64), spacing=(2.0, 1.5, 1.5)).voxel_volume
        4.5
        """
        inside = np.ones(shape, bool) if mask is None else np.asarray(mask)
        if inside.shape != tuple(shape):
            raise GeometryError(f"Domain.box: mask of shape {inside.shape}; expected {tuple(shape)} (z, y, x).")
        return cls(mask=inside, spacing=spacing, tissues=tissues or {})

    @classmethod
    def point(cls) -> Domain:
        """Return the well-mixed domain: one point of 1 mm³, in which nothing can spread."""
        return cls(mask=np.ones((1, 1, 1), bool), spacing=(1.0, 1.0, 1.0), well_mixed=True)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels (z, y, x)."""
        return self.mask.shape

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel, mm³."""
        return float(np.prod(self.spacing))

    @property
    def coords(self) -> dict[str, np.ndarray]:
        """Positions of voxel centres along each axis, mm: arrays of one axis under ``z``, ``y`` and ``x``.

        They are patient coordinates when the grid is not oblique. On an oblique grid they are distances along the
        grid's own axes (the affine alone gives patient coordinates).
        """
        return {
            axis: self.affine[2 - number, 3] + self.spacing[number] * np.arange(self.shape[number])
            for number, axis in enumerate("zyx")
        }

    def bounding_box(self, inside: np.ndarray, margin_mm: float = 0.0) -> tuple[slice, slice, slice]:
        """Return the smallest box (z, y, x) that holds every true voxel of `inside`, widened by a margin.

        Parameters
        ----------
        inside
            bool (z, y, x).
        margin_mm
            Width added on every side, mm, rounded up to whole voxels and cut off at the grid's edge.

        Raises
        ------
        GeometryError
            If `inside` has another shape than the domain, or is empty.
        """
        inside = np.asarray(inside, bool)
        if inside.shape != self.shape:
            raise GeometryError(f"bounding_box: array of shape {inside.shape}; expected the domain's {self.shape}.")
        if not inside.any():
            raise GeometryError("bounding_box: no voxel is inside; expected at least one.")
        box = []
        for axis, (count, step) in enumerate(zip(self.shape, self.spacing, strict=True)):
            occupied = np.flatnonzero(inside.any(axis=tuple(other for other in range(3) if other != axis)))
            margin = int(np.ceil(margin_mm / step - 1e-9))
            box.append(slice(max(0, int(occupied[0]) - margin), min(count, int(occupied[-1]) + margin + 1)))
        return tuple(box)  # type: ignore[return-value]

    def crop(self, slices: tuple[slice, slice, slice]) -> Domain:
        """Return the part of the domain inside `slices` (z, y, x), at the same place in the patient."""
        bounds = [part.indices(count) for part, count in zip(slices, self.shape, strict=True)]
        if any(step != 1 for _, _, step in bounds):
            raise GeometryError("crop: slices with a step; expected steps of 1. Resample the images instead.")
        box = tuple(slice(start, stop) for start, stop, _ in bounds)
        affine = self.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ np.array([start for start, _, _ in bounds[::-1]], float)
        return Domain(
            mask=self.mask[box],
            spacing=self.spacing,
            affine=affine,
            tissues={name: values[box] for name, values in self.tissues.items()},
            well_mixed=self.well_mixed,
        )

    def __repr__(self) -> str:
        if self.well_mixed:
            return "Domain.point()"
        size = " × ".join(f"{step:g}" for step in self.spacing)
        return f"Domain(shape={self.shape}, spacing={size} mm (z, y, x), inside={int(self.mask.sum())} voxels)"
