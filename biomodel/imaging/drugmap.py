"""How much of a drug reaches each voxel, relative to the tumour's mean, from maps of contrast-enhanced MRI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter

from biomodel.domain import Domain
from biomodel.errors import GeometryError, InputError
from biomodel.imaging.voxelfit import VALID

__all__ = ["DrugMap", "drug_map", "ktrans_per_plasma", "region_maximum", "region_mean", "tofts_supply"]

#: Width over which missing voxels are filled from their neighbours, mm. A working default: about two voxels.
REACH_MM = 3.0
#: Smallest fraction of the region that must be measured. A working default.
LEAST_MEASURED = 0.5
#: Values above this quantile of the region are set to it. A working default against single voxels in vessels.
WINSOR = 0.995
#: Plasma fraction under which Ktrans / vp says nothing. A working default, about the error of vp in breast DCE-MRI.
LEAST_PLASMA = 0.005


def region_mean(values: np.ndarray) -> float:
    """Mean of the region's values: the map then has mean 1 there, and a drug's efficacy means the tumour's average."""
    return float(values.mean())


def region_maximum(values: np.ndarray) -> float:
    """Largest of the region's values: the map then ends at 1, and a drug's efficacy means the best supplied voxel."""
    return float(values.max())


@dataclass(frozen=True, eq=False)
class DrugMap:
    """A drug map and what was done to get it.

    Attributes
    ----------
    values : ndarray, shape (z, y, x)
        Relative supply, 0 or more, finite everywhere inside the organ's mask; 0 outside it.
    filled : ndarray of bool, shape (z, y, x)
        Voxels of the mask that were not measured and were filled from others.
    scale : float
        Supply, in the units of the map it came from, that counts as 1.
    negative, above : int
        Voxels of the mask set to 0, and to the largest value.
    """

    values: np.ndarray
    filled: np.ndarray
    scale: float
    negative: int
    above: int


def drug_map(
    supply: np.ndarray,
    region: np.ndarray,
    domain: Domain,
    *,
    code: np.ndarray | None = None,
    scale: Callable[[np.ndarray], float] = region_mean,
    winsor: float = WINSOR,
    reach_mm: float = REACH_MM,
    least_measured: float = LEAST_MEASURED,
) -> DrugMap:
    """Turn a map of supply into the relative map that :class:`~biomodel.treatments.Chemotherapy` multiplies.

    Its hazard is efficacy · level · map, and the map is 1 where none is given. So the map has mean 1 over the tumour's
    measured voxels: the efficacy keeps its meaning, and its prior, with and without a map. Published models take the
    supply from the extended Tofts model (Jarrett et al. 2018, doi:10.1088/1361-6560/aac040) or from the area under the
    enhancement curve (Christenson et al. 2025, npj Syst Biol Appl 11:53); scaled to a maximum of 1
    (:func:`region_maximum`) the efficacy hangs on one noisy voxel.

    Parameters
    ----------
    supply : ndarray, shape (z, y, x)
        Area under the curve, Ktrans, :func:`tofts_supply` or :func:`ktrans_per_plasma`; any unit. NaN is missing.
    region : ndarray of bool, shape (z, y, x)
        The tumour at the same visit.
    domain : Domain
        Grid and mask of the organ: the model reads the map in the whole mask, where the tumour may spread.
    code : ndarray of int, shape (z, y, x), optional
        Reason codes of the fit (:class:`~biomodel.imaging.voxelfit.Code`); voxels without a valid one are missing.
    scale : callable
        From the region's values to the supply that counts as 1. To carry one visit's scale to another, pass
        ``lambda values: first.scale``.
    winsor : float
        Values above this quantile of the region are set to it; 1 for none.
    reach_mm : float
        Width (standard deviation) over which missing voxels take the mean of measured ones, mm: inside the region from
        the region alone, since the tissue around it is supplied differently. Farther away the nearest one counts.
    least_measured : float
        Smallest fraction of the region that must be measured.

    Returns
    -------
    DrugMap

    Raises
    ------
    GeometryError
        If the maps are not on the domain's grid.
    InputError
        If the region is empty or outside the mask, if too little of it was measured, or nothing arrives there.
    """
    supply = np.asarray(supply, float)
    region = np.asarray(region)
    arrays = {"supply": supply, "region": region} | ({} if code is None else {"code": np.asarray(code)})
    for name, array in arrays.items():
        if array.shape != domain.shape:
            raise GeometryError(
                f"drug map: {name} of shape {array.shape}; expected {domain.shape} like the mask. Bring it to the "
                "mask's grid first."
            )
    if region.dtype != bool:
        raise InputError(f"drug map: region of type {region.dtype}; expected bool.")
    if not region.any() or (region & ~domain.mask).any():
        raise InputError(
            f"drug map: {int(region.sum())} voxels in the region, {int((region & ~domain.mask).sum())} of them outside "
            "the mask; expected some, all inside."
        )
    if not 0.5 < winsor <= 1 or not reach_mm > 0 or not 0 < least_measured <= 1:
        raise InputError(
            f"drug map: winsor {winsor:g}, reach_mm {reach_mm:g}, least_measured {least_measured:g}; expected a "
            "quantile above 0.5 and up to 1, a width above 0, and a fraction above 0 and up to 1."
        )
    measured = np.isfinite(supply) & domain.mask
    if code is not None:
        measured &= np.isin(code, VALID)
    part = (measured & region).sum() / region.sum()
    if part < least_measured:
        raise InputError(
            f"drug map: {part:.0%} of the region's {int(region.sum())} voxels have a value; expected at least "
            f"{least_measured:.0%}. Check the fit's reason codes and the region, or leave the drug map out."
        )
    negative = measured & (supply < 0)
    values = np.where(measured, np.maximum(supply, 0.0), 0.0)
    top = float(np.quantile(values[measured & region], winsor)) if winsor < 1 else np.inf
    above = measured & (values > top)
    values = np.minimum(values, top)
    inside = measured & region
    one = scale(values[inside])
    if not (np.isfinite(one) and one > 0):
        raise InputError(
            f"drug map: the supply that counts as 1 is {one:g}; expected a number above 0. If nothing enhances in the "
            "region, leave the drug map out."
        )
    width = [reach_mm / step for step in domain.spacing]
    values = _fill(values, inside, region, width, domain.spacing)
    outside = domain.mask & ~region
    values = _fill(values, measured, outside, width, domain.spacing)
    missing = domain.mask & ~measured
    result = np.where(domain.mask, values / one, 0.0)
    return DrugMap(result, missing, one, int(negative.sum()), int(above.sum()))


def _fill(
    values: np.ndarray, source: np.ndarray, target: np.ndarray, width: list[float], spacing: tuple[float, ...]
) -> np.ndarray:
    # Voxels of the target that are no source take the Gaussian mean of sources, or the nearest where none is in reach.
    wanted = target & ~source
    if not wanted.any():
        return values
    weight = gaussian_filter(source.astype(float), width, mode="constant", truncate=3.0)
    total = gaussian_filter(np.where(source, values, 0.0), width, mode="constant", truncate=3.0)
    near = weight > 1e-6
    nearest = distance_transform_edt(~source, sampling=spacing, return_distances=False, return_indices=True)
    filled = np.where(near, total / np.where(near, weight, 1.0), values[tuple(nearest)])
    return np.where(wanted, np.maximum(filled, 0.0), values)


def ktrans_per_plasma(ktrans: np.ndarray, vp: np.ndarray, *, least_vp: float = LEAST_PLASMA) -> np.ndarray:
    """Ktrans / vp (1/min): how fast plasma passes into tissue, per volume of plasma; NaN where vp is too small.

    Parameters
    ----------
    ktrans : ndarray
        1/min.
    vp : ndarray
        Plasma fraction.
    least_vp : float
        Under it the quotient is noise.
    """
    ktrans, vp = np.asarray(ktrans, float), np.asarray(vp, float)
    if ktrans.shape != vp.shape:
        raise GeometryError(f"drug map: Ktrans of shape {ktrans.shape} and vp of shape {vp.shape}; expected the same.")
    good = vp >= least_vp
    return np.where(good, ktrans / np.where(good, vp, 1.0), np.nan)


def tofts_supply(
    ktrans: np.ndarray, ve: np.ndarray, vp: np.ndarray, times: np.ndarray, plasma: np.ndarray
) -> np.ndarray:
    """Area under the tissue's concentration curve in the extended Tofts model, for a given plasma curve.

    With the drug's plasma curve it is the exposure of the voxel to the drug, if the drug passes the vessel wall like
    the contrast agent (Jarrett et al. 2018, doi:10.1088/1361-6560/aac040). Integrated over time the model
    C = vp Cp + Ktrans Cp * exp(-Ktrans t / ve) gives

        ∫C dt = (vp + ve) ∫Cp dt - ve ∫Cp(s) exp(-Ktrans (T - s) / ve) ds,

    so that over long times only vp + ve counts, and over short ones vp and Ktrans.

    Parameters
    ----------
    ktrans : ndarray, shape (...)
        1/min.
    ve, vp : ndarray, shape (...)
        Fractions.
    times : ndarray, shape (samples,)
        s, growing.
    plasma : ndarray, shape (samples,)
        Concentration in plasma, linear between samples.

    Returns
    -------
    ndarray, shape (...)
        Plasma's units times s; NaN where a parameter is NaN, negative, or ve is 0.
    """
    t, cp = np.asarray(times, float), np.asarray(plasma, float)
    if t.ndim != 1 or t.shape != cp.shape or len(t) < 2 or not (np.diff(t) > 0).all() or not np.isfinite(cp).all():
        raise InputError(
            f"drug map: {t.size} times and {cp.size} plasma values; expected two or more growing times (s), and a "
            "finite concentration at each."
        )
    ktrans, ve, vp = np.broadcast_arrays(*(np.asarray(v, float) for v in (ktrans, ve, vp)))
    with np.errstate(invalid="ignore"):
        good = (ktrans >= 0) & (ve > 0) & (vp >= 0)
    rate = np.where(good, ktrans / np.where(good, ve, 1.0), 0.0) / 60
    total = float(np.trapezoid(cp, t))
    left = np.zeros(rate.shape)  # ∫Cp(s) exp(-rate (t - s)) ds, carried from sample to sample
    for step, c0, c1 in zip(np.diff(t), cp[:-1], cp[1:], strict=True):
        x = rate * step
        # Exact for a straight line; series where the rate is too small for the differences.
        small = x < 1e-4
        safe = np.where(small, 1.0, x)
        decay = np.exp(-x)
        first = np.where(small, 1 - x / 2 + x * x / 6, -np.expm1(-safe) / safe)
        second = np.where(small, 0.5 - x / 6 + x * x / 24, (1 - first) / safe)
        left = left * decay + step * (c0 * (first - second) + c1 * second)
    return np.where(good, (vp + ve) * total - ve * left, np.nan)
