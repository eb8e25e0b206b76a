"""What the quantification of a study gives: maps with errors and reasons, visit by visit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from biomodel.errors import GeometryError, InputError
from biomodel.findings import Finding
from biomodel.frozen import FrozenDict, frozen_array
from biomodel.imaging.series_grid import Grid
from biomodel.imaging.voxelfit import Code

__all__ = ["Curve", "Map", "VisitMaps"]


@dataclass(frozen=True, eq=False)
class Map:
    """One quantity in every voxel.

    Parameters
    ----------
    name
        The field's standard term (OSIPI CAPLEX for DCE): ``Ktrans``, ``ve``, ``vp``, ``T1``, ``ADC``, ``AUC90`` ...
    units
        As ``1/min``, ``mm^2/s``, ``s``, ``1``.
    values
        float32 (z, y, x); NaN where there is none.
    sd
        Standard deviation of each value, the same shape; None where it is not known.
    code
        uint8 (z, y, x), :class:`~biomodel.imaging.voxelfit.Code` of each voxel; None where all are fitted.
    method
        How it was made, in a few words.
    """

    name: str
    units: str
    values: np.ndarray
    sd: np.ndarray | None = None
    code: np.ndarray | None = None
    method: str = ""

    def __post_init__(self) -> None:
        for name, kind in (("values", np.float32), ("sd", np.float32), ("code", np.uint8)):
            values = getattr(self, name)
            if values is None:
                continue
            if np.ndim(values) != 3 or np.shape(values) != np.shape(self.values):
                raise GeometryError(f"map {self.name}: {name} of shape {np.shape(values)}; expected one (z, y, x).")
            object.__setattr__(self, name, frozen_array(values, kind))

    def counts(self) -> dict[str, int]:
        """Number of voxels by reason, those that occur and are not outside the mask."""
        if self.code is None:
            return {}
        found, count = np.unique(self.code[self.code != Code.OUTSIDE], return_counts=True)
        return {Code(int(c)).name.lower(): int(n) for c, n in zip(found, count, strict=True)}


@dataclass(frozen=True, eq=False)
class Curve:
    """Measured and fitted signal of one voxel, to look at.

    Parameters
    ----------
    title
        As ``DCE, tumour`` or ``DWI, fibroglandular tissue``.
    voxel
        (z, y, x) on the grid of the visit's maps.
    x, x_label
        Abscissa (n,) with its name and unit, as ``time, s``.
    measured, fitted
        (n,) with the same unit, `y_label`.
    """

    title: str
    voxel: tuple[int, int, int]
    x: np.ndarray
    x_label: str
    measured: np.ndarray
    fitted: np.ndarray
    y_label: str


@dataclass(frozen=True, eq=False)
class VisitMaps:
    """All that one visit gave, on one grid.

    Parameters
    ----------
    number, day
        Of the visit.
    grid
        Where the voxels lie.
    maps
        By name.
    organ
        bool (z, y, x).
    tissues
        Fractions (z, y, x) by name of the tissue.
    region
        bool (z, y, x), the tumour; None where none was looked for.
    curves
        A few voxels with their fits.
    findings
        Of the quality check of the series.
    notes
        What was done and assumed, in sentences.
    acquisition
        ``vendor``, ``field_strength`` (T), ``sequence``.
    resolution
        Voxel sizes of the diffusion series along (z, y, x), mm; None where it is not known.
    edge
        Share of tumour from which a voxel belongs to the region.
    """

    number: int
    day: float
    grid: Grid
    maps: Mapping[str, Map]
    organ: np.ndarray
    tissues: Mapping[str, np.ndarray] = field(default_factory=dict)
    region: np.ndarray | None = None
    curves: tuple[Curve, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    acquisition: Mapping[str, object] = field(default_factory=dict)
    resolution: tuple[float, float, float] | None = None
    edge: float = 1.0

    def __post_init__(self) -> None:
        shapes = {m.name: m.values.shape for m in self.maps.values()} | {"organ": np.shape(self.organ)}
        shapes |= {name: np.shape(values) for name, values in self.tissues.items()}
        if self.region is not None:
            shapes["region"] = np.shape(self.region)
        for name, shape in shapes.items():
            if shape != tuple(self.grid.shape):
                raise GeometryError(f"visit {self.number}, {name}: shape {shape}; expected that of the grid, "
                                    f"{tuple(self.grid.shape)}.")  # fmt: skip
        for name in ("maps", "tissues", "acquisition"):
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))

    def __getitem__(self, name: str) -> Map:
        if name not in self.maps:
            raise InputError(f"visit {self.number}: no map {name!r}; there are {', '.join(self.maps) or 'none'}.")
        return self.maps[name]
