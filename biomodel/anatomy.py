"""Geometry of virtual patients: a breast on its chest wall, its tissues, and the tumour before treatment.

Everything here is drawn from a numpy ``Generator``; nothing depends on the treatment, so that the state at day 0 is
independent of the parameters that a fit has to recover.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from biomodel.errors import GeometryError
from biomodel.truth import Array, Hazard, average, integrate, refine

Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Breast:
    """How virtual breasts and their tumours are drawn.

    Parameters
    ----------
    fibroglandular_share : (float, float)
        Range (uniform) of the fibroglandular fraction of the breast's volume. Measured mean 0.19; 80 % of women below
        0.27, 95 % below 0.45 (Yaffe et al. 2009, doi:10.1118/1.3250863).
    texture : float
        Correlation length of the tissue pattern (mm).
    chest_wall : float
        Depth of the chest wall behind the breast, as a share of the image's depth; nothing grows there.
    foci : tuple of floats
        Probabilities of one, two, three, ... foci. Published shares of multifocal and multicentric disease run from
        4 to 65 % of breast cancers, depending on how one looks (Bozzini et al. 2008, doi:10.1186/1471-2407-8-275).
    radius : (float, float)
        Range (uniform) of the radius of the visible tumour at day 0 (mm) for its largest focus.
    satellite : (float, float)
        Range (uniform) of the radius of the further foci, relative to the largest one.
    irregularity : float
        Relative standard deviation of the radius along the tumour's surface.
    core : (float, float)
        Range (uniform) of the cell fraction in the core at day 0, before the heterogeneity.
    heterogeneity : float
        Relative standard deviation of the cell fraction inside a focus.
    history : float
        Days of undisturbed growth before day 0, which give the fronts their natural profile.
    history_growth, history_diffusion : float
        Growth rate (1/day) and diffusion coefficient (mm^2/day) of that time. They are fixed, not the patient's own:
        otherwise the map at day 0 would tell something of the parameters that no fit can know, and the distribution
        of the parameters given that map would no longer be the prior.
    smallest : int
        Fewest voxels of the visible tumour at day 0; the tumour is enlarged until it has them.
    """

    fibroglandular_share: tuple[float, float] = (0.08, 0.35)
    texture: float = 4.0
    chest_wall: float = 0.12
    foci: tuple[float, ...] = (0.6, 0.3, 0.1)
    radius: tuple[float, float] = (8.0, 15.0)
    satellite: tuple[float, float] = (0.45, 0.75)
    irregularity: float = 0.2
    core: tuple[float, float] = (0.6, 0.85)
    heterogeneity: float = 0.08
    history: float = 4.0
    history_growth: float = 0.05
    history_diffusion: float = 0.1
    smallest: int = 60


def positions(shape: Sequence[int], spacing: Sequence[float]) -> tuple[Array, Array, Array]:
    """Coordinates (mm, from the middle of the box) of cell centres, as three arrays that broadcast to `shape`."""
    axes = [(np.arange(n, dtype=np.float64) + 0.5 - n / 2) * step for n, step in zip(shape, spacing, strict=True)]
    return axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]


def random_field(rng: np.random.Generator, shape: Sequence[int], spacing: Sequence[float], length: float) -> Array:
    """Smooth Gaussian random field with mean 0 and standard deviation 1 over the box; `length` in mm."""
    noise = rng.standard_normal(tuple(shape))
    field = ndimage.gaussian_filter(noise, [length / step for step in spacing], mode="wrap")
    field -= field.mean()
    return field / max(float(field.std()), 1e-12)


def draw_breast(
    rng: np.random.Generator, shape: tuple[int, int, int], spacing: Spacing, settings: Breast
) -> tuple[Mask, Array, Array]:
    """Draw the organ and its tissues.

    The breast is half of a superellipsoid that stands on a curved chest wall and points to the anterior (y grows from
    back to front, x from right to left hand side of the image, z from inferior to superior). Axes of length one stay
    flat. Fibroglandular tissue gathers behind the nipple and is broken up by a random field.

    Returns
    -------
    mask, fibroglandular, adipose : arrays of shape `shape`
        The two fractions sum to 1 inside the mask and are 0 outside.
    """
    z, y, x = positions(shape, spacing)
    extent = np.array(shape) * np.array(spacing)
    half_z, half_x = 0.47 * extent[0], 0.47 * extent[2]
    depth = (0.95 - settings.chest_wall) * extent[1]
    wide = (np.abs(z) / half_z) ** 2.3 + (np.abs(x) / half_x) ** 2.3
    wall = -extent[1] / 2 + extent[1] * settings.chest_wall * (1.0 - 0.5 * wide)
    height = (y - wall) / depth
    mask = (height > 0) & (wide + np.clip(height, 0, None) ** 2.3 < 1)

    towards_nipple = 1.0 - ((z / half_z) ** 2 + (x / half_x) ** 2) / 0.6 - ((height - 0.5) / 0.45) ** 2
    pattern = 2.0 * np.clip(towards_nipple, -2, None) + random_field(rng, shape, spacing, settings.texture)
    share = rng.uniform(*settings.fibroglandular_share)
    low, high = float(pattern.min()) - 5, float(pattern.max()) + 5
    for _ in range(60):  # bisection: the share falls as the level rises
        level = (low + high) / 2
        fraction = 1.0 / (1.0 + np.exp(-(pattern - level) / 0.25))
        low, high = (level, high) if fraction[mask].mean() > share else (low, level)
    # Rounded to the precision of image files, so that the patient in memory is the one on disk.
    fibroglandular = np.where(mask, fraction, 0.0).astype(np.float32).astype(float)
    adipose = np.where(mask, 1.0 - fibroglandular, 0.0).astype(np.float32).astype(float)
    return mask, fibroglandular, adipose


def _place_foci(
    rng: np.random.Generator, mask: Mask, fibroglandular: Array, spacing: Spacing, radii: Sequence[float]
) -> list[tuple[int, ...]]:
    """Voxels of the foci's centres: inside by their radius if there is room, in glandular tissue, near the first."""
    flat = [n for n, size in enumerate(mask.shape) if size > 1]
    # The distance to the outside; a flat axis has no outside, and the box's own edge counts as outside.
    room = np.pad(mask, [(1, 1) if n in flat else (0, 0) for n in range(3)])
    inner = tuple(slice(1, -1) if n in flat else slice(None) for n in range(3))
    room = ndimage.distance_transform_edt(room, sampling=[s if n in flat else 1e6 for n, s in enumerate(spacing)])[
        inner
    ]
    centres: list[tuple[int, ...]] = []
    z, y, x = positions(mask.shape, spacing)
    for radius in radii:
        weight = np.where(room >= min(radius + 2.0, 0.95 * room.max()), 0.1 + fibroglandular, 0.0)
        for (i, j, m), other in zip(centres, radii, strict=False):
            away = np.sqrt((z - z[i, 0, 0]) ** 2 + (y - y[0, j, 0]) ** 2 + (x - x[0, 0, m]) ** 2)
            near = np.exp(-0.5 * ((away - radius - other) / 4.0) ** 2)
            weight = weight * np.maximum(near, 1e-12)
        centre = rng.choice(weight.size, p=(weight / weight.sum()).ravel())
        centres.append(tuple(int(n) for n in np.unravel_index(centre, mask.shape)))
    return centres


def draw_tumour(
    rng: np.random.Generator,
    mask: Mask,
    fibroglandular: Array,
    spacing: Spacing,
    factors: Sequence[int],
    visible: float,
    settings: Breast,
) -> Array:
    """Draw the cell fraction at day 0 on the fine grid.

    Irregular blobs with steep edges are grown without treatment for ``settings.history`` days.

    Parameters
    ----------
    rng, settings
        The source of randomness and the distributions.
    mask, fibroglandular : arrays of shape (z, y, x)
        The organ on the voxel grid.
    spacing : (float, float, float)
        Voxel size (mm).
    factors : three ints
        Cells per voxel along each axis.
    visible : float
        Cell fraction from which a voxel counts as tumour.

    Returns
    -------
    array of shape (z, y, x) times `factors`

    Raises
    ------
    GeometryError
        If the organ has no room for a tumour of ``settings.smallest`` voxels.
    """
    count = 1 + int(rng.choice(len(settings.foci), p=np.array(settings.foci) / sum(settings.foci)))
    largest = rng.uniform(*settings.radius)
    radii = [largest, *(largest * rng.uniform(*settings.satellite) for _ in range(count - 1))]
    centres = _place_foci(rng, mask, fibroglandular, spacing, radii)
    cells = tuple(s / f for s, f in zip(spacing, factors, strict=True))
    fine = refine(mask, factors)
    z, y, x = positions(fine.shape, cells)
    where = positions(mask.shape, spacing)
    axes = [rng.uniform(0.85, 1.15, 3) for _ in radii]
    surface = random_field(rng, fine.shape, cells, 0.35 * largest)
    inside = random_field(rng, fine.shape, cells, 0.4 * largest)
    core = rng.uniform(*settings.core)
    grown = np.exp(settings.history_growth * settings.history)
    early = core / (core + grown * (1.0 - core))  # the logistic flow carries it to `core` at day 0
    # The front moves while the tumour grows: about this far, for these blobs, until it shows above `visible`.
    advance = 1.2 * np.sqrt(2.0 * settings.history_diffusion * settings.history)

    scale = 1.0
    for _ in range(25):
        depth = np.full(fine.shape, -np.inf)
        for (i, j, m), radius, stretch in zip(centres, radii, axes, strict=True):
            offset = (z - where[0][i, 0, 0], y - where[1][0, j, 0], x - where[2][0, 0, m])
            distance = np.sqrt(sum((d / a) ** 2 for d, a in zip(offset, stretch, strict=True)))
            edge = max(scale * radius - advance, 0.3 * radius) * (1.0 + settings.irregularity * surface)
            depth = np.maximum(depth, edge - distance)
        state = early * (1.0 + settings.heterogeneity * inside) / (1.0 + np.exp(np.clip(-depth / 0.3, -50, 50)))
        state = np.where(fine & (state > 1e-6), np.minimum(state, 0.95), 0.0)
        diffusivity = np.full(fine.shape, settings.history_diffusion)
        (state,) = integrate(
            state[None], fine, diffusivity, cells, settings.history_growth, Hazard.none(), [settings.history]
        )
        if int((average(state[0], factors) >= visible).sum()) >= settings.smallest:
            return state[0]
        scale *= 1.1
    raise GeometryError(
        f"Virtual patient: no room for a tumour of {settings.smallest} voxels in an organ of {int(mask.sum())} voxels "
        f"of {spacing} mm. Use a larger shape or finer spacing."
    )
