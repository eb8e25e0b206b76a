"""Maps of visits as the quantification gives them, small and made up, on an oblique grid of long voxels."""

from __future__ import annotations

import numpy as np

from biomodel.findings import Finding
from biomodel.imaging.series_grid import Grid
from biomodel.imaging.voxelfit import Code
from biomodel.quantify.maps import Curve, Map, VisitMaps

SHAPE, SPACING = (9, 20, 24), (4.0, 1.6, 1.25)


def oblique_grid(shape=SHAPE, spacing=SPACING) -> Grid:
    """Turned by 12 and 7 degrees about two axes, the origin somewhere."""
    a, b = np.radians(12.0), np.radians(7.0)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ np.diag(spacing[::-1])
    affine[:3, 3] = [-31.5, 12.25, -44.0]
    return Grid(shape, spacing, affine)


def ball(grid: Grid, centre: tuple[float, float, float], radius: float) -> np.ndarray:
    """Bool (z, y, x): within `radius` mm of a place in voxels."""
    place = np.indices(grid.shape).reshape(3, -1).T - np.array(centre)
    return (np.linalg.norm(place * np.array(grid.spacing), axis=1) <= radius).reshape(grid.shape)


def quantified_visit(number: int = 1, day: float = 0.0, radius: float = 7.0, grid: Grid | None = None) -> VisitMaps:
    """Maps with errors and reason codes, a tumour of `radius` mm, curves and findings."""
    grid = oblique_grid() if grid is None else grid
    rng = np.random.default_rng(number)
    middle = tuple((count - 1) / 2 for count in grid.shape)
    organ = ball(grid, middle, 0.47 * max(n * d for n, d in zip(grid.shape, grid.spacing, strict=True)))
    region = ball(grid, (middle[0] + 1, middle[1] + 2, middle[2] - 2), radius)
    maps = {}
    for name, units, inside, outside in (
        ("Ktrans", "1/min", 0.22, 0.04), ("ve", "1", 0.35, 0.2), ("vp", "1", 0.05, 0.02),
        ("T1", "s", 1.6, 1.1), ("ADC", "mm^2/s", 1.1e-3, 1.9e-3),
    ):  # fmt: skip
        values = np.where(region, inside, outside) * (1 + 0.15 * rng.standard_normal(grid.shape))
        code = np.where(organ, Code.FITTED, Code.OUTSIDE).astype(np.uint8)
        if name in ("Ktrans", "ve", "vp"):
            quiet = organ & ~region & (rng.random(grid.shape) < 0.3)
            code[quiet] = Code.NO_ENHANCEMENT
            code[region & (rng.random(grid.shape) < 0.1)] = Code.AT_BOUND
        values[(code == Code.OUTSIDE) | (code == Code.NO_ENHANCEMENT)] = np.nan
        sd = np.abs(values) * (0.05 + 0.1 * rng.random(grid.shape))
        maps[name] = Map(name, units, values, sd, code, "extended Tofts, least squares" if units != "s" else "VFA")
    maps["drug_map"] = Map("drug_map", "1", np.where(organ, 1 + 0.2 * rng.standard_normal(grid.shape), np.nan))
    x = np.arange(0, 300.0, 6.0)
    fitted = 0.9 * (1 - np.exp(-np.clip(x - 48, 0, None) / 40)) * np.exp(-np.clip(x - 48, 0, None) / 900)
    b = np.array([0.0, 100.0, 400.0, 800.0])
    voxel = tuple(int(i) for i in np.argwhere(region)[region.sum() // 2])
    curves = (
        Curve("DCE, tumour", voxel, x, "time, s", fitted + 0.03 * rng.standard_normal(x.size), fitted,
              "concentration, mM"),
        Curve("DWI, tumour", voxel, b, "b-value, s/mm²", 900 * np.exp(-b * 1.1e-3) + 8 * rng.standard_normal(4),
              900 * np.exp(-b * 1.1e-3), "signal"),
    )  # fmt: skip
    findings = (
        Finding("warning", "plausibility", "dwi", "b = 800 s/mm²: SNR 8 <below 10>.", "Trust ADC above 1.5e-3 less."),
        Finding("info", "geometry", "dce", "Moved by up to 0.8 mm between phases.", "Nothing: motion was corrected."),
    )
    return VisitMaps(
        number, day, grid, maps, organ,
        tissues={"fibroglandular": np.where(organ, rng.random(grid.shape), 0).astype(np.float32)},
        region=region, curves=curves, findings=findings,
        notes=("T1 from variable flip angles.", "The input function is that of Parker & others."),
        acquisition={"vendor": "Siemens", "field_strength": 3.0, "sequence": "fl3d"},
    )  # fmt: skip
