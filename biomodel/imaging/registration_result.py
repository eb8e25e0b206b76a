"""What a registration gives: the transform of one later visit, its effect on the tumour, and its spread."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

from biomodel.errors import InputError
from biomodel.files import atomic_folder
from biomodel.frozen import frozen_array
from biomodel.imaging.nifti import read_image, write_image
from biomodel.imaging.registration_tumour import VolumeChange
from biomodel.imaging.series_grid import Grid
from biomodel.imaging.transforms import Transform, grid_from_json, grid_to_json

__all__ = ["Registration", "volume_change"]

#: Name of the file that makes a folder a registration.
MARKER = "registration.json"


@dataclass(frozen=True, eq=False)
class Registration:
    """How one later visit lies on the reference visit's grid.

    Parameters
    ----------
    transform
        From points of the fixed grid to points of the moving visit.
    moving_grid
        Of the image that was registered.
    alike
        Likeness of fixed and moving image (squared local correlation, 0 to 1, or what the kind asks for) before and
        after, where both count; a check, not a measure of error.
    visit
        Number of the visit, which alone this belongs to; None within one visit.
    tumour
        Volume of the region drawn at the moving visit, before and after; None where none was given.
    unguarded
        The same, had the tumour not been kept rigid.
    spread
        float32 (z, y, x), mm: how far repeated registrations lie from their mean, root mean square; None without
        `seeds`. What all repetitions have in common (wrong assumptions, no structure to see) is not in
        it: in the benchmark it is about two thirds of the true error, and less at the tumour.
    settings
        Of the registration, plain numbers and words.
    """

    transform: Transform
    moving_grid: Grid
    alike: tuple[float, float]
    visit: int | None = None
    tumour: VolumeChange | None = None
    unguarded: VolumeChange | None = None
    spread: np.ndarray | None = None
    settings: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.visit is not None and (isinstance(self.visit, bool) or int(self.visit) < 2):
            raise InputError(
                f"registration: visit {self.visit}; expected 2 or later: the first visit is the reference and moves "
                "nowhere."
            )
        if self.spread is not None:
            object.__setattr__(self, "spread", frozen_array(self.spread, np.float32))

    @property
    def grid(self) -> Grid:
        """The fixed grid."""
        return self.transform.grid

    def apply(self, values: np.ndarray, grid: Grid | None = None, *, nearest: bool = False) -> np.ndarray:
        """Draw an image of the moving visit on the fixed grid.

        Parameters
        ----------
        values
            (z, y, x). Booleans are a mask, whose volume stays what it is.
        grid
            On which they lie; the registered image's own grid without it.
        nearest
            For labels.

        Returns
        -------
        ndarray
            NaN (masks and labels: 0) where the moving visit shows nothing.

        Raises
        ------
        GeometryError
            If values and grid do not fit together.
        """
        return self.transform.apply(values, self.moving_grid if grid is None else grid, nearest=nearest)

    def displacement(self) -> np.ndarray:
        """Return how far each point of the fixed grid has moved, mm: float32 (z, y, x, 3), (x, y, z) RAS+."""
        return self.transform.displacement()

    def jacobian(self) -> np.ndarray:
        """Return moving over fixed volume at each voxel, (z, y, x)."""
        return self.transform.jacobian()

    def volume_change(self, region: np.ndarray, grid: Grid | None = None) -> VolumeChange:
        """Return the volume of a region of the moving visit, before and after.

        Parameters
        ----------
        region
            bool (z, y, x).
        grid
            On which it lies; the registered image's own grid without it.
        """
        return volume_change(self.transform, region, self.moving_grid if grid is None else grid)

    def write(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write all of it into a folder of its own, which can be removed with the visit.

        ``displacement.nii.gz`` is a displacement field as ITK, ANTs and Slicer read it (LPS+, mm).

        Raises
        ------
        OutputError
            If the folder exists or cannot be written.
        """
        with atomic_folder(folder, overwrite=overwrite, marker=MARKER) as place:
            found: dict[str, object] = {
                "visit": self.visit,
                "moving_grid": grid_to_json(self.moving_grid),
                "alike": list(self.alike),
                "tumour": None if self.tumour is None else [self.tumour.before, self.tumour.after],
                "unguarded": None if self.unguarded is None else [self.unguarded.before, self.unguarded.after],
                "spread": self.spread is not None,
                "settings": self.settings,
                "transform": self.transform.write(place),
            }
            if self.spread is not None:
                write_image(place / "spread.nii.gz", self.spread, self.grid.affine)
            (place / MARKER).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Registration:
        """Return what :meth:`write` wrote.

        Raises
        ------
        InputError
            If the folder holds no registration, or a damaged one.
        """
        place = Path(folder)
        try:
            found = json.loads((place / MARKER).read_text(encoding="utf-8"))
            change = {name: found[name] and VolumeChange(*found[name]) for name in ("tumour", "unguarded")}
            spread = None
            if found["spread"]:
                spread = _stored(read_image(place / "spread.nii.gz").values, found["transform"]["grid"], place)
            return cls(
                Transform.read(place, found["transform"]),
                grid_from_json(found["moving_grid"]),
                (float(found["alike"][0]), float(found["alike"][1])),
                found["visit"],
                spread=spread,
                settings=found["settings"],
                **change,
            )
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(
                f"{place}: no registration can be read there ({type(error).__name__}: {error}). Register again."
            ) from None

    def __repr__(self) -> str:
        size = np.linalg.norm(self.displacement(), axis=-1)
        return (
            f"Registration(visit {self.visit}, moved {np.median(size):.1f} mm (median), {size.max():.1f} mm at most"
            + (f", tumour {self.tumour}" if self.tumour else "")
            + ")"
        )


def _stored(values: np.ndarray, grid: dict[str, object], place: Path) -> np.ndarray:
    # Images come in on the closest canonical axes; where the grid's own are others, they are brought back.
    wanted = grid_from_json(grid)
    ours = nib.io_orientation(wanted.affine)
    back = nib.apply_orientation(values.transpose(2, 1, 0), nib.orientations.ornt_transform(
        np.array([[0, 1], [1, 1], [2, 1]]), ours))  # fmt: skip
    found: np.ndarray = back.transpose(2, 1, 0)
    if found.shape != wanted.shape:
        raise InputError(f"{place}: spread.nii.gz has another shape than the registration. Register again.")
    return found


def volume_change(transform: Transform, region: np.ndarray, grid: Grid) -> VolumeChange:
    """Return the volume of a region of the moving visit before and after a transform."""
    region = np.asarray(region, bool)
    drawn = np.nan_to_num(transform.apply(region.astype(np.float32), grid))
    return VolumeChange(float(region.sum()) * grid.voxel_volume, float(drawn.sum()) * transform.grid.voxel_volume)
