"""From images to cell fractions and back to what a reader measures: cellularity, volume, cells, longest diameter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import pdist

from biomodel.domain import Domain
from biomodel.errors import CalibrationError
from biomodel.patient import Patient
from biomodel.visit import CellularitySettings, Visit


def cell_fraction(adc: np.ndarray, settings: CellularitySettings) -> np.ndarray:
    """Cell fraction u = N / theta from the apparent diffusion coefficient.

    u = (ADC_w - ADC) / (ADC_w - ADC_min): free water has no cells, ADC_min is a voxel full of cells.
    Anderson et al. 2000, Magn Reson Imaging 18:689, doi:10.1016/S0730-725X(00)00147-8; Atuegwu et al. 2011,
    doi:10.1002/mrm.23203.

    Parameters
    ----------
    adc : ndarray
        mm²/s.
    settings : CellularitySettings

    Returns
    -------
    ndarray
        Cell fraction; noise may take it below 0 or above 1.
    """
    return (settings.adc_w - np.asarray(adc, float)) / (settings.adc_w - settings.adc_min)


def shift_response(adc: np.ndarray, settings: CellularitySettings) -> np.ndarray:
    """Change of the measured cell fraction per relative change of ADC (negative)."""
    return -np.asarray(adc, float) / (settings.adc_w - settings.adc_min)


def voxel_noise(adc: np.ndarray, settings: CellularitySettings) -> np.ndarray:
    """Standard deviation of the measured cell fraction in one voxel, without the error shared by the whole visit."""
    return settings.voxel_cv * np.abs(shift_response(adc, settings))


def longest_diameter(region: np.ndarray, spacing: tuple[float, float, float]) -> float:
    """Longest distance between two voxel centres of a region in one axial slice, plus one in-plane voxel, mm.

    That is how RECIST measures in MRI: in the plane of acquisition (Eisenhauer et al. 2009,
    doi:10.1016/j.ejca.2008.10.026). An empty region has 0.
    """
    best = 0.0
    for plane in np.flatnonzero(region.any((1, 2))):
        points = np.argwhere(region[plane]) * np.array(spacing[1:])
        if len(points) > 3:
            try:
                points = points[ConvexHull(points).vertices]
            except QhullError:  # all on one line: the extreme points are enough
                order = np.lexsort(points.T)
                points = points[[order[0], order[-1]]]
        if len(points) > 1:
            best = max(best, float(pdist(points).max()))
        best = max(best, 0.0)
    return best + float(np.mean(spacing[1:])) if region.any() else 0.0


def volume(region: np.ndarray, domain: Domain) -> float:
    """Volume of a region, cm³."""
    return float(np.count_nonzero(region)) * domain.voxel_volume / 1e3


@dataclass(frozen=True, eq=False)
class Seen:
    """What one visit says about the cell fraction, on the whole grid.

    Attributes
    ----------
    day : float
    number : int
    region : ndarray of bool, shape (z, y, x)
        Where the reader saw tumour; outside, the cell fraction is below the visible one.
    fraction : ndarray or None, shape (z, y, x)
        Measured cell fraction, valid inside the region; None without an ADC map.
    sd : ndarray or None
        Its voxel noise, independent between voxels.
    response : ndarray or None
        Its change per relative shift of ADC; the shift is shared by the visit and has the repeatability's CV.
    """

    day: float
    number: int
    region: np.ndarray
    fraction: np.ndarray | None = None
    sd: np.ndarray | None = None
    response: np.ndarray | None = None

    def crop(self, box: tuple[slice, ...]) -> Seen:
        """The same on a box of the grid."""
        maps = [None if a is None else np.asarray(a)[box] for a in (self.fraction, self.sd, self.response)]
        return Seen(self.day, self.number, np.asarray(self.region)[box], *maps)


def observe(patient: Patient, visit: Visit) -> Seen | None:
    """What a visit says about the cell fraction; None where it has no region.

    A volume of 0 without a region says that no tumour was seen.
    """
    if visit.region is None:
        return Seen(visit.day, visit.number, np.zeros(patient.domain.shape, bool)) if visit.volume == 0 else None
    if visit.adc is None:
        return Seen(visit.day, visit.number, visit.region)
    settings = patient.cellularity
    if settings is None:
        raise CalibrationError(
            f"patient {patient.id}: visit {visit.number} has an ADC map, but the manifest has no 'cellularity' with "
            "adc_w and adc_min; add both (there is no default)."
        )
    adc = np.where(visit.region, visit.adc, settings.adc_w)
    # The noise is relative to ADC. Taken from the noisy value of the voxel itself it would weigh voxels with a low
    # error more than those with a high one, and bias every estimate; the neighbours' mean does not.
    local = _local_mean(adc, visit.region)
    if visit.adc_sd is None:
        sd = voxel_noise(local, settings)
    else:
        # The same holds for errors that come from a voxel's few own residuals. Errors at the edge, where tissues mix,
        # differ from those inside, so voxels are averaged with others of their depth only.
        variance = np.where(visit.region, visit.adc_sd, 0.0) ** 2
        depth = np.minimum(np.ceil(distance_transform_edt(visit.region) - 1e-9), 3)
        for layer in (1, 2, 3):
            variance = _local_mean(variance, depth == layer)
        sd = np.sqrt(variance) / (settings.adc_w - settings.adc_min)
    return Seen(
        visit.day,
        visit.number,
        visit.region,
        np.where(visit.region, cell_fraction(adc, settings), 0.0),
        sd,
        np.where(visit.region, shift_response(local, settings), 0.0),
    )


def _local_mean(values: np.ndarray, region: np.ndarray, width: float = 1.5) -> np.ndarray:
    """Gaussian mean over the region's voxels around each voxel (width in voxels); unchanged outside."""
    weight = gaussian_filter(region.astype(float), width, mode="constant")
    total = gaussian_filter(np.where(region, values, 0.0), width, mode="constant")
    return np.where(region, total / np.where(region, weight, 1.0), values)
