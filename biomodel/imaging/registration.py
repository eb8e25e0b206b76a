"""Registration of a later visit to the reference visit, without touching the size of the tumour.

The reference stays as it is; all that a later visit contributes lies in the :class:`Registration` of that visit, so
that leaving the visit out leaves nothing of it behind.

Example
-------
>>> found = register(Image(first, grid, organ), Image(later, later_grid), BSpline(),
...                  tumour=drawn_first, moving_tumour=drawn_later, visit=2)        # doctest: +SKIP
>>> print(found.tumour)                                                             # doctest: +SKIP
3.412 cm³ before, 3.409 cm³ after (-0.1 %)
>>> adc = found.apply(later_adc, later_grid)                                        # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import ndimage

from biomodel.errors import GeometryError, InputError
from biomodel.imaging.registration_bending import JointHistogram, Likeness, LocalCorrelation, Volume, bend
from biomodel.imaging.registration_kinds import Affine, BSpline, Image, Kind, Rigid
from biomodel.imaging.registration_result import Registration, volume_change
from biomodel.imaging.registration_search import check_image, check_overlap, linear, mask_image, matrix_of
from biomodel.imaging.registration_tumour import VolumeChange, rigid_inside
from biomodel.imaging.rigid_search import sharpened
from biomodel.imaging.series_grid import Grid
from biomodel.imaging.transforms import Transform, simpleitk, to_itk, voxel_centres

if TYPE_CHECKING:
    import SimpleITK as sitk

__all__ = [
    "Affine",
    "BSpline",
    "Image",
    "JointHistogram",
    "Kind",
    "LocalCorrelation",
    "Registration",
    "Rigid",
    "VolumeChange",
    "register",
    "volume_change",
]

#: Side of the blocks of voxels that are drawn with repetition for the spread, mm.
BLOCK = 15.0
#: By how much the windows or bins of the likeness differ between the runs of the spread.
VARIED = (1.0, 0.7, 1.4)
BENDING = BSpline()


def register(
    fixed: Image,
    moving: Image,
    kind: Kind = BENDING,
    *,
    tumour: np.ndarray | None = None,
    moving_tumour: np.ndarray | None = None,
    visit: int | None = None,
    seeds: Sequence[int] = (),
) -> Registration:
    """Find where each point of the fixed image lies in the moving one.

    The tumour is left out of the comparison, since it changes under treatment, and is moved rigidly, so that it keeps
    its volume; around it the transform goes over smoothly to that of the organ.

    Parameters
    ----------
    fixed
        The reference visit's; it stays as it is.
    moving
        A later visit's, with the same contrast or another.
    kind
        What may move.
    tumour
        bool, on the fixed image's grid: the region drawn at the reference visit.
    moving_tumour
        bool, on the moving image's grid: the region drawn at the later visit. Empty where nothing was left of it.
    visit
        Number of the later visit.
    seeds
        Each repeats the registration on blocks of voxels drawn with repetition (Kybic 2010, IEEE Trans Image Process
        19:64), with knots at other places and windows of other sizes; the spread of the results is kept. Two or more.

    Raises
    ------
    GeometryError
        If masks lie on another grid, the images show different parts of the patient, or the result folds.
    InputError
        If an image is constant, unknown or empty where it counts, or the reference's tumour is empty.
    """
    sitk = simpleitk("registration")
    _check_depth(fixed, moving)
    f_values, f_inside = check_image(fixed.values, fixed.grid, fixed.mask, f"fixed {fixed.name}")
    m_values, m_inside = check_image(moving.values, moving.grid, moving.mask, f"moving {moving.name}")
    drawn = _region(tumour, fixed.grid, "the reference visit's tumour")
    drawn_later = _region(moving_tumour, moving.grid, "the later visit's tumour")
    if drawn is not None and not drawn.any():
        raise InputError(
            "registration: the reference visit's tumour is empty; expected some voxels. Leave it away where there is "
            "no tumour to keep."
        )
    seeds = tuple(int(seed) for seed in seeds)
    if len(seeds) == 1 or len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds):
        raise InputError(f"registration: seeds {seeds}; expected none, or two or more different ones from 0.")
    check_overlap(fixed.grid, f_inside, moving.grid, None, "as their headers place them")
    one = Volume(f_values, f_inside & ~_around(drawn, fixed.grid), fixed.grid)
    two = Volume(m_values, m_inside & ~_around(drawn_later, moving.grid), moving.grid)
    if one.weight.sum() < 0.2 * f_inside.sum():
        raise InputError(
            "registration: the tumour fills most of the region; expected tissue around it to register by. Give a "
            "larger mask."
        )

    found = _search(one, two, kind, None, 0)
    check_overlap(fixed.grid, f_inside, moving.grid, found.itk(), "after the search")
    guarded = _guard(found, kind, drawn, drawn_later, moving.grid)
    _refuse_folds(guarded, kind)
    spread = None
    if seeds:
        runs = []
        for number, seed in enumerate(seeds):
            again = _search(one, two, kind, np.random.default_rng(seed), number)
            runs.append(_guard(again, kind, drawn, drawn_later, moving.grid).displacement())
        mean = np.mean(runs, axis=0)
        spread = np.sqrt(sum(((run - mean) ** 2).sum(-1) for run in runs) / (len(runs) - 1))
    like = kind.likeness if isinstance(kind, BSpline) else LocalCorrelation()
    start = Transform(fixed.grid, np.eye(4))
    settings: dict[str, object] = {"kind": type(kind).__name__, "description": repr(kind), "seeds": list(seeds)}
    settings["SimpleITK"] = sitk.Version.VersionString()
    measured = drawn_later is not None and bool(drawn_later.any())
    return Registration(
        guarded,
        moving.grid,
        (_alike(one, two, start, like), _alike(one, two, guarded, like)),
        visit,
        volume_change(guarded, drawn_later, moving.grid) if measured and drawn_later is not None else None,
        volume_change(found, drawn_later, moving.grid) if measured and drawn_later is not None else None,
        None if spread is None else spread.astype(np.float32),
        settings,
    )


def _check_depth(*images: Image) -> None:
    for image in images:
        if min(image.grid.shape) < 4:
            raise GeometryError(
                f"{image.name}: {image.grid}; expected at least 4 voxels along each axis, as fewer do not tell how a "
                "volume moved. Resample it to thinner slices first."
            )


def _region(region: np.ndarray | None, grid: Grid, name: str) -> np.ndarray | None:
    if region is None:
        return None
    region = np.asarray(region)
    if region.shape != grid.shape:
        raise GeometryError(
            f"registration: {name} has shape {region.shape}; expected {grid.shape} (z, y, x), that of its image. "
            "Resample it to the image."
        )
    if region.dtype != bool and not np.isin(region, (0, 1)).all():
        raise InputError(f"registration: {name} holds other values than 0 and 1; expected a mask. Choose one label.")
    return region.astype(bool)


def _around(region: np.ndarray | None, grid: Grid, margin: float = 3.0) -> np.ndarray:
    """The region and `margin` mm around it: its rim reacts to treatment, too."""
    if region is None or not region.any():
        return np.zeros(grid.shape, bool)
    return ndimage.distance_transform_edt(~region, grid.spacing) <= margin


def _search(fixed: Volume, moving: Volume, kind: Kind, rng: np.random.Generator | None, number: int) -> Transform:
    """One registration; with a generator, on blocks drawn with repetition."""
    sitk = simpleitk("registration")
    offset = np.zeros(3)
    seed = 0
    if rng is not None:
        fixed = Volume(fixed.values, fixed.weight * _blocks(fixed.grid, rng), fixed.grid)
        offset = rng.uniform(-0.5, 0.5, 3)
        seed = int(rng.integers(1, 2**20))
    f_image, m_image = to_itk(fixed.values, fixed.grid), to_itk(moving.values, moving.grid)
    f_mask = mask_image(fixed.weight > 0, fixed.grid)
    m_mask = None if moving.weight.all() else mask_image(moving.weight > 0, moving.grid)
    first = kind.start if isinstance(kind, BSpline) else kind
    rigid = linear(f_image, m_image, f_mask, m_mask, _start(fixed), first.metric, seed)
    rigid = _closer(fixed, moving, rigid)
    matrix = matrix_of(rigid)
    if isinstance(kind, Affine):
        affine = sitk.AffineTransform(3)
        affine.SetCenter(rigid.GetCenter())
        affine.SetMatrix(rigid.GetMatrix())
        affine.SetTranslation(rigid.GetTranslation())
        matrix = matrix_of(linear(f_image, m_image, f_mask, m_mask, affine, kind.metric, seed, (2, 1)))
    if not isinstance(kind, BSpline):
        return Transform(fixed.grid, matrix)
    along = None
    if kind.along is not None:
        axis = "xyz".index(kind.along)
        along = np.linalg.inv(matrix[:3, :3]) @ moving.grid.affine[:3, axis]
        along /= np.linalg.norm(along)
    likeness = kind.likeness if rng is None else kind.likeness.varied(VARIED[number % len(VARIED)])
    bent = bend(fixed, moving, matrix, kind.knots, kind.stiffness, likeness, offset, along)
    points = voxel_centres(fixed.grid)
    return Transform(fixed.grid, matrix, (points + bent) @ matrix[:3, :3].T + matrix[:3, 3] - points)


def _closer(fixed: Volume, moving: Volume, found: sitk.Euler3DTransform) -> sitk.Euler3DTransform:
    """The rigid motion, found more exactly where both images show the same contrast.

    Mutual information has a broad maximum; least squares have a sharp one, but a wrong one for other contrasts.
    """
    near = sharpened(fixed.values, fixed.weight, fixed.grid, moving.values, moving.weight, moving.grid, found)
    before, after = (
        _alike(fixed, moving, Transform(fixed.grid, matrix_of(motion)), LocalCorrelation()) for motion in (found, near)
    )
    return near if after > before else found


def _start(fixed: Volume) -> sitk.Euler3DTransform:
    sitk = simpleitk("registration")
    start = sitk.Euler3DTransform()
    inside = np.argwhere(fixed.weight > 0)[:, ::-1].mean(0)
    middle = fixed.grid.affine[:3, :3] @ inside + fixed.grid.affine[:3, 3]
    start.SetCenter((middle * [-1, -1, 1]).tolist())
    return start


def _blocks(grid: Grid, rng: np.random.Generator) -> np.ndarray:
    """How often each voxel was drawn: whole blocks, as many as there are, about one time each."""
    size = [max(1, round(BLOCK / s)) for s in grid.spacing]
    shift = [int(rng.integers(0, n)) for n in size]
    count = [n // k + 2 for n, k in zip(grid.shape, size, strict=True)]
    drawn = rng.poisson(1.0, count).astype(np.float32)
    index = [(np.arange(n) + s) // k for n, s, k in zip(grid.shape, shift, size, strict=True)]
    return drawn[np.ix_(*index)]


def _guard(
    found: Transform, kind: Kind, drawn: np.ndarray | None, drawn_later: np.ndarray | None, moving: Grid
) -> Transform:
    """The transform, rigid where the tumour lies at either visit."""
    if isinstance(kind, Rigid) or (drawn is None and drawn_later is None):
        return found
    guarded = found
    zone = np.zeros(found.grid.shape, bool) if drawn is None else drawn
    for _ in range(2):  # the later tumour's place moves with the transform that keeps it
        if drawn_later is not None and drawn_later.any():
            zone = zone | (np.nan_to_num(guarded.apply(drawn_later.astype(np.float32), moving)) > 0.05)
        field = rigid_inside(found.displacement().astype(float), found.grid, zone, kind.reach)
        guarded = Transform(found.grid, found.matrix, field)
    return guarded


def _refuse_folds(transform: Transform, kind: Kind) -> None:
    determinant = transform.jacobian()
    folded = determinant <= 0
    if folded.any():
        z, y, x = np.unravel_index(int(np.argmin(determinant)), determinant.shape)
        raise GeometryError(
            f"registration: the transform folds in {int(folded.sum())} voxels (smallest Jacobian determinant "
            f"{determinant.min():.2f} at voxel z {z}, y {y}, x {x}); tissue cannot do that. Use a stiffer kind, such "
            f"as {_stiffer(kind)}, or check that the images show the same breast or organ."
        )


def _stiffer(kind: Kind) -> str:
    if isinstance(kind, BSpline):
        stiffness = 5 * max(kind.stiffness, 10)
        return f"BSpline(knots={1.5 * kind.knots:g}, stiffness={stiffness:g}, reach={1.5 * kind.reach:g})"
    return "Rigid()"


def _alike(fixed: Volume, moving: Volume, transform: Transform, likeness: Likeness) -> float:
    drawn = transform.apply(np.where(moving.weight > 0, moving.values, np.nan), moving.grid)
    weight = (fixed.weight > 0) & np.isfinite(drawn)
    if not weight.any():
        return float("nan")
    one, two, where = (
        torch.as_tensor(np.asarray(array, np.float32)) for array in (fixed.values, np.nan_to_num(drawn), weight)
    )
    return float(likeness(one, two, where, fixed.grid.spacing))
