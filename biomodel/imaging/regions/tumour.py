"""The tumour's region without learnt weights: thresholds of enhancement find it, growing gives it its edge.

What enhances as in the functional tumour volume of the I-SPY trials (:func:`~biomodel.imaging.dce.functional_tumour`)
is certain tumour but too small: its thresholds leave out voxels that the tumour shares with fat. So they give the core
only, and the region grows from it to where the enhancement, signal after minus signal before, has fallen half of the
way to that of the tissue around: a voxel half full of tumour lies there, whatever the other half is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from biomodel.errors import InputError
from biomodel.imaging.dce.semiquantitative import functional_tumour
from biomodel.imaging.partial_volume import mean_over
from biomodel.imaging.regions.exam import Exam
from biomodel.imaging.regions.tissue import Tissues, fuzzy_c_means

__all__ = ["Thresholds", "TumourRegion", "find_tumour"]

#: Fewest voxels of parenchyma from which its enhancement is taken.
LEAST_PARENCHYMA = 50
#: Standard deviation of the smoothing before the thresholds, voxels.
SMOOTH = 0.7


@dataclass(frozen=True)
class Thresholds:
    """Settings of the default method.

    Parameters
    ----------
    enhancement : float
        Least early enhancement of the core, a fraction: 0.70 in I-SPY (Hylton et al. 2012,
        doi:10.1148/radiol.12110748).
    ratio : float
        Least signal enhancement ratio of the core.
    background : float
        Least signal before contrast relative to the 95th percentile.
    neighbours : int
        Of the 26 around a voxel that have to enhance too.
    above_parenchyma : float
        The core enhances more than the parenchyma's median by at least this many of its robust standard deviations:
        where the background enhances strongly, 70 % alone would take it for tumour.
    contrast : float
        The core enhances at least this far from the parenchyma (0) to the strongest part (1): patches of parenchyma
        that enhance by more than 70 % are still weak beside a tumour.
    edge : float
        Where the region ends, from the enhancement of the tissue around (0) to that of the core nearby (1).
    reach : float
        How far the region may grow from the core, mm.
    thinnest : float
        Diameter, mm: what is thinner, such as a vessel, is no core.
    smallest : float
        Volume of the smallest core, cm³.
    satellite, alike : float
        Further cores count from these parts of the strongest one's volume, and of its enhancement beyond the
        parenchyma's.
    largest_adc : float, optional
        mm²/s; what has more is left out, as cysts and fluid. Tumours under treatment may exceed common limits: none by
        default.
    """

    enhancement: float = 0.70
    ratio: float = 0.0
    background: float = 0.60
    neighbours: int = 4
    above_parenchyma: float = 3.0
    contrast: float = 0.4
    edge: float = 0.65
    reach: float = 6.0
    thinnest: float = 5.0
    smallest: float = 0.05
    satellite: float = 0.05
    alike: float = 0.7
    largest_adc: float | None = None

    def __post_init__(self) -> None:
        parts = (self.background, self.contrast, self.satellite, self.alike)
        if not (0 < self.edge < 1 and all(0 <= part <= 1 for part in parts)):
            raise InputError(
                f"Thresholds: edge {self.edge:g}, contrast {self.contrast:g}, background {self.background:g}, "
                f"satellite {self.satellite:g}, alike {self.alike:g}; expected parts from 0 to 1."
            )
        if min(self.enhancement, self.reach, self.smallest, self.thinnest) < 0:
            raise InputError("Thresholds: enhancement, reach, thinnest and smallest must not be negative.")
        if self.largest_adc is not None and not 0 < self.largest_adc < 0.01:
            raise InputError(f"Thresholds: largest_adc {self.largest_adc:g}; expected mm²/s, from 0 to 0.01.")


@dataclass(frozen=True, eq=False)
class TumourRegion:
    """A region and how it came about.

    Attributes
    ----------
    mask : ndarray of bool, shape (z, y, x)
        Empty where nothing was found.
    core : ndarray of bool, shape (z, y, x)
        What passed the thresholds and was kept.
    volume : float
        cm³.
    foci : int
        Number of separate cores.
    threshold : float
        Early enhancement that the core had to reach, a fraction.
    parenchyma : (float, float)
        Early enhancement of the background parenchyma: median and robust standard deviation; NaN without enough of it.
    steps : tuple of str
        What was done, in order, with numbers.
    """

    mask: np.ndarray
    core: np.ndarray
    volume: float
    foci: int
    threshold: float
    parenchyma: tuple[float, float]
    steps: tuple[str, ...]


def find_tumour(
    exam: Exam,
    organ: np.ndarray,
    thresholds: Thresholds = Thresholds(),  # noqa: B008 (immutable)
    *,
    tissue: Tissues | None = None,
    box: np.ndarray | None = None,
    seeds: Sequence[tuple[int, int, int]] = (),
) -> TumourRegion:
    """Find the tumour of an exam.

    Parameters
    ----------
    exam : Exam
    organ : ndarray of bool, shape (z, y, x)
        Nothing outside is tumour.
    thresholds : Thresholds
    tissue : Tissues, optional
        Of the same exam; gives the parenchyma and the receiver's bias. Without it bright tissue counts as parenchyma.
    box : ndarray of bool, shape (z, y, x), optional
        Where a reader says the tumour is.
    seeds : sequence of (z, y, x)
        Voxels that a reader has marked as tumour: cores that hold one, or lie within 5 mm, are kept and no others.

    Raises
    ------
    GeometryError
        If a mask has another shape.
    InputError
        If the organ has no signal, or a seed lies outside of the image.
    """
    inside = exam.mask(organ, "find_tumour: organ")
    limits = inside if box is None else inside & exam.mask(box, "find_tumour: box")
    for seed in seeds:
        if len(seed) != 3 or not all(0 <= s < n for s, n in zip(seed, exam.shape, strict=True)):
            raise InputError(f"find_tumour: seed {tuple(seed)}; the image has {exam.shape} voxels (z, y, x).")
    sound = inside & exam.sound
    if not (limits & sound).any():
        raise InputError("find_tumour: box and organ have no voxel with signal in common.")
    bias = np.ones(exam.shape) if tissue is None else tissue.bias
    before, early, late = (np.where(sound, image / bias, 0.0) for image in (exam.before, exam.early, exam.late))
    steps: list[str] = []
    # The thresholds see slightly smoothed images: the noise of single voxels would widen the range of parenchyma, and
    # a threshold above it would leave faint tumours out.
    soft = [_soften(image, sound) for image in (before, early, late)]
    relative = np.where(sound, soft[1] / np.where(sound, soft[0], 1.0) - 1, 0.0)

    threshold, parenchyma = _threshold(soft[0], soft[1], sound, thresholds, tissue, steps)

    def enhancing(least: float) -> np.ndarray:
        core = functional_tumour(
            soft[0], soft[1], soft[2], limits & sound,
            least_enhancement=least, least_ratio=thresholds.ratio, background=thresholds.background,
            neighbours=thresholds.neighbours,
        )  # fmt: skip
        steps.append(f"{int(core.sum())} voxels enhance by {least:.0%} or more at a ratio of {thresholds.ratio:g}.")
        return _thick(core, exam, thresholds)

    core = enhancing(threshold)
    stronger = _stronger(core, relative, threshold, exam, thresholds, parenchyma[0], seeds)
    if stronger > threshold:
        steps.append(f"The strongest part enhances by far more: threshold {stronger:.0%}.")
        threshold = stronger
        core = enhancing(threshold)
    core, foci = _keep(core, relative, threshold, exam, thresholds, parenchyma[0], seeds, steps)
    if not core.any():
        steps.append("No core is left: no tumour was found.")
        return TumourRegion(core, core, 0.0, 0, threshold, parenchyma, tuple(steps))
    region = _grow(core, early - before, limits & sound, inside & sound, exam, thresholds)
    steps.append(
        f"Grown from {int(core.sum())} to {int(region.sum())} voxels, to {thresholds.edge:.0%} between background "
        "and core."
    )
    if thresholds.largest_adc is not None:
        if exam.adc is None:
            raise InputError("find_tumour: a largest ADC is set but the exam has no ADC map.")
        wet = region & (exam.adc > thresholds.largest_adc)
        region &= ~wet
        steps.append(f"{int(wet.sum())} voxels with an ADC above {thresholds.largest_adc:.3g} mm²/s left out.")
    volume = float(region.sum()) * exam.voxel_volume / 1000
    return TumourRegion(region, core, volume, foci, threshold, parenchyma, tuple(steps))


def _soften(image: np.ndarray, sound: np.ndarray) -> np.ndarray:
    """The image smoothed by less than a voxel, without what lies outside of the mask."""
    weight = ndimage.gaussian_filter(sound.astype(float), SMOOTH)
    return np.where(sound, ndimage.gaussian_filter(image, SMOOTH) / np.maximum(weight, 1e-6), 0.0)


def _threshold(
    before: np.ndarray, early: np.ndarray, sound: np.ndarray, settings: Thresholds, tissue: Tissues | None,
    steps: list[str],
) -> tuple[float, tuple[float, float]]:  # fmt: skip
    """Early enhancement of tumour, above that of the parenchyma; a note is added to `steps`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(sound, (early - before) / before, np.nan)
    gland = (
        before >= settings.background * np.percentile(before[sound], 95)
        if tissue is None
        else np.nan_to_num(tissue.fibroglandular) >= 0.7
    )
    # What may be tumour, and its rim, is no background. Parenchyma as a whole may pass 70 %: then it is the weaker of
    # two groups that the bright tissue falls into.
    bright = relative[gland & sound]
    limit = settings.enhancement
    if bright.size >= LEAST_PARENCHYMA and np.ptp(clipped := np.clip(bright, *np.percentile(bright, [1, 99]))) > 0:
        limit = max(limit, float(fuzzy_c_means(clipped).centres.mean()))
    suspect = sound & (relative >= limit)
    suspect = ndimage.binary_dilation(ndimage.binary_opening(suspect, np.ones((2, 2, 2))), iterations=2)
    values = relative[gland & sound & ~suspect]
    if values.size < LEAST_PARENCHYMA:
        steps.append("Too little parenchyma for its background enhancement; the threshold stays as it is.")
        return settings.enhancement, (float("nan"), float("nan"))
    level = float(np.median(values))
    spread = float(1.4826 * np.median(np.abs(values - level)))
    threshold = max(settings.enhancement, level + settings.above_parenchyma * spread)
    raised = ", raised by it" if threshold > settings.enhancement else ""
    steps.append(f"Background parenchyma enhances by {level:.0%} ± {spread:.0%}; threshold {threshold:.0%}{raised}.")
    return threshold, (level, spread)


def _thick(core: np.ndarray, exam: Exam, settings: Thresholds) -> np.ndarray:
    """Without what is thinner than `thinnest` or smaller than `smallest`."""
    spacing = np.asarray(exam.spacing)
    labels, count = ndimage.label(_open(core, spacing, settings.thinnest / 2), np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1) * exam.voxel_volume / 1000
    sizes[0] = 0.0
    return (sizes >= settings.smallest)[labels] & (labels > 0)


def _near(labels: np.ndarray, exam: Exam, seeds: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Labels of the parts within 5 mm of a seed."""
    marked = np.zeros(exam.shape, bool)
    marked[tuple(np.array(seeds).T)] = True
    near = ndimage.distance_transform_edt(~marked, exam.spacing) <= 5.0
    return np.unique(labels[near & (labels > 0)])


def _strongest(labels: np.ndarray, count: int, relative: np.ndarray, threshold: float) -> int:
    """The part with the most enhancement beyond the threshold: neither a large faint patch nor a bright speck wins."""
    return 1 + int(np.argmax(ndimage.sum_labels(relative - threshold, labels, np.arange(1, count + 1))))


def _stronger(
    core: np.ndarray, relative: np.ndarray, threshold: float, exam: Exam, settings: Thresholds, parenchyma: float,
    seeds: Sequence[tuple[int, int, int]],
) -> float:  # fmt: skip
    """Threshold between the parenchyma and the strongest part (or that at the seeds); NaN without either."""
    labels, count = ndimage.label(core, np.ones((3, 3, 3)))
    if count == 0 or not np.isfinite(parenchyma):
        return float("nan")
    kept = _near(labels, exam, seeds) if seeds else np.array([_strongest(labels, count, relative, threshold)])
    part = np.isin(labels, kept) & core
    if not part.any():
        return float("nan")
    strength = float(np.percentile(relative[part], 90))
    return parenchyma + settings.contrast * (strength - parenchyma)


def _keep(
    core: np.ndarray, relative: np.ndarray, threshold: float, exam: Exam, settings: Thresholds, parenchyma: float,
    seeds: Sequence[tuple[int, int, int]], steps: list[str],
) -> tuple[np.ndarray, int]:  # fmt: skip
    """Parts of the core with a seed, or the strongest one and its satellites; and how many they are."""
    labels, count = ndimage.label(core, np.ones((3, 3, 3)))
    if count == 0:
        return core, 0
    if seeds:
        kept = _near(labels, exam, seeds)
        steps.append(f"{len(kept)} of {count} parts lie at a seed.")
    else:
        best = _strongest(labels, count, relative, threshold) - 1
        sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        means = np.asarray(ndimage.mean(relative, labels, np.arange(1, count + 1)))
        floor = parenchyma if np.isfinite(parenchyma) else 0.0
        alike = means - floor >= settings.alike * (means[best] - floor)
        kept = 1 + np.flatnonzero(alike & (sizes >= settings.satellite * sizes[best]))
        steps.append(
            f"{len(kept)} of {count} parts kept: the strongest one and what is large and enhances enough beside it."
        )
    return np.isin(labels, kept) & core, len(kept)


def _open(mask: np.ndarray, spacing: np.ndarray, radius: float) -> np.ndarray:
    """Opening by a ball (mm) through distances: no steps of whole voxels along coarse axes."""
    inner = ndimage.distance_transform_edt(np.pad(mask, 1), spacing)[1:-1, 1:-1, 1:-1] - spacing.min() / 2 >= radius
    if not inner.any():
        return inner
    return mask & (ndimage.distance_transform_edt(~inner, spacing) <= radius + spacing.max() / 2)


def _grow(
    core: np.ndarray, gain: np.ndarray, limits: np.ndarray, sound: np.ndarray, exam: Exam, settings: Thresholds
) -> np.ndarray:
    """The core and what is joined to it and enhances enough; holes filled."""
    spacing = np.asarray(exam.spacing)
    away = ndimage.distance_transform_edt(~core, spacing)
    inner = ndimage.binary_erosion(core)
    full = mean_over(gain, inner if inner.sum() >= 0.2 * core.sum() else core, spacing, 4.0)
    around = mean_over(gain, sound & (away > settings.reach / 2) & (away < 4 * settings.reach), spacing, 8.0)
    level = around + settings.edge * (full - around)
    soft = ndimage.gaussian_filter(np.where(sound, gain, around), 0.35)
    candidates = limits & (away <= settings.reach) & (soft >= level)
    # The core is where to start, not what to keep: 70 % is little beside a tumour that enhances by 200 %.
    region = ndimage.binary_propagation(core & candidates, mask=candidates)
    # Single voxels of noise on the surface go with the majority around them.
    return limits & ndimage.binary_fill_holes(ndimage.median_filter(region.astype(np.uint8), 3).astype(bool))
