"""What a scanner and a reader make of a virtual patient: ADC maps with noise, and a drawn region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from biomodel.anatomy import Mask, random_field
from biomodel.domain import Domain
from biomodel.patient import Visit
from biomodel.truth import Array

__all__ = ["Flaws", "Scan", "observe"]


@dataclass(frozen=True)
class Scan:
    """How ADC maps of virtual patients are made.

    Parameters
    ----------
    adc_w : float
        ADC of free water at body temperature (mm^2/s), at a cell fraction of 0 (Jarrett et al. 2021,
        doi:10.1038/s41596-021-00617-y).
    adc_min : float
        ADC at a cell fraction of 1 (mm^2/s); the lowest seen in breast tumours lie there.
    adc_fibroglandular : float
        Mean ADC of healthy fibroglandular tissue (mm^2/s): between 1.84e-3 +- 0.34e-3 (Choi et al.,
        https://escholarship.org/uc/item/6sc7m6cm) and 1.62e-3 +- 0.30e-3 (McDonald et al. 2014,
        doi:10.2214/AJR.13.11159).
    adc_adipose : float
        What an ADC map shows in fat (mm^2/s); with it, a breast of usual density has the mean of 0.93e-3 +- 0.38e-3
        that Choi et al. found over the whole breast.
    repeatability_cv : float
        Coefficient of variation of one factor per visit that scales the whole map: 0.048 in ACRIN 6698 (Newitt et al.
        2019, doi:10.1002/jmri.26539), 0.054 in Sorace et al. 2018 (doi:10.1002/jmri.26011).
    voxel_cv : float
        Coefficient of variation of independent noise in every voxel.
    visible_fraction : float
        Cell fraction from which a voxel belongs to the tumour's region.

    Notes
    -----
    Inside the region the ADC is exactly ``adc_w - (adc_w - adc_min) u`` before noise. Outside it passes into that of
    the tissue, in proportion to u below `visible_fraction`; those voxels carry no information on the cells.
    """

    adc_w: float = 3.0e-3
    adc_min: float = 0.6e-3
    adc_fibroglandular: float = 1.75e-3
    adc_adipose: float = 0.8e-3
    repeatability_cv: float = 0.05
    voxel_cv: float = 0.05
    visible_fraction: float = 0.10


@dataclass(frozen=True)
class Flaws:
    """Errors of scanner and reader that an analysis does not know of.

    Parameters
    ----------
    region_shift : int
        Largest shift of the drawn tumour region along each axis (voxels, uniform), anew at each visit.
    region_edge : int
        Voxels by which the drawn region is, with equal chances, too small, right or too large at each visit.
    snr, b_value : float
        The ADC comes from two magnitude images at b = 0 and `b_value` (s/mm^2) with Rician noise of this
        signal-to-noise ratio at b = 0, in place of the independent voxel noise. It is noisier where little signal is
        left, and biased there.
    noise_length : float
        Correlation length of that noise (mm), as from interpolation and filtering on the scanner.
    """

    region_shift: int = 1
    region_edge: int = 1
    snr: float = 40.0
    b_value: float = 800.0
    noise_length: float = 1.5


def observe(
    number: int,
    day: float,
    fraction: Array,
    domain: Domain,
    scan: Scan,
    rng: np.random.Generator,
    flaws: Flaws | None = None,
) -> Visit:
    """Scan the breast: an ADC map over the organ, and the tumour's region.

    Parameters
    ----------
    number, day
        Of the visit.
    fraction : array of shape (z, y, x)
        True cell fraction of every voxel.
    domain : Domain
        With the tissues ``fibroglandular`` and ``adipose``.
    scan : Scan
        Settings.
    rng : numpy.random.Generator
        Source of the noise.
    flaws : Flaws, optional
        What goes wrong besides. Without it the region is exact and the noise is independent between voxels.

    Returns
    -------
    Visit
        Without a region, and with a volume of 0, where no voxel reaches ``scan.visible_fraction``.
    """
    healthy = scan.adc_fibroglandular * domain.tissues["fibroglandular"] + scan.adc_adipose * domain.tissues["adipose"]
    weight = np.clip(fraction / scan.visible_fraction, 0.0, 1.0)
    adc = weight * (scan.adc_w - (scan.adc_w - scan.adc_min) * fraction) + (1.0 - weight) * healthy
    region = domain.mask & (fraction >= scan.visible_fraction)
    shift = 1.0 + scan.repeatability_cv * rng.standard_normal()
    if flaws is not None:
        adc = _magnitude_adc(rng, adc * shift, domain.spacing, flaws)
        region = _misplaced(rng, region, domain.mask, flaws)
    else:
        adc = adc * shift * (1.0 + scan.voxel_cv * rng.standard_normal(domain.shape))
    # Rounded to the precision of image files, so that the patient in memory is the one on disk.
    adc = np.where(domain.mask, adc, 0.0).astype(np.float32).astype(float)
    acquisition = {"vendor": "virtual", "field_strength": 3.0, "institution": "virtual", "sequence": "virtual DWI"}
    if not region.any():  # no tumour was seen
        return Visit(number, day, adc=adc, volume=0.0, acquisition=acquisition)
    return Visit(number, day, adc=adc, region=region, acquisition=acquisition)


def _magnitude_adc(rng: np.random.Generator, adc: Array, spacing: Sequence[float], flaws: Flaws) -> Array:
    """ADC from two magnitude images with correlated Rician noise: biased and noisier where little signal is left."""

    def image(signal: Array) -> Array:
        real, imaginary = (random_field(rng, adc.shape, spacing, flaws.noise_length) / flaws.snr for _ in range(2))
        return np.hypot(signal + real, imaginary)

    return np.log(image(np.ones_like(adc)) / image(np.exp(-flaws.b_value * adc))) / flaws.b_value


def _misplaced(rng: np.random.Generator, region: Mask, mask: Mask, flaws: Flaws) -> Mask:
    """The region as a hasty reader would draw it; an erosion that would leave nothing is not made."""
    moves = rng.integers(-flaws.region_shift, flaws.region_shift + 1, 3)
    grow = int(rng.integers(-1, 2)) * flaws.region_edge
    moved = np.zeros_like(region)
    # Only along axes with extent; voxels moved beyond the edge are lost, as they leave the mask anyway.
    steps = [(int(m) if n > 1 else 0, n) for m, n in zip(moves, region.shape, strict=True)]
    source = tuple(slice(max(0, -m), n - max(0, m)) for m, n in steps)
    target = tuple(slice(max(0, m), n - max(0, -m)) for m, n in steps)
    moved[target] = region[source]
    element = np.ones([3 if n > 1 else 1 for n in region.shape], bool)
    element &= ndimage.generate_binary_structure(3, 1)[tuple(slice(None) if n > 1 else slice(1, 2) for n in mask.shape)]
    if grow > 0:
        moved = ndimage.binary_dilation(moved, element, grow)
    elif grow < 0:
        thinner = ndimage.binary_erosion(moved, element, -grow)
        moved = thinner if (thinner & mask).any() else moved
    return moved & mask
