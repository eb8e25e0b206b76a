"""From ADC with its error to cell fraction with its error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from biomodel.errors import GeometryError, InputError
from biomodel.observation import cell_fraction, shift_response
from biomodel.visit import CellularitySettings

__all__ = ["CellFraction", "cell_fraction_with_sd"]


@dataclass(frozen=True, eq=False)
class CellFraction:
    """Cell fractions and their two errors.

    Attributes
    ----------
    fraction : ndarray
        Noise may take it below 0 or above 1.
    sd : ndarray
        Error of each voxel alone, independent between voxels.
    shared_sd : ndarray
        Error of each voxel from the shift of ADC that all voxels of a visit share (`repeatability_cv`): it does not
        average out over a region.
    """

    fraction: np.ndarray
    sd: np.ndarray
    shared_sd: np.ndarray

    @property
    def total_sd(self) -> np.ndarray:
        """Error of one voxel taken by itself."""
        return np.hypot(self.sd, self.shared_sd)


def cell_fraction_with_sd(adc: np.ndarray, adc_sd: np.ndarray, settings: CellularitySettings) -> CellFraction:
    """Cell fraction with its standard deviation from ADC with its standard deviation.

    u = (ADC_w - ADC) / (ADC_w - ADC_min) is linear in ADC, so its error is sd(ADC) / (ADC_w - ADC_min), exactly.
    `settings.voxel_cv` stands for an error that was not measured, and is not used here.

    Parameters
    ----------
    adc, adc_sd : ndarray
        mm²/s, of one shape; NaN where a voxel has no value.
    settings : CellularitySettings

    Returns
    -------
    CellFraction
        NaN where ADC or its error is NaN.

    Raises
    ------
    GeometryError
        If the maps differ in shape.
    InputError
        If a standard deviation is negative.
    """
    adc, adc_sd = np.asarray(adc, float), np.asarray(adc_sd, float)
    if adc.shape != adc_sd.shape:
        raise GeometryError(
            f"cell fraction: ADC of shape {adc.shape} and its error of shape {adc_sd.shape}; expected the same grid."
        )
    if (adc_sd < 0).any():
        raise InputError(
            f"cell fraction: {int((adc_sd < 0).sum())} negative standard deviations of ADC; expected values from 0 up."
        )
    sd = adc_sd / (settings.adc_w - settings.adc_min)
    missing = np.isnan(adc) | np.isnan(adc_sd)
    shared = settings.repeatability_cv * np.abs(shift_response(adc, settings))
    gone = np.where(missing, np.nan, 0.0)
    return CellFraction(cell_fraction(adc, settings) + gone, sd + gone, shared + gone)
