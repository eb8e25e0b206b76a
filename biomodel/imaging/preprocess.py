"""Preparing series for quantification: one grid, no coil shading, times from the bolus.

Resampling and the search for the coil's shading are SimpleITK's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from biomodel.errors import GeometryError, InputError
from biomodel.frozen import frozen_array
from biomodel.imaging.aif import arrival_time
from biomodel.imaging.series import Kind, Series
from biomodel.imaging.series_grid import Grid
from biomodel.imaging.transforms import from_itk, resample_along, simpleitk, to_itk

__all__ = [
    "BiasField",
    "bias_field",
    "correct_bias",
    "from_bolus",
    "isotropic",
    "plain_sample",
    "resample",
    "resample_series",
]

#: Voxels along the shortest axis that shrinking for the bias field leaves at least, as its splines need some.
LEAST_SHRUNKEN = 8
#: Largest number of voxels of a grid; more would not fit into memory beside the series.
MOST_VOXELS = 512**3
#: Share of the voxels, those that brighten most, whose mean curve shows the bolus where no region is given.
BRIGHTEST = 0.02
#: Least rise of that curve over its baseline, in standard deviations of the baseline.
LEAST_RISE = 5.0


def isotropic(grid: Grid, spacing: float | None = None) -> Grid:
    """Return a grid of cubic voxels over the same box, along the same axes.

    Parameters
    ----------
    spacing
        Side of a voxel, mm; the smallest of the given grid's without it.

    Raises
    ------
    GeometryError
        If the side is not a positive number, or gives too many voxels.
    """
    side = min(grid.spacing) if spacing is None else float(spacing)
    if not (np.isfinite(side) and side > 0):
        raise GeometryError(f"isotropic: spacing {spacing!r}; expected mm above 0.")
    old = np.array(grid.spacing)
    # Rounded first: 10 voxels of 3 mm are 30 of 1 mm, also where the product is 30.000000000000004.
    shape = np.maximum(np.ceil(np.round(np.array(grid.shape) * old / side, 6)).astype(int), 1)
    if float(np.prod(shape.astype(float))) > MOST_VOXELS:
        raise GeometryError(
            f"isotropic: spacing {side:g} mm gives {' × '.join(map(str, shape))} voxels; expected at most "
            f"{MOST_VOXELS}. Choose a larger spacing (mm)."
        )
    axes = grid.affine[:3, :3] / grid.spacing[::-1]
    # The boxes share their middle, and so do the voxels' edges where the sides divide.
    middle = grid.affine[:3, 3] + grid.affine[:3, :3] @ ((np.array(grid.shape[::-1]) - 1) / 2)
    affine = np.eye(4)
    affine[:3, :3] = axes * side
    affine[:3, 3] = middle - affine[:3, :3] @ ((shape[::-1] - 1) / 2)
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), (side, side, side), affine)


def resample(values: np.ndarray, source: Grid, target: Grid, *, nearest: bool = False) -> np.ndarray:
    """Draw an image on another grid, by its place in the patient.

    Parameters
    ----------
    values : ndarray, shape (z, y, x)
        On `source`. Booleans are a mask.
    nearest
        For labels, whose numbers must not be mixed.

    Returns
    -------
    ndarray, shape of `target`
        Numbers: float32, linear between voxels, NaN outside of the source and where most of what counts is NaN. Masks:
        as many voxels as the mask fills, those covered most; False outside. Labels: nearest, 0 outside. Onto larger
        voxels the image is averaged, not picked; :func:`biomodel.imaging.transforms.resample_along` says how.

    Raises
    ------
    GeometryError
        If values and grid do not fit together, or the grids share nothing.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise InputError(f"resample: values of type {values.dtype}; expected real numbers. Take magnitude or parts.")
    if source.same_as(target) and values.shape == source.shape:
        return values.copy()
    _share(source, target)
    return resample_along(values, source, target, nearest=nearest)


def resample_series(series: Series, target: Grid) -> Series:
    """Return a series on another grid, sample by sample; see :func:`resample`.

    The phase-encoding axis is kept only where the target's axes are those of the series, and the storage's largest
    values not at all, since averages do not reach them.
    """
    data = np.stack([resample(sample, series.grid, target) for sample in series.data])
    cosines = np.abs((series.grid.affine[:3, :3] / series.grid.spacing[::-1]).T @ target.affine[:3, :3])
    same = np.allclose(cosines / target.spacing[::-1], np.eye(3), atol=0.05)
    return replace(
        series,
        data=data,
        grid=target,
        ceiling=None,
        phase_encoding=series.phase_encoding if same else None,
        notes=(*series.notes, f"resampled from {series.grid}"),
    )


def _share(source: Grid, target: Grid) -> None:
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in target.shape[::-1]], indexing="ij")).reshape(3, -1)
    places = target.affine[:3, :3] @ corners + target.affine[:3, 3:]
    index = np.linalg.inv(source.affine[:3, :3]) @ (places - source.affine[:3, 3:])
    size = np.array(source.shape[::-1])
    if (index.max(1) < -0.5).any() or (index.min(1) > size - 0.5).any():
        raise GeometryError(
            f"resample: the grids share nothing: {source} and {target} lie apart. Check both affines; images of "
            "different parts of the patient cannot be brought onto one grid."
        )


@dataclass(frozen=True, eq=False)
class BiasField:
    """The shading of the receiving coil.

    Parameters
    ----------
    values
        float32 (z, y, x), factors whose geometric mean inside the mask is 1.
    """

    values: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", frozen_array(self.values, np.float32))

    def correct(self, image: np.ndarray) -> np.ndarray:
        """Return an image (..., z, y, x) without the shading, float32."""
        image = np.asarray(image, np.float32)
        if image.shape[-3:] != self.values.shape:
            raise GeometryError(
                f"bias field: image of shape {image.shape}; expected (..., {', '.join(map(str, self.values.shape))})."
            )
        return image / self.values


def bias_field(
    values: np.ndarray,
    grid: Grid,
    mask: np.ndarray | None = None,
    *,
    voxel: float = 5.0,
    knots: float = 150.0,
    iterations: tuple[int, ...] = (40, 30, 20),
) -> BiasField:
    """Estimate the shading of the receiving coil by N4 (Tustison et al. 2010, doi:10.1109/TMI.2010.2046908).

    Parameters
    ----------
    values : ndarray, shape (z, y, x)
        Before contrast agent, or with the least diffusion weighting. Voxels that are NaN or not positive are left out.
    mask
        bool (z, y, x): the body. Without it all voxels above Otsu's threshold.
    voxel
        The image is shrunk to voxels of about this size first, mm: the shading is much smoother.
    knots
        Distance of the spline's knots on the first level, mm; it halves from level to level.
    iterations
        On each level.

    Raises
    ------
    InputError
        If nothing, or only a constant, is left inside the mask.
    GeometryError
        If the shapes do not fit together.
    """
    sitk = simpleitk("the bias field")
    values = np.asarray(values, np.float32)
    if values.shape != grid.shape:
        raise GeometryError(f"bias field: values of shape {values.shape} on a grid of {grid.shape} (z, y, x).")
    use = np.isfinite(values) & (values > 0)
    if mask is not None:
        mask = np.asarray(mask, bool)
        if mask.shape != grid.shape:
            raise GeometryError(f"bias field: mask of shape {mask.shape}; expected {grid.shape} (z, y, x).")
        use &= mask
    clean = np.where(np.isfinite(values), values, 0).astype(np.float32)
    if mask is None and use.any():
        otsu = sitk.OtsuThresholdImageFilter()
        otsu.Execute(to_itk(clean, grid))
        use &= clean > otsu.GetThreshold()
    if use.sum() < 100 or not np.ptp(clean[use]) > 0:
        raise InputError(
            f"bias field: {int(use.sum())} voxels with signal, or no contrast among them; expected tissue. Check the "
            "image and its mask."
        )
    image, inside = to_itk(clean, grid), to_itk(use.astype(np.uint8), grid)
    factors = [
        max(1, min(int(voxel / step), count // LEAST_SHRUNKEN))
        for step, count in zip(image.GetSpacing(), image.GetSize(), strict=True)
    ]
    search = sitk.N4BiasFieldCorrectionImageFilter()
    search.SetNumberOfThreads(1)
    search.SetMaximumNumberOfIterations(list(iterations))
    extent = np.array(image.GetSize()) * np.array(image.GetSpacing())
    search.SetNumberOfControlPoints([max(1, round(length / knots)) + 3 for length in extent])
    small = sitk.BinShrink(image, factors)
    # A voxel counts where all that was joined in it does.
    known = sitk.Cast(sitk.BinShrink(sitk.Cast(inside, sitk.sitkFloat32), factors) > 0.99, sitk.sitkUInt8)
    if np.sum(from_itk(known)) < 50:
        small, known = image, inside
    search.Execute(small, known)
    log = from_itk(search.GetLogBiasFieldAsImage(image)).astype(float)
    log -= log[use].mean()
    # Far outside of the body nothing holds the splines; the range inside is all that is known.
    low, high = log[use].min(), log[use].max()
    return BiasField(np.exp(np.clip(log, low, high)))


def correct_bias(series: Series, mask: np.ndarray | None = None) -> tuple[Series, BiasField]:
    """Return a series without the shading of the coil, and the shading.

    One shading for all samples, so that their ratios stay: from the samples before the bolus (dynamic series: the first
    two), with the least diffusion weighting, or the mean of all others.
    """
    field = bias_field(plain_sample(series), series.grid, mask)
    made = replace(series, data=field.correct(series.data), ceiling=None, notes=(*series.notes, "bias field corrected"))
    return made, field


def plain_sample(series: Series) -> np.ndarray:
    """Return the image with the plainest anatomy, (z, y, x).

    Dynamic series: the mean of the first two samples, before the bolus. Diffusion: with the least weighting. Others:
    the mean of all.
    """
    if series.kind is Kind.DCE:
        chosen = series.data[:2]
    elif series.b_values is not None:
        chosen = series.data[series.b_values <= series.b_values.min() + 5.0]
    else:
        chosen = series.data
    image: np.ndarray = np.mean(chosen, axis=0, dtype=float).astype(np.float32)
    return image


def from_bolus(series: Series, region: np.ndarray | None = None) -> tuple[Series, float]:
    """Return a dynamic series with times from the arrival of the bolus on, and that arrival on its old clock, s.

    Parameters
    ----------
    series
        With times.
    region
        bool (z, y, x): the artery, or the tumour, whose mean curve tells. Without it the voxels that brighten most,
        one in fifty.

    Raises
    ------
    InputError
        If the series has no times, the region is empty, or no bolus arrives within the series.
    GeometryError
        If the region lies on another grid.
    """
    if series.kind is not Kind.DCE or series.times is None:
        raise InputError(f"{series.name}: a {series.kind.title}; expected a dynamic series with times.")
    if region is None:
        rise = series.data[2:].max(0) - series.data[:2].mean(0) if series.samples > 2 else np.zeros(series.grid.shape)
        rise = np.where(np.isfinite(rise), rise, -np.inf)
        region = rise >= np.quantile(rise[np.isfinite(rise)], 1 - BRIGHTEST) if np.isfinite(rise).any() else rise > 0
    region = np.asarray(region, bool)
    signal = series.signal(region)
    signal = signal[np.isfinite(signal).all(1)]
    if not len(signal):
        raise InputError(f"{series.name}: no voxel with signal in the region; expected the artery or the tumour.")
    curve = signal.mean(0, dtype=float)
    arrival = float(arrival_time(curve, series.times)[0])
    before = curve[series.times <= arrival]
    if not np.isfinite(arrival) or len(before) < 2 or not _rises(curve, before):
        raise InputError(
            f"{series.name}: no arrival of a bolus in the mean curve of {len(signal)} voxels. Give the artery or the "
            "tumour as region, and check that the series has two images or more before the bolus."
        )
    note = f"times from the arrival of the bolus, {arrival:.1f} s"
    return replace(series, times=series.times - arrival, notes=(*series.notes, note)), arrival


def _rises(curve: np.ndarray, before: np.ndarray) -> bool:
    noise = max(float(before.std(ddof=1)), float(np.abs(np.diff(curve, 2)).min()) / 2.45)
    return bool(curve.max() - before.mean() > LEAST_RISE * noise)
